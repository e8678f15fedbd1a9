"""Descriptions that fit exactly one object of a room, in the manner of ScanRefer; grouped per object they are Scan2Cap's captions.

A description is a set of statements. Each statement knows which objects of the category it may fit (in doubt: it fits), and a
set of statements is used only if the target alone is left.
"""

import re
from dataclasses import dataclass

import numpy as np

from .layout import RoomObject
from .scene_graph import SceneGraph, article, gap_m, plural


@dataclass(frozen=True)
class Description:
    """One sentence or more about one object.

    Args:
        scene (`str`): Scene id.
        object_id (`int`): The object.
        category (`str`): Its category.
        number (`int`): Of the description among those of its object, from 0.
        text (`str`): Lower case.
        unique (`bool`): Whether the room holds no other object of the category.

    Source:
        Ours.
    """

    scene: str
    object_id: int
    category: str
    number: int
    text: str
    unique: bool


@dataclass(frozen=True)
class _Statement:
    """`words` follow "it is"; `fits` are the ids of the objects of the category that they may fit."""

    words: str
    fits: frozenset[int]


def tokens(text: str) -> list[str]:
    """A description cut into words and marks, as ScanRefer's `token` holds them.

    Args:
        text (`str`): The description.

    Returns:
        `list` of `str`: lower case.

    Source:
        Upstream: daveredrum/ScanRefer@9d748305 (the format).
    """
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())


def _statements(graph: SceneGraph, thing: RoomObject, like: list[RoomObject]) -> list[_Statement]:
    """Everything true of an object except its colour."""
    room, found = graph.room, []
    ids = frozenset(other.object_id for other in like)
    place = graph.place(thing)
    if place is not None and thing.kind == "floor":
        fits = {other.object_id for other in like if graph.place(other) in (place, None)}
        found.append(
            _Statement(
                place if "room" in place else place + (" of the room" if "corner" in place else ""), frozenset(fits)
            )
        )
    if thing.on is not None or thing.under is not None:
        host = room.objects[thing.on if thing.on is not None else thing.under]
        name = graph.name(host)
        if name is not None and graph.is_seen(host):
            word = "on" if thing.on is not None else "under"
            fits = {o.object_id for o in like if (o.on if word == "on" else o.under) == host.object_id}
            found.append(_Statement(f"{word} the {name}", frozenset(fits)))
    anchors = [
        (t, n) for t, n in graph.named(graph.seen) if t.category != thing.category and t.on is None and t.under is None
    ]
    if thing.kind == "floor":
        for anchor, name in anchors:
            gap = gap_m(thing, anchor)
            if gap < 0.7:
                fits = frozenset(other.object_id for other in like if gap_m(other, anchor) < 1.1)
                found.append(_Statement(f"next to the {name}", fits))
            elif gap > 2.0:
                fits = frozenset(other.object_id for other in like if gap_m(other, anchor) > 1.4)
                found.append(_Statement(f"far away from the {name}", fits))
            if anchor.kind == "floor" and anchor.category in (
                "couch",
                "desk",
                "bed",
                "piano",
                "refrigerator",
                "cabinet",
                "table",
                "toilet",
            ):
                offset = thing.centre[:2] - anchor.centre[:2]
                if _in_front(anchor, thing) and gap < 1.2 and np.linalg.norm(offset) > 0:
                    fits = frozenset(o.object_id for o in like if o is thing or _perhaps_in_front(anchor, o))
                    found.append(_Statement(f"in front of the {name}", fits))
        for (a, a_name), (b, b_name) in ((p, q) for i, p in enumerate(anchors) for q in anchors[i + 1 :]):
            if _between(thing, a, b, 0.35):
                fits = frozenset(o.object_id for o in like if o is thing or _between(o, a, b, 0.7))
                found.append(_Statement(f"between the {a_name} and the {b_name}", fits))
    if len(like) > 1 and thing.kind == "floor":
        group = plural(thing.category)
        heights = {other.object_id: other.high[2] for other in like}
        mine = heights[thing.object_id]
        rest = [height for key, height in heights.items() if key != thing.object_id]
        if mine > 1.1 * max(rest):
            found.append(_Statement(f"the tallest of the {group}", frozenset({thing.object_id})))
        if mine < 0.9 * min(rest):
            found.append(_Statement(f"the shortest of the {group}", frozenset({thing.object_id})))
        for anchor, name in anchors:
            gaps = {other.object_id: np.linalg.norm((other.centre - anchor.centre)[:2]) for other in like}
            mine = gaps[thing.object_id]
            rest = [gap for key, gap in gaps.items() if key != thing.object_id]
            if mine < min(rest) - 0.4:
                found.append(_Statement(f"the {thing.category} closest to the {name}", frozenset({thing.object_id})))
    return [statement for statement in found if statement.fits <= ids]


