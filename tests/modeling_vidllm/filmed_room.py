"""A room that is known everywhere, filmed by cameras whose poses are known: for what aligns pictures."""

import math

import torch

from vidllm.modeling_vidllm import pose_refinement_vidllm as refinement
from vidllm.modeling_vidllm.geometry_vidllm import invert_rigid, rotation_angle_rad


H, W = 48, 66
SIZES = (12, 24, 48)


def colour_at(points):
    """A smooth pattern in space, `(..., 3)` -> `(..., 3)`."""
    waves = torch.tensor([[2.1, 0.7, 1.1], [-0.8, 2.6, 0.5], [1.3, -1.9, 2.2]])
    coarse = torch.sin(points @ waves.T * 1.7 + torch.tensor([0.3, 1.2, 2.0]))
    fine = torch.sin(points.roll(1, -1) @ waves.T * 4.3)
    return 0.5 + 0.3 * coarse + 0.1 * fine


def filmed(cam_from_world, intrinsics_px):
    """A room with a wall straight ahead, one on the right and a floor, seen from `(S, 4, 4)`: frames `(S, 3, H, W)`, depth `(S, H, W)`."""
    rows, columns = torch.arange(H).float(), torch.arange(W).float()
    pixels = torch.stack([*torch.meshgrid(columns, rows, indexing="xy"), torch.ones(H, W)], -1)
    rays = pixels @ torch.linalg.inv(intrinsics_px).transpose(-1, -2)[:, None]  # (S, H, W, 3)
    world_from_cam = invert_rigid(cam_from_world)
    towards = rays @ world_from_cam[:, None, :3, :3].transpose(-1, -2)
    origin = world_from_cam[:, None, None, :3, 3]
    depth = torch.full(rays.shape[:-1], math.inf)
    for normal, distance in (([0.1, 0.0, 1.0], 3.0), ([1.0, 0.0, 0.2], 1.9), ([0.0, 1.0, 0.0], 1.3)):
        normal = torch.tensor(normal)
        along = (distance - (origin * normal).sum(-1)) / (towards * normal).sum(-1)
        depth = torch.where((along > 0.05) & (along < depth), along, depth)
    points = origin + towards * depth[..., None]
    return colour_at(points).permute(0, 3, 1, 2), depth


def motion(*numbers):
    return refinement._rigid(torch.tensor(numbers))


def away(poses, true):
    """Mean angle (degrees) and way between poses and true ones, but for the first frame."""
    angle = torch.rad2deg(rotation_angle_rad(poses[..., :3, :3], true[..., :3, :3]))[..., 1:].mean()
    return float(angle), float((poses - true)[..., 1:, :3, 3].norm(dim=-1).mean())


def filmed_scene():
    """Two videos of three frames: what is predicted of them, poses some degrees and centimetres off; true poses."""
    intrinsics = torch.tensor([[60.0, 0, 31.0], [0, 62.0, 24.5], [0, 0, 1]]).expand(2, 3, 3, 3).clone()
    true = torch.stack(
        [
            torch.stack(
                [torch.eye(4), motion(0.02, 0.12, 0.0, 0.2, 0.02, -0.05), motion(-0.03, 0.2, 0.02, 0.35, 0.0, 0.1)]
            ),
            torch.stack(
                [torch.eye(4), motion(0.0, -0.15, 0.03, -0.1, 0.1, 0.1), motion(0.1, -0.2, 0.0, 0.1, 0.15, 0.3)]
            ),
        ]
    )
    errors = torch.stack([motion(0.03, -0.05, 0.02, 0.12, -0.08, 0.06), motion(-0.04, 0.05, -0.02, -0.1, 0.1, 0.05)])
    start = torch.cat([true[:, :1], errors @ true[:, 1:]], 1)
    made = [filmed(poses, k) for poses, k in zip(true, intrinsics, strict=True)]
    frames, depth = (torch.stack([parts[n] for parts in made]) for n in range(2))
    return {"frames": frames, "depth": depth, "intrinsics_px": intrinsics, "cam_from_world": start}, true
