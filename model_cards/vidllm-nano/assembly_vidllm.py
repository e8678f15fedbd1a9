"""From raw network outputs and given geometry to a reconstruction in one frame and one unit.

Everything here is float32, without gradient, and happens once per group of videos of equal size.
Shapes: B videos, S frames, H W pixels.
"""

import contextlib

import torch

from .configuration_vidllm import VidLLMConfig
from .geometry_vidllm import cameras_from_pose_encoding, reexpress_to_first_frame, unproject_depth
from .metric_depth_vidllm import align_scale, spread_frames
from .ragged_vidllm import ragged_masks
from .reconstruction_vidllm import VidLLMRawReconstruction
from .scene_vidllm import VidLLMReconstruction


GIVEN_PARTS = {"cam_from_world": 4, "intrinsics_px": 4, "depth_m": 4, "room_from_world": 3, "mask": 1}
# Below this spread (metres) the given camera centres say nothing about scale.
MIN_BASELINE_M = 0.1


def check_given_geometry(geometry: dict, video_size_shw: torch.Tensor) -> dict:
    """Check the geometry that a caller gives, naming the frame that is wrong.

    Args:
        geometry (`dict`): Any subset of `cam_from_world (B, S, 4, 4)`, `intrinsics_px (B, S, 3, 3)`, `depth_m (B, S, H, W)`,
            `room_from_world (B, 3, 3)`, and `mask (B,)` bool (False: this video's entries are ignored). Metres; the world of the poses
            is arbitrary; `room_from_world` refers to the camera of the first sampled frame.
        video_size_shw (`torch.Tensor` of shape `(B, 3)`, int64): Frames, height and width of each video.

    Returns:
        `dict`: the same parts as float32 (mask: bool).

    Raises:
        ValueError: Unknown part, wrong shape, a pose that is no rigid transform, a focal length that is not positive, depth that is
            negative or not finite.

    Source:
        Ours: a wrong pose would silently move the whole room.
    """
    if not isinstance(geometry, dict):
        raise ValueError(f"geometry: wanted a dict of given parts; got {type(geometry).__name__}")
    unknown = sorted(set(geometry) - set(GIVEN_PARTS))
    if unknown:
        raise ValueError(f"geometry: wanted parts among {', '.join(GIVEN_PARTS)}; got {', '.join(unknown)}")
    batch = video_size_shw.shape[0]
    num_frames, height, width = video_size_shw.max(dim=0).values.tolist()
    shapes = {
        "cam_from_world": (batch, num_frames, 4, 4),
        "intrinsics_px": (batch, num_frames, 3, 3),
        "depth_m": (batch, num_frames, height, width),
        "room_from_world": (batch, 3, 3),
        "mask": (batch,),
    }
    checked = {}
    for name, value in geometry.items():
        if value is None:
            continue
        value = torch.as_tensor(value)
        if tuple(value.shape) != shapes[name]:
            raise ValueError(f"geometry[{name!r}]: wanted shape {shapes[name]}; got {tuple(value.shape)}")
        checked[name] = value.bool() if name == "mask" else value.float()
    keep = checked.get("mask", torch.ones(batch, dtype=torch.bool))
    # rounded to bfloat16, a good rotation looks bad
    devices = {value.device.type for value in checked.values()} or {"cpu"}
    with contextlib.ExitStack() as exact:
        for device in sorted(devices):
            exact.enter_context(torch.autocast(device_type=device, enabled=False))
        if not _all_fine(checked, keep, video_size_shw):
            _raise_problem(checked, keep.cpu(), video_size_shw)
    return checked


def _raise_problem(checked: dict, keep: torch.Tensor, video_size_shw: torch.Tensor) -> None:
    """Find the first given value that is wrong, and name its video and frame."""
    for row in range(len(keep)):
        if not keep[row]:
            continue
        frames, rows, columns = video_size_shw[row].tolist()
        for name in ("cam_from_world", "intrinsics_px", "depth_m"):
            if name not in checked:
                continue
            for frame in range(frames):
                value = checked[name][row, frame]
                problem = {
                    "cam_from_world": _pose_problem,
                    "intrinsics_px": _intrinsics_problem,
                    "depth_m": lambda depth, rows=rows, columns=columns: _depth_problem(depth[:rows, :columns]),
                }[name](value)
                if problem:
                    raise ValueError(f"geometry[{name!r}]: video {row}, frame {frame}: {problem}")
        if "room_from_world" in checked and (problem := _rotation_problem(checked["room_from_world"][row])):
            raise ValueError(f"geometry['room_from_world']: video {row}: {problem}")


