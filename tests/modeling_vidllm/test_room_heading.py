"""The room's heading from its walls: rooms that are known, against a search over all headings, and inside the model."""

import math

import pytest
import torch

from vidllm.modeling_vidllm.room_heading_vidllm import turn_to_walls
from vidllm.train.initialise import build_untrained
from vidllm.train.presets import PRESETS


H, W = 40, 58


def turned(degrees, tilt=0.0):
    """Rotation about z, then a tilt about x, `(3, 3)`."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    a, b = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    about_z = torch.tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    return torch.tensor([[1.0, 0.0, 0.0], [0.0, a, -b], [0.0, b, a]]) @ about_z


def seen_inside(headings):
    """Points `(S, H, W, 3)` in the room's own axes: the inside of a box of 4 x 3 x 2.5, looked at from its middle, in some directions."""
    rows, columns = torch.arange(H).float(), torch.arange(W).float()
    x, y = torch.meshgrid((columns - W / 2 + 0.5) / 45, (rows - H / 2 + 0.5) / 45, indexing="xy")
    # ahead, left, up
    rays = torch.stack([torch.ones_like(x), -x, -y - 0.15], -1)
    frames = []
    for heading in headings:
        towards = rays @ turned(heading).T
        walls = torch.tensor([2.0, 1.5, 1.25]) / towards.abs().clamp_min(1e-9)
        frames.append(towards * walls.amin(-1, keepdim=True))
    return torch.stack(frames)


def heading_error(room_from_world, truth):
    """Degrees about z from the nearest of the four headings, `(B,)`."""
    relative = room_from_world @ truth.mT
    angle = torch.rad2deg(torch.atan2(relative[:, 1, 0], relative[:, 0, 0]))
    return (angle + 45) % 90 - 45


@pytest.fixture(scope="module")
def rooms():
    """Two rooms in the axes of their first cameras: points `(2, 3, H, W, 3)`, and their true frames."""
    truth = torch.stack([turned(20, tilt=35), turned(-70, tilt=-20)])
    points = torch.stack([seen_inside([10, 40, 75]), seen_inside([-50, -20, 130])])
    # room -> world
    return torch.einsum("bji,bshwj->bshwi", truth, points), truth


@pytest.mark.parametrize("error", [-44.0, -17.0, 0.0, 8.0, 40.0])
def test_walls_tell_the_heading(rooms, error):
    points, truth = rooms
    predicted = turned(error) @ truth
    valid = torch.ones(points.shape[:-1], dtype=torch.bool)
    got, agreement = turn_to_walls(predicted, points, valid)
    assert (heading_error(predicted, truth).abs() - abs(error)).abs().max() < 1e-3
    assert heading_error(got, truth).abs().max() < 1.0
    # about z, by less than an eighth of a turn
    torch.testing.assert_close(got[:, 2], predicted[:, 2])
    relative = got @ predicted.mT
    assert relative[:, 0, 0].min() >= math.cos(math.pi / 4) - 1e-4
    torch.testing.assert_close(got @ got.mT, torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=0)
    assert (agreement > 0.2).all()
    again, _ = turn_to_walls(got, points, valid)
    torch.testing.assert_close(again, got, atol=1e-4, rtol=0)
    larger, _ = turn_to_walls(predicted, points * 6.5, valid)
    torch.testing.assert_close(larger, got, atol=1e-4, rtol=0)


def test_it_is_the_best_of_all_headings(rooms):
    """Of all turns, the one for which upright normals lie nearest to the axes, by the cosine of four times their angles."""
    points, truth = rooms
    predicted = turned(13.0) @ truth
    noisy = points + 0.02 * torch.randn(points.shape, generator=torch.Generator().manual_seed(0))
    got, agreement = turn_to_walls(predicted, noisy, torch.ones(points.shape[:-1], dtype=torch.bool))
    for row in range(2):
        counted = []
        for frame in noisy[row]:
            for v in range(1, H - 1):
                for u in range(1, W - 1):
                    normal = torch.linalg.cross(frame[v, u + 1] - frame[v, u - 1], frame[v + 1, u] - frame[v - 1, u])
                    counted.append(predicted[row] @ (normal / normal.norm()))
        counted = torch.stack(counted)
        weight = (1 - counted[:, 2] ** 2) ** 2
        angle = torch.atan2(counted[:, 1], counted[:, 0])
        turns = torch.arange(-45, 45, 0.05)
        score = torch.stack([(weight * (4 * (angle + math.radians(t))).cos()).sum() for t in turns.tolist()])
        relative = got[row] @ predicted[row].T
        assert math.degrees(math.atan2(relative[1, 0], relative[0, 0])) == pytest.approx(
            float(turns[score.argmax()]), abs=0.06
        )
        assert float(agreement[row]) == pytest.approx(float(score.max() / weight.sum()), rel=1e-3)


