"""Decoding: step by step, cached, beams, streamers, kept scenes, boxes."""

import pytest
import torch
from tiny import RAGGED_SIZES, tiny_model, tiny_prompts, tiny_videos
from transformers import TextStreamer


TAILS = [[7, 8, 9], [10, 11], [12, 13, 14, 15]]
NEW = 6


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def scene(model):
    return model.encode_scene(*tiny_videos(RAGGED_SIZES))


def greedy(model, **kwargs):
    return model.generate(**{"max_new_tokens": NEW, "do_sample": False, **kwargs})


def step_by_step(model, ids, mask, suppressed, steps=NEW, **first):
    """The slow obvious decoder: argmax over a full forward with cache, by hand."""
    output = model(input_ids=ids, attention_mask=mask, use_cache=True, **first)
    mask, cache = output.attention_mask, output.past_key_values
    all_logits = []
    for _ in range(steps):
        all_logits.append(output.logits[:, -1])
        logits = output.logits[:, -1].clone()
        logits[:, suppressed] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        output = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    return ids, torch.stack(all_logits, dim=1)


def test_generate_equals_forward_step_by_step_cached_and_uncached(model):
    pixels, sizes = tiny_videos(RAGGED_SIZES)
    ids, mask = tiny_prompts(model.config, TAILS)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels, "video_size_shw": sizes}
    suppressed = [model.config.video_token_id, model.config.coord_token_id]
    with torch.no_grad():
        by_hand, logits = step_by_step(model, ids, mask, suppressed, pixel_values_videos=pixels, video_size_shw=sizes)
    cached = greedy(model, **inputs, return_dict_in_generate=True, output_logits=True)
    uncached = greedy(model, **inputs, use_cache=False, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(cached.sequences, by_hand)
    assert torch.equal(uncached.sequences, by_hand)
    torch.testing.assert_close(torch.stack(cached.logits, 1), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(uncached.logits, 1), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("filled", [0, 1, 9, 16])
def test_empty_slots_stay_masked_in_decode_steps(model, scene, filled):
    """`generate` drops an all-ones mask and knows nothing of slots: the slow decoder without those slots must agree."""
    part = scene.select(0)
    part.mask = torch.zeros_like(part.mask)
    part.mask[:, :filled] = True
    ids, mask = tiny_prompts(model.config, TAILS[:1])
    new = greedy(model, input_ids=ids, attention_mask=mask, scene=part)[0, ids.shape[1] :]
    embed = model.get_input_embeddings()
    embeds = torch.cat([embed(torch.tensor([5, 6])), part.tokens[0, :filled], embed(torch.tensor(TAILS[0]))])[None]
    expected = []
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(inputs_embeds=embeds).logits[0, -1]
        logits[[model.config.video_token_id, model.config.coord_token_id]] = -torch.inf
        expected.append(int(logits.argmax()))
        embeds = torch.cat([embeds, embed(torch.tensor([[expected[-1]]]))], dim=1)
    assert new.tolist() == expected


def test_kept_scene_equals_video_many_prompts_of_different_length(model):
    pixels, sizes = tiny_videos(RAGGED_SIZES)
    heads = [[5, 6], [5, 6], [5, 6, 4], [5, 6], None]
    ids, mask = tiny_prompts(model.config, [*TAILS, [30], [31, 32]], heads=heads)
    index = torch.tensor([0, 0, 2, 1, -1])
    settings = {
        "input_ids": ids,
        "attention_mask": mask,
        "scene_index": index,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    from_video = greedy(model, pixel_values_videos=pixels, video_size_shw=sizes, **settings)
    scene = model.encode_scene(pixels, sizes)
    from_scene = greedy(model, scene=scene, **settings)
    assert torch.equal(from_video.sequences, from_scene.sequences)
    torch.testing.assert_close(torch.stack(from_video.logits), torch.stack(from_scene.logits), atol=1e-4, rtol=0)
    assert torch.equal(from_scene.sequences[:, : ids.shape[1]], ids)
    assert len(scene.prefix_caches) == 3  # (scene, head) pairs: two prompts share one
    kept = {key: [state[0].clone() for state in states] for key, (_, states) in scene.prefix_caches.items()}
    again = greedy(model, scene=scene, **settings)
    assert torch.equal(again.sequences, from_scene.sequences)
    for key, (_, states) in scene.prefix_caches.items():
        assert all(torch.equal(a, b[0]) for a, b in zip(kept[key], states, strict=True)), (
            "a call wrote into the kept prefix"
        )


def test_kept_prefix_is_really_used_and_dropped_when_weights_change(scene, monkeypatch):
    model = tiny_model()
    scene = scene.select(slice(None))
    ids, mask = tiny_prompts(model.config, TAILS)
    first = greedy(model, input_ids=ids, attention_mask=mask, scene=scene)
    assert len(scene.prefix_caches) == 3
    lengths = []
    forward = type(model.model.language_model).forward
    monkeypatch.setattr(
        type(model.model.language_model),
        "forward",
        lambda self, **kw: lengths.append(kw["inputs_embeds"].shape[1]) or forward(self, **kw),
    )
    assert torch.equal(greedy(model, input_ids=ids, attention_mask=mask, scene=scene), first)
    assert max(lengths) == max(map(len, TAILS)), "the prefix was computed again"
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight.mul_(-3)
    changed = greedy(model, input_ids=ids, attention_mask=mask, scene=scene)
    fresh = greedy(model, input_ids=ids, attention_mask=mask, scene=scene.select(slice(None)))
    assert torch.equal(changed, fresh)
    assert not torch.equal(changed, first)


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2, "do_sample": True}],
)
def test_beams_and_several_sequences(model, settings):
    pixels, sizes = tiny_videos(RAGGED_SIZES)
    ids, mask = tiny_prompts(model.config, TAILS)
    scene = model.encode_scene(pixels, sizes)
    results = []
    for given in ({"pixel_values_videos": pixels, "video_size_shw": sizes}, {"scene": scene}):
        torch.manual_seed(0)
        results.append(
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW, **{"do_sample": False, **settings}, **given
            )
        )
    assert results[0].shape[0] == 3 * settings.get("num_return_sequences", 1)
    assert torch.equal(*results)


