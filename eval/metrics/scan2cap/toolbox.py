"""Scan2Cap's benchmark toolbox: precision, recall and F1 of dense captions. Texts and boxes, no tensors.

Shapes: O objects, P proposals of a scene; corners in the order of `BOX_ORDER`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from vidllm.eval.metrics.scan2cap.captions import SCORES
from vidllm.eval.metrics.text_scorers import TextScores, text_scores


# Signs of a corner's offset from the centre along x, y, z: the upper face first. The toolbox reads edges and faces off this order.
BOX_ORDER = ((1, 1, 1), (1, -1, 1), (-1, -1, 1), (-1, 1, 1), (1, 1, -1), (1, -1, -1), (-1, -1, -1), (-1, 1, -1))
# What the toolbox adds to a union, and takes as the least volume, square of an edge, and hull.
_UNION_EPSILON, _LEAST_VOLUME, _LEAST_EDGE_SQUARED, _LEAST_HULL, _LEAST_SUM = 1e-8, 1e-8, 1e-6, 2e-8, 4e-8


@dataclass(frozen=True)
class SceneCaptions:
    """A scene of the benchmark toolbox: objects and proposals.

    Args:
        references (`tuple[tuple[str, ...], ...]`): Of each object, between `sos` and `eos`.
        object_corners (`np.ndarray` of shape `(O, 8, 3)`): Corners of their boxes, metres.
        captions (`tuple[str, ...]`): Of each proposal, between `sos` and `eos`.
        proposal_corners (`np.ndarray` of shape `(P, 8, 3)`): Corners of their boxes.

    Source:
        Upstream: daveredrum/faster-captioning benchmark/eval.py.
    """

    references: tuple[tuple[str, ...], ...]
    object_corners: np.ndarray
    captions: tuple[str, ...]
    proposal_corners: np.ndarray


def matched_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of pairs of boxes as the toolbox compares it with thresholds.

    Args:
        a (`np.ndarray` of shape `(N, 8, 3)`): Corners.
        b (`np.ndarray` of shape `(N, 8, 3)`): Corners.

    Returns:
        `np.ndarray` of shape `(N,)`, float32, with 1e-8 added to the union: both decide overlaps of one half.

    Source:
        Upstream: daveredrum/faster-captioning@32df70d benchmark/box_util.py `box3d_iou_batch_tensor`.
    """
    a, b = np.asarray(a, dtype=np.float32), np.asarray(b, dtype=np.float32)
    low_a, high_a, low_b, high_b = a.min(axis=1), a.max(axis=1), b.min(axis=1), b.max(axis=1)
    shared = _volume(np.maximum(np.minimum(high_a, high_b) - np.maximum(low_a, low_b), np.float32(0)))
    union = _volume(high_a - low_a) + _volume(high_b - low_b) - shared
    return shared / (union + np.float32(_UNION_EPSILON))


