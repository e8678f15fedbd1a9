"""Questions about a room, in the manner of ScanQA: ten kinds, several phrasings each."""

from collections import Counter

import numpy as np

from .balance import Question
from .furniture import FLOOR_CATEGORIES, SMALL_CATEGORIES
from .layout import RoomObject
from .materials import COLOURS, NAMED_PATTERNS
from .scene_graph import PLACES, SceneGraph, article, plural


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
HOSTS = ("table", "desk", "bed", "couch", "cabinet", "stool", "piano", "washing machine")
YES_NO = ("yes", "no")
QUESTION_KINDS = (
    "colour",
    "pattern",
    "count",
    "existence",
    "relation",
    "nearest",
    "place",
    "on",
    "support",
    "comparison",
)
# Small or cluttered surfaces do not show their pattern.
PATTERNED = tuple(name for name in FLOOR_CATEGORIES if name not in ("bookshelf", "plant", "stool", "trash can"))
_PLACED = tuple(name for name, category in FLOOR_CATEGORIES.items() if not category.hugs_wall)
_PHRASES = {
    "colour": ("What color is the {0}?", "What is the color of the {0}?", "Which color does the {0} have?"),
    "pattern": (
        "What pattern does the {0} have?",
        "What kind of pattern is on the {0}?",
        "How is the surface of the {0} patterned?",
    ),
    "count": ("How many {0} are in the room?", "How many {0} are there?", "What is the number of {0} in this room?"),
    "existence": ("Is there {0} in the room?", "Can {0} be found in this room?", "Does the room have {0}?"),
    "relation": (
        "At the {2} of the video, is the {0} to the left or to the right of the {1}?",
        "Is the {0} left or right of the {1} when the video {3}?",
    ),
    "nearest": (
        "What is closest to the {0}?",
        "Which object is nearest to the {0}?",
        "What stands right next to the {0}?",
    ),
    "place": ("Where is the {0}?", "Where in the room is the {0} located?", "In what part of the room is the {0}?"),
    "on": ("What is on top of the {0}?", "What is on the {0}?", "What can be found on the {0}?"),
    "support": ("What is the {0} on?", "On what is the {0} placed?", "What is under the {0}, holding it up?"),
    "closer": ("Is the {0} closer to the {2} than the {1}?", "Is the {0} nearer to the {2} than the {1} is?"),
    "taller": ("Is the {0} taller than the {1}?", "Does the {0} reach higher than the {1}?"),
    "more": ("Are there more {0} than {1}?", "Does the room have more {0} than {1}?"),
}


def _phrase(rng: np.random.Generator, kind: str, *words: str) -> str:
    """One of the phrasings of a kind."""
    return _PHRASES[kind][int(rng.integers(len(_PHRASES[kind])))].format(*words)


def _choose(rng: np.random.Generator, things: list, count: int) -> list:
    """A few of a list, in random order."""
    return [things[i] for i in rng.permutation(len(things))[:count]]


def _attributes(graph: SceneGraph, rng: np.random.Generator) -> list[Question]:
    """Colours and patterns."""
    scene, found = graph.room.scene_id, []
    for thing in graph.seen:
        alone = graph.name(thing) == thing.category
        if alone and thing.colour is not None:
            text = _phrase(rng, "colour", thing.category)
            found.append(
                Question(scene, "colour", text, (thing.colour,), tuple(COLOURS), (thing.category,), (thing.object_id,))
            )
        name = graph.name(thing)
        large = graph.visibility.spread[thing.object_id] >= 4 * 50
        if name is not None and thing.kind == "floor" and thing.category in PATTERNED and large:
            text = _phrase(rng, "pattern", name)
            subjects = (thing.category, thing.colour)
            found.append(
                Question(scene, "pattern", text, (thing.pattern,), NAMED_PATTERNS, subjects, (thing.object_id,))
            )
    return found


