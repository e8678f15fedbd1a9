"""Losses of stage 1, pure: what the adapter's two streams should have in common with two teachers.

Shapes: F frames, P patches of the student's grid, C student width, Cg and Cl teacher widths, M = 2 P tokens of both streams of a frame.
"""

import torch
from torch import nn


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

    Args:
        student (`tuple` of two `torch.Tensor` of shape `(F, P, C)`): Geometry and language stream, neither projected.
        teacher (`tuple` of two `torch.Tensor` of shapes `(F, P, Cg)` and `(F, P, Cl)`): On the student's grid.

    Returns:
        `tuple` of two `torch.Tensor` of shape `()`: sum over the frames and their number, float32.

    Source:
        Paper: eq. 7. Ours: per frame, over all of its tokens; the narrower teacher is filled up with zeros; the sums in float64, because they
        nearly cancel.
    """
    z = torch.cat([_directions(part) for part in student], dim=1).double()
    width = max(part.shape[-1] for part in teacher)
    y = torch.cat(
        [nn.functional.pad(_directions(part), (0, width - part.shape[-1])) for part in teacher], dim=1
    ).double()
    tokens = z.shape[1]
    if tokens <= max(z.shape[-1], width):
        difference = (z @ z.transpose(1, 2) - y @ y.transpose(1, 2)).square().sum((1, 2))
    else:
        # || Z Z^T ||^2 = || Z^T Z ||^2, and <Z Z^T, Y Y^T> = || Z^T Y ||^2
        own, cross, other = (a.transpose(1, 2) @ b for a, b in ((z, z), (z, y), (y, y)))
        difference = sum(sign * part.square().sum((1, 2)) for sign, part in ((1, own), (-2, cross), (1, other)))
    per_frame = (difference / tokens**2).float()
    return per_frame.sum(), per_frame.new_tensor(float(per_frame.numel()))


def _directions(features: torch.Tensor) -> torch.Tensor:
    """Features of length 1, float32."""
    return nn.functional.normalize(features.float(), dim=-1)


__all__ = ["geometry_feature_loss", "language_feature_loss", "resized_to_grid", "structure_loss"]
