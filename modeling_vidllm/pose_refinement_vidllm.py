"""Camera poses made exact against the pictures: each frame's depth is laid into the other frames until they look alike.

Nothing here is learned. The network says where the cameras stood to within what patches can tell; the pixels between them say the rest.
Direct image alignment (Lucas-Kanade over rigid motions) of all frames at once, from small pictures to larger ones; on request, depth bends with
the poses, as smoothly as a coarse grid of factors per frame allows, and one focal factor of the video is found with both.

Shapes: B videos, S frames, H W pixels, h w pixels of a smaller picture, N = h w, Q ordered pairs of frames (source, target), G points of the
grid of depth, P = 6 (S - 1) numbers of the poses of a video, E = 1 where a focal factor is sought and 0 elsewhere.
"""

import copy
import math

import torch
from torch import nn

from .configuration_vidllm import VidLLMConfig
from .geometry_vidllm import invert_rigid, unproject_depth
from .scene_vidllm import VidLLMReconstruction


# A point that lies this much deeper than what its target frame shows there is hidden in it.
_HIDDEN = 0.15
# Damping of Gauss-Newton: a share of the diagonal, and what keeps it solvable where nothing is seen.
_DAMPING, _FLOOR = 1e-3, 1e-4
# Longest turn (radians) and way (median depths) of one step.
_LONGEST = 0.06
# Pairs that are worked on at a time.
_CHUNK = 64
# Depth is off by about so much (natural logarithm), and neighbours on the grid by so much from each other.
_DEPTH_SPREAD, _DEPTH_BEND = 0.15, 0.1
# Largest change of depth, and of the focal length, in one step (natural logarithm).
_DEEPEST = 0.1
# Of the pixels that a pair shared before, how many it must share afterwards.
_KEPT_OVERLAP = 0.5


