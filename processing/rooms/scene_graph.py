"""What can be said about a room: which objects were seen, how they are named, where they stand to one another."""

import numpy as np

from .furniture import CATEGORIES
from .layout import Room, RoomObject
from .render import Visibility


SEEN_PIXELS = 50
UNSEEN_PIXELS = 5
CORNER, WALL, MIDDLE = "in the corner", "against the wall", "in the middle of the room"
PLACES = (CORNER, WALL, MIDDLE)
_PLURALS = {"couch": "couches", "bookshelf": "bookshelves", "box": "boxes"}


def plural(category: str) -> str:
    """Plural of a category.

    Args:
        category (`str`): One of `CATEGORIES`.

    Returns:
        `str`

    Source:
        Ours.
    """
    return _PLURALS.get(category, category + "s")


def article(phrase: str) -> str:
    """A phrase with its indefinite article.

    Args:
        phrase (`str`): Such as `orange chair`.

    Returns:
        `str`: such as `an orange chair`.

    Source:
        Ours.
    """
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def gap_m(a: RoomObject, b: RoomObject) -> float:
    """Horizontal distance between the bounds of two objects.

    Args:
        a (`RoomObject`): The objects.
        b (`RoomObject`): The objects.

    Returns:
        `float`: metres, 0 where they overlap seen from above.

    Source:
        Ours.
    """
    apart = np.maximum(np.maximum(a.low[:2] - b.high[:2], b.low[:2] - a.high[:2]), 0)
    return float(np.linalg.norm(apart))


def wrap_rad(angle: float) -> float:
    """An angle brought to -pi..pi.

    Args:
        angle (`float`): Radians.

    Returns:
        `float`: radians.

    Source:
        Ours.
    """
    return float((angle + np.pi) % (2 * np.pi) - np.pi)


class SceneGraph:
    """Objects of a room with what the camera saw of them.

    An object is *seen* with at least `SEEN_PIXELS` pixels in one of eight frames; *hidden* if it has hardly a pixel anywhere; what
    lies between may be noticed or not, so nothing is asked whose answer depends on it.

    Args:
        room (`Room`): The room.
        visibility (`Visibility`): Of its objects.

    Source:
        Ours.
    """

    def __init__(self, room: Room, visibility: Visibility):
        self.room, self.visibility = room, visibility
        self.seen = [thing for thing in room.objects if visibility.spread[thing.object_id] >= SEEN_PIXELS]
        self.noticeable = [thing for thing in room.objects if visibility.anywhere[thing.object_id] > UNSEEN_PIXELS]
        seen_ids = {thing.object_id for thing in self.seen}
        self.unsure = [thing for thing in self.noticeable if thing.object_id not in seen_ids]

    def is_seen(self, thing: RoomObject) -> bool:
        """Whether an object may be asked about."""
        return bool(self.visibility.spread[thing.object_id] >= SEEN_PIXELS)

    def of_category(self, category: str) -> list[RoomObject]:
        """Seen objects of a category."""
        return [thing for thing in self.seen if thing.category == category]

    def is_certain(self, category: str) -> bool:
        """Whether every noticeable object of a category is seen."""
        return all(thing.category != category for thing in self.unsure)

    def seen_floor(self) -> list[RoomObject]:
        """Seen objects that stand on the floor."""
        return [thing for thing in self.seen if thing.kind == "floor"]

    def name(self, thing: RoomObject) -> str | None:
        """Shortest name that fits this object alone, without article: `chair`, else `red chair`, else None."""
        like = [other for other in self.room.objects if other.category == thing.category and other is not thing]
        if not like:
            return thing.category
        if thing.colour is not None and all(other.colour != thing.colour for other in like):
            return f"{thing.colour} {thing.category}"
        return None

    def named(self, things: list[RoomObject]) -> list[tuple[RoomObject, str]]:
        """Those that have a name of their own, with it."""
        named = [(thing, self.name(thing)) for thing in things]
        return [(thing, name) for thing, name in named if name is not None]

    def place(self, thing: RoomObject) -> str | None:
        """One of `PLACES`, or None where people would not agree."""
        gaps = np.sort(
            np.minimum(thing.low[:2] - self.room.low[:2], self.room.high[:2] - thing.high[:2])
        )  # nearest wall across x and across y
        if gaps[1] < 0.3:
            return CORNER
        if gaps[0] < 0.2 and gaps[1] > 0.5:
            return WALL
        if gaps[0] > 0.5:
            return MIDDLE
        return None

    def nearest(self, thing: RoomObject, others: list[RoomObject]) -> RoomObject | None:
        """The object nearest to one, by gap and by centre alike, with a margin; None where it is a close call."""
        if not others:
            return None
        gaps = np.array([gap_m(thing, other) for other in others])
        centres = np.array([np.linalg.norm((thing.centre - other.centre)[:2]) for other in others])
        best = int(gaps.argmin())
        rest = np.arange(len(others)) != best
        if (
            centres.argmin() != best
            or (gaps[rest] < gaps[best] + 0.25).any()
            or (centres[rest] < centres[best] + 0.15).any()
        ):
            return None
        return others[best]

    def view(self, thing: RoomObject, frame: int) -> tuple[float, float]:
        """Bearing of an object from a frame's camera (radians, right positive) and its horizontal distance (metres)."""
        pose = self.room.track.annotation_from_cam[frame]
        forward, offset = pose[:2, 2], thing.centre[:2] - pose[:2, 3]
        angle = np.arctan2(forward[1], forward[0]) - np.arctan2(offset[1], offset[0])
        return wrap_rad(angle), float(np.linalg.norm(offset))


def raw_name(category: str) -> str:
    """Category as ScanRefer and ScanQA write it.

    Args:
        category (`str`): One of `CATEGORIES`, or a part of the room.

    Returns:
        `str`: with underscores.

    Source:
        Upstream: daveredrum/ScanRefer@9d748305 (the format).
    """
    return category.replace(" ", "_")


COLOURED = tuple(name for name, category in CATEGORIES.items() if category.colour_named)
