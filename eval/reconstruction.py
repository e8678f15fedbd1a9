"""Scores of one scene's reconstruction, and of the constant reconstruction that looks at nothing.

Shapes: S sampled frames, H W pixels of the model's input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vidllm.eval.metrics.camera_pose.scores import camera_pose_scores
from vidllm.eval.metrics.depth.scores import MAX_DEPTH_M, PROTOCOLS, depth_scores
from vidllm.eval.metrics.metric_scale.scores import metric_scale_scores
from vidllm.eval.metrics.point_map.scores import point_scores
from vidllm.eval.truth import SceneTruth
from vidllm.modeling_vidllm.geometry_vidllm import START_ROOM_FROM_CAM, unproject_depth
from vidllm.modeling_vidllm.scene_vidllm import VidLLMReconstruction


POSE_PROTOCOL = "vggt_i_inv_j"
# How far the constant camera moves from one sampled frame to the next, along its x axis.
CONSTANT_STEP_M = 0.1
# So many points of a scene are compared at most, spread evenly over all pixels: more would take long and change little.
MOST_POINTS = 50_000
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True, eq=False)
class PlainReconstruction:
    """A reconstruction of one video as arrays.

    Args:
        cam_from_world (`np.ndarray` of shape `(S, 4, 4)`): World: camera of the first frame.
        depth (`np.ndarray` of shape `(S, H, W)`): Along the optical axis, 0 = invalid.
        points_world (`np.ndarray` of shape `(S, H, W, 3)`): World frame.
        room_from_world (`np.ndarray` of shape `(3, 3)`): Rotation to z up.

    Source:
        Ours.
    """

    cam_from_world: np.ndarray
    depth: np.ndarray
    points_world: np.ndarray
    room_from_world: np.ndarray


def plain(reconstruction: VidLLMReconstruction, row: int = 0) -> PlainReconstruction:
    """One row of the model's reconstruction as arrays on the CPU.

    Args:
        reconstruction (`VidLLMReconstruction`): Of videos of one size.
        row (`int`): Which video.

    Returns:
        `PlainReconstruction`: float32.

    Source:
        Ours.
    """
    names = ("cam_from_world", "depth", "points_world", "room_from_world")
    return PlainReconstruction(
        **{name: getattr(reconstruction, name)[row].detach().float().cpu().numpy() for name in names}
    )


def constant_reconstruction(truth: SceneTruth, depth_m: float) -> PlainReconstruction:
    """What can be said without looking: the camera moves evenly to its right, and everything is equally far from it.

    Args:
        truth (`SceneTruth`): Read for the number of frames, the size, and the intrinsics.
        depth_m (`float`): That distance along the optical axis, metres.

    Returns:
        `PlainReconstruction`: unturned poses `CONSTANT_STEP_M` apart, constant depth, and the room rotation that the model starts from (a
        first camera held upright and level).

    Source:
        Ours: a camera that stood still would have no direction of motion, which counts as wrong everywhere, and be too easy to beat.
    """
    cam_from_world = np.tile(np.eye(4, dtype=np.float32), (len(truth.cam_from_world), 1, 1))
    cam_from_world[:, 0, 3] = -CONSTANT_STEP_M * np.arange(len(cam_from_world))
    shape = (0, 0, 0) if truth.depth_m is None else truth.depth_m.shape
    depth = np.full(shape, depth_m, dtype=np.float32)
    points = _unproject(depth, truth.intrinsics_px, cam_from_world) if depth.size else np.zeros((*shape, 3))
    return PlainReconstruction(cam_from_world, depth, points, np.array(START_ROOM_FROM_CAM))


def score_reconstruction(predicted: PlainReconstruction, truth: SceneTruth) -> Scores:
    """Score one scene.

    Args:
        predicted (`PlainReconstruction`): In the pixels of the model's input.
        truth (`SceneTruth`): With poses and intrinsics; depth and annotation frame where they are known.

    Returns:
        `dict` by protocol: `vggt_i_inv_j` (`auc_30`, `rra_30`, `rta_30`, `ate_m`), `metric`, `median`, `scale`, `scale_shift`
        (`abs_rel`, `delta_1`), `metric` also `fscore_5cm`, `accuracy_m`, `completeness_m` (see `point_map_scores`), `scale_error`, `up_error_deg`,
        `heading_error_deg`.

    Source:
        Ours: what of it can be scored is scored; nothing corrects the scale but where the protocol's name says so.
    """
    scores: Scores = {POSE_PROTOCOL: camera_pose_scores(predicted.cam_from_world, truth.cam_from_world, POSE_PROTOCOL)}
    points, valid_mask = np.zeros((0, 3)), np.zeros(0, dtype=bool)
    points_predicted = points
    if truth.depth_m is not None:
        for protocol in PROTOCOLS:
            scores[protocol] = depth_scores(predicted.depth, truth.depth_m, protocol)
        points = _unproject(truth.depth_m, truth.intrinsics_px, truth.cam_from_world)
        points_predicted = predicted.points_world
        valid_mask = (truth.depth_m > 0) & (truth.depth_m < MAX_DEPTH_M)
    frame = metric_scale_scores(
        points_predicted, points, valid_mask, predicted.room_from_world, truth.annotation_from_world
    )
    clouds = point_map_scores(points_predicted, points, valid_mask) if valid_mask.any() else {}
    scores["metric"] = {**scores.get("metric", {}), **clouds, **frame}
    return {protocol: values for protocol, values in scores.items() if values}


def point_map_scores(predicted: np.ndarray, true: np.ndarray, valid_mask: np.ndarray) -> dict[str, float]:
    """How a scene's clouds of points agree, both seen from the first camera; nothing is aligned.

    Args:
        predicted (`np.ndarray` of shape `(S, H, W, 3)`): World frame, metres.
        true (`np.ndarray` of shape `(S, H, W, 3)`): World frame, metres.
        valid_mask (`np.ndarray` of shape `(S, H, W)`): Pixels whose true point is known; at least one.

    Returns:
        `dict[str, float]`: `fscore_5cm`, a fraction; `accuracy_m` (mean distance of predicted points to true ones) and `completeness_m` (of true to
        predicted ones), metres. Where no predicted point is finite, `fscore_5cm` alone, 0.

    Source:
        Upstream: ByteDance-Seed/Depth-Anything-3@2c21ea8 (voxels of 2 cm, 5 cm), by `point_scores`. Ours: predicted points count where the true one
        is known, so that windows cost nothing; of more than `MOST_POINTS` pixels every n-th.
    """
    numbers = np.flatnonzero(valid_mask)
    if len(numbers) > MOST_POINTS:
        numbers = numbers[np.linspace(0, len(numbers) - 1, MOST_POINTS).astype(np.int64)]
    found, wanted = predicted.reshape(-1, 3)[numbers], true.reshape(-1, 3)[numbers]
    found = found[np.isfinite(found).all(axis=1)]
    if not len(found):
        return {"fscore_5cm": 0.0}
    scores = point_scores(found, wanted)
    return {
        "fscore_5cm": scores["fscore_5cm"],
        "accuracy_m": scores["accuracy"],
        "completeness_m": scores["completeness"],
    }


def mean_over_scenes(scenes: Sequence[Mapping[str, Mapping[str, float]]]) -> Scores:
    """Mean of every metric over the scenes that have it.

    Args:
        scenes (`Sequence` of `dict`): From `score_reconstruction`.

    Returns:
        `dict` by protocol and metric.

    Source:
        Ours: a scene counts once, however many frames or pixels it has.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for scene in scenes:
        for protocol, metrics in scene.items():
            for name, value in metrics.items():
                values.setdefault(protocol, {}).setdefault(name, []).append(value)
    return {
        protocol: {name: float(np.mean(found)) for name, found in metrics.items()}
        for protocol, metrics in values.items()
    }


def _unproject(depth: np.ndarray, intrinsics_px: np.ndarray, cam_from_world: np.ndarray) -> np.ndarray:
    """World points `(S, H, W, 3)` of depth maps."""
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in (depth, intrinsics_px, cam_from_world))
    return unproject_depth(*tensors).numpy()


__all__ = [
    "MOST_POINTS",
    "POSE_PROTOCOL",
    "PlainReconstruction",
    "constant_reconstruction",
    "mean_over_scenes",
    "plain",
    "point_map_scores",
    "score_reconstruction",
]
