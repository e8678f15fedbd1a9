"""Losses of stage 2: every term is a sum over what it is about and the number of these; pure functions of outputs, batch and settings.

Shapes: B videos, Q prompts, L text tokens, S frames, H W pixels, G `<loc>` tokens, T queries, M boxes of a prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig, check_choice
from vidllm.modeling_vidllm.geometry_vidllm import (
    boxes_room_from_annotation,
    cameras_from_pose_encoding,
    unproject_depth,
)
from vidllm.modeling_vidllm.outputs_vidllm import VidLLMOutput
from vidllm.modeling_vidllm.reconstruction_vidllm import VidLLMRawReconstruction
from vidllm.train.box_losses import box_losses
from vidllm.train.geometry_losses import (
    GRADIENTS,
    RegressionSettings,
    camera_losses,
    masked_mean,
    metric_depth_loss,
    regression_losses,
    room_rotation_loss,
)
from vidllm.train.true_geometry import GeometryMasks, as_one_video, geometry_masks, true_geometry, video_sizes


CAMERA_TERMS = ("camera_translation", "camera_rotation", "camera_fov")
DEPTH_TERMS = ("depth_confidence", "depth_regression", "depth_gradient")
POINTS_TERMS = ("points_confidence", "points_regression", "points_gradient")
TERMS = (
    *CAMERA_TERMS,
    *DEPTH_TERMS,
    *POINTS_TERMS,
    "room_rotation",
    "metric_depth",
    "token",
    "box_l1",
    "box_diou",
    "match",
)
# VGGT weighs the field of view by half.
DEFAULT_WEIGHTS = {**dict.fromkeys(TERMS, 1.0), "camera_fov": 0.5}
IGNORED_LABEL = -100


@dataclass(frozen=True)
class JointLossSettings:
    """Weights and constants of the losses of stage 2.

    Args:
        weights (`Mapping[str, float]`): By term; those that are not named keep their default, 1.0 (`camera_fov` 0.5).
        reduction (`str`): `sample`: each video's own mean and quantiles, then the mean over videos; `vggt`: a batch is one long video in the
            terms that VGGT has and in `metric_depth`.
        iteration_decay (`float`): Of n camera iterations, i weighs decay ** (n - 1 - i) / n.
        camera_norm (`str`): `l1` or `l2`.
        max_translation_error (`float`): Translation errors are cut off here, in scene sizes.
        min_first_frame_pixels (`int`): Cameras are learned where the first frame has more valid pixels than this.
        min_valid_pixels (`int`): Depth and points are learned where a video has at least so many valid pixels.
        depth (`RegressionSettings`): Of the depth terms.
        points (`RegressionSettings`): Of the terms on points.
        metric_alpha (`float`): Ours: 1, so that only pixels off by a factor of about e weigh less than quadratically.
        metric_eps_m (`float`): Ours: 1 mm, below what any depth sensor resolves.
        match_cost_l1 (`float`): Ours: weight of the L1 distance when queries are assigned to boxes, per metre.
        match_cost_diou (`float`): Ours: weight of 1 - DIoU.
        match_cost_score (`float`): Ours: weight of the query's matching probability, which keeps the choice among equally good queries stable.
        match_margin (`float`): Ours: how far from a box, along each axis, a query may start that is matched with it besides the assigned one, metres.
        proposal_iou (`float`): Ours: overlap from which a given proposal is a box, besides the one that fits best.

    Raises:
        ValueError: A value is out of range, or a term is unknown.

    Source:
        Paper: eq. 8 (unit weights), eq. 9. Upstream: facebookresearch/vggt@105a198122c56055b6a2daf2419d691127590614 training/loss.py
        (camera, depth, points). Ours: reduction per video, where said.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    reduction: str = "sample"
    iteration_decay: float = 0.6
    camera_norm: str = "l1"
    max_translation_error: float = 100.0
    min_first_frame_pixels: int = 100
    min_valid_pixels: int = 100
    depth: RegressionSettings = field(default_factory=RegressionSettings)
    points: RegressionSettings = field(default_factory=RegressionSettings)
    metric_alpha: float = 1.0
    metric_eps_m: float = 1e-3
    match_cost_l1: float = 1.0
    match_cost_diou: float = 1.0
    match_cost_score: float = 1.0
    match_margin: float = 0.3
    proposal_iou: float = 0.5

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            check_choice("losses.weights", name, TERMS)
            if not 0 <= weight < float("inf"):
                raise ValueError(f"losses.weights.{name}: wanted a finite number from 0; got {weight}")
        check_choice("losses.reduction", self.reduction, ("sample", "vggt"))
        check_choice("losses.camera_norm", self.camera_norm, ("l1", "l2"))
        # a depth map has no normals
        check_choice("losses.depth.gradient", self.depth.gradient, GRADIENTS[:3])
        if not (self.metric_alpha >= 0 and self.metric_eps_m > 0):
            raise ValueError(
                f"losses: wanted metric_alpha from 0 and metric_eps_m above 0; got {self.metric_alpha}, {self.metric_eps_m}"
            )
        if not self.match_margin >= 0:
            raise ValueError(f"losses.match_margin: wanted a length from 0; got {self.match_margin}")
        if not 0 < self.proposal_iou <= 1:
            raise ValueError(f"losses.proposal_iou: wanted an overlap above 0, at most 1; got {self.proposal_iou}")

    def weight(self, term: str) -> float:
        """Weight of a term.

        Args:
            term (`str`): One of `TERMS`.

        Returns:
            `float`: as given, else its default.
        """
        return self.weights.get(term, DEFAULT_WEIGHTS[term])


