"""Comparing short answers: exact, after LEO's cleaning, and leniently; means per kind of question. Texts, no tensors."""

import re
from collections.abc import Mapping, Sequence

import numpy as np


_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_TEENS = ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"]
# Slips of the annotators, and numbers as words.
_REPLACED = {
    "letf": "left",
    "let": "left",
    "tehre": "there",
    "rigth": "right",
    "rght": "right",
    "behine": "behind",
    "tv": "TV",
    "chai": "chair",
    "wasing": "washing",
    "waslked": "walked",
    "oclock": "o'clock",
    "none": "zero",
    **{str(number): word for number, word in enumerate([*_ONES, *_TEENS])},
    "23": "twenty-three",
}
_REPLACED_WORD = re.compile(r"\b(?:" + "|".join(_REPLACED) + r")\b")


def clean_answer(text: str) -> str:
    """An answer as LEO compares it: lower case, no odd characters, slips mended, small numbers as words, no articles.

    Args:
        text (`str`): The answer.

    Returns:
        `str`

    Source:
        Upstream: embodied-generalist/embodied-generalist@567f2d8 data/data_utils.py (the rules and their order). Ours: written as a table.
    """
    # Blanks at the end: `$` also stands before a last line break, so those in front of it go too.
    text = re.sub(" {2,}", " ", re.sub("^ +", "", re.sub(" +$", "", text.lower())))
    text = re.sub(r"\.[ ]{2,}", ". ", text)
    text = re.sub(r"[^a-zA-Z0-9,'\s\-:]+", "", text)
    text = _REPLACED_WORD.sub(lambda match: _REPLACED[match.group()], text)
    text = re.sub(r"\bo'[ ]+clock\b", "o'clock", text)
    text = re.sub(r"\b([a-zA-Z]+)[0-9]\b", r"\1", text)
    for article in ("a", "an", "the"):
        text = re.sub(rf"\b{article}\b ([a-zA-Z]+)", r"\1", text)
    return re.sub(r"\bbackwards\b", "backward", text)


def refined_match(prediction: str, references: Sequence[str]) -> tuple[bool, bool]:
    """LEO's two marks of an answer: equal, and equal or contained either way (without spaces).

    Args:
        prediction (`str`): Cleaned.
        references (`Sequence[str]`): Cleaned.

    Returns:
        `tuple[bool, bool]`: exact match, refined match.

    Source:
        Upstream: embodied-generalist/embodied-generalist@567f2d8 evaluator/scanqa_eval.py. It stops at the first reference that matches at
        all, so that an exact match with a later one is not found, and it takes an empty answer to be contained in everything.
    """
    joined = "".join(prediction.split())
    for reference in references:
        if prediction == reference:
            return True, True
        other = "".join(reference.split())
        if joined in other or other in joined:
            return False, True
    return False, False


def check_lengths(what: str, **columns: Sequence | None) -> None:
    """Refuse columns of unequal length, and none at all.

    Args:
        what (`str`): Name of the metric.
        **columns (`Sequence`, *optional*): Columns by name; None is left out.

    Raises:
        ValueError: They do not fit together.

    Source:
        Ours.
    """
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"{what}: wanted columns of one length, at least 1; got {lengths}")


def check_texts(what: str, texts: Sequence[str]) -> None:
    """Refuse what is not a text.

    Args:
        what (`str`): Name of the metric and of the column.
        texts (`Sequence[str]`): A column; blank texts are texts.

    Raises:
        ValueError: An entry is None or of another type; names its row.

    Source:
        Ours.
    """
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{what}, row {row}: wanted a text; got {text!r:.80}")


def check_protocol(what: str, protocol: str, known: Sequence[str], option: str = "protocol") -> None:
    """Refuse an unknown protocol, or another option with few values.

    Args:
        what (`str`): Name of the metric.
        protocol (`str`): What was asked for.
        known (`Sequence[str]`): What there is.
        option (`str`): What is chosen.

    Raises:
        ValueError: It is not among them.

    Source:
        Ours.
    """
    if protocol not in known:
        raise ValueError(f"{what}, {option}: wanted one of {', '.join(known)}; got {protocol!r}")


def protocol_of(config_name: str, protocol: str | None, default: str) -> str:
    """The protocol that a module of `evaluate` scores by.

    Args:
        config_name (`str`): What the module was loaded with, `default` if with nothing: `evaluate.load(path, "leo")`.
        protocol (`str`, *optional*): What `compute` was given; it comes first.
        default (`str`): Where neither names one.

    Returns:
        `str`

    Source:
        Ours: modules that are combined share their arguments, so that each must know its own protocol.
    """
    if protocol is not None:
        return protocol
    return default if config_name == "default" else config_name


def means_by_kind(marks: Mapping[str, Sequence[bool]], kinds: Sequence[str] | None = None) -> dict[str, float]:
    """Means of marks, over all questions and per kind of question.

    Args:
        marks (`Mapping[str, Sequence[bool]]`): One mark per question by name of the metric.
        kinds (`Sequence[str]`, *optional*): Kind of each question.

    Returns:
        `dict[str, float]`: `<metric>`; with kinds also `<kind>/<metric>`, and `<metric>_macro`, the mean over kinds.

    Source:
        Ours: in the macro mean a rare kind counts as much as a frequent one.
    """
    scores = {name: float(np.mean(values)) for name, values in marks.items()}
    if kinds is None:
        return scores
    of_kind = np.array(kinds)
    for name, values in marks.items():
        means = {kind: float(np.mean(np.asarray(values)[of_kind == kind])) for kind in sorted(set(kinds))}
        scores[f"{name}_macro"] = float(np.mean(list(means.values())))
        scores.update({f"{kind}/{name}": mean for kind, mean in means.items()})
    return scores


__all__ = [
    "check_lengths",
    "check_protocol",
    "check_texts",
    "clean_answer",
    "means_by_kind",
    "protocol_of",
    "refined_match",
]
