"""Results as lines of text."""

from collections.abc import Sequence
from typing import Any

from vidllm.commands import Answer, Caption, FoundBox, Grounding


def unit_words(unit: str) -> str:
    """A unit as people read it.

    Args:
        unit (`str`): `m` or `relative`.

    Returns:
        `str`: `m`, or words that say that it is no length.

    Source:
        Ours.
    """
    return "m" if unit == "m" else "relative units"


def box_line(found: FoundBox, unit: str) -> str:
    """One box.

    Args:
        found (`FoundBox`): The box.
        unit (`str`): `m` or `relative`.

    Returns:
        `str`: centre, size, score.

    Source:
        Ours.
    """
    centre = " ".join(f"{value:.3f}" for value in found.box[:3])
    size = " ".join(f"{value:.3f}" for value in found.box[3:])
    score = "" if found.score is None else f", score {found.score:.3f}"
    return f"  centre {centre}, size {size}{score} (room frame, {unit_words(unit)})"


def answer_lines(answer: Answer, unit: str) -> list[str]:
    """A question, its answer, and the boxes in it.

    Args:
        answer (`Answer`): What the model said.
        unit (`str`): `m` or `relative`.

    Returns:
        `list[str]`.

    Source:
        Ours.
    """
    return [f"Q: {answer.question}", f"A: {answer.answer or '(nothing)'}", *(box_line(b, unit) for b in answer.boxes)]


def grounding_lines(grounding: Grounding, unit: str) -> list[str]:
    """What was found, or the best candidate marked as such.

    Args:
        grounding (`Grounding`): The result.
        unit (`str`): `m` or `relative`.

    Returns:
        `list[str]`.

    Source:
        Ours.
    """
    boxes = [box_line(box, unit) for box in grounding.boxes]
    if grounding.matched:
        return [f"{grounding.description}: {len(boxes)} box{'es' if len(boxes) > 1 else ''}", *boxes]
    against = "" if grounding.no_target_score is None else f" (no target: score {grounding.no_target_score:.3f})"
    lines = [f"{grounding.description}: nothing matched{against}"]
    return [*lines, "best candidate, below the threshold:", *boxes] if boxes else lines


def caption_lines(caption: Caption, unit: str) -> list[str]:
    """A place and what is there.

    Args:
        caption (`Caption`): The result.
        unit (`str`): `m` or `relative`.

    Returns:
        `list[str]`.

    Source:
        Ours.
    """
    place = " ".join(f"{value:.3f}" for value in caption.point_room)
    return [f"at {place} (room frame, {unit_words(unit)}): {caption.caption or '(nothing)'}"]


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """A reconstruction in a few lines.

    Args:
        summary (`dict`): From `summarise`.

    Returns:
        `list[str]`.

    Source:
        Ours.
    """

    def lengths(values: Sequence[float] | None) -> str:
        return "no valid points" if values is None else " x ".join(f"{value:.2f}" for value in values)

    unit = unit_words(summary["unit"])
    height, width = summary["size_hw"]
    depth = "none valid" if summary["median_depth"] is None else f"{summary['median_depth']:.2f} {unit}"
    return [
        f"frames       {len(summary['frames'])} of {summary['num_source_frames']}, {width}x{height} pixels, "
        f"{summary['horizontal_fov_deg']:.0f} degrees wide",
        f"unit         {unit}, scale factor {summary['scale']:.3f}",
        f"camera path  {summary['path_length']:.2f} {unit}",
        f"extent       {lengths(summary['extent_room'])} {unit} (room frame x, y, z)",
        f"depth        {depth} in the median",
    ]


__all__ = ["answer_lines", "box_line", "caption_lines", "grounding_lines", "summary_lines", "unit_words"]
