"""Boxes between the annotation frame and the room frame: exact for any pose, heading and heading error."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidllm.modeling_vidllm import geometry_vidllm as geometry


B, M = 2, 5
seeds = st.integers(0, 2**31 - 1)
headings = st.integers(0, 3)
# Below 45 degrees from a heading, that heading is the nearest of the four.
small_errors = st.floats(0, math.radians(44.9))


def rotation_about(axis, angle):
    x, y, z = (axis / axis.norm() * angle).tolist()
    return torch.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))


def turn_about_z(quarters):
    return rotation_about(torch.tensor([0.0, 0, 1], dtype=torch.float64), quarters * math.pi / 2)


def scene(seed, quarters, error, dtype=torch.float64):
    """Random annotation frame and boxes; room rotation = the annotated heading turned by `quarters`, off by `error` radians."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rot = torch.stack([rotation_about(normal(3), 3 * abs(normal(1).item())) for _ in range(B)])
    annotation_from_world = geometry.to_homogeneous(rot, 3 * normal(B, 3))
    off = torch.stack([rotation_about(normal(3), error) for _ in range(B)])
    room_from_world = off @ turn_about_z(quarters) @ rot
    boxes = torch.cat((4 * normal(B, M, 3), normal(B, M, 3).abs() + 0.05), dim=-1)
    return boxes.to(dtype), annotation_from_world.to(dtype), room_from_world.to(dtype)


@given(seed=seeds)
@settings(deadline=None, max_examples=20)
def test_headings_are_quarter_turns_of_the_annotated_axes(seed):
    _, annotation_from_world, _ = scene(seed, 0, 0.0)
    found = geometry.room_headings(annotation_from_world)
    assert found.shape == (B, 4, 3, 3)
    assert torch.equal(found, geometry.room_headings(annotation_from_world[:, :3, :3]))
    for quarters in range(4):
        expected = turn_about_z(quarters) @ annotation_from_world[:, :3, :3]
        torch.testing.assert_close(found[:, quarters], expected)


@given(seed=seeds, quarters=headings, error=small_errors)
@settings(deadline=None, max_examples=60)
def test_nearest_heading_below_45_degrees(seed, quarters, error):
    _, annotation_from_world, room_from_world = scene(seed, quarters, error)
    assert geometry.nearest_heading(room_from_world, annotation_from_world).tolist() == [quarters] * B


@given(seed=seeds, error=st.floats(0, math.pi))
@settings(deadline=None, max_examples=40)
def test_nearest_heading_has_the_smallest_angle(seed, error):
    _, annotation_from_world, room_from_world = scene(seed, 1, error)
    index = geometry.nearest_heading(room_from_world, annotation_from_world)
    angles = geometry.rotation_angle_rad(room_from_world[:, None], geometry.room_headings(annotation_from_world))
    chosen = torch.gather(angles, 1, index[:, None])[:, 0]
    torch.testing.assert_close(chosen, angles.amin(dim=1), atol=1e-6, rtol=0)


@given(seed=seeds, quarters=headings, error=st.floats(0, math.pi))
@settings(deadline=None, max_examples=60)
def test_round_trip_for_any_pose_heading_and_error(seed, quarters, error):
    boxes, annotation_from_world, room_from_world = scene(seed, quarters, error)
    room = geometry.boxes_room_from_annotation(boxes, annotation_from_world, room_from_world)
    back = geometry.boxes_annotation_from_room(room, annotation_from_world, room_from_world)
    torch.testing.assert_close(back, boxes, atol=1e-9, rtol=0)
    again = geometry.boxes_room_from_annotation(back, annotation_from_world, room_from_world)
    torch.testing.assert_close(again, room, atol=1e-9, rtol=0)
    assert torch.equal(back[..., 3:], boxes[..., 3:])


@given(seed=seeds, quarters=headings, error=small_errors)
@settings(deadline=None, max_examples=60)
def test_perfect_boxes_score_one_at_any_heading_error(seed, quarters, error):
    boxes, annotation_from_world, room_from_world = scene(seed, quarters, error, torch.float32)
    perfect = geometry.boxes_room_from_annotation(boxes, annotation_from_world, room_from_world)
    scored = geometry.boxes_annotation_from_room(perfect, annotation_from_world, room_from_world)
    iou = geometry.box_iou(scored, boxes)
    # float32 carries centres some metres away to about 2e-6 m, on boxes of at least 0.05 m.
    assert (iou > 1 - 1e-3).all()
    big = boxes[..., 3:].amin(dim=-1) > 0.5
    assert (iou[big] > 1 - 1e-4).all()


