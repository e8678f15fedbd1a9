"""Errors of camera poses: relative between all pairs of frames, and absolute after alignment; float64 throughout. `trajectory.py` has more of the latter.

Shapes: S frames, P = S (S - 1) / 2 pairs of frames in the order (0, 1), (0, 2), ..., (1, 2), ...
"""

import numpy as np
import torch

from vidllm.eval.metrics.answers import check_protocol


PROTOCOLS = ("vggt_i_inv_j", "vggt_older_inv_i_j", "pi3_j_inv_i")
ALIGNMENTS = ("none", "se3", "sim3")
BINNINGS = ("numpy", "torch_histc")
# What a comparison that is not finite counts as.
WORST_DEG = 1e6
# Added to lengths, metres: where two cameras stand at one place, the direction between them is rounding, and must not count as a direction.
LENGTH_EPSILON = 1e-15


def _inverse(poses: np.ndarray) -> np.ndarray:
    """Closed-form inverse of rigid transforms `(..., 4, 4)`."""
    turned = np.swapaxes(poses[..., :3, :3], -1, -2)
    inverse = np.zeros_like(poses)
    inverse[..., :3, :3] = turned
    inverse[..., :3, 3:] = -turned @ poses[..., :3, 3:]
    inverse[..., 3, 3] = 1
    return inverse


def _checked(cam_from_world: np.ndarray, name: str) -> np.ndarray:
    """Poses as float64 `(S, 4, 4)`."""
    poses = np.asarray(cam_from_world, dtype=np.float64)
    if poses.ndim != 3 or poses.shape[1:] != (4, 4):
        raise ValueError(f"camera_pose, {name}: wanted shape (frames, 4, 4); got {poses.shape}")
    return poses


def _relative(poses: np.ndarray, protocol: str) -> np.ndarray:
    """Relative poses `(P, 4, 4)` of all pairs; multiplied with PyTorch, whose rounding is the reference's.

    Between cameras at one place only that rounding is left of the translation.
    """
    forward = torch.from_numpy(np.array(poses, order="C"))
    turned = forward[:, :3, :3].transpose(1, 2)
    backward = torch.eye(4, dtype=forward.dtype).repeat(len(forward), 1, 1)
    backward[:, :3, :3] = turned
    backward[:, :3, 3:] = -torch.bmm(turned, forward[:, :3, 3:])
    i, j = np.triu_indices(len(poses), 1)
    if protocol == "vggt_i_inv_j":
        return torch.bmm(forward[i], backward[j]).numpy()
    if protocol == "vggt_older_inv_i_j":
        return torch.bmm(backward[i], forward[j]).numpy()
    return torch.bmm(forward[j], backward[i]).numpy()


def relative_pose_errors(
    predicted: np.ndarray, true: np.ndarray, protocol: str = "vggt_i_inv_j"
) -> tuple[np.ndarray, np.ndarray]:
    """Angle between predicted and true relative rotations, and between the directions of relative translations.

    Args:
        predicted (`np.ndarray` of shape `(S, 4, 4)`): cam_from_world, any world and any scale.
        true (`np.ndarray` of shape `(S, 4, 4)`): cam_from_world.
        protocol (`str`): How two poses T are composed: `vggt_i_inv_j` T_i inv(T_j), `vggt_older_inv_i_j` inv(T_i) T_j, `pi3_j_inv_i`
            T_j inv(T_i).

    Returns:
        `tuple` of two `np.ndarray` of shape `(P,)`: rotation and translation errors, degrees; of translations without sign, 0..90, 90
        where one has no length (near 90 where it is not longer than `LENGTH_EPSILON`). What is not finite counts as `WORST_DEG`.

    Raises:
        ValueError: Other shapes, different numbers of frames, an unknown protocol.

    Source:
        Upstream: facebookresearch/vggt@851d257 evaluation/test_co3d.py; yyfz/Pi3@97ce97b relpose/metric.py. Ours: angles by the arc tangent.
    """
    check_protocol("camera_pose", protocol, PROTOCOLS)
    predicted, true = _checked(predicted, "predictions"), _checked(true, "references")
    if len(predicted) != len(true):
        raise ValueError(f"camera_pose: wanted as many predicted as true poses; got {len(predicted)} and {len(true)}")
    a, b = _relative(predicted, protocol), _relative(true, protocol)
    with np.errstate(invalid="ignore", over="ignore"):
        rotation = turn_deg(np.swapaxes(a[:, :3, :3], 1, 2) @ b[:, :3, :3])
        translation = _direction_deg(a[:, :3, 3], b[:, :3, 3])
    return tuple(np.where(np.isfinite(errors), errors, WORST_DEG) for errors in (rotation, translation))


