"""Extraction of sampled frames of many scenes: several processes, resumable, one scene at a time complete or absent.

Shapes: none; files only.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vidllm.processing.scenes.base import Frame, SceneReader, check_scene_id
from vidllm.processing.scenes.choose import METHODS, choose_frames
from vidllm.processing.scenes.layouts import PosedImagesReader
from vidllm.processing.scenes.open import LAYOUTS, find_scenes, open_scene
from vidllm.processing.scenes.write import WRITERS, remove_leftovers, replaced_folder, write_posed_images
from vidllm.processing.video_reading_vidllm import VidLLMInputError


MANIFEST = "extraction.json"
DONE, SKIPPED, FAILED = "done", "there already", "failed"
Progress = Callable[[int, int, str, str], None]


@dataclass
class ExtractionReport:
    """What became of each scene.

    Args:
        done (`list[str]`): Scenes written now.
        skipped (`list[str]`): Scenes that were there already, from the same settings.
        failed (`dict[str, str]`): One line per scene that could not be written.
        problems (`dict[str, list[str]]`): What the readers had to drop, by scene.

    Source:
        Ours.
    """

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON."""
        return {"done": self.done, "skipped": self.skipped, "failed": self.failed, "problems": self.problems}


def extract_frames(
    data_root: str | Path,
    scenes: Sequence[str] | None = None,
    out: str | Path | None = None,
    num_frames: int | None = 32,
    method: str = "uniform",
    step: int = 1,
    layout: str | None = None,
    require_pose: bool | None = None,
    num_workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExtractionReport:
    """Write sampled frames, depth maps and poses of scenes as `<out>/posed_images/<scene>/`.

    JPEG pictures are copied byte for byte. A scene appears when it is complete; a run that was killed goes on where it stopped. A scene
    that cannot be read is reported and does not stop the others. One run writes into `out` at a time.

    Args:
        data_root (`str` or `Path`): Where the scenes are.
        scenes (`Sequence[str]`, *optional*): Which; all that are found if not given.
        out (`str` or `Path`, *optional*): A data root to write to; `data_root` itself if not given.
        num_frames (`int`, *optional*): How many frames per scene; None: all that `step` leaves.
        method (`str`): `uniform` or `max_coverage`, see `choose_frames`.
        step (`int`): Only every so many frames of the recording come into question (10 with `num_frames=None` gives EmbodiedScan's
            files).
        layout (`str`, *optional*): Read from this layout; by default from what `open_scene` prefers, but never from what this function
            writes to.
        require_pose (`bool`, *optional*): See `choose_frames`.
        num_workers (`int`): Processes; 1 works in this one.
        overwrite (`bool`): Whether to replace scenes that are there from other settings, or from elsewhere.
        progress (callable, *optional*): `(scenes finished, scenes in all, scene, status)` after each scene.

    Returns:
        `ExtractionReport`

    Raises:
        VidLLMInputError: A setting is wrong, or there is no scene.

    Source:
        Ours.
    """
    if method not in METHODS:
        raise VidLLMInputError(f"method: wanted {' or '.join(METHODS)}; got {method!r}")
    for name, value in (("num_frames", num_frames), ("step", step), ("num_workers", num_workers)):
        if value is not None and value < 1:
            raise VidLLMInputError(f"{name}: wanted 1 or more; got {value}")
    data_root = Path(data_root).expanduser()
    out = data_root if out is None else Path(out).expanduser()
    if scenes is None:
        scenes = list(find_scenes(data_root, layout))
    scenes = list(dict.fromkeys(check_scene_id(scene) for scene in scenes))
    if not scenes:
        raise VidLLMInputError(f"{data_root}: found no scene in this data root")
    settings = {
        "num_frames": num_frames,
        "method": method,
        "step": step,
        "require_pose": require_pose,
        "layout": layout,
    }
    report = ExtractionReport()
    tasks = [(str(data_root), scene, str(out), settings, overwrite) for scene in scenes]
    for finished, (scene, status, message, problems) in enumerate(_run(tasks, num_workers), 1):
        if status == FAILED:
            report.failed[scene] = message
        else:
            (report.done if status == DONE else report.skipped).append(scene)
        if problems:
            report.problems[scene] = problems
        if progress is not None:
            progress(finished, len(scenes), scene, status)
    order = {scene: number for number, scene in enumerate(scenes)}
    report.done.sort(key=order.__getitem__)
    report.skipped.sort(key=order.__getitem__)
    return report


def _run(tasks: list[tuple], num_workers: int) -> Iterator[tuple[str, str, str, list[str]]]:
    """Results of all scenes as they finish."""
    if num_workers == 1 or len(tasks) == 1:
        for task in tasks:
            yield _extract_scene(*task)
        return
    # Fresh processes: forking one that has torch's threads running may hang.
    with ProcessPoolExecutor(min(num_workers, len(tasks)), mp_context=get_context("spawn")) as pool:
        waiting: dict[Future, str] = {}
        rest = iter(tasks)
        try:
            while True:
                # A few at a time, so that an interrupt need not wait for a long queue.
                for task in _take(rest, 2 * num_workers - len(waiting)):
                    waiting[pool.submit(_extract_scene, *task)] = task[1]
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    scene = waiting.pop(future)
                    error = future.exception()
                    yield future.result() if error is None else (scene, FAILED, f"{scene}: {error!r}"[:300], [])
        finally:
            for future in waiting:
                future.cancel()


def _take(tasks: Iterator[tuple], count: int) -> Iterable[tuple]:
    """The next few tasks."""
    return [task for _, task in zip(range(count), tasks, strict=False)]


def _extract_scene(
    data_root: str, scene_id: str, out: str, settings: dict[str, Any], overwrite: bool
) -> tuple[str, str, str, list[str]]:
    """One scene: (scene, status, message, what the reader dropped)."""
    target = Path(out) / WRITERS["posed_images"][0].format(scene_id)
    try:
        remove_leftovers(target)
        written = read_manifest(target)
        if target.exists() and not overwrite:
            if written is not None and written["settings"] == settings:
                return scene_id, SKIPPED, "", []
            kind = "from other settings" if written is not None else "not written by this command"
            return (
                scene_id,
                FAILED,
                f"{target}: it is there already, {kind}; it is not overwritten unless asked for",
                [],
            )
        reader = _open_source(Path(data_root), scene_id, settings["layout"], target)
        indices = _choose(reader, settings)
        index_of = {reader.frame_ids[index]: index for index in indices}
        note = {
            "settings": settings,
            "source": reader.source,
            "num_source_frames": len(reader),
            "frame_ids": [reader.frame_ids[index] for index in indices],
            "problems": reader.problems,
        }
        with replaced_folder(target, overwrite) as partial:
            write_posed_images(
                partial,
                _decoded(reader, indices),
                reader.annotation_from_scene,
                stored_jpeg=lambda frame: reader.stored_jpeg(index_of[frame.frame_id]),
            )
            (partial / MANIFEST).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    except (VidLLMInputError, OSError) as error:
        return scene_id, FAILED, str(error), []
    return scene_id, DONE, "", reader.problems


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """What `extract_frames` wrote beside the frames of a scene.

    Args:
        folder (`str` or `Path`): `posed_images/<scene>`.

    Returns:
        `dict` with `settings`, `source`, `num_source_frames`, `frame_ids`, `problems`; None if the folder was not written by it.

    Source:
        Ours.
    """
    try:
        content = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "settings" in content else None


def _decoded(reader: SceneReader, indices: list[int]) -> Iterator[Frame]:
    """The chosen frames; one by one, but videos in one pass."""
    if type(reader).frames is SceneReader.frames:
        return (reader.frame(index) for index in indices)
    return iter(reader.frames(indices))


def _open_source(data_root: Path, scene_id: str, layout: str | None, target: Path) -> SceneReader:
    """The scene's reader; frames that an earlier extraction wrote are no source for the next."""
    if layout is None and PosedImagesReader.find(data_root, scene_id) == target and target.exists():
        layouts = [name for name in find_layouts(data_root, scene_id) if name != "posed_images"]
        if layouts:
            return open_scene(data_root, scene_id, layouts[0])
    return open_scene(data_root, scene_id, layout)


def find_layouts(data_root: str | Path, scene_id: str) -> list[str]:
    """Layouts in which a data root holds a scene, in the order in which `open_scene` prefers them.

    Args:
        data_root (`str` or `Path`): The root.
        scene_id (`str`): The scene.

    Returns:
        `list[str]`: names of `LAYOUTS`.

    Source:
        Ours.
    """
    return [
        name for name, reader in LAYOUTS.items() if reader.find(Path(data_root), check_scene_id(scene_id)) is not None
    ]


def _choose(reader: SceneReader, settings: dict[str, Any]) -> list[int]:
    """Indices to extract."""
    every = _Every(reader, settings["step"]) if settings["step"] > 1 else reader
    num_frames = settings["num_frames"] or len(every)
    chosen = choose_frames(every, num_frames, settings["method"], settings["require_pose"])
    return [index * settings["step"] for index in chosen]


class _Every(SceneReader):
    """Every n-th frame of a scene."""

    def __init__(self, reader: SceneReader, step: int):
        self.reader, self.step = reader, step
        super().__init__(
            reader.scene_id,
            reader.source,
            reader.frame_ids[::step],
            reader.poses()[::step] if reader.has_poses else None,
            reader.annotation_from_scene,
            reader.has_depth,
        )

    def frame(self, index: int, depth: bool = True) -> Frame:
        """One frame of the thinned scene."""
        self._check_index(index)
        return self.reader.frame(index * self.step, depth)

    def depth(self, index: int) -> tuple:
        """Depth `(h, w)` and intrinsics `(3, 3)` of one frame of the thinned scene."""
        self._check_index(index)
        return self.reader.depth(index * self.step)