def _all_fine(checked: dict, keep: torch.Tensor, video_size_shw: torch.Tensor) -> bool:
    """Whether no given value has a problem: all frames at once, with one answer to the host; what is wrong is found frame by frame."""
    frame_mask, pixel_mask = ragged_masks(video_size_shw)
    fine = []
    for name, value in checked.items():
        if name == "mask":
            continue
        if name == "depth_m":
            good, counts = torch.isfinite(value) & (value >= 0), pixel_mask
        elif name == "intrinsics_px":
            good = torch.isfinite(value).all(-1).all(-1) & (value[..., 0, 0] > 0) & (value[..., 1, 1] > 0)
            counts = frame_mask
        else:
            rotation = value[..., :3, :3]
            eye = torch.eye(3, device=value.device)
            off = (rotation @ rotation.transpose(-1, -2) - eye).abs().amax((-2, -1))
            good = torch.isfinite(value).all(-1).all(-1) & (off <= 1e-3)
            # the sign of the determinant, as a triple product: exact where the rows are almost orthonormal
            triple = (torch.linalg.cross(rotation[..., 0, :], rotation[..., 1, :]) * rotation[..., 2, :]).sum(-1)
            good &= triple > 0
            counts = frame_mask
            if name == "room_from_world":
                counts = torch.ones(len(value), dtype=torch.bool)
            else:
                last_row = torch.tensor([0.0, 0.0, 0.0, 1.0], device=value.device)
                good &= (value[..., 3, :] - last_row).abs().amax(-1) <= 1e-5
        counts = counts.to(value.device) & keep.to(value.device).view(-1, *[1] * (counts.ndim - 1))
        fine.append((good | ~counts).all())
    return bool(torch.stack(fine).all()) if fine else True


def _rotation_problem(rotation: torch.Tensor) -> str | None:
    """Why a `(3, 3)` matrix is no rotation, or None."""
    if not torch.isfinite(rotation).all():
        return "wanted a rotation; got values that are not finite"
    off = (rotation @ rotation.T - torch.eye(3, device=rotation.device)).abs().max().item()
    determinant = torch.linalg.det(rotation).item()
    if off > 1e-3 or determinant < 0:
        return f"wanted a rotation; got R R^T off the identity by {off:.3g}, determinant {determinant:.3g}"
    return None


def _pose_problem(pose: torch.Tensor) -> str | None:
    """Why a `(4, 4)` matrix is no rigid transform, or None."""
    if not torch.isfinite(pose).all():
        return "wanted a rigid transform; got values that are not finite"
    if (pose[3] - torch.tensor([0.0, 0.0, 0.0, 1.0], device=pose.device)).abs().max() > 1e-5:
        return f"wanted a last row of 0 0 0 1; got {pose[3].tolist()}"
    return _rotation_problem(pose[:3, :3])


def _intrinsics_problem(intrinsics: torch.Tensor) -> str | None:
    """Why a `(3, 3)` matrix is no pinhole camera, or None."""
    if not torch.isfinite(intrinsics).all():
        return "wanted a pinhole matrix; got values that are not finite"
    if not (intrinsics[0, 0] > 0 and intrinsics[1, 1] > 0):
        return f"wanted positive focal lengths; got {intrinsics[0, 0].item():.4g}, {intrinsics[1, 1].item():.4g}"
    return None


def _depth_problem(depth: torch.Tensor) -> str | None:
    """Why a `(H, W)` map is no depth map, or None."""
    if not torch.isfinite(depth).all():
        return "wanted finite depth with 0 where it is unknown; got values that are not finite"
    return f"wanted depth >= 0; got {depth.min().item():.4g}" if depth.min() < 0 else None


