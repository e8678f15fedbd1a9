"""First values for training from nothing: unit gain, visible positions, a first frame that differs, and a model that still starts level."""

import pytest
import torch
from tiny import tiny_config

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.train.dense_matching import match_codes
from vidllm.train.fresh_weights import POSITION_SIZE, draw_for_training_from_nothing
from vidllm.train.initialise import build_untrained


@pytest.fixture(scope="module")
def nano():
    return build_untrained("vidllm-nano", seed=4)[0]


def test_linear_layers_keep_the_size_of_a_signal(nano):
    core = nano.model
    for linear in (core.encoder.model.encoder.layer[3].mlp.fc1, core.reconstruction.frame_blocks[1].attn.qkv):
        assert linear.weight.std().item() * linear.in_features**0.5 == pytest.approx(1.0, rel=0.02)
    branch_end = core.reconstruction.global_blocks[2].mlp.fc2
    assert branch_end.weight.std().item() * branch_end.in_features**0.5 == pytest.approx(12**-0.5, rel=0.02)


def test_a_signal_stays_of_its_size_through_the_encoder(nano):
    """Patches differ from each other at the end as they do at the start; with 0.02 everywhere they would be alike."""
    pixels = torch.randn(3, 3, 96, 128, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        tokens = nano.model.encoder(pixels, return_layers=False).patch_tokens
    assert 0.5 < tokens.std(dim=1).mean() < 2


def test_positions_tell_places_apart(nano):
    positions = nano.model.encoder.model.embeddings.position_embeddings[0, 1:]
    assert positions.shape == (36, 192)
    assert positions.abs().max() <= POSITION_SIZE
    distances = torch.cdist(positions, positions) + 99 * torch.eye(36)
    # the nearest place of each is next to it
    nearest = distances.argmin(dim=1)
    assert all(abs(a // 6 - b // 6) + abs(a % 6 - b % 6) == 1 for a, b in enumerate(nearest.tolist()))


def test_tokens_look_at_what_is_like_them(nano):
    """At the start a patch of one frame looks at the patch of another that shows the same, wherever it lies there."""
    codes = match_codes(nano.config)
    for block in nano.model.reconstruction.global_blocks:
        query, key, value = block.attn.qkv.weight.chunk(3)
        assert torch.equal(query, key)
        assert torch.equal(query[:64], codes)
        assert not torch.equal(query, value)
    query, key, _ = nano.model.reconstruction.frame_blocks[0].attn.qkv.weight.chunk(3)
    assert not torch.equal(query, key)


def test_camera_tokens_are_made_of_what_the_frames_show(nano):
    """What they have in common must not drown what tells them apart."""
    pixels = torch.randn(5, 3, 3, 96, 128, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        tokens = nano.model.encoder(pixels.flatten(0, 1), return_layers=False).patch_tokens.unflatten(0, (5, 3))
        camera = nano.model.reconstruction.tapped_layers(tokens, (6, 8))[-1][:, 1:, 0].flatten(0, 1)
    common = camera.mean(dim=0)
    assert (camera - common).norm(dim=-1).mean() > 0.2 * common.norm()


def test_a_fresh_model_still_says_no_turn_and_its_adapter_is_the_identity(nano):
    pixels = torch.randn(2, 3, 3, 96, 128, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output = nano.model(pixel_values_videos=pixels, output_adapter_tokens=True)
        base = nano.model.encoder(pixels.flatten(0, 1), return_layers=False).patch_tokens.unflatten(0, (2, 3))
    torch.testing.assert_close(output.geom_tokens, base)
    torch.testing.assert_close(output.lang_tokens, base)
    pose = output.raw_reconstruction.pose_encodings[:, -1]
    torch.testing.assert_close(pose, torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1, 1]).expand_as(pose))


def test_the_seed_decides(nano):
    again = build_untrained("vidllm-nano", seed=4)[0].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in nano.state_dict().items())
    other = build_untrained("vidllm-nano", seed=5)[0].state_dict()
    assert not torch.equal(
        other["model.reconstruction.frame_blocks.0.mlp.fc1.weight"],
        again["model.reconstruction.frame_blocks.0.mlp.fc1.weight"],
    )


def test_a_grid_that_is_not_square_is_refused():
    model = VidLLMForConditionalGeneration(tiny_config())
    embeddings = model.model.encoder.model.embeddings
    embeddings.position_embeddings = torch.nn.Parameter(torch.zeros(1, 7, 32))
    with pytest.raises(ValueError, match="square grid and a class token; got 7"):
        draw_for_training_from_nothing(model)
