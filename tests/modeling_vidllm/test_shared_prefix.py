"""Prompts of a video that share what they begin with: the same hidden states, gradients and boxes as prompts that run alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import RAGGED_SIZES, tiny_model, tiny_prompts, tiny_videos
from transformers import DynamicCache

from vidllm.modeling_vidllm import prefix_attention_vidllm
from vidllm.modeling_vidllm.prefix_attention_vidllm import block_attention, prefix_blocks
from vidllm.modeling_vidllm.scene_vidllm import VidLLMScene
from vidllm.modeling_vidllm.shared_prefix_vidllm import prefix_obstacle, shared_prefix


COORD, LOC, VIDEO = 291, 292, 290
INDEX = torch.tensor([1, 0, 1, -1, 1])
TAILS = [[7, 8, LOC, 9], [10, LOC], [7, 8, 12, 14, 15], [20, 21, 22], [7, COORD, 11]]
HEADS = [[5, 6], [5, 6], [5, 6], None, [5, 6]]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    model = tiny_model()
    model.set_attn_implementation(request.param)
    return model


@pytest.fixture(params=["rows", "blocks"])
def way(request, monkeypatch):
    """Both ways on a CPU, whichever the model would take there."""
    monkeypatch.setattr(prefix_attention_vidllm, "attends_by_blocks", lambda *_: request.param == "blocks")
    return request.param


def scenes(count):
    return VidLLMScene(tokens=torch.zeros(count, 3, 0), mask=torch.ones(count, 3, dtype=torch.bool))


def inputs_of(config, tails=TAILS):
    pixels, sizes = tiny_videos(RAGGED_SIZES[:2])
    ids, mask = tiny_prompts(config, tails, heads=HEADS, side="right")
    points = torch.arange(len(tails) * 3).reshape(-1, 1, 3) / 10.0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values_videos": pixels,
        "video_size_shw": sizes,
        "scene_index": INDEX[: len(tails)],
        "coord_points_world": points,
        "coord_mask": (ids == COORD).any(dim=1, keepdim=True),
    }


def counted(model, inputs):
    """Columns whose outputs mean something: no padding, no empty slot."""
    scene = model.encode_scene(inputs["pixel_values_videos"], inputs["video_size_shw"])
    keep = inputs["attention_mask"].bool()
    for row, which in enumerate(inputs["scene_index"].tolist()):
        if which >= 0:
            keep[row, inputs["input_ids"][row] == VIDEO] = scene.mask[which]
    return keep


def test_logits_boxes_and_gradients_equal_those_of_prompts_that_run_alone(model, way):
    inputs = inputs_of(model.config)
    keep = counted(model, inputs)
    found = []
    for share in (False, True):
        model.zero_grad()
        output = model(**inputs, share_prefix=share)
        loss = output.logits[keep].square().sum() + output.grounding.boxes.square().sum()
        loss.backward()
        found.append((output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (alone, alone_grads), (shared, shared_grads) = found
    torch.testing.assert_close(shared.logits[keep], alone.logits[keep], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(shared.grounding.boxes, alone.grounding.boxes, atol=2e-5, rtol=2e-5)
    assert torch.equal(shared.loc_index, alone.loc_index)
    assert shared_grads.keys() == alone_grads.keys()
    largest = max(grad.abs().max() for grad in alone_grads.values())  # a key's bias has none but rounding
    for name, grad in alone_grads.items():
        assert (shared_grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-6 * largest, name


def test_the_language_model_reads_the_scene_once_per_video(model, way):
    """Not only the same result: the row of three prompts is as long as one beginning and three rests; blocks are cut by length."""
    inputs, seen = inputs_of(model.config), []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs, share_prefix=True)
    hook.remove()
    slots = model.config.num_scene_tokens
    # 7 begins two of the three rests, but not the third prompt's point: shared are two ids, the slots and that 7
    if way == "rows":
        assert seen == [(3, 2 + slots + 1 + 3 + 4 + 2)]
        return
    # the longest beginning is that of the second prompt, alone on its video; rests: one token twice, then groups of 2, 3 and 4 tokens
    assert seen == [(1, 3 * (2 + slots + 1) + 2 * 1 + 2 + 3 + 4)]


def test_plan_by_hand():
    """Two prompts of one scene, one of another, one without; 8 is shared, what follows is not."""
    ids = torch.tensor([[8, 1, 2, 0], [8, 3, 0, 0], [8, 4, 5, 6], [9, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    plan = shared_prefix(ids, mask, scenes(2), torch.tensor([0, 0, 1, -1]), COORD)
    assert plan.pack(ids).tolist()[0] == [8, 1, 2, 3]
    assert plan.segment.tolist() == [[0, 1, 1, 2], [0, 0, 0, 1], [0, 1, -1, -1]]
    assert plan.position_ids(mask).tolist()[0] == [0, 1, 2, 1]
    assert plan.visible(mask)[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    real = mask.bool()
    assert torch.equal(plan.unpack(plan.pack(ids))[real], ids[real])


def test_nothing_is_shared_from_a_point_on():
    """The same ids can mean different places."""
    ids = torch.tensor([[8, COORD, 2, 3], [8, COORD, 2, 4]])
    plan = shared_prefix(ids, torch.ones_like(ids), scenes(1), torch.tensor([0, 0]), COORD)
    assert plan.segment.tolist() == [[0, 1, 1, 1, 2, 2, 2]]


def test_equal_prompts_keep_a_token_each():
    ids = torch.tensor([[8, 1, 2], [8, 1, 2]])
    plan = shared_prefix(ids, torch.ones_like(ids), scenes(1), torch.tensor([0, 0]), COORD)
    assert plan.pack(ids).tolist() == [[8, 1, 2, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_cache": True}, "without a cache"),
        ({"past_key_values": DynamicCache()}, "without a cache"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"attention_mask": torch.ones(5, 1, 4, 4)}, "attention mask of shape"),
    ],
)
def test_what_cannot_be_shared_is_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**inputs_of(model.config), **change}, share_prefix=True)


def test_padding_on_the_left_is_refused(model):
    inputs = inputs_of(model.config)
    ids, mask = tiny_prompts(model.config, TAILS, heads=HEADS)
    with pytest.raises(ValueError, match="padded on the right"):
        model(**{**inputs, "input_ids": ids, "attention_mask": mask}, share_prefix=True)


def test_text_alone(model, way):
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    with torch.no_grad():
        shared, alone = model(input_ids=ids, share_prefix=True).logits, model(input_ids=ids).logits
    torch.testing.assert_close(shared, alone, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("fields", "obstacle"),
    [
        ({"_attn_implementation": "flash_attention_2"}, "attention by flash_attention_2"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of kind sliding_attention"),
        ({"layer_types": None, "sliding_window": 7}, "a sliding window of 7"),
        ({"layer_types": ["full_attention"], "sliding_window": 7}, None),
        ({}, None),
    ],
)
def test_what_stands_in_the_way_is_named(fields, obstacle):
    config = SimpleNamespace(**{"_attn_implementation": "sdpa", **fields})
    assert prefix_obstacle(SimpleNamespace(config=config)) == obstacle


def test_a_language_model_with_a_window_is_refused(model):
    config = model.model.language_model.config
    kinds = config.layer_types
    try:
        config.layer_types = ["sliding_attention", *kinds[1:]]
        with pytest.raises(ValueError, match="got layers of kind sliding_attention"):
            model(**inputs_of(model.config), share_prefix=True)
    finally:
        config.layer_types = kinds


def random_prompts(rng, count):
    """Prompts of random length with a random common beginning, about three videos or none, with empty slots."""
    index = torch.from_numpy(rng.integers(-1, 3, count))
    beginning = rng.integers(1, 4)
    lengths = torch.from_numpy(rng.integers(beginning, beginning + 7, count))
    ids = torch.from_numpy(rng.integers(5, 8, (count, int(lengths.max()))))
    ids[:, :beginning] = 9
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    seen = mask.clone()
    if beginning > 2:
        seen[:, 1] = 0
    return ids, mask, seen, index


@pytest.mark.parametrize("seed", range(12))
def test_blocks_hold_every_token_and_attend_as_rows_do(seed):
    rng = np.random.default_rng(seed)
    ids, mask, seen, index = random_prompts(rng, int(rng.integers(1, 9)))
    plan = shared_prefix(ids, mask, scenes(3), index, COORD)
    blocks = prefix_blocks(plan, seen)
    real = seen.bool()
    assert torch.equal(blocks.unpack(blocks.pack(ids))[mask.bool()], ids[mask.bool()])
    assert torch.equal(blocks.unpack(blocks.position_ids(seen))[real], plan.unpack(plan.position_ids(seen))[real])
    heads, kv_heads, width = 6, 2, 4
    states = [torch.from_numpy(rng.normal(size=(*ids.shape, n * width))).float() for n in (heads, kv_heads, kv_heads)]
    # tokens that stand for the same place of a row must be equal, as they are in a model
    states = [plan.unpack(plan.pack(state)) for state in states]

    def laid_out(way):
        return [way.pack(state).unflatten(-1, (-1, width)).transpose(1, 2) for state in states]

    module = SimpleNamespace(training=False)
    query, key, value = laid_out(blocks)
    got, _ = block_attention(module, query, key, value, None, scaling=0.7, prefix_blocks=blocks)
    query, key, value = laid_out(plan)
    key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
    scores = (0.7 * query @ key.transpose(-1, -2)).masked_fill(~plan.visible(seen), -torch.inf)
    wanted = (scores.softmax(dim=-1) @ value).transpose(1, 2)
    torch.testing.assert_close(blocks.unpack(got)[real], plan.unpack(wanted)[real], atol=1e-5, rtol=1e-5)


def test_a_group_is_as_long_as_its_longest_rest():
    ids = torch.tensor([[8, 1, 2, 0, 0], [8, 3, 0, 0, 0], [8, 4, 5, 6, 7], [8, 2, 2, 0, 0], [8, 5, 0, 0, 0]])
    blocks = prefix_blocks(
        shared_prefix(ids, (ids > 0).long(), scenes(1), torch.zeros(5).long(), COORD), (ids > 0).long()
    )
    assert blocks.beginning_shape == (1, 1)
    assert [(len(row), length) for row, length in blocks.groups] == [(2, 1), (1, 2), (1, 2), (1, 4)]
    # the beginning, then the rests, the shortest first
    assert blocks.pack(ids).tolist() == [[8, 3, 5, 1, 2, 2, 2, 4, 5, 6, 7]]


def test_half_precision_stays_finite():
    ids = torch.tensor([[8, 1, 2], [8, 3, 0], [9, 9, 4]])
    seen = torch.tensor([[0, 1, 1], [0, 1, 0], [1, 1, 1]])  # a beginning of which nothing is seen
    blocks = prefix_blocks(shared_prefix(ids, (ids > 0).long(), scenes(2), torch.tensor([0, 0, 1]), COORD), seen)
    for dtype in (torch.float16, torch.bfloat16):
        states = [torch.full((1, n, blocks.prompt.shape[0], 4), 60.0, dtype=dtype) for n in (4, 2, 2)]
        got, _ = block_attention(SimpleNamespace(training=False), *states, None, prefix_blocks=blocks)
        assert torch.isfinite(got).all()


def test_attention_without_blocks_is_refused():
    states = [torch.zeros(1, 2, 3, 4)] * 3
    with pytest.raises(ValueError, match="wanted the blocks of packed prompts"):
        block_attention(SimpleNamespace(training=False), *states, None)


def test_layers_that_are_computed_twice_go_in_rows(model):
    """Their second run comes when the attention function is the usual one again."""
    inputs, seen = inputs_of(model.config), []
    keep = counted(model, inputs)
    language_model = model.model.language_model
    hook = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    grads = []
    try:
        for recompute in (False, True):
            model.train()
            if recompute:
                model.activation_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            output = model(**inputs, share_prefix=True, use_cache=False)
            output.logits[keep].square().mean().backward()
            grads.append(model.get_input_embeddings().weight.grad.clone())
    finally:
        hook.remove()
        model.activation_checkpointing_disable()
        model.eval()
    assert seen == [1, 3]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)
    assert language_model.config._attn_implementation in ("sdpa", "eager")
