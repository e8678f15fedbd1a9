"""Procedural rooms for training, made on the fly: no data root, no end of new rooms.

Rooms are made in blocks by processes that run beside the training; a block is a safetensors file in a cache folder, so that a room can be
seen again (other frames, other prompts) without being made again, a run that was killed goes on where it stopped, and every process
reads the same. What a block holds depends on the source's settings and on its number alone.

Shapes: R rooms of a block, F kept frames of a room, S sampled frames, H W pixels.
"""

import argparse
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from vidllm.processing.benchmarks.frames import SceneFrames
from vidllm.processing.rooms import layout
from vidllm.processing.rooms.furniture import CATEGORIES
from vidllm.processing.rooms.language import speak_about
from vidllm.processing.rooms.layout import SPLIT_NUMBERS, RoomObject, make_room
from vidllm.processing.rooms.materials import COLOURS, NAMED_PATTERNS
from vidllm.processing.rooms.placing import LEVELS
from vidllm.processing.rooms.questions import PATTERNED
from vidllm.processing.rooms.render import RoomRenderer, visibility
from vidllm.processing.rooms.samples import balanced_kinds, room_boxes, room_samples
from vidllm.processing.rooms.scene_graph import SceneGraph
from vidllm.processing.samples import Sample
from vidllm.train.collator import keyed_generator
from vidllm.train.plain_prompts import chosen_plain, drawn_evenly, plain_samples


CATEGORY_NAMES, COLOUR_NAMES, PATTERN_NAMES = tuple(CATEGORIES), tuple(COLOURS), NAMED_PATTERNS
# What is known of each thing of a room.
LABEL_KINDS = ("category", "colour", "pattern")
# Pixels of walls, floor and ceiling.
BACKGROUND = 255
_MM = 1000.0


