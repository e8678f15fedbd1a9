"""The clip of the demonstration: one procedural room that no training saw, what is asked about it, and the truth.

Shapes: F frames, H W pixels.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vidllm.modeling_vidllm.geometry_vidllm import unproject_depth
from vidllm.processing.rooms.balance import Question
from vidllm.processing.rooms.descriptions import Description
from vidllm.processing.rooms.formats import VIDEO_FPS
from vidllm.processing.rooms.language import speak_about
from vidllm.processing.rooms.layout import SPLIT_NUMBERS, Room, make_room
from vidllm.processing.rooms.questions import QUESTION_KINDS
from vidllm.processing.rooms.render import RoomRenderer, visibility
from vidllm.processing.rooms.samples import room_boxes
from vidllm.processing.rooms.scene_graph import SceneGraph


CLIP_NAME, TRUTH_NAME = "demo.mp4", "demo.json"
NUM_QUESTIONS, LEAST_QUESTIONS = 10, 8
NUM_DESCRIPTIONS, LEAST_DESCRIPTIONS = 3, 2
NUM_PLACES = 2
WANTED_KINDS = ("colour", "existence", "place")
# Of the points in sight; the extremes would hang on single pixels.
EXTENT_PERCENTILES = (2, 98)


@dataclass(frozen=True)
class DemoClip:
    """A filmed room and what is true of it.

    Args:
        rgb (`np.ndarray` of shape `(F, H, W, 3)`, uint8): Pictures.
        truth (`dict`): What `demo.json` holds; see `demo_clip`.

    Source:
        Ours.
    """

    rgb: np.ndarray
    truth: dict[str, Any]


def choose_questions(questions: Sequence[Question]) -> list[Question]:
    """A mix of kinds, chosen without looking at any model's answers.

    Args:
        questions (`Sequence` of `Question`): Everything that could be asked about one room.

    Returns:
        `list` of `Question`: at most `NUM_QUESTIONS`; one of each kind, then a second of each, and so on.

    Source:
        Ours: of a kind the one whose answer, then whose objects, have come up least.
    """
    waiting = {kind: [question for question in questions if question.kind == kind] for kind in QUESTION_KINDS}
    answers: Counter[str] = Counter()
    objects: Counter[int] = Counter()
    chosen: list[Question] = []
    while any(waiting.values()) and len(chosen) < NUM_QUESTIONS:
        for kind in QUESTION_KINDS:
            if not waiting[kind] or len(chosen) == NUM_QUESTIONS:
                continue
            best = min(
                waiting[kind], key=lambda q: (answers[q.answers[0]], sum(objects[about] for about in q.object_ids))
            )
            waiting[kind].remove(best)
            chosen.append(best)
            answers[best.answers[0]] += 1
            objects.update(best.object_ids)
    return chosen


def _rounded(values: np.ndarray) -> list:
    """Numbers for a JSON file, nine decimals."""
    return np.round(np.asarray(values, np.float64), 9).tolist()


def seen_size_m(room: Room, depth_m: torch.Tensor, size_hw: tuple[int, int]) -> np.ndarray:
    """How large the part of a room is that the camera saw.

    Args:
        room (`Room`): The room.
        depth_m (`torch.Tensor` of shape `(F, H, W)`): Exact depth of all frames.
        size_hw (`tuple` of `int`): Height and width of the frames.

    Returns:
        `np.ndarray` of shape `(3,)`: x, y, z of the annotation frame, metres; 2nd to 98th percentile of the points of all pixels.

    Source:
        Ours: the same percentiles as for a reconstruction.
    """
    cam_from_annotation = torch.from_numpy(np.linalg.inv(room.track.annotation_from_cam))
    intrinsics_px = torch.from_numpy(room.intrinsics_px(size_hw)).expand(len(depth_m), 3, 3)
    points = unproject_depth(depth_m.double(), intrinsics_px, cam_from_annotation).reshape(-1, 3).numpy()
    return np.ptp(np.percentile(points, EXTENT_PERCENTILES, axis=0), axis=0)


def _described(graph: SceneGraph, descriptions: Sequence[Description]) -> list[int]:
    """Ids of the objects that have a description, the one that fills most pixels first."""
    ids = {description.object_id for description in descriptions}
    return sorted(ids, key=lambda number: (-int(graph.visibility.spread[number]), number))


def demo_clip(seed: int, number: int, difficulty: str = "easy", size_hw: tuple[int, int] = (96, 128)) -> DemoClip:
    """Film a room and write down what is true of it.

    Args:
        seed (`int`): Of the rooms.
        number (`int`): Of the scene, in the split `val`.
        difficulty (`str`): A level of the rooms.
        size_hw (`tuple` of `int`): Height and width of the pictures, even.

    Returns:
        `DemoClip`: its truth has `room`, `clip`, `camera`, `questions` (kind, question, accepted answers), `descriptions` (with the
        object's true box), `places` (a point in the object, its name and its reference descriptions). Lengths in metres; boxes and
        points in the annotation frame; `annotation_from_cam` per frame, the first of which is `annotation_from_world`.

    Raises:
        ValueError: The room is one that training may see, or there is too little to ask about it.

    Source:
        Ours: which question, object or place is taken depends on the room alone.
    """
    if number not in SPLIT_NUMBERS["val"]:
        unseen = SPLIT_NUMBERS["val"]
        raise ValueError(
            f"demo clip: wanted a room that no training sees, number {unseen[0]} to {unseen[-1]}; got {number}"
        )
    room = make_room(seed, number, difficulty)
    frames = RoomRenderer(room).render(size_hw)
    graph = SceneGraph(room, visibility(room, frames.instance.numpy()))
    language = speak_about(graph)
    boxes = room_boxes(room)
    questions = choose_questions(language.questions)
    described = _described(graph, language.descriptions)
    lacking = [kind for kind in WANTED_KINDS if kind not in {question.kind for question in questions}]
    if lacking or len(questions) < LEAST_QUESTIONS or len(described) < LEAST_DESCRIPTIONS:
        raise ValueError(
            f"demo clip: wanted a room with {LEAST_QUESTIONS} questions, {', '.join(WANTED_KINDS)} among their kinds, and "
            f"{LEAST_DESCRIPTIONS} objects to describe; seed {seed}, number {number}, {difficulty} has {len(questions)} questions"
            f"{' without ' + ', '.join(lacking) if lacking else ''} and {len(described)} objects; take another number"
        )
    grounded = described[:NUM_DESCRIPTIONS]
    # Rather what is not looked for by a description.
    placed = [*described[NUM_DESCRIPTIONS:], *grounded][:NUM_PLACES]
    texts = {object_id: [d.text for d in language.descriptions if d.object_id == object_id] for object_id in described}

    def named(object_id: int) -> dict[str, Any]:
        """What the object is."""
        thing = room.objects[object_id]
        return {"object_id": object_id, "category": thing.category, "colour": thing.colour}

    poses = room.track.annotation_from_cam
    truth = {
        "room": {
            "seed": seed,
            "number": number,
            "difficulty": difficulty,
            "scene_id": room.scene_id,
            "low_annotation": _rounded(room.low),
            "high_annotation": _rounded(room.high),
            "size_m": _rounded(room.high - room.low),
            "seen_size_m": _rounded(seen_size_m(room, frames.depth_m, size_hw)),
        },
        "clip": {"file": CLIP_NAME, "num_frames": len(poses), "size_hw": list(size_hw), "fps": VIDEO_FPS},
        "camera": {
            "path_length_m": round(float(np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1).sum()), 9),
            "intrinsics_px": _rounded(room.intrinsics_px(size_hw)),
            "annotation_from_world": _rounded(poses[0]),
            "annotation_from_cam": _rounded(poses),
        },
        "questions": [
            {"kind": question.kind, "question": question.text, "answers": list(question.answers)}
            for question in questions
        ],
        "descriptions": [
            {
                "description": texts[object_id][0],
                **named(object_id),
                "box_annotation": _rounded(boxes[object_id]),
            }
            for object_id in grounded
        ],
        "places": [
            {
                "point_annotation": _rounded(boxes[object_id, :3]),
                **named(object_id),
                "references": texts[object_id],
            }
            for object_id in placed
        ],
    }
    return DemoClip(frames.rgb.numpy(), truth)


__all__ = ["CLIP_NAME", "TRUTH_NAME", "DemoClip", "choose_questions", "demo_clip", "seen_size_m"]
