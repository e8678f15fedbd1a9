"""Losses on cameras, depth, points, the room's rotation and metric depth, without batches and weights: tensors in, one value per video out.

Shapes: V videos (or 1: VGGT's own form takes a whole batch as one video), B videos, S frames, H W pixels, C channels. All float32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vidllm.modeling_vidllm.configuration_vidllm import check_choice
from vidllm.modeling_vidllm.geometry_vidllm import (
    nearest_heading,
    room_headings,
    rotation_angle_rad,
)


GRADIENTS = ("none", "grad", "grad_conf", "normal", "normal_conf")
# VGGT: a scale with fewer normals says nothing.
MIN_NORMALS = 10
# VGGT: cosines stay this far from the ends, and lengths of normals from zero.
NORMAL_EPS = 1e-8


@dataclass(frozen=True)
class RegressionSettings:
    """How depth or points are compared with the truth.

    Args:
        gradient (`str`): One of `GRADIENTS`: differences of neighbouring errors, or angles between normals (points only), weighted by the
            confidence where the name ends in `conf`.
        valid_range (`float`): Quantile of the errors from which on they are left out; 0 keeps all.
        min_elements (`int`): Only more errors than this are filtered, and only if more than this are left.
        max_error (`float`): Errors that are filtered, and differences, are cut off here.
        confidence_gamma (`float`): Factor of error times confidence.
        confidence_alpha (`float`): Factor of the confidence's logarithm.

    Raises:
        ValueError: A value is out of range.

    Source:
        Upstream: facebookresearch/vggt@105a198122c56055b6a2daf2419d691127590614 training/loss.py.
    """

    gradient: str = "grad"
    valid_range: float = 0.98
    min_elements: int = 1000
    max_error: float = 100.0
    confidence_gamma: float = 1.0
    confidence_alpha: float = 0.2

    def __post_init__(self) -> None:
        check_choice("gradient", self.gradient, GRADIENTS)
        if not 0 <= self.valid_range < 1:
            raise ValueError(f"valid_range: wanted a number from 0 to below 1; got {self.valid_range}")


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of each video's values where the mask holds.

    Args:
        values (`torch.Tensor` of shape `(V, ...)`): Finite where the mask holds.
        mask (`torch.Tensor` of shape `(V, ...)`, bool): Which count.

    Returns:
        `torch.Tensor` of shape `(V,)`: 0 where none counts.

    Source:
        Ours.
    """
    total = torch.where(mask, values, torch.zeros_like(values)).flatten(1).sum(1)
    return total / mask.flatten(1).sum(1).clamp(min=1)


# ---- cameras and room


def camera_losses(
    pose_encodings: torch.Tensor,
    wanted: torch.Tensor,
    frame_mask: torch.Tensor,
    decay: float = 0.6,
    norm: str = "l1",
    max_translation_error: float = 100.0,
) -> dict[str, torch.Tensor]:
    """Errors of all refinement iterations, late ones weighing more.

    Args:
        pose_encodings (`torch.Tensor` of shape `(V, iterations, S, 9)`): Raw, frame 0 included.
        wanted (`torch.Tensor` of shape `(V, S, 9)`): True encodings.
        frame_mask (`torch.Tensor` of shape `(V, S)`, bool): Frames that count.
        decay (`float`): Iteration i of n weighs decay ** (n - 1 - i) / n.
        norm (`str`): `l1`: mean absolute difference; `l2`: length of the difference.
        max_translation_error (`float`): Errors of the translation are cut off here.

    Returns:
        `dict`: `translation`, `rotation` (of quaternions as they come, no sign is turned), `fov`, each `(V,)`.

    Source:
        Upstream: facebookresearch/vggt@105a198122c56055b6a2daf2419d691127590614 training/loss.py `compute_camera_loss`.
    """
    count = pose_encodings.shape[1]
    device = pose_encodings.device
    weight = decay ** torch.arange(count - 1, -1, -1, device=device, dtype=torch.float32) / count
    mask = frame_mask[:, None, :, None]
    difference = pose_encodings.float() - wanted[:, None]
    difference = torch.where(mask, difference, torch.zeros_like(difference))
    losses = {}
    for name, part in (("translation", slice(0, 3)), ("rotation", slice(3, 7)), ("fov", slice(7, 9))):
        error = difference[..., part]
        error = error.abs() if norm == "l1" else torch.linalg.vector_norm(error, dim=-1, keepdim=True)
        if name == "translation":
            error = error.clamp(max=max_translation_error)
        # (V, iterations, S, parts) -> (V * iterations, S, parts) -> (V, iterations)
        mean = masked_mean(error.flatten(0, 1), mask.expand_as(error).flatten(0, 1)).unflatten(0, (-1, count))
        losses[name] = (mean * weight).sum(1)
    return losses