@dataclass(frozen=True)
class RoomsSettings:
    """Which rooms, and how they are drawn.

    Args:
        num_rooms (`int`): Different rooms in all; rounded up to whole blocks.
        levels (`Mapping[str, float]`): Share of each difficulty among the blocks.
        seed (`int`): Of the rooms; other seeds than that of an evaluated split.
        size_hw (`tuple` of `int`): Height and width of the frames, pixels.
        frames_kept (`int`): Frames kept of each room, spread evenly over the clip; 0 keeps all.
        block_size (`int`): Rooms per block; answers are balanced within a block.
        first_blocks (`int`): Blocks that are drawn from at the start.
        unlocked_at (`float`): Share of the run after which all blocks are drawn from; they come in one by one.
        makers (`int`): Processes that make blocks beside the training; 0 makes them when they are asked for.
        tasks (`Mapping[str, float]`): Share of the prompts of a room by task.
        plain_prompts (`int`): Most plain prompts of a visit (`plain_samples`), beside the others.
        jpeg_share (`float`): Share of the visits whose pictures go through JPEG first, at a random quality.
        even_share (`float`): Share of the visits whose frames are spread evenly over the clip, first and last included, as the processor takes them;
            the others take one at random from each stretch.

    Raises:
        ValueError: A number is out of range, or a name is unknown.

    Source:
        Ours.
    """

    num_rooms: int = 6000
    levels: Mapping[str, float] = field(default_factory=lambda: {"easy": 1.0})
    seed: int = 1001
    size_hw: tuple[int, int] = (96, 128)
    frames_kept: int = 12
    block_size: int = 32
    first_blocks: int = 8
    unlocked_at: float = 0.7
    makers: int = 1
    tasks: Mapping[str, float] = field(
        default_factory=lambda: {"qa": 0.5, "sqa": 0.15, "ground": 0.25, "caption": 0.1}
    )
    plain_prompts: int = 0
    jpeg_share: float = 0.3
    even_share: float = 0.0

    def __post_init__(self) -> None:
        positive = ("num_rooms", "block_size", "first_blocks")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"rooms.{name}: wanted at least 1; got {getattr(self, name)}")
        for name, known in (("levels", tuple(LEVELS)), ("tasks", ("qa", "sqa", "ground", "caption"))):
            shares = getattr(self, name)
            if not shares or set(shares) - set(known) or min(shares.values()) < 0 or sum(shares.values()) <= 0:
                raise ValueError(
                    f"rooms.{name}: wanted shares, at least one positive, of {', '.join(known)}; got {dict(shares)}"
                )
        if not (
            0 < self.unlocked_at <= 1
            and 0 <= self.jpeg_share <= 1
            and 0 <= self.even_share <= 1
            and min(self.frames_kept, self.plain_prompts) >= 0
        ):
            raise ValueError(
                "rooms: wanted unlocked_at in (0, 1], jpeg_share and even_share in 0..1, frames_kept and plain_prompts of at least 0; "
                f"got {self.unlocked_at}, {self.jpeg_share}, {self.even_share}, {self.frames_kept}, {self.plain_prompts}"
            )

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return -(-self.num_rooms // self.block_size)


@dataclass(frozen=True, eq=False)
class RoomScene:
    """A room as it is seen in one training step.

    Args:
        samples (`list[Sample]`): Prompts about it.
        frames (`SceneFrames`): Sampled frames with everything that is known about them.
        instance (`np.ndarray` of shape `(S, H, W)`, uint8): Object id, `BACKGROUND` = none.
        object_labels (`np.ndarray` of shape `(objects, 3)`, int64): Index into `CATEGORY_NAMES`, index into `COLOUR_NAMES` (-1 = no named colour),
            index into `PATTERN_NAMES` (-1 = none that shows).

    Source:
        Ours.
    """

    samples: list[Sample]
    frames: SceneFrames
    instance: np.ndarray
    object_labels: np.ndarray


class RoomSource:
    """Makes rooms and keeps them in a cache.

    Args:
        settings (`RoomsSettings`): Which rooms.
        cache_dir (`str` or `Path`): Folder for the blocks; a folder made with other settings is refused.

    Raises:
        ValueError: The folder was made with other settings.

    Source:
        Ours.
    """

    def __init__(self, settings: RoomsSettings, cache_dir: str | Path):
        self.settings = settings
        self.cache_dir = Path(cache_dir)
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        # Shares of tasks, of JPEG and of even frames, and the order of drawing, do not change what a block holds.
        content = {
            name: value
            for name, value in asdict(settings).items()
            if name in ("levels", "seed", "size_hw", "frames_kept", "block_size")
        }
        wanted = json.dumps({**content, "labels": LABEL_KINDS, "code_sha256": _code_sha256()}, sort_keys=True)
        note = self.cache_dir / "settings.json"
        with open(self.cache_dir / "settings.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = note.read_text(encoding="utf-8") if note.is_file() else None
            if known is None:
                note.write_text(wanted, encoding="utf-8")
        if known is not None and known != wanted:
            raise ValueError(f"{note}: wanted rooms of the settings {wanted}; the folder holds those of {known}")

    def level(self, block: int) -> str:
        """Difficulty of a block's rooms: drawn by seed and number."""
        names = sorted(self.settings.levels)
        shares = np.array([self.settings.levels[name] for name in names], float)
        rng = keyed_generator(self.settings.seed, 0, "level", str(block))
        return str(rng.choice(names, p=shares / shares.sum()))

    def block_path(self, block: int) -> Path:
        """File of a block; made now if it is not there. Processes that ask for the same block wait for the one that makes it."""
        path = self.cache_dir / f"block_{block:06d}.safetensors"
        if path.is_file():
            return path
        lock_path = path.with_suffix(".lock")
        with open(lock_path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                part = path.with_suffix(".part")
                save_file(self._make_block(block), part)
                os.replace(part, path)
        lock_path.unlink(missing_ok=True)
        return path

    def _make_block(self, block: int) -> dict[str, torch.Tensor]:
        """Everything about the rooms of a block, as tensors; texts as JSON in bytes."""
        settings, numbers = self.settings, SPLIT_NUMBERS["train"]
        level = self.level(block)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            made = []
            for index in range(block * settings.block_size, (block + 1) * settings.block_size):
                # A seed has only so many scene numbers; the next seeds go on.
                seed, number = settings.seed + index // len(numbers), numbers[index % len(numbers)]
                room = make_room(seed, number, level)
                frames = RoomRenderer(room).render(settings.size_hw)
                graph = SceneGraph(room, visibility(room, frames.instance.numpy()))
                made.append((f"{seed}-{room.scene_id}", room, frames, speak_about(graph)))
        finally:
            torch.set_num_threads(threads)
        rng = keyed_generator(settings.seed, 0, "balance", str(block))
        questions = balanced_kinds((q for _, _, _, language in made for q in language.questions), rng)
        situated = balanced_kinds((q for _, _, _, language in made for q in language.situated), rng)
        tensors: dict[str, list[torch.Tensor]] = {}
        for name, room, frames, language in made:
            boxes = room_boxes(room)
            scene = language.scene
            samples = room_samples(
                language,
                boxes,
                [q for q in questions if q.scene == scene],
                [q for q in situated if q.scene == scene],
            )
            rows = [{"kind": kind, **_sparse(sample)} for kind, sample in samples]
            text = json.dumps({"scene_id": name, "rows": rows}).encode()
            num_frames = len(frames.rgb)
            kept = np.linspace(0, num_frames - 1, settings.frames_kept or num_frames).round().astype(int)
            instance = frames.instance[kept]
            labels = [_labels_of(thing) for thing in room.objects]
            for key, value in {
                "rgb": frames.rgb[kept],
                # Half a millimetre is far below what a model of this size could learn.
                "depth_mm": (frames.depth_m[kept] * _MM).round().clamp(0, 65535).to(torch.uint16),
                "instance": torch.where(instance < 0, BACKGROUND, instance).to(torch.uint8),
                "annotation_from_cam": torch.from_numpy(room.track.annotation_from_cam[kept]),
                "intrinsics_px": torch.from_numpy(room.intrinsics_px(settings.size_hw)),
            }.items():
                tensors.setdefault(key, []).append(value)
            tensors.setdefault("text", []).append(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            tensors.setdefault("labels", []).append(torch.tensor(labels, dtype=torch.int16))
        block_tensors = {key: torch.stack(tensors[key]) for key in tensors if key not in ("text", "labels")}
        for key in ("text", "labels"):
            block_tensors[key] = torch.cat(tensors[key])
            block_tensors[f"{key}_end"] = torch.tensor([len(part) for part in tensors[key]]).cumsum(0)
        return block_tensors

    def room(self, index: int) -> "CachedRoom":
        """Room by its number, 0 to `num_blocks * block_size - 1`."""
        return CachedRoom(
            self.block_path(index // self.settings.block_size), index % self.settings.block_size, self.cache_dir
        )


def _labels_of(thing: RoomObject) -> list[int]:
    """Category, colour and pattern of a thing; -1 where it has no name. A pattern counts where questions ask for it."""
    colour = -1 if thing.colour is None else COLOUR_NAMES.index(thing.colour)
    shows = colour >= 0 and thing.kind == "floor" and thing.category in PATTERNED
    return [
        CATEGORY_NAMES.index(thing.category),
        colour,
        PATTERN_NAMES.index(thing.pattern) if shows else -1,
    ]


def _code_sha256() -> str:
    """Of the code that makes rooms: blocks of other code are not mixed with new ones."""
    digest = hashlib.sha256()
    for path in sorted(Path(layout.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sparse(sample: Sample) -> dict:
    """A sample's row without what is empty, and without what every sample of a room has."""
    row = sample.to_row()
    return {key: value for key, value in row.items() if value not in (None, [], "", "{}") and key != "scene_id"}


class CachedRoom:
    """One room of a block file; pictures are read when they are asked for.

    Args:
        path (`Path`): Block file.
        row (`int`): Which of its rooms.
        data_root (`Path`): Folder that stands in the samples as theirs.

    Source:
        Ours.
    """

    def __init__(self, path: Path, row: int, data_root: Path):
        self.path, self.row, self.data_root = path, row, data_root
        with safe_open(path, "pt") as file:
            text = json.loads(bytes(self._part(file, "text").numpy()))
            self.object_labels = self._part(file, "labels").numpy().astype(np.int64)
            self.num_frames = file.get_slice("annotation_from_cam").get_shape()[1]
        self.scene_id, self.rows = text["scene_id"], text["rows"]

    def _part(self, file: safe_open, name: str) -> torch.Tensor:
        """This room's stretch of a tensor that all rooms share."""
        ends = file.get_tensor(f"{name}_end")
        start = int(ends[self.row - 1]) if self.row else 0
        return file.get_slice(name)[start : int(ends[self.row])]

    def samples(self, rows: Sequence[dict]) -> list[Sample]:
        """Samples of some of `rows`."""
        made = []
        for row in rows:
            row = {key: value for key, value in row.items() if key != "kind"}
            row["sample_id"] = f"{row['sample_id']}@{self.scene_id}"
            made.append(Sample.from_row({**row, "scene_id": self.scene_id, "data_root": str(self.data_root)}))
        return made

    def frames(self, indices: Sequence[int]) -> tuple[SceneFrames, np.ndarray]:
        """Frames and their instances `(S, H, W)`; `indices` among the kept ones, rising."""
        indices = list(indices)
        with safe_open(self.path, "pt") as file:
            rgb, depth_mm, instance, annotation_from_cam = (
                file.get_slice(name)[self.row][indices].numpy()
                for name in ("rgb", "depth_mm", "instance", "annotation_from_cam")
            )
            intrinsics_px = file.get_slice("intrinsics_px")[self.row].numpy()
        cam_from_world = np.linalg.inv(annotation_from_cam) @ annotation_from_cam[0]
        cam_from_world[0] = np.eye(4)
        frames = SceneFrames(
            scene_id=self.scene_id,
            source=f"{self.path}, room {self.row}",
            indices=indices,
            frame_ids=indices,
            rgb=list(rgb),
            depth_m=list(depth_mm.astype(np.float32) / np.float32(_MM)),
            intrinsics_px=np.repeat(intrinsics_px[None], len(indices), axis=0),
            cam_from_world=cam_from_world,
            annotation_from_world=annotation_from_cam[0],
            timestamps_s=None,
        )
        return frames, instance


class RoomScenes(torch.utils.data.Dataset):
    """Visits of rooms, in a fixed order: the longer the run, the more rooms are drawn from.

    Args:
        source (`RoomSource`): The rooms.
        num_visits (`int`): Length: visits of the whole run (steps times scenes per step).
        num_frames (`int`): Frames per visit, one at random from each of as many stretches of the kept ones, or spread evenly
            (`RoomsSettings.even_share`).
        prompts_per_scene (`int`): Prompts per visit.
        seed (`int`): Of everything that is drawn here.
        each_once (`bool`): Whether the visits are those of the first rooms in order, each once.

    Raises:
        ValueError: There are fewer rooms than are to be seen once.

    Source:
        Ours: a visit depends on the seed and its number alone, so any process may make it, and a run can be resumed anywhere.
    """

    def __init__(
        self,
        source: RoomSource,
        num_visits: int,
        num_frames: int,
        prompts_per_scene: int,
        seed: int = 0,
        each_once: bool = False,
    ):
        self.source, self.seed = source, seed
        self.num_frames, self.prompts_per_scene = num_frames, prompts_per_scene
        settings = source.settings
        if each_once:
            if num_visits > settings.num_blocks * settings.block_size:
                raise ValueError(f"rooms: wanted {num_visits} to see once; got {settings.num_rooms}")
            self.room_of_visit = np.arange(num_visits)
            return
        rng = keyed_generator(seed, 0, "visits")
        first = min(settings.first_blocks, settings.num_blocks)
        growth = np.arange(num_visits) / max(num_visits * settings.unlocked_at, 1)
        unlocked = np.minimum(first + np.floor(growth * (settings.num_blocks - first + 1)), settings.num_blocks)
        self.room_of_visit = np.floor(rng.random(num_visits) * unlocked * settings.block_size).astype(np.int64)

    def __len__(self) -> int:
        return len(self.room_of_visit)

    def __getitem__(self, visit: int) -> RoomScene:
        room = self.source.room(int(self.room_of_visit[visit]))
        rng = keyed_generator(self.seed, 0, "visit", str(visit))
        edges = np.arange(self.num_frames + 1) * room.num_frames // self.num_frames
        count = min(self.num_frames, room.num_frames)
        even_share = self.source.settings.even_share
        if count == room.num_frames:
            indices = np.arange(count)
        elif even_share and rng.random() < even_share:
            indices = np.linspace(0, room.num_frames - 1, count).round().astype(int)
        else:
            indices = edges[:-1] + np.floor(rng.random(count) * np.diff(edges)).astype(int)
        frames, instance = room.frames(indices.tolist())
        if rng.random() < self.source.settings.jpeg_share:
            frames.rgb[:] = _through_jpeg(frames.rgb, int(rng.integers(60, 96)))
        samples = room.samples(self._prompts(room.rows, rng))
        if self.source.settings.plain_prompts:
            samples += self._plain_prompts(room, instance, rng)
        return RoomScene(samples, frames, instance, room.object_labels)

    def _plain_prompts(self, room: CachedRoom, instance: np.ndarray, rng: np.random.Generator) -> list[Sample]:
        """Some plain prompts, evenly by kind."""
        names = (CATEGORY_NAMES, COLOUR_NAMES, PATTERN_NAMES)
        things = [
            tuple(None if value < 0 else known[value] for known, value in zip(names, labels, strict=True))
            for labels in room.object_labels.tolist()
        ]
        boxes = {
            row["object_ids"][0]: np.asarray(row["boxes_annotation"], dtype=np.float64)[0]
            for row in room.rows
            if row["task"] == "ground"
        }
        pixels = np.bincount(instance.reshape(-1), minlength=BACKGROUND + 1)
        found = plain_samples(room.scene_id, things, pixels, boxes, rng, str(room.data_root))
        return chosen_plain(found, self.source.settings.plain_prompts, rng)

    def _prompts(self, rows: list[dict], rng: np.random.Generator) -> list[dict]:
        """Prompts of a visit: a task by its share, a kind of question evenly among those that the room has, then one of that kind."""
        by_task: dict[str, dict[str, list[dict]]] = {}
        for row in rows:
            by_task.setdefault(row["task"], {}).setdefault(row["kind"], []).append(row)
        chosen = []
        while by_task and len(chosen) < self.prompts_per_scene:
            tasks = sorted(by_task)
            shares = np.array([self.source.settings.tasks.get(task, 0.0) for task in tasks])
            if not shares.sum():
                break
            task = tasks[int(rng.choice(len(tasks), p=shares / shares.sum()))]
            chosen.append(drawn_evenly(by_task[task], rng))
            if not by_task[task]:
                del by_task[task]
        return chosen


def _through_jpeg(pictures: Sequence[np.ndarray], quality: int) -> list[np.ndarray]:
    """Pictures as they are after a file of that quality."""
    changed = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        changed.append(np.asarray(Image.open(buffer)))
    return changed


class RoomMakers:
    """Processes that make the blocks ahead of the training; a context manager.

    Args:
        source (`RoomSource`): The rooms; `settings.makers` says how many processes.

    Source:
        Ours: a reader that comes to a block first makes it itself, so nothing waits for a process that has died. The makers are a
        program of their own (`python -m vidllm.train.room_source`), which loads the libraries once and then forks; it ends with its caller.
    """

    def __init__(self, source: RoomSource):
        self.source = source
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "RoomMakers":
        if self.source.settings.makers:
            settings = json.dumps(asdict(self.source.settings))
            command = [sys.executable, "-m", "vidllm.train.room_source", settings, str(self.source.cache_dir)]
            # One thread each: where every process starts a thread per core, they mostly wait for one another.
            threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            self.process = subprocess.Popen([*command, "--caller", str(os.getpid())], env={**os.environ, **threads})
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


def _caller_lives(caller: int | None) -> bool:
    """Whether the process that wants the blocks is still there."""
    if caller is None:
        return True
    try:
        os.kill(caller, 0)
    except ProcessLookupError:
        return False
    return True


def _make_blocks(source: RoomSource, first: int, caller: int | None) -> None:
    """What one maker does: every so many-th block, as long as somebody wants them."""
    os.nice(5)
    for block in range(first, source.settings.num_blocks, max(source.settings.makers, 1)):
        if not _caller_lives(caller):
            return
        source.block_path(block)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make all blocks of a source, with as many processes as its settings say.

    Args:
        arguments (`Sequence[str]`, *optional*): Settings as JSON, cache folder, and `--caller PID`: the process to end with.

    Raises:
        ValueError: The settings are not usable.

    Source:
        Ours.
    """
    parser = argparse.ArgumentParser(prog="python -m vidllm.train.room_source")
    parser.add_argument("settings", help="RoomsSettings as JSON")
    parser.add_argument("cache_dir")
    parser.add_argument("--caller", type=int, help="end when this process has ended")
    given = parser.parse_args(arguments)
    values = json.loads(given.settings)
    values["size_hw"] = tuple(values.get("size_hw", RoomsSettings.size_hw))
    source = RoomSource(RoomsSettings(**values), given.cache_dir)
    # Nothing of torch has run yet in this process, so that forking is safe and costs no second import.
    context = multiprocessing.get_context("fork")
    makers = [
        context.Process(target=_make_blocks, args=(source, first, given.caller), daemon=True)
        for first in range(max(source.settings.makers, 1))
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for process in makers:
        process.start()
    for process in makers:
        process.join()
    if any(process.exitcode for process in makers):
        raise SystemExit(f"rooms: makers ended with {[process.exitcode for process in makers]}")


__all__ = [
    "BACKGROUND",
    "CATEGORY_NAMES",
    "COLOUR_NAMES",
    "LABEL_KINDS",
    "PATTERN_NAMES",
    "CachedRoom",
    "RoomMakers",
    "RoomScene",
    "RoomScenes",
    "RoomSource",
    "RoomsSettings",
    "main",
]


if __name__ == "__main__":
    main()
