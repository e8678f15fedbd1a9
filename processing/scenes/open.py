"""From a data root and a scene's name to its reader."""

import difflib
from pathlib import Path

from vidllm.processing.scenes.base import SceneReader, check_scene_id
from vidllm.processing.scenes.layouts import (
    ExportedReader,
    FramesSquareReader,
    Llava3dReader,
    PosedImagesReader,
    PoseEvalReader,
    SensExportReader,
)
from vidllm.processing.scenes.recordings import VIDEO_SUFFIXES, ImageFolderReader, VideoReader
from vidllm.processing.scenes.sens import SensReader
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


# In the order in which they are looked for: frames that somebody extracted go before the recording that they came from.
LAYOUTS: dict[str, type[ExportedReader | SensReader | VideoReader | ImageFolderReader]] = {
    "posed_images": PosedImagesReader,
    "sens_export": SensExportReader,
    "llava3d": Llava3dReader,
    "pose_eval": PoseEvalReader,
    "frames_square": FramesSquareReader,
    "sens": SensReader,
    "video": VideoReader,
    "images": ImageFolderReader,
}
SCENE_FOLDERS = ("scans", "scans_test", "posed_images", "frames_square", "images")
OTHER_FOLDERS = ("annotations", "videos", "sens", *SCENE_FOLDERS)


def open_scene(data_root: str | Path, scene_id: str, layout: str | None = None) -> SceneReader:
    """Open a scene of a data root, in whatever layout it is there.

    Args:
        data_root (`str` or `Path`): Holds `posed_images/<scene>/`, `scans/<scene>/<scene>.sens`, `<scene>/color`, `frames_square/<scene>/`,
            `videos/<scene>.mp4`, `images/<scene>/`, ...
        scene_id (`str`): The scene.
        layout (`str`, *optional*): One of `LAYOUTS`, to take this one and no other.

    Returns:
        `SceneReader`

    Raises:
        VidLLMInputError: The scene is not there (then also `FileNotFoundError`), the layout is unknown, or its files are malformed.

    Source:
        Ours.
    """
    root = Path(data_root).expanduser()
    check_scene_id(scene_id)
    _check_layout(layout)
    if not root.is_dir():
        raise VidLLMMissingFileError(f"{root}: no such folder; wanted a data root")
    for name in [layout] if layout else LAYOUTS:
        path = LAYOUTS[name].find(root, scene_id)
        if path is not None:
            return LAYOUTS[name](path, scene_id, root)
    raise VidLLMMissingFileError(
        f"{root}: no frames of scene {scene_id}" + (f" in the layout {layout}" if layout else "") + "; looked for "
        f"posed_images/{scene_id}/, scans/{scene_id}/{scene_id}.sens, {scene_id}/color, frames_square/{scene_id}/, "
        f"videos/{scene_id}.mp4, images/{scene_id}/"
    )


def open_path(path: str | Path, scene_id: str | None = None, layout: str | None = None) -> SceneReader:
    """Open a scene that lies outside a data root: a `.sens` file, a video, or a folder in any layout.

    Args:
        path (`str` or `Path`): The file or folder.
        scene_id (`str`, *optional*): Its name; by default that of the file or folder.
        layout (`str`, *optional*): One of `LAYOUTS`; by default the first that the path looks like.

    Returns:
        `SceneReader`

    Raises:
        VidLLMInputError: The path does not exist, or looks like no layout.

    Source:
        Ours.
    """
    path = Path(path).expanduser()
    _check_layout(layout)
    if not path.exists():
        raise VidLLMMissingFileError(f"{path}: no such file or folder")
    if layout:
        return LAYOUTS[layout](path, scene_id)
    for reader in LAYOUTS.values():
        if reader.accepts(path):
            return reader(path, scene_id)
    if path.is_file():
        # The decoder knows more containers than we know suffixes, and says what is wrong with the file.
        return VideoReader(path, scene_id)
    raise VidLLMInputError(f"{path}: wanted a .sens file, a video, or a folder with frames; found no picture in it")


def find_scenes(data_root: str | Path, layout: str | None = None) -> dict[str, list[str]]:
    """Which scenes a data root holds.

    Args:
        data_root (`str` or `Path`): The folder.
        layout (`str`, *optional*): Only scenes in this layout.

    Returns:
        `dict[str, list[str]]`: layouts by scene, in the order in which `open_scene` prefers them; scenes sorted by name.

    Raises:
        VidLLMInputError: The folder does not exist, or the layout is unknown.

    Source:
        Ours.
    """
    root = Path(data_root).expanduser()
    _check_layout(layout)
    if not root.is_dir():
        raise VidLLMMissingFileError(f"{root}: no such folder; wanted a data root")
    names = {path.name for path in root.iterdir() if path.is_dir() and path.name not in OTHER_FOLDERS}
    for folder in SCENE_FOLDERS:
        if (root / folder).is_dir():
            names |= {path.name for path in (root / folder).iterdir() if path.is_dir()}
    for folder, suffixes in (("videos", VIDEO_SUFFIXES), ("sens", (".sens",))):
        if (root / folder).is_dir():
            names |= {path.stem for path in (root / folder).iterdir() if path.suffix.lower() in suffixes}
    scenes = {}
    for name in sorted(names):
        if name.startswith("."):
            continue
        layouts = [key for key in ([layout] if layout else LAYOUTS) if LAYOUTS[key].find(root, name) is not None]
        if layouts:
            scenes[name] = layouts
    return scenes


def _check_layout(layout: str | None) -> None:
    """An error with the nearest name for an unknown layout."""
    if layout is not None and layout not in LAYOUTS:
        near = difflib.get_close_matches(layout, LAYOUTS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise VidLLMInputError(f"layout: wanted one of {', '.join(LAYOUTS)}; got {layout!r}{hint}")
