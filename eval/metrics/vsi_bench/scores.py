"""VSI-Bench's scores: letters for questions with options, relative accuracy for numbers. Texts, no tensors."""

import math
from collections.abc import Sequence

import numpy as np

from vidllm.eval.metrics.answers import check_lengths, check_protocol, check_texts


LETTER_TASKS = (
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "object_rel_distance",
    "route_planning",
    "obj_appearance_order",
)
NUMBER_TASKS = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")
PROTOCOLS = ("official",)
DIRECTION = "object_rel_direction"
_LEVELS = ("easy", "medium", "hard")
# Made as the benchmark's code makes them: the rounding of the steps decides errors of exactly 1 - threshold.
THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())


def first_word(text: str) -> str:
    """What is read of an answer.

    Args:
        text (`str`): The answer.

    Returns:
        `str`: up to the first blank, without a full stop at its end.

    Source:
        Upstream: vision-x-nyu/thinking-in-space@51e089c lmms_eval/tasks/vsibench/utils.py.
    """
    return text.split(" ")[0].rstrip(".").strip()


def relative_accuracy(answer: str, true: float) -> float:
    """Mean over ten thresholds of whether a number is near enough.

    Args:
        answer (`str`): Its first word is read as a number; anything else scores 0.
        true (`float`): Not 0.

    Returns:
        `float`: 0..1.

    Raises:
        ValueError: The true number is 0 or not finite.

    Source:
        Upstream: vision-x-nyu/thinking-in-space@51e089c (mean relative accuracy; its code counts an error of exactly 1 - threshold, the paper does
        not).
    """
    if not math.isfinite(true) or true == 0:
        raise ValueError(f"vsi_bench: wanted a true number other than 0; got {true}")
    try:
        given = float(first_word(answer))
    except ValueError:
        return 0.0
    if not math.isfinite(given):
        return 0.0
    error = abs(given - true) / true
    return float(np.mean([error <= 1 - threshold for threshold in THRESHOLDS]))


def vsi_bench_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    question_types: Sequence[str],
    protocol: str = "official",
) -> dict[str, float]:
    """Score answers to VSI-Bench's questions.

    Args:
        predictions (`Sequence[str]`): One answer per question.
        references (`Sequence[str]`): `ground_truth`: a letter, or a number as text.
        question_types (`Sequence[str]`): `question_type`: one of `LETTER_TASKS` or `NUMBER_TASKS`.
        protocol (`str`): `official`: a letter must be equal but for upper and lower case, a number near.

    Returns:
        `dict[str, float]`: by task (the three directions as one: a third of the sum of their means, 0 for one without questions, and there even
        without any), and `overall`, the mean over tasks; fractions.

    Raises:
        ValueError: Columns of unequal length, an unknown task or protocol, an answer that is no text, or a true number that is none.

    Source:
        Upstream: vision-x-nyu/thinking-in-space@51e089c lmms_eval/tasks/vsibench/utils.py.
    """
    check_protocol("vsi_bench", protocol, PROTOCOLS)
    check_lengths("vsi_bench", predictions=predictions, references=references, question_types=question_types)
    check_texts("vsi_bench, predictions", predictions)
    marks: dict[str, list[float]] = {}
    for answer, true, task in zip(predictions, references, question_types, strict=True):
        if task in LETTER_TASKS:
            mark = float(first_word(answer).lower() == str(true).lower())
        elif task in NUMBER_TASKS:
            mark = relative_accuracy(answer, _number(true, task))
        else:
            raise ValueError(
                f"vsi_bench: wanted a question type of {', '.join((*LETTER_TASKS, *NUMBER_TASKS))}; got {task!r}"
            )
        marks.setdefault(task, []).append(mark)
    means = {task: float(np.mean(values)) for task, values in marks.items()}
    # As the benchmark's code has it: a third each, nothing for a level without questions, and always a task of its own.
    means[DIRECTION] = sum(means.pop(f"{DIRECTION}_{level}", 0.0) for level in _LEVELS) / len(_LEVELS)
    return {**means, "overall": float(np.mean(list(means.values())))}


def _number(text: str, task: str) -> float:
    """A true number."""
    try:
        return float(text)
    except (TypeError, ValueError):
        raise ValueError(f"vsi_bench: {task}: wanted a number as ground truth; got {text!r}") from None


__all__ = ["LETTER_TASKS", "NUMBER_TASKS", "PROTOCOLS", "first_word", "relative_accuracy", "vsi_bench_scores"]
