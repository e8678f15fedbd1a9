"""What every user of transformers relies on: load and save, batches, padding, caches, attention backends, precision."""

import copy

import pytest
import torch
from tiny import RAGGED_SIZES, tiny_config, tiny_model, tiny_prompts, tiny_videos

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration


GEOMETRY_TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
TAILS = [[7, 8, 9], [10, 11], [12, 13, 14, 15]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def batch(config, sizes=RAGGED_SIZES, tails=TAILS, seed=0):
    pixels, sizes = tiny_videos(sizes, seed)
    ids, mask = tiny_prompts(config, tails)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels, "video_size_shw": sizes}


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_save_and_load_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = VidLLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert_same_state(model, again)
    inputs = batch(model.config)
    assert torch.equal(logits_of(model, inputs), logits_of(again, inputs))


def test_two_fresh_models_of_one_seed_are_equal_and_meta_construction_gives_the_same_shapes():
    torch.manual_seed(3)
    first = VidLLMForConditionalGeneration(tiny_config())
    torch.manual_seed(3)
    second = VidLLMForConditionalGeneration(tiny_config())
    assert_same_state(first, second)
    with torch.device("meta"):
        meta = VidLLMForConditionalGeneration(tiny_config())
    shapes = {name: tuple(value.shape) for name, value in first.state_dict().items()}
    assert shapes == {name: tuple(value.shape) for name, value in meta.state_dict().items()}
    assert not any(buffer.is_meta for buffer in first.buffers())


