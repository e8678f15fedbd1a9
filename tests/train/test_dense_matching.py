"""Which patches see the same place: by hand, against a slow loop, and what the loss asks of the tokens."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_config

from vidllm.train.dense_matching import DenseMatching, patch_matches, patch_places, shares_of_patches
from vidllm.train.matching_directions import matching_directions
from vidllm.train.room_source import RoomSource, RoomsSettings


PATCH, HW = 8, (24, 32)
INTRINSICS = torch.tensor([[16.0, 0.0, 16.0], [0.0, 16.0, 12.0], [0.0, 0.0, 1.0]])


def moved(x_m: float) -> torch.Tensor:
    """A camera that went to the right: what it sees goes to the left."""
    pose = torch.eye(4)
    pose[0, 3] = -x_m
    return pose


def wall(*cameras, depth=2.0):
    """A wall in front of cameras that look along z: depth, intrinsics, poses of one video."""
    frames = len(cameras)
    return torch.full((1, frames, *HW), depth), INTRINSICS.expand(1, frames, 3, 3), torch.stack(cameras)[None]


def test_a_wall_moves_by_whole_patches():
    """One metre at two metres is 8 pixels, a patch: column c is seen at c - 1, and the first column leaves the picture."""
    found = patch_matches(*wall(moved(0.0), moved(1.0), moved(0.0)), PATCH)
    assert found.shape == (1, 3, 3, 12, 2)
    rows, columns = (part.float() for part in torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"))
    to_left = found[0, 0, 1].reshape(3, 4, 2)
    assert to_left[:, 0].isnan().all()
    torch.testing.assert_close(to_left[:, 1:, 0], columns[:, 1:] - 1)
    torch.testing.assert_close(to_left[:, 1:, 1], rows[:, 1:])
    torch.testing.assert_close(found[0, 0, 2].reshape(3, 4, 2), torch.stack([columns, rows], dim=-1))
    assert found[0, range(3), range(3)].isnan().all()


def test_places_between_patches():
    """A quarter of a metre is a quarter of a patch: the target says so, and its shares have their mean there."""
    found = patch_matches(*wall(moved(0.0), moved(0.25)), PATCH)[0, 0, 1].reshape(3, 4, 2)
    torch.testing.assert_close(found[..., 0], torch.arange(4.0).expand(3, -1) - 0.25)
    shares = shares_of_patches(found, (3, 4))
    torch.testing.assert_close(
        shares[1, 2].reshape(3, 4), torch.tensor([[0, 0, 0, 0], [0, 0.25, 0.75, 0], [0, 0, 0, 0.0]])
    )
    torch.testing.assert_close(shares[1, 0].reshape(3, 4)[1], torch.tensor([1.0, 0, 0, 0]))  # cut off at the edge


def test_shares_have_their_mean_at_the_place():
    places = torch.rand(7, 5, 2, generator=torch.Generator().manual_seed(3)) * torch.tensor([3.0, 2.0])
    shares = shares_of_patches(places, (3, 4))
    rows, columns = (
        part.float().flatten() for part in torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    )
    assert shares.min() >= 0
    assert (shares > 0).sum(-1).max() <= 4
    torch.testing.assert_close(shares.sum(-1), torch.ones(7, 5))
    torch.testing.assert_close(shares @ torch.stack([columns, rows], dim=-1), places)


def test_what_is_hidden_or_unknown_has_no_match():
    depth, intrinsics, poses = wall(moved(0.0), moved(0.0))
    depth[0, 1, :, 16:] = 1.0  # something stands before the right half in the second frame
    depth[0, 0, :8] = 0.0  # nothing is known of the first row of patches in the first
    found = patch_matches(depth, intrinsics, poses, PATCH)[0, 0, 1].reshape(3, 4, 2)
    assert found[0].isnan().all()
    assert found[:, 2:].isnan().all()
    torch.testing.assert_close(found[1:, :2], torch.tensor([[[0.0, 1.0], [1.0, 1.0]], [[0.0, 2.0], [1.0, 2.0]]]))


def slow_matches(depth, intrinsics, poses, patch):
    """Point by point, with numpy."""
    frames, height, width = depth.shape
    rows, columns = height // patch, width // patch
    found = np.full((frames, frames, rows * columns, 2), np.nan)
    for i in range(frames):
        for j in range(frames):
            for p in range(rows * columns):
                v, u = (p // columns) * patch + patch // 2, (p % columns) * patch + patch // 2
                z = depth[i, v, u]
                if i == j or z <= 0:
                    continue
                in_cam = np.append(np.linalg.inv(intrinsics[i]) @ [u * z, v * z, z], 1.0)
                x, y, far, _ = poses[j] @ np.linalg.inv(poses[i]) @ in_cam
                if far <= 0:
                    continue
                a, b, _ = intrinsics[j] @ [x / far, y / far, 1.0]
                near = round(b), round(a)
                if (
                    0 <= near[1] < width
                    and 0 <= near[0] < height
                    and abs(depth[j][near] - far) <= 0.05 * depth[j][near]
                ):
                    found[i, j, p] = (a - patch // 2) / patch, (b - patch // 2) / patch
    return found


def test_equals_the_slow_loop_on_a_room(tmp_path):
    settings = RoomsSettings(num_rooms=2, block_size=2, first_blocks=1, makers=0, size_hw=(48, 64), frames_kept=4)
    frames, _ = RoomSource(settings, tmp_path).room(1).frames([0, 1, 3])
    depth = np.stack(frames.depth_m).astype(np.float64)
    intrinsics, poses = (np.asarray(x, dtype=np.float64) for x in (frames.intrinsics_px, frames.cam_from_world))
    wanted = slow_matches(depth, intrinsics, poses, 16)
    found = patch_matches(*(torch.from_numpy(x)[None] for x in (depth, intrinsics, poses)), 16)[0].numpy()
    assert np.isfinite(wanted).mean() > 0.2
    assert (np.isfinite(found) == np.isfinite(wanted)).mean() > 0.99  # a point between two pixels may fall to either
    both = np.isfinite(found) & np.isfinite(wanted)
    np.testing.assert_allclose(found[both], wanted[both], atol=1e-5)


def tokens_that_say(config, likeness, place):
    """A stream `(B, S, P, C)` that says these things in the fixed directions, and something else besides."""
    directions = matching_directions(config)
    rest = torch.randn(*likeness.shape[:-1], 32, generator=torch.Generator().manual_seed(1))
    for part in (directions.likeness, directions.place):
        rest = rest - rest @ part.T @ part
    return likeness @ directions.likeness + place @ directions.place + rest - rest.mean(-1, keepdim=True)


def test_the_losses_are_lowest_where_tokens_say_what_and_where_they_are():
    config = tiny_config(vision_config={**tiny_config().vision_config.to_dict(), "patch_size": PATCH})
    matches = patch_matches(*wall(moved(0.0), moved(1.0)), PATCH)
    batch = {"targets": {"patch_matches": matches}, "pixel_values_videos": torch.zeros(1, 2, 3, *HW)}
    kinds = 3 * torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2)))[0][:, :6]
    shifted = torch.cat([kinds.reshape(3, 4, 6)[:, 1:], kinds.reshape(3, 4, 6)[:, :1]], dim=1).flatten(0, 1)
    places = patch_places((3, 4)).expand(1, 2, -1, -1)
    values = {}
    for name, second, said in (
        ("right", shifted, places),
        ("unmoved", kinds, places),
        ("constant", torch.ones(12, 6), places),
        ("misplaced", shifted, places.flip(2)),
    ):
        tokens = tokens_that_say(config, torch.stack([kinds, second])[None], said).requires_grad_()
        terms = DenseMatching().terms(SimpleNamespace(geom_tokens=tokens), batch, config)
        (gradient,) = torch.autograd.grad(sum(total for total, _ in terms.values()), tokens)
        assert torch.isfinite(gradient).all()
        values[name] = {term: (total / count).item() for term, (total, count) in terms.items()}
    counts = DenseMatching().counts(batch, config)
    assert {name: int(count) for name, count in counts.items()} == {"dense_match": 18, "dense_place": 24}
    match = {name: value["dense_match"] for name, value in values.items()}
    assert match["right"] == pytest.approx(match["misplaced"], rel=1e-4)
    assert match["right"] < 0.1 < match["constant"] < match["unmoved"]
    place = {name: value["dense_place"] for name, value in values.items()}
    assert max(place["right"], place["unmoved"]) < 0.1 < place["misplaced"]


def test_places_run_from_side_to_side():
    places = patch_places((3, 4)).reshape(3, 4, 2)
    torch.testing.assert_close(places[1, :, 0], 1.7 * torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    torch.testing.assert_close(places[:, 2, 1], 1.7 * torch.tensor([-2 / 3, 0.0, 2 / 3]))


def test_directions_are_orthonormal_and_survive_layer_norm():
    directions = matching_directions(tiny_config())
    rows = torch.cat([getattr(directions, field.name) for field in dataclasses.fields(directions)])
    assert rows.shape == (6 + 2 + 1 + 2 + 2, 32)
    torch.testing.assert_close(rows @ rows.T, torch.eye(13), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.sum(dim=1), torch.zeros(13), atol=1e-6, rtol=0)
    again = matching_directions(tiny_config())
    assert torch.equal(directions.likeness, again.likeness)


def test_a_stream_that_is_too_narrow_is_refused():
    narrow = {**tiny_config().vision_config.to_dict(), "hidden_size": 8}
    config = tiny_config(vision_config=narrow, num_reconstruction_heads=1, num_camera_heads=4)
    with pytest.raises(ValueError, match="wanted an encoder width of at least 10; got 8"):
        matching_directions(config)
