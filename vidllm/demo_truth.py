"""The shipped clip, what is true of it, and whether a result agrees with that.

Shapes: S sampled frames.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from vidllm.eval.metrics.scan2cap.scores import scan2cap_scores
from vidllm.train.demo_clip import CLIP_NAME, TRUTH_NAME


MODEL_NAME = "vidllm-nano"
# What nothing works without; the rest is checked when it is loaded.
_NEEDED = ("config.json", "model.safetensors", "processor_config.json", "tokenizer_config.json", CLIP_NAME, TRUTH_NAME)
_PARTS = ("room", "clip", "camera", "questions", "descriptions", "places")


def shipped_folder() -> Path:
    """Where the model that comes with the package is.

    Returns:
        `Path`: a complete Hub folder with the clip of the demonstration.

    Raises:
        ValueError: This installation lacks it, or parts of it.

    Source:
        Ours: package data, the same from a source tree and from a wheel.
    """
    try:
        folder = Path(str(files("vidllm.model_cards") / MODEL_NAME))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the shipped model is missing in this installation: no package {error.name}; install vidllm again, from a complete "
            "source tree or wheel"
        ) from error
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"the shipped model is missing in this installation: no {', '.join(missing)} in {folder}; install vidllm again, from a "
            "complete source tree or wheel"
        )
    return folder


def is_shipped() -> bool:
    """Whether this installation comes with a model at all.

    Returns:
        `bool`: False where its folder is missing as a whole; a folder that lacks parts is an error of `shipped_folder`.

    Source:
        Ours.
    """
    try:
        return Path(str(files("vidllm.model_cards") / MODEL_NAME)).is_dir()
    except ModuleNotFoundError:
        return False


def clip_folder(model: str | Path | None) -> Path:
    """Whose clip is shown to a model.

    Args:
        model (`str` or `Path`, *optional*): Folder or Hub id of the model; None is the shipped one.

    Returns:
        `Path`: the model's own folder if it holds a clip with its truth, else that of the shipped model.

    Raises:
        ValueError: See `shipped_folder`.

    Source:
        Ours.
    """
    if model is not None:
        own = Path(model).expanduser()
        if all((own / name).is_file() for name in (CLIP_NAME, TRUTH_NAME)):
            return own
    return shipped_folder()


def read_truth(folder: str | Path) -> dict[str, Any]:
    """What is true of the clip of a folder.

    Args:
        folder (`str` or `Path`): From `clip_folder`.

    Returns:
        `dict`: see `vidllm.train.demo_clip.demo_clip`.

    Raises:
        ValueError: The file is not what this package writes.

    Source:
        Ours.
    """
    path = Path(folder) / TRUTH_NAME
    try:
        truth = json.loads(path.read_text(encoding="utf-8"))
        lacking = [name for name in _PARTS if name not in truth]
        shape = np.array(truth["camera"]["annotation_from_cam"], np.float64).shape if not lacking else None
        wanted = (truth["clip"]["num_frames"], 4, 4) if not lacking else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as the truth of a clip ({error!r})") from error
    if lacking:
        raise ValueError(f"{path}: wanted the truth of a clip; it lacks {', '.join(lacking)}")
    if shape != wanted:
        raise ValueError(f"{path}: wanted camera poses of shape {wanted}; got {shape}")
    return truth


def poses_of(truth: dict[str, Any], frames: Sequence[int]) -> np.ndarray:
    """True camera poses of sampled frames.

    Args:
        truth (`dict`): From `read_truth`.
        frames (`Sequence[int]` of length S): Frame numbers in the clip.

    Returns:
        `np.ndarray` of shape `(S, 4, 4)`, float64: `annotation_from_cam`, metres; the first is `annotation_from_world`.

    Raises:
        ValueError: The clip has no such frame: clip and truth do not belong together.

    Source:
        Ours.
    """
    poses = np.array(truth["camera"]["annotation_from_cam"], np.float64)
    if min(frames) < 0 or max(frames) >= len(poses):
        raise ValueError(f"{TRUTH_NAME}: wanted the poses of frame {max(frames)} of the clip; it has {len(poses)}")
    return poses[list(frames)]


def path_length(centres: np.ndarray) -> float:
    """Length of a camera path.

    Args:
        centres (`np.ndarray` of shape `(S, 3)`): Camera centres in the order of time.

    Returns:
        `float`: sum of the steps, in the unit of the centres.

    Source:
        Ours.
    """
    return float(np.linalg.norm(np.diff(centres, axis=0), axis=1).sum())


def names_object(caption: str, category: str, colour: str | None) -> bool:
    """Whether a caption is about an object of this category and colour.

    Args:
        caption (`str`): What the model said.
        category (`str`): Of the object.
        colour (`str`, *optional*): Of the object; None where it has none with a name.

    Returns:
        `bool`

    Source:
        Ours: as `category_and_colour` is counted in the evaluation.
    """
    return scan2cap_scores([caption], [(category, colour)])["category_and_colour"] == 1.0


__all__ = [
    "CLIP_NAME",
    "MODEL_NAME",
    "TRUTH_NAME",
    "clip_folder",
    "is_shipped",
    "names_object",
    "path_length",
    "poses_of",
    "read_truth",
    "shipped_folder",
]
