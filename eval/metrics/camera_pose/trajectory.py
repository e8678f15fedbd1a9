"""Errors of camera trajectories after alignment, absolute and from frame to frame, with their statistics; TUM rows; and the frames that VGGT's protocol samples.

Shapes: S frames; T frames of another trajectory.
"""

from collections.abc import Sequence

import numpy as np

from vidllm.eval.metrics.answers import check_protocol
from vidllm.eval.metrics.camera_pose.scores import ALIGNMENTS, _checked, _inverse, align_points, turn_deg


def trajectory_errors(predicted: np.ndarray, true: np.ndarray, alignment: str = "se3") -> dict[str, np.ndarray]:
    """Errors of each frame, and of each step from one frame to the next.

    Args:
        predicted (`np.ndarray` of shape `(S, 4, 4)`): cam_from_world.
        true (`np.ndarray` of shape `(S, 4, 4)`): cam_from_world, metres, in the same order.
        alignment (`str`): Of camera centres, before anything is compared: `none`, `se3` (rotation and translation: the scale counts),
            `sim3` (also the scale).

    Returns:
        `dict[str, np.ndarray]`: `ate_m` of shape `(S,)`, distance of camera centres, metres; `ape_rot_deg` of shape `(S,)`, angle between the
        cameras; `rpe_trans_m` and `rpe_rot_deg` of shape `(S - 1,)`, length and angle of the difference of steps. All infinite if a
        predicted pose is not finite.

    Raises:
        ValueError: Other shapes, different numbers of frames, an unknown alignment.

    Source:
        Upstream: MichaelGrupp/evo 1.38 (APE and RPE with delta of one frame, all pairs, on the aligned trajectory). Ours: centres on one line or at
        one point are aligned too, where evo refuses.
    """
    check_protocol("camera_pose", alignment, ALIGNMENTS, "alignment")
    predicted, true = _checked(predicted, "predictions"), _checked(true, "references")
    if len(predicted) != len(true):
        raise ValueError(f"camera_pose: wanted as many predicted as true poses; got {len(predicted)} and {len(true)}")
    frames, steps = len(true), max(len(true) - 1, 0)
    if not np.isfinite(predicted).all():
        counts = {"ate_m": frames, "ape_rot_deg": frames, "rpe_trans_m": steps, "rpe_rot_deg": steps}
        return {name: np.full(count, np.inf) for name, count in counts.items()}
    found, wanted = _inverse(predicted), _inverse(true)
    if alignment != "none" and frames:
        rotation, translation, scale = align_points(found[:, :3, 3], wanted[:, :3, 3], alignment == "sim3")
        found[:, :3, 3] = scale * found[:, :3, 3] @ rotation.T + translation
        found[:, :3, :3] = rotation @ found[:, :3, :3]
    own, other = (_inverse(poses[:-1]) @ poses[1:] for poses in (found, wanted))
    step = _inverse(other) @ own
    return {
        "ate_m": np.linalg.norm(found[:, :3, 3] - wanted[:, :3, 3], axis=1),
        "ape_rot_deg": turn_deg((_inverse(wanted) @ found)[:, :3, :3]),
        "rpe_trans_m": np.linalg.norm(step[:, :3, 3], axis=1),
        "rpe_rot_deg": turn_deg(step[:, :3, :3]),
    }


def error_statistics(errors: np.ndarray) -> dict[str, float]:
    """Statistics of errors.

    Args:
        errors (`np.ndarray` of shape `(N,)`): At least one.

    Returns:
        `dict[str, float]`: `rmse`, `mean`, `median`, `std` (of the population), `min`, `max`, in the unit of the errors; `sse`, the sum of squares.

    Raises:
        ValueError: No errors.

    Source:
        Upstream: MichaelGrupp/evo 1.38.
    """
    errors = np.asarray(errors, dtype=np.float64)
    if not len(errors):
        raise ValueError("camera_pose: wanted at least one error; got none")
    squares = float((errors**2).sum())
    # Of infinite errors the spread is not defined.
    spread = float(np.std(errors)) if np.isfinite(errors).all() else float("inf")
    return {
        "rmse": float(np.sqrt(squares / len(errors))),
        "mean": float(errors.mean()),
        "median": float(np.median(errors)),
        "std": spread,
        "min": float(errors.min()),
        "max": float(errors.max()),
        "sse": squares,
    }


