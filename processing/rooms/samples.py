"""Samples of rooms that are made on the fly and never written to files: the same prompts and targets as the loaders give."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vidllm.processing.benchmarks.prompts import DEFAULT_STYLE, box_turn, reply_turn, spoken, user_turn
from vidllm.processing.rooms.balance import Question, balance
from vidllm.processing.rooms.language import SceneLanguage, speak_about
from vidllm.processing.rooms.layout import SPLIT_NUMBERS, Room, make_room
from vidllm.processing.rooms.mesh import boxes_annotation, build_mesh
from vidllm.processing.rooms.render import visibility
from vidllm.processing.rooms.scene_graph import SceneGraph
from vidllm.processing.samples import Sample


def balanced_kinds(questions: Iterable[Question], rng: np.random.Generator) -> list[Question]:
    """Questions whose answers are balanced within each kind; unlike `balance`, no kind is cut down to its share of all.

    Args:
        questions (`Iterable` of `Question`): Candidates of some rooms.
        rng (`np.random.Generator`): Order in which they are considered.

    Returns:
        `list` of `Question`: by kind, then scene.

    Source:
        Ours: for training every question counts, as long as its answer cannot be guessed; who draws from them sees to the shares.
    """
    by_kind: dict[str, list[Question]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, []).append(question)
    return [question for kind in sorted(by_kind) for question in balance(by_kind[kind], rng)]


def room_boxes(room: Room) -> np.ndarray:
    """Boxes of a room's objects by ScanNet's rule.

    Args:
        room (`Room`): The room.

    Returns:
        `np.ndarray` of shape `(objects, 6)`, float64: annotation frame, metres.

    Source:
        Ours.
    """
    boxes = boxes_annotation(room, build_mesh(room))
    return np.stack([boxes[thing.object_id] for thing in room.objects]).astype(np.float64)


def room_samples(
    language: SceneLanguage,
    boxes: np.ndarray,
    questions: Sequence[Question],
    situated: Sequence[Question],
    split: str = "train",
    prompts: str = DEFAULT_STYLE,
) -> list[tuple[str, Sample]]:
    """Everything that is asked about one room.

    Args:
        language (`SceneLanguage`): What can be said about it.
        boxes (`np.ndarray` of shape `(objects, 6)`): Annotation frame, metres, by object id.
        questions (`Sequence` of `Question`): Those of its questions that are asked.
        situated (`Sequence` of `Question`): Those of its situated questions that are asked, with the first wording of the standpoint.
        split (`str`): Goes into the ids.
        prompts (`str`): Name of the prompts, one of `STYLES`.

    Returns:
        `list` of `(kind, Sample)`: tasks `qa`, `sqa`, `ground` and `caption` (one sample per description); kind as the question has it, else the task.

    Source:
        Ours: messages as the loaders of ScanQA, SQA3D, ScanRefer and Scan2Cap (`per_description`) make them.
    """
    scene, found = language.scene, []
    for number, question in enumerate(questions):
        turns = [user_turn(prompts, "qa", question=question.text), reply_turn(spoken(question.answers[0]))]
        found.append(
            (
                question.kind,
                Sample(
                    sample_id=f"scanqa/{split}/{scene}-{number}",
                    scene_id=scene,
                    task="qa",
                    messages=turns,
                    benchmark="scanqa",
                    split=split,
                    question=question.text,
                    answers=question.answers,
                ),
            )
        )
    for number, question in enumerate(situated):
        situation = language.situations[question.details["situation"]].texts[0]
        turns = [
            user_turn(prompts, "sqa", situation=situation, question=question.text),
            reply_turn(spoken(question.answers[0])),
        ]
        found.append(
            (
                question.kind,
                Sample(
                    sample_id=f"sqa3d/{split}/{scene}-{number}",
                    scene_id=scene,
                    task="sqa",
                    messages=turns,
                    benchmark="sqa3d",
                    split=split,
                    question=question.text,
                    answers=question.answers[:1],
                    situation=situation,
                ),
            )
        )
    for description in language.descriptions:
        name = f"{scene}|{description.object_id}|{description.number}"
        box = boxes[description.object_id : description.object_id + 1]
        common = {
            "scene_id": scene,
            "split": split,
            "question": description.text,
            "object_ids": (description.object_id,),
            "boxes_annotation": box,
        }
        turns = [user_turn(prompts, "ground", description=description.text), box_turn()]
        found.append(
            (
                "ground",
                Sample(
                    sample_id=f"scanrefer/{split}/{name}",
                    task="ground",
                    messages=turns,
                    benchmark="scanrefer",
                    box_block=(0,),
                    **common,
                ),
            )
        )
        turns = [user_turn(prompts, "caption"), reply_turn(spoken(description.text))]
        found.append(
            (
                "caption",
                Sample(
                    sample_id=f"scan2cap/{split}/{name}",
                    task="caption",
                    messages=turns,
                    benchmark="scan2cap",
                    references=(description.text,),
                    points=box[:, :3],
                    box_block=(0,),
                    **common,
                ),
            )
        )
    return found


def room_texts(seed: int, count: int, levels: Sequence[str] = ("easy", "standard", "hard")) -> Iterator[str]:
    """Everything that may be said about some rooms, as it stands in prompts and replies: what a tokenizer can learn from.

    Args:
        seed (`int`): Of the rooms.
        count (`int`): Rooms of each level.
        levels (`Sequence[str]`): Difficulties.

    Yields:
        `str`: one turn each.

    Source:
        Ours.
    """
    for level in levels:
        for number in SPLIT_NUMBERS["train"][:count]:
            room = make_room(seed, number, level)
            language = speak_about(SceneGraph(room, visibility(room)))
            boxes = np.zeros((len(room.objects), 6))
            for _, sample in room_samples(language, boxes, language.questions, language.situated):
                for turn in sample.messages:
                    yield from (block["text"] for block in turn["content"] if block["type"] == "text")


__all__ = ["balanced_kinds", "room_boxes", "room_samples", "room_texts"]
