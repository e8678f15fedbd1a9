"""True cameras and depth of a batch as the losses want them: who takes part, which pixels, in which unit.

Shapes: B videos, V videos (B, or 1: VGGT's own form takes a batch as one video), S frames, H W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vidllm.modeling_vidllm.geometry_vidllm import (
    pose_encoding_from_cameras,
    reexpress_to_first_frame,
    transform_points,
    unproject_depth,
)


# VGGT: bounds of a scene's scale, and what keeps its denominator from zero.
MIN_SCALE, MAX_SCALE, SCALE_EPS = 1e-6, 1e6, 1e-3


@dataclass(frozen=True)
class GeometryMasks:
    """Which videos, frames and pixels the terms are about; all bool.

    Args:
        valid_mask (`torch.Tensor` of shape `(B, S, H, W)`): Pixels of known depth.
        pixel_mask (`torch.Tensor` of shape `(V, S, H, W)`): Pixels that are no padding.
        camera_mask (`torch.Tensor` of shape `(V, S)`): Frames whose cameras are learned.
        depth_mask (`torch.Tensor` of shape `(V, S, H, W)`): Pixels whose depth is learned.
        points_mask (`torch.Tensor` of shape `(V, S, H, W)`): Pixels whose points are learned.
        camera (`torch.Tensor` of shape `(V,)`): Videos whose cameras are learned.
        depth (`torch.Tensor` of shape `(V,)`): Videos whose relative depth is learned.
        points (`torch.Tensor` of shape `(V,)`): Videos whose points are learned.
        metric (`torch.Tensor` of shape `(V,)`): Videos whose depth in metres is learned.

    Source:
        Ours.
    """

    valid_mask: torch.Tensor
    pixel_mask: torch.Tensor
    camera_mask: torch.Tensor
    depth_mask: torch.Tensor
    points_mask: torch.Tensor
    camera: torch.Tensor
    depth: torch.Tensor
    points: torch.Tensor
    metric: torch.Tensor


def as_one_video(values: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    """A batch as one long video.

    Args:
        values (`torch.Tensor` of shape `(B, S, ...)`): Of each video.
        wanted (`bool`): False leaves it as it is.

    Returns:
        `torch.Tensor` of shape `(1, B * S, ...)`.

    Source:
        Ours: whatever is done per video is then done over the batch, as VGGT does it.
    """
    return values.flatten(0, 1).unsqueeze(0) if wanted else values


def video_sizes(batch: Mapping[str, Any], shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Frames, height and width of each video without padding.

    Args:
        batch (`Mapping`): From `VidLLMCollator`.
        shape (`torch.Size`): B, S, H, W with padding.
        device (`torch.device`): Where the result goes.

    Returns:
        `torch.Tensor` of shape `(B, 3)`, int64.

    Source:
        Ours: without sizes nothing is padding.
    """
    sizes = batch.get("video_size_shw")
    if sizes is None:
        return torch.tensor([shape[1:]], device=device).expand(shape[0], -1)
    return sizes.to(device, non_blocking=True)


def geometry_masks(
    batch: Mapping[str, Any], min_first_frame_pixels: int, min_valid_pixels: int, normalise: bool, one_video: bool
) -> GeometryMasks | None:
    """Which videos, frames and pixels take part, from the batch alone; asks nothing of the device.

    Args:
        batch (`Mapping`): From `VidLLMCollator`.
        min_first_frame_pixels (`int`): Cameras are learned where the first frame has more valid pixels.
        min_valid_pixels (`int`): Depth and points are learned where there are at least so many.
        normalise (`bool`): Whether the true depth is divided by the scene's size, for which cameras must be known.
        one_video (`bool`): Take the batch as one video.

    Returns:
        [`GeometryMasks`], or None where the batch has no depth at all: then no term on geometry takes part, but the room's rotation.

    Source:
        Upstream: facebookresearch/vggt@105a198122c56055b6a2daf2419d691127590614 training/loss.py (the two limits).
    """
    targets = batch.get("targets", {})
    if "depth_m" not in targets:
        return None
    depth_m, has_camera = targets["depth_m"], targets["camera_mask"]
    sizes = video_sizes(batch, depth_m.shape, depth_m.device)
    inside = [torch.arange(n, device=sizes.device) < sizes[:, axis, None] for axis, n in enumerate(depth_m.shape[1:])]
    frames, rows, columns = inside
    pixels = frames[:, :, None, None] & rows[:, None, :, None] & columns[:, None, None, :]
    valid = (depth_m > 0) & torch.isfinite(depth_m) & pixels & targets["depth_mask"][:, None, None, None]
    camera = has_camera & (valid[:, 0].flatten(1).sum(1) > min_first_frame_pixels)
    camera_mask = as_one_video(frames & camera[:, None], one_video)
    every = as_one_video(valid, one_video)
    points_mask = as_one_video(valid & has_camera[:, None, None, None], one_video)
    depth_mask = points_mask if normalise else every
    return GeometryMasks(
        valid_mask=valid,
        pixel_mask=as_one_video(pixels, one_video),
        camera_mask=camera_mask,
        depth_mask=depth_mask,
        points_mask=points_mask,
        camera=camera_mask.any(1),
        depth=depth_mask.flatten(1).sum(1) >= min_valid_pixels,
        points=points_mask.flatten(1).sum(1) >= min_valid_pixels,
        metric=every.flatten(1).any(1),
    )


