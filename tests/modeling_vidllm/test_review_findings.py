"""Faults that a review found, each with the case that showed it."""

import copy
import pickle

import pytest
import torch
from tiny import RAGGED_SIZES, tiny_model, tiny_prompts, tiny_videos
from transformers import GenerationConfig


TAILS = [[7, 8, 9], [10, 11], [12, 13, 14, 15]]
# a long head before a short question: the layout [prefix | pad | question] is then longer than the caller's prompts
HEADS = [[5, 6], [5], [5, 6, 7, 8, 9, 10]]
HEADED_TAILS = [[7, 8, 9, 4, 3, 11], [10, 11], [12]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def scene(model):
    return model.encode_scene(*tiny_videos(RAGGED_SIZES))


def video():
    pixels, sizes = tiny_videos(RAGGED_SIZES)
    return {"pixel_values_videos": pixels, "video_size_shw": sizes}


def prompts(model, tails=TAILS, heads=None):
    ids, mask = tiny_prompts(model.config, tails, heads=heads)
    return {"input_ids": ids, "attention_mask": mask}


def first_logits(model, scene):
    settings = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**prompts(model), scene=scene, **settings).logits[0]


def fused_step(model, scene):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    inputs = prompts(model)
    model(**inputs, scene=scene, labels=inputs["input_ids"]).loss.backward()
    optimiser.step()


def swap_data(model, scene):
    weight = model.model.language_model.layers[0].mlp.down_proj.weight
    weight.data = weight.data * -3


def scale_data(model, scene):
    model.model.language_model.layers[0].mlp.down_proj.weight.data.mul_(-3)


def other_tokens(model, scene):
    scene.tokens = scene.tokens.flip(-1)


def tokens_in_place(model, scene):
    scene.tokens.mul_(-2)


@pytest.mark.parametrize("change", [fused_step, swap_data, scale_data, other_tokens, tokens_in_place])
def test_kept_prefix_is_dropped_whatever_changes(scene, change):
    """Fused optimisers and `.data` leave a parameter's version alone; a scene's tokens can be replaced."""
    model, scene = tiny_model(), scene.select(slice(None))
    before = first_logits(model, scene)
    assert scene.prefix_caches
    change(model, scene)
    after = first_logits(model, scene)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, first_logits(model, scene.select(slice(None))))


def test_copies_and_pickles_of_a_scene_carry_no_prefix(model, scene):
    scene = scene.select(slice(None))
    first_logits(model, scene)
    size = len(pickle.dumps(scene.select(slice(None))))
    assert len(pickle.dumps(scene)) == size
    for again in (copy.copy(scene), copy.deepcopy(scene), pickle.loads(pickle.dumps(scene))):
        assert again.prefix_caches == {}
        assert torch.equal(again.tokens, scene.tokens)
        assert again.reconstruction.unit == scene.reconstruction.unit


def test_lora_with_trainable_token_rows_generates_from_a_kept_scene(scene):
    from peft import LoraConfig, get_peft_model

    plain, scene = tiny_model(), scene.select(slice(None))
    config = LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        trainable_token_indices={"embed_tokens": [plain.config.coord_token_id, plain.config.loc_token_id]},
        init_lora_weights=False,
    )
    tuned = get_peft_model(tiny_model(), config).eval()
    settings = {**prompts(plain), "max_new_tokens": 5, "do_sample": False}
    with_adapter = tuned.generate(scene=scene, **settings)
    assert torch.equal(with_adapter, tuned.generate(**video(), **settings))
    with tuned.disable_adapter():
        assert torch.equal(tuned.generate(scene=scene, **settings), plain.generate(**video(), **settings))
    assert torch.equal(tuned.generate(scene=scene, **settings), with_adapter)


def test_kept_scene_with_the_first_weights_on_disk(model, scene, tmp_path):
    """The device of an offloaded first weight is meta; the prefix check must not go there."""
    from accelerate import dispatch_model

    offloaded = tiny_model()
    device_map = {f"model.{name}": "cpu" for name, child in model.model.named_children() if child is not None}
    device_map |= {"lm_head": "cpu", "model.encoder": "disk"}
    dispatch_model(offloaded, device_map=device_map, main_device="cpu", offload_dir=str(tmp_path))
    settings = {**prompts(model), "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**settings, scene=scene.select(slice(None)))
    assert torch.equal(offloaded.generate(**settings, scene=scene.select(slice(None))), expected)


def test_padding_is_masked_where_no_mask_is_given(scene):
    model = tiny_model()
    model.generation_config.pad_token_id = 0
    inputs = prompts(model)
    settings = {"scene": scene, "max_new_tokens": 5, "do_sample": False}
    assert (inputs["attention_mask"] == 0).any()
    assert torch.equal(model.generate(inputs["input_ids"], **settings), model.generate(**inputs, **settings))


def test_generation_config_object_is_used_and_left_alone(model, scene, caplog):
    inputs = prompts(model, HEADED_TAILS, HEADS)
    length = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, **video(), max_new_tokens=5, do_sample=False)
    config = GenerationConfig(
        max_length=length + 5, min_length=length + 4, do_sample=False, eos_token_id=int(free[0, length + 2]),
        pad_token_id=0, suppress_tokens=[int(free[1, length])],
    )  # fmt: skip
    before = config.to_dict()
    with caplog.at_level("WARNING"):
        kept = model.generate(**inputs, scene=scene, generation_config=config)
    assert config.to_dict() == before
    assert kept.shape == (3, length + 5)
    assert torch.equal(kept, model.generate(**inputs, **video(), generation_config=config))
    assert not (kept[:, length:] == free[1, length]).any()