def _counts(graph: SceneGraph, rng: np.random.Generator) -> list[Question]:
    """How many there are, and whether there are any."""
    scene, found = graph.room.scene_id, []
    seen = Counter(thing.category for thing in graph.seen)
    present = {thing.category for thing in graph.room.objects}
    for category in (*FLOOR_CATEGORIES, *SMALL_CATEGORIES):
        if not graph.is_certain(category):
            continue
        things = graph.of_category(category)
        ids = tuple(thing.object_id for thing in things)
        if 1 <= seen[category] <= 3 and category in FLOOR_CATEGORIES:
            text = _phrase(rng, "count", plural(category))
            answers = (NUMBERS[seen[category]], str(seen[category]))
            found.append(Question(scene, "count", text, answers, NUMBERS[1:4], (category,), ids))
        if seen[category]:
            text = _phrase(rng, "existence", article(category))
            found.append(Question(scene, "existence", text, ("yes",), YES_NO, (category,), ids))
            colours = {thing.colour for thing in graph.room.objects if thing.category == category}
            if None not in colours and things:
                thing = things[int(rng.integers(len(things)))]
                other = str(rng.choice([name for name in COLOURS if name not in colours]))
                for colour, answer, about in ((thing.colour, "yes", (thing.object_id,)), (other, "no", ids)):
                    text = _phrase(rng, "existence", article(f"{colour} {category}"))
                    found.append(
                        Question(scene, "existence", text, (answer,), YES_NO, (f"coloured {category}", colour), about)
                    )
        elif category not in present:
            text = _phrase(rng, "existence", article(category))
            # Nothing in the room is meant; as the benchmarks always name an object, the floor stands in.
            found.append(Question(scene, "existence", text, ("no",), YES_NO, (category,), (floor_id(graph),)))
    return found


def floor_id(graph: SceneGraph) -> int:
    """Object id of the floor: the instances of the room's shell follow the objects, four walls first.

    Args:
        graph (`SceneGraph`): Of the room.

    Returns:
        `int`

    Source:
        Ours.
    """
    return len(graph.room.objects) + 4


def _relations(graph: SceneGraph, rng: np.random.Generator) -> list[Question]:
    """Left or right in the first or last picture."""
    scene, found = graph.room.scene_id, []
    for frame, pixels, when, verb in (
        (0, graph.visibility.first, "start", "starts"),
        (-1, graph.visibility.last, "end", "ends"),
    ):
        in_view = [(t, n) for t, n in graph.named(graph.seen) if pixels[t.object_id] >= 50 and t.kind != "wall"]
        for first, second in _choose(rng, [(a, b) for a in in_view for b in in_view if a[0] is not b[0]], 4):
            difference = graph.view(first[0], frame)[0] - graph.view(second[0], frame)[0]
            if abs(difference) < np.radians(9):
                continue
            text = _phrase(rng, "relation", first[1], second[1], when, verb)
            subjects = (f"first {first[0].category}", f"second {second[0].category}", when)
            answer = "right" if difference > 0 else "left"
            about = (first[0].object_id, second[0].object_id)
            found.append(Question(scene, "relation", text, (answer,), ("left", "right"), subjects, about))
    return found


def _surroundings(graph: SceneGraph, rng: np.random.Generator) -> list[Question]:
    """What is nearest, where things are, what stands on what."""
    scene, found = graph.room.scene_id, []
    floor = [thing for thing in graph.noticeable if thing.kind == "floor"]
    for thing, name in graph.named(graph.seen_floor()):
        nearest = graph.nearest(thing, [other for other in floor if other is not thing])
        if (
            nearest is not None
            and graph.is_seen(nearest)
            and nearest.category != thing.category
            and gap_is_small(thing, nearest)
        ):
            text = _phrase(rng, "nearest", name)
            about = (nearest.object_id,)
            found.append(
                Question(
                    scene, "nearest", text, (nearest.category,), tuple(FLOOR_CATEGORIES), (thing.category,), about
                )
            )
        place = graph.place(thing)
        if place is not None and thing.category in _PLACED:
            text = _phrase(rng, "place", name)
            found.append(Question(scene, "place", text, (place,), PLACES, (thing.category,), (thing.object_id,)))
    hosts = {thing.object_id: thing for thing in graph.seen}
    for thing in graph.seen:
        host = hosts.get(thing.on)
        if host is None:
            continue
        if graph.name(host) is not None:
            text = _phrase(rng, "on", graph.name(host))
            about = (thing.object_id,)
            found.append(
                Question(scene, "on", text, (thing.category,), tuple(SMALL_CATEGORIES), (host.category,), about)
            )
        if graph.name(thing) is not None:
            text = _phrase(rng, "support", graph.name(thing))
            found.append(
                Question(scene, "support", text, (host.category,), HOSTS, (thing.category,), (host.object_id,))
            )
    return found