def _centre_spread(cam_from_world: torch.Tensor) -> torch.Tensor:
    """Root mean square distance of the camera centres from their mean: `(B, S, 4, 4)` -> `(B,)`."""
    rotation, translation = cam_from_world[..., :3, :3], cam_from_world[..., :3, 3]
    centres = -(rotation.transpose(-1, -2) @ translation[..., None]).squeeze(-1)
    return (centres - centres.mean(dim=1, keepdim=True)).square().sum(-1).mean(-1).sqrt()


def _row_median(values: torch.Tensor) -> torch.Tensor:
    """Lower median of the positive finite values of each row: `(B, ...)` -> `(B,)`; 1 where a row has none."""
    medians = []
    for row in values.flatten(1):
        row = row[torch.isfinite(row) & (row > 0)]
        medians.append(row.median() if row.numel() else torch.ones((), device=values.device))
    return torch.stack(medians)


@torch.no_grad()
def assemble_reconstruction(
    raw: VidLLMRawReconstruction,
    metric_depth_m: torch.Tensor | None,
    config: VidLLMConfig,
    geometry: dict | None = None,
    scale_frames: torch.Tensor | None = None,
    metric: bool | None = None,
) -> VidLLMReconstruction:
    """Bring one group of equally sized videos into the world frame and, where possible, into metres.

    Args:
        raw (`VidLLMRawReconstruction`): Network outputs of the group; relative units.
        metric_depth_m (`torch.Tensor` of shape `(B, S, H, W)`, *optional*): Metric head's depth, metres.
        config (`VidLLMConfig`): Read for `is_metric`, `use_metric_depth`, `use_scale_alignment`, `num_scale_frames`.
        geometry (`dict`, *optional*): Checked parts from [`check_given_geometry`], rows of this group.
        scale_frames (`torch.Tensor` of shape `(B, K)`, int64, *optional*): Frames that vote for the scale, -1 = unused; by default
            `num_scale_frames` spread evenly.
        metric (`bool`, *optional*): False leaves the geometry relative, True demands metres, None takes what there is.

    Returns:
        `VidLLMReconstruction`: without masks.

    Raises:
        ValueError: `metric` is True for weights that were not trained for metres and no given part provides them.

    Source:
        Paper: section 3.2 (scale by weighted least squares, median over frames, applied to depth and translation). Ours: what is given
        is used as it is and sets the scale of the rest; without alignment the metric head's depth is used and translations take the
        ratio of median depths.
    """
    with torch.autocast(device_type=raw.depth_relative.device.type, enabled=False):
        return _assemble(raw, metric_depth_m, config, dict(geometry or {}), scale_frames, metric)


