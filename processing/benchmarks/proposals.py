"""Boxes of whole scenes to choose from, that somebody else has found. Shapes: M boxes of a scene."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vidllm.processing.benchmarks.community import Proposals, read_box_file, read_mask_proposals
from vidllm.processing.benchmarks.community_chatscene import read_attributes
from vidllm.processing.scenes.annotations import VOTENET_NYU40_IDS, find_scan_dir, load_scene_objects
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


TRUE = "true"


@dataclass(frozen=True, eq=False)
class SceneProposals:
    """Proposals of all scenes of a run.

    Args:
        boxes_annotation (`dict[str, np.ndarray]`): By scene `(M, 6)`, `(cx, cy, cz, dx, dy, dz)`, annotation frame, metres.
        source (`str`): Where they are from.
        sha256 (`str`, *optional*): Of the files; None of the scenes' own boxes.

    Source:
        Ours.
    """

    boxes_annotation: dict[str, np.ndarray] = field(default_factory=dict)
    source: str = ""
    sha256: str | None = None

    @property
    def settings(self) -> dict[str, str | None]:
        """What predictions with these proposals depend on."""
        return {"source": Path(self.source).name, "sha256": self.sha256}


def load_proposals(source: str | Path, data_root: str, scene_ids: Sequence[str]) -> SceneProposals:
    """Read proposals of scenes.

    Args:
        source (`str` or `Path`): `true`: the scenes' own annotated boxes (without walls, floors and ceilings where the label table tells them);
            a `.json` as Video-3D-LLM's `scannet_val_pred_box.json`; a `.pt` as Chat-Scene's `scannet_mask3d_val_attributes.pt`; or a folder
            with LEO's `<scene>.mask.npz`.
        data_root (`str`): Absolute path of the data root; scans are read for `true` and for masks.
        scene_ids (`Sequence[str]`): Scenes of the run.

    Returns:
        `SceneProposals`

    Raises:
        VidLLMInputError: No such file, a malformed one, or one without one of the scenes.

    Source:
        Ours: the formats are those of the works named.
    """
    if str(source) == TRUE:
        return SceneProposals({scene: _annotated(data_root, scene) for scene in scene_ids}, TRUE)
    path = Path(source).expanduser()
    if path.is_dir():
        files = {scene: path / f"{scene}.mask.npz" for scene in scene_ids}
        found = {scene: read_mask_proposals(file, find_scan_dir(data_root, scene)) for scene, file in files.items()}
    elif not path.is_file():
        raise VidLLMMissingFileError(f"{path}: no such file; wanted proposals, or the word `{TRUE}`")
    elif path.suffix in (".json", ".pt"):
        files = {"": path}
        read = read_box_file if path.suffix == ".json" else read_attributes
        found = _of_scenes(read(path), scene_ids, path)
    else:
        raise VidLLMInputError(
            f"{path}: wanted proposals as .json, .pt or a folder of masks; got {path.suffix or 'no suffix'}"
        )
    digest = hashlib.sha256()
    for scene, file in sorted(files.items()):
        digest.update(scene.encode() + hashlib.sha256(file.read_bytes()).digest())
    return SceneProposals({s: found[s].boxes_annotation for s in scene_ids}, str(path), digest.hexdigest())


def _of_scenes(found: dict[str, Proposals], scene_ids: Sequence[str], path: Path) -> dict[str, Proposals]:
    """Those of the scenes asked for, all of which must be there."""
    absent = [scene for scene in scene_ids if scene not in found]
    if absent:
        raise VidLLMInputError(
            f"{path}: wanted proposals of every scene that is asked for boxes; {len(absent)} have none, such as {absent[0]}"
        )
    return {scene: found[scene] for scene in scene_ids}


def _annotated(data_root: str, scene_id: str) -> np.ndarray:
    """Boxes `(M, 6)` of a scan's objects."""
    objects = load_scene_objects(find_scan_dir(data_root, scene_id))
    if not (objects.nyu40_ids > 0).any():
        return objects.boxes_annotation
    return objects.boxes_annotation[np.isin(objects.nyu40_ids, VOTENET_NYU40_IDS)]


__all__ = ["TRUE", "SceneProposals", "load_proposals"]
