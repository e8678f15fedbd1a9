"""Image encoder: patch tokens of any transformers vision model."""

import pytest
import torch
from tiny import tiny_config
from transformers import AutoConfig, PreTrainedModel

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.encoder_vidllm import VidLLMEncoder, patch_size_hw


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 28,
    "patch_size": 14,
}
# family -> (config, prefix tokens, name of the final norm)
FAMILIES = {
    "dinov2_with_registers": ({"num_register_tokens": 2, "mlp_ratio": 2}, 3, "layernorm"),
    "dinov2": ({"mlp_ratio": 2}, 1, "layernorm"),
    "dinov3_vit": ({"patch_size": 16, "image_size": 32, "num_register_tokens": 3}, 4, "norm"),
    "siglip_vision_model": ({}, 0, "post_layernorm"),
    "clip_vision_model": ({}, 1, "post_layernorm"),
    "vit": ({}, 1, "layernorm"),
}


def vision_config(family, **changes):
    return {"model_type": family, **SMALL, **FAMILIES[family][0], **changes}


@torch.no_grad()
def make_encoder(family="dinov2_with_registers", scale=0.2, **changes):
    """Encoder with weights large enough that every token and layer differs."""
    encoder = VidLLMEncoder(tiny_config(vision_config=vision_config(family), **changes)).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in encoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return encoder


def make_frames(encoder, num_frames=5, rows=2, columns=3):
    height, width = encoder.patch_hw
    return torch.randn(num_frames, 3, rows * height, columns * width)


class Holder(PreTrainedModel):
    """Smallest model that loads through `from_pretrained` (which builds on the meta device)."""

    config_class = VidLLMConfig
    base_model_prefix = "holder"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.encoder = VidLLMEncoder(config)
        self.post_init()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tokens_equal_the_model_run_frame_by_frame(family):
    encoder = make_encoder(family, metric_depth_layers=[0, 1, 2, 3], encoder_frame_chunk=2)
    frames = make_frames(encoder)
    output = encoder(frames)
    _, prefix, norm_name = FAMILIES[family]
    norm = getattr(encoder.model, norm_name)
    extra = {"interpolate_pos_encoding": True} if family in ("siglip_vision_model", "clip_vision_model", "vit") else {}
    for index, frame in enumerate(frames):
        states = encoder.model(frame[None], output_hidden_states=True, **extra).hidden_states
        wanted = [norm(states[layer + 1])[0, prefix:] for layer in range(4)]
        assert wanted[0].shape == (6, 32)
        for layer, tokens in zip(wanted, output.layer_tokens, strict=True):
            torch.testing.assert_close(tokens[index], layer, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.patch_tokens[index], wanted[-1], rtol=0, atol=1e-5)
    # the layers are four different things, not one four times
    assert (output.layer_tokens[0] - output.layer_tokens[1]).abs().max() > 1e-2
    without_layers = encoder(frames, return_layers=False)
    assert without_layers.layer_tokens is None
    torch.testing.assert_close(without_layers.patch_tokens, output.patch_tokens, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["dinov2_with_registers", "dinov3_vit", "siglip_vision_model"])
@pytest.mark.parametrize("grid", [(2, 3), (4, 1)])
@torch.no_grad()
def test_chunks_change_nothing(family, grid):
    outputs = []
    for chunk in (1, 2, 100):
        encoder = make_encoder(family, encoder_frame_chunk=chunk)
        frames = torch.randn(
            5, 3, *(g * p for g, p in zip(grid, encoder.patch_hw)), generator=torch.Generator().manual_seed(1)
        )
        outputs.append(encoder(frames))
    for output in outputs[1:]:
        torch.testing.assert_close(output.patch_tokens, outputs[0].patch_tokens, rtol=0, atol=1e-6)
        for ours, first in zip(output.layer_tokens, outputs[0].layer_tokens, strict=True):
            torch.testing.assert_close(ours, first, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_parameters_that_no_token_reaches_are_frozen_and_listed(family):
    encoder = make_encoder(family)
    encoder.requires_grad_(True)
    output = encoder(make_frames(encoder))
    torch.stack([output.patch_tokens, *output.layer_tokens]).square().sum().backward()
    unreached = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert set(encoder.unreachable_parameters) == unreached
    fresh = VidLLMEncoder(tiny_config(vision_config=vision_config(family)))
    assert {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad} == unreached


def test_a_frozen_encoder_builds_no_graph_and_a_trained_one_does():
    encoder = make_encoder()
    frames = make_frames(encoder)
    assert encoder(frames).patch_tokens.requires_grad
    encoder.requires_grad_(False)
    output = encoder(frames)
    assert not output.patch_tokens.requires_grad
    assert not any(tokens.requires_grad for tokens in output.layer_tokens)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert not make_encoder()(frames).patch_tokens.requires_grad


@pytest.mark.parametrize("family", ["dinov2_with_registers", "dinov3_vit", "siglip_vision_model"])
def test_save_and_load_keep_tokens_and_the_frozen_list(family, tmp_path):
    model = Holder(tiny_config(vision_config=vision_config(family))).eval()
    frames = make_frames(model.encoder)
    with torch.no_grad():
        wanted = model.encoder(frames).patch_tokens
    model.save_pretrained(tmp_path)
    loaded = Holder.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.encoder(frames).patch_tokens.detach(), wanted, rtol=0, atol=0)
    frozen = {name for name, parameter in loaded.encoder.named_parameters() if not parameter.requires_grad}
    assert frozen == set(model.encoder.unreachable_parameters) != set()