def trajectory_scores(predicted: np.ndarray, true: np.ndarray, alignment: str = "se3") -> dict[str, float]:
    """Root mean squares of a scene's trajectory errors.

    Args:
        predicted (`np.ndarray` of shape `(S, 4, 4)`): cam_from_world.
        true (`np.ndarray` of shape `(S, 4, 4)`): cam_from_world, metres.
        alignment (`str`): See `trajectory_errors`.

    Returns:
        `dict[str, float]`: `ate_m`, `ape_rot_deg`, `rpe_trans_m`, `rpe_rot_deg`; of a single frame nothing, because alignment explains all of it.

    Raises:
        ValueError: See `trajectory_errors`.

    Source:
        Upstream: MichaelGrupp/evo 1.38; as CUT3R, MonST3R and Pi3 report it with `sim3`.
    """
    errors = trajectory_errors(predicted, true, alignment)
    if len(errors["ate_m"]) < 2:
        return {}
    return {name: error_statistics(values)["rmse"] for name, values in errors.items()}


def tum_poses(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Time stamps and poses of rows of a TUM trajectory.

    Args:
        rows (`np.ndarray` of shape `(S, 8)`): Time, camera centre x y z in the world, rotation camera to world as a quaternion x y z w of any length.

    Returns:
        `tuple`: times (`np.ndarray` of shape `(S,)`, seconds) and cam_from_world (`np.ndarray` of shape `(S, 4, 4)`), float64.

    Raises:
        ValueError: Another shape, or a quaternion of length 0 or not finite.

    Source:
        Upstream: TUM RGB-D benchmark (file format).
    """
    rows = np.asarray(rows, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != 8:
        raise ValueError(f"camera_pose, TUM rows: wanted shape (frames, 8); got {rows.shape}")
    lengths = np.linalg.norm(rows[:, 4:], axis=1)
    wrong = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(wrong):
        raise ValueError(
            f"camera_pose, TUM rows, row {wrong[0]}: wanted a quaternion; got {rows[wrong[0], 4:].tolist()}"
        )
    x, y, z, w = (rows[:, 4:] / lengths[:, None]).T
    world_from_cam = np.tile(np.eye(4), (len(rows), 1, 1))
    world_from_cam[:, :3, 3] = rows[:, 1:4]
    world_from_cam[:, 0, :3] = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], axis=1)
    world_from_cam[:, 1, :3] = np.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], axis=1)
    world_from_cam[:, 2, :3] = np.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], axis=1)
    return rows[:, 0], _inverse(world_from_cam)


def paired_by_time(times_a_s: np.ndarray, times_b_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames of two trajectories that have the same time stamp, in the order of time.

    Args:
        times_a_s (`np.ndarray` of shape `(S,)`): Seconds, in any order.
        times_b_s (`np.ndarray` of shape `(T,)`): Seconds, in any order.

    Returns:
        `tuple` of two `np.ndarray` of shape `(pairs,)`, int64: which frame of each.

    Raises:
        ValueError: A time stamp twice in one trajectory, or no pair.

    Source:
        Ours: stamps must be equal; nearest ones are not taken for pairs.
    """
    for times in (times_a_s, times_b_s):
        if len(np.unique(times)) != len(times):
            raise ValueError("camera_pose: wanted each time stamp once in a trajectory; got one twice")
    common, in_a, in_b = np.intersect1d(times_a_s, times_b_s, assume_unique=True, return_indices=True)
    if not len(common):
        raise ValueError("camera_pose: wanted time stamps that both trajectories have; got none")
    return in_a, in_b


def sampled_frames(lengths: Sequence[int], frames: int = 10, seed: int = 0) -> list[np.ndarray]:
    """Frames that VGGT's pose protocol compares.

    Args:
        lengths (`Sequence[int]`): Number of frames of each sequence, in the order in which they are scored.
        frames (`int`): How many of each.
        seed (`int`): Of NumPy's legacy generator, set once before the first sequence.

    Returns:
        `list` of `np.ndarray` of shape `(frames,)`, int64: in the order drawn, not sorted.

    Raises:
        ValueError: A sequence has fewer frames.

    Source:
        Upstream: facebookresearch/vggt@851d257 evaluation/test_co3d.py.
    """
    short = [length for length in lengths if length < frames]
    if short:
        raise ValueError(f"camera_pose: wanted sequences of at least {frames} frames; got one of {short[0]}")
    generator = np.random.RandomState(seed)
    return [generator.choice(length, frames, replace=False) for length in lengths]


__all__ = [
    "error_statistics",
    "paired_by_time",
    "sampled_frames",
    "trajectory_errors",
    "trajectory_scores",
    "tum_poses",
]