def test_hidden_states_of_a_kept_scene_cover_the_whole_prompt(model, scene):
    inputs = prompts(model, HEADED_TAILS, HEADS)
    out = model.generate(
        **inputs,
        scene=scene,
        max_new_tokens=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_hidden_states=True,
    )
    assert out.hidden_states[0][-1].shape[:2] == inputs["input_ids"].shape


def test_returned_cache_fits_the_sequences_or_is_left_out(model, scene):
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    assert model.generate(**prompts(model, HEADED_TAILS, HEADS), scene=scene, **settings).past_key_values is None
    config, one = model.config, scene.select(0)
    inputs = {**prompts(model, [[7, config.coord_token_id, 8]]), "coord_points_world": torch.randn(1, 1, 3)}
    first = model.generate(**inputs, scene=one, **settings)
    # the next turn, with the cache of the first: its point lies in the part that the cache holds
    inputs["input_ids"] = torch.cat([first.sequences, torch.tensor([[20, 21]])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    cached = model.generate(**inputs, scene=one, past_key_values=first.past_key_values, **settings)
    assert torch.equal(cached.sequences, model.generate(**inputs, scene=one, **settings).sequences)


def test_proposals_come_back_as_boxes_in_their_own_unit(model, scene):
    """Proposals are in the reconstruction's unit, like points and returned boxes, not in position units."""
    assert not torch.equal(scene.position_scale, torch.ones(3))
    loc = model.config.loc_token_id
    proposals = torch.rand(3, 4, 6) + 0.2
    proposal_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    given = {"scene": scene, "proposal_boxes": proposals, "proposal_mask": proposal_mask}
    with torch.no_grad():
        direct = model.boxes_of(model(**prompts(model, [[7, loc]] * 3), **given))

    def force_loc(ids, scores):
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([loc]), 0.0)

    generated = model.generate(
        **prompts(model), **given, max_new_tokens=1, return_dict_in_generate=True, logits_processor=[force_loc]
    )
    for output in (direct, generated):
        assert (output.box_token_index >= 0).any(dim=1).all()
        for row in range(3):
            found = output.boxes[row][output.box_token_index[row] >= 0]
            distance = (found[:, None] - proposals[row][proposal_mask[row]]).abs().amax(-1).amin(-1)
            assert (distance < 1e-5).all()


def test_given_depth_without_a_usable_pixel_keeps_the_metres_of_the_weights():
    model = tiny_model(is_metric=True)
    pixels, sizes = tiny_videos()
    plain = model.reconstruct(pixels, sizes)
    blind = model.reconstruct(pixels, sizes, geometry={"depth_m": torch.zeros(2, 3, 28, 42)})
    assert not torch.equal(plain.scale, torch.ones(2))
    assert torch.equal(blind.scale, plain.scale)
    assert torch.equal(blind.cam_from_world, plain.cam_from_world)
    assert blind.is_metric


def test_tuple_begins_with_loss_and_logits(model):
    inputs = prompts(model)
    with torch.no_grad():
        named = model(**inputs, **video(), labels=inputs["input_ids"])
        plain = model(**inputs, **video(), labels=inputs["input_ids"], return_dict=False)
        tuples = copy.deepcopy(model)
        tuples.config.return_dict = False
        by_config = tuples(**inputs, **video(), labels=inputs["input_ids"])
    for output in (plain, by_config):
        assert torch.equal(output[0], named.loss)
        assert torch.equal(output[1], named.logits)


def test_trainer_predicts_logits_only(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_model()

    def collate(rows):
        inputs = prompts(model, [[7, model.config.loc_token_id], [9, 8, 4]])
        pixels, sizes = tiny_videos()
        return {**inputs, "pixel_values_videos": pixels, "video_size_shw": sizes, "labels": inputs["input_ids"]}

    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, report_to=[], remove_unused_columns=False
    )
    predicted = Trainer(model, arguments, data_collator=collate).predict([0, 1, 2, 3])
    assert predicted.predictions.shape == (4, 21, 300)


def test_scene_encoded_under_inference_mode_trains(model):
    with torch.inference_mode():
        scene = model.encode_scene(*tiny_videos(RAGGED_SIZES))
    tuned = tiny_model().train()
    inputs = prompts(model, [[7, model.config.loc_token_id]] * 3)
    output = tuned(**inputs, scene=scene, labels=inputs["input_ids"])
    (output.loss + output.grounding.boxes_per_layer.sum()).backward()
    assert tuned.model.grounding.scene_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("tied", [True, False])
def test_language_model_with_another_name_for_its_embedding(tmp_path, tied):
    text = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 300, "bos_token_id": 1,
            "eos_token_id": 2, "tie_word_embeddings": tied}  # fmt: skip
    model = tiny_model(text_config=text)
    assert (model.lm_head.weight is model.model.language_model.wte.weight) == tied
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**prompts(model), **video()).logits, model(**prompts(model), **video()).logits)