def test_expanded_scene_equals_scene_index(model, scene):
    ids, mask = tiny_prompts(model.config, TAILS)
    one = scene.select(1)
    a = greedy(model, input_ids=ids, attention_mask=mask, scene=one)
    b = greedy(model, input_ids=ids, attention_mask=mask, scene=one.expand(3))
    c = greedy(model, input_ids=ids, attention_mask=mask, scene=scene, scene_index=torch.tensor([1, 1, 1]))
    assert torch.equal(a, b)
    assert torch.equal(a, c)


def test_streamer_prints_what_generate_returns(model, scene, capsys):
    class Numbers:
        def decode(self, ids, **kwargs):
            return "".join(f"{int(i)} " for i in ids)

    ids, mask = tiny_prompts(model.config, TAILS[:1])
    out = greedy(
        model,
        input_ids=ids,
        attention_mask=mask,
        scene=scene.select(0),
        streamer=TextStreamer(Numbers(), skip_prompt=True),
    )
    printed = [int(token) for token in capsys.readouterr().out.split()]
    assert printed == out[0, ids.shape[1] :].tolist()


def test_points_in_prompts(model, scene):
    """Points go through beams and kept scenes; another point gives another answer distribution."""
    config = model.config
    ids, mask = tiny_prompts(
        config, [[7, config.coord_token_id, 8], [config.coord_token_id, 9, config.coord_token_id, 3]]
    )
    points = torch.randn(2, 2, 3)
    coord_mask = torch.tensor([[True, False], [True, True]])
    given = {"input_ids": ids, "attention_mask": mask, "scene": scene.select([0, 1]), "coord_mask": coord_mask}
    with torch.no_grad():
        here = model(**given, coord_points_world=points).logits[:, -1]
        there = model(**given, coord_points_world=points + 1).logits[:, -1]
        padded = points.clone()
        padded[0, 1] = torch.nan
        same = model(**given, coord_points_world=padded).logits[:, -1]
    assert (here - there).abs().max() > 1e-3
    assert torch.equal(here, same)
    full = greedy(model, **given, coord_points_world=points, use_cache=False)
    assert torch.equal(greedy(model, **given, coord_points_world=points), full)
    greedy(model, **given, coord_points_world=points, num_beams=2)
    with pytest.raises(ValueError, match="finite"):
        greedy(model, **given, coord_points_world=points * torch.inf)
    with pytest.raises(ValueError, match=r"prompt 1: wanted 2 points"):
        model(**{**given, "coord_mask": torch.tensor([[True, False], [True, False]])}, coord_points_world=points)


def test_point_is_seen_in_the_predicted_room_frame(model, scene):
    """Turning the room and the point's embedding input together: only room_from_world @ point matters."""
    config = model.config
    ids, mask = tiny_prompts(config, [[7, config.coord_token_id, 8]])
    part = scene.select(0)
    point = torch.randn(1, 1, 3)
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    turned = scene.select(0)
    turned.reconstruction.room_from_world = part.reconstruction.room_from_world @ turn.T
    with torch.no_grad():
        a = model(input_ids=ids, attention_mask=mask, scene=part, coord_points_world=point).logits
        b = model(input_ids=ids, attention_mask=mask, scene=turned, coord_points_world=point @ turn.T).logits
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def force_loc(model, monkeypatch, at):
    """Make greedy decoding write `<loc>` at the given steps."""
    from transformers import LogitsProcessor

    class Force(LogitsProcessor):
        def __init__(self, start):
            self.start = start

        def __call__(self, ids, scores):
            if ids.shape[1] - self.start in at:
                scores = torch.full_like(scores, -torch.inf)
                scores[:, model.config.loc_token_id] = 0
            return scores

    return Force


