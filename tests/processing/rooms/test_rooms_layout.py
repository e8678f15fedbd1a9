"""What stands in a room, and how it is filmed."""

import numpy as np
import pytest

from vidllm.processing.rooms.camera import CLEARANCE_M, clearance, poses_from_angles
from vidllm.processing.rooms.furniture import (
    BOX,
    CATEGORIES,
    CONE,
    ELLIPSOID,
    FLOOR_CATEGORIES,
    SMALL_CATEGORIES,
    Part,
)
from vidllm.processing.rooms.layout import make_room
from vidllm.processing.rooms.materials import COLOURS
from vidllm.processing.rooms.mesh import boxes_annotation, build_mesh
from vidllm.processing.rooms.placing import LEVELS, part_bounds


ROOMS = {level: [make_room(3, 1000 + i, level) for i in range(12)] for level in LEVELS}
ALL = [pytest.param(room, id=f"{level}-{room.number}") for level, rooms in ROOMS.items() for room in rooms[:6]]


def test_there_is_variety():
    assert len(FLOOR_CATEGORIES) >= 12
    assert len(COLOURS) >= 8
    rng = np.random.default_rng(0)
    for category in (*FLOOR_CATEGORIES.values(), *SMALL_CATEGORIES.values()):
        pieces = [category.build(rng) for _ in range(6)]
        assert all(len(piece.parts) >= 2 for piece in pieces)
        heights = {round(float(max(part_bounds(p)[1][2] for p in piece.parts)), 4) for piece in pieces}
        assert len(heights) > 3, category.name
        # Nothing floats and nothing is below the floor.
        assert all(abs(min(part_bounds(p)[0][2] for p in piece.parts)) < 0.021 for piece in pieces), category.name


@pytest.mark.parametrize("level", LEVELS)
def test_levels(level):
    wanted = LEVELS[level]
    for room in ROOMS[level]:
        floor = [thing for thing in room.objects if thing.kind == "floor"]
        assert wanted.num_floor[0] <= len(floor) <= wanted.num_floor[1]
        assert sum(thing.on is not None for thing in room.objects) <= wanted.num_on_top[1]
        sides = (room.high - room.low)[:2]
        assert (sides >= wanted.side_m[0]).all()
        assert (sides <= wanted.side_m[1]).all()
        poses = room.track.annotation_from_cam
        assert len(poses) == wanted.num_frames
        yaw = np.unwrap(np.arctan2(poses[:, 1, 2], poses[:, 0, 2]))
        assert wanted.sweep_deg[0] - 2 <= np.degrees(np.ptp(yaw)) <= wanted.sweep_deg[1] + 2
        assert 50 < room.track.horizontal_fov_deg < 85
    assert len({tuple(room.high) for room in ROOMS[level]}) == len(ROOMS[level])
    assert np.mean([any(t.on is not None for t in room.objects) for room in ROOMS[level]]) > 0.6


def overlap(a, b) -> float:
    """Depth to which two boxes share space."""
    return float((np.minimum(a.high, b.high) - np.maximum(a.low, b.low)).min())


@pytest.mark.parametrize("room", ALL)
def test_nothing_stands_in_anything(room):
    for i, a in enumerate(room.objects):
        assert (a.low >= room.low - 1e-9).all()
        assert (a.high <= room.high + 1e-9).all()
        for b in room.objects[i + 1 :]:
            if b.object_id in (a.on, a.under) or a.object_id in (b.on, b.under):
                continue
            if "wall" in (a.kind, b.kind) and a.kind != b.kind:
                assert overlap(a, b) < 0.06  # a window sill over a desk's edge
            else:
                assert overlap(a, b) <= 1e-9, (a.category, b.category)
    for thing in room.objects:
        if thing.on is not None:
            host = room.objects[thing.on]
            assert (thing.centre[:2] > host.low[:2]).all()
            assert (thing.centre[:2] < host.high[:2]).all()
            assert host.low[2] < thing.low[2] <= host.high[2] + 1e-6
        if thing.under is not None:
            assert thing.high[2] < room.objects[thing.under].high[2]
        if thing.kind == "floor":
            assert abs(thing.low[2]) < 0.021


@pytest.mark.parametrize("room", ALL)
def test_camera_keeps_its_distance(room):
    poses = room.track.annotation_from_cam
    floor = [thing for thing in room.objects if thing.kind == "floor"]
    low, high = np.array([t.low[:2] for t in floor]), np.array([t.high[:2] for t in floor])
    room_xy = np.stack([room.low[:2], room.high[:2]])
    assert clearance(poses[:, :2, 3], low, high, room_xy).min() >= CLEARANCE_M
    assert (poses[:, 2, 3] > 1.0).all()
    assert (poses[:, 2, 3] < room.high[2]).all()
    rotation = poses[:, :3, :3]
    np.testing.assert_allclose(
        rotation.transpose(0, 2, 1) @ rotation, np.tile(np.eye(3), (len(poses), 1, 1)), atol=1e-9
    )
    assert (np.linalg.det(rotation) > 0).all()
    assert (rotation[:, 2, 1] < -0.8).all()  # the picture's down is the room's down
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    assert steps.max() < 0.3


