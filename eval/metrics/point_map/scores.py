"""How two clouds of points agree. NumPy arrays, no tensors.

Shapes: P predicted points, T true points; float32 or float64, same frame and unit.
"""

import numpy as np
from scipy.spatial import cKDTree


def voxel_means(points: np.ndarray, size: float) -> np.ndarray:
    """Mean of the points in each cell of a grid.

    Args:
        points (`np.ndarray` of shape `(P, 3)`): Any frame and unit.
        size (`float`): Edge of a cell, same unit.

    Returns:
        `np.ndarray` of shape `(cells, 3)`, float64.

    Raises:
        ValueError: The size is not positive, or there is no point.

    Source:
        Upstream: Open3D 0.19 `voxel_down_sample`: the grid starts half a cell below the cloud's own smallest coordinates.
    """
    points = _checked(points, "points")
    if not size > 0:
        raise ValueError(f"voxels: wanted a positive size; got {size}")
    cells = np.floor((points - (points.min(axis=0) - size / 2)) / size).astype(np.int64)
    _, cell_of, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), 3))
    np.add.at(sums, cell_of.reshape(-1), points)
    return sums / counts[:, None]


def point_scores(
    predicted: np.ndarray,
    true: np.ndarray,
    threshold: float = 0.05,
    voxel_size: float | None = 0.02,
) -> dict[str, float]:
    """Distances to the nearest point of the other cloud, both ways, and the F-score at a threshold.

    Args:
        predicted (`np.ndarray` of shape `(P, 3)`): Metres.
        true (`np.ndarray` of shape `(T, 3)`): Metres, same frame.
        threshold (`float`): A point counts if the other cloud has one nearer than this, metres.
        voxel_size (`float`, *optional*): Both clouds are thinned to cells of this size first; None leaves them.

    Returns:
        `dict[str, float]`: `accuracy` (mean, predicted to true), `accuracy_median`, `completeness` (true to predicted), `completeness_median`,
        `chamfer` (mean of both means), metres; `precision`, `recall`, `fscore`, fractions; `fscore_5cm` too where that is the threshold.

    Raises:
        ValueError: A cloud is empty or not finite.

    Source:
        Upstream: CUT3R/CUT3R@8bc15dc eval/mv_recon/utils.py; ByteDance-Seed/Depth-Anything-3@2c21ea8 src/depth_anything_3/bench/utils.py (nearer than
        the threshold, 0 where precision and recall are). Clouds are not aligned here.
    """
    if not threshold > 0:
        raise ValueError(f"point scores: wanted a positive threshold; got {threshold}")
    clouds = [_checked(predicted, "predicted"), _checked(true, "true")]
    if voxel_size is not None:
        clouds = [voxel_means(points, voxel_size) for points in clouds]
    to_true, _ = cKDTree(clouds[1]).query(clouds[0])
    to_predicted, _ = cKDTree(clouds[0]).query(clouds[1])
    precision, recall = float((to_true < threshold).mean()), float((to_predicted < threshold).mean())
    both = precision + recall
    scores = {
        "accuracy": float(to_true.mean()),
        "accuracy_median": float(np.median(to_true)),
        "completeness": float(to_predicted.mean()),
        "completeness_median": float(np.median(to_predicted)),
        "chamfer": float((to_true.mean() + to_predicted.mean()) / 2),
        "precision": precision,
        "recall": recall,
        "fscore": 2 * precision * recall / both if both else 0.0,
    }
    return {**scores, "fscore_5cm": scores["fscore"]} if threshold == 0.05 else scores


def normal_consistency(
    predicted: np.ndarray, predicted_normals: np.ndarray, true: np.ndarray, true_normals: np.ndarray
) -> dict[str, float]:
    """How normals agree with those of the nearest point of the other cloud, whichever way they point.

    Args:
        predicted (`np.ndarray` of shape `(P, 3)`): Points.
        predicted_normals (`np.ndarray` of shape `(P, 3)`): Of length 1.
        true (`np.ndarray` of shape `(T, 3)`): Points, same frame and unit.
        true_normals (`np.ndarray` of shape `(T, 3)`): Of length 1.

    Returns:
        `dict[str, float]`: `normals_accuracy`, `normals_accuracy_median` (predicted to true), `normals_completeness`,
        `normals_completeness_median` (true to predicted), `normals` (mean of both means).

    Raises:
        ValueError: A cloud is empty or not finite, or has another number of normals than points.

    Source:
        Upstream: CUT3R/CUT3R@8bc15dc eval/mv_recon/utils.py (nc1, nc2).
    """
    clouds = (_checked(predicted, "predicted"), _checked(true, "true"))
    normals = (_checked(predicted_normals, "predicted_normals"), _checked(true_normals, "true_normals"))
    for points, vectors in zip(clouds, normals, strict=True):
        if points.shape != vectors.shape:
            raise ValueError(f"normals: wanted one per point, {points.shape}; got {vectors.shape}")
    found: dict[str, float] = {}
    for name, own, other in (("accuracy", 0, 1), ("completeness", 1, 0)):
        _, nearest = cKDTree(clouds[other]).query(clouds[own])
        alike = np.abs((normals[own] * normals[other][nearest]).sum(axis=1))
        found[f"normals_{name}"], found[f"normals_{name}_median"] = float(alike.mean()), float(np.median(alike))
    return {**found, "normals": (found["normals_accuracy"] + found["normals_completeness"]) / 2}


def _checked(points: np.ndarray, name: str) -> np.ndarray:
    """Points as float64, or one clear error."""
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points) or not np.isfinite(points).all():
        raise ValueError(f"{name}: wanted at least one finite point, shape (points, 3); got shape {points.shape}")
    return points


__all__ = ["normal_consistency", "point_scores", "voxel_means"]