def _in_front(anchor: RoomObject, thing: RoomObject) -> bool:
    """Whether a thing stands clearly before the front of another."""
    offset = thing.centre[:2] - anchor.centre[:2]
    ahead = offset @ anchor.front
    aside = abs(offset @ np.array([-anchor.front[1], anchor.front[0]]))
    return bool(ahead > 0.3 and aside < 0.6 * ahead)


def _perhaps_in_front(anchor: RoomObject, thing: RoomObject) -> bool:
    """Whether somebody might say so."""
    offset = thing.centre[:2] - anchor.centre[:2]
    return bool(offset @ anchor.front > 0)


def _between(thing: RoomObject, a: RoomObject, b: RoomObject, width: float) -> bool:
    """Whether a thing stands on the way from one object to another."""
    way = (b.centre - a.centre)[:2]
    length = np.linalg.norm(way)
    if not 1.0 < length < 4.0:
        return False
    along = (thing.centre - a.centre)[:2] @ way / length
    aside = abs(np.cross(np.append(way / length, 0), np.append((thing.centre - a.centre)[:2], 0))[2])
    return bool(0.2 * length < along < 0.8 * length and aside < width)


def _write(rng: np.random.Generator, head: str, statements: list[str]) -> str:
    """Sentences around a name and what is stated."""
    style = int(rng.integers(4))
    if not statements:
        return [
            f"this is {article(head)}.",
            f"there is {article(head)} in the room.",
            f"{article(head)}.",
            f"find the {head}.",
        ][style]
    first, rest = statements[0], statements[1:]
    noun = first.startswith("the ")  # "the tallest of the chairs" follows "it is", but not "a chair that is" by itself
    if style == 0:
        sentences = [f"this is {article(head)}.", f"it is {first}."]
    elif style == 1 and not noun:
        sentences = [f"the {head} is {first}."]
    elif style == 2 and not noun:
        sentences = [f"there is {article(head)} {first}."]
    elif noun:
        sentences = [f"it is {article(head)}.", f"it is {first}."]
    else:
        sentences = [f"{article(head)} that is {first}."]
    sentences += [f"it is {'also ' if rng.random() < 0.5 else ''}{words}." for words in rest]
    return " ".join(sentences)


def describe_objects(graph: SceneGraph, rng: np.random.Generator, per_object: int = 4) -> list[Description]:
    """Descriptions of all seen objects that can be told apart.

    Args:
        graph (`SceneGraph`): Of the room.
        rng (`np.random.Generator`): Choices.
        per_object (`int`): At most so many of each; all different.

    Returns:
        `list` of `Description`

    Source:
        Ours.
    """
    found: list[Description] = []
    for thing in graph.seen:
        if thing.kind == "wall":
            continue
        like = [other for other in graph.room.objects if other.category == thing.category]
        statements = _statements(graph, thing, like)
        same_colour = {other.object_id for other in like if other.colour == thing.colour}
        texts: list[str] = []
        for _ in range(8 * per_object):
            if len(texts) == per_object:
                break
            with_colour = thing.colour is not None and rng.random() < 0.75
            chosen = [statements[i] for i in rng.permutation(len(statements))[: int(rng.integers(0, 3))]]
            left = set(same_colour) if with_colour else {other.object_id for other in like}
            for statement in chosen:
                left &= statement.fits
            if left != {thing.object_id}:
                continue
            head = f"{thing.colour} {thing.category}" if with_colour else thing.category
            text = _write(rng, head, [statement.words for statement in chosen])
            if text not in texts:
                texts.append(text)
        for number, text in enumerate(texts):
            found.append(
                Description(graph.room.scene_id, thing.object_id, thing.category, number, text, unique=len(like) == 1)
            )
    return found
