"""ScanRefer's scores of boxes.

Shapes: M descriptions, each with one true box.
"""

from collections.abc import Sequence

import numpy as np

from vidllm.eval.metrics.answers import check_lengths, check_protocol


PROTOCOLS = ("official",)
THRESHOLDS = (0.25, 0.5)
KINDS = ("unique", "multiple")
IOU_EPSILON = 1e-8


def _limits(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper limits `(..., 3)` of boxes `(..., 6)` (centre, edge lengths) or of their corners `(..., 8, 3)`."""
    if boxes.shape[-2:] == (8, 3):
        return boxes.min(axis=-2), boxes.max(axis=-2)
    if boxes.shape[-1:] == (6,):
        return boxes[..., :3] - boxes[..., 3:] / 2, boxes[..., :3] + boxes[..., 3:] / 2
    raise ValueError(f"boxes: wanted shape (..., 6) or (..., 8, 3); got {boxes.shape}")


def scanrefer_iou(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """Intersection over union of axis-aligned boxes as ScanRefer computes it.

    Args:
        boxes_a (`np.ndarray` of shape `(..., 6)` or `(..., 8, 3)`): `(cx, cy, cz, dx, dy, dz)`, or corners in any order.
        boxes_b (`np.ndarray` of shape `(..., 6)` or `(..., 8, 3)`): In the same frame and unit.

    Returns:
        `np.ndarray` of shape `(...,)`, float64: 0..1.

    Raises:
        ValueError: Another shape.

    Source:
        Upstream: daveredrum/ScanRefer@9d74830 utils/box_util.py. Its denominator is larger by 1e-8, so that an overlap of exactly one half
        stays below the threshold of one half.
    """
    low_a, high_a = _limits(np.asarray(boxes_a, dtype=np.float64))
    low_b, high_b = _limits(np.asarray(boxes_b, dtype=np.float64))
    shared = np.maximum(np.minimum(high_a, high_b) - np.maximum(low_a, low_b), 0).prod(axis=-1)
    union = (high_a - low_a).prod(axis=-1) + (high_b - low_b).prod(axis=-1) - shared
    return shared / (union + IOU_EPSILON)


def scanrefer_scores(
    predictions: Sequence[np.ndarray | None],
    references: Sequence[np.ndarray],
    kinds: Sequence[str] | None = None,
    protocol: str = "official",
) -> dict[str, float]:
    """Score the boxes found for descriptions.

    Args:
        predictions (`Sequence` of `np.ndarray` of shape `(6,)` or `(8, 3)`): A box per description, annotation frame, metres; None or an
            empty one is a miss.
        references (`Sequence` of `np.ndarray` of shape `(6,)` or `(8, 3)`): True boxes.
        kinds (`Sequence[str]`, *optional*): `unique` or `multiple` per description.
        protocol (`str`): `official`: a box counts if its overlap is at least the threshold.

    Returns:
        `dict[str, float]`: `acc_0.25`, `acc_0.5`, fractions; with kinds also `unique/acc_0.25`, ...; 0 where there is none of a kind.

    Raises:
        ValueError: Columns of unequal length, an unknown kind or protocol.

    Source:
        Upstream: daveredrum/ScanRefer@9d74830 benchmark/eval.py (absent boxes have overlap 0; an empty subset scores 0).
    """
    check_protocol("scanrefer", protocol, PROTOCOLS)
    check_lengths("scanrefer", predictions=predictions, references=references, kinds=kinds)
    if kinds is not None and set(kinds) - set(KINDS):
        raise ValueError(f"scanrefer, kinds: wanted {' or '.join(KINDS)}; got {sorted(set(kinds) - set(KINDS))[0]!r}")
    overlaps = np.array(
        [
            0.0 if box is None or len(box) == 0 else float(scanrefer_iou(np.asarray(box), np.asarray(true)))
            for box, true in zip(predictions, references, strict=True)
        ]
    )
    scores = {f"acc_{t}": float((overlaps >= t).mean()) for t in THRESHOLDS}
    for kind in KINDS if kinds is not None else ():
        chosen = overlaps[np.array(kinds) == kind]
        scores.update({f"{kind}/acc_{t}": float((chosen >= t).mean()) if chosen.size else 0.0 for t in THRESHOLDS})
    return scores


__all__ = ["PROTOCOLS", "THRESHOLDS", "scanrefer_iou", "scanrefer_scores"]
