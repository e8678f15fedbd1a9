"""Boxes that may be turned: nine numbers, their exact overlap, and ScanRefer's shares by it (the protocol `oriented`).

Shapes: M boxes. A box is `(cx, cy, cz, dx, dy, dz, a, b, c)`: metres, and the turn `Rz(a) Rx(b) Ry(c)` in radians about its centre.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np

from vidllm.eval.metrics.answers import check_lengths
from vidllm.eval.metrics.scanrefer.scores import KINDS, THRESHOLDS


# How far outside a point may lie and count as inside, in shares of the half edges: rounding must not lose a common corner.
_SLACK = 1e-9
_CORNERS = np.array(list(product((-1.0, 1.0), repeat=3)))
# The corners at the ends of each of the twelve edges: those that differ in one coordinate.
_EDGES = np.array([(i, j) for i in range(8) for j in range(i) if np.abs(_CORNERS[i] - _CORNERS[j]).sum() == 2])


def rotation_of(angles_rad: np.ndarray) -> np.ndarray:
    """Rotation of three angles.

    Args:
        angles_rad (`np.ndarray` of shape `(3,)`): a, b, c.

    Returns:
        `np.ndarray` of shape `(3, 3)`: `Rz(a) Rx(b) Ry(c)`.

    Source:
        Upstream: OpenRobotLab/EmbodiedScan `EulerDepthInstance3DBoxes` (order ZXY), which VG-LLM writes.
    """
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles_rad), np.sin(angles_rad)
    about_z = np.array([[ca, -sa, 0], [sa, ca, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cb, -sb], [0, sb, cb]])
    about_y = np.array([[cc, 0, sc], [0, 1, 0], [-sc, 0, cc]])
    return about_z @ about_x @ about_y


def angles_of(rotation: np.ndarray) -> np.ndarray:
    """Angles of a rotation; the inverse of `rotation_of`.

    Args:
        rotation (`np.ndarray` of shape `(3, 3)`): Of determinant 1.

    Returns:
        `np.ndarray` of shape `(3,)`, radians; where b is a right angle, c is 0.

    Source:
        Ours.
    """
    b = np.arcsin(np.clip(rotation[2, 1], -1, 1))
    if np.hypot(rotation[0, 1], rotation[1, 1]) < 1e-9:
        return np.array([np.arctan2(rotation[1, 0], rotation[0, 0]), b, 0.0])
    return np.array([np.arctan2(-rotation[0, 1], rotation[1, 1]), b, np.arctan2(-rotation[2, 0], rotation[2, 2])])


def oriented_corners(box: np.ndarray) -> np.ndarray:
    """Corners of a box.

    Args:
        box (`np.ndarray` of shape `(9,)`): See above.

    Returns:
        `np.ndarray` of shape `(8, 3)`.

    Source:
        Ours.
    """
    box = np.asarray(box, dtype=np.float64)
    return box[:3] + (_CORNERS * box[3:6] / 2) @ rotation_of(box[6:]).T


def oriented_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two turned boxes.

    Args:
        a (`np.ndarray` of shape `(9,)`): Edge lengths from 0.
        b (`np.ndarray` of shape `(9,)`): In the same frame and unit.

    Returns:
        `float`: 0..1; 0 where one has no volume.

    Source:
        Upstream: facebookresearch/pytorch3d `box3d_overlap`, by which VG-LLM scores (what it computes). Ours: the common body's corners are
        corners of one inside the other and points where an edge meets a face; its volume is that of their hull.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    volumes = a[3:6].prod() + b[3:6].prod()
    reach = (np.linalg.norm(a[3:6]) + np.linalg.norm(b[3:6])) / 2
    if min(a[3:6].min(), b[3:6].min()) <= 0 or np.linalg.norm(a[:3] - b[:3]) >= reach:
        return 0.0
    # Both seen from the other: there the other is axis-aligned around the origin.
    turn_a, turn_b = rotation_of(a[6:]), rotation_of(b[6:])
    a_seen_from_b = (oriented_corners(a) - b[:3]) @ turn_b
    b_seen_from_a = (oriented_corners(b) - a[:3]) @ turn_a
    of_a = _inside(a_seen_from_b, b[3:6] / 2) @ turn_b.T + b[:3]
    of_b = _inside(b_seen_from_a, a[3:6] / 2) @ turn_a.T + a[:3]
    shared = _hull_volume(np.concatenate([of_a, of_b]) - b[:3])
    return float(np.clip(shared / (volumes - shared), 0, 1))


def _inside(corners: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Corners `(8, 3)` of one box that lie inside the other, which reaches to `half` `(3,)` on both sides, and points where its edges meet its faces."""
    start, way = corners[_EDGES[:, 0]], corners[_EDGES[:, 1]] - corners[_EDGES[:, 0]]
    found = [corners]
    for axis, sign in product(range(3), (-1, 1)):
        crosses = np.abs(way[:, axis]) > 0
        share = (sign * half[axis] - start[crosses, axis]) / way[crosses, axis]
        meets = (share >= 0) & (share <= 1)
        found.append(start[crosses][meets] + share[meets, None] * way[crosses][meets])
    points = np.concatenate(found)
    return points[(np.abs(points) <= half * (1 + _SLACK)).all(axis=1)]