def test_clearance_by_hand():
    low, high, room = np.array([[1.0, 1.0]]), np.array([[2.0, 3.0]]), np.array([[0.0, 0.0], [10.0, 10.0]])
    points = np.array([[1.5, 2.0], [2.5, 2.0], [2.3, 3.4], [9.9, 5.0], [-1.0, 5.0]])
    np.testing.assert_allclose(clearance(points, low, high, room), [0, 0.5, 0.5, 0.1, -1.0], atol=1e-12)


def test_poses_by_hand():
    pose = poses_from_angles(np.array([[1.0, 2.0, 1.5]]), np.zeros(1), np.zeros(1), np.zeros(1))[0]
    # Looking along +x: the picture's right is -y, its down is -z.
    np.testing.assert_allclose(pose, [[0, 0, 1, 1], [-1, 0, 0, 2], [0, -1, 0, 1.5], [0, 0, 0, 1]], atol=1e-12)
    down = poses_from_angles(np.zeros((1, 3)), np.array([np.pi / 2]), np.array([-0.5]), np.zeros(1))[0]
    assert down[2, 2] == pytest.approx(-np.sin(0.5))
    assert down[1, 2] == pytest.approx(np.cos(0.5))


@pytest.mark.parametrize("shape", [BOX, ELLIPSOID, CONE])
def test_bounds_are_those_of_the_surface(shape):
    rng = np.random.default_rng(shape)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    part = Part(shape, rng.normal(size=3), rng.uniform(0.1, 0.5, 3), "main", 1.7, rotation)
    angle, z = rng.uniform(0, 2 * np.pi, 200000), rng.uniform(-1, 1, 200000)
    if shape == BOX:
        unit = rng.uniform(-1, 1, (200000, 3)).round()
    elif shape == ELLIPSOID:
        unit = rng.normal(size=(200000, 3))
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    else:
        z = np.sign(z)
        radius = np.where(z > 0, 1.7, 1.0)
        unit = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], 1)
    points = part.centre + (unit * part.half) @ rotation.T
    low, high = part_bounds(part)
    np.testing.assert_allclose(low, points.min(axis=0), atol=5e-3)
    np.testing.assert_allclose(high, points.max(axis=0), atol=5e-3)
    assert (points >= low - 1e-9).all()
    assert (points <= high + 1e-9).all()


@pytest.mark.parametrize("room", ALL[::3])
def test_boxes_of_the_mesh_are_the_true_bounds(room):
    mesh = build_mesh(room)
    boxes = boxes_annotation(room, mesh)
    np.testing.assert_allclose(boxes[:, :3], [thing.centre for thing in room.objects], atol=2e-6)
    np.testing.assert_allclose(boxes[:, 3:], [thing.high - thing.low for thing in room.objects], atol=4e-6)
    # Every vertex belongs to one instance; nothing is left over.
    counted = np.zeros(len(mesh.segments), int)
    for object_id, _, _ in mesh.groups:
        counted[mesh.vertices_of(object_id)] += 1
    assert (counted == 1).all()
    assert [group[0] for group in mesh.groups] == list(range(len(room.objects) + 6))
    assert mesh.triangles.min() == 0
    assert mesh.triangles.max() == len(mesh.vertices_scene) - 1
    # The files' frame is turned and shifted against the annotation frame.
    assert np.abs(room.scene_from_annotation[:2, 3]).max() > 0.5


def test_same_arguments_same_room_and_only_then():
    first, again = make_room(9, 1234, "standard"), make_room(9, 1234, "standard")
    for name in first.solids.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(first.solids, name), getattr(again.solids, name))
    np.testing.assert_array_equal(first.track.annotation_from_cam, again.track.annotation_from_cam)
    others = [make_room(9, 1235, "standard"), make_room(10, 1234, "standard"), make_room(9, 1234, "hard")]
    assert all(not np.array_equal(first.high, other.high) for other in others)
    assert first.scene_id == "scene1234_00"


def test_errors():
    with pytest.raises(ValueError, match="difficulty"):
        make_room(0, 1000, "impossible")
    with pytest.raises(ValueError, match=r"0\.\.9999"):
        make_room(0, 10000)


def test_every_category_appears_alike():
    counts = dict.fromkeys(FLOOR_CATEGORIES, 0)
    for number in range(80):
        for name in {thing.category for thing in make_room(4, number, "standard").objects if thing.kind == "floor"}:
            counts[name] += 1
    assert min(counts.values()) > 0.3 * max(counts.values()), counts
    assert set(counts) < set(CATEGORIES)