WRONG_CALLS = {
    "no points": ([[7, 291]] * 3, {}, "coord_points_world: wanted one point per coord token"),
    "points of other rows": ([[7, 291]] * 3, {"coord_points_world": torch.zeros(2, 1, 3)}, r"wanted shape \(3, points, 3\)"),
    "flat points": ([[7, 291]] * 3, {"coord_points_world": torch.zeros(3, 1, 2)}, r"wanted shape \(3, points, 3\)"),
    "other coord mask": (
        [[7, 291]] * 3,
        {"coord_points_world": torch.zeros(3, 1, 3), "coord_mask": torch.ones(3, 2).bool()},
        "coord_mask: wanted",
    ),
    "proposals of other videos": ([[7, 292]] * 3, {"proposal_boxes": torch.ones(2, 4, 6)}, "proposal_boxes: wanted"),
    "proposals of another size": ([[7, 292]] * 3, {"proposal_boxes": torch.ones(3, 4, 7)}, "proposal_boxes: wanted"),
    "other proposal mask": (
        [[7, 292]] * 3,
        {"proposal_boxes": torch.ones(3, 4, 6), "proposal_mask": torch.ones(3, 5).bool()},
        "proposal_mask: wanted",
    ),
    "short mask": (TAILS, {"attention_mask": torch.ones(3, 4)}, "attention_mask: wanted"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_prompt_inputs_are_named(model, scene, case):
    tails, changes, words = WRONG_CALLS[case]
    with pytest.raises(ValueError, match=words):
        model(**{**prompts(model, tails), "scene": scene, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale_frames": torch.tensor([[0, 2]] * 3)}, "scale_frames: wanted"),
        ({"scale_frames": torch.tensor([[0, 1]] * 2)}, "scale_frames: wanted"),
        ({"scale_frames": torch.tensor([[0, -2]] * 3)}, "scale_frames: wanted"),
        ({"output_scene_tokens": False}, "output_scene_tokens: wanted True"),
        ({"video_size_shw": torch.tensor(RAGGED_SIZES).float()}, "video_size_shw: wanted whole numbers"),
        ({"geometry": [1]}, "geometry: wanted a dict"),
    ],
)
def test_wrong_video_inputs_are_named(model, changes, words):
    with pytest.raises(ValueError, match=words):
        model(**{**prompts(model), **video(), **changes})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_pixels_that_are_not_finite_are_refused_but_padding_is_free(model, value):
    inputs = video()
    inputs["pixel_values_videos"][1, 2:] = value  # beyond the second video's two frames
    assert torch.isfinite(model.encode_scene(**inputs).tokens).all()
    inputs["pixel_values_videos"][1, 1, 0, 3, 4] = value
    with pytest.raises(ValueError, match="pixel_values_videos: wanted finite pixels"):
        model.encode_scene(**inputs)


def test_generate_refuses_what_it_would_ignore(model, scene):
    for name, value in (("metric", True), ("scale_frames", torch.zeros(3, 1).long())):
        with pytest.raises(ValueError, match=f"generate: {name}"):
            model.generate(**prompts(model), **video(), max_new_tokens=1, **{name: value})
    # one prompt without a place for its video, also where the others start from a kept prefix
    blind = prompts(model, heads=[[5, 6], None, [5, 6]])
    for given in (video(), {"scene": scene}):
        with pytest.raises(ValueError, match="got a prompt without"):
            model.generate(**blind, **given, max_new_tokens=1)
    with pytest.raises(ValueError, match="need a scene"):
        model.generate(torch.tensor([[5, model.config.coord_token_id]]), max_new_tokens=1)


def test_masked_filled_slots_stay_masked_with_a_kept_scene(model, scene):
    inputs = prompts(model)
    inputs["attention_mask"][inputs["input_ids"] == model.config.video_token_id] = 0
    settings = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    kept = model.generate(**inputs, scene=scene, **settings).logits[0]
    torch.testing.assert_close(kept, model.generate(**inputs, **video(), **settings).logits[0], atol=1e-4, rtol=0)


def test_double_precision_runs_and_keeps_geometry_in_float32(model, scene):
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        output = double(**prompts(model), **video())
    assert output.logits.dtype == torch.float64
    assert output.scene.reconstruction.depth.dtype == torch.float32