def test_attention_backend_reaches_the_vision_model_and_changes_no_result(tmp_path):
    Holder(tiny_config()).save_pretrained(tmp_path)
    eager = Holder.from_pretrained(tmp_path, attn_implementation="eager")
    sdpa = Holder.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert eager.encoder.model.config._attn_implementation == "eager"
    assert sdpa.encoder.model.config._attn_implementation == "sdpa"
    frames = make_frames(sdpa.encoder)
    with torch.no_grad():
        torch.testing.assert_close(
            eager.encoder(frames).patch_tokens, sdpa.encoder(frames).patch_tokens, rtol=1e-5, atol=1e-5
        )
    sdpa.set_attn_implementation("eager")
    assert sdpa.encoder.model.config._attn_implementation == "eager"


@torch.no_grad()
def test_dinov3_draws_no_random_grid_in_training_mode():
    encoder = make_encoder("dinov3_vit")
    frames = make_frames(encoder)
    wanted = encoder(frames).patch_tokens
    torch.testing.assert_close(encoder.train()(frames).patch_tokens, wanted, rtol=0, atol=0)


def test_grid_and_wrong_frame_sizes():
    encoder = make_encoder()
    assert encoder.grid_hw(28, 70) == (2, 5)
    for size in ((28, 41), (27, 42), (0, 14)):
        with pytest.raises(ValueError, match=r"multiples of \(14, 14\); got"):
            encoder.grid_hw(*size)
    with pytest.raises(ValueError, match="multiples"):
        encoder(torch.zeros(2, 3, 28, 40))
    with pytest.raises(ValueError, match=r"wanted \(frames, 3, height, width\)"):
        encoder(torch.zeros(1, 2, 3, 28, 42))


def test_patch_size_may_be_a_pair():
    config = tiny_config(vision_config=vision_config("dinov2_with_registers", patch_size=(14, 7), image_size=(28, 14)))
    assert patch_size_hw(config.vision_config) == (14, 7)
    encoder = VidLLMEncoder(config)
    assert encoder.grid_hw(28, 42) == (2, 6)
    assert encoder(torch.randn(2, 3, 28, 42)).patch_tokens.shape == (2, 12, 32)


@pytest.mark.parametrize(
    "model_type", ["bert", "siglip2_vision_model", "convnext", "videomae", "resnet", "aimv2_vision_model"]
)
def test_models_without_patch_tokens_are_refused(model_type):
    config = tiny_config()
    config.vision_config = AutoConfig.for_model(model_type, **SMALL)
    with pytest.raises(ValueError, match="vision_config: wanted a"):
        VidLLMEncoder(config)


def test_a_model_that_drops_tokens_is_refused_when_it_runs():
    encoder = VidLLMEncoder(tiny_config(vision_config={"model_type": "vit_mae", **SMALL}))
    with pytest.raises(ValueError, match="one token per patch, 6 for this frame size"):
        encoder(torch.randn(2, 3, 28, 42))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_layer_compiles_as_a_full_graph_at_two_shapes(backend):
    torch._dynamo.reset()
    encoder = make_encoder()
    layer = encoder.model.encoder.layer[1]
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for shape in ((2, 9, 32), (3, 15, 32)):
        states = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(compiled(states), layer(states), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
