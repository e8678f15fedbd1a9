"""Held-out losses of several runs in one picture: by step, or by what was spent on them.

Reads `held_out.jsonl`, which a run writes where its recipe says `held_out`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vidllm.processing.pictures import INK, TEXT_PT, new_figure, save_figure
from vidllm.train.held_out import HELD_OUT_NAME


COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#8a6d1f", "#444444")
_PANEL_IN, _COLUMNS = (3.4, 2.5), 3


@dataclass(frozen=True)
class CurveRun:
    """A run in a picture.

    Args:
        label (`str`): What it is called.
        folder (`Path`): Of the run.
        start (`float`): What had been spent before its first step, in units of the horizontal axis.
        per_step (`float`): What a step costs, in the same units; 1 counts steps.

    Raises:
        ValueError: A number is out of range.

    Source:
        Ours.
    """

    label: str
    folder: Path
    start: float = 0.0
    per_step: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.start < math.inf and 0 < self.per_step < math.inf):
            raise ValueError(
                f"{self.label}: wanted a start of at least 0 and a positive cost per step; got {self.start} and {self.per_step}"
            )


def held_out_curve(folder: str | Path) -> list[dict[str, float]]:
    """What the looks of a run found.

    Args:
        folder (`str` or `Path`): Of the run.

    Returns:
        `list[dict[str, float]]`: `step`, and the mean of each loss term, by rising step.

    Raises:
        ValueError: There is no such file, or a line of it is not what a run writes.

    Source:
        Ours.
    """
    path = Path(folder).expanduser() / HELD_OUT_NAME
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; a run writes it where its recipe has held_out (--set held_out.every=100)"
        )
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not all(isinstance(value, int | float) for value in line.values()):
            raise ValueError(f"{path}, line {number}: wanted one JSON object of numbers; got {text[:60]!r}")
        if "step" not in line:
            raise ValueError(f"{path}, line {number}: wanted a step; got {', '.join(line)}")
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: wanted at least one line; got none")
    return lines


def draw_curves(
    runs: Sequence[CurveRun],
    path: str | Path,
    terms: Sequence[str] = (),
    across: str = "steps",
    log: bool = False,
) -> list[str]:
    """Draw one panel per loss term with a line per run.

    Args:
        runs (`Sequence[CurveRun]`): At least one.
        path (`str` or `Path`): PNG file to write.
        terms (`Sequence[str]`): Loss terms; by default those that all runs have.
        across (`str`): Name of the horizontal axis.
        log (`bool`): Whether the vertical axes are logarithmic; a panel with a value that is not positive stays linear.

    Returns:
        `list[str]`: the terms that were drawn.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There is no run, a run has no held-out losses, or lacks a term.

    Source:
        Ours.
    """
    if not runs:
        raise ValueError("curves: wanted at least one run; got none")
    curves = [held_out_curve(run.folder) for run in runs]
    shared = [name for name in curves[0][0] if all(name in line for curve in curves for line in curve)]
    known = [name for name in shared if name not in ("step", "seconds")]
    missing = [name for name in terms if name not in known]
    if missing or not known:
        raise ValueError(
            f"curves: wanted terms that all runs have ({', '.join(known) or 'none'}); got {', '.join(missing) or 'none'}"
        )
    chosen = list(terms) or known
    columns = min(_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = new_figure(columns * _PANEL_IN[0], rows * _PANEL_IN[1] + 0.4)
    for number, name in enumerate(chosen):
        axes = figure.add_subplot(rows, columns, number + 1)
        for run, curve, colour in zip(runs, curves, _colours(len(runs)), strict=True):
            spent = [run.start + run.per_step * line["step"] for line in curve]
            values = [line[name] for line in curve]
            axes.plot(spent, values, color=colour, label=run.label, linewidth=1.6, marker="o", markersize=2.5)
        if log and all(line[name] > 0 for curve in curves for line in curve):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.tick_params(axis="y", which="minor", labelsize=TEXT_PT - 3)
        axes.set_title(name, fontsize=TEXT_PT, color=INK)
        axes.tick_params(labelsize=TEXT_PT - 2)
        axes.set_xlabel(across, fontsize=TEXT_PT - 1)
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    top = 0.35 / (rows * _PANEL_IN[1] + 0.4)
    figure.legend(handles, labels, loc="upper center", ncols=min(len(runs), 4), fontsize=TEXT_PT - 1, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - top))
    save_figure(figure, path)
    return chosen


def _colours(count: int) -> list[str]:
    """One per run."""
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def runs_of_words(words: Sequence[str], starts: Sequence[str] = (), per_step: Sequence[str] = ()) -> list[CurveRun]:
    """Runs as a command line names them.

    Args:
        words (`Sequence[str]`): `LABEL=DIR`, or a folder, whose name is the label.
        starts (`Sequence[str]`): `LABEL=NUMBER`.
        per_step (`Sequence[str]`): `LABEL=NUMBER`.

    Returns:
        `list[CurveRun]`

    Raises:
        ValueError: A label comes twice or is not that of a run, or what should be a number is none.

    Source:
        Ours.
    """
    folders: dict[str, Path] = {}
    for word in words:
        label, separator, folder = word.partition("=")
        label, folder = (label, folder) if separator else (Path(word).name, word)
        if label in folders:
            raise ValueError(f"curves: wanted each label once; got {label!r} twice")
        folders[label] = Path(folder)
    numbers = [_numbers("--start", starts, folders), _numbers("--per-step", per_step, folders)]
    return [
        CurveRun(label, folder, numbers[0].get(label, 0.0), numbers[1].get(label, 1.0))
        for label, folder in folders.items()
    ]


def _numbers(option: str, words: Sequence[str], labels: Mapping[str, Path]) -> dict[str, float]:
    """`LABEL=NUMBER` of an option."""
    found = {}
    for word in words:
        label, _, text = word.rpartition("=")
        try:
            found[label] = float(text)
        except ValueError:
            raise ValueError(f"{option}: wanted LABEL=NUMBER; got {word!r}") from None
        if label not in labels:
            raise ValueError(f"{option}: wanted a label of {', '.join(labels)}; got {label!r}")
    return found


__all__ = ["CurveRun", "draw_curves", "held_out_curve", "runs_of_words"]