def test_boxes_come_from_the_loc_token(model, monkeypatch):
    pixels, sizes = tiny_videos(RAGGED_SIZES)
    ids, mask = tiny_prompts(model.config, TAILS)
    scene = model.encode_scene(pixels, sizes)
    Force = force_loc(model, monkeypatch, at=(1, 3))
    settings = {"input_ids": ids, "attention_mask": mask, "return_dict_in_generate": True}
    out = greedy(
        model, **settings, pixel_values_videos=pixels, video_size_shw=sizes, logits_processor=[Force(ids.shape[1])]
    )
    laid = max(map(len, TAILS)) + 2 + model.config.num_scene_tokens
    kept = greedy(model, **settings, scene=scene, logits_processor=[Force(laid)])
    assert torch.equal(out.sequences, kept.sequences)
    for name in ("boxes", "box_scores", "no_target_scores"):
        torch.testing.assert_close(getattr(out, name), getattr(kept, name), atol=1e-4, rtol=1e-4)
    assert out.boxes.shape[0] == 3
    assert out.boxes.shape[2] == 6
    places = out.box_token_index
    assert set(places[places >= 0].tolist()) == {ids.shape[1] + 1, ids.shape[1] + 3}
    assert (out.sequences.gather(1, places.clamp_min(0))[places >= 0] == model.config.loc_token_id).all()
    assert ((out.box_scores >= 0) & (out.box_scores <= 1)).all()
    assert (out.boxes[places >= 0][:, 3:] > 0).all()
    # the same boxes from one forward over the finished sequences
    full_mask = torch.cat([mask, mask.new_ones(3, NEW)], dim=1)
    with torch.no_grad():
        forward = model(input_ids=out.sequences, attention_mask=full_mask, scene=scene)
    direct = model.boxes_of(forward)
    torch.testing.assert_close(direct.boxes, out.boxes, atol=1e-5, rtol=1e-5)
    assert torch.equal(direct.box_token_index, out.box_token_index)


def test_relative_scenes_give_boxes_in_the_unit_of_their_reconstruction(model):
    """The decoder works at a median distance of 2; its boxes must come back in the reconstruction's own unit."""
    pixels, sizes = tiny_videos()
    ids, mask = tiny_prompts(model.config, [[7, model.config.loc_token_id], [8, model.config.loc_token_id]])
    scene = model.encode_scene(pixels, sizes)
    assert not scene.reconstruction.is_metric
    with torch.no_grad():
        boxes = model.boxes_of(model(input_ids=ids, attention_mask=mask, scene=scene)).boxes
        bigger = scene.select(slice(None))
        bigger.position_scale = scene.position_scale / 10  # the same positions, read as a room ten times larger
        large = model.boxes_of(model(input_ids=ids, attention_mask=mask, scene=bigger)).boxes
    torch.testing.assert_close(large, boxes * 10, atol=1e-5, rtol=1e-4)


def test_no_loc_no_boxes(model, scene):
    ids, mask = tiny_prompts(model.config, TAILS)
    out = greedy(
        model,
        input_ids=ids,
        attention_mask=mask,
        scene=scene,
        return_dict_in_generate=True,
        suppress_tokens=[model.config.loc_token_id],
    )
    assert out.boxes.shape == (3, 0, 6)
    assert not (out.sequences[:, ids.shape[1] :] == model.config.loc_token_id).any()


def test_text_only_prompts(model):
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert greedy(model, input_ids=ids, attention_mask=mask).shape == (2, 3 + NEW)


def test_typos_are_caught(model, scene):
    ids, mask = tiny_prompts(model.config, TAILS)
    with pytest.raises(ValueError, match="not used by the model"):
        greedy(model, input_ids=ids, attention_mask=mask, scene=scene, pixel_value_videos=torch.zeros(1))


def test_max_length_counts_the_callers_prompt(model, scene):
    ids, mask = tiny_prompts(model.config, TAILS, heads=[[5, 6], [5], [5, 6, 7, 8, 9, 10]])
    out = model.generate(input_ids=ids, attention_mask=mask, scene=scene, max_length=ids.shape[1] + 3, do_sample=False)
    assert out.shape == (3, ids.shape[1] + 3)


def test_static_cache(model, scene):
    ids, mask = tiny_prompts(model.config, TAILS)
    plain = greedy(model, input_ids=ids, attention_mask=mask, scene=scene)
    static = greedy(
        model, input_ids=ids, attention_mask=mask, scene=scene, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(plain, static)
