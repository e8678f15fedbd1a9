"""The renderer against a slow one that knows nothing of tiles, unit solids and batches."""

import math

import numpy as np
import pytest
import torch

from vidllm.modeling_vidllm.geometry_vidllm import project_points, unproject_depth
from vidllm.processing.rooms.furniture import BOX, ELLIPSOID
from vidllm.processing.rooms.layout import make_room
from vidllm.processing.rooms.materials import PATTERNS, texture_atlas
from vidllm.processing.rooms.mesh import boxes_annotation, build_mesh
from vidllm.processing.rooms.render import RoomRenderer, visibility


def slow_hit(solids, k, origin, ray):
    """Smallest ray parameter at which a ray enters solid k, float64, metres; None if it misses."""
    rotation, half, taper = solids.rotation[k], solids.half[k], solids.taper[k]
    o, d = rotation.T @ (origin - solids.centre[k]), rotation.T @ ray
    hits = []
    if solids.shape[k] == BOX:
        for axis in range(3):
            for side in (-half[axis], half[axis]):
                if abs(d[axis]) > 1e-15:
                    t = (side - o[axis]) / d[axis]
                    p = o + t * d
                    if all(abs(p[other]) <= half[other] for other in range(3) if other != axis):
                        hits.append(t)
    elif solids.shape[k] == ELLIPSOID:
        a, b, c = sum((d / half) ** 2), 2 * sum(o * d / half**2), sum((o / half) ** 2) - 1
        if b * b - 4 * a * c >= 0:
            hits += [(-b + s * math.sqrt(b * b - 4 * a * c)) / (2 * a) for s in (-1, 1)]
    else:
        # (x / hx)^2 + (y / hy)^2 = r(z)^2 with r = 1 at the bottom and `taper` at the top
        slope = (taper - 1) / (2 * half[2])
        r0 = (1 + taper) / 2 + slope * o[2]
        a = (d[0] / half[0]) ** 2 + (d[1] / half[1]) ** 2 - (slope * d[2]) ** 2
        b = 2 * (o[0] * d[0] / half[0] ** 2 + o[1] * d[1] / half[1] ** 2 - r0 * slope * d[2])
        c = (o[0] / half[0]) ** 2 + (o[1] / half[1]) ** 2 - r0**2
        if b * b - 4 * a * c >= 0 and a != 0:
            for s in (-1, 1):
                t = (-b + s * math.sqrt(b * b - 4 * a * c)) / (2 * a)
                if abs(o[2] + t * d[2]) <= half[2]:
                    hits.append(t)
        for z, radius in ((-half[2], 1.0), (half[2], taper)):
            t = (z - o[2]) / d[2]
            if ((o[0] + t * d[0]) / half[0]) ** 2 + ((o[1] + t * d[1]) / half[1]) ** 2 <= radius**2:
                hits.append(t)
    hits = [t for t in hits if t > 0.02]
    return min(hits) if hits else None


def slow_pixel(room, frame, u, v, size_hw):
    """Depth and instance of one pixel."""
    intrinsics, pose = room.intrinsics_px(size_hw), room.track.annotation_from_cam[frame]
    ray = pose[:3, :3] @ np.array(
        [(u - size_hw[1] / 2) / intrinsics[0, 0], (v - size_hw[0] / 2) / intrinsics[1, 1], 1.0]
    )
    origin = pose[:3, 3]
    walls = [((room.high if ray[a] > 0 else room.low)[a] - origin[a]) / ray[a] for a in range(3)]
    best, axis = min(walls), int(np.argmin(walls))
    owner = -1 - (2 * axis + int(ray[axis] > 0))
    for k in range(len(room.solids.shape)):
        t = slow_hit(room.solids, k, origin, ray)
        if t is not None and t < best:
            best, owner = t, int(room.solids.owner[k])
    return best, owner


@pytest.mark.parametrize(("difficulty", "number", "size_hw"), [("easy", 1003, (13, 21)), ("hard", 1002, (13, 22))])
def test_depth_and_instances_equal_the_slow_renderer(difficulty, number, size_hw):
    room = make_room(5, number, difficulty)
    frames = [0, len(room.track.annotation_from_cam) - 1]
    fast = RoomRenderer(room).render(size_hw, frames)
    slow = np.array(
        [[[slow_pixel(room, f, u, v, size_hw) for u in range(size_hw[1])] for v in range(size_hw[0])] for f in frames]
    )
    assert len(np.unique(slow[..., 1])) > 4
    same = slow[..., 1] == fast.instance.numpy()
    # A ray that grazes an edge may fall on either side in single precision.
    assert same.mean() > 0.997
    np.testing.assert_allclose(fast.depth_m.numpy()[same], slow[..., 0][same], rtol=2e-4)


@pytest.fixture(scope="module")
def room():
    return make_room(1, 1004, "standard")