def room_rotation_loss(room_from_world: torch.Tensor, annotation_from_world: torch.Tensor) -> torch.Tensor:
    """Angle to the nearest of the four headings that are equally right.

    Args:
        room_from_world (`torch.Tensor` of shape `(B, 3, 3)`): Predicted rotation.
        annotation_from_world (`torch.Tensor` of shape `(B, 4, 4)`): From the first camera to the dataset's axis-aligned scene frame.

    Returns:
        `torch.Tensor` of shape `(B,)`: radians.

    Source:
        Ours.
    """
    headings = room_headings(annotation_from_world)
    turns = nearest_heading(room_from_world.detach(), annotation_from_world)
    nearest = headings[torch.arange(len(turns), device=turns.device), turns]
    return rotation_angle_rad(room_from_world, nearest)


# ---- depth and points


def without_outliers(
    values: torch.Tensor, mask: torch.Tensor, settings: RegressionSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leave out each video's largest errors.

    Args:
        values (`torch.Tensor` of shape `(V, ...)`): Errors.
        mask (`torch.Tensor` of shape `(V, ...)`, bool): Which count.
        settings (`RegressionSettings`): Quantile and limits.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(V, ...)`: the values, cut off at `max_error` where there are enough of them; the mask of what is left.

    Source:
        Upstream: facebookresearch/vggt `filter_by_quantile`, `torch_quantile` (the nearest element). Ours: one quantile per video.
    """
    if settings.valid_range <= 0:
        return values, mask
    view = (-1, *[1] * (values.ndim - 1))
    number = mask.flatten(1).sum(1)
    enough = number > settings.min_elements
    values = torch.where(enough.view(view), values.clamp(max=settings.max_error), values)
    # float32 cannot count the pixels of a long video
    precise = torch.float32 if values.device.type == "mps" else torch.float64
    position = (settings.valid_range * (number - 1).to(precise)).round().long().clamp(min=0)
    # the quantile is near the top: only that part is sorted
    flat = values.detach().masked_fill(~mask, -torch.inf).flatten(1)
    most = min(flat.shape[1], int((1 - settings.valid_range) * flat.shape[1]) + 2)
    largest = flat.topk(most, dim=1).values
    threshold = largest.gather(1, (number - 1 - position).clamp(0, most - 1)[:, None])
    kept = mask & (values < threshold.view(view))
    enough = enough & (kept.flatten(1).sum(1) > settings.min_elements)
    return values, torch.where(enough.view(view), kept, mask)


def regression_losses(
    predicted: torch.Tensor,
    wanted: torch.Tensor,
    confidence: torch.Tensor,
    mask: torch.Tensor,
    pixel_mask: torch.Tensor,
    settings: RegressionSettings,
) -> dict[str, torch.Tensor]:
    """Errors of depth or points, weighted by confidence, plain, and of their neighbours' differences.

    Args:
        predicted (`torch.Tensor` of shape `(V, S, H, W, C)`): Depth (C = 1) or points (C = 3).
        wanted (`torch.Tensor` of shape `(V, S, H, W, C)`): The truth; finite.
        confidence (`torch.Tensor` of shape `(V, S, H, W)`): Above 0.
        mask (`torch.Tensor` of shape `(V, S, H, W)`, bool): Pixels whose truth is known.
        pixel_mask (`torch.Tensor` of shape `(V, S, H, W)`, bool): Pixels that are no padding.
        settings (`RegressionSettings`): Constants.

    Returns:
        `dict`: `confidence` (error * confidence - alpha * log confidence), `regression`, `gradient`, each `(V,)`.

    Source:
        Upstream: facebookresearch/vggt@105a198122c56055b6a2daf2419d691127590614 training/loss.py `regression_loss`.
    """
    error = torch.where(mask[..., None], predicted.float() - wanted, torch.zeros_like(wanted))
    distance = error.abs().squeeze(-1) if error.shape[-1] == 1 else torch.linalg.vector_norm(error, dim=-1)
    confidence = torch.where(pixel_mask, confidence.float(), torch.ones_like(confidence, dtype=torch.float32))
    weighted = settings.confidence_gamma * distance * confidence - settings.confidence_alpha * confidence.log()
    if settings.gradient == "none":
        # hangs on the graph, as the others do
        gradient = distance.flatten(1)[:, :1].sum(1) * 0
    else:
        weight = confidence if settings.gradient.endswith("conf") else None
        if settings.gradient.startswith("normal"):
            gradient = _normal_loss(predicted.float(), wanted, mask, weight, settings)
        else:
            gradient = _difference_loss(error, mask, weight, settings)
    return {
        "confidence": masked_mean(*without_outliers(weighted, mask, settings)),
        "regression": masked_mean(*without_outliers(distance, mask, settings)),
        "gradient": gradient,
    }


def _difference_loss(
    error: torch.Tensor, mask: torch.Tensor, confidence: torch.Tensor | None, settings: RegressionSettings
) -> torch.Tensor:
    """Differences of neighbouring errors `(V, S, H, W, C)` at four scales -> `(V,)`."""
    total = error.new_zeros(error.shape[0])
    for stride in (1, 2, 4, 8):
        scaled, known = error[:, :, ::stride, ::stride], mask[:, :, ::stride, ::stride, None]
        weight = None if confidence is None else confidence[:, :, ::stride, ::stride, None]
        summed = error.new_zeros(error.shape[0])
        for axis in (2, 3):
            steps = scaled.shape[axis] - 1
            both = known.narrow(axis, 1, steps) & known.narrow(axis, 0, steps)
            difference = (scaled.narrow(axis, 1, steps) - scaled.narrow(axis, 0, steps)).abs()
            difference = torch.where(both, difference, torch.zeros_like(difference)).clamp(max=settings.max_error)
            if weight is not None:
                # VGGT: the logarithm counts at every pixel, known or not
                weight_here = weight.narrow(axis, 1, steps)
                difference = settings.confidence_gamma * difference * weight_here
                difference = difference - settings.confidence_alpha * weight_here.log()
            summed = summed + difference.flatten(1).sum(1)
        count = known.flatten(1).sum(1) * error.shape[-1]
        total = total + torch.where(count > 0, summed / count.clamp(min=1), torch.zeros_like(summed))
    return total / 4


def _normals(points: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit normals of points `(N, H, W, 3)` from each pair of neighbours -> `(4, N, H, W, 3)`, and which are known."""
    points = F.pad(points, (0, 0, 1, 1, 1, 1))
    mask = F.pad(mask, (1, 1, 1, 1))

    def shifted(x: torch.Tensor, down: int, right: int) -> torch.Tensor:
        return x[:, 1 + down : x.shape[1] - 1 + down, 1 + right : x.shape[2] - 1 + right]

    centre, known = shifted(points, 0, 0), shifted(mask, 0, 0)
    around = ((-1, 0), (0, -1), (1, 0), (0, 1))
    edges = [shifted(points, *step) - centre for step in around]
    ends = [shifted(mask, *step) for step in around]
    normals = torch.stack([torch.linalg.cross(edges[i], edges[(i + 1) % 4], dim=-1) for i in range(4)])
    both = torch.stack([ends[i] & known & ends[(i + 1) % 4] for i in range(4)])
    return F.normalize(normals, dim=-1, eps=NORMAL_EPS), both


def _normal_loss(
    predicted: torch.Tensor,
    wanted: torch.Tensor,
    mask: torch.Tensor,
    confidence: torch.Tensor | None,
    settings: RegressionSettings,
) -> torch.Tensor:
    """1 - cosine between normals of points `(V, S, H, W, 3)` at three scales -> `(V,)`."""
    num_videos, num_frames = predicted.shape[:2]
    total = predicted.new_zeros(num_videos)
    for stride in (1, 2, 4):
        # (V, S, H, W, 3) -> (V * S, h, w, 3)
        parts = [x[:, :, ::stride, ::stride].flatten(0, 1) for x in (predicted, wanted, mask)]
        normals, known = _normals(parts[0], parts[2])
        true_normals, _ = _normals(parts[1], parts[2])
        loss = 1 - (normals * true_normals).sum(-1).clamp(-1 + NORMAL_EPS, 1 - NORMAL_EPS)
        if confidence is not None:
            weight = confidence[:, :, ::stride, ::stride].flatten(0, 1)
            loss = settings.confidence_gamma * loss * weight - settings.confidence_alpha * weight.log()
        # (4, V * S, h, w) -> (V, 4, S, h, w)
        loss, known = (x.unflatten(1, (num_videos, num_frames)).transpose(0, 1) for x in (loss, known))
        enough = known.flatten(1).sum(1) >= MIN_NORMALS
        total = total + torch.where(enough, masked_mean(loss, known), torch.zeros_like(total))
    return total / 3


# ---- metric depth


def metric_depth_loss(
    predicted: torch.Tensor, true: torch.Tensor, mask: torch.Tensor, alpha: float, eps: float
) -> torch.Tensor:
    """Squared mean of the log errors of an image, plus their damped spread around it.

    Args:
        predicted (`torch.Tensor` of shape `(V, ...)`): Depth of an image, metres, above 0.
        true (`torch.Tensor` of shape `(V, ...)`): True depth, metres, above 0 where the mask holds.
        mask (`torch.Tensor` of shape `(V, ...)`, bool): Pixels whose truth is known.
        alpha (`float`): Damping of large deviations.
        eps (`float`): Added to both depths, metres.

    Returns:
        `torch.Tensor` of shape `(V,)`: 0 where no pixel is known.

    Source:
        Paper: eq. 9.
    """
    one = torch.ones_like(true)
    error = (torch.where(mask, predicted.float(), one) + eps).log() - (torch.where(mask, true, one) + eps).log()
    bias = masked_mean(error, mask)
    deviation = error - bias.view(-1, *[1] * (error.ndim - 1))
    return bias.square() + masked_mean(deviation.square() / (1 + alpha * deviation.abs()), mask)


__all__ = [
    "GRADIENTS",
    "RegressionSettings",
    "camera_losses",
    "masked_mean",
    "metric_depth_loss",
    "regression_losses",
    "room_rotation_loss",
    "without_outliers",
]
