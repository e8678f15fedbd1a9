"""Situated questions about a room, in the manner of SQA3D: where somebody stands, which way they face, what that makes true.

Angles are counted from the person's heading, left positive.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .balance import Question
from .camera import clearance
from .furniture import FLOOR_CATEGORIES
from .layout import RoomObject
from .materials import COLOURS
from .mesh import RoomMesh
from .questions import NUMBERS, YES_NO
from .scene_graph import SceneGraph, plural, wrap_rad


SITUATED_KINDS = ("direction", "side", "what", "is", "can", "how_many", "closer", "situated_colour", "walk")
DIRECTIONS = ("front", "left", "right", "behind")
_SEATS = ("chair", "couch", "stool", "toilet", "bed")
_PHRASES = {
    "direction": (
        "Which direction is the {0} from me?",
        "Which way should I look to see the {0}?",
        "Which way do I turn to find the {0}?",
    ),
    "side": (
        "Which side of me is the {0} on?",
        "Which of my sides is the {0} on?",
        "Which hand is closer to the {0}?",
    ),
    "what": (
        "What is the nearest thing {0}?",
        "What piece of furniture is closest {0}?",
        "What do I find nearest {0}?",
    ),
    "is": ("Is the {0} {1}?", "Is it true that the {0} is {1}?"),
    "can": ("Can I see the {0} without turning around?", "Can I see the {0} from here if I only look ahead?"),
    "how_many": ("How many {0} are {1}?", "How many {0} can I count {1}?"),
    "closer": ("Am I closer to the {0} than to the {1}?", "Do I stand nearer to the {0} than to the {1}?"),
    "situated_colour": ("What color is the {0} {1}?", "What is the color of the {0} that is {1}?"),
    "walk": ("If I walk {0}, what do I reach first?", "Walking straight {0}, what would I bump into first?"),
}
_WAYS = {"backwards": np.pi, "to my left": np.pi / 2, "to my right": -np.pi / 2}
_SECTORS = {"front": "in front of me", "left": "to my left", "right": "to my right", "behind": "behind me"}


@dataclass(frozen=True)
class Situation:
    """Somebody in a room.

    Args:
        texts (`tuple` of `str`): The situation in words, three times.
        position (`np.ndarray` of shape `(2,)`): Metres, annotation frame.
        heading_rad (`float`): Counter-clockwise from +x, annotation frame.
        anchors (`tuple` of `int`): Object ids that the words name.

    Source:
        Ours.
    """

    texts: tuple[str, ...]
    position: np.ndarray
    heading_rad: float
    anchors: tuple[int, ...]

    def angle_to(self, thing: RoomObject) -> float:
        """Angle of an object's centre from the heading, radians, left positive."""
        offset = thing.centre[:2] - self.position
        return wrap_rad(np.arctan2(offset[1], offset[0]) - self.heading_rad)

    def sector(self, thing: RoomObject) -> str | None:
        """One of `DIRECTIONS`, or None where people would not agree."""
        degrees = np.degrees(self.angle_to(thing))
        if abs(degrees) <= 33:
            return "front"
        if 52 <= abs(degrees) <= 128:
            return "left" if degrees > 0 else "right"
        return "behind" if abs(degrees) >= 147 else None


def sqa3d_pose(situation: Situation, mesh: RoomMesh, scene_from_annotation: np.ndarray) -> tuple[dict, dict]:
    """Position and rotation as SQA3D's files state them.

    The position is counted from the middle of the bounds of the raw mesh (not aligned), height 0. The rotation is about z and turns
    (-1, 0, 0) into the direction that the person faces.

    Args:
        situation (`Situation`): The person.
        mesh (`RoomMesh`): Mesh of the room, in the frame of the files.
        scene_from_annotation (`np.ndarray` of shape `(4, 4)`): To that frame.

    Returns:
        `tuple` of `dict`: position x, y, z in metres; rotation `_x`, `_y`, `_z`, `_w`.

    Source:
        Upstream: SilongYong/SQA3D@f3f4cd00:utils/visualize_data.py (origin, and the arrow along -x).
    """
    vertices = mesh.vertices_scene.astype(np.float64)
    middle = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
    place = scene_from_annotation @ np.array([*situation.position, 0.0, 1.0])
    forward = scene_from_annotation[:2, :2] @ np.array([np.cos(situation.heading_rad), np.sin(situation.heading_rad)])
    half = (np.arctan2(forward[1], forward[0]) + np.pi) / 2
    position = {"x": float(place[0] - middle[0]), "y": float(place[1] - middle[1]), "z": 0}
    return position, {"_x": 0, "_y": 0, "_z": float(np.sin(half)), "_w": float(np.cos(half))}