def test_no_buffer_is_lost_by_loading(model, tmp_path):
    """Loading builds on meta: what is neither saved nor recomputed would come back as garbage."""
    model.save_pretrained(tmp_path)
    again = VidLLMForConditionalGeneration.from_pretrained(tmp_path)
    for (name, before), (_, after) in zip(model.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(before, after), name


@pytest.mark.parametrize("adapter_type", ["bridge", "none", "concat_self_attention", "cross_attention"])
def test_checkpoint_without_the_new_heads_gets_fresh_ones(tmp_path, adapter_type):
    """A checkpoint of encoder, reconstruction and language model alone: the adapter is the identity, heads start as fresh ones do."""
    model = tiny_model(adapter_type=adapter_type)
    kept = {
        name: value
        for name, value in model.state_dict().items()
        if name.split(".")[1] in ("encoder", "reconstruction", "language_model") and "room_head" not in name
    }
    model.save_pretrained(tmp_path, state_dict=kept)
    again = VidLLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    for name, value in again.state_dict().items():
        assert torch.isfinite(value).all(), name
        if name in kept:
            assert torch.equal(value, kept[name]), name
    tokens = torch.randn(2, 3, 6, model.config.vision_config.hidden_size)
    geom, lang = again.model.adapter(tokens, tokens)
    assert torch.equal(geom, tokens)
    assert torch.equal(lang, tokens)
    pixels, sizes = tiny_videos()
    room = again.reconstruct(pixels, sizes).room_from_world
    start = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    torch.testing.assert_close(room, start.expand(2, 3, 3))


def test_row_alone_equals_row_in_a_ragged_batch(model):
    inputs = batch(model.config)
    with torch.no_grad():
        together = model(**inputs)
    for row, (frames, height, width) in enumerate(RAGGED_SIZES):
        pixels = inputs["pixel_values_videos"][row : row + 1, :frames, :, :height, :width]
        with torch.no_grad():
            alone = model(
                input_ids=inputs["input_ids"][row : row + 1],
                attention_mask=inputs["attention_mask"][row : row + 1],
                pixel_values_videos=pixels,
            )
        for name in ("cam_from_world", "intrinsics_px", "depth", "depth_confidence", "points_world"):
            ours = getattr(together.scene.reconstruction, name)[row, :frames]
            if name not in ("cam_from_world", "intrinsics_px"):
                ours = ours[:, :height, :width]
            torch.testing.assert_close(ours, getattr(alone.scene.reconstruction, name)[0], **GEOMETRY_TOLERANCE)
        # voxels are discrete: the language side is compared given equal geometry
        scene = together.scene.select(row)
        with torch.no_grad():
            from_scene = model(
                input_ids=inputs["input_ids"][row : row + 1],
                attention_mask=inputs["attention_mask"][row : row + 1],
                scene=scene,
            )
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(together.logits[row][real], from_scene.logits[0][real], atol=1e-5, rtol=1e-5)


def test_ragged_masks_tell_what_is_real(model):
    inputs = batch(model.config)
    recon = model.reconstruct(inputs["pixel_values_videos"], inputs["video_size_shw"])
    assert recon.frame_mask.sum(1).tolist() == [size[0] for size in RAGGED_SIZES]
    assert recon.pixel_mask.flatten(1).sum(1).tolist() == [s * h * w for s, h, w in RAGGED_SIZES]
    assert torch.equal(recon.video_size_shw, torch.tensor(RAGGED_SIZES))
    assert (recon.depth[~recon.pixel_mask] == 0).all()
    assert (recon.depth[recon.pixel_mask] > 0).all()
    even = model.reconstruct(*tiny_videos())
    assert even.frame_mask is None
    assert even.pixel_mask is None


def test_padding_does_not_leak(model):
    inputs = batch(model.config)
    dirty = copy.deepcopy(inputs)
    dirty["pixel_values_videos"][1, 2:] = 1e3
    dirty["pixel_values_videos"][1, :, :, :, 28:] = -1e3
    dirty["input_ids"][dirty["attention_mask"] == 0] = 77
    real = inputs["attention_mask"].bool()
    assert torch.equal(logits_of(model, inputs)[real], logits_of(model, dirty)[real])


def test_more_left_padding_changes_nothing(model):
    inputs = batch(model.config)
    wide = dict(inputs)
    wide["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (5, 0))
    wide["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (5, 0))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        logits_of(model, inputs)[real], logits_of(model, wide)[:, 5:][real], atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("filled", [0, 1, 7, 16])
def test_empty_slots_take_no_part_and_no_position(model, filled):
    """Masked slots equal a prompt from which they are cut out."""
    config = model.config
    scene = model.encode_scene(*tiny_videos())
    scene.mask = torch.zeros_like(scene.mask)
    scene.mask[:, :filled] = True
    ids, mask = tiny_prompts(config, TAILS[:2])
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, scene=scene)
        for row, tail in enumerate(TAILS[:2]):
            embed = model.get_input_embeddings()
            parts = [embed(torch.tensor([5, 6])), scene.tokens[row, :filled], embed(torch.tensor(tail))]
            cut = model(inputs_embeds=torch.cat(parts)[None])
            torch.testing.assert_close(
                padded.logits[row, -len(tail) :], cut.logits[0, -len(tail) :], atol=2e-5, rtol=2e-5
            )
    assert padded.attention_mask.sum(1).tolist() == [2 + filled + len(tail) for tail in TAILS[:2]]


def test_wrong_number_of_placeholders_is_refused(model):
    inputs = batch(model.config)
    inputs["input_ids"][1, -1] = model.config.video_token_id
    with pytest.raises(ValueError, match=r"prompt 1: wanted 16 video placeholders .* got 17"):
        model(**inputs)


@pytest.mark.parametrize("change", [
    {"pixel_values": torch.zeros(1)},
    {"scene_index": torch.tensor([0, 1, 9])},
    {"scene_index": torch.tensor([0, 1])},
    {"video_size_shw": torch.tensor([[9, 28, 42]] * 3)},
    {"coord_points_world": torch.zeros(3, 1, 3)},
])  # fmt: skip
def test_contradicting_inputs_are_refused(model, change):
    with pytest.raises(ValueError, match=r"wanted|unknown argument"):
        model(**{**batch(model.config), **change})


def test_sdpa_equals_eager(model):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    pixels, sizes = tiny_videos(RAGGED_SIZES)
    for name in ("cam_from_world", "depth", "depth_confidence", "room_from_world"):
        torch.testing.assert_close(
            getattr(model.reconstruct(pixels, sizes), name),
            getattr(eager.reconstruct(pixels, sizes), name),
            **GEOMETRY_TOLERANCE,
        )
    scene = model.encode_scene(pixels, sizes)
    ids, mask = tiny_prompts(model.config, TAILS)
    inputs = {"input_ids": ids, "attention_mask": mask, "scene": scene}
    real = mask.bool()
    torch.testing.assert_close(logits_of(model, inputs)[real], logits_of(eager, inputs)[real], atol=2e-5, rtol=2e-5)


def test_attention_choice_reaches_every_part(model):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert eager.model.encoder.model.config._attn_implementation == "eager"
    assert eager.model.language_model.config._attn_implementation == "eager"
    assert eager.config._attn_implementation == "eager"


def test_activation_checkpointing_gives_the_same_loss_and_gradients():
    results = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(
                getattr(module, "gradient_checkpointing", False) for module in model.model.reconstruction.modules()
            )
        inputs = batch(model.config)
        output = model(**inputs, labels=inputs["input_ids"], use_cache=False)
        raw = output.raw_reconstruction
        (
            output.loss + raw.depth_relative.mean() + raw.pose_encodings.square().mean() + output.metric_depth_m.mean()
        ).backward()
        results.append((output.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss_a, grads_a), (loss_b, grads_b) = results
    assert torch.equal(loss_a, loss_b)
    assert grads_a.keys() == grads_b.keys()
    for name, grad in grads_a.items():
        torch.testing.assert_close(grad, grads_b[name], atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_bfloat16_keeps_geometry_heads_in_float32(model, tmp_path):
    model.save_pretrained(tmp_path)
    half = VidLLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    dtypes = {name: value.dtype for name, value in half.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    for part in (
        "reconstruction.camera_head",
        "reconstruction.depth_head",
        "reconstruction.room_head",
        "metric_depth",
    ):
        assert all(name in kept for name in dtypes if part in name), part
    for part in (
        "encoder.model",
        "reconstruction.frame_blocks",
        "reconstruction.global_blocks",
        "language_model",
        "adapter",
    ):
        assert not any(part in name for name in kept), part
    inputs = batch(half.config)
    with torch.no_grad():
        output = half(**inputs)
    recon = output.scene.reconstruction
    for name in ("cam_from_world", "intrinsics_px", "depth", "points_world", "scale", "room_from_world"):
        assert getattr(recon, name).dtype == torch.float32, name
    assert output.scene.positions.dtype == torch.float32
    assert output.scene.tokens.dtype == torch.bfloat16
    exact = model.reconstruct(inputs["pixel_values_videos"], inputs["video_size_shw"])
    identity = torch.eye(4).expand(3, 4, 4)
    assert torch.equal(recon.cam_from_world[:, 0], identity)
    mask = exact.pixel_mask
    relative = ((recon.depth - exact.depth).abs() / exact.depth.clamp_min(1e-6))[mask]
    assert relative.median() < 0.1


@pytest.mark.parametrize("how", ["to", "bfloat16", "from_config"])
def test_casting_keeps_geometry_heads_in_float32_and_exact(model, tmp_path, how):
    model.save_pretrained(tmp_path)
    loaded = VidLLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    if how == "from_config":
        cast = VidLLMForConditionalGeneration._from_config(tiny_config(), dtype=torch.bfloat16).eval()
        cast.load_state_dict(loaded.state_dict())
    else:
        cast = copy.deepcopy(model)
        cast = cast.to(torch.bfloat16) if how == "to" else cast.bfloat16()
    for (name, a), (_, b) in zip(loaded.named_parameters(), cast.named_parameters(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    # (transformers' rotary table of the language model is a buffer, which `to` rounds and loading does not: geometry only)
    pixels, sizes = tiny_videos(RAGGED_SIZES)
    for name, value in loaded.reconstruct(pixels, sizes)._tensors().items():
        assert torch.equal(cast.reconstruct(pixels, sizes)._tensors()[name], value), name


def test_auto_classes_build_from_config():
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    import vidllm

    assert vidllm.VidLLMConfig is type(tiny_config())
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
        torch.manual_seed(1)
        built = auto_class.from_config(tiny_config()).eval()
        torch.manual_seed(1)
        assert_same_state(built, VidLLMForConditionalGeneration(tiny_config()))


def test_given_geometry_goes_through_generate_and_reconstruct(model):
    pixels, sizes = tiny_videos()
    depth = torch.full((2, 3, 28, 42), 2.5)
    poses = torch.eye(4).repeat(2, 3, 1, 1)
    poses[:, :, 0, 3] = torch.tensor([0.0, 0.3, 0.7])
    given = {"depth_m": depth, "cam_from_world": poses}
    recon = model.reconstruct(pixels, sizes, metric=True, geometry=given)
    assert recon.unit == "m"
    assert torch.equal(recon.depth, depth)
    assert torch.equal(recon.cam_from_world, poses)
    ids, mask = tiny_prompts(model.config, TAILS[:2])
    out = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values_videos=pixels, video_size_shw=sizes, geometry=given,
        max_new_tokens=3, do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    assert out.box_unit == "m"
    scene = model.encode_scene(pixels, sizes, geometry=given)
    assert torch.equal(scene.position_scale, torch.ones(2))
    assert torch.equal(
        model.generate(input_ids=ids, attention_mask=mask, scene=scene, max_new_tokens=3, do_sample=False),
        out.sequences,
    )
    with pytest.raises(ValueError, match="geometry: wanted together with pixel_values_videos"):
        model.generate(input_ids=ids, attention_mask=mask, scene=scene, geometry=given)


def test_other_encoders_and_language_models_work():
    encoders = {
        "siglip": {"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
                   "intermediate_size": 64, "image_size": 28, "patch_size": 14},
        "dinov3": {"model_type": "dinov3_vit", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
                   "intermediate_size": 64, "image_size": 28, "patch_size": 14, "num_register_tokens": 2},
    }  # fmt: skip
    llama = {"model_type": "llama", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512, "tie_word_embeddings": True}  # fmt: skip
    for vision in encoders.values():
        model = tiny_model(vision_config=vision, text_config=llama)
        assert model.config.tie_word_embeddings
        assert model.lm_head.weight is model.get_input_embeddings().weight
        inputs = batch(model.config)
        assert torch.isfinite(logits_of(model, inputs)).all()
        new = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert new.shape == (3, inputs["input_ids"].shape[1] + 4)
        del inputs["pixel_values_videos"], inputs["video_size_shw"]


def test_given_scene_equals_given_video(model):
    inputs = batch(model.config)
    scene = model.encode_scene(inputs["pixel_values_videos"], inputs["video_size_shw"])
    again = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], scene=scene)
    assert torch.equal(logits_of(model, inputs), again.logits)


def test_packing_many_prompts_on_one_video(model):
    """Prompts that share a video through `scene_index` equal prompts with a video each; -1 is text only."""
    pixels, sizes = tiny_videos(RAGGED_SIZES[:2])
    ids, mask = tiny_prompts(model.config, [*TAILS, [20, 21]], heads=[[5, 6], [5, 6], [5, 6, 7], None])
    index = torch.tensor([1, 0, 1, -1])
    with torch.no_grad():
        packed = model(
            input_ids=ids, attention_mask=mask, pixel_values_videos=pixels, video_size_shw=sizes, scene_index=index
        )
        for row, which in enumerate(index.tolist()):
            real = mask[row].bool()
            if which < 0:
                alone = model(input_ids=ids[row : row + 1, real])
            else:
                alone = model(input_ids=ids[row : row + 1, real], scene=packed.scene.select(which))
            torch.testing.assert_close(packed.logits[row][real], alone.logits[0], atol=2e-5, rtol=2e-5)


def test_logits_to_keep(model):
    inputs = batch(model.config)
    full = logits_of(model, inputs)
    torch.testing.assert_close(logits_of(model, {**inputs, "logits_to_keep": 2}), full[:, -2:])
    torch.testing.assert_close(logits_of(model, {**inputs, "logits_to_keep": torch.tensor([0, 3])}), full[:, [0, 3]])


def test_resized_embeddings_still_work(model):
    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(310)
    inputs = batch(grown.config)
    assert logits_of(grown, inputs).shape[-1] == 310
    torch.testing.assert_close(logits_of(grown, inputs)[..., :300], logits_of(model, inputs))


def test_video_features_are_the_scene_tokens(model):
    pixels, sizes = tiny_videos(RAGGED_SIZES)
    assert torch.equal(model.get_video_features(pixels, sizes).pooler_output, model.encode_scene(pixels, sizes).tokens)
