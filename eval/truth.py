"""What is true of a scene beyond its benchmark's files: cameras and depth at the model's resolution, and what rooms know of themselves.

Shapes: S sampled frames, H W pixels of the model's input.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidllm.processing.benchmarks.frames import SceneFrames
from vidllm.processing.given_geometry_vidllm import prepare_geometry
from vidllm.processing.samples import Sample
from vidllm.processing.scenes.annotations import read_json
from vidllm.processing.video_reading_vidllm import VidLLMInputError


ROOMS_FILE = "rooms.json"
# Which list of `rooms.json` says the kinds of a benchmark's questions.
ROOM_KINDS = {"scanqa": "question_kinds", "sqa3d": "situated_kinds"}


@dataclass(frozen=True, eq=False)
class SceneTruth:
    """True geometry of the sampled frames, as the model's input shows them.

    Args:
        cam_from_world (`np.ndarray` of shape `(S, 4, 4)`, float32, *optional*): World: camera of the first frame, metres.
        intrinsics_px (`np.ndarray` of shape `(S, 3, 3)`, float32, *optional*): Pixels of the model's input.
        depth_m (`np.ndarray` of shape `(S, H, W)`, float32, *optional*): Metres along the optical axis, 0 = invalid.
        annotation_from_world (`np.ndarray` of shape `(4, 4)`, float64, *optional*): Metres.

    Source:
        Ours.
    """

    cam_from_world: np.ndarray | None = None
    intrinsics_px: np.ndarray | None = None
    depth_m: np.ndarray | None = None
    annotation_from_world: np.ndarray | None = None

    def given(self) -> dict[str, torch.Tensor] | None:
        """The same for `geometry=` of the model, a batch of one; None without poses and intrinsics."""
        if self.cam_from_world is None or self.intrinsics_px is None:
            return None
        parts = {name: getattr(self, name) for name in ("cam_from_world", "intrinsics_px", "depth_m")}
        return {name: torch.from_numpy(value)[None] for name, value in parts.items() if value is not None}


def scene_truth(frames: SceneFrames, metadata: dict[str, Any]) -> SceneTruth:
    """Bring a scene's true geometry to the pixels of the model's input.

    Args:
        frames (`SceneFrames`): Sampled frames.
        metadata (`dict`): What the video processor says about them.

    Returns:
        `SceneTruth`: with what the scene has.

    Source:
        Ours: depth is scored at the resolution at which it is predicted.
    """
    source = {}
    if frames.cam_from_world is not None and frames.intrinsics_px is not None:
        source = {"cam_from_world": frames.cam_from_world, "intrinsics_px": frames.intrinsics_px}
    if frames.depth_m is not None:
        source["depth_m"] = np.stack(frames.depth_m)
    found = prepare_geometry([source], [metadata]) if source else {}
    return SceneTruth(
        **{name: value[0].numpy() for name, value in found.items()}, annotation_from_world=frames.annotation_from_world
    )


def read_rooms(data_root: str) -> dict[str, Any] | None:
    """What procedural rooms know of themselves.

    Args:
        data_root (`str`): Absolute path of the data root.

    Returns:
        `dict` by split (`train`, `val`), or None: these are no rooms.

    Raises:
        VidLLMInputError: The file is malformed.

    Source:
        Ours.
    """
    path = Path(data_root) / ROOMS_FILE
    return _read_rooms(path, path.stat().st_mtime_ns) if path.is_file() else None


@lru_cache(maxsize=4)
def _read_rooms(path: Path, changed_ns: int) -> dict[str, Any]:
    """The file's content; `changed_ns` is there so that an edited file is read again."""
    content = read_json(path, "truth of the rooms")
    keys = {"difficulty", "seed", "scenes", *ROOM_KINDS.values()}
    if not isinstance(content, dict) or not content or any(not keys <= set(part) for part in content.values()):
        raise VidLLMInputError(f"{path}: wanted one or more splits with the keys {', '.join(sorted(keys))}")
    return content


def rooms_of_split(data_root: str, split: str) -> dict[str, Any] | None:
    """The part of `rooms.json` that a benchmark's split was written from.

    Args:
        data_root (`str`): Absolute path of the data root.
        split (`str`): Split of a benchmark.

    Returns:
        `dict`, or None: no rooms, or not this split.

    Source:
        Ours: what a benchmark evaluates is `val` of the rooms, whatever the benchmark calls it.
    """
    rooms = read_rooms(data_root)
    return None if rooms is None else rooms.get("train" if split == "train" else "val")


def question_kinds(samples: list[Sample], benchmark: str, data_root: str, split: str) -> list[str] | None:
    """Kind of every question of a split.

    Args:
        samples (`list[Sample]`): All rows of the split, in the order of its file.
        benchmark (`str`): Which benchmark.
        data_root (`str`): Absolute path of the data root.
        split (`str`): Which split.

    Returns:
        `list[str]`: of rooms their own kinds, else those of the benchmark's rule; None where not every row has one.

    Raises:
        VidLLMInputError: `rooms.json` knows another number of questions than the file has.

    Source:
        Ours.
    """
    rooms = rooms_of_split(data_root, split)
    if rooms is not None and benchmark in ROOM_KINDS:
        kinds = list(rooms[ROOM_KINDS[benchmark]])
        if len(kinds) != len(samples):
            raise VidLLMInputError(
                f"{Path(data_root) / ROOMS_FILE}, {ROOM_KINDS[benchmark]}: wanted {len(samples)} kinds, one per question of {benchmark}; "
                f"got {len(kinds)}"
            )
        return kinds
    kinds = [sample.question_type for sample in samples]
    return None if None in kinds else kinds


def named_objects(data_root: str, split: str) -> dict[tuple[str, int], tuple[str, str | None]] | None:
    """Category and colour of every object of a split's rooms.

    Args:
        data_root (`str`): Absolute path of the data root.
        split (`str`): Split of a benchmark.

    Returns:
        `dict` from (scene, object id) to (category, colour or None), or None: these are no rooms.

    Source:
        Ours.
    """
    rooms = rooms_of_split(data_root, split)
    if rooms is None:
        return None
    return {
        (scene, thing["object_id"]): (thing["category"], thing["colour"])
        for scene, truth in rooms["scenes"].items()
        for thing in truth["objects"]
    }


__all__ = ["SceneTruth", "named_objects", "question_kinds", "read_rooms", "rooms_of_split", "scene_truth"]
