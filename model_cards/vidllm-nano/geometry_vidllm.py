"""Cameras, rotations, points and boxes: pure functions, no parameters, no state.

Frames, units and the pixel rule are those of CONVENTIONS.md: OpenCV camera axes (x right, y down, z forward), transforms
named `target_from_source`, integer pixel coordinates, principal point at (width / 2, height / 2). Every function computes in
float32 (float64 if it is given float64) with autocast off, and multiplies small matrices by elementwise products, so that
neither bfloat16 nor TF32 ever touches a pose.
"""

from contextlib import AbstractContextManager, nullcontext

import torch


# Room axes (x right, y forward, z up) from the axes of a first camera that is held upright and level.
START_ROOM_FROM_CAM = ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, -1.0, 0.0))

# A field of view outside [MIN, pi - MIN] has no usable focal length; an untrained camera head gives exactly 0.
MIN_FOV_RAD = 0.01


def _no_autocast(tensor: torch.Tensor) -> AbstractContextManager:
    """Autocast off on the tensor's device; nothing to do where the device has none (meta)."""
    if tensor.device.type == "meta":
        return nullcontext()
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def _promote(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Bring all tensors to their common type, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _check_last(name: str, tensor: torch.Tensor, *wanted: tuple[int, ...]) -> None:
    """Raise unless the last axes have one of the wanted sizes."""
    if not any(tuple(tensor.shape[-len(sizes) :]) == sizes for sizes in wanted):
        sizes = " or ".join("(..., " + ", ".join(map(str, size)) + ")" for size in wanted)
        raise ValueError(f"{name}: wanted shape {sizes}; got {tuple(tensor.shape)}")


def _multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrix product of small matrices by elementwise products (no TF32, same result in any batch)."""
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def _rotate(rot: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """`(..., 3, 3)` times each of `(..., M, 3)`, column by column to keep memory at the size of the points."""
    columns = rot.unsqueeze(-3)
    return columns[..., 0] * points[..., 0:1] + columns[..., 1] * points[..., 1:2] + columns[..., 2] * points[..., 2:3]


# ---- rotations


def rotation_from_quat_xyzw(quat_xyzw: torch.Tensor) -> torch.Tensor:
    """Rotation matrix of a quaternion of any length.

    Args:
        quat_xyzw (`torch.Tensor` of shape `(..., 4)`): Quaternion, scalar last; need not be normalised.

    Returns:
        `torch.Tensor` of shape `(..., 3, 3)`: Rotation; the identity for a zero quaternion.

    Source:
        Upstream: facebookresearch/vggt rotation utilities (scalar last, division by the squared norm). Ours: the zero case,
        which an untrained camera head produces.
    """
    _check_last("quat_xyzw", quat_xyzw, (4,))
    with _no_autocast(quat_xyzw):
        (quat,) = _promote(quat_xyzw)
        x, y, z, w = quat.unbind(-1)
        two_over_norm = 2.0 / (quat * quat).sum(-1).clamp_min(torch.finfo(quat.dtype).tiny * 4)
        xx, yy, zz = x * x, y * y, z * z
        entries = (
            1 - two_over_norm * (yy + zz),
            two_over_norm * (x * y - z * w),
            two_over_norm * (x * z + y * w),
            two_over_norm * (x * y + z * w),
            1 - two_over_norm * (xx + zz),
            two_over_norm * (y * z - x * w),
            two_over_norm * (x * z - y * w),
            two_over_norm * (y * z + x * w),
            1 - two_over_norm * (xx + yy),
        )
        # nine times (...) -> (..., 9) -> (..., 3, 3)
        return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def quat_xyzw_from_rotation(rot: torch.Tensor) -> torch.Tensor:
    """Unit quaternion of a rotation matrix, with a non-negative scalar part.

    The products of the quaternion with each of its own components are linear in the matrix. The row of the largest component is
    taken, which is at least 1/2, so nothing is divided by a small number at any angle, half turns included.

    Args:
        rot (`torch.Tensor` of shape `(..., 3, 3)`): Rotation.

    Returns:
        `torch.Tensor` of shape `(..., 4)`: Quaternion, scalar last, `w >= 0`. At a half turn (`w = 0`) both signs are right.

    Source:
        Upstream: facebookresearch/vggt rotation utilities (convention: scalar last, w >= 0). Ours: body.
    """
    _check_last("rot", rot, (3, 3))
    with _no_autocast(rot):
        (rot,) = _promote(rot)
        (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = (row.unbind(-1) for row in rot.unbind(-2))
        # Row i holds 4 * q_i * (x, y, z, w).
        rows = (
            (1 + m00 - m11 - m22, m01 + m10, m02 + m20, m21 - m12),
            (m01 + m10, 1 - m00 + m11 - m22, m12 + m21, m02 - m20),
            (m02 + m20, m12 + m21, 1 - m00 - m11 + m22, m10 - m01),
            (m21 - m12, m02 - m20, m10 - m01, 1 + m00 + m11 + m22),
        )
        products = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
        squares = products.diagonal(dim1=-2, dim2=-1)
        # The four squares sum to 4 whatever the matrix is, so the largest is at least 1.
        best = squares.argmax(dim=-1, keepdim=True)
        row = torch.take_along_dim(products, best.unsqueeze(-1), dim=-2).squeeze(-2)
        quat = 0.5 * row / torch.take_along_dim(squares, best, dim=-1).sqrt()
        return torch.where(quat[..., 3:] < 0, -quat, quat)


def rotation_from_6d(x: torch.Tensor) -> torch.Tensor:
    """Rotation from two 3-vectors by Gram-Schmidt; the vectors are the first two ROWS.

    Args:
        x (`torch.Tensor` of shape `(..., 6)`): First row, then second row, neither normalised nor orthogonal.

    Returns:
        `torch.Tensor` of shape `(..., 3, 3)`: Always a proper rotation: a zero first vector counts as the x axis, a second one
        that is zero or parallel to the first is replaced by the axis farthest from the first.

    Source:
        Upstream: the continuous 6D representation (Zhou et al., CVPR 2019). Ours: rows, and the degenerate cases.
    """
    _check_last("x", x, (6,))
    with _no_autocast(x):
        (x,) = _promote(x)
        first, second = x[..., :3], x[..., 3:]
        # Axes made from the input's own shape, so that no constant travels to the device.
        zero, one = torch.zeros_like(first[..., 0]), torch.ones_like(first[..., 0])
        axes = [torch.stack([one if i == k else zero for i in range(3)], dim=-1) for k in range(3)]

        length = torch.linalg.vector_norm(first, dim=-1, keepdim=True)
        usable = length > 1e-12
        row0 = torch.where(usable, first / torch.where(usable, length, torch.ones_like(length)), axes[0])

        rest = second - (row0 * second).sum(-1, keepdim=True) * row0
        # Below this fraction of its length, the rest is rounding noise of a parallel vector.
        noise = 1e-6 * torch.linalg.vector_norm(second, dim=-1, keepdim=True)
        length = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
        usable = (length > noise) & (length > 1e-12)
        size = row0.abs()
        x_least = (size[..., 0:1] <= size[..., 1:2]) & (size[..., 0:1] <= size[..., 2:3])
        y_least = size[..., 1:2] <= size[..., 2:3]
        spare = torch.where(x_least, axes[0], torch.where(y_least, axes[1], axes[2]))
        spare = spare - (row0 * spare).sum(-1, keepdim=True) * row0
        rest = torch.where(usable, rest, spare)
        row1 = rest / torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
        # A second pass removes what rounding left of row 0 when the two vectors were nearly parallel.
        row1 = row1 - (row0 * row1).sum(-1, keepdim=True) * row0
        row1 = row1 / torch.linalg.vector_norm(row1, dim=-1, keepdim=True)
        row2 = torch.linalg.cross(row0, row1, dim=-1)
        return torch.stack((row0, row1, row2), dim=-2)


def rotation_angle_rad(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Geodesic angle between two rotations.

    Args:
        a (`torch.Tensor` of shape `(..., 3, 3)`): Rotation.
        b (`torch.Tensor` of shape `(..., 3, 3)`): Rotation; batch axes broadcast.

    Returns:
        `torch.Tensor` of shape `(...)`: Angle in radians, 0 to pi; its gradient is finite everywhere, 0 at the two ends.

    Source:
        Ours: atan2 of sine (skew part) and cosine (trace); arccos of the trace has an infinite gradient where training ends.
    """
    _check_last("a", a, (3, 3))
    _check_last("b", b, (3, 3))
    with _no_autocast(a):
        a, b = _promote(a, b)
        rel = _multiply(a.transpose(-1, -2), b)
        twice_axis = torch.stack(
            (rel[..., 2, 1] - rel[..., 1, 2], rel[..., 0, 2] - rel[..., 2, 0], rel[..., 1, 0] - rel[..., 0, 1]), dim=-1
        )
        twice_cos = rel.diagonal(dim1=-2, dim2=-1).sum(-1) - 1
        return torch.atan2(torch.linalg.vector_norm(twice_axis, dim=-1), twice_cos)


# ---- rigid transforms


def to_homogeneous(rot: torch.Tensor, translation: torch.Tensor) -> torch.Tensor:
    """Rotation and translation as one 4x4 matrix.

    Args:
        rot (`torch.Tensor` of shape `(..., 3, 3)`): Rotation `target_from_source`.
        translation (`torch.Tensor` of shape `(..., 3)`): Translation, target frame, any length unit.

    Returns:
        `torch.Tensor` of shape `(..., 4, 4)`: Matrix `target_from_source` with last row 0, 0, 0, 1.

    Source:
        Ours: the usual layout.
    """
    _check_last("rot", rot, (3, 3))
    _check_last("translation", translation, (3,))
    rot, translation = _promote(rot, translation)
    upper = torch.cat((rot, translation.unsqueeze(-1)), dim=-1)
    zeros = torch.zeros_like(upper[..., :1, :3])
    return torch.cat((upper, torch.cat((zeros, torch.ones_like(zeros[..., :1])), dim=-1)), dim=-2)


def invert_rigid(target_from_source: torch.Tensor) -> torch.Tensor:
    """Closed-form inverse of a rotation plus translation.

    Args:
        target_from_source (`torch.Tensor` of shape `(..., 4, 4)`): Rigid transform.

    Returns:
        `torch.Tensor` of shape `(..., 4, 4)`: `source_from_target`.

    Source:
        Ours: transpose instead of a solver, exact for rotations and cheap.
    """
    _check_last("target_from_source", target_from_source, (4, 4))
    with _no_autocast(target_from_source):
        (matrix,) = _promote(target_from_source)
        rot = matrix[..., :3, :3].transpose(-1, -2)
        return to_homogeneous(rot, -_rotate(rot, matrix[..., None, :3, 3]).squeeze(-2))


def reexpress_to_first_frame(cam_from_world: torch.Tensor) -> torch.Tensor:
    """Make the camera of the first frame the world frame.

    Args:
        cam_from_world (`torch.Tensor` of shape `(batch, frames, 4, 4)`): OpenCV axes, any world frame.

    Returns:
        `torch.Tensor` of shape `(batch, frames, 4, 4)`: The same cameras; frame 0 is exactly the identity.

    Source:
        Upstream: facebookresearch/vggt training targets (all cameras in the frame of camera 0). Ours: the identity is assigned,
        since a network predicts it only approximately.
    """
    _check_last("cam_from_world", cam_from_world, (4, 4))
    with _no_autocast(cam_from_world):
        (cam_from_world,) = _promote(cam_from_world)
        others = _multiply(cam_from_world[:, 1:], invert_rigid(cam_from_world[:, :1]))
        identity = torch.eye(4, dtype=cam_from_world.dtype, device=cam_from_world.device)
        return torch.cat((identity.expand(cam_from_world.shape[0], 1, 4, 4), others), dim=1)


def transform_points(target_from_source: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Carry points from one frame to another.

    Args:
        target_from_source (`torch.Tensor` of shape `(..., 3, 3)` or `(..., 4, 4)`): Rotation, or rigid transform.
        points (`torch.Tensor` of shape `(..., M, 3)`): Points, source frame; batch axes broadcast.

    Returns:
        `torch.Tensor` of shape `(..., M, 3)`: Points, target frame, same unit.

    Source:
        Ours: the usual formula.
    """
    _check_last("target_from_source", target_from_source, (3, 3), (4, 4))
    _check_last("points", points, (3,))
    with _no_autocast(points):
        matrix, points = _promote(target_from_source, points)
        rotated = _rotate(matrix[..., :3, :3], points)
        return rotated + matrix[..., None, :3, 3] if matrix.shape[-1] == 4 else rotated


# ---- cameras and pixels


def cameras_from_pose_encoding(
    pose_encoding: torch.Tensor, size_hw: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cameras of VGGT's nine numbers per frame.

    Args:
        pose_encoding (`torch.Tensor` of shape `(..., 9)`): Translation (3), quaternion xyzw (4, any length), field of view over
            the height, field of view over the width (radians).
        size_hw (`tuple[int, int]`): Image height and width in pixels.

    Returns:
        `tuple`: `cam_from_world` `(..., 4, 4)`, OpenCV axes, unit of the translation; `intrinsics_px` `(..., 3, 3)`, pixels of
        this image size, principal point exactly (width / 2, height / 2).

    Source:
        Upstream: facebookresearch/vggt pose encoding `absT_quaR_FoV`. Ours: fields of view are kept in
        `[MIN_FOV_RAD, pi - MIN_FOV_RAD]`, because an untrained head gives 0, an infinite focal length.
    """
    _check_last("pose_encoding", pose_encoding, (9,))
    with _no_autocast(pose_encoding):
        (pose_encoding,) = _promote(pose_encoding)
        cam_from_world = to_homogeneous(rotation_from_quat_xyzw(pose_encoding[..., 3:7]), pose_encoding[..., :3])
        height, width = size_hw
        fov = pose_encoding[..., 7:9].clamp(MIN_FOV_RAD, torch.pi - MIN_FOV_RAD)
        fy = (height / 2) / torch.tan(fov[..., 0] / 2)
        fx = (width / 2) / torch.tan(fov[..., 1] / 2)
        zero, one = torch.zeros_like(fx), torch.ones_like(fx)
        rows = ((fx, zero, one * (width / 2)), (zero, fy, one * (height / 2)), (zero, zero, one))
        return cam_from_world, torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def pose_encoding_from_cameras(
    cam_from_world: torch.Tensor, intrinsics_px: torch.Tensor, size_hw: tuple[int, int]
) -> torch.Tensor:
    """VGGT's nine numbers per frame of given cameras; the principal point is not represented.

    Args:
        cam_from_world (`torch.Tensor` of shape `(..., 4, 4)`): OpenCV axes, any unit.
        intrinsics_px (`torch.Tensor` of shape `(..., 3, 3)`): Pinhole, pixels of `size_hw`.
        size_hw (`tuple[int, int]`): Image height and width in pixels.

    Returns:
        `torch.Tensor` of shape `(..., 9)`: Translation, unit quaternion xyzw with w >= 0, fields of view over height and width
        (radians).

    Source:
        Upstream: facebookresearch/vggt pose encoding `absT_quaR_FoV`.
    """
    _check_last("cam_from_world", cam_from_world, (4, 4))
    _check_last("intrinsics_px", intrinsics_px, (3, 3))
    with _no_autocast(cam_from_world):
        cam_from_world, intrinsics_px = _promote(cam_from_world, intrinsics_px)
        height, width = size_hw
        fov_h = 2 * torch.atan((height / 2) / intrinsics_px[..., 1, 1])
        fov_w = 2 * torch.atan((width / 2) / intrinsics_px[..., 0, 0])
        quat = quat_xyzw_from_rotation(cam_from_world[..., :3, :3])
        return torch.cat((cam_from_world[..., :3, 3], quat, torch.stack((fov_h, fov_w), dim=-1)), dim=-1)


def unproject_depth(depth: torch.Tensor, intrinsics_px: torch.Tensor, cam_from_world: torch.Tensor) -> torch.Tensor:
    """Lift depth maps to world points.

    Args:
        depth (`torch.Tensor` of shape `(..., height, width)`): Depth along the optical axis, any unit. 0 marks invalid and gives
            the camera centre: mask it.
        intrinsics_px (`torch.Tensor` of shape `(..., 3, 3)`): Pinhole without skew, pixels of this image size.
        cam_from_world (`torch.Tensor` of shape `(..., 4, 4)`): OpenCV axes, translation in the unit of `depth`.

    Returns:
        `torch.Tensor` of shape `(..., height, width, 3)`: Points, world frame, unit of `depth`.

    Source:
        Paper: eq. 3. Upstream: facebookresearch/vggt (integer pixel coordinates, no half-pixel shift). Ours: written for
        camera-from-world; the paper's text and formula disagree on the frame.
    """
    _check_last("intrinsics_px", intrinsics_px, (3, 3))
    _check_last("cam_from_world", cam_from_world, (4, 4))
    with _no_autocast(depth):
        depth, intrinsics_px, cam_from_world = _promote(depth, intrinsics_px, cam_from_world)
        height, width = depth.shape[-2:]
        u = torch.arange(width, dtype=depth.dtype, device=depth.device)
        v = torch.arange(height, dtype=depth.dtype, device=depth.device).unsqueeze(-1)
        intrinsics = intrinsics_px[..., None, None, :, :]
        x = (u - intrinsics[..., 0, 2]) * depth / intrinsics[..., 0, 0]
        y = (v - intrinsics[..., 1, 2]) * depth / intrinsics[..., 1, 1]
        # (..., height, width, 3) -> (..., height * width, 3) -> (..., height, width, 3)
        points_cam = torch.stack((x, y, depth), dim=-1).flatten(-3, -2)
        rot, translation = cam_from_world[..., :3, :3], cam_from_world[..., None, :3, 3]
        return _rotate(rot.transpose(-1, -2), points_cam - translation).unflatten(-2, (height, width))


def project_points(
    points_world: torch.Tensor, intrinsics_px: torch.Tensor, cam_from_world: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project world points into images, the inverse of `unproject_depth`.

    Args:
        points_world (`torch.Tensor` of shape `(..., height, width, 3)` or `(..., M, 3)`): Points, world frame. The axes `...` are
            those of `cam_from_world`.
        intrinsics_px (`torch.Tensor` of shape `(..., 3, 3)`): Pinhole without skew, pixels.
        cam_from_world (`torch.Tensor` of shape `(..., 4, 4)`): OpenCV axes, unit of the points.

    Returns:
        `tuple`: pixels `(..., height, width, 2)` or `(..., M, 2)` as (x, y), integers at pixel centres; depth along the optical
        axis `(..., height, width)` or `(..., M)`, unit of the points. Pixels mean something only where depth is positive.

    Source:
        Ours: inverse of paper eq. 3.
    """
    _check_last("points_world", points_world, (3,))
    _check_last("intrinsics_px", intrinsics_px, (3, 3))
    _check_last("cam_from_world", cam_from_world, (4, 4))
    with _no_autocast(points_world):
        points_world, intrinsics_px, cam_from_world = _promote(points_world, intrinsics_px, cam_from_world)
        num_batch = cam_from_world.dim() - 2
        middle = points_world.shape[num_batch:-1]
        if not middle:
            raise ValueError(
                f"points_world: wanted the axes of cam_from_world {tuple(cam_from_world.shape)} without the last two, then at "
                f"least one axis of points, then 3; got {tuple(points_world.shape)}"
            )
        # (..., height, width, 3) -> (..., height * width, 3)
        points_cam = transform_points(cam_from_world, points_world.flatten(num_batch, -2))
        depth = points_cam[..., 2]
        tiny = torch.finfo(depth.dtype).eps
        safe_depth = torch.where(depth.abs() > tiny, depth, torch.full_like(depth, tiny))
        intrinsics = intrinsics_px.unsqueeze(-3)
        x = intrinsics[..., 0, 0] * points_cam[..., 0] / safe_depth + intrinsics[..., 0, 2]
        y = intrinsics[..., 1, 1] * points_cam[..., 1] / safe_depth + intrinsics[..., 1, 2]
        # (..., height * width, 2) -> (..., height, width, 2)
        return torch.stack((x, y), dim=-1).unflatten(-2, middle), depth.unflatten(-1, middle)


def resize_intrinsics(intrinsics_px: torch.Tensor, from_hw: tuple[int, int], to_hw: tuple[int, int]) -> torch.Tensor:
    """Intrinsics of a resized image: pixel x goes to x * to / from, for all pixels, the principal point too.

    Args:
        intrinsics_px (`torch.Tensor` of shape `(..., 3, 3)`): Pinhole, pixels of the image of size `from_hw`.
        from_hw (`tuple[int, int]`): Height and width before, pixels.
        to_hw (`tuple[int, int]`): Height and width after, pixels.

    Returns:
        `torch.Tensor` of shape `(..., 3, 3)`: Pinhole, pixels of the image of size `to_hw`.

    Source:
        Ours: the one rule that keeps VGGT's principal point (width / 2, height / 2) under any resize.
    """
    _check_last("intrinsics_px", intrinsics_px, (3, 3))
    (intrinsics,) = _promote(intrinsics_px)
    rows = (intrinsics[..., 0, :] * (to_hw[1] / from_hw[1]), intrinsics[..., 1, :] * (to_hw[0] / from_hw[0]))
    return torch.stack((*rows, intrinsics[..., 2, :]), dim=-2)


def crop_intrinsics(intrinsics_px: torch.Tensor, top: float, left: float) -> torch.Tensor:
    """Intrinsics of a cropped image: the offset of the crop is subtracted from the principal point.

    Args:
        intrinsics_px (`torch.Tensor` of shape `(..., 3, 3)`): Pinhole, pixels of the uncropped image.
        top (`float`): Rows cut off above, pixels.
        left (`float`): Columns cut off on the left, pixels.

    Returns:
        `torch.Tensor` of shape `(..., 3, 3)`: Pinhole, pixels of the cropped image.

    Source:
        Ours: the usual rule.
    """
    _check_last("intrinsics_px", intrinsics_px, (3, 3))
    (intrinsics,) = _promote(intrinsics_px)
    focal, centre = intrinsics[..., :2, :2], intrinsics[..., :2, 2]
    centre = torch.stack((centre[..., 0] - left, centre[..., 1] - top), dim=-1)
    return torch.cat((torch.cat((focal, centre.unsqueeze(-1)), dim=-1), intrinsics[..., 2:, :]), dim=-2)


# ---- room and annotation frames


def room_headings(annotation_from_world: torch.Tensor) -> torch.Tensor:
    """The four rotations that a room frame may have: the annotated axes and their quarter turns about z.

    Args:
        annotation_from_world (`torch.Tensor` of shape `(..., 4, 4)` or `(..., 3, 3)`): From the first camera to the dataset's
            axis-aligned scene frame, z up.

    Returns:
        `torch.Tensor` of shape `(..., 4, 3, 3)`: `room_from_world` candidates; entry k is turned by k * 90 degrees about z.

    Source:
        Ours: nothing in a picture tells which of the four walls is "north".
    """
    _check_last("annotation_from_world", annotation_from_world, (3, 3), (4, 4))
    (matrix,) = _promote(annotation_from_world)
    x, y, z = matrix[..., :3, :3].unbind(-2)
    # Turning by 90 degrees about z maps (x, y) to (-y, x).
    turns = ((x, y, z), (-y, x, z), (-x, -y, z), (y, -x, z))
    return torch.stack([torch.stack(rows, dim=-2) for rows in turns], dim=-3)


def nearest_heading(room_from_world: torch.Tensor, annotation_from_world: torch.Tensor) -> torch.Tensor:
    """Which of the four headings is nearest to a (predicted) room rotation.

    Args:
        room_from_world (`torch.Tensor` of shape `(..., 3, 3)`): Room rotation.
        annotation_from_world (`torch.Tensor` of shape `(..., 4, 4)` or `(..., 3, 3)`): As for `room_headings`.

    Returns:
        `torch.Tensor` of shape `(...)`, int64: Number of quarter turns, 0 to 3; the lowest on a tie.

    Source:
        Ours: smallest geodesic angle, which is the largest trace of the relative rotation.
    """
    _check_last("room_from_world", room_from_world, (3, 3))
    with _no_autocast(room_from_world):
        room, headings = _promote(room_from_world, room_headings(annotation_from_world))
        return (room.unsqueeze(-3) * headings).sum(dim=(-1, -2)).argmax(dim=-1)


def _turn_sizes(sizes: torch.Tensor, num_quarter_turns: torch.Tensor) -> torch.Tensor:
    """Swap dx and dy of `(..., M, 3)` where the number of quarter turns `(...)` is odd."""
    swapped = torch.stack((sizes[..., 1], sizes[..., 0], sizes[..., 2]), dim=-1)
    return torch.where((num_quarter_turns % 2 == 1)[..., None, None], swapped, sizes)


def boxes_room_from_annotation(
    boxes_annotation: torch.Tensor, annotation_from_world: torch.Tensor, room_from_world: torch.Tensor
) -> torch.Tensor:
    """Carry annotated boxes into the room frame: training targets, prompts and proposals.

    Centres are carried exactly. Sizes stay the annotated ones, swapped (dx, dy) for odd quarter turns of the heading nearest to
    `room_from_world`; boxes are never grown around turned corners.

    Args:
        boxes_annotation (`torch.Tensor` of shape `(batch, M, 6)`): (cx, cy, cz, dx, dy, dz), annotation frame, metres.
        annotation_from_world (`torch.Tensor` of shape `(batch, 4, 4)`): Rigid, from the first camera.
        room_from_world (`torch.Tensor` of shape `(batch, 3, 3)`): Room rotation; no gradient flows into it.

    Returns:
        `torch.Tensor` of shape `(batch, M, 6)`: The boxes, room frame (origin: first camera), metres.

    Source:
        Ours: a target must not teach the room head, and must not depend on small errors of its heading.
    """
    _check_last("boxes_annotation", boxes_annotation, (6,))
    _check_last("annotation_from_world", annotation_from_world, (4, 4))
    with _no_autocast(boxes_annotation):
        boxes, annotation_from_world, room_from_world = _promote(
            boxes_annotation, annotation_from_world, room_from_world.detach()
        )
        centres_world = transform_points(invert_rigid(annotation_from_world), boxes[..., :3])
        turns = nearest_heading(room_from_world, annotation_from_world)
        return torch.cat(
            (transform_points(room_from_world, centres_world), _turn_sizes(boxes[..., 3:], turns)), dim=-1
        )


def boxes_annotation_from_room(
    boxes_room: torch.Tensor, annotation_from_world: torch.Tensor, room_from_world: torch.Tensor
) -> torch.Tensor:
    """Carry predicted boxes into the annotation frame for scoring; the exact inverse of `boxes_room_from_annotation`.

    Args:
        boxes_room (`torch.Tensor` of shape `(batch, M, 6)`): (cx, cy, cz, dx, dy, dz), room frame, metres.
        annotation_from_world (`torch.Tensor` of shape `(batch, 4, 4)`): Rigid, from the first camera.
        room_from_world (`torch.Tensor` of shape `(batch, 3, 3)`): The room rotation that the prediction was made with.

    Returns:
        `torch.Tensor` of shape `(batch, M, 6)`: The boxes, annotation frame, metres. Nothing corrects the scale.

    Source:
        Ours: centre carried exactly, size swapped by the nearest quarter turn.
    """
    _check_last("boxes_room", boxes_room, (6,))
    _check_last("annotation_from_world", annotation_from_world, (4, 4))
    with _no_autocast(boxes_room):
        boxes, annotation_from_world, room_from_world = _promote(boxes_room, annotation_from_world, room_from_world)
        centres_world = transform_points(room_from_world.transpose(-1, -2), boxes[..., :3])
        turns = nearest_heading(room_from_world, annotation_from_world)
        return torch.cat(
            (transform_points(annotation_from_world, centres_world), _turn_sizes(boxes[..., 3:], turns)), dim=-1
        )


# ---- boxes


def box_corners(boxes: torch.Tensor) -> torch.Tensor:
    """The eight corners of axis-aligned boxes.

    Args:
        boxes (`torch.Tensor` of shape `(..., 6)`): (cx, cy, cz, dx, dy, dz), any frame and unit.

    Returns:
        `torch.Tensor` of shape `(..., 8, 3)`: Corners; bit 0 of the index is the side in x (0 low, 1 high), bit 1 in y, bit 2 in z.

    Source:
        Ours: order chosen so that corner i and corner 7 - i are opposite.
    """
    _check_last("boxes", boxes, (6,))
    (boxes,) = _promote(boxes)
    centre, half = boxes[..., :3], boxes[..., 3:] / 2
    low, high = centre - half, centre + half
    corners = [
        torch.stack([(high if i >> axis & 1 else low)[..., axis] for axis in range(3)], dim=-1) for i in range(8)
    ]
    return torch.stack(corners, dim=-2)


def _box_overlap(boxes_a: torch.Tensor, boxes_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """IoU `(...)`, centre offset `(..., 3)` and extent of the enclosing box `(..., 3)`."""
    size_a, size_b = boxes_a[..., 3:].clamp_min(0), boxes_b[..., 3:].clamp_min(0)
    offset = boxes_b[..., :3] - boxes_a[..., :3]
    # Relative to the centre of a, so that accuracy does not depend on where the boxes are.
    low_b, high_b = offset - size_b / 2, offset + size_b / 2
    shared = (torch.minimum(size_a / 2, high_b) - torch.maximum(-size_a / 2, low_b)).clamp_min(0)
    extent = torch.maximum(size_a / 2, high_b) - torch.minimum(-size_a / 2, low_b)
    # IoU does not change when an axis is scaled: with the extent as unit no product over- or underflows.
    unit = torch.where(extent > 0, extent, torch.ones_like(extent))
    shared, volume_a, volume_b = (shared / unit).prod(-1), (size_a / unit).prod(-1), (size_b / unit).prod(-1)
    union = volume_a + volume_b - shared
    is_solid = union > 0
    iou = torch.where(is_solid, shared / torch.where(is_solid, union, torch.ones_like(union)), torch.zeros_like(union))
    return iou, offset, extent


def box_iou(boxes_a: torch.Tensor, boxes_b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of axis-aligned boxes, element by element.

    Args:
        boxes_a (`torch.Tensor` of shape `(..., 6)`): (cx, cy, cz, dx, dy, dz); negative sizes count as 0.
        boxes_b (`torch.Tensor` of shape `(..., 6)`): As `boxes_a`, same frame and unit; batch axes broadcast.

    Returns:
        `torch.Tensor` of shape `(...)`: 0 to 1; 0 where both boxes are without volume.

    Source:
        Ours: the usual definition with safe denominators.
    """
    _check_last("boxes_a", boxes_a, (6,))
    _check_last("boxes_b", boxes_b, (6,))
    with _no_autocast(boxes_a):
        return _box_overlap(*_promote(boxes_a, boxes_b))[0]


def box_diou(boxes_a: torch.Tensor, boxes_b: torch.Tensor) -> torch.Tensor:
    """Distance IoU: IoU minus squared centre distance over squared diagonal of the enclosing box.

    Args:
        boxes_a (`torch.Tensor` of shape `(..., 6)`): (cx, cy, cz, dx, dy, dz); negative sizes count as 0.
        boxes_b (`torch.Tensor` of shape `(..., 6)`): As `boxes_a`, same frame and unit; batch axes broadcast.

    Returns:
        `torch.Tensor` of shape `(...)`: Above -1, 1 for equal boxes; differentiable, with finite gradients everywhere.

    Source:
        Upstream: Distance-IoU loss (Zheng et al., AAAI 2020), in three dimensions.
    """
    _check_last("boxes_a", boxes_a, (6,))
    _check_last("boxes_b", boxes_b, (6,))
    with _no_autocast(boxes_a):
        iou, offset, extent = _box_overlap(*_promote(boxes_a, boxes_b))
        largest = extent.amax(dim=-1, keepdim=True).detach()
        unit = torch.where(largest > 0, largest, torch.ones_like(largest))
        diagonal = (extent / unit).square().sum(-1)
        distance = (offset / unit).square().sum(-1)
        return iou - distance / torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal))


__all__ = [
    "MIN_FOV_RAD",
    "START_ROOM_FROM_CAM",
    "box_corners",
    "box_diou",
    "box_iou",
    "boxes_annotation_from_room",
    "boxes_room_from_annotation",
    "cameras_from_pose_encoding",
    "crop_intrinsics",
    "invert_rigid",
    "nearest_heading",
    "pose_encoding_from_cameras",
    "project_points",
    "quat_xyzw_from_rotation",
    "reexpress_to_first_frame",
    "resize_intrinsics",
    "room_headings",
    "rotation_angle_rad",
    "rotation_from_6d",
    "rotation_from_quat_xyzw",
    "to_homogeneous",
    "transform_points",
    "unproject_depth",
]