def heading_from_sqa3d(rotation: dict, scene_from_annotation: np.ndarray) -> float:
    """Heading of a person from SQA3D's rotation, the inverse of `sqa3d_pose`.

    Args:
        rotation (`dict`): `_x`, `_y`, `_z`, `_w`.
        scene_from_annotation (`np.ndarray` of shape `(4, 4)`): To the frame of the files.

    Returns:
        `float`: radians, annotation frame.

    Source:
        Upstream: SilongYong/SQA3D@f3f4cd00:utils/visualize_data.py.
    """
    angle = 2 * np.arctan2(rotation["_z"], rotation["_w"]) + np.pi
    forward = np.linalg.inv(scene_from_annotation)[:2, :2] @ np.array([np.cos(angle), np.sin(angle)])
    return float(np.arctan2(forward[1], forward[0]))


def draw_situations(graph: SceneGraph, rng: np.random.Generator, count: int) -> list[Situation]:
    """Places where somebody can stand or sit.

    Args:
        graph (`SceneGraph`): Of the room.
        rng (`np.random.Generator`): Choices.
        count (`int`): How many are wished for; a full room may give fewer.

    Returns:
        `list` of `Situation`

    Source:
        Ours.
    """
    room = graph.room
    floor = [thing for thing in room.objects if thing.kind == "floor"]
    low, high = np.array([t.low[:2] for t in floor]), np.array([t.high[:2] for t in floor])
    room_xy = np.stack([room.low[:2], room.high[:2]])
    named = graph.named(graph.seen_floor())
    targets = [(t, n) for t, n in graph.named(graph.seen) if t.kind == "floor" or t.category == "door"]
    found: list[Situation] = []
    for _ in range(12 * count):
        if len(found) == count or not named:
            break
        anchor, name = named[int(rng.integers(len(named)))]
        others = [(t, n) for t, n in targets if t is not anchor]
        if anchor.category in _SEATS and rng.random() < 0.4:
            heading = float(np.arctan2(anchor.front[1], anchor.front[0]))
            verb = "sitting on" if anchor.category != "bed" else "lying on"
            texts = (
                f"I am {verb} the {name} and look the way it faces.",
                f"I am {verb} the {name}, with my back to its back.",
                f"I have settled on the {name} and face away from its back.",
            )
            if anchor.category in ("stool", "bed"):
                continue  # a stool has no front, and who lies looks at the ceiling
            found.append(Situation(texts, anchor.centre[:2].copy(), heading, (anchor.object_id,)))
            continue
        if not others:
            continue
        target, target_name = others[int(rng.integers(len(others)))]
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.6)
        side = np.array([np.cos(angle), np.sin(angle)])
        half = (anchor.high - anchor.low)[:2] / 2
        scale = (1 / np.maximum(np.abs(side) / half, 1e-9)).min()
        place = anchor.centre[:2] + side * (scale + reach)
        if clearance(place, low, high, room_xy) < 0.2 or np.linalg.norm(target.centre[:2] - place) < 0.7:
            continue
        offset = target.centre[:2] - place
        texts = (
            f"I am standing next to the {name} and facing the {target_name}.",
            f"I stand beside the {name} and look towards the {target_name}.",
            f"The {target_name} is right in front of me and I am next to the {name}.",
        )
        found.append(
            Situation(texts, place, float(np.arctan2(offset[1], offset[0])), (anchor.object_id, target.object_id))
        )
    return found


def _first_reached(graph: SceneGraph, situation: Situation, turn_rad: float) -> RoomObject | None:
    """The first thing on a straight way, if all lines of the width of a person agree on it."""
    angle = situation.heading_rad + turn_rad
    direction = np.array([np.cos(angle), np.sin(angle)])
    sideways = np.array([-direction[1], direction[0]])
    first = []
    for shift in (-0.15, 0.0, 0.15):
        start, best = situation.position + shift * sideways, (np.inf, None)
        for thing in graph.room.objects:
            if thing.kind != "floor":
                continue
            with np.errstate(divide="ignore"):
                edges = np.sort(
                    np.stack([(thing.low[:2] - start) / direction, (thing.high[:2] - start) / direction]), axis=0
                )
            near, far = edges[0].max(), edges[1].min()
            if near <= far and far > 0 and near < best[0]:
                best = (near, thing)
        first.append(best[1])
    thing = first[0]
    if (
        thing is None
        or any(other is not thing for other in first)
        or thing.object_id in situation.anchors
        or not graph.is_seen(thing)
    ):
        return None
    return thing


