"""Which patches see the same place: by hand, against a slow loop, and what the loss asks of the tokens."""

from types import SimpleNamespace

import numpy as np
import torch
from tiny import tiny_config

from vidllm.train.collator import IGNORED_LABEL
from vidllm.train.dense_matching import DenseMatching, match_codes, patch_matches
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
    assert found.shape == (1, 3, 3, 12)
    columns = torch.arange(12).reshape(3, 4)
    to_left = torch.cat([torch.full((3, 1), IGNORED_LABEL), columns[:, :-1]], dim=1)
    assert torch.equal(found[0, 0, 1].reshape(3, 4), to_left)
    assert torch.equal(found[0, 0, 2].reshape(3, 4), columns)
    assert (found[0, range(3), range(3)] == IGNORED_LABEL).all()


def test_what_is_hidden_or_unknown_has_no_match():
    depth, intrinsics, poses = wall(moved(0.0), moved(0.0))
    depth[0, 1, :, 16:] = 1.0  # something stands before the right half in the second frame
    depth[0, 0, :8] = 0.0  # nothing is known of the first row of patches in the first
    found = patch_matches(depth, intrinsics, poses, PATCH)[0, 0, 1].reshape(3, 4)
    assert (found[0] == IGNORED_LABEL).all()
    assert (found[:, 2:] == IGNORED_LABEL).all()
    assert found[1:, :2].tolist() == [[4, 5], [8, 9]]


def slow_matches(depth, intrinsics, poses, patch):
    """Point by point, with numpy."""
    frames, height, width = depth.shape
    rows, columns = height // patch, width // patch
    found = np.full((frames, frames, rows * columns), IGNORED_LABEL)
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
                a, b = round(a), round(b)
                if 0 <= a < width and 0 <= b < height and abs(depth[j, b, a] - far) <= 0.05 * depth[j, b, a]:
                    found[i, j, p] = (b // patch) * columns + a // patch
    return found


def test_equals_the_slow_loop_on_a_room(tmp_path):
    settings = RoomsSettings(num_rooms=2, block_size=2, first_blocks=1, makers=0, size_hw=(48, 64), frames_kept=4)
    frames, _ = RoomSource(settings, tmp_path).room(1).frames([0, 1, 3])
    depth = np.stack(frames.depth_m).astype(np.float64)
    intrinsics, poses = (np.asarray(x, dtype=np.float64) for x in (frames.intrinsics_px, frames.cam_from_world))
    wanted = slow_matches(depth, intrinsics, poses, 16)
    found = patch_matches(*(torch.from_numpy(x)[None] for x in (depth, intrinsics, poses)), 16)[0].numpy()
    assert (wanted != IGNORED_LABEL).mean() > 0.2
    assert (found == wanted).mean() > 0.99  # a point on the edge of a patch may fall to either side


def test_the_loss_is_lowest_where_tokens_say_what_they_see():
    config = tiny_config()
    codes = match_codes(config)
    matches = patch_matches(*wall(moved(0.0), moved(1.0)), PATCH)
    batch = {"targets": {"patch_matches": matches}}
    place = torch.nn.functional.one_hot(torch.arange(12), 16).float()
    shifted = torch.cat([place.reshape(3, 4, 16)[:, 1:], place.reshape(3, 4, 16)[:, :1]], dim=1).flatten(0, 1)
    values = {}
    for name, second in (("right", shifted), ("unmoved", place), ("constant", torch.ones(12, 16))):
        tokens = (torch.stack([place, second])[None] @ codes).requires_grad_()
        total, count = DenseMatching().terms(SimpleNamespace(geom_tokens=tokens), batch, config)["dense_match"]
        (gradient,) = torch.autograd.grad(total, tokens)
        assert torch.isfinite(gradient).all()
        # nothing is asked of the rest of the stream
        torch.testing.assert_close(gradient @ codes.T @ codes, gradient, atol=1e-5, rtol=1e-4)
        values[name] = (total / count).item()
    assert count == DenseMatching().counts(batch, config)["dense_match"] == (matches != IGNORED_LABEL).sum() == 18
    assert values["right"] < 0.01
    assert values["right"] < values["constant"] < values["unmoved"]


def test_codes_are_orthonormal_and_as_many_as_a_head_is_wide():
    codes = match_codes(tiny_config())
    assert codes.shape == (16, 32)
    torch.testing.assert_close(codes @ codes.T, torch.eye(16), atol=1e-6, rtol=0)
    assert torch.equal(codes, match_codes(tiny_config()))