def turn_deg(rotations: np.ndarray) -> np.ndarray:
    """Angle of rotations.

    Args:
        rotations (`np.ndarray` of shape `(..., 3, 3)`): Rotations.

    Returns:
        `np.ndarray` of shape `(...,)`: degrees, 0..180; by the arc tangent, exact for small angles too.

    Source:
        Ours.
    """
    axis = np.stack([rotations[..., i, j] - rotations[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0))])
    return np.degrees(np.arctan2(np.linalg.norm(axis, axis=0), np.trace(rotations, axis1=-2, axis2=-1) - 1))


def _direction_deg(way_a: np.ndarray, way_b: np.ndarray) -> np.ndarray:
    """Angle `(P,)` between the lines of translations `(P, 3)`, degrees 0..90, from the cosine of vectors shortened by `LENGTH_EPSILON`."""
    length_a, length_b = np.linalg.norm(way_a, axis=1), np.linalg.norm(way_b, axis=1)
    unit_a, unit_b = way_a / (length_a + LENGTH_EPSILON)[:, None], way_b / (length_b + LENGTH_EPSILON)[:, None]
    kept_a, kept_b = length_a / (length_a + LENGTH_EPSILON), length_b / (length_b + LENGTH_EPSILON)
    lost_a, lost_b = (1 - kept_a) * (1 + kept_a), (1 - kept_b) * (1 + kept_b)
    # sine^2 = 1 - cosine^2 = |a x b|^2 + (1 - |a|^2 |b|^2)
    sine = np.sqrt((np.cross(unit_a, unit_b) ** 2).sum(axis=1) + lost_a + kept_a**2 * lost_b)
    return np.degrees(np.arctan2(sine, np.abs((unit_a * unit_b).sum(axis=1))))


def accuracy_curve_area(errors_deg: np.ndarray, limit_deg: int = 30, binning: str = "numpy") -> float:
    """Area under the curve of the share of pairs below each whole degree, 0 to the limit.

    Args:
        errors_deg (`np.ndarray` of shape `(P,)`): Larger of rotation and translation error per pair; at least one.
        limit_deg (`int`): Where the curve ends.
        binning (`str`): `numpy`: one bin per degree, the last one closed. `torch_histc`: one bin more between the same ends, as the PyTorch
            version of the same function has it.

    Returns:
        `float`: 0..1.

    Raises:
        ValueError: No pairs, or an unknown binning.

    Source:
        Upstream: facebookresearch/vggt@851d257 evaluation/test_co3d.py (`calculate_auc_np`); yyfz/Pi3@97ce97b relpose/metric.py (`calculate_auc`).
    """
    check_protocol("camera_pose", binning, BINNINGS, "binning")
    if not len(errors_deg):
        raise ValueError("camera_pose: wanted the errors of at least one pair of frames; got none")
    edges = limit_deg + 1 if binning == "numpy" else limit_deg + 2
    counts, _ = np.histogram(errors_deg, bins=np.linspace(0, limit_deg, edges))
    return float(np.mean(np.cumsum(counts / len(errors_deg))))


def align_points(source: np.ndarray, target: np.ndarray, with_scale: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """Least-squares rotation, translation and scale that carry points onto others.

    Args:
        source (`np.ndarray` of shape `(S, 3)`): Points.
        target (`np.ndarray` of shape `(S, 3)`): Where they should be.
        with_scale (`bool`): Whether the scale is free; else 1.

    Returns:
        `tuple`: rotation (`np.ndarray` of shape `(3, 3)`), translation (`np.ndarray` of shape `(3,)`), scale: target = scale * rotation @ source + translation.

    Source:
        Upstream: Umeyama, PAMI 1991.
    """
    from_middle, to_middle = source.mean(axis=0), target.mean(axis=0)
    a, b = source - from_middle, target - to_middle
    u, spread, vt = np.linalg.svd(b.T @ a / len(a))
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt)) or 1.0])
    rotation = (u * signs) @ vt
    variance = (a**2).sum() / len(a)
    scale = float((spread * signs).sum() / variance) if with_scale and variance > 0 else 1.0
    return rotation, to_middle - scale * rotation @ from_middle, scale


