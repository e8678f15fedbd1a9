"""Results of the demonstration as lines of text, the truth beside each."""

from collections.abc import Sequence
from typing import Any

from vidllm.printing import unit_words


_MARKS = {True: "right", False: "wrong"}
_WIDEST_ANSWER = 32


def question_lines(answers: Sequence[dict[str, Any]]) -> list[str]:
    """Questions with answer and truth, as a table.

    Args:
        answers (`Sequence[dict]`): From `ask_all`.

    Returns:
        `list[str]`

    Source:
        Ours.
    """
    width = max(len(item["question"]) for item in answers)
    said = min(max(len(item["answer"]) for item in answers), _WIDEST_ANSWER)
    return [
        f"  {_MARKS[item['right']]}  {item['question']:{width}}  {item['answer'] or '(nothing)':{said}}  "
        f"truth: {' or '.join(item['truth'])}"
        for item in answers
    ]


def _six(box: Sequence[float]) -> str:
    """A box in numbers."""
    values = [f"{value:6.2f}" for value in box]
    return f"{' '.join(values[:3])}  {' '.join(values[3:])}"


def box_lines(grounded: Sequence[dict[str, Any]]) -> list[str]:
    """Descriptions with the box found and the true one.

    Args:
        grounded (`Sequence[dict]`): From `ground_all`.

    Returns:
        `list[str]`

    Source:
        Ours.
    """
    lines = []
    for item in grounded:
        lines.append(f"  {_MARKS[item['right']]}  {item['description']}")
        if item["box_annotation"] is not None:
            note = "" if item["matched"] else "  (best candidate, below the threshold)"
            lines.append(f"         box    {_six(item['box_annotation'])}  IoU {item['iou']:.2f}{note}")
        else:
            lines.append(
                "         box    none" if item["iou"] is not None else "         box    not in metres, not comparable"
            )
        lines.append(f"         truth  {_six(item['truth_box_annotation'])}  {item['truth']}")
    return lines


def place_lines(captions: Sequence[dict[str, Any]]) -> list[str]:
    """Places with the caption and the object that is there.

    Args:
        captions (`Sequence[dict]`): From `caption_all`.

    Returns:
        `list[str]`

    Source:
        Ours.
    """
    lines = []
    for item in captions:
        place = " ".join(f"{value:.2f}" for value in item["point_annotation"])
        lines.append(f"  {_MARKS[item['right']]}  at {place}: {item['caption'] or '(nothing)'}")
        lines.append(f"         truth: {item['truth']}, such as: {item['references'][0]}")
    return lines


def length_lines(summary: dict[str, Any], lengths: dict[str, Any]) -> list[str]:
    """Lengths of the reconstruction beside the true ones.

    Args:
        summary (`dict`): From `summarise`.
        lengths (`dict`): From `true_geometry`.

    Returns:
        `list[str]`

    Source:
        Ours.
    """

    def three(values: Sequence[float] | None) -> str:
        return "no valid points" if values is None else " x ".join(f"{value:.2f}" for value in values)

    unit = unit_words(summary["unit"])
    rows = [
        ("camera path", f"{summary['path_length']:.2f} {unit}", f"{lengths['path_length_m']:.2f} m over these frames"),
        (
            "room size",
            f"{three(summary['extent_room'])} {unit}",
            f"{three(lengths['seen_size_m'])} m of what was seen, {three(lengths['room_size_m'])} m from wall to wall",
        ),
    ]
    width = max(len(predicted) for _, predicted, _ in rows)
    return [f"  {what:12}  {predicted:{width}}  truth: {true}" for what, predicted, true in rows]


__all__ = ["box_lines", "length_lines", "place_lines", "question_lines"]
