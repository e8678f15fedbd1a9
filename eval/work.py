"""What is to be done: questions of every benchmark grouped by scene, so that a scene is encoded once. No tensors."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vidllm.eval.truth import question_kinds, rooms_of_split
from vidllm.processing.benchmarks.frames import usable_rows
from vidllm.processing.benchmarks.load import load_benchmark
from vidllm.processing.benchmarks.prompts import DEFAULT_STYLE
from vidllm.processing.samples import Sample
from vidllm.processing.scenes.base import PoseUnavailableError, SkipCounter
from vidllm.processing.scenes.choose import choose_frames
from vidllm.processing.scenes.open import find_scenes, open_scene
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


# What each benchmark's authors evaluate; reconstruction takes the scenes of all of them.
EVALUATED_SPLITS = {"scanqa": "val", "sqa3d": "test", "scanrefer": "val", "scan2cap": "val"}
RECONSTRUCTION = "reconstruction"
EVAL_BENCHMARKS = (*EVALUATED_SPLITS, RECONSTRUCTION)


@dataclass(frozen=True)
class BenchmarkWork:
    """Questions of one benchmark that will be asked.

    Args:
        name (`str`): Benchmark.
        split (`str`): Its split.
        samples (`list[Sample]`): Those that can be asked and scored, in the order of the file.
        kinds (`list[str]`, *optional*): Kind of each of them.
        sha256 (`dict[str, str]`): Of the files that were read, by name.
        num_rows (`int`): Rows of the split.
        notes (`tuple[str, ...]`): What was left out, and why.
        ids (`tuple[str, ...]`): Of all rows of the split, by which its authors' scorer knows them.

    Source:
        Ours.
    """

    name: str
    split: str
    samples: list[Sample]
    kinds: list[str] | None
    sha256: dict[str, str]
    num_rows: int
    notes: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()


@dataclass
class SceneWork:
    """Everything that is asked about one scene.

    Args:
        scene_id (`str`): The scene.
        samples (`dict[str, list[Sample]]`): By benchmark.
        reconstruct (`bool`): Whether its reconstruction is scored.

    Source:
        Ours: scenes do not depend on each other, so that processes may share a list of them.
    """

    scene_id: str
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    reconstruct: bool = False


@dataclass(frozen=True)
class EvaluationWork:
    """All that one evaluation asks.

    Args:
        data_root (`str`): Absolute path.
        benchmarks (`dict[str, BenchmarkWork]`): Those with questions, by name.
        scenes (`list[SceneWork]`): Sorted by name.
        reconstructed (`tuple[str, ...]`): Scenes whose reconstruction is scored.
        notes (`tuple[str, ...]`): What was left out, and why.

    Source:
        Ours.
    """

    data_root: str
    benchmarks: dict[str, BenchmarkWork]
    scenes: list[SceneWork]
    reconstructed: tuple[str, ...]
    notes: tuple[str, ...]


def check_benchmarks(benchmarks: Sequence[str]) -> tuple[str, ...]:
    """Known benchmarks, each once.

    Args:
        benchmarks (`Sequence[str]`): What was asked for.

    Returns:
        `tuple[str, ...]`: in the order of `EVAL_BENCHMARKS`.

    Raises:
        VidLLMInputError: None, or an unknown one.

    Source:
        Ours.
    """
    for name in benchmarks:
        if name not in EVAL_BENCHMARKS:
            near = difflib.get_close_matches(str(name), EVAL_BENCHMARKS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise VidLLMInputError(f"benchmark: wanted one of {', '.join(EVAL_BENCHMARKS)}; got {name!r}{hint}")
    if not benchmarks:
        raise VidLLMInputError(f"benchmark: wanted one or more of {', '.join(EVAL_BENCHMARKS)}; got none")
    return tuple(name for name in EVAL_BENCHMARKS if name in benchmarks)


def checked_data_root(data_root: str | Path) -> str:
    """Absolute path of a data root that is there.

    Args:
        data_root (`str` or `Path`): The folder.

    Returns:
        `str`

    Raises:
        VidLLMInputError: There is no such folder.

    Source:
        Ours.
    """
    root = Path(data_root).expanduser().absolute()
    if not root.is_dir():
        raise VidLLMMissingFileError(f"{root}: no such folder; wanted a data root")
    return str(root)


def load_samples(
    name: str, data_root: str, split: str, prompts: str = DEFAULT_STYLE
) -> tuple[list[Sample], list[str] | None, dict[str, str]]:
    """All rows of a benchmark's split.

    Args:
        name (`str`): Benchmark.
        data_root (`str`): Absolute path of the data root.
        split (`str`): Its split.
        prompts (`str`): Name of the prompts.

    Returns:
        `tuple`: samples in the order of the file, the kind of each (None where not every row has one), SHA-256 of the files by name.

    Raises:
        VidLLMInputError: A file is absent or malformed.

    Source:
        Ours.
    """
    # Streamed: nothing is written to a cache for rows that are read once.
    rows, report = load_benchmark(name, data_root, split, streaming=True, prompts=prompts, with_report=True)
    samples = [Sample.from_row(row) for row in rows]
    return (
        samples,
        question_kinds(samples, name, data_root, split),
        {Path(path).name: value for path, value in report.sha256.items()},
    )


def plan(
    benchmarks: Sequence[str],
    data_root: str,
    num_frames: int | None,
    split: str | None = None,
    prompts: str = DEFAULT_STYLE,
    limit_scenes: int | None = None,
) -> EvaluationWork:
    """Find out what is to be asked.

    Args:
        benchmarks (`Sequence[str]`): From `check_benchmarks`.
        data_root (`str`): Absolute path of the data root.
        num_frames (`int`, *optional*): Frames that will be sampled of each scene; None: no scene is looked at, because predictions are there
            already.
        split (`str`, *optional*): Instead of the split that each benchmark's authors evaluate.
        prompts (`str`): Name of the prompts.
        limit_scenes (`int`, *optional*): Only the first so many scenes by name.

    Returns:
        `EvaluationWork`

    Raises:
        VidLLMInputError: A file is absent or malformed, or nothing can be asked.

    Source:
        Ours.
    """
    loaded, notes = {}, []
    for name in benchmarks:
        if name != RECONSTRUCTION:
            loaded[name] = load_samples(name, data_root, split or EVALUATED_SPLITS[name], prompts)
    rebuilt = _scenes_to_reconstruct(data_root, split, loaded) if RECONSTRUCTION in benchmarks else []
    scene_ids = sorted({sample.scene_id for samples, _, _ in loaded.values() for sample in samples} | set(rebuilt))
    chosen = set(scene_ids[:limit_scenes])
    if len(chosen) < len(scene_ids):
        notes.append(f"only the first {len(chosen)} of {len(scene_ids)} scenes")
    if num_frames is not None:
        rebuilt, left_out = _scorable_scenes([name for name in rebuilt if name in chosen], data_root, num_frames)
        notes += [f"{RECONSTRUCTION}: {line}" for line in left_out]
    scenes = {scene_id: SceneWork(scene_id, reconstruct=scene_id in rebuilt) for scene_id in sorted(chosen)}
    works = {}
    for name, (samples, kinds, sha256) in loaded.items():
        numbers = [number for number, sample in enumerate(samples) if sample.scene_id in chosen]
        asked, left_out = _askable(name, [samples[number] for number in numbers], data_root, num_frames)
        numbers = [numbers[position] for position in asked]
        works[name] = BenchmarkWork(
            name=name,
            split=split or EVALUATED_SPLITS[name],
            samples=[samples[number] for number in numbers],
            kinds=None if kinds is None else [kinds[number] for number in numbers],
            sha256=sha256,
            num_rows=len(samples),
            notes=tuple(left_out),
            ids=tuple(sample.official_id for sample in samples),
        )
        for sample in works[name].samples:
            scenes[sample.scene_id].samples.setdefault(name, []).append(sample)
    todo = [scene for scene in scenes.values() if scene.samples or scene.reconstruct]
    if not todo:
        reasons = "; ".join([*(note for work in works.values() for note in work.notes), *notes])
        raise VidLLMInputError(f"{data_root}: nothing to evaluate of {', '.join(benchmarks)}; {reasons or 'no scene'}")
    return EvaluationWork(
        data_root=data_root,
        benchmarks=works,
        scenes=todo,
        reconstructed=tuple(scene.scene_id for scene in todo if scene.reconstruct),
        notes=tuple(notes),
    )


def _askable(name: str, samples: list[Sample], data_root: str, num_frames: int | None) -> tuple[list[int], list[str]]:
    """Positions of the samples that can be asked and scored, and lines about the others."""
    scorable = [
        number
        for number, sample in enumerate(samples)
        if (sample.answers if name in ("scanqa", "sqa3d") else sample.object_ids)
    ]
    notes = []
    if len(scorable) < len(samples):
        notes.append(f"{name}: {len(samples) - len(scorable)} skipped: what is right is not in the file")
    if num_frames is None:
        known = [
            number
            for number in scorable
            if name != "scanrefer"
            or (samples[number].boxes_annotation is not None and len(samples[number].boxes_annotation))
        ]
        if len(known) < len(scorable):
            notes.append(f"{name}: {len(scorable) - len(known)} skipped: the true box is not known (no scan)")
        return known, notes
    usable, skipped = usable_rows([samples[number].to_row() for number in scorable], data_root, num_frames)
    return [scorable[position] for position in usable], [*notes, *(f"{name}: {line}" for line in skipped.summary())]


def _scenes_to_reconstruct(data_root: str, split: str | None, loaded: dict) -> list[str]:
    """Scenes of the evaluated split that are there: those of the rooms, else of the annotation files, else all."""
    present = set(find_scenes(data_root))
    rooms = rooms_of_split(data_root, split or "val")
    if rooms is not None:
        named = set(rooms["scenes"])
    else:
        named = set()
        for name, evaluated in EVALUATED_SPLITS.items():
            try:
                samples = loaded[name][0] if name in loaded else load_samples(name, data_root, split or evaluated)[0]
            except FileNotFoundError:
                continue
            named |= {sample.scene_id for sample in samples}
    return sorted(present & named if named else present)


def _scorable_scenes(scene_ids: Sequence[str], data_root: str, num_frames: int) -> tuple[list[str], list[str]]:
    """Scenes whose cameras are known, so that a reconstruction can be scored, and lines about the others."""
    scorable, skipped = [], SkipCounter()
    for scene_id in scene_ids:
        reader = open_scene(data_root, scene_id)
        try:
            first, *_ = choose_frames(reader, num_frames)
        except PoseUnavailableError:
            skipped.add("none of its frames has a valid pose", scene_id)
            continue
        if not reader.has_poses:
            skipped.add("it has no poses", scene_id)
        elif reader.frame(first, depth=False).intrinsics_px is None:
            skipped.add("it has no intrinsics", scene_id)
        else:
            scorable.append(scene_id)
    return scorable, skipped.summary()


__all__ = [
    "EVALUATED_SPLITS",
    "EVAL_BENCHMARKS",
    "RECONSTRUCTION",
    "BenchmarkWork",
    "EvaluationWork",
    "SceneWork",
    "check_benchmarks",
    "checked_data_root",
    "load_samples",
    "plan",
]