def trajectory_error_m(predicted: np.ndarray, true: np.ndarray, alignment: str = "se3") -> float:
    """Absolute trajectory error: root mean square distance of camera centres.

    Args:
        predicted (`np.ndarray` of shape `(S, 4, 4)`): cam_from_world.
        true (`np.ndarray` of shape `(S, 4, 4)`): cam_from_world, metres.
        alignment (`str`): `none`, `se3` (rotation and translation: the scale counts), `sim3` (also the scale).

    Returns:
        `float`: metres; infinite if a predicted pose is not finite.

    Raises:
        ValueError: Other shapes, different numbers of frames, an unknown alignment.

    Source:
        Upstream: MichaelGrupp/evo (APE of translations after Umeyama's alignment).
    """
    check_protocol("camera_pose", alignment, ALIGNMENTS, "alignment")
    predicted, true = _checked(predicted, "predictions"), _checked(true, "references")
    if len(predicted) != len(true):
        raise ValueError(f"camera_pose: wanted as many predicted as true poses; got {len(predicted)} and {len(true)}")
    if not np.isfinite(predicted).all():
        return float("inf")
    centres, wanted = _inverse(predicted)[:, :3, 3], _inverse(true)[:, :3, 3]
    if alignment != "none":
        rotation, translation, scale = align_points(centres, wanted, alignment == "sim3")
        centres = scale * centres @ rotation.T + translation
    return float(np.sqrt(((centres - wanted) ** 2).sum(axis=1).mean()))


def pair_scores(rotation_deg: np.ndarray, translation_deg: np.ndarray, limit_deg: int = 30) -> dict[str, float]:
    """Scores of pairs of frames, of one scene or of several pooled.

    Args:
        rotation_deg (`np.ndarray` of shape `(P,)`): Rotation errors.
        translation_deg (`np.ndarray` of shape `(P,)`): Translation errors.
        limit_deg (`int`): Threshold, degrees.

    Returns:
        `dict[str, float]`: `auc_<limit>`, `rra_<limit>`, `rta_<limit>`, see `camera_pose_scores`.

    Raises:
        ValueError: No pairs.

    Source:
        Upstream: facebookresearch/vggt@851d257 evaluation/test_co3d.py.
    """
    return {
        f"auc_{limit_deg}": accuracy_curve_area(np.maximum(rotation_deg, translation_deg), limit_deg),
        f"rra_{limit_deg}": float((rotation_deg < limit_deg).mean()),
        f"rta_{limit_deg}": float((translation_deg < limit_deg).mean()),
    }


def camera_pose_scores(
    predicted: np.ndarray, true: np.ndarray, protocol: str = "vggt_i_inv_j", limit_deg: int = 30
) -> dict[str, float]:
    """Scores of one scene's poses.

    Args:
        predicted (`np.ndarray` of shape `(S, 4, 4)`): cam_from_world.
        true (`np.ndarray` of shape `(S, 4, 4)`): cam_from_world, metres.
        protocol (`str`): One of `PROTOCOLS`, see `relative_pose_errors`.
        limit_deg (`int`): Threshold, degrees.

    Returns:
        `dict[str, float]`: `rra_30`, `rta_30` (shares of pairs whose rotation, translation error is below the threshold), `auc_30` (area
        under the curve of the larger of the two), `ate_m` (`trajectory_error_m` with `se3`); of a single frame nothing.

    Raises:
        ValueError: See `relative_pose_errors`.

    Source:
        Upstream: facebookresearch/vggt@851d257 evaluation/test_co3d.py. Ours: all pairs of the sampled frames.
    """
    rotation, translation = relative_pose_errors(predicted, true, protocol)
    if not len(rotation):
        return {}
    return {**pair_scores(rotation, translation, limit_deg), "ate_m": trajectory_error_m(predicted, true)}


__all__ = [
    "ALIGNMENTS",
    "BINNINGS",
    "PROTOCOLS",
    "accuracy_curve_area",
    "align_points",
    "camera_pose_scores",
    "pair_scores",
    "relative_pose_errors",
    "trajectory_error_m",
    "turn_deg",
]