def gap_is_small(thing: RoomObject, other: RoomObject) -> bool:
    """Whether two objects are near enough for one to be called next to the other.

    Args:
        thing (`RoomObject`): The objects.
        other (`RoomObject`): The objects.

    Returns:
        `bool`

    Source:
        Ours: 1.5 m between their bounds.
    """
    apart = np.maximum(np.maximum(thing.low[:2] - other.high[:2], other.low[:2] - thing.high[:2]), 0)
    return bool(np.linalg.norm(apart) < 1.5)


def _comparisons(graph: SceneGraph, rng: np.random.Generator) -> list[Question]:
    """Closer, taller, more; which of the two comes first is a toss, so that the words tell nothing."""
    scene, found = graph.room.scene_id, []
    named = [(t, n) for t, n in graph.named(graph.seen) if t.on is None and t.kind != "wall"]
    triples = [(a, b, c) for a in named for b in named for c in named if a[0] is not b[0] and c[0] not in (a[0], b[0])]
    for a, b, c in _choose(rng, triples, 3):
        difference = np.linalg.norm((b[0].centre - c[0].centre)[:2]) - np.linalg.norm((a[0].centre - c[0].centre)[:2])
        if abs(difference) < 0.6:
            continue
        text = _phrase(rng, "closer", a[1], b[1], c[1])
        subjects = (f"first {a[0].category}", f"second {b[0].category}", f"to {c[0].category}")
        about = (a[0].object_id, b[0].object_id, c[0].object_id)
        found.append(Question(scene, "comparison", text, (YES_NO[int(difference < 0)],), YES_NO, subjects, about))
    pairs = [(a, b) for a in named for b in named if a[0] is not b[0] and a[0].category == b[0].category]
    for a, b in _choose(rng, pairs, 2):
        difference = a[0].high[2] - b[0].high[2]
        if abs(difference) > 0.12 * max(a[0].high[2], b[0].high[2]):
            text = _phrase(rng, "taller", a[1], b[1])
            subjects = (f"taller {a[0].category}", a[0].colour, b[0].colour)
            about = (a[0].object_id, b[0].object_id)
            found.append(Question(scene, "comparison", text, (YES_NO[int(difference < 0)],), YES_NO, subjects, about))
    seen = Counter(
        thing.category for thing in graph.seen if thing.kind == "floor" and graph.is_certain(thing.category)
    )
    pairs = [(a, b) for a in sorted(seen) for b in sorted(seen) if seen[a] != seen[b]]
    for a, b in _choose(rng, pairs, 1):
        text = _phrase(rng, "more", plural(a), plural(b))
        about = tuple(thing.object_id for thing in graph.seen if thing.category in (a, b))
        answer = YES_NO[int(seen[a] < seen[b])]
        found.append(Question(scene, "comparison", text, (answer,), YES_NO, (f"more {a}", f"than {b}"), about))
    return found


def room_questions(graph: SceneGraph, rng: np.random.Generator) -> list[Question]:
    """Everything that could be asked about a room; `balance` chooses from the candidates of a split.

    Args:
        graph (`SceneGraph`): Of the room.
        rng (`np.random.Generator`): Phrasings and pairs.

    Returns:
        `list` of `Question`

    Source:
        Ours.
    """
    return [
        question
        for make in (_attributes, _counts, _relations, _surroundings, _comparisons)
        for question in make(graph, rng)
    ]
