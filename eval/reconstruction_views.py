"""What a report shows of a scene's reconstruction: how many pairs and pixels are how far off, one depth map, the way of the camera. Kept in its record.

Shapes: S sampled frames, H W pixels of the model's input.
"""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vidllm.eval.metrics.camera_pose.scores import relative_pose_errors
from vidllm.eval.metrics.depth.scores import MAX_DEPTH_M
from vidllm.eval.reconstruction import POSE_PROTOCOL, PlainReconstruction
from vidllm.eval.truth import SceneTruth


# Where the curves are known: angles in degrees, shares of the true depth.
ANGLES_DEG = tuple(range(1, 31))
DEPTH_ERRORS = tuple(number / 40 for number in range(1, 21))
# Longer side of a depth map in a record, pixels.
DEPTH_SIDE_PX = 128
_MILLIMETRES, _MOST = 1000, 65535


def accuracy_curves(predicted: PlainReconstruction, truth: SceneTruth) -> dict[str, list[float]]:
    """Shares of what is near enough, by how near is enough.

    Args:
        predicted (`PlainReconstruction`): In the pixels of the model's input.
        truth (`SceneTruth`): With poses.

    Returns:
        `dict[str, list[float]]`: `pairs`, share of the pairs of frames whose rotation and translation are both at most `ANGLES_DEG` off, where there are
        two frames; `depth`, share of the pixels whose depth is off by at most `DEPTH_ERRORS` of the true one, without alignment, where depth is known.

    Source:
        Ours. The first is the curve that `auc_30` is the area under.
    """
    curves: dict[str, list[float]] = {}
    if len(truth.cam_from_world) > 1:
        rotation, translation = relative_pose_errors(predicted.cam_from_world, truth.cam_from_world, POSE_PROTOCOL)
        curves["pairs"] = _shares(np.maximum(rotation, translation), ANGLES_DEG)
    if truth.depth_m is not None:
        valid_mask = (truth.depth_m > 0) & (truth.depth_m < MAX_DEPTH_M)
        if valid_mask.any():
            true = truth.depth_m[valid_mask].astype(np.float64)
            off = np.abs(predicted.depth[valid_mask].astype(np.float64) - true) / true
            curves["depth"] = _shares(np.where(np.isfinite(off), off, np.inf), DEPTH_ERRORS)
    return curves


def _shares(errors: np.ndarray, limits: tuple[float, ...]) -> list[float]:
    """Share of the errors up to each limit."""
    return [round(float((errors <= limit).mean()), 6) for limit in limits]


def scene_view(predicted: PlainReconstruction, truth: SceneTruth) -> dict[str, Any]:
    """What can be drawn of a scene.

    Args:
        predicted (`PlainReconstruction`): In the pixels of the model's input.
        truth (`SceneTruth`): With poses.

    Returns:
        `dict`: `path_true` and `path_predicted`, `[x, y]` of every camera from above, metres from the first; where depth is known `depth_true` and
        `depth_predicted`, the middle frame as `depth_text` writes it.

    Source:
        Ours: from above is along the annotation frame's z axis; where that is not known, along the room frame's of the model.
    """
    up = predicted.room_from_world if truth.annotation_from_world is None else truth.annotation_from_world[:3, :3]
    paths = {"path_true": truth.cam_from_world, "path_predicted": predicted.cam_from_world}
    view: dict[str, Any] = {name: _from_above(poses, up) for name, poses in paths.items()}
    if truth.depth_m is not None:
        middle = len(truth.depth_m) // 2
        view["depth_true"], view["depth_predicted"] = map(depth_text, (truth.depth_m[middle], predicted.depth[middle]))
    return view


def _from_above(cam_from_world: np.ndarray, up: np.ndarray) -> list[list[float]]:
    """Camera centres, millimetres precise."""
    centres = np.linalg.inv(cam_from_world.astype(np.float64))[:, :3, 3] @ np.asarray(up, dtype=np.float64).T
    return centres[:, :2].round(3).tolist()


def depth_text(depth_m: np.ndarray) -> str:
    """A depth map as text.

    Args:
        depth_m (`np.ndarray` of shape `(H, W)`): Metres; what is not positive and finite counts as 0.

    Returns:
        `str`: base64 of a PNG of 16 bits, millimetres, every n-th pixel so that it is at most `DEPTH_SIDE_PX` long.

    Source:
        Ours: two of 96 x 128 pixels take some 20 kB in a record.
    """
    step = -(-max(depth_m.shape) // DEPTH_SIDE_PX)
    small = np.nan_to_num(depth_m[::step, ::step].astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    millimetres = np.clip(np.round(small * _MILLIMETRES), 0, _MOST).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(millimetres).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def depth_of_text(text: str) -> np.ndarray:
    """The depth map that `depth_text` wrote.

    Args:
        text (`str`): From a record.

    Returns:
        `np.ndarray` of shape `(h, w)`, float64: metres, 0 = invalid.

    Source:
        Ours.
    """
    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        return np.asarray(picture, dtype=np.float64) / _MILLIMETRES


def mean_curves(curves: list[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Mean of the scenes' curves.

    Args:
        curves (`list` of `dict`): From `accuracy_curves`.

    Returns:
        `dict[str, list[float]]`: a scene counts once; without those that no scene has.

    Source:
        Ours.
    """
    found: dict[str, list[list[float]]] = {}
    for scene in curves:
        for name, shares in scene.items():
            found.setdefault(name, []).append(shares)
    return {name: np.mean(shares, axis=0).tolist() for name, shares in found.items()}


__all__ = [
    "ANGLES_DEG",
    "DEPTH_ERRORS",
    "accuracy_curves",
    "depth_of_text",
    "depth_text",
    "mean_curves",
    "scene_view",
]
