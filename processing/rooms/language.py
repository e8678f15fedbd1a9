"""Language about a split of rooms: questions (ScanQA), situated questions (SQA3D), descriptions (ScanRefer, Scan2Cap)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .balance import Question, balance
from .descriptions import Description, describe_objects
from .questions import room_questions
from .scene_graph import SceneGraph
from .situations import Situation, draw_situations, situated_questions


@dataclass(frozen=True)
class Language:
    """Everything said about the rooms of a split.

    Args:
        questions (`list` of `Question`): In the manner of ScanQA.
        situated (`list` of `Question`): In the manner of SQA3D; `details["situation"]` indexes the scene's situations.
        situations (`dict`): `list` of `Situation` by scene id.
        descriptions (`list` of `Description`): In the manner of ScanRefer.

    Source:
        Ours.
    """

    questions: list[Question]
    situated: list[Question]
    situations: dict[str, list[Situation]]
    descriptions: list[Description]


@dataclass(frozen=True)
class SceneLanguage:
    """Candidates of one room, before the split is balanced; the same for the same room.

    Args:
        scene (`str`): Scene id.
        questions, situated (`list` of `Question`): Everything that could be asked.
        situations (`list` of `Situation`): Whence.
        descriptions (`list` of `Description`): All.

    Source:
        Ours.
    """

    scene: str
    questions: list[Question]
    situated: list[Question]
    situations: list[Situation]
    descriptions: list[Description]


def speak_about(graph: SceneGraph, num_situations: int = 12) -> SceneLanguage:
    """Candidates of one room.

    Args:
        graph (`SceneGraph`): Of the room.
        num_situations (`int`): Places to ask from.

    Returns:
        `SceneLanguage`

    Source:
        Ours: drawn by seed, scene number and nothing else.
    """
    room = graph.room
    rng = np.random.default_rng([room.seed, room.number, 77])
    questions = room_questions(graph, rng)
    situations = draw_situations(graph, rng, num_situations)
    situated = [q for number, s in enumerate(situations) for q in situated_questions(graph, s, number, rng)]
    return SceneLanguage(room.scene_id, questions, situated, situations, describe_objects(graph, rng))


def compose_split(scenes: Iterable[SceneLanguage], seed: int) -> Language:
    """Balance the questions of a split.

    Args:
        scenes (`Iterable` of `SceneLanguage`): Candidates of every room.
        seed (`int`): Of the data set.

    Returns:
        `Language`: a scene's questions depend on all scenes of the split, because answers are balanced over it.

    Source:
        Ours.
    """
    scenes = list(scenes)
    rng = np.random.default_rng([seed, 78])
    return Language(
        questions=balance([q for scene in scenes for q in scene.questions], rng),
        situated=balance([q for scene in scenes for q in scene.situated], rng),
        situations={scene.scene: scene.situations for scene in scenes},
        descriptions=[description for scene in scenes for description in scene.descriptions],
    )
