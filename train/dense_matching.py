"""Which patches of two frames see the same place, as a training signal for the geometry stream.

The blocks over all frames find a camera's motion by looking for the same thing in other frames. The cameras alone teach that very slowly: before
anything is found, they say nothing about how to look. True depth and cameras say directly which patches belong together.

Shapes: B videos, S frames, H W pixels, h w patch grid, P = h * w patches, C encoder width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.geometry_vidllm import project_points, unproject_depth
from vidllm.modeling_vidllm.outputs_vidllm import VidLLMOutput
from vidllm.train.matching_directions import matching_directions


# A place is seen by another frame if its depth there is that of the picture, within this share.
DEPTH_TOLERANCE = 0.05


def patch_matches(
    depth_m: torch.Tensor, intrinsics_px: torch.Tensor, cam_from_world: torch.Tensor, patch_size: int
) -> torch.Tensor:
    """Where the middle of each patch is seen in every other frame.

    Args:
        depth_m (`torch.Tensor` of shape `(B, S, H, W)`): True depth, 0 = unknown; sides are multiples of the patch size.
        intrinsics_px (`torch.Tensor` of shape `(B, S, 3, 3)`): Of these pictures.
        cam_from_world (`torch.Tensor` of shape `(B, S, 4, 4)`): Metres.
        patch_size (`int`): Edge of a patch, pixels.

    Returns:
        `torch.Tensor` of shape `(B, S, S, P, 2)`: `[b, i, j, p]` is the place in frame j, column and row in patches (0, 0 = middle of the first
        patch), where the middle of patch p of frame i is seen; NaN where it is hidden, outside, of unknown depth, or i = j.

    Source:
        Ours.
    """
    frames, height, width = depth_m.shape[1:]
    half = patch_size // 2
    middle = (..., slice(half, None, patch_size), slice(half, None, patch_size))
    points_world = unproject_depth(depth_m, intrinsics_px, cam_from_world)[:, :, middle[1], middle[2]].flatten(2, 3)
    known = (depth_m[middle] > 0).flatten(2)  # (B, S, P)
    # (B, S, P, 3) -> (B, S of the points, S of the pictures, P, 3)
    points = points_world[:, :, None].expand(-1, -1, frames, -1, -1)
    pixels, depth_there = project_points(
        points,
        intrinsics_px[:, None].expand(-1, frames, -1, -1, -1),
        cam_from_world[:, None].expand(-1, frames, -1, -1, -1),
    )
    # at depth 0 a projection is not finite
    pixels = torch.nan_to_num(pixels, nan=-1e6, posinf=-1e6, neginf=-1e6).clamp(-1e6, 1e6)
    u, v = pixels.round().long().unbind(-1)
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height) & (depth_there > 0)
    u, v = u.clamp(0, width - 1), v.clamp(0, height - 1)
    # (B, S pictures, H * W) -> (B, S points, S pictures, P)
    picture = depth_m.flatten(2)[:, None].expand(-1, frames, -1, -1).gather(-1, v * width + u)
    same = (picture - depth_there).abs() <= DEPTH_TOLERANCE * picture
    other = ~torch.eye(frames, dtype=torch.bool, device=depth_m.device)[None, :, :, None]
    found = known[:, :, None] & inside & same & other
    return torch.where(found[..., None], (pixels - half) / patch_size, torch.nan)


def shares_of_patches(places: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
    """How a place is shared out among the patches around it: their mean place, weighted so, is that place.

    Args:
        places (`torch.Tensor` of shape `(..., 2)`): Column and row in patches, 0, 0 = middle of the first patch; finite. Beyond the middles of the
            outer patches it counts as on them.
        grid_hw (`tuple` of `int`): Rows and columns of patches.

    Returns:
        `torch.Tensor` of shape `(..., P)`: 0..1, sum 1; at most four are not 0.

    Source:
        Ours: bilinear weights.
    """
    rows, columns = (
        (1 - (places[..., axis, None].clamp(0, number - 1) - torch.arange(number, device=places.device)).abs()).clamp(
            min=0
        )
        for axis, number in ((1, grid_hw[0]), (0, grid_hw[1]))
    )
    return (rows[..., :, None] * columns[..., None, :]).flatten(-2)


def patch_places(grid_hw: tuple[int, int]) -> torch.Tensor:
    """Column and row of each patch, from one side of the picture to the other.

    Args:
        grid_hw (`tuple` of `int`): Rows and columns of patches.

    Returns:
        `torch.Tensor` of shape `(P, 2)`, float32: in -1.7..1.7, of about unit size.

    Source:
        Ours.
    """
    rows, columns = ((2 * torch.arange(number) + 1) / number - 1 for number in grid_hw)
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return 1.7 * torch.stack([grid[1].flatten(), grid[0].flatten()], dim=-1)


@dataclass(frozen=True)
class DenseMatching:
    """Losses on the geometry stream, in the directions of `matching_directions`.

    `dense_match`: cross-entropy between the likeness of a patch to all patches of another frame and the shares of those around the place where it
    is seen there. `dense_place`: squared distance of what a patch says about its place in the picture.

    Args:
        strength (`float`): Weight of both, all through the run.
        temperature (`float`): Of the cosines.

    Source:
        Ours: the first is the contrastive form of what tracks teach facebookresearch/vggt. Whole patches as targets left a camera's turn as
        uncertain as half a patch; shares teach where between patches a place is.
    """

    strength: float = 1.0
    temperature: float = 0.07
    name: ClassVar[str] = "dense_matching"
    forward_kwargs: ClassVar[Mapping[str, Any]] = {"output_adapter_tokens": True}

    def weight(self, progress: float) -> float:
        """Weight in the total loss.

        Args:
            progress (`float`): Share of the run that is done; not read.

        Returns:
            `float`

        Source:
            Ours.
        """
        return self.strength

    def terms(
        self, output: VidLLMOutput, batch: Mapping[str, Any], config: VidLLMConfig
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """`(sum, count)` of `dense_match` and `dense_place`; sums over matched pairs of patch and frame, and over patches, float32.

        Args:
            output (`VidLLMOutput`): With `geom_tokens` `(B, S, P, C)`.
            batch (`Mapping`): With `targets["patch_matches"]` `(B, S, S, P, 2)` and `pixel_values_videos` of its size.
            config (`VidLLMConfig`): Of the model.

        Returns:
            `dict[str, tuple]`

        Source:
            Ours.
        """
        matches = batch["targets"]["patch_matches"]
        grid_hw = tuple(side // config.vision_config.patch_size for side in batch["pixel_values_videos"].shape[-2:])
        directions = matching_directions(config)
        with torch.autocast(device_type=matches.device.type, enabled=False):
            tokens = output.geom_tokens.float()
            # as the blocks read them
            tokens = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])
            likeness = torch.nn.functional.normalize(tokens @ directions.likeness.T.to(tokens.device), dim=-1)
            cosines = torch.einsum("bipc,bjqc->bijpq", likeness, likeness)
            found = matches.isfinite().all(-1)
            shares = shares_of_patches(matches[found], grid_hw)
            match = -(shares * (cosines[found] / self.temperature).log_softmax(-1)).sum()
            said = tokens @ directions.place.T.to(tokens.device)
            place = (said - patch_places(grid_hw).to(tokens.device)).square().mean(-1).sum()
        counts = self.counts(batch, config)
        return {"dense_match": (match, counts["dense_match"]), "dense_place": (place, counts["dense_place"])}

    def counts(self, batch: Mapping[str, Any], config: VidLLMConfig) -> dict[str, torch.Tensor]:
        """Matched pairs and patches of a batch; see `terms`."""
        matches = batch["targets"]["patch_matches"]
        found = matches.isfinite().all(-1)
        return {
            "dense_match": found.sum().float(),
            "dense_place": torch.tensor(float(found[:, :, 0].numel()), device=found.device),
        }


__all__ = ["DenseMatching", "patch_matches", "patch_places", "shares_of_patches"]