@given(seed=seeds, quarters=headings, error=small_errors)
@settings(deadline=None, max_examples=40)
def test_target_is_the_definition(seed, quarters, error):
    boxes, annotation_from_world, room_from_world = scene(seed, quarters, error)
    room = geometry.boxes_room_from_annotation(boxes, annotation_from_world, room_from_world)
    for b in range(B):
        world_from_annotation = torch.linalg.inv(annotation_from_world[b])
        for m in range(M):
            centre_world = (world_from_annotation @ torch.cat((boxes[b, m, :3], boxes.new_ones(1))))[:3]
            torch.testing.assert_close(room[b, m, :3], room_from_world[b] @ centre_world)
            dx, dy, dz = boxes[b, m, 3:].tolist()
            assert room[b, m, 3:].tolist() == ([dy, dx, dz] if quarters % 2 else [dx, dy, dz])


@given(seed=seeds, quarters=headings)
@settings(deadline=None, max_examples=30)
def test_without_error_the_solid_itself_is_carried(seed, quarters):
    boxes, annotation_from_world, room_from_world = scene(seed, quarters, 0.0)
    room = geometry.boxes_room_from_annotation(boxes, annotation_from_world, room_from_world)
    room_from_annotation = geometry.to_homogeneous(room_from_world, torch.zeros(B, 3, dtype=torch.float64))
    room_from_annotation = room_from_annotation @ torch.linalg.inv(annotation_from_world)
    # (B, M, 8, 3) -> (B, M * 8, 3) -> (B, M, 8, 3)
    carried = geometry.transform_points(room_from_annotation, geometry.box_corners(boxes).flatten(1, 2))
    carried = carried.unflatten(1, (M, 8))
    corners = geometry.box_corners(room)
    torch.testing.assert_close(carried.amin(dim=2), corners.amin(dim=2), atol=1e-9, rtol=0)
    torch.testing.assert_close(carried.amax(dim=2), corners.amax(dim=2), atol=1e-9, rtol=0)


def test_boxes_never_grow_around_turned_corners():
    boxes, annotation_from_world, room_from_world = scene(3, 1, math.radians(40))
    room = geometry.boxes_room_from_annotation(boxes, annotation_from_world, room_from_world)
    assert torch.equal(room[..., 3:].sort(dim=-1).values, boxes[..., 3:].sort(dim=-1).values)


def test_by_hand():
    # Upright first camera at (1, 2, 1.5) of the annotated scene, looking along its +x.
    world_from_annotation_axes = torch.tensor([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])  # x right, y down, z forward
    rot = world_from_annotation_axes.T
    annotation_from_world = geometry.to_homogeneous(rot, torch.tensor([1.0, 2, 1.5])).expand(B, 4, 4)
    room_from_world = torch.tensor(geometry.START_ROOM_FROM_CAM).expand(B, 3, 3)
    # A table 2 m ahead and 1 m to the left, its top half a metre below the camera: long side along the view.
    boxes = torch.tensor([[3.0, 3, 0.75, 1.8, 0.8, 0.5]]).expand(B, 1, 6)
    room = geometry.boxes_room_from_annotation(boxes, annotation_from_world, room_from_world)
    # In the room frame the view is +y, so the long side lies along y.
    torch.testing.assert_close(room[0, 0], torch.tensor([-1.0, 2, -0.75, 0.8, 1.8, 0.5]))
    assert geometry.nearest_heading(room_from_world, annotation_from_world).tolist() == [1, 1]


def test_each_video_uses_its_own_heading():
    boxes, annotation_from_world, _ = scene(4, 0, 0.0)
    found = geometry.room_headings(annotation_from_world)
    room_from_world = torch.stack((found[0, 0], found[1, 3]))
    room = geometry.boxes_room_from_annotation(boxes, annotation_from_world, room_from_world)
    assert torch.equal(room[0, :, 3:], boxes[0, :, 3:])
    assert torch.equal(room[1, :, 3:], boxes[1][:, [4, 3, 5]])


def test_a_target_does_not_teach_the_room_rotation():
    boxes, annotation_from_world, room_from_world = scene(5, 2, 0.3)
    room_from_world.requires_grad_()
    assert not geometry.boxes_room_from_annotation(boxes, annotation_from_world, room_from_world).requires_grad


@pytest.mark.parametrize("count", [0, 1])
def test_scenes_without_or_with_one_box(count):
    boxes, annotation_from_world, room_from_world = scene(6, 3, 0.2)
    room = geometry.boxes_room_from_annotation(boxes[:, :count], annotation_from_world, room_from_world)
    assert room.shape == (B, count, 6)
    assert geometry.boxes_annotation_from_room(room, annotation_from_world, room_from_world).shape == (B, count, 6)