def _assemble(
    raw: VidLLMRawReconstruction,
    metric_depth_m: torch.Tensor | None,
    config: VidLLMConfig,
    geometry: dict,
    scale_frames: torch.Tensor | None,
    metric: bool | None,
) -> VidLLMReconstruction:
    """`assemble_reconstruction`, in full precision."""
    # float() hands float32 tensors through, graph and all: detach first
    depth, confidence = raw.depth_relative.detach().float(), raw.depth_confidence.detach().float()
    depth_relative = depth
    batch, num_frames, height, width = depth.shape
    device = depth.device
    cam_from_world, intrinsics_px = cameras_from_pose_encoding(
        raw.pose_encodings[:, -1].detach().float(), (height, width)
    )
    cam_from_world = reexpress_to_first_frame(cam_from_world)
    room_from_world = raw.room_from_world.detach().float()

    used = geometry.pop("mask", torch.ones(batch, dtype=torch.bool)).to(device)
    given = {name: value.to(device) for name, value in geometry.items()}
    never = torch.zeros_like(used)
    has_depth = used if "depth_m" in given else never
    has_poses = used if "cam_from_world" in given else never
    if scale_frames is None:
        chosen = spread_frames(num_frames, config.num_scale_frames)
        scale_frames = torch.tensor(chosen, device=device)[None].expand(batch, -1)
    scale_frames = scale_frames.to(device)

    # 1. the scale that the weights alone give
    scale = torch.ones(batch, device=device)
    translation_scale = scale
    scale_valid_mask = torch.ones(batch, dtype=torch.bool, device=device)
    trained_for_metres = config.is_metric and metric is not False
    if trained_for_metres and config.use_metric_depth:
        if config.use_scale_alignment:
            scale, scale_valid_mask = align_scale(depth, metric_depth_m.float(), confidence, scale_frames, None)
            depth = depth * scale[:, None, None, None]
        else:
            scale = _row_median(metric_depth_m) / _row_median(depth)
            depth = metric_depth_m.detach().float()
        translation_scale = scale
    metric_mask = torch.full((batch,), trained_for_metres, device=device)
    if trained_for_metres and config.use_scale_alignment:
        metric_mask = metric_mask & scale_valid_mask

    # 2. what is given sets the scale of the rest: depth first, else poses with a baseline
    by_depth = never
    if has_depth.any():
        against_given, found = align_scale(depth_relative, given["depth_m"], confidence, scale_frames, None)
        # given depth without a usable pixel says nothing about scale: what the weights or the poses say stands
        by_depth = has_depth & found
        scale = torch.where(by_depth, against_given, scale)
        translation_scale = torch.where(by_depth, against_given, translation_scale)
        scale_valid_mask = torch.where(has_depth, found | metric_mask, scale_valid_mask)
    has_baseline = never
    if has_poses.any():
        given_poses = reexpress_to_first_frame(given["cam_from_world"])
        given_spread = _centre_spread(given_poses)
        predicted_spread = _centre_spread(cam_from_world)
        has_baseline = has_poses & (given_spread > MIN_BASELINE_M)
        by_poses = has_baseline & ~by_depth
        measurable = predicted_spread > 1e-6
        from_poses = torch.where(measurable, given_spread / predicted_spread.clamp_min(1e-6), torch.ones_like(scale))
        from_poses = torch.where(measurable, from_poses, scale)
        rescale = torch.where(by_poses, from_poses / scale, torch.ones_like(scale))
        depth = depth * rescale[:, None, None, None]
        scale = torch.where(by_poses, from_poses, scale)
        scale_valid_mask = torch.where(by_poses, measurable, scale_valid_mask)
    translation = cam_from_world[..., :3, 3] * translation_scale[:, None, None]
    cam_from_world = torch.cat(
        [torch.cat([cam_from_world[..., :3, :3], translation[..., None]], dim=-1), cam_from_world[..., 3:, :]], dim=-2
    )

    # 3. given values replace predicted ones
    if "depth_m" in given:
        choose = has_depth[:, None, None, None]
        depth = torch.where(choose, given["depth_m"], depth)
        confidence = torch.where(choose, torch.ones_like(confidence), confidence)
    if "cam_from_world" in given:
        cam_from_world = torch.where(
            has_poses[:, None, None, None], given_poses if has_poses.any() else 0, cam_from_world
        )
    if "intrinsics_px" in given:
        intrinsics_px = torch.where(used[:, None, None, None], given["intrinsics_px"], intrinsics_px)
    if "room_from_world" in given:
        room_from_world = torch.where(used[:, None, None], given["room_from_world"], room_from_world)
    metric_mask = metric_mask | by_depth | (has_baseline & scale_valid_mask)
    if metric is True and not metric_mask.all():
        raise ValueError(
            "reconstruct(metric=True): wanted metres, but these weights were not trained for them (config.is_metric is "
            f"{config.is_metric}) and no usable given depth or poses provide them for video {int((~metric_mask).nonzero()[0])}; "
            "use metric=None for relative geometry"
        )
    return VidLLMReconstruction(
        cam_from_world=cam_from_world,
        intrinsics_px=intrinsics_px,
        depth=depth,
        depth_confidence=confidence,
        points_world=unproject_depth(depth, intrinsics_px, cam_from_world),
        scale=scale,
        scale_valid_mask=scale_valid_mask,
        room_from_world=room_from_world,
        metric_mask=metric_mask,
        video_size_shw=torch.tensor([[num_frames, height, width]], device=device).repeat(batch, 1),
    )
