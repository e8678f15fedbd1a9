"""Losses of stage 1, pure: what the adapter's two streams should have in common with two teachers.

Shapes: F frames, P patches of the student's grid, C student width, Cg and Cl teacher widths, M = 2 P tokens of both streams of a frame.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


# Features shorter than this have no direction; as `torch.nn.functional.normalize` has it.
_SHORTEST = 1e-12


def resized_to_grid(features: torch.Tensor, grid_hw: tuple[int, int], wanted_hw: tuple[int, int]) -> torch.Tensor:
    """A map of features on another grid of patches.

    Args:
        features (`torch.Tensor` of shape `(F, h * w, C)`): Row by row.
        grid_hw (`tuple[int, int]`): Their rows and columns.
        wanted_hw (`tuple[int, int]`): Rows and columns wanted.

    Returns:
        `torch.Tensor` of shape `(F, wanted rows * wanted columns, C)`: bilinear, antialiased where it shrinks; the same tensor if nothing changes.

    Raises:
        ValueError: The features do not fill their grid.

    Source:
        Ours: the paper does not say how grids of unlike teachers meet.
    """
    if features.shape[1] != grid_hw[0] * grid_hw[1]:
        raise ValueError(f"teacher: wanted {grid_hw[0]} x {grid_hw[1]} patches; got {features.shape[1]}")
    if tuple(grid_hw) == tuple(wanted_hw):
        return features
    maps = features.transpose(1, 2).unflatten(2, grid_hw)  # (F, h * w, C) -> (F, C, h, w)
    maps = nn.functional.interpolate(maps, wanted_hw, mode="bilinear", antialias=True, align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def geometry_feature_loss(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch by patch: squared distance of directions.

    Args:
        student (`torch.Tensor` of shape `(F, P, Cg)`): Geometry stream, projected to the teacher's width.
        teacher (`torch.Tensor` of shape `(F, P, Cg)`): On the same grid.

    Returns:
        `tuple` of two `torch.Tensor` of shape `()`: sum over the patches and their number, float32.

    Source:
        Paper: eq. 6, first part; Norm taken as L2 (not stated).
    """
    distance = (_directions(student) - _directions(teacher)).square().sum(-1)
    return distance.sum(), distance.new_tensor(float(distance.numel()))


def language_feature_loss(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Frame by frame: one minus the cosine of the mean features.

    Args:
        student (`torch.Tensor` of shape `(F, P, Cl)`): Language stream, projected to the teacher's width.
        teacher (`torch.Tensor` of shape `(F, P', Cl)`): On any grid.

    Returns:
        `tuple` of two `torch.Tensor` of shape `()`: sum over the frames and their number, float32.

    Source:
        Paper: eq. 6, second part. Ours: pooled per frame, by the mean (not stated).
    """
    similar = nn.functional.cosine_similarity(student.float().mean(1), teacher.float().mean(1), dim=-1)
    return (1 - similar).sum(), similar.new_tensor(float(similar.numel()))


def structure_loss(
    student: tuple[torch.Tensor, torch.Tensor], teacher: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frame by frame: how unlike the likenesses of all pairs of tokens are, `|| Z Z^T - Y Y^T ||_F^2 / M^2`.

    The matrices `(M, M)` are never made where there are more tokens than channels: the norm is that of three matrices of channels by channels.
    One frame is worked on at a time; what is kept for the backward pass is the gradient itself, as large as the student's streams.

    Args:
        student (`tuple` of two `torch.Tensor` of shape `(F, P, C)`): Geometry and language stream, neither projected.
        teacher (`tuple` of two `torch.Tensor` of shapes `(F, P, Cg)` and `(F, P, Cl)`): On the student's grid; no gradient goes there.

    Returns:
        `tuple` of two `torch.Tensor` of shape `()`: sum over the frames and their number, float32. It can be differentiated once.

    Source:
        Paper: eq. 7. Ours: per frame, over all of its tokens; the narrower teacher is filled up with zeros; the sums in float64, because they
        nearly cancel.
    """
    value = _FramesOfStructure.apply(*student, *(part.detach() for part in teacher))
    return value, value.new_tensor(float(len(student[0])))


class _FramesOfStructure(torch.autograd.Function):
    """`structure_loss`, with the gradient made beside the value: 4 (Z Z^T - Y Y^T) Z / M^2, through the lengths."""

    @staticmethod
    def forward(
        ctx: Any, geometry: torch.Tensor, language: torch.Tensor, teacher_g: torch.Tensor, teacher_l: torch.Tensor
    ) -> torch.Tensor:
        """Sum over the frames, `()`, float32."""
        wanted = any(ctx.needs_input_grad[:2])
        kept = [torch.empty_like(part) for part in (geometry, language)] if wanted else []
        width, patches = max(teacher_g.shape[-1], teacher_l.shape[-1]), geometry.shape[1]
        total = torch.zeros((), dtype=torch.float64, device=geometry.device)
        for frame in range(len(geometry)):
            x = torch.cat([geometry[frame], language[frame]]).double()
            length = x.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)
            z = x / length
            parts = [nn.functional.normalize(part[frame].double(), dim=-1) for part in (teacher_g, teacher_l)]
            y = torch.cat([nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts])
            value, slope = _structure_of_frame(z, y, wanted)
            total += value
            if slope is not None:
                # Only what turns a direction changes it.
                slope = (slope - (slope * z).sum(-1, keepdim=True) * z) / length
                kept[0][frame], kept[1][frame] = slope[:patches], slope[patches:]
        ctx.save_for_backward(*kept)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the student's two streams."""
        geometry, language = (slope * part for part in ctx.saved_tensors)
        return geometry.to(ctx.saved_tensors[0].dtype), language.to(ctx.saved_tensors[1].dtype), None, None


def _structure_of_frame(
    z: torch.Tensor, y: torch.Tensor, with_slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of directions `(M, C)` and `(M, C')`, float64: value `()` and its gradient by the first, `(M, C)`."""
    tokens = len(z)
    if tokens <= max(z.shape[-1], y.shape[-1]):
        pairs = z @ z.T - y @ y.T
        value, slope = pairs.square().sum(), pairs @ z if with_slope else None
    else:
        # || Z Z^T ||^2 = || Z^T Z ||^2, and <Z Z^T, Y Y^T> = || Y^T Z ||^2
        own, cross, other = z.T @ z, y.T @ z, y.T @ y
        value = own.square().sum() - 2 * cross.square().sum() + other.square().sum()
        slope = z @ own - y @ cross if with_slope else None
    return value / tokens**2, None if slope is None else slope * (4 / tokens**2)


def _directions(features: torch.Tensor) -> torch.Tensor:
    """Features of length 1, float32."""
    return nn.functional.normalize(features.float(), dim=-1)


__all__ = ["geometry_feature_loss", "language_feature_loss", "resized_to_grid", "structure_loss"]