@torch.no_grad()
def true_geometry(
    targets: Mapping[str, torch.Tensor],
    valid_mask: torch.Tensor,
    size_hw: tuple[torch.Tensor, torch.Tensor],
    normalise: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the reconstruction should say.

    Args:
        targets (`Mapping`): `depth_m (B, S, H, W)`, `intrinsics_px (B, S, 3, 3)`, `cam_from_world (B, S, 4, 4)`; metres.
        valid_mask (`torch.Tensor` of shape `(B, S, H, W)`, bool): Pixels of known depth.
        size_hw (`tuple` of two `torch.Tensor` of shape `(B, 1)`): Height and width of each video without padding.
        normalise (`bool`): Whether lengths are divided by the scene's size.

    Returns:
        `tuple`: pose encodings `(B, S, 9)`, depth `(B, S, H, W)`, points `(B, S, H, W, 3)`; world = first camera; finite everywhere.

    Source:
        Upstream: facebookresearch/vggt training targets.
    """
    depth = torch.where(valid_mask, targets["depth_m"].float(), torch.zeros_like(targets["depth_m"]))
    poses, intrinsics = targets["cam_from_world"].float(), targets["intrinsics_px"].float()
    points = unproject_depth(depth, intrinsics, poses)
    poses, depth, points, _ = normalised_geometry(poses, depth, points, valid_mask, normalise)
    # sizes broadcast over the frames
    return pose_encoding_from_cameras(poses, intrinsics, size_hw), depth, points


def normalised_geometry(
    cam_from_world: torch.Tensor,
    depth: torch.Tensor,
    points_world: torch.Tensor,
    mask: torch.Tensor,
    normalise: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """True geometry as seen from the first camera, divided by the scene's size.

    Args:
        cam_from_world (`torch.Tensor` of shape `(B, S, 4, 4)`): Any world, any unit.
        depth (`torch.Tensor` of shape `(B, S, H, W)`): Along the optical axis, same unit.
        points_world (`torch.Tensor` of shape `(B, S, H, W, 3)`): Same world and unit.
        mask (`torch.Tensor` of shape `(B, S, H, W)`, bool): Valid pixels.
        normalise (`bool`): False leaves the unit as it is.

    Returns:
        `tuple`: cam_from_world `(B, S, 4, 4)`, depth `(B, S, H, W)` and points `(B, S, H, W, 3)`, world = first camera, divided by the scale;
        scale `(B,)`: mean distance of the valid points from the first camera, in the given unit, within 1e-6 to 1e6; 1 if not normalised.

    Source:
        Upstream: facebookresearch/vggt training normalisation (zhangqianqianhzlh/vggt@350fa2b4e8c24da5f68a97423cd83577ac4e34cf).
        Ours: `normalise=False`.
    """
    poses = reexpress_to_first_frame(cam_from_world)
    points = transform_points(cam_from_world[:, 0], points_world.flatten(1, 3)).view_as(points_world)
    if not normalise:
        return poses, depth, points, torch.ones_like(depth[:, 0, 0, 0])
    distance = torch.linalg.vector_norm(points, dim=-1)
    total = torch.where(mask, distance, torch.zeros_like(distance)).flatten(1).sum(1)
    scale = (total / (mask.flatten(1).sum(1) + SCALE_EPS)).clamp(MIN_SCALE, MAX_SCALE)
    translation = poses[..., :3, 3:] / scale[:, None, None, None]
    upper = torch.cat((poses[..., :3, :3], translation), dim=-1)
    poses = torch.cat((upper, poses[..., 3:, :]), dim=-2)
    return poses, depth / scale[:, None, None, None], points / scale[:, None, None, None, None], scale


__all__ = ["GeometryMasks", "as_one_video", "geometry_masks", "normalised_geometry", "true_geometry", "video_sizes"]
