"""Predictions of those who do not look: blind and most frequent answers, one box, one caption. Every number stands beside theirs.

Shapes: M boxes.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vidllm.eval.train_facts import TrainFacts
from vidllm.processing.rooms.blind import BagOfWordsBaseline, BlindItem, MajorityBaseline


# The regression is dense: beyond these a kind's questions are thinned, and its rarer answers left out.
MOST_ANSWERS, MOST_QUESTIONS, MOST_CELLS = 150, 8000, 450_000
DEFAULT_SIZE_M = 1.0


def thinned(items: Sequence[BlindItem]) -> list[BlindItem]:
    """Questions that a dense regression can be fitted on: per kind the most frequent answers, and questions spread evenly.

    Args:
        items (`Sequence` of `BlindItem`): Of a train split.

    Returns:
        `list` of `BlindItem`: all of them where there are few.

    Source:
        Ours.
    """
    by_kind: dict[str, list[BlindItem]] = {}
    for item in items:
        by_kind.setdefault(item.kind, []).append(item)
    kept = []
    for rows in by_kind.values():
        counts = Counter(item.answer for item in rows)
        # Of equally frequent ones the first in the alphabet, on every run.
        answers = set(sorted(counts, key=lambda answer: (-counts[answer], answer))[:MOST_ANSWERS])
        rows = [item for item in rows if item.answer in answers]
        step = -(-len(rows) // min(MOST_QUESTIONS, MOST_CELLS // len(answers)))
        kept += rows[::step]
    return kept


def answer_baselines(train: Sequence[BlindItem], asked: Sequence[BlindItem]) -> dict[str, list[str]]:
    """Answers of the baselines that see the question only.

    Args:
        train (`Sequence` of `BlindItem`): To fit on; not empty.
        asked (`Sequence` of `BlindItem`): To answer; their own answers are not read.

    Returns:
        `dict`: `blind` (a logistic regression on words and pairs of words per kind), `majority` (the most frequent answer for the text, else
        its template, else its kind) and `constant` (the most frequent answer of all; of equally frequent ones the first in the alphabet), one
        answer per question.

    Source:
        Ours: what can be scored without looking is no sign of seeing.
    """
    words, majority = BagOfWordsBaseline(thinned(train)), MajorityBaseline(train)
    counts = Counter(item.answer for item in train)
    return {
        "blind": [words.predict(item) for item in asked],
        "majority": [majority.predict(item) for item in asked],
        "constant": [min(counts, key=lambda answer: (-counts[answer], answer))] * len(asked),
    }


def constant_box(facts: TrainFacts | None, boxes_annotation: np.ndarray) -> tuple[np.ndarray, str]:
    """The one box that is said for every description.

    Args:
        facts (`TrainFacts`, *optional*): Of a train split.
        boxes_annotation (`np.ndarray` of shape `(M, 6)`): True boxes of the evaluated descriptions, annotation frame, metres.

    Returns:
        `tuple`: the box (`np.ndarray` of shape `(6,)`), annotation frame, metres; and how it was found: the mean box of the train split's
        described objects, else a cube of 1 m at the median centre of the evaluated ones.

    Source:
        Ours.
    """
    if facts is not None and len(facts.boxes_annotation):
        return facts.boxes_annotation.mean(axis=0), f"the mean box of described objects ({facts.source})"
    centre = np.median(boxes_annotation[:, :3], axis=0)
    return np.array([*centre, *[DEFAULT_SIZE_M] * 3]), "a cube of 1 m at the median centre of the evaluated objects"


def constant_proposal(box: np.ndarray, proposals: np.ndarray) -> np.ndarray | None:
    """The proposal that is said for every description of a scene.

    Args:
        box (`np.ndarray` of shape `(6,)`): The one box that is said for every description where there are no proposals.
        proposals (`np.ndarray` of shape `(M, 6)`): Of the scene, in the same frame.

    Returns:
        `np.ndarray` of shape `(6,)`: the proposal whose centre is nearest to the box's; None where there is none.

    Source:
        Ours: whoever has proposals and does not read the description.
    """
    if not len(proposals):
        return None
    return proposals[int(np.linalg.norm(proposals[:, :3] - box[:3], axis=1).argmin())]


def constant_caption(facts: TrainFacts | None, objects: Sequence[tuple[str, str | None]]) -> tuple[str, str]:
    """The one caption that is said for every object.

    Args:
        facts (`TrainFacts`, *optional*): Of a train split.
        objects (`Sequence` of `(category, colour)`): The evaluated ones; outside of rooms their names, without a colour.

    Returns:
        `tuple`: the caption, and how it was found: the most frequent pair of category and colour of the train split's described objects,
        else of the evaluated ones.

    Source:
        Ours.
    """
    known = facts is not None and bool(facts.objects)
    counts = Counter(map(tuple, facts.objects if known else objects))
    category, colour = min(counts, key=lambda pair: (-counts[pair], str(pair)))
    where = facts.source if known else "the evaluated objects themselves"
    return " ".join(filter(None, ["this is a", colour, category])) + ".", f"the most frequent object ({where})"


__all__ = ["answer_baselines", "constant_box", "constant_caption", "constant_proposal", "thinned"]