def test_what_is_not_known_has_no_say(rooms):
    points, truth = rooms
    predicted = turned(30.0) @ truth
    valid = torch.ones(points.shape[:-1], dtype=torch.bool)
    wanted, _ = turn_to_walls(predicted, points, valid)
    broken, mask = points.clone(), valid.clone()
    # slanted nonsense over a third of the pictures
    broken[:, :, :, 38:] = torch.einsum("ij,bshwj->bshwi", turned(31, 50), points[:, :, :, 38:]) * 0.3
    mask[:, :, :, 38:] = False
    broken[:, 0, 3, 3] = float("inf")
    got, _ = turn_to_walls(predicted, broken, mask)
    assert heading_error(got, truth).abs().max() < 1.0
    assert (heading_error(got, truth) - heading_error(wanted, truth)).abs().max() < 1.0
    nothing, agreement = turn_to_walls(predicted, points, torch.zeros_like(valid))
    assert torch.equal(nothing, predicted)
    assert torch.equal(agreement, torch.zeros(2))


def test_without_walls_the_heading_stays():
    flat = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(9.0), indexing="ij"), -1)
    floor = torch.cat([flat, torch.zeros(6, 9, 1)], -1)[None, None].expand(2, 3, 6, 9, 3)
    predicted = torch.stack([turned(7), turned(-20)])
    got, agreement = turn_to_walls(predicted, floor, torch.ones(2, 3, 6, 9, dtype=torch.bool))
    assert torch.equal(got, predicted)
    assert agreement.max() < 0.05
    # too small for any normal
    got, _ = turn_to_walls(predicted, floor[:, :, :2], torch.ones(2, 3, 2, 9, dtype=torch.bool))
    assert torch.equal(got, predicted)


# ---------------------------------------------------------------------- inside the model


@pytest.fixture(scope="module")
def tiny():
    return build_untrained("vidllm-tiny", seed=2)[0].eval()


def test_the_model_turns_the_room_that_it_predicts(tiny):
    pixels = torch.randn(2, 3, 3, 28, 42, generator=torch.Generator().manual_seed(1))
    plain = tiny.reconstruct(pixels)
    given = {"room_from_world": torch.stack([turned(10), turned(20)])}
    tiny.config.align_room_to_walls = True
    try:
        got = tiny.reconstruct(pixels)
        kept = tiny.reconstruct(pixels, geometry=given)
        mixed = tiny.reconstruct(pixels, geometry={**given, "mask": torch.tensor([False, True])})
        out = tiny(pixel_values_videos=pixels, output_scene_tokens=False)
    finally:
        tiny.config.align_room_to_walls = False
    wanted, agreement = turn_to_walls(plain.room_from_world, plain.points_world, plain.depth > 0)
    assert (agreement > 0.05).any()
    torch.testing.assert_close(got.room_from_world, wanted, atol=1e-4, rtol=0)
    assert not torch.allclose(wanted, plain.room_from_world, atol=1e-3)
    assert torch.equal(kept.room_from_world, given["room_from_world"])
    torch.testing.assert_close(
        mixed.room_from_world, torch.stack([got.room_from_world[0], given["room_from_world"][1]]), atol=1e-4, rtol=0
    )
    # the loss is on the network's own rotation
    own = tiny(pixel_values_videos=pixels, output_scene_tokens=False)
    assert torch.equal(out.raw_reconstruction.room_from_world, own.raw_reconstruction.room_from_world)
    assert not out.scene.reconstruction.room_from_world.requires_grad


def test_it_is_off_unless_a_config_asks_for_it():
    assert not any(preset.config().align_room_to_walls for preset in PRESETS.values())
