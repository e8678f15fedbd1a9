"""First values for training from nothing: unit gain, visible positions, a first frame that differs, and a model that still starts level."""

import pytest
import torch
from tiny import tiny_config

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.train.dense_matching import patch_places
from vidllm.train.fresh_weights import POSITION_SIZE, draw_for_training_from_nothing
from vidllm.train.initialise import build_untrained
from vidllm.train.matching_directions import matching_directions


@pytest.fixture(scope="module")
def nano():
    return build_untrained("vidllm-nano", seed=4)[0]


def test_linear_layers_keep_the_size_of_a_signal(nano):
    core = nano.model
    for linear in (core.encoder.model.encoder.layer[3].mlp.fc1, core.reconstruction.frame_blocks[2].attn.qkv):
        assert linear.weight.std().item() * linear.in_features**0.5 == pytest.approx(1.0, rel=0.02)
    attention = core.language_model.layers[2].self_attn
    assert attention.q_proj.weight.std().item() * 192**0.5 == pytest.approx(1.0, rel=0.02)
    assert attention.o_proj.weight.std().item() * 192**0.5 == pytest.approx(0.1, rel=0.02)
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


def test_from_the_start_a_shift_of_the_picture_reaches_the_camera_tokens(nano):
    """Streams that say likeness and place, frames that are the first one moved by whole columns: each camera token knows by how many.

    Frames see 8 of 12 columns of one long picture; the wired heads are read where they write.
    """
    generator = torch.Generator().manual_seed(6)
    directions = matching_directions(nano.config)
    places = patch_places((6, 8))
    starts = torch.tensor([2, 0, 1, 3, 4])
    read = []
    for _ in range(6):
        picture = torch.randn(6, 12, len(directions.likeness), generator=generator)
        frames = torch.stack([picture[:, start : start + 8].flatten(0, 1) for start in starts])
        noise = torch.randn(5, 48, 192, generator=generator)
        for part in (directions.likeness, directions.place):
            noise = noise - noise @ part.T @ part
        stream = noise + 2 * frames @ directions.likeness + places @ directions.place
        with torch.no_grad():
            tokens = nano.model.reconstruction.tapped_layers(stream[None], (6, 8))[-1]
        read.append(tokens[0, :, 0, :192] @ directions.frame_place[0])
    moved, shifts = torch.stack(read)[:, 1:], (starts - 2)[1:].float()
    correlation = torch.corrcoef(torch.stack([moved.flatten(), shifts.repeat(6)]))[0, 1]
    assert correlation > 0.9


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


def test_the_projector_starts_as_a_linear_map_that_loses_nothing(nano):
    projector = nano.model.scene_tokens.projector
    generator = torch.Generator().manual_seed(8)
    a, b = torch.randn(2, 7, 192, generator=generator).unbind()
    with torch.no_grad():
        both = projector(3 * a - 0.5 * b)
        torch.testing.assert_close(both, 3 * projector(a) - 0.5 * projector(b), rtol=1e-4, atol=1e-4)
        singular = torch.linalg.svdvals(projector(torch.eye(192)) - projector(torch.zeros(1, 192)))
        assert (singular > 0.01 * singular[0]).sum() > 150
        assert 0.3 < projector(a).std() < 2


def test_the_seed_decides(nano):
    again = build_untrained("vidllm-nano", seed=4)[0].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in nano.state_dict().items())
    other = build_untrained("vidllm-nano", seed=5)[0].state_dict()
    assert not torch.equal(
        other["model.reconstruction.frame_blocks.0.mlp.fc1.weight"],
        again["model.reconstruction.frame_blocks.0.mlp.fc1.weight"],
    )


def test_one_pair_of_blocks_is_refused():
    with pytest.raises(ValueError, match="wanted at least 2 to look for motion; got 1"):
        draw_for_training_from_nothing(VidLLMForConditionalGeneration(tiny_config()))


def test_a_grid_that_is_not_square_is_refused():
    model = VidLLMForConditionalGeneration(tiny_config())
    embeddings = model.model.encoder.model.embeddings
    embeddings.position_embeddings = torch.nn.Parameter(torch.zeros(1, 7, 32))
    with pytest.raises(ValueError, match="square grid and a class token; got 7"):
        draw_for_training_from_nothing(model)
