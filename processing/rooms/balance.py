"""Which questions of many are kept, so that who does not look at the room cannot know the answers.

Candidates are taken in random order. One is kept if its answer is not ahead of the other answers: in its kind of question, among
the questions of its kind on the same subject (a category, a pair of words), and among those of the same phrasing. Every prefix of
what is kept is balanced.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .blind import template_of


SHARE_LIMITS = (0.08, 0.18)


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Args:
        scene (`str`): Scene id.
        kind (`str`): Kind of question.
        text (`str`): The question.
        answers (`tuple` of `str`): Accepted answers, the usual one first.
        choices (`tuple` of `str`): All usual answers that the kind has.
        subjects (`tuple` of `str`): Words by which a blind reader could guess.
        object_ids (`tuple` of `int`): What it is about.
        details (`dict`): Whatever else belongs to it, such as a situation.

    Source:
        Ours.
    """

    scene: str
    kind: str
    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    subjects: tuple[str, ...] = ()
    object_ids: tuple[int, ...] = ()
    details: dict[str, Any] = field(default_factory=dict, compare=False)


def _ahead(counts: Counter, answer: str, choices: tuple[str, ...], slack: int) -> bool:
    """Whether an answer has been given more often than it may."""
    if len(choices) <= 4:
        return counts[answer] > min(counts[choice] for choice in choices) + slack - 1
    total = sum(counts.values())
    return counts[answer] + 1 > slack + (1 / len(choices) + 0.04) * (total + 1)


def balance(candidates: list[Question], rng: np.random.Generator, per_scene: int | None = None) -> list[Question]:
    """Choose questions of a split.

    Args:
        candidates (`list` of `Question`): Everything that could be asked, of all scenes of the split.
        rng (`np.random.Generator`): Order in which they are considered.
        per_scene (`int`, *optional*): At most so many of one kind in one scene.

    Returns:
        `list` of `Question`: ordered by scene; every kind within `SHARE_LIMITS` of all, as far as the rarest kind allows it.

    Source:
        Ours: rejection over the split.
    """
    kept: dict[str, list[Question]] = {}
    for kind in sorted({question.kind for question in candidates}):
        waiting = [question for question in candidates if question.kind == kind]
        order = rng.permutation(len(waiting))
        waiting = [(waiting[i], (*waiting[i].subjects, template_of(waiting[i].text))) for i in order]
        of_kind: Counter = Counter()
        of_subject: dict[str, Counter] = defaultdict(Counter)
        in_scene: Counter = Counter()
        chosen: list[Question] = []
        grew = True
        while grew:
            grew, left = False, []
            for question, subjects in waiting:
                answer = question.answers[0]
                if per_scene is not None and in_scene[question.scene] >= per_scene:
                    continue
                if _ahead(of_kind, answer, question.choices, 2) or any(
                    _ahead(of_subject[subject], answer, question.choices, 1 if len(question.choices) <= 4 else 2)
                    for subject in subjects
                ):
                    left.append((question, subjects))
                    continue
                grew = True
                chosen.append(question)
                of_kind[answer] += 1
                in_scene[question.scene] += 1
                for subject in subjects:
                    of_subject[subject][answer] += 1
            waiting = left
        kept[kind] = chosen
    if not kept:
        return []
    fewest = max(min(len(chosen) for chosen in kept.values()), 1)
    # The largest cap at which the rarest kind still has its share.
    cap = int(fewest * (1 / (SHARE_LIMITS[0] + 0.004) - 1) / max(len(kept) - 1, 1))
    chosen = [question for questions in kept.values() for question in questions[: max(cap, 1)]]
    order = sorted(range(len(chosen)), key=lambda i: (chosen[i].scene, i))
    return [chosen[i] for i in order]
