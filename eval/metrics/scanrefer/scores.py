"""ScanRefer's scores of boxes.

Shapes: M descriptions, each with one true box.
"""

from collections.abc import Sequence

import numpy as np

from vidllm.eval.metrics.answers import check_lengths, check_protocol


PROTOCOLS = ("official",)
THRESHOLDS = (0.25, 0.5)
KINDS = ("unique", "multiple")
CLASSES = ("not_in_others", "in_others")
IOU_EPSILON = 1e-8


def _limits(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper limits `(..., 3)` of boxes `(..., 6)` (centre, edge lengths) or of their corners `(..., 8, 3)`."""
    if boxes.shape[-2:] == (8, 3):
        return boxes.min(axis=-2), boxes.max(axis=-2)
    if boxes.shape[-1:] == (6,):
        # A negative edge spans the same corners.
        return boxes[..., :3] - np.abs(boxes[..., 3:]) / 2, boxes[..., :3] + np.abs(boxes[..., 3:]) / 2
    raise ValueError(f"boxes: wanted shape (..., 6) or (..., 8, 3); got {boxes.shape}")


def scanrefer_iou(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """Intersection over union of axis-aligned boxes as ScanRefer computes it.

    Args:
        boxes_a (`np.ndarray` of shape `(..., 6)` or `(..., 8, 3)`): `(cx, cy, cz, dx, dy, dz)`, or corners in any order.
        boxes_b (`np.ndarray` of shape `(..., 6)` or `(..., 8, 3)`): In the same frame and unit.

    Returns:
        `np.ndarray` of shape `(...,)`, float64: 0..1; of a box that is not finite 0.

    Raises:
        ValueError: Another shape.

    Source:
        Upstream: daveredrum/ScanRefer@9d74830 utils/box_util.py. Its denominator is larger by 1e-8, so that an overlap of exactly one half
        stays below the threshold of one half.
    """
    low_a, high_a = _limits(np.asarray(boxes_a, dtype=np.float64))
    low_b, high_b = _limits(np.asarray(boxes_b, dtype=np.float64))
    with np.errstate(invalid="ignore", over="ignore"):
        shared = np.maximum(np.minimum(high_a, high_b) - np.maximum(low_a, low_b), 0).prod(axis=-1)
        union = (high_a - low_a).prod(axis=-1) + (high_b - low_b).prod(axis=-1) - shared
        overlap = shared / (union + IOU_EPSILON)
    finite_a, finite_b = (
        np.isfinite(low).all(axis=-1) & np.isfinite(high).all(axis=-1)
        for low, high in ((low_a, high_a), (low_b, high_b))
    )
    return np.where(finite_a & finite_b & np.isfinite(overlap), overlap, 0.0)


def scanrefer_scores(
    predictions: Sequence[np.ndarray | None],
    references: Sequence[np.ndarray],
    kinds: Sequence[str] | None = None,
    protocol: str = "official",
    in_others: Sequence[bool] | None = None,
) -> dict[str, float]:
    """Score the boxes found for descriptions.

    Args:
        predictions (`Sequence` of `np.ndarray` of shape `(6,)` or `(8, 3)`): A box per description, annotation frame, metres; None, an empty
            one and one that is not finite are misses.
        references (`Sequence` of `np.ndarray` of shape `(6,)` or `(8, 3)`): True boxes.
        kinds (`Sequence[str]`, *optional*): `unique` or `multiple` per description.
        protocol (`str`): `official`: a box counts if its overlap is at least the threshold.
        in_others (`Sequence[bool]`, *optional*): Whether each object is of ScanRefer's class `others`.

    Returns:
        `dict[str, float]`: `acc_0.25`, `acc_0.5`, fractions; with kinds also `unique/acc_0.25`, ...; with `in_others` also `in_others/acc_0.25`,
        `not_in_others/acc_0.25`, ..., with both `unique/in_others/acc_0.25`, ...; 0 where a part is empty.

    Raises:
        ValueError: Columns of unequal length, an unknown kind or protocol, a box of another shape, a true box that is not finite.

    Source:
        Upstream: daveredrum/ScanRefer@9d74830 benchmark/eval.py (absent boxes have overlap 0; an empty subset scores 0).
    """
    check_protocol("scanrefer", protocol, PROTOCOLS)
    check_lengths("scanrefer", predictions=predictions, references=references, kinds=kinds, in_others=in_others)
    overlaps = scanrefer_overlaps(predictions, references)
    return {
        f"{name}acc_{t}": float((overlaps[chosen] >= t).mean()) if chosen.any() else 0.0
        for name, chosen in _parts(len(overlaps), kinds, in_others).items()
        for t in THRESHOLDS
    }


def scanrefer_overlaps(predictions: Sequence[np.ndarray | None], references: Sequence[np.ndarray]) -> np.ndarray:
    """Overlaps that the scores are shares of.

    Args:
        predictions (`Sequence` of `np.ndarray` of shape `(6,)` or `(8, 3)`): As of `scanrefer_scores`.
        references (`Sequence` of `np.ndarray` of shape `(6,)` or `(8, 3)`): As of `scanrefer_scores`.

    Returns:
        `np.ndarray` of shape `(M,)`: of a miss 0.

    Raises:
        ValueError: Columns of unequal length, a box of another shape, a true box that is not finite.

    Source:
        Upstream: as of `scanrefer_scores`.
    """
    check_lengths("scanrefer", predictions=predictions, references=references)
    return np.array([_overlap(*pair, row) for row, pair in enumerate(zip(predictions, references, strict=True))])


def scanrefer_counts(kinds: Sequence[str], in_others: Sequence[bool] | None = None) -> dict[str, int]:
    """How many descriptions each part has.

    Args:
        kinds (`Sequence[str]`): `unique` or `multiple` per description.
        in_others (`Sequence[bool]`, *optional*): Whether each object is of ScanRefer's class `others`.

    Returns:
        `dict[str, int]`: `all`, `unique`, `multiple`; with `in_others` also `in_others`, `unique/in_others`, ...

    Raises:
        ValueError: Columns of unequal length, or an unknown kind.

    Source:
        Upstream: daveredrum/ScanRefer@9d74830 benchmark/eval.py.
    """
    check_lengths("scanrefer", kinds=kinds, in_others=in_others)
    parts = _parts(len(kinds), kinds, in_others)
    return {name.removesuffix("/") or "all": int(chosen.sum()) for name, chosen in parts.items()}


def _parts(count: int, kinds: Sequence[str] | None, in_others: Sequence[bool] | None) -> dict[str, np.ndarray]:
    """Masks `(M,)` by the part's name with its slash; all descriptions first, under the empty name."""
    parts = {"": np.ones(count, dtype=bool)}
    if kinds is not None:
        unknown = sorted(set(kinds) - set(KINDS))
        if unknown:
            raise ValueError(f"scanrefer, kinds: wanted {' or '.join(KINDS)}; got {unknown[0]!r}")
        parts.update({f"{kind}/": np.array(kinds) == kind for kind in KINDS})
    if in_others is not None:
        of_others = np.array([bool(mark) for mark in in_others])
        masks = dict(zip(CLASSES, (~of_others, of_others), strict=True))
        parts.update(
            {f"{name}{kind}/": mask & chosen for name, chosen in parts.items() for kind, mask in masks.items()}
        )
    return parts


def _overlap(predicted: np.ndarray | None, true: np.ndarray, row: int) -> float:
    """Overlap of one description's box, 0 without one."""
    true = np.asarray(true, dtype=np.float64)
    if not np.isfinite(true).all():
        raise ValueError(f"scanrefer, references, row {row}: wanted a finite box; got {true.tolist()!r:.80}")
    if predicted is None or len(predicted) == 0:
        _limits(true)
        return 0.0
    return float(scanrefer_iou(np.asarray(predicted, dtype=np.float64), true))


__all__ = [
    "CLASSES",
    "PROTOCOLS",
    "THRESHOLDS",
    "scanrefer_counts",
    "scanrefer_iou",
    "scanrefer_overlaps",
    "scanrefer_scores",
]