# ---- what takes part


def _masks_of(batch: Mapping[str, Any], config: VidLLMConfig, settings: JointLossSettings) -> GeometryMasks | None:
    """Which videos, frames and pixels take part; None where no video has depth."""
    return geometry_masks(
        batch,
        settings.min_first_frame_pixels,
        settings.min_valid_pixels,
        normalise=config.use_metric_depth,
        one_video=settings.reduction == "vggt",
    )


def _has_scene(batch: Mapping[str, Any]) -> torch.Tensor:
    """Which prompts are about a video, `(Q,)` bool."""
    ids = batch["input_ids"]
    if batch.get("scene_index") is not None:
        return batch["scene_index"].to(ids.device) >= 0
    has_video = batch.get("pixel_values_videos") is not None or batch.get("scene") is not None
    return torch.full((len(ids),), has_video, dtype=torch.bool, device=ids.device)


def _asked(batch: Mapping[str, Any], config: VidLLMConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """`<loc>` tokens whose boxes are known `(Q, L)`, and true boxes that belong to one of them `(Q, M)`, both bool."""
    ids, targets = batch["input_ids"], batch.get("targets", {})
    locs = (ids == config.loc_token_id) & _has_scene(batch)[:, None]
    if config.box_output != "decoder" or "box_mask" not in targets:
        return torch.zeros_like(locs), torch.zeros(len(ids), 0, dtype=torch.bool, device=ids.device)
    boxes = targets["box_mask"] & (targets["box_block"] < locs.sum(1, keepdim=True))
    if "boxes_known" in targets:
        locs = locs & targets["boxes_known"][:, None]
    return locs, boxes


def joint_loss_counts(
    batch: Mapping[str, Any], config: VidLLMConfig, settings: JointLossSettings
) -> dict[str, torch.Tensor]:
    """How many videos, tokens or boxes each term is about, from the batch alone.

    Args:
        batch (`Mapping`): From `VidLLMCollator`, on any device.
        config (`VidLLMConfig`): Read for `loc_token_id`, `box_output`, `use_metric_depth`.
        settings (`JointLossSettings`): Which videos take part.

    Returns:
        `dict[str, torch.Tensor]`: 0-dim float32 for each of `TERMS`: videos; label tokens (`token`); true boxes (`box_l1`, `box_diou`);
        `<loc>` tokens (`match`).

    Source:
        Ours: known before the forward, so that a step's sums can be divided by the counts of all its parts.
    """
    return _counts(_masks_of(batch, config, settings), batch, config)


def _counts(part: GeometryMasks | None, batch: Mapping[str, Any], config: VidLLMConfig) -> dict[str, torch.Tensor]:
    """See `joint_loss_counts`."""
    counts = dict.fromkeys(TERMS, torch.zeros((), device=batch["input_ids"].device))
    if part is not None:
        counts.update(dict.fromkeys(CAMERA_TERMS, part.camera.sum().float()))
        counts.update(dict.fromkeys(DEPTH_TERMS, part.depth.sum().float()))
        counts.update(dict.fromkeys(POINTS_TERMS, part.points.sum().float()))
        if config.use_metric_depth:
            counts["metric_depth"] = part.metric.sum().float()
    if "annotation_mask" in batch.get("targets", {}):
        counts["room_rotation"] = batch["targets"]["annotation_mask"].sum().float()
    if batch.get("labels") is not None:
        counts["token"] = (batch["labels"][:, 1:] != IGNORED_LABEL).sum().float()
    locs, boxes = _asked(batch, config)
    counts["match"] = locs.sum().float()
    counts["box_l1"] = counts["box_diou"] = boxes.sum().float()
    return counts


# ---- terms


def joint_loss_terms(
    output: VidLLMOutput, batch: Mapping[str, Any], config: VidLLMConfig, settings: JointLossSettings
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """All terms of the loss of stage 2.

    Args:
        output (`VidLLMOutput`): Of one forward.
        batch (`Mapping`): From `VidLLMCollator`, on the output's device (`video_size_shw` may stay on the host). The labels are those of the
            logits: where a forward kept the last logits only, the last labels.
        config (`VidLLMConfig`): Of the model.
        settings (`JointLossSettings`): Weights (not read here) and constants.

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`: `(sum, count)` for each of `TERMS`, 0-dim float32. Whatever the batch lacks has count 0
        and a sum of 0 that still hangs on the outputs.

    Raises:
        ValueError: Logits and labels are not of the same positions.

    Source:
        Paper: eq. 8, eq. 9. Upstream: facebookresearch/vggt (geometry), LLaVA-3D supplement (boxes, matching). Ours: room rotation, reduction.
    """
    part = _masks_of(batch, config, settings)
    counts = _counts(part, batch, config)
    zero = torch.zeros((), device=batch["input_ids"].device)
    sums = dict.fromkeys(TERMS, zero)
    with torch.autocast(device_type=zero.device.type, enabled=False):
        raw = output.raw_reconstruction
        if raw is not None:
            sums.update(_reconstruction_sums(raw, part, batch, config, settings))
        if output.metric_depth_m is not None:
            sums["metric_depth"] = _metric_depth_sum(output.metric_depth_m, part, batch, settings)
        if output.logits is not None:
            sums["token"] = _token_sum(output.logits, batch.get("labels"))
        if output.grounding is not None:
            sums.update(_grounding_sums(output, batch, config, settings))
    return {name: (sums[name], counts[name]) for name in TERMS}


def _nothing(*tensors: torch.Tensor) -> torch.Tensor:
    """0 that hangs on the tensors."""
    return sum((tensor.float() * 0).sum() for tensor in tensors)


def _sum_of(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the values `(V,)` of the videos that take part."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def _reconstruction_sums(
    raw: VidLLMRawReconstruction,
    part: GeometryMasks | None,
    batch: Mapping[str, Any],
    config: VidLLMConfig,
    settings: JointLossSettings,
) -> dict[str, torch.Tensor]:
    """Sums of the terms on cameras, depth, points and the room's rotation."""
    targets, sums = batch.get("targets", {}), {}
    room = raw.room_from_world.float()
    if "annotation_mask" in targets:
        angle = room_rotation_loss(room, targets["annotation_from_world"].float())
        sums["room_rotation"] = _sum_of(angle, targets["annotation_mask"])
    else:
        sums["room_rotation"] = _nothing(room)
    encodings, depth, confidence = (
        value.float() for value in (raw.pose_encodings, raw.depth_relative, raw.depth_confidence)
    )
    if part is None:
        sums.update(dict.fromkeys(CAMERA_TERMS, _nothing(encodings)))
        sums.update(dict.fromkeys(DEPTH_TERMS, _nothing(depth, confidence)))
        sums.update(dict.fromkeys(POINTS_TERMS, _nothing(encodings, depth, confidence)))
        return sums

    if depth.shape != part.valid_mask.shape:
        raise ValueError(
            f"depth_m: wanted the shape of the videos {tuple(depth.shape)}; got {tuple(part.valid_mask.shape)}"
        )
    one_video = settings.reduction == "vggt"
    sizes = video_sizes(batch, depth.shape, depth.device)
    size_hw = (sizes[:, 1:2], sizes[:, 2:3])
    wanted, true_depth, true_points = true_geometry(targets, part.valid_mask, size_hw, config.use_metric_depth)
    camera = camera_losses(
        # the iterations stay an axis of their own
        as_one_video(encodings.transpose(1, 2), one_video).transpose(1, 2),
        as_one_video(wanted, one_video),
        part.camera_mask,
        settings.iteration_decay,
        settings.camera_norm,
        settings.max_translation_error,
    )
    sums.update({f"camera_{name}": _sum_of(value, part.camera) for name, value in camera.items()})
    cameras, pinholes = cameras_from_pose_encoding(encodings[:, -1], size_hw)
    points = unproject_depth(depth, pinholes, cameras)
    confidence = as_one_video(confidence, one_video)
    for name, predicted, true, mask, counted, constants in (
        ("depth", depth[..., None], true_depth[..., None], part.depth_mask, part.depth, settings.depth),
        ("points", points, true_points, part.points_mask, part.points, settings.points),
    ):
        predicted, true = as_one_video(predicted, one_video), as_one_video(true, one_video)
        values = regression_losses(predicted, true, confidence, mask, part.pixel_mask, constants)
        sums.update({f"{name}_{kind}": _sum_of(value, counted) for kind, value in values.items()})
    return sums


def _metric_depth_sum(
    metric_depth_m: torch.Tensor, part: GeometryMasks | None, batch: Mapping[str, Any], settings: JointLossSettings
) -> torch.Tensor:
    """Sum over videos of the mean over their images that have a valid pixel."""
    if part is None:
        return _nothing(metric_depth_m)
    images = [metric_depth_m.float(), batch["targets"]["depth_m"].float(), part.valid_mask]
    if settings.reduction == "vggt":
        images = [x.flatten(0, 2)[None] for x in images]
    else:
        images = [x.flatten(0, 1) for x in images]
    predicted, true, valid = images
    known = valid.flatten(1).any(1)
    values = metric_depth_loss(predicted, true, valid, settings.metric_alpha, settings.metric_eps_m)
    if settings.reduction == "vggt":
        return _sum_of(values, part.metric)
    shape = metric_depth_m.shape[:2]
    return _sum_of(masked_mean(values.view(shape), known.view(shape)), part.metric)


def _token_sum(logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Cross-entropy of each label with what its preceding position says."""
    if labels is None:
        return _nothing(logits)
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            f"labels: wanted those of the logits' positions {tuple(logits.shape[:2])}; got {tuple(labels.shape)}"
        )
    # as transformers does: labels move, so that logits need not be copied
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    return F.cross_entropy(
        logits.flatten(0, 1).float(), following.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )


def _grounding_sums(
    output: VidLLMOutput, batch: Mapping[str, Any], config: VidLLMConfig, settings: JointLossSettings
) -> dict[str, torch.Tensor]:
    """Sums of the box and match terms."""
    found, targets, scene = output.grounding, batch.get("targets", {}), output.scene
    prompt, column = output.loc_index.unbind(1)
    known_locs, known_boxes = _asked(batch, config)
    known_locs, box_mask = known_locs[prompt, column], known_boxes[prompt]
    true_boxes = found.boxes.new_zeros(*box_mask.shape, 6)
    if box_mask.shape[1]:
        # which of its prompt's <loc>s each is
        number = ((prompt[:, None] == prompt) & (column < column[:, None])).sum(1)
        box_mask = box_mask & (targets["box_block"][prompt] == number[:, None])
        video = output.scene_index.to(prompt.device)[prompt]
        # the frame and the unit in which the decoder works: it must not learn to correct either
        true_boxes = boxes_room_from_annotation(
            targets["boxes_annotation"][prompt].float(),
            targets["annotation_from_world"][video].float(),
            scene.reconstruction.room_from_world.to(prompt.device)[video],
        )
        true_boxes = true_boxes * scene.position_scale.to(prompt.device)[video][:, None, None]
    costs = (settings.match_cost_l1, settings.match_cost_diou, settings.match_cost_score)
    among = settings.proposal_iou if batch.get("proposal_boxes") is not None else None
    losses = box_losses(found, true_boxes, box_mask, *costs, margin=settings.match_margin, proposal_iou=among)
    return {
        "box_l1": losses["l1"].sum(),
        "box_diou": losses["diou"].sum(),
        "match": _sum_of(losses["match"], known_locs),
    }


def total_loss(
    terms: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    settings: JointLossSettings,
    counts: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Weighted sum of the terms' means.

    Args:
        terms (`Mapping`): Of `joint_loss_terms`.
        settings (`JointLossSettings`): Weights.
        counts (`Mapping[str, torch.Tensor]`, *optional*): What to divide by, of a whole step; by default the terms' own.

    Returns:
        `torch.Tensor` of shape `()`: float32.

    Source:
        Paper: eq. 8.
    """
    total = torch.zeros((), device=next(iter(terms.values()))[0].device)
    for name, (value, count) in terms.items():
        count = count if counts is None else counts[name]
        total = total + settings.weight(name) * value / count.clamp(min=1)
    return total


__all__ = [
    "DEFAULT_WEIGHTS",
    "TERMS",
    "JointLossSettings",
    "RegressionSettings",
    "joint_loss_counts",
    "joint_loss_terms",
    "total_loss",
]
