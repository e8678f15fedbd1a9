"""Scan2Cap's scores of captions. Texts, no tensors."""

import re
from collections.abc import Sequence

import numpy as np

from vidllm.eval.metrics.answers import check_lengths, check_protocol
from vidllm.processing.rooms.furniture import CATEGORIES
from vidllm.processing.rooms.materials import COLOURS
from vidllm.processing.rooms.scene_graph import plural


PROTOCOLS = ("rooms",)
_CATEGORY_OF = {**{plural(name): name for name in CATEGORIES}, **{name: name for name in CATEGORIES}}
# Of names that start at the same place the longest is meant; words are not found inside others.
_NAMES = re.compile(
    r"\b(?:" + "|".join(map(re.escape, sorted([*_CATEGORY_OF, *COLOURS], key=len, reverse=True))) + r")\b"
)


def named_object(caption: str) -> tuple[str | None, tuple[str, ...]]:
    """What a caption says its object is: a category of the rooms, and colours.

    The category is the first that the caption names, singular or plural. A colour right before the name of a category belongs to that
    category; any other colour belongs to the category named last before it. Colours before the first category that touch no name belong
    to the first.

    Args:
        caption (`str`): In upper or lower case.

    Returns:
        `tuple`: the category, None if none is named; the colours of its first mention, in order of appearance.

    Source:
        Ours: the rooms' captions name their object first ("this is a red chair. it is next to the blue couch."); "the chair is red" says
        the same.
    """
    text = caption.lower()
    found = list(_NAMES.finditer(text))
    first = next((number for number, match in enumerate(found) if match.group() in _CATEGORY_OF), None)
    if first is None:
        return None, ()
    end = next(
        (number for number in range(first + 1, len(found)) if found[number].group() in _CATEGORY_OF), len(found)
    )
    mentioned = [match for match in found[:end] if match.group() in COLOURS]
    # The colour of the second object stands right before its name: only blanks between them.
    if end < len(found) and mentioned and not text[mentioned[-1].end() : found[end].start()].strip():
        mentioned.pop()
    return _CATEGORY_OF[found[first].group()], tuple(match.group() for match in mentioned)


def scan2cap_scores(
    predictions: Sequence[str],
    references: Sequence[tuple[str, str | None]],
    protocol: str = "rooms",
) -> dict[str, float]:
    """Score captions of objects.

    Args:
        predictions (`Sequence[str]`): One caption per object.
        references (`Sequence` of `(category, colour)`): What each object is; colour None: it has no colour with a name.
        protocol (`str`): `rooms`: a caption counts if `named_object` gives the object's category and exactly its colour; of an object
            without a named colour the category alone must be right.

    Returns:
        `dict[str, float]`: `category_and_colour`, a fraction.

    Raises:
        ValueError: Columns of unequal length, an unknown protocol, a category or colour that rooms do not have.

    Source:
        Ours: whether the right object is described shows in its category and colour; how it is worded does not matter.
    """
    check_protocol("scan2cap", protocol, PROTOCOLS)
    check_lengths("scan2cap", predictions=predictions, references=references)
    hits = []
    for caption, (category, colour) in zip(predictions, references, strict=True):
        if category not in CATEGORIES or colour not in (None, *COLOURS):
            raise ValueError(f"scan2cap: wanted a category and a colour of the rooms; got {category!r}, {colour!r}")
        named, colours = named_object(caption)
        hits.append(named == category and (colour is None or set(colours) == {colour}))
    return {"category_and_colour": float(np.mean(hits))}


__all__ = ["PROTOCOLS", "named_object", "scan2cap_scores"]