@pytest.fixture(scope="module")
def frames(room):
    return RoomRenderer(room).render((96, 128))


def test_points_of_instances_lie_in_their_boxes(room, frames):
    boxes = boxes_annotation(room, build_mesh(room))
    cam_from_annotation = torch.linalg.inv(torch.tensor(room.track.annotation_from_cam))
    intrinsics = torch.tensor(room.intrinsics_px((96, 128))).expand(len(cam_from_annotation), 3, 3)
    points = unproject_depth(frames.depth_m, intrinsics.float(), cam_from_annotation.float()).numpy()
    checked = 0
    for thing in room.objects:
        mine = points[frames.instance.numpy() == thing.object_id]
        centre, size = boxes[thing.object_id, :3], boxes[thing.object_id, 3:]
        assert (np.abs(mine - centre) <= size / 2 + 2e-3).all()
        checked += len(mine)
    assert checked > 5000
    walls = points[frames.instance.numpy() < 0]
    low, high = room.low, room.high
    assert np.minimum(np.abs(walls - low), np.abs(walls - high)).min(axis=1).max() < 2e-3


def test_two_views_agree(room, frames):
    """A point seen in one frame is seen at the same place in the next, unless something is before it."""
    cam = torch.linalg.inv(torch.tensor(room.track.annotation_from_cam)).float()
    k = torch.tensor(room.intrinsics_px((96, 128))).float()
    points = unproject_depth(frames.depth_m[3], k, cam[3])
    pixels, depth = project_points(points, k, cam[5])
    u, v = pixels.round().long().unbind(-1)
    inside = (u >= 0) & (u < 128) & (v >= 0) & (v < 96) & (depth > 0)
    assert inside.float().mean() > 0.5
    there, mine = frames.depth_m[5][v[inside], u[inside]], depth[inside]
    assert ((there - mine).abs() < 0.03 * mine + 0.03).float().mean() > 0.85
    assert (there > mine * 1.1 + 0.1).float().mean() < 0.05  # nobody sees through what is there


def test_parts_of_the_batch_change_nothing(room, frames):
    renderer = RoomRenderer(room)
    few = renderer.render((96, 128), [7, 2], frames_at_once=1)
    assert torch.equal(few.depth_m, frames.depth_m[[7, 2]])
    assert torch.equal(few.instance, frames.instance[[7, 2]])
    assert torch.equal(few.rgb, frames.rgb[[7, 2]])


def test_antialiasing_smooths_colour_and_leaves_geometry(room, frames):
    smooth = RoomRenderer(room).render((96, 128), [0, 9], antialias=True)
    assert torch.equal(smooth.depth_m, frames.depth_m[[0, 9]])
    assert torch.equal(smooth.instance, frames.instance[[0, 9]])

    def roughness(rgb):
        return rgb.float().diff(dim=2).abs().mean()

    assert roughness(smooth.rgb) < 0.95 * roughness(frames.rgb[[0, 9]])
    bare = RoomRenderer(room).render((96, 128), [0], colour=False)
    assert bare.rgb.shape == (0, 96, 128, 3)
    assert torch.equal(bare.instance, frames.instance[:1])


def test_visibility_counts_pixels(room, frames):
    seen = visibility(room)
    instance = frames.instance.numpy()
    spread = [round(i * (len(instance) - 1) / 7) for i in range(8)]
    for thing in room.objects:
        pixels = (instance == thing.object_id).sum(axis=(1, 2))
        assert seen.anywhere[thing.object_id] == pixels.max()
        assert seen.spread[thing.object_id] == pixels[spread].max()
        assert (seen.first[thing.object_id], seen.last[thing.object_id]) == (pixels[0], pixels[-1])


def test_errors(room):
    with pytest.raises(ValueError, match="frames in 0"):
        RoomRenderer(room).render((96, 128), [99])
    with pytest.raises(ValueError, match="at least 1 pixel"):
        RoomRenderer(room).render((0, 128))


def test_textures_repeat_without_a_seam():
    atlas = texture_atlas()
    assert atlas.shape[0] == len(PATTERNS)
    assert atlas.min() >= 0
    assert atlas.max() <= 1
    for name in ("noise", "plain"):
        texture = atlas[PATTERNS.index(name)]
        inside = np.abs(np.diff(texture, axis=0)).max()
        assert np.abs(texture[0] - texture[-1]).max() <= 1.5 * inside


@pytest.mark.gpu
def test_gpu_equals_cpu(room, frames):
    there = RoomRenderer(room, "cuda").render((96, 128))
    same = there.instance.cpu() == frames.instance
    assert same.float().mean() > 0.999
    torch.testing.assert_close(there.depth_m.cpu()[same], frames.depth_m[same], rtol=1e-4, atol=1e-4)
    assert (there.rgb.cpu().int() - frames.rgb.int()).abs()[same].float().mean() < 1