@torch.no_grad()
def refine_poses(
    frames: torch.Tensor,
    depth: torch.Tensor,
    intrinsics_px: torch.Tensor,
    cam_from_world: torch.Tensor,
    sizes: tuple[int, ...] | list[int] = (12, 24),
    steps: int = 8,
    window: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Improve predicted poses of videos of one size; depth and intrinsics stay as they are.

    Args:
        frames (`torch.Tensor` of shape `(B, S, 3, H, W)`): Pictures, in any affine scale of intensity.
        depth (`torch.Tensor` of shape `(B, S, H, W)`): Along the optical axis, any unit; 0 or not finite: unknown.
        intrinsics_px (`torch.Tensor` of shape `(B, S, 3, 3)`): Pinhole.
        cam_from_world (`torch.Tensor` of shape `(B, S, 4, 4)`): To start from; the unit of depth. The first frame of each video stays.
        sizes (`tuple[int]`): Short sides of the smaller pictures, coarse to fine.
        steps (`int`): Gauss-Newton steps at each.
        window (`int`): Frames further apart than this are not compared.

    Returns:
        `tuple`: `torch.Tensor` of shape `(B, S, 4, 4)`, float32: poses; `torch.Tensor` of shape `(B,)`, bool: videos whose poses changed. A video
        keeps its poses where frames do not look more alike afterwards, where they lose half of what they share, or where it has one frame.

    Raises:
        ValueError: A size, the number of steps or the window is not positive.

    Source:
        Ours: the network's poses come from patches of 16 pixels and more. Direct alignment after Baker and Matthews, "Lucas-Kanade 20 years
        on", with Cauchy weights; VGGT's authors offer bundle adjustment on tracked points in this place.
    """
    _check_settings(sizes, steps, window)
    start = cam_from_world.float()
    never = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    if start.shape[1] < 2:
        return start, never
    with torch.autocast(device_type=start.device.type, enabled=False):
        depth = depth.float()
        depth = torch.where(torch.isfinite(depth) & (depth > 0), depth, torch.zeros_like(depth))
        unit = _median_depth(depth)
        in_units = _moved(start, 1 / unit)
        pairs, poses = _pairs(start.shape[1], window, start.device), in_units
        for size in sizes:
            view = _View(frames.float(), depth / unit[:, None, None, None], intrinsics_px.float(), size)
            for _ in range(steps):
                poses = _step(view, poses, pairs)
        better = _looks_better(view, in_units, view, poses, pairs)
        return torch.where(better[:, None, None, None], _moved(poses, unit), start), better


@torch.no_grad()
def refine_poses_and_depth(
    frames: torch.Tensor,
    depth: torch.Tensor,
    intrinsics_px: torch.Tensor,
    cam_from_world: torch.Tensor,
    grid: tuple[int, int] | list[int],
    sizes: tuple[int, ...] | list[int] = (12, 24),
    steps: int = 8,
    window: int = 8,
    focal_spread: float = 0.0,
    depth_per_focal: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Improve predicted poses and predicted depth together, and on request the focal length.

    Args:
        frames (`torch.Tensor` of shape `(B, S, 3, H, W)`): See `refine_poses` for it and what follows.
        depth (`torch.Tensor` of shape `(B, S, H, W)`): Along the optical axis, any unit; 0 or not finite: unknown, which it stays.
        intrinsics_px (`torch.Tensor` of shape `(B, S, 3, 3)`): Pinhole.
        cam_from_world (`torch.Tensor` of shape `(B, S, 4, 4)`): To start from.
        grid (`tuple[int, int]`): Rows and columns, at least 2 each, of the factors by which the depth of a frame is multiplied; between them
            their logarithms are interpolated linearly.
        sizes (`tuple[int]`): Short sides of the smaller pictures, coarse to fine.
        steps (`int`): Gauss-Newton steps at each.
        window (`int`): Frames further apart than this are not compared.
        focal_spread (`float`): By about so much (natural logarithm) focal lengths are off, all of a video by one factor, which is found too. 0: intrinsics
            stay as they are.
        depth_per_focal (`float`): The power of that factor by which depth and ways are multiplied, which no picture tells: 1 for a network that knows
            distances by the sizes of things, 0 for one whose distances do not hang on the focal length.

    Returns:
        `tuple`: poses `(B, S, 4, 4)`, float32; depth `(B, S, H, W)`, float32; intrinsics `(B, S, 3, 3)`, float32; which videos changed `(B,)`, bool. A video
        keeps all of them in the cases in which `refine_poses` keeps its poses.

    Raises:
        ValueError: A size, the number of steps, the window, the grid, the spread or the power is out of range.

    Source:
        Ours: as `refine_poses`; the factors are eliminated frame by frame (Schur complement), so that a step costs little more than one of
        poses alone. They are drawn to 1 and to their neighbours', because pictures say nothing where they are flat; so is the focal factor.
    """
    if len(grid) != 2 or min(grid) < 2:
        raise ValueError(f"depth refinement: wanted a grid of at least 2 rows and 2 columns; got {list(grid)}")
    _check_settings(sizes, steps, window)
    if not (0 <= focal_spread < math.inf and 0 <= depth_per_focal < math.inf):
        raise ValueError(
            f"focal refinement: wanted a spread and a power of at least 0; got {focal_spread}, {depth_per_focal}"
        )
    start, exact_depth, intrinsics_px = cam_from_world.float(), depth.float(), intrinsics_px.float()
    batch, num_frames = start.shape[:2]
    if num_frames < 2:
        return start, exact_depth, intrinsics_px, torch.zeros(batch, dtype=torch.bool, device=start.device)
    with torch.autocast(device_type=start.device.type, enabled=False):
        known = torch.isfinite(exact_depth) & (exact_depth > 0)
        depth = torch.where(known, exact_depth, torch.zeros_like(exact_depth))
        unit = _median_depth(depth)
        in_units = _moved(start, 1 / unit)
        pairs, poses = _pairs(num_frames, window, start.device), in_units
        field, zoom = start.new_zeros(batch, num_frames, grid[0] * grid[1]), start.new_zeros(batch)
        prior = _prior(grid, start.device)
        for size in sizes:
            view = _View(frames.float(), depth / unit[:, None, None, None], intrinsics_px, size)
            weights = _weights(grid, view.hw, start.device)
            for _ in range(steps):
                seen = view.bent(field @ weights.T).zoomed(zoom)
                poses, field, zoom = _joint_step(seen, poses, pairs, field, weights, prior, zoom, focal_spread)
        better = _looks_better(view, in_units, view.bent(field @ weights.T).zoomed(zoom), poses, pairs)
        better &= torch.isfinite(field).flatten(1).all(1) & torch.isfinite(zoom)
        # (B, S, G) -> (B, S, H, W)
        factors = (field @ _weights(grid, depth.shape[-2:], start.device).T).exp().unflatten(-1, depth.shape[-2:])
        larger = (zoom * depth_per_focal).exp()
        changed = better[:, None, None, None]
        return (
            torch.where(changed, _moved(poses, unit * larger), start),
            torch.where(changed & known, depth * (factors * larger[:, None, None, None]), exact_depth),
            torch.where(changed, _zoomed_intrinsics(intrinsics_px, zoom), intrinsics_px),
            better,
        )


def _zoomed_intrinsics(intrinsics_px: torch.Tensor, zoom: torch.Tensor) -> torch.Tensor:
    """Intrinsics `(B, S, 3, 3)` with focal lengths times `exp(zoom (B,))`."""
    zoomed = intrinsics_px.clone()
    zoomed[..., :2, :2] *= zoom.exp()[:, None, None, None]
    return zoomed


def _check_settings(sizes: tuple[int, ...] | list[int], steps: int, window: int) -> None:
    """`ValueError` unless all of them are positive and there is a size."""
    if not sizes or min(sizes) < 1 or steps < 1 or window < 1:
        raise ValueError(
            f"pose refinement: wanted positive sizes, steps and window; got {list(sizes)}, {steps}, {window}"
        )


def refine_reconstruction(
    recon: VidLLMReconstruction, frames: torch.Tensor, geometry: dict | None, config: VidLLMConfig
) -> None:
    """Make what a network predicts exact against the pictures, in place; what was given stays as it is, and a focal length beside given poses or depth.

    Args:
        recon (`VidLLMReconstruction`): Of B videos of one size; its `cam_from_world` `(B, S, 4, 4)`, `intrinsics_px` `(B, S, 3, 3)`, `depth`
            `(B, S, H, W)`, `points_world` `(B, S, H, W, 3)` and `scale` `(B,)` are replaced. A unit is kept but for the power of a focal factor that
            `pose_refinement_depth_per_focal` says.
        frames (`torch.Tensor` of shape `(B, S, 3, H, W)`): Pictures, in any affine scale of intensity.
        geometry (`dict`, *optional*): What was given, see `check_given_geometry`.
        config (`VidLLMConfig`): Its `pose_refinement_...` fields are read.

    Source:
        Ours.
    """
    rows = torch.arange(recon.num_scenes, device=frames.device)
    given = geometry or {}
    of_given = given["mask"].to(frames.device) if "mask" in given else torch.ones_like(rows, dtype=torch.bool)
    if "cam_from_world" in given:
        rows = rows[~of_given]
    bends = torch.full_like(of_given, bool(config.pose_refinement_depth_grid))
    if "depth_m" in given:
        bends = bends & ~of_given
    zooms = bends & (config.pose_refinement_focal_spread > 0)
    if "intrinsics_px" in given:
        zooms = zooms & ~of_given
    settings = (config.pose_refinement_sizes, config.pose_refinement_steps, config.pose_refinement_window)
    for with_depth, with_focal in ((False, False), (True, False), (True, True)):
        chosen = rows[(bends[rows] == with_depth) & (zooms[rows] == with_focal)]
        if not len(chosen):
            continue
        depth, intrinsics_px, poses = recon.depth[chosen], recon.intrinsics_px[chosen], recon.cam_from_world[chosen]
        before = intrinsics_px
        if with_depth:
            grid = config.pose_refinement_depth_grid
            focal = (config.pose_refinement_focal_spread, config.pose_refinement_depth_per_focal) if with_focal else ()
            poses, depth, intrinsics_px, _ = refine_poses_and_depth(
                frames[chosen], depth, intrinsics_px, poses, grid, *settings, *focal
            )
        else:
            poses, _ = refine_poses(frames[chosen], depth, intrinsics_px, poses, *settings)
        with torch.no_grad(), torch.autocast(device_type=frames.device.type, enabled=False):
            points = unproject_depth(depth, intrinsics_px, poses)
            recon.cam_from_world = recon.cam_from_world.index_copy(0, chosen, poses)
            recon.points_world = recon.points_world.index_copy(0, chosen, points)
            if with_depth:
                recon.depth = recon.depth.index_copy(0, chosen, depth.to(recon.depth.dtype))
            if with_focal:
                longer = intrinsics_px[:, 0, 0, 0] / before[:, 0, 0, 0]
                scale = recon.scale[chosen] * longer**config.pose_refinement_depth_per_focal
                recon.scale = recon.scale.index_copy(0, chosen, scale.to(recon.scale.dtype))
                recon.intrinsics_px = recon.intrinsics_px.index_copy(
                    0, chosen, intrinsics_px.to(recon.intrinsics_px.dtype)
                )


class _View:
    """Pictures of a smaller size with what belongs to their pixels, and one way to look from frame to frame.

    Args:
        frames (`torch.Tensor` of shape `(B, S, 3, H, W)`): Pictures.
        depth (`torch.Tensor` of shape `(B, S, H, W)`): In median depths; 0 = unknown.
        intrinsics_px (`torch.Tensor` of shape `(B, S, 3, 3)`): Pinhole.
        size (`int`): Short side wanted; larger than the pictures' own: theirs.
    """

    def __init__(self, frames: torch.Tensor, depth: torch.Tensor, intrinsics_px: torch.Tensor, size: int):
        batch, num_frames, _, height, width = frames.shape
        shrink = min(1.0, size / min(height, width))
        self.hw = (max(2, round(height * shrink)), max(2, round(width * shrink)))
        small = nn.functional.interpolate(frames.flatten(0, 1), self.hw, mode="area")
        # A mean over an edge would be a depth that nothing has.
        near = nn.functional.interpolate(depth.flatten(0, 1)[:, None], self.hw, mode="nearest-exact")
        self.depth = near.unflatten(0, (batch, num_frames))  # (B, S, 1, h, w)
        slope_x = nn.functional.pad((small[..., 2:] - small[..., :-2]) / 2, (1, 1))
        slope_y = nn.functional.pad((small[..., 2:, :] - small[..., :-2, :]) / 2, (0, 0, 1, 1))
        # colours, their slopes along x, their slopes along y: (B, S, 9, h, w)
        self.maps = torch.cat([small, slope_x, slope_y], dim=1).unflatten(0, (batch, num_frames))
        ratio = torch.tensor([self.hw[1] / width, self.hw[0] / height], device=frames.device)
        self.focal = torch.stack([intrinsics_px[..., 0, 0], intrinsics_px[..., 1, 1]], -1) * ratio  # (B, S, 2)
        self.centre = (intrinsics_px[..., :2, 2] + 0.5) * ratio - 0.5
        rows, columns = (torch.arange(n, device=frames.device, dtype=torch.float32) for n in self.hw)
        pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy")).flatten(1)  # (2, N)
        z = self.depth.flatten(3)  # (B, S, 1, N)
        rays = (pixels - self.centre[..., None]) / self.focal[..., None]
        self.points = torch.cat([rays * z, z], 2)  # (B, S, 3, N), each in its own camera
        self.known = z[:, :, 0] > 0

    def bent(self, log_factors: torch.Tensor) -> "_View":
        """The same pictures with depth `(B, S, N)` times `exp(log_factors)`."""
        view, factors = copy.copy(self), log_factors.exp()
        view.depth = self.depth * factors.unflatten(-1, self.hw)[:, :, None]
        view.points = self.points * factors[:, :, None]
        return view

    def zoomed(self, zoom: torch.Tensor) -> "_View":
        """The same pictures, taken with focal lengths times `exp(zoom (B,))`; depth stays."""
        view, factor = copy.copy(self), zoom.exp()
        view.focal = self.focal * factor[:, None, None]
        narrower = torch.stack([1 / factor, 1 / factor, torch.ones_like(factor)], -1)
        view.points = self.points * narrower[:, None, :, None]
        return view

    def look(self, target_from_source: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> tuple:
        """Lay source pixels into target frames.

        Args:
            target_from_source (`torch.Tensor` of shape `(B, Q, 4, 4)`): Of each pair.
            source (`torch.Tensor` of shape `(Q,)`, int64): Frames.
            target (`torch.Tensor` of shape `(Q,)`, int64): Frames.

        Returns:
            `tuple`: differences of colour `(B, Q, 3, N)`, free of a common offset; whether a pixel is seen `(B, Q, N)`; slopes of the target's colours there
            along x and y `(B, Q, 2, 3, N)`; points in the target's camera `(B, Q, 3, N)`.
        """
        points = target_from_source[..., :3, :3] @ self.points[:, source] + target_from_source[..., :3, 3:]
        z = points[:, :, 2]
        places = points[:, :, :2] / z[:, :, None].clamp_min(1e-3) * self.focal[:, target][..., None]
        places = places + self.centre[:, target][..., None]
        sides = torch.tensor([[self.hw[1]], [self.hw[0]]], device=points.device)
        grid = ((places + 0.5) / sides * 2 - 1).transpose(-1, -2)
        looked = nn.functional.grid_sample(
            torch.cat([self.maps, self.depth], 2)[:, target].flatten(0, 1),
            grid.flatten(0, 1)[:, None],
            padding_mode="border",
            align_corners=False,
        )[:, :, 0].unflatten(0, points.shape[:2])  # (B, Q, 10, N)
        inside = ((places >= 0) & (places <= sides - 1)).all(2) & (z > 1e-3)
        there = looked[:, :, 9]
        seen = inside & self.known[:, source] & (there > 0) & (z < there * (1 + _HIDDEN))
        apart = looked[:, :, :3] - self.maps[:, source, :3].flatten(3)
        count = seen.sum(-1)[..., None, None].clamp_min(1)
        # Exposure may differ from frame to frame; what is wrong by much is no matter of exposure.
        usual = (apart.abs() * seen[:, :, None]).sum(-1, keepdim=True) / count
        offset = (apart.clamp(-usual, usual) * seen[:, :, None]).sum(-1, keepdim=True) / count
        return apart - offset, seen, looked[:, :, 3:9].unflatten(2, (2, 3)), points


def _pairs(num_frames: int, window: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and target frames of all ordered pairs not further apart than the window, each `(Q,)`, int64."""
    frame = torch.arange(num_frames, device=device)
    gap = (frame[:, None] - frame[None]).abs()
    source, target = ((gap > 0) & (gap <= window)).nonzero().unbind(1)
    return source, target


def _median_depth(depth: torch.Tensor) -> torch.Tensor:
    """Of the known pixels of each video, `(B, S, H, W)` -> `(B,)`; 1 where none is known."""
    medians = torch.where(depth > 0, depth, torch.full_like(depth, float("nan"))).flatten(1).nanmedian(1).values
    return torch.where(torch.isfinite(medians), medians, torch.ones_like(medians))


def _moved(poses: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Poses `(B, S, 4, 4)` in another unit of length, `factor (B,)` times the old numbers."""
    scaled = poses.clone()
    scaled[..., :3, 3] *= factor[:, None, None]
    return scaled


def _cross(vectors: torch.Tensor) -> torch.Tensor:
    """`(..., 3)` -> `(..., 3, 3)`: the matrix that takes the cross product with a vector from the left."""
    zero = torch.zeros_like(vectors[..., 0])
    x, y, z = vectors.unbind(-1)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))


def _rigid(change: torch.Tensor) -> torch.Tensor:
    """A turn (axis times angle) and then a way, `(..., 6)` -> `(..., 4, 4)`."""
    turned = torch.linalg.matrix_exp(_cross(change[..., :3]))
    top = torch.cat([turned, change[..., 3:, None]], -1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., 3] = 1
    return torch.cat([top, bottom], -2)


def _carried(target_from_source: torch.Tensor) -> torch.Tensor:
    """How a small motion of the source's camera moves the target's points: `(..., 4, 4)` -> `(..., 6, 6)`, the adjoint."""
    rotation, way = target_from_source[..., :3, :3], target_from_source[..., :3, 3]
    upper = torch.cat([rotation, torch.zeros_like(rotation)], -1)
    return torch.cat([upper, torch.cat([_cross(way) @ rotation, rotation], -1)], -2)


def _step(view: _View, poses: torch.Tensor, pairs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """One Gauss-Newton step of all poses of each video but the first, `(B, S, 4, 4)` -> the same."""
    inverse, system = invert_rigid(poses), _PoseSystem(poses)
    for source, target in zip(pairs[0].split(_CHUNK), pairs[1].split(_CHUNK), strict=True):
        relative = poses[:, target] @ inverse[:, source]
        apart, seen, slopes, points = view.look(relative, source, target)
        length = apart.square().sum(2).sqrt()
        usual = (length * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
        weight = (seen / (1 + (length / usual.clamp_min(1e-6)).square())).sqrt()[:, :, None]
        rows = _by_motion(slopes * weight[:, :, None], view.focal[:, target], points)
        system.add(rows, apart * weight, -_carried(relative), source, target)
    square, slope = system.damped()
    return _stepped(poses, -torch.linalg.solve_ex(square, slope)[0])


def _stepped(poses: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Poses after a change `(B, P, 1)` of all but the first of each video, none of them too long."""
    change = change[..., 0].nan_to_num().clamp(-_LONGEST, _LONGEST).unflatten(1, (poses.shape[1] - 1, 6))
    return torch.cat([poses[:, :1], _rigid(change) @ poses[:, 1:]], 1)


class _PoseSystem:
    """Normal equations of the poses of videos `(B, S, 4, 4)`, gathered pair by pair."""

    def __init__(self, poses: torch.Tensor):
        batch, self.num_frames = poses.shape[:2]
        self.hessian = poses.new_zeros(batch, self.num_frames * self.num_frames, 6, 6)
        self.slope = poses.new_zeros(batch, self.num_frames, 6)

    def add(
        self, rows: torch.Tensor, errors: torch.Tensor, back: torch.Tensor, source: torch.Tensor, target: torch.Tensor
    ) -> None:
        """Derivatives `(B, Q, 6, 3, N)` by the target's motion, errors `(B, Q, 3, N)`; `back (B, Q, 6, 6)` tells the source's motion as the target's."""
        rows, errors = rows.flatten(3), errors.flatten(2)[..., None]
        of_target = rows @ rows.transpose(-1, -2)  # (B, Q, 6, 6)
        pull = (rows @ errors)[..., 0]
        across, frames = of_target @ back, self.num_frames
        self.hessian.index_add_(1, target * frames + target, of_target)
        self.hessian.index_add_(1, target * frames + source, across)
        self.hessian.index_add_(1, source * frames + target, across.transpose(-1, -2))
        self.hessian.index_add_(1, source * frames + source, back.transpose(-1, -2) @ across)
        self.slope.index_add_(1, target, pull)
        self.slope.index_add_(1, source, (back.transpose(-1, -2) @ pull[..., None])[..., 0])

    def damped(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, P, P)` and `(B, P, 1)`; the first camera is the world and has no part."""
        # (B, S * S, 6, 6) -> (B, S - 1, S - 1, 6, 6) -> (B, P, P)
        square = self.hessian.unflatten(1, (self.num_frames, self.num_frames))[:, 1:, 1:]
        square = square.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        diagonal = square.diagonal(dim1=1, dim2=2)
        return square + torch.diag_embed(diagonal * _DAMPING + _FLOOR), self.slope[:, 1:].flatten(1)[..., None]


def _weights(
    grid: tuple[int, int] | list[int], hw: tuple[int, int] | torch.Size, device: torch.device
) -> torch.Tensor:
    """How much of each point of the grid is in each pixel, `(h w, G)`: linear, the grid's corners on the picture's."""
    points = torch.eye(grid[0] * grid[1], device=device).unflatten(1, tuple(grid))[:, None]
    return nn.functional.interpolate(points, tuple(hw), mode="bilinear", align_corners=True).flatten(1).T


def _prior(grid: tuple[int, int] | list[int], device: torch.device) -> torch.Tensor:
    """How unlikely factors are before any picture is seen: `(G, G)`, positive definite."""
    number = torch.arange(grid[0] * grid[1], device=device).view(*grid)
    one = torch.cat([number[:, 1:].flatten(), number[1:].flatten()])
    other = torch.cat([number[:, :-1].flatten(), number[:-1].flatten()])
    every = torch.eye(number.numel(), device=device)
    unlike = every[one] - every[other]
    return unlike.T @ unlike / _DEPTH_BEND**2 + every / _DEPTH_SPREAD**2


def _joint_step(
    view: _View,
    poses: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor],
    field: torch.Tensor,
    weights: torch.Tensor,
    prior: torch.Tensor,
    zoom: torch.Tensor,
    focal_spread: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One Gauss-Newton step of poses `(B, S, 4, 4)`, logarithms of depth factors `(B, S, G)` and of focal factors `(B,)`; the view has the latter two."""
    batch, num_frames = poses.shape[:2]
    inverse, system = invert_rigid(poses), _PoseSystem(poses)
    sought = 1 if focal_spread > 0 else 0
    stiffness, push = (poses.new_zeros(batch, num_frames, view.known.shape[-1]) for _ in range(2))
    mixed = poses.new_zeros(batch, num_frames * num_frames, 6, field.shape[-1])
    depth_and_focal = poses.new_zeros(batch, num_frames, view.known.shape[-1], sought)
    pose_and_focal = poses.new_zeros(batch, num_frames, 6, sought)
    # what the focal factor's own prior says
    of_focal = poses.new_full((batch, sought, sought), 1 / focal_spread**2 if sought else 0.0)
    pull_of_focal = of_focal.sum(-1, keepdim=True) * zoom[:, None, None]  # (B, E, 1)
    for source, target in zip(pairs[0].split(_CHUNK), pairs[1].split(_CHUNK), strict=True):
        relative = poses[:, target] @ inverse[:, source]
        apart, seen, slopes, points = view.look(relative, source, target)
        length = apart.square().sum(2).sqrt()
        usual = (length * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
        usual = usual.clamp_min(1e-6)
        # In units of what is usual for the pair, so that pictures and prior can be compared.
        weight = ((seen / (1 + (length / usual).square())).sqrt() / usual)[:, :, None]
        slopes = slopes * weight[:, :, None]
        by_pose = _by_motion(slopes, view.focal[:, target], points)  # (B, Q, 6, 3, N)
        # A point that lies deeper by a factor moves away from the source's camera.
        ray = (points - relative[..., :3, 3:])[:, :, :, None]
        by_depth = (by_pose[:, :, 3:] * ray).sum(2)  # (B, Q, 3, N)
        errors, back = apart * weight, -_carried(relative)
        system.add(by_pose, errors, back, source, target)
        stiffness.index_add_(1, source, by_depth.square().sum(2))
        push.index_add_(1, source, (by_depth * errors).sum(2))
        both = (by_pose * by_depth[:, :, None]).sum(3) @ weights  # (B, Q, 6, N) -> (B, Q, 6, G)
        mixed.index_add_(1, source * num_frames + target, both)
        mixed.index_add_(1, source * num_frames + source, back.transpose(-1, -2) @ both)
        if sought:
            by_focal = _by_focal(view, slopes, by_pose, points, relative, source, target)  # (B, Q, 3, N)
            depth_and_focal.index_add_(1, source, (by_depth * by_focal).sum(2)[..., None])
            both = (by_pose * by_focal[:, :, None]).sum((3, 4))[..., None]  # (B, Q, 6, 1)
            pose_and_focal.index_add_(1, target, both)
            pose_and_focal.index_add_(1, source, back.transpose(-1, -2) @ both)
            of_focal = of_focal + by_focal.square().sum((1, 2, 3))[:, None, None]
            pull_of_focal = pull_of_focal + (by_focal * errors).sum((1, 2, 3))[:, None, None]
    # (B, S * S, 6, G) -> (B, S, G, P + E): whose depth, then whose pose, then the focal factor
    mixed = mixed.unflatten(1, (num_frames, num_frames)).flatten(2, 3).transpose(2, 3)[..., 6:]
    mixed = torch.cat([mixed, weights.T @ depth_and_focal], -1)
    own = weights.T @ (stiffness[..., None] * weights) + prior
    own = own + torch.diag_embed(own.diagonal(dim1=2, dim2=3) * _DAMPING + _FLOOR)
    slope = (push @ weights + field @ prior)[..., None]
    solved = torch.linalg.solve_ex(own, torch.cat([mixed, slope], -1))[0]  # (B, S, G, P + E + 1)
    eliminated = (mixed.transpose(-1, -2) @ solved).sum(1)  # (B, P + E, P + E + 1)
    square, pull = system.damped()
    across = pose_and_focal[:, 1:].flatten(1, 2)  # (B, P, E)
    own_focal = of_focal * (1 + _DAMPING) + _FLOOR
    square = torch.cat([torch.cat([square, across], -1), torch.cat([across.transpose(-1, -2), own_focal], -1)], -2)
    pull = torch.cat([pull, pull_of_focal], -2)
    change = -torch.linalg.solve_ex(square - eliminated[..., :-1], pull - eliminated[..., -1:])[0]
    deeper = -(solved[..., -1:] + solved[..., :-1] @ change[:, None])[..., 0]
    longer = change[:, -1, 0].nan_to_num().clamp(-_DEEPEST, _DEEPEST) if sought else 0.0
    return (
        _stepped(poses, change[:, : change.shape[1] - sought]),
        field + deeper.nan_to_num().clamp(-_DEEPEST, _DEEPEST),
        zoom + longer,
    )


def _by_focal(
    view: _View,
    slopes: torch.Tensor,
    by_pose: torch.Tensor,
    points: torch.Tensor,
    target_from_source: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """How the colours under pixels change as both cameras' focal lengths grow by a factor: `(B, Q, 3, N)`.

    The target draws a point farther from its centre; the source had seen it nearer to its axis. Slopes `(B, Q, 2, 3, N)`, `by_pose` `(B, Q, 6, 3, N)`,
    points in the target's camera `(B, Q, 3, N)`, motions `(B, Q, 4, 4)`.
    """
    outward = points[:, :, :2] / points[:, :, 2:].clamp_min(1e-3) * view.focal[:, target][..., None]
    inward = target_from_source[..., :3, :2] @ view.points[:, source, :2]
    return (slopes * outward[:, :, :, None]).sum(2) - (by_pose[:, :, 3:] * inward[:, :, :, None]).sum(2)


def _by_motion(slopes: torch.Tensor, focal: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """How the colours under pixels change as their camera's points move.

    Slopes of the colours `(B, Q, 2, 3, N)`, focal lengths `(B, Q, 2)`, points `(B, Q, 3, N)` -> `(B, Q, 6, 3, N)`: by turn, by way.
    """
    x, y, z = points[:, :, :, None].unbind(2)  # (B, Q, 1, N)
    z = z.clamp_min(1e-3)
    by_x = slopes[:, :, 0] * (focal[:, :, 0, None, None] / z)
    by_y = slopes[:, :, 1] * (focal[:, :, 1, None, None] / z)
    by_z = -(by_x * x + by_y * y) / z
    return torch.stack([y * by_z - z * by_y, z * by_x - x * by_z, x * by_y - y * by_x, by_x, by_y, by_z], 2)


def _looks_better(
    view: _View,
    start: torch.Tensor,
    changed_view: _View,
    poses: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Of which videos the frames look more alike afterwards and still share half of what they shared, `(B,)` bool."""
    scale, shared_before, before = _unlikeness(view, start, pairs)
    _, shared_after, after = _unlikeness(changed_view, poses, pairs, scale)
    better = torch.isfinite(poses).flatten(1).all(1) & (after < before)
    return better & (shared_after > _KEPT_OVERLAP * shared_before)


def _unlikeness(
    view: _View,
    poses: torch.Tensor,
    pairs: tuple[torch.Tensor, torch.Tensor],
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How unlike frames look, by the scale of each pair `(B, Q)` (by default their own): scale, pixels shared `(B,)`, mean cost `(B,)`."""
    inverse, lengths, seens = invert_rigid(poses), [], []
    for source, target in zip(pairs[0].split(_CHUNK), pairs[1].split(_CHUNK), strict=True):
        apart, seen, _, _ = view.look(poses[:, target] @ inverse[:, source], source, target)
        lengths.append(apart.square().sum(2).sqrt())
        seens.append(seen)
    length, seen = torch.cat(lengths, 1), torch.cat(seens, 1)
    if scale is None:
        scale = (length * seen).sum(-1) / seen.sum(-1).clamp_min(1)
    cost = (length / scale[..., None].clamp_min(1e-6)).square().log1p() * seen
    shared = seen.sum((1, 2))
    return scale, shared, cost.sum((1, 2)) / shared.clamp_min(1)


__all__ = ["refine_poses", "refine_poses_and_depth", "refine_reconstruction"]