def situated_questions(
    graph: SceneGraph, situation: Situation, number: int, rng: np.random.Generator
) -> list[Question]:
    """Everything that could be asked from a place.

    Args:
        graph (`SceneGraph`): Of the room.
        situation (`Situation`): Who asks.
        number (`int`): Of the situation in its room, kept in `details`.
        rng (`np.random.Generator`): Phrasings and pairs.

    Returns:
        `list` of `Question`

    Source:
        Ours.
    """
    found: list[Question] = []

    def add(
        kind: str, words: tuple, answer: str, choices: Iterable[str], subjects: tuple[str, ...], about: tuple[int, ...]
    ) -> None:
        phrase = _PHRASES[kind][int(rng.integers(len(_PHRASES[kind])))]
        details = {"situation": number}
        found.append(
            Question(
                graph.room.scene_id, kind, phrase.format(*words), (answer,), tuple(choices), subjects, about, details
            )
        )

    # What the situation itself names is given away and not asked for.
    free = [(t, n) for t, n in graph.named(graph.seen) if t.object_id not in situation.anchors and t.on is None]
    free = [(t, n) for t, n in free if np.linalg.norm(t.centre[:2] - situation.position) > 0.5]
    sectors = {thing.object_id: situation.sector(thing) for thing in graph.noticeable}
    given = {graph.room.objects[i].category for i in situation.anchors}
    for thing, name in free:
        sector, about, word = sectors[thing.object_id], (thing.object_id,), (thing.category,)
        if thing.kind != "floor" and thing.category != "door":
            continue
        if sector is not None:
            add("direction", (name,), sector, DIRECTIONS, word, about)
            if sector in ("left", "right"):
                add("side", (name,), sector, ("left", "right"), word, about)
            truth = rng.random() < 0.5
            asked = sector if truth else str(rng.choice([d for d in DIRECTIONS if d != sector]))
            add("is", (name, _SECTORS[asked]), YES_NO[int(not truth)], YES_NO, (thing.category, asked), about)
        angle = abs(np.degrees(situation.angle_to(thing)))
        if angle < 28 and _in_sight(graph, situation, thing):
            add("can", (name,), "yes", YES_NO, word, about)
        elif angle > 75:
            add("can", (name,), "no", YES_NO, word, about)
    floor = [thing for thing in graph.noticeable if thing.kind == "floor" and thing.object_id not in situation.anchors]
    for sector, words in _SECTORS.items():
        # Whoever stands on the border of a sector makes the answer a matter of taste.
        inside = [thing for thing in floor if sectors[thing.object_id] in (sector, None)]
        inside.sort(key=lambda thing: np.linalg.norm(thing.centre[:2] - situation.position))
        reach = [np.linalg.norm(thing.centre[:2] - situation.position) for thing in inside]
        if inside and sectors[inside[0].object_id] == sector and (len(inside) == 1 or reach[1] > reach[0] + 0.6):
            nearest = inside[0]
            if graph.is_seen(nearest) and nearest.category not in given:
                about = (nearest.object_id,)
                add("what", (words,), nearest.category, FLOOR_CATEGORIES, (sector,), about)
        pieces = [thing for thing in graph.noticeable if thing.kind == "floor"]
        here = [thing for thing in pieces if sectors[thing.object_id] == sector]
        sure = all(graph.is_seen(thing) and sectors[thing.object_id] is not None for thing in pieces)
        if sure and len(here) <= 2 and sector != "front":  # in front is what the situation says
            about = tuple(thing.object_id for thing in here or pieces)
            add(
                "how_many",
                ("pieces of furniture", words),
                NUMBERS[len(here)],
                NUMBERS[:3],
                ("furniture", sector),
                about,
            )
        for category in sorted({thing.category for thing in floor}):
            like = [thing for thing in floor if thing.category == category]
            if not all(graph.is_seen(thing) and sectors[thing.object_id] is not None for thing in like):
                continue
            here = [thing for thing in like if sectors[thing.object_id] == sector]
            if len(here) <= 2 and category not in given:
                about = tuple(thing.object_id for thing in here) or tuple(thing.object_id for thing in like)
                add("how_many", (plural(category), words), NUMBERS[len(here)], NUMBERS[:3], (category, sector), about)
            if len(here) == 1 and here[0].colour is not None:
                add(
                    "situated_colour",
                    (category, words),
                    here[0].colour,
                    COLOURS,
                    (category,),
                    (here[0].object_id,),
                )
    pairs = [(a, b) for a in free for b in free if a[0] is not b[0]]
    for i in rng.permutation(len(pairs))[:3]:
        (a, a_name), (b, b_name) = pairs[i]
        difference = np.linalg.norm(b.centre[:2] - situation.position) - np.linalg.norm(
            a.centre[:2] - situation.position
        )
        if abs(difference) > 0.6:
            answer = YES_NO[int(difference < 0)]
            subjects = (f"first {a.category}", f"second {b.category}")
            add("closer", (a_name, b_name), answer, YES_NO, subjects, (a.object_id, b.object_id))
    for way, turn in _WAYS.items():
        reached = _first_reached(graph, situation, turn)
        if reached is not None and reached.category not in given:
            add("walk", (way,), reached.category, FLOOR_CATEGORIES, (way,), (reached.object_id,))
    return found


def _in_sight(graph: SceneGraph, situation: Situation, target: RoomObject) -> bool:
    """Whether nothing as high as a standing person's eyes is between."""
    steps = np.linspace(0, 1, 40)[:, None]
    way = situation.position + steps * (target.centre[:2] - situation.position)
    for thing in graph.room.objects:
        if thing is target or thing.high[2] < 1.1 or thing.kind == "wall":
            continue
        if ((way > thing.low[:2]) & (way < thing.high[:2])).all(axis=1).any():
            return False
    return True
