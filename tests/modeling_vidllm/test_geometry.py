"""Geometry functions: properties, hand-made cases, and slow obvious versions beside them."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidllm.modeling_vidllm import geometry_vidllm as geometry


SIZE_HW = (6, 9)
seeds = st.integers(0, 2**31 - 1)
# Ends and half turns come up often, not once in a million.
angles = st.one_of(st.floats(0, math.pi), st.sampled_from([0.0, 1e-4, math.pi / 2, math.pi - 1e-4, math.pi]))


CONVENTIONS = (Path(__file__).parents[2] / "CONVENTIONS.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", CONVENTIONS, flags=re.DOTALL)


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def rotation_about(axis, angle):
    """Slow obvious rotation, float64: the matrix exponential of the skew matrix."""
    axis = torch.as_tensor(axis, dtype=torch.float64)
    x, y, z = (axis / axis.norm() * angle).tolist()
    return torch.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64))


def random_rotations(seed, *shape):
    generator = generator_of(seed)
    count = math.prod(shape)
    axes = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    turns = torch.rand(count, generator=generator, dtype=torch.float64) * math.pi
    rotations = [rotation_about(axis, angle) for axis, angle in zip(axes, turns.tolist(), strict=True)]
    return torch.stack(rotations).reshape(*shape, 3, 3)


def random_poses(seed, *shape):
    translation = 2 * torch.randn(*shape, 3, generator=generator_of(seed + 1), dtype=torch.float64)
    return geometry.to_homogeneous(random_rotations(seed, *shape), translation)


def intrinsics(*shape, fx=7.0, fy=5.5, cx=4.5, cy=3.0):
    matrix = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
    return matrix.expand(*shape, 3, 3)


# ---- rotations


@given(seed=seeds, angle=angles)
@settings(deadline=None, max_examples=60)
def test_quaternion_of_a_rotation_and_back(seed, angle):
    axis = torch.randn(3, generator=generator_of(seed), dtype=torch.float64)
    rot = rotation_about(axis, angle)
    quat = geometry.quat_xyzw_from_rotation(rot)
    assert quat[3] >= 0
    torch.testing.assert_close(quat.norm(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(geometry.rotation_from_quat_xyzw(quat), rot, atol=1e-9, rtol=0)
    # Half the angle, along the axis: nothing but the definition.
    assert abs(quat[3].item() - math.cos(angle / 2)) < 1e-9
    if 1e-3 < angle < math.pi - 1e-3:
        torch.testing.assert_close(quat[:3], math.sin(angle / 2) * axis / axis.norm(), atol=1e-9, rtol=0)
    single = geometry.rotation_from_quat_xyzw(geometry.quat_xyzw_from_rotation(rot.float()))
    torch.testing.assert_close(single, rot.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("factor", [1e-3, -2.5, 40.0])
def test_quaternion_length_and_sign_do_not_matter(factor):
    quat = torch.randn(3, 5, 4)
    torch.testing.assert_close(
        geometry.rotation_from_quat_xyzw(factor * quat), geometry.rotation_from_quat_xyzw(quat), atol=1e-6, rtol=0
    )


def test_zero_quaternion_is_the_identity_with_finite_gradient():
    quat = torch.zeros(2, 4, requires_grad=True)
    rot = geometry.rotation_from_quat_xyzw(quat)
    assert torch.equal(rot.detach(), torch.eye(3).expand(2, 3, 3))
    rot.square().sum().backward()
    assert quat.grad.isfinite().all()


def test_quaternion_gradient_is_finite_at_the_identity_and_at_half_turns():
    diagonal = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    rot = torch.diag_embed(diagonal).requires_grad_()
    quat = geometry.quat_xyzw_from_rotation(rot)
    assert torch.equal(quat.detach().abs(), torch.eye(4)[[3, 0, 1, 2]])
    (quat * torch.randn(4, 4)).sum().backward()
    assert rot.grad.isfinite().all()
    assert rot.grad.abs().sum() > 0


@given(seed=seeds)
@settings(deadline=None, max_examples=30)
def test_6d_gives_the_rotation_whose_first_rows_it_is(seed):
    rot = random_rotations(seed, 2, 3)
    scale = torch.rand(2, 3, 2, generator=generator_of(seed), dtype=torch.float64) + 0.1
    # Gram-Schmidt must undo a scaled first row, and a second one that leans towards the first.
    lean = scale[..., :1] * 0.7 * rot[..., 0, :]
    x = torch.cat((scale[..., :1] * rot[..., 0, :], scale[..., 1:] * rot[..., 1, :] + lean), dim=-1)
    torch.testing.assert_close(geometry.rotation_from_6d(x), rot, atol=1e-9, rtol=0)


def test_6d_of_the_start_room_is_exact():
    start = torch.tensor(geometry.START_ROOM_FROM_CAM)
    assert torch.equal(geometry.rotation_from_6d(start[:2].flatten()), start)
    # First camera held upright: its y (down) is the room's -z, its z (forward) is the room's y.
    assert torch.equal(start @ torch.tensor([0.0, 1, 0]), torch.tensor([0.0, 0, -1]))
    assert torch.equal(start @ torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 1, 0]))


@pytest.mark.parametrize(
    "x",
    [
        [0.0] * 6,
        [0, 0, 0, 0, 3, 0],
        [0, 2, 0, 0, 0, 0],
        [1, 2, 3, 1, 2, 3],
        [1, 2, 3, -2, -4, -6],
        [0.3, 0.1, -0.2, 0.3000001, 0.1, -0.2],
        [0, 0, 5, 0, 0, 1e-9],
    ],
)
def test_6d_is_a_rotation_even_if_degenerate(x):
    x = torch.tensor([x, [1, 0, 0, 0, 1, 0]], dtype=torch.float32, requires_grad=True)
    rot = geometry.rotation_from_6d(x)
    torch.testing.assert_close(rot @ rot.transpose(-1, -2), torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rot), torch.ones(2), atol=1e-5, rtol=0)
    (rot * torch.randn(2, 3, 3)).sum().backward()
    assert x.grad.isfinite().all()


@given(seed=seeds, angle=angles)
@settings(deadline=None, max_examples=60)
def test_angle_between_rotations(seed, angle):
    base = random_rotations(seed, 1)[0]
    turned = rotation_about(torch.randn(3, generator=generator_of(seed), dtype=torch.float64), angle) @ base
    assert abs(geometry.rotation_angle_rad(base, turned).item() - angle) < 1e-7
    assert abs(geometry.rotation_angle_rad(turned, base).item() - angle) < 1e-7
    assert abs(geometry.rotation_angle_rad(base.float(), turned.float()).item() - angle) < 5e-6


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1.0, math.pi - 1e-6, math.pi])
def test_angle_gradient_is_finite_and_right(angle):
    base = random_rotations(5, 1)[0]
    turned = (rotation_about([1.0, -2, 0.5], angle) @ base).requires_grad_()
    value = geometry.rotation_angle_rad(base, turned)
    value.backward()
    assert turned.grad.isfinite().all()
    if angle == 1.0:
        # One more bit of the same rotation must lengthen the angle by that bit.
        step = 1e-6
        further = rotation_about([1.0, -2, 0.5], angle + step) @ base
        slope = (turned.grad * (further - turned.detach())).sum() / step
        assert abs(slope.item() - 1) < 1e-5
    exact = base.clone().requires_grad_()
    geometry.rotation_angle_rad(base, exact).backward()
    assert exact.grad.isfinite().all()


# ---- rigid transforms


@given(seed=seeds)
@settings(deadline=None, max_examples=30)
def test_inverse_of_the_inverse(seed):
    pose = random_poses(seed, 2, 3)
    inverse = geometry.invert_rigid(pose)
    torch.testing.assert_close(inverse, torch.linalg.inv(pose))
    torch.testing.assert_close(geometry.invert_rigid(inverse), pose)
    assert torch.equal(inverse[..., 3, :], torch.tensor([0, 0, 0, 1.0], dtype=torch.float64).expand(2, 3, 4))


@given(seed=seeds)
@settings(deadline=None, max_examples=20)
def test_first_frame_becomes_the_world(seed):
    cam_from_world = random_poses(seed, 2, 4)
    moved = geometry.reexpress_to_first_frame(cam_from_world.float())
    assert torch.equal(moved[:, 0], torch.eye(4).expand(2, 4, 4))
    # Motion from camera to camera does not change.
    for i, j in ((1, 0), (2, 3), (3, 1)):
        before = cam_from_world[:, i] @ torch.linalg.inv(cam_from_world[:, j])
        after = moved[:, i].double() @ torch.linalg.inv(moved[:, j].double())
        torch.testing.assert_close(after, before, atol=2e-5, rtol=0)


def test_first_frame_receives_gradient_through_the_others():
    cam_from_world = random_poses(3, 2, 3).requires_grad_()
    (geometry.reexpress_to_first_frame(cam_from_world) ** 2).sum().backward()
    assert cam_from_world.grad[:, 0, :3].abs().sum() > 0
    assert cam_from_world.grad.isfinite().all()


def test_transform_points_by_hand_and_by_loop():
    points = torch.randn(2, 5, 3, dtype=torch.float64)
    pose = random_poses(1, 2)
    moved, turned = geometry.transform_points(pose, points), geometry.transform_points(pose[:, :3, :3], points)
    for b in range(2):
        for m in range(5):
            expected = pose[b, :3, :3] @ points[b, m]
            torch.testing.assert_close(turned[b, m], expected)
            torch.testing.assert_close(moved[b, m], expected + pose[b, :3, 3])
    quarter = torch.tensor([[0.0, -1, 0, 10], [1, 0, 0, 20], [0, 0, 1, 30], [0, 0, 0, 1]])
    assert torch.equal(geometry.transform_points(quarter, torch.tensor([[1.0, 2, 3]])), torch.tensor([[8.0, 21, 33]]))


# ---- cameras and pixels


@given(seed=seeds)
@settings(deadline=None, max_examples=30)
def test_pose_encoding_and_back(seed):
    cam_from_world = random_poses(seed, 2, 3)
    focal = 3 + 5 * torch.rand(2, 3, 2, generator=generator_of(seed), dtype=torch.float64)
    camera = intrinsics(2, 3).clone()
    camera[..., 0, 0], camera[..., 1, 1] = focal[..., 0], focal[..., 1]
    encoding = geometry.pose_encoding_from_cameras(cam_from_world, camera, SIZE_HW)
    assert encoding.shape == (2, 3, 9)
    pose, back = geometry.cameras_from_pose_encoding(encoding, SIZE_HW)
    torch.testing.assert_close(pose, cam_from_world, atol=1e-9, rtol=0)
    torch.testing.assert_close(back, camera, atol=1e-9, rtol=0)


def test_pose_encoding_by_hand():
    # 90 degrees over the height of 6, tan(fov / 2) = 3 over the width of 9, half a turn about y.
    encoding = torch.tensor([[1.0, 2, 3, 0, 2, 0, 0, math.pi / 2, 2 * math.atan(3.0)]])
    pose, camera = geometry.cameras_from_pose_encoding(encoding, SIZE_HW)
    expected = torch.tensor([[[-1.0, 0, 0, 1], [0, 1, 0, 2], [0, 0, -1, 3], [0, 0, 0, 1]]])
    torch.testing.assert_close(pose, expected)
    torch.testing.assert_close(camera, torch.tensor([[[1.5, 0, 4.5], [0, 3, 3], [0, 0, 1]]]))


@pytest.mark.parametrize("fov", [0.0, math.pi, 4.0])
def test_unusable_field_of_view_stays_finite(fov):
    encoding = torch.tensor([[0.0, 0, 0, 0, 0, 0, 1, fov, fov]], requires_grad=True)
    pose, camera = geometry.cameras_from_pose_encoding(encoding, SIZE_HW)
    assert camera.isfinite().all()
    assert camera[0, 0, 0] > 0
    geometry.unproject_depth(torch.ones(1, *SIZE_HW), camera, pose).square().sum().backward()
    assert encoding.grad.isfinite().all()


def test_unprojection_against_a_loop():
    height, width = SIZE_HW
    depth = torch.rand(2, 3, height, width, dtype=torch.float64) + 0.5
    camera, pose = intrinsics(2, 3, cx=4.1, cy=2.7), random_poses(8, 2, 3)
    points = geometry.unproject_depth(depth, camera, pose)
    assert points.shape == (2, 3, height, width, 3)
    for b, s, v, u in ((0, 0, 0, 0), (1, 2, 5, 8), (0, 1, 3, 7), (1, 0, 2, 4)):
        ray = torch.linalg.inv(camera[b, s]) @ torch.tensor([u, v, 1.0], dtype=torch.float64)
        point_cam = torch.cat((ray * depth[b, s, v, u], torch.ones(1, dtype=torch.float64)))
        expected = torch.linalg.inv(pose[b, s]) @ point_cam
        torch.testing.assert_close(points[b, s, v, u], expected[:3])


def test_unprojection_has_no_half_pixel():
    camera = torch.tensor([[2.0, 0, 4], [0, 2, 3], [0, 0, 1]])
    points = geometry.unproject_depth(torch.full(SIZE_HW, 10.0), camera, torch.eye(4))
    assert torch.equal(points[3, 4], torch.tensor([0.0, 0, 10]))
    assert torch.equal(points[0, 0], torch.tensor([-20.0, -15, 10]))


@given(seed=seeds)
@settings(deadline=None, max_examples=30)
def test_unproject_then_project_returns_every_pixel(seed):
    height, width = SIZE_HW
    depth = 0.3 + 5 * torch.rand(2, 3, height, width, generator=generator_of(seed), dtype=torch.float64)
    camera, pose = intrinsics(2, 3), random_poses(seed, 2, 3)
    points = geometry.unproject_depth(depth, camera, pose)
    pixels, back = geometry.project_points(points, camera, pose)
    u, v = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    grid = torch.stack((u, v), dim=-1).double().expand(2, 3, height, width, 2)
    torch.testing.assert_close(pixels, grid, atol=1e-9, rtol=0)
    torch.testing.assert_close(back, depth)
    # A list of points instead of a map gives the same numbers.
    flat_pixels, flat_depth = geometry.project_points(points.flatten(2, 3), camera, pose)
    assert torch.equal(flat_pixels, pixels.flatten(2, 3))
    assert torch.equal(flat_depth, back.flatten(2, 3))


def test_projection_at_and_behind_the_camera_is_finite():
    points = torch.tensor([[[0.0, 0, 0], [1, 1, 0], [1, 2, -3], [0, 0, 1e-20]]]).expand(2, 4, 3)
    points = points.clone().requires_grad_()
    pixels, depth = geometry.project_points(points, intrinsics(2).float(), torch.eye(4).expand(2, 4, 4))
    assert depth[0].tolist() == pytest.approx([0, 0, -3, 0])
    pixels.sum().backward()
    assert pixels.isfinite().all()
    assert points.grad.isfinite().all()


def test_resize_and_crop_move_intrinsics_with_the_pixels():
    camera, pose = intrinsics(2, cx=5.2, cy=2.4), random_poses(4, 2)
    points = torch.randn(2, 6, 3, dtype=torch.float64) + 5
    before, _ = geometry.project_points(points, camera, pose)
    resized = geometry.resize_intrinsics(camera, SIZE_HW, (15, 18))
    after, _ = geometry.project_points(points, resized, pose)
    torch.testing.assert_close(after, before * torch.tensor([18 / 9, 15 / 6], dtype=torch.float64))
    cropped, _ = geometry.project_points(points, geometry.crop_intrinsics(camera, top=1, left=3), pose)
    torch.testing.assert_close(cropped, before - torch.tensor([3.0, 1.0], dtype=torch.float64))


def test_principal_point_stays_in_the_middle_through_resize_and_centre_crop():
    height, width = 968, 1296
    camera = torch.tensor([[1170.0, 0, width / 2], [0, 1169.0, height / 2], [0, 0, 1]])
    resized = geometry.resize_intrinsics(camera, (height, width), (518, 693))
    cropped = geometry.crop_intrinsics(resized, top=0, left=(693 - 686) / 2)
    torch.testing.assert_close(cropped[:2, 2], torch.tensor([343.0, 259.0]))
    assert torch.equal(cropped[2], torch.tensor([0.0, 0, 1]))


# ---- precision


def every_function(dtype):
    """Name and arguments of each function that multiplies."""
    pose, camera = random_poses(2, 2, 3).to(dtype), intrinsics(2, 3).to(dtype)
    rot = pose[..., :3, :3]
    boxes = torch.rand(2, 4, 6).to(dtype) + 0.5
    points = torch.rand(2, 3, 5, 3).to(dtype) + 3
    return [
        (geometry.rotation_from_quat_xyzw, (torch.ones(2, 3, 4).to(dtype),)),
        (geometry.quat_xyzw_from_rotation, (rot,)),
        (geometry.rotation_from_6d, (torch.arange(12.0).reshape(2, 6).to(dtype),)),
        (geometry.rotation_angle_rad, (rot, rot.flip(1))),
        (geometry.invert_rigid, (pose,)),
        (geometry.reexpress_to_first_frame, (pose,)),
        (geometry.cameras_from_pose_encoding, (torch.rand(2, 3, 9).to(dtype), SIZE_HW)),
        (geometry.pose_encoding_from_cameras, (pose, camera, SIZE_HW)),
        (geometry.unproject_depth, (torch.ones(2, 3, *SIZE_HW).to(dtype), camera, pose)),
        (geometry.project_points, (points, camera, pose)),
        (geometry.transform_points, (pose, points)),
        (geometry.resize_intrinsics, (camera, SIZE_HW, (12, 12))),
        (geometry.crop_intrinsics, (camera, 1, 2)),
        (geometry.boxes_room_from_annotation, (boxes, pose[:, 0], rot[:, 1])),
        (geometry.boxes_annotation_from_room, (boxes, pose[:, 0], rot[:, 1])),
        (geometry.box_iou, (boxes[:, 0], boxes[:, 1])),
        (geometry.box_diou, (boxes[:, 0], boxes[:, 1])),
        (geometry.box_corners, (boxes,)),
    ]


NAMES = [function.__name__ for function, _ in every_function(torch.float32)]


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_full_precision_whatever_surrounds_it(index):
    function, arguments = every_function(torch.float32)[index]
    plain = function(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = function(*arguments)
    plain, under_autocast = (x if isinstance(x, tuple) else (x,) for x in (plain, under_autocast))
    for a, b in zip(plain, under_autocast, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        function, arguments = every_function(dtype)[index]
        result = function(*arguments)
        for tensor in result if isinstance(result, tuple) else (result,):
            assert tensor.dtype == wanted


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (geometry.rotation_from_quat_xyzw, (torch.zeros(2, 3),), "quat_xyzw"),
        (geometry.rotation_from_6d, (torch.zeros(3, 3),), "x: wanted"),
        (geometry.invert_rigid, (torch.zeros(2, 3, 4),), "target_from_source"),
        (geometry.cameras_from_pose_encoding, (torch.zeros(2, 7), SIZE_HW), "pose_encoding"),
        (geometry.transform_points, (torch.zeros(2, 3, 4), torch.zeros(2, 5, 3)), "target_from_source"),
        (geometry.project_points, (torch.zeros(2, 3), torch.zeros(2, 3, 3), torch.zeros(2, 4, 4)), "points_world"),
        (geometry.box_iou, (torch.zeros(2, 7), torch.zeros(2, 6)), "boxes_a"),
    ],
)
def test_wrong_shapes_are_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


# ---- boxes


def test_corners_by_hand():
    corners = geometry.box_corners(torch.tensor([[1.0, 2, 3, 2, 4, 6], [0, 0, 0, 0, 0, 0]]))
    expected = [(x, y, z) for z in (0.0, 6.0) for y in (0.0, 4.0) for x in (0.0, 2.0)]
    assert corners[0].tolist() == [list(corner) for corner in expected]
    assert torch.equal(corners[1], torch.zeros(8, 3))


whole_boxes = st.tuples(*[st.integers(-3, 3)] * 3, *[st.integers(0, 5)] * 3)


def cells_of(box):
    """Unit cells of a box with integer low corner and size."""
    x, y, z, dx, dy, dz = box
    return {(i, j, k) for i in range(x, x + dx) for j in range(y, y + dy) for k in range(z, z + dz)}


@given(a=whole_boxes, b=whole_boxes, offset=st.sampled_from([0.0, 0.5, -64.0]))
@settings(deadline=None, max_examples=150)
def test_iou_counts_cells(a, b, offset):
    cells_a, cells_b = cells_of(a), cells_of(b)
    expected = len(cells_a & cells_b) / len(cells_a | cells_b) if cells_a | cells_b else 0.0
    tensors = []
    for box in (a, b):
        low, size = torch.tensor(box[:3], dtype=torch.float32), torch.tensor(box[3:], dtype=torch.float32)
        tensors.append(torch.cat((low + size / 2 + offset, size)))
    iou = geometry.box_iou(*tensors)
    assert iou.item() == pytest.approx(expected, abs=1e-6)
    assert 0 <= iou.item() <= 1
    assert geometry.box_iou(*reversed(tensors)).item() == pytest.approx(expected, abs=1e-6)


@given(seed=seeds, scale=st.sampled_from([1e-12, 1.0, 1e12]))
@settings(deadline=None, max_examples=30)
def test_iou_of_equal_boxes_is_one_at_any_size_and_place(seed, scale):
    boxes = torch.randn(2, 3, 6, generator=generator_of(seed))
    boxes[..., 3:] = boxes[..., 3:].abs() + 0.01
    assert torch.equal(geometry.box_iou(boxes * scale, boxes * scale), torch.ones(2, 3))
    assert torch.equal(geometry.box_diou(boxes * scale, boxes * scale), torch.ones(2, 3))


def test_iou_broadcasts_and_degenerate_boxes_score_zero():
    boxes = torch.tensor(
        [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, -1, 1, 1], [5, 0, 0, 1, 1, 1.0]]
    )
    iou = geometry.box_iou(boxes[:, None], boxes[None])
    expected = torch.zeros(5, 5)
    expected[0, 0] = expected[4, 4] = 1
    assert torch.equal(iou, expected)
    diou = geometry.box_diou(boxes[:, None], boxes[None])
    assert diou.isfinite().all()
    assert diou[2, 2] == 0


@given(seed=seeds)
@settings(deadline=None, max_examples=30)
def test_diou_against_its_definition(seed):
    boxes = torch.randn(2, 4, 6, generator=generator_of(seed), dtype=torch.float64)
    boxes[..., 3:] = boxes[..., 3:].abs() + 0.05
    values = geometry.box_diou(boxes[0], boxes[1])
    for m in range(4):
        a, b = boxes[0, m], boxes[1, m]
        low = torch.minimum(a[:3] - a[3:] / 2, b[:3] - b[3:] / 2)
        high = torch.maximum(a[:3] + a[3:] / 2, b[:3] + b[3:] / 2)
        penalty = (a[:3] - b[:3]).square().sum() / (high - low).square().sum()
        torch.testing.assert_close(values[m], geometry.box_iou(a, b) - penalty)
    assert (values > -1).all()
    assert (values <= 1).all()


def test_diou_gradient():
    predicted = torch.tensor(
        [[1.0, 2, 3, 1, 2, 3], [9, 9, 9, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1e18, 0, 0, 1e18, 1, 1]], requires_grad=True
    )
    target = torch.tensor([[1.0, 2, 3, 1, 2, 3], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    (1 - geometry.box_diou(predicted, target)).sum().backward()
    assert predicted.grad.isfinite().all()
    # Disjoint boxes overlap nowhere, yet the loss pulls the centre towards the target.
    assert (predicted.grad[1, :3] > 0).all()
    generic = torch.tensor([[0.1, 0.2, 0.3, 1.1, 0.9, 1.3]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[0.0, 0, 0, 1, 1, 1]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda boxes: geometry.box_diou(boxes, other), (generic,))


# ---- the page for users


@pytest.mark.parametrize("index", range(3))
def test_examples_of_the_conventions_hold(index):
    assert len(EXAMPLES) == 3
    assert "assert" in EXAMPLES[index]
    exec(compile(EXAMPLES[index], f"CONVENTIONS.md example {index}", "exec"), {})
