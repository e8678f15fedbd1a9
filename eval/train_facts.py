"""What can be known before looking at an evaluated scene: questions and answers, objects, boxes and distances of a train split.

Shapes: M boxes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from vidllm.eval.metrics.depth.scores import MAX_DEPTH_M
from vidllm.eval.truth import named_objects, read_rooms
from vidllm.eval.work import EVALUATED_SPLITS, load_samples
from vidllm.processing.rooms.blind import BlindItem
from vidllm.processing.rooms.language import compose_split, speak_about
from vidllm.processing.rooms.layout import SPLIT_NUMBERS, make_room
from vidllm.processing.rooms.render import VISIBILITY_HW, RoomRenderer, visibility
from vidllm.processing.rooms.samples import room_boxes
from vidllm.processing.rooms.scene_graph import SceneGraph
from vidllm.processing.samples import Sample
from vidllm.processing.scenes.choose import choose_frames
from vidllm.processing.scenes.open import open_scene
from vidllm.processing.video_reading_vidllm import VidLLMInputError


QUESTION_BENCHMARKS = ("scanqa", "sqa3d")
# A mean over so many views is steady; more would only take longer.
DEPTH_SCENES, DEPTH_FRAMES = 64, 4


@dataclass(frozen=True, eq=False)
class TrainFacts:
    """Facts of a train split.

    Args:
        source (`str`): Where they are from.
        questions (`dict[str, list[BlindItem]]`): By benchmark.
        objects (`list`): `(category, colour or None)` of every described object; empty where categories have no rooms' names.
        boxes_annotation (`np.ndarray` of shape `(M, 6)`): Boxes of described objects, annotation frame, metres.
        mean_log_depth (`float`, *optional*): Mean over scenes of the mean logarithm of depth in metres.

    Source:
        Ours.
    """

    source: str
    questions: dict[str, list[BlindItem]] = field(default_factory=dict)
    objects: list[tuple[str, str | None]] = field(default_factory=list)
    boxes_annotation: np.ndarray = field(default_factory=lambda: np.zeros((0, 6)))
    mean_log_depth: float | None = None


def blind_items(samples: list[Sample], kinds: list[str] | None) -> list[BlindItem]:
    """Questions as somebody knows them who does not see the scene.

    Args:
        samples (`list[Sample]`): With answers.
        kinds (`list[str]`, *optional*): Kind of each question.

    Returns:
        `list[BlindItem]`: the situation, if there is one, before the question; the first answer.

    Source:
        Ours.
    """
    return [
        BlindItem(
            kind="" if kinds is None else kinds[number],
            text=" ".join(filter(None, [sample.situation, sample.question])),
            answer=sample.answers[0],
        )
        for number, sample in enumerate(samples)
        if sample.answers
    ]


def facts_of_files(data_root: str, split: str = "train") -> TrainFacts | None:
    """Facts of a split that lies in a data root.

    Args:
        data_root (`str`): Absolute path of the data root.
        split (`str`): Which split.

    Returns:
        `TrainFacts`: of the benchmarks whose files are there, or None: there are none.

    Raises:
        VidLLMInputError: A file is malformed.

    Source:
        Ours.
    """
    questions, scenes, objects, boxes = {}, set(), [], []
    found_files = False
    for name in EVALUATED_SPLITS:
        try:
            samples, kinds, _ = load_samples(name, data_root, split)
        except FileNotFoundError:
            continue
        found_files = True
        scenes |= {sample.scene_id for sample in samples}
        if name in QUESTION_BENCHMARKS:
            questions[name] = blind_items(samples, kinds)
        elif name == "scan2cap":
            named = named_objects(data_root, split)
            for sample in samples:
                if named is not None:
                    objects.append(named[sample.scene_id, sample.object_ids[0]])
                if sample.boxes_annotation is not None:
                    boxes.extend(sample.boxes_annotation.tolist())
    if not found_files:
        return None
    return TrainFacts(
        f"{split} split of {data_root}",
        questions,
        objects,
        np.array(boxes, dtype=np.float64).reshape(-1, 6),
        mean_log_depth_of(data_root, sorted(scenes)),
    )


def mean_log_depth_of(data_root: str, scene_ids: list[str]) -> float | None:
    """Mean logarithm of the depth of scenes.

    Args:
        data_root (`str`): Where they lie.
        scene_ids (`list[str]`): Which; of many, some spread evenly.

    Returns:
        `float`: of depth in metres, a scene counting once; None where no scene has depth.

    Source:
        Ours: of constants the geometric mean has small relative errors.
    """
    step = max(1, len(scene_ids) // DEPTH_SCENES)
    means = []
    for scene_id in scene_ids[::step][:DEPTH_SCENES]:
        try:
            reader = open_scene(data_root, scene_id)
            indices = choose_frames(reader, DEPTH_FRAMES) if reader.has_depth else []
        except VidLLMInputError:
            # A train scene that is absent or broken tells nothing.
            continue
        maps = [reader.depth(index)[0] for index in indices]
        values = np.concatenate([np.zeros(0), *(m[(m > 0) & (m < MAX_DEPTH_M)] for m in maps if m is not None)])
        if values.size:
            means.append(float(np.log(values).mean()))
    return float(np.mean(means)) if means else None


def facts_of_rooms(
    difficulty: str, seed: int, num_rooms: int, progress: Callable[[int, int], None] | None = None
) -> TrainFacts:
    """Facts of the rooms' train split, made in memory: its language, boxes and depth, no files.

    Args:
        difficulty (`str`): As of the evaluated rooms.
        seed (`int`): As of the evaluated rooms.
        num_rooms (`int`): How many.
        progress (`Callable`, *optional*): Called with the rooms done and all rooms.

    Returns:
        `TrainFacts`: the same as of files that `vidllm rooms --split train` would write.

    Raises:
        ValueError: There are not so many rooms.

    Source:
        Ours.
    """
    if not 1 <= num_rooms <= len(SPLIT_NUMBERS["train"]):
        raise ValueError(f"train rooms: wanted 1 to {len(SPLIT_NUMBERS['train'])}; got {num_rooms}")
    spoken, objects, boxes, depths = [], [], [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the arrays are small
    try:
        for done, number in enumerate(SPLIT_NUMBERS["train"][:num_rooms], 1):
            room = make_room(seed, number, difficulty)
            frames = RoomRenderer(room).render(VISIBILITY_HW, colour=False)
            language = speak_about(SceneGraph(room, visibility(room, frames.instance.numpy())))
            spoken.append(language)
            described = sorted({description.object_id for description in language.descriptions})
            if described:
                boxes.append(room_boxes(room)[described])
                objects += [(room.objects[i].category, room.objects[i].colour) for i in described]
            depths.append(float(frames.depth_m.double().log().mean()))
            if progress is not None:
                progress(done, num_rooms)
    finally:
        torch.set_num_threads(threads)
    split = compose_split(spoken, seed)
    situated = [
        BlindItem(q.kind, f"{split.situations[q.scene][q.details['situation']].texts[0]} {q.text}", q.answers[0])
        for q in split.situated
    ]
    return TrainFacts(
        f"{num_rooms} {difficulty} train rooms made in memory, seed {seed}",
        {"scanqa": [BlindItem(q.kind, q.text, q.answers[0]) for q in split.questions], "sqa3d": situated},
        objects,
        np.concatenate([np.zeros((0, 6)), *boxes]),
        float(np.mean(depths)),
    )


def train_facts(
    data_root: str,
    blind_root: str | None = None,
    num_train_rooms: int = 400,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrainFacts | None:
    """Facts to fit baselines on.

    Args:
        data_root (`str`): Absolute path of the evaluated data root.
        blind_root (`str`, *optional*): Take the train split of this data root instead.
        num_train_rooms (`int`): Rooms to make where the data root is one of rooms without a train split.
        cache (`Path`, *optional*): File to keep what was made in.
        progress (`Callable`, *optional*): Called with the rooms done and all rooms.

    Returns:
        `TrainFacts`, or None: there is nothing to fit on.

    Raises:
        VidLLMInputError: `blind_root` has no train split, or a file is malformed.

    Source:
        Ours.
    """
    if blind_root is not None:
        facts = facts_of_files(blind_root)
        if facts is None:
            raise VidLLMInputError(
                f"{blind_root}: wanted the train split of a benchmark, to fit baselines on; found none"
            )
        return facts
    rooms = read_rooms(data_root)
    if rooms is None or "train" in rooms:
        return facts_of_files(data_root)
    evaluated = rooms["val"]
    asked = {"difficulty": evaluated["difficulty"], "seed": evaluated["seed"], "num_rooms": num_train_rooms}
    if cache is not None and cache.is_file():
        kept = json.loads(cache.read_text(encoding="utf-8"))
        if kept["asked"] == asked:
            return _from_json(kept["facts"])
    facts = facts_of_rooms(**asked, progress=progress)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(".part")
        part.write_text(json.dumps({"asked": asked, "facts": _to_json(facts)}), encoding="utf-8")
        part.replace(cache)
    return facts


def _to_json(facts: TrainFacts) -> dict:
    """Facts as JSON."""
    return {
        "source": facts.source,
        "questions": {
            name: [[item.kind, item.text, item.answer] for item in items] for name, items in facts.questions.items()
        },
        "objects": facts.objects,
        "boxes_annotation": facts.boxes_annotation.tolist(),
        "mean_log_depth": facts.mean_log_depth,
    }


def _from_json(content: dict) -> TrainFacts:
    """The inverse of `_to_json`."""
    return TrainFacts(
        content["source"],
        {name: [BlindItem(*item) for item in items] for name, items in content["questions"].items()},
        [tuple(thing) for thing in content["objects"]],
        np.array(content["boxes_annotation"], dtype=np.float64).reshape(-1, 6),
        content["mean_log_depth"],
    )


__all__ = ["TrainFacts", "blind_items", "facts_of_files", "facts_of_rooms", "mean_log_depth_of", "train_facts"]