def _hull_volume(points: np.ndarray) -> float:
    """Volume of the hull of points `(n, 3)`; 0 of a flat one."""
    from scipy.spatial import ConvexHull, QhullError

    if len(points) < 4:
        return 0.0
    try:
        return float(ConvexHull(points).volume)
    except QhullError:
        return 0.0


def oriented_scores(
    predictions: Sequence[Sequence[float] | None],
    references: Sequence[Sequence[float]],
    kinds: Sequence[str] | None = None,
) -> dict[str, float]:
    """Score turned boxes of descriptions by their exact overlap.

    Args:
        predictions (`Sequence`): A box of nine numbers per description, annotation frame, metres; None is a miss.
        references (`Sequence`): True boxes of six numbers, which are not turned.
        kinds (`Sequence[str]`, *optional*): `unique` or `multiple` per description.

    Returns:
        `dict[str, float]`: `acc_0.25`, `acc_0.5`, fractions; with kinds also `unique/acc_0.25`, ...; 0 where there is none of a kind.

    Raises:
        ValueError: Columns of unequal length.

    Source:
        Upstream: LaVi-Lab/VG-LLM (ScanRefer by the overlap of turned boxes). Ours: the threshold itself is enough, as in ScanRefer.
    """
    check_lengths("oriented", predictions=predictions, references=references, kinds=kinds)
    overlaps = oriented_overlaps(predictions, references)
    scores = {f"acc_{t}": float((overlaps >= t).mean()) for t in THRESHOLDS}
    for kind in KINDS if kinds is not None else ():
        chosen = overlaps[np.array(kinds) == kind]
        scores.update({f"{kind}/acc_{t}": float((chosen >= t).mean()) if chosen.size else 0.0 for t in THRESHOLDS})
    return scores


def oriented_overlaps(
    predictions: Sequence[Sequence[float] | None], references: Sequence[Sequence[float]]
) -> np.ndarray:
    """Overlaps that the scores are shares of.

    Args:
        predictions (`Sequence`): As of `oriented_scores`.
        references (`Sequence`): As of `oriented_scores`.

    Returns:
        `np.ndarray` of shape `(M,)`: of a miss 0.

    Raises:
        ValueError: Columns of unequal length.

    Source:
        Upstream: as of `oriented_scores`.
    """
    check_lengths("oriented", predictions=predictions, references=references)
    return np.array(
        [
            0.0 if box is None else oriented_iou(np.asarray(box), np.array([*true, 0, 0, 0]))
            for box, true in zip(predictions, references, strict=True)
        ]
    )


__all__ = ["angles_of", "oriented_corners", "oriented_iou", "oriented_overlaps", "oriented_scores", "rotation_of"]