def assignment_score(proposals: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """What the toolbox takes for generalised IoU when it assigns proposals to objects.

    Args:
        proposals (`np.ndarray` of shape `(P, 8, 3)`): Corners, ordered as in `BOX_ORDER`.
        objects (`np.ndarray` of shape `(O, 8, 3)`): Corners, ordered as in `BOX_ORDER`.

    Returns:
        `np.ndarray` of shape `(P, O)`, float64. The toolbox looks for shared area in the plane of x and z between corners of the upper face,
        which have one z, and finds none, so that of boxes in its own order this is (sum of volumes) / (volume of the hull) - 1; assignments
        differ from those by generalised IoU.

    Source:
        Upstream: daveredrum/faster-captioning@32df70d benchmark/box_util.py `generalized_box3d_iou`.
    """
    a, b = np.asarray(proposals, dtype=np.float64)[:, None], np.asarray(objects, dtype=np.float64)[None]
    volumes = _edge_volume(a) + _edge_volume(b)
    hull = _volume(np.maximum(a.max(axis=2), b.max(axis=2)) - np.minimum(a.min(axis=2), b.min(axis=2)))
    height = np.minimum(a[..., 0, 2], b[..., 0, 2]) - np.maximum(a[..., 4, 2], b[..., 4, 2])
    sides = [np.minimum(a[..., 0, k], b[..., 0, k]) - np.maximum(a[..., 2, k], b[..., 2, k]) for k in (0, 2)]
    shared = np.maximum(sides[0], 0) * np.maximum(sides[1], 0) * np.maximum(height, 0)
    union = np.maximum(volumes - shared, _LEAST_VOLUME)
    sound = (hull > _LEAST_HULL) & (volumes > _LEAST_SUM)
    return np.where(sound, shared / union - (1 - union / np.where(sound, hull, 1)), 0.0)


def _edge_volume(corners: np.ndarray) -> np.ndarray:
    """Volume `(...)` of boxes `(..., 8, 3)` from the three edges at corners 0, 1, 2 and 4, each at least 1 mm."""
    edges = [((corners[..., i, :] - corners[..., j, :]) ** 2).sum(axis=-1) for i, j in ((0, 1), (1, 2), (0, 4))]
    lengths = [np.sqrt(np.maximum(edge, _LEAST_EDGE_SQUARED)) for edge in edges]
    return np.maximum(lengths[0] * lengths[1] * lengths[2], _LEAST_VOLUME)


def _volume(extents: np.ndarray) -> np.ndarray:
    """Product of extents `(..., 3)`, in this order: in float32 it decides the last digit."""
    return extents[..., 0] * extents[..., 1] * extents[..., 2]


def _corners(boxes: np.ndarray, count: int, what: str) -> np.ndarray:
    """Corners `(count, 8, 3)`, or one clear error."""
    boxes = np.asarray(boxes, dtype=np.float64)
    if boxes.shape != (count, 8, 3) or not np.isfinite(boxes).all():
        raise ValueError(
            f"scan2cap toolbox: {what}: wanted finite corners of shape ({count}, 8, 3); got shape {boxes.shape}"
        )
    return boxes


def toolbox_scores(
    scenes: Mapping[str, SceneCaptions], iou_thresholds: Sequence[float] = (0.0, 0.25, 0.5)
) -> dict[str, float]:
    """The benchmark toolbox's precision, recall and F1 of dense captions.

    Proposals and objects of a scene are matched one to one (`assignment_score`). The score of an object's caption counts where the boxes
    overlap enough.

    Args:
        scenes (`Mapping[str, SceneCaptions]`): By name, in the order of the corpus; each with at least one proposal.
        iou_thresholds (`Sequence[float]`): Overlaps that are enough.

    Returns:
        `dict[str, float]`: `<score>_<precision|recall|f1>@<threshold>`, fractions; F1 is NaN where precision and recall are 0, as in the toolbox.

    Raises:
        ValueError: No scene, one without proposals or objects, or boxes that do not fit.

    Source:
        Upstream: daveredrum/faster-captioning@32df70d benchmark/eval.py. An object that no proposal is left for gets the caption of the first
        proposal, as there; its box decides whether that counts.
    """
    matched = toolbox_texts(scenes)
    scores: dict[str, float] = {}
    for threshold in iou_thresholds:
        counts = matched.ious >= threshold
        for name in SCORES:
            if name not in matched.texts.each:
                continue
            total = float((matched.texts.each[name] * counts).sum())
            precision, recall = total / matched.proposals, total / len(counts)
            both = precision + recall
            scores[f"{name}_precision@{threshold:g}"] = precision
            scores[f"{name}_recall@{threshold:g}"] = recall
            scores[f"{name}_f1@{threshold:g}"] = 2 * precision * recall / both if both else float("nan")
    return scores


@dataclass(frozen=True, eq=False)
class ToolboxTexts:
    """Captions that were matched with the objects of all scenes.

    Args:
        texts (`TextScores`): Of the objects' captions, in the order of the scenes and of their objects.
        ious (`np.ndarray` of shape `(O,)`): Overlap of each object with the proposal whose caption it has.
        proposals (`int`): Of all scenes.

    Source:
        Ours.
    """

    texts: TextScores
    ious: np.ndarray
    proposals: int


def toolbox_texts(scenes: Mapping[str, SceneCaptions]) -> ToolboxTexts:
    """Match proposals with objects and score each object's caption.

    Args:
        scenes (`Mapping[str, SceneCaptions]`): As of `toolbox_scores`.

    Returns:
        `ToolboxTexts`

    Raises:
        ValueError: As of `toolbox_scores`.

    Source:
        Upstream: as of `toolbox_scores`.
    """
    if not scenes:
        raise ValueError("scan2cap toolbox: wanted at least one scene; got none")
    said, known, ious, proposals = [], [], [], 0
    for name, scene in scenes.items():
        if not scene.captions or not scene.references:
            raise ValueError(f"scan2cap toolbox: {name}: wanted objects and at least one proposal")
        found = _corners(scene.proposal_corners, len(scene.captions), f"{name}, proposals")
        true = _corners(scene.object_corners, len(scene.references), f"{name}, objects")
        chosen = np.zeros(len(true), dtype=np.int64)
        rows, columns = linear_sum_assignment(-assignment_score(found, true))
        chosen[columns] = rows
        proposals += len(found)
        said.extend(scene.captions[number] for number in chosen)
        known.extend(list(texts) for texts in scene.references)
        ious.extend(matched_overlap(found[chosen], true))
    return ToolboxTexts(text_scores(said, known, tokenize=False), np.asarray(ious), proposals)


__all__ = [
    "BOX_ORDER",
    "SceneCaptions",
    "ToolboxTexts",
    "assignment_score",
    "matched_overlap",
    "toolbox_scores",
    "toolbox_texts",
]
