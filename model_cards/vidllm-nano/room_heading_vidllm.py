"""The heading of the room frame, read off the walls of the reconstruction: most rooms have walls at right angles.

Which way is up, pictures tell a network well; which of all headings the walls have, a few frames hardly do, and the points it gives do.

Shapes: B videos, S frames, H W pixels, M normals of a video.
"""

import torch
from torch import nn

from .scene_vidllm import VidLLMReconstruction


# Short side of the map of points whose normals are taken: finer ones are noise.
_SHORT_SIDE = 48
# Of all normals' say, the share that must agree on a heading. None in common leaves about 1 / sqrt(M), far below.
_LEAST_AGREEMENT = 0.05


@torch.no_grad()
def turn_to_walls(
    room_from_world: torch.Tensor, points_world: torch.Tensor, valid_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn room frames about their z axis, by 45 degrees at most, until walls stand along x and y.

    Args:
        room_from_world (`torch.Tensor` of shape `(B, 3, 3)`): Rotations whose z axis is up.
        points_world (`torch.Tensor` of shape `(B, S, H, W, 3)`): What each pixel sees, any unit.
        valid_mask (`torch.Tensor` of shape `(B, S, H, W)`, bool): Pixels whose points are known.

    Returns:
        `tuple`: rotations `(B, 3, 3)`, float32; the share of all normals that agree on the heading `(B,)`, 0..1: 1 where every surface is a wall along x
        or y. Below 0.05 a room keeps its heading.

    Source:
        Ours: after the Manhattan-world assumption (Coughlan and Yuille, "Manhattan World", ICCV 1999). A heading counts modulo a quarter turn, so
        that the normals' angles are multiplied by four and averaged on the circle; upright ones count most.
    """
    rotation = room_from_world.float()
    with torch.autocast(device_type=rotation.device.type, enabled=False):
        valid = valid_mask & torch.isfinite(points_world).all(dim=-1)
        points = torch.where(
            valid[..., None], points_world.float(), torch.zeros_like(points_world, dtype=torch.float32)
        )
        maps = torch.cat([points, valid[..., None].float()], dim=-1).flatten(0, 1).permute(0, 3, 1, 2)
        shrink = min(1.0, _SHORT_SIDE / min(maps.shape[-2:]))
        hw = [max(1, round(side * shrink)) for side in maps.shape[-2:]]
        if min(hw) < 3:
            return rotation, rotation.new_zeros(len(rotation))
        maps = nn.functional.interpolate(maps, hw, mode="area")
        points, whole = maps[:, :3], maps[:, 3] > 0.999
        across = points[..., 1:-1, 2:] - points[..., 1:-1, :-2]
        down = points[..., 2:, 1:-1] - points[..., :-2, 1:-1]
        known = whole[..., 1:-1, 2:] & whole[..., 1:-1, :-2] & whole[..., 2:, 1:-1] & whole[..., :-2, 1:-1]
        normals = nn.functional.normalize(torch.cross(across, down, dim=1), dim=1)
        # (B * S, 3, h, w) -> (B, M, 3)
        normals = normals.permute(0, 2, 3, 1).reshape(len(rotation), -1, 3) @ rotation.transpose(-1, -2)
        upright = (1 - normals[..., 2].square()).clamp_min(0).square() * known.reshape(len(rotation), -1)
        fourfold = torch.atan2(normals[..., 1], normals[..., 0]) * 4
        total = upright.sum(1).clamp_min(1e-6)
        east, north = (upright * fourfold.cos()).sum(1) / total, (upright * fourfold.sin()).sum(1) / total
        agreement = torch.hypot(east, north)
        turn = torch.where(agreement < _LEAST_AGREEMENT, torch.zeros_like(east), -torch.atan2(north, east) / 4)
        return _about_z(turn) @ rotation, agreement


def _about_z(angle: torch.Tensor) -> torch.Tensor:
    """Rotations `(B, 3, 3)` about z by angles `(B,)`, radians."""
    turned = torch.zeros(len(angle), 3, 3, device=angle.device)
    turned[:, 0, 0] = turned[:, 1, 1] = angle.cos()
    turned[:, 1, 0] = angle.sin()
    turned[:, 0, 1] = -angle.sin()
    turned[:, 2, 2] = 1
    return turned


def align_room(recon: VidLLMReconstruction, geometry: dict | None) -> None:
    """Turn the room frames of a reconstruction to its walls, in place; those that were given stay as they are.

    Args:
        recon (`VidLLMReconstruction`): Of B videos of one size; its `room_from_world` `(B, 3, 3)` is replaced.
        geometry (`dict`, *optional*): What was given, see `check_given_geometry`.

    Source:
        Ours.
    """
    turned, _ = turn_to_walls(recon.room_from_world, recon.points_world, recon.depth > 0)
    if geometry and "room_from_world" in geometry:
        if "mask" not in geometry:
            return
        kept = geometry["mask"].to(turned.device)[:, None, None]
        turned = torch.where(kept, recon.room_from_world.float(), turned)
    recon.room_from_world = turned


__all__ = ["align_room", "turn_to_walls"]
