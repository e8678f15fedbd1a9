"""From facts to the words and tables of a model card. No tensors."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vidllm.eval.card_facts import CLIP_FILE, CLIP_TRUTH_FILE, RESULTS_FOLDER, CardFacts, MeasuredRun
from vidllm.eval.report import HTML_NAME
from vidllm.eval.results import RESULTS_FILE, table_rows
from vidllm.eval.work import EVAL_BENCHMARKS


# Metrics of which less is better end so: lengths, angles, errors, times.
_LESS_IS_BETTER = ("_m", "_deg", "_rel", "_error", "rmse", "seconds_per_scene")
PLAIN_BASELINES = ("blind", "majority", "constant")
_RECIPE_ROWS = (
    ("started from", "model"),
    ("steps", "steps"),
    ("scenes per process and forward", "batch_size"),
    ("forwards per step", "accumulation"),
    ("frames per video", "num_frames"),
    ("prompts per scene", "prompts_per_scene"),
    ("learning rate", "learning_rate"),
    ("schedule", "schedule"),
    ("weight decay", "weight_decay"),
    ("precision", "precision"),
    ("trained parameters", "train_only"),
    ("adapters", "lora"),
    ("seed", "seed"),
)
_NOT_RECORDED = "Not recorded in this folder."


def number(value: float) -> str:
    """A number of the results as a card shows it.

    Args:
        value (`float`): Any.

    Returns:
        `str`: three digits behind the point.

    Source:
        Ours.
    """
    return f"{value:.3f}"


def card_context(facts: CardFacts, licence: str | None) -> dict[str, Any]:
    """What the template of a card names.

    Args:
        facts (`CardFacts`): What is known.
        licence (`str`, *optional*): Of the weights.

    Returns:
        `dict`

    Source:
        Ours.
    """
    hours = [run["cost"]["hours"] for run in facts.training if run.get("cost")]
    return {
        "name": facts.name,
        "parameters": facts.parameters,
        "refines_poses": facts.refines_poses,
        "refines_depth": facts.refines_depth,
        "refines_focal": facts.refines_focal,
        "turns_room": facts.turns_room,
        "weights": _weights(facts),
        "stored": " and ".join(facts.stored_as),
        "is_metric": facts.is_metric,
        "untrained": facts.untrained,
        "only_rooms": facts.only_rooms,
        "clip": facts.clip,
        "clip_file": CLIP_FILE,
        "truth_file": CLIP_TRUTH_FILE,
        "data": "\n".join(f"- {line}" for line in _data_lines(facts)) or _NOT_RECORDED,
        "licence": licence,
        "training": bool(facts.training),
        "recipe_table": _recipe_table(facts.training),
        "total_hours": f"{sum(hours):.1f}" if hours else "",
        "all_costed": len(hours) == len(facts.training),
        "runs": [_run_context(run) for run in facts.runs],
        "limits": _limit_lines(facts),
        "not_verified": _unverified_lines(facts),
    }


def _weights(facts: CardFacts) -> str:
    """What the weights are, in two words or four."""
    if facts.untrained:
        return "untrained"
    if facts.only_rooms:
        return "trained on procedural rooms"
    return "trained" if facts.training else "training not recorded"


def _cell(value: Any) -> str:
    """A value that stays within its cell."""
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", "\\|")


def _code(value: Any) -> str:
    """A value as code."""
    return f"`{_cell(value).replace('`', chr(39))}`"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    """A table; `left` names the columns that are no numbers."""
    marks = ["---" if column in left else "--:" for column in columns]
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join(marks)}|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _data_lines(facts: CardFacts) -> list[str]:
    """What the weights were made of, and whose terms hold; empty where nothing is recorded."""
    lines = []
    for part, source in facts.sources:
        lines.append(f"Weights of `{part}` are from {_code(source)}, whose licence holds.")
    if facts.training and facts.training[0].get("random_start"):
        lines.append("Training started from random weights.")
    elif facts.training:
        started = _code(facts.training[0]["recipe"].get("model") or "")
        lines.append(f"Training started from {started}; the licences of what that was made of hold.")
    elif facts.untrained and not facts.sources:
        lines.append("Weights are random; no data went into them.")
    for run in facts.training:
        recipe = run["recipe"]
        name, rooms = recipe.get("name", "a run"), recipe.get("rooms")
        if rooms:
            levels = ", ".join(f"{level} {share:g}" for level, share in rooms.get("levels", {}).items())
            lines.append(
                f"`{name}`: {rooms['num_rooms']:,} procedural rooms ({levels}; seed {rooms['seed']}), made by vidllm itself: no pictures, scans or texts of "
                "others, so that no licence of theirs holds."
            )
        if recipe.get("benchmarks"):
            names = ", ".join(recipe["benchmarks"])
            lines.append(
                f"`{name}`: {names} of the data root {_code(recipe.get('data_root') or '')}. The terms of use of these data hold for what may be done with this model."
            )
        for field, what in (("data", "own videos"), ("clips", "videos")):
            if recipe.get(field):
                lines.append(f"`{name}`: {what}, {_code(recipe[field])}. Their licence is not known to this card.")
        for field in ("geometry_teacher", "language_teacher"):
            if recipe.get(field):
                lines.append(f"`{name}`: features of the teacher {_code(recipe[field])}, whose licence holds.")
    return lines


def _recipe_table(training: Sequence[Mapping[str, Any]]) -> str:
    """The runs side by side: their recipes, and what each cost."""
    if not training:
        return _NOT_RECORDED
    rows = []
    for label, field in _RECIPE_ROWS:
        values = [run["recipe"].get(field) for run in training]
        if any(value is not None for value in values):
            rows.append([label, *("" if value is None else _value(value) for value in values)])
    for label, form in (("steps", "{:d}"), ("seconds_per_step", "{:.2f}"), ("hours", "{:.2f}")):
        costs = [run.get("cost") for run in training]
        if any(costs):
            label_text = {"steps": "steps in the log"}.get(label, label.replace("_", " "))
            rows.append([label_text, *(form.format(cost[label]) if cost else "" for cost in costs)])
    rows.append(["processes", *(str(run.get("processes", "")) for run in training)])
    for name in ("device", "vidllm", "torch", "transformers"):
        rows.append([name, *(_cell(run.get("versions", {}).get(name, "")) for run in training)])
    rows.append(["commit", *(_commit(run) for run in training)])
    names = [f"{place}. `{_cell(run['recipe'].get('name', 'run'))}`" for place, run in enumerate(training, 1)]
    return _table(["", *names], rows, ["", *names])


def _value(value: Any) -> str:
    """A field of a recipe: words and settings as code, numbers as they are."""
    return _code(value) if isinstance(value, str | dict) else _cell(value)


def _commit(run: Mapping[str, Any]) -> str:
    """Of the source tree."""
    git = run.get("git") or {}
    return f"{git['commit'][:12]}{', changed' if git.get('changed') else ''}" if git.get("commit") else ""


def _run_context(run: MeasuredRun) -> dict[str, Any]:
    """Tables and provenance of one results document."""
    provenance = run.document["provenance"]
    rows = table_rows(run.run)
    kinds = list(run.run["baselines"])
    tables = [_results_table(run, part, kinds) for part in _by_kind(rows) if part]
    about = [
        f"Procedural rooms, level {run.level}" if run.on_rooms else f"Data root {_code(run.level)}",
        f"geometry {provenance['geometry']}",
        f"{provenance['frames']} frames per scene",
        *(f"{_scored(name, counts)}" for name, counts in provenance["counts"].items() if name in run.run["results"]),
    ]
    if provenance["seconds_per_scene"] is not None:
        about.append(
            f"{provenance['seconds_per_scene']:.2f} s per scene on {provenance.get('device', 'an unnamed device')}"
        )
    summary = ", ".join(about) + "."
    if run.intervals.get("intervals"):
        level, draws = run.intervals["level"], run.intervals["draws"]
        summary += f" Intervals: {100 * level:g} %, bootstrap over scenes, {draws:,} draws."
    return {
        "name": run.name,
        "summary": summary,
        "results": f"{RESULTS_FOLDER}/{run.name}/{RESULTS_FILE}",
        "report": f"{RESULTS_FOLDER}/{run.name}/{HTML_NAME}" if run.intervals else "",
        "tables": tables,
        "behind": [f"{place}: {', '.join(metrics)}" for place, metrics in behind_baselines(run).items()],
        "command": " ".join(provenance["command"].replace("`", "'").split()),
        "notes": [" ".join(note.split()) for note in provenance["notes"]],
    }


def _scored(name: str, counts: Mapping[str, int]) -> str:
    """How much of a benchmark was scored."""
    scored = counts.get("scored", 0)
    if "rows" not in counts:
        return f"{name}: {scored} scenes"
    return f"{name}: {scored} of {counts['rows']} rows" if scored != counts["rows"] else f"{name}: {scored} rows"


def _by_kind(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Numbers of everything, numbers of single kinds."""
    return [row for row in rows if "/" not in row["metric"]], [row for row in rows if "/" in row["metric"]]


def _results_table(run: MeasuredRun, rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    """Numbers with their protocol, interval and baselines."""
    columns = ["benchmark", "protocol", "metric", "model", "interval", *kinds]
    intervals = [run.interval(row["benchmark"], row["protocol"], row["metric"]) for row in rows]
    if not any(intervals):
        columns.remove("interval")
    lines = []
    for row, interval in zip(rows, intervals, strict=True):
        cells = {
            "model": number(row["model"]),
            "interval": "" if interval is None else f"{number(interval[0])} to {number(interval[1])}",
            **{name: row[name] for name in ("benchmark", "protocol", "metric")},
            **{kind: number(row[kind]) for kind in kinds if kind in row},
        }
        lines.append([cells.get(column, "") for column in columns])
    return _table(columns, lines, ["benchmark", "protocol", "metric", "interval"])


def behind_baselines(run: MeasuredRun) -> dict[str, list[str]]:
    """Numbers of the model that are no better than a baseline which does not look, or looks at nothing.

    Args:
        run (`MeasuredRun`): Results.

    Returns:
        `dict[str, list[str]]`: their metrics by benchmark and protocol; those of single kinds are left out.

    Source:
        Ours: a reader should not have to find them.
    """
    found: dict[str, list[str]] = {}
    for row in table_rows(run.run):
        others = [row[kind] for kind in PLAIN_BASELINES if kind in row]
        if "/" in row["metric"] or not others:
            continue
        less_is_better = row["metric"].endswith(_LESS_IS_BETTER)
        if (row["model"] >= min(others)) if less_is_better else (row["model"] <= max(others)):
            found.setdefault(f"{row['benchmark']} {row['protocol']}", []).append(row["metric"])
    return found


def _limit_lines(facts: CardFacts) -> list[str]:
    """What the model cannot do."""
    lines = []
    if facts.untrained:
        lines.append("Weights are random: answers, boxes and reconstructions mean nothing.")
    if facts.frames:
        lines.append(
            f"It samples {facts.frames} frames of a video unless told otherwise; what none of them shows it cannot know."
        )
    lines += [
        "One static room per video.",
        "Boxes have sides along the axes of the room frame (z up, origin at the first camera); objects that stand at an angle get boxes that are too large.",
        "It always answers; a wrong answer looks like a right one.",
    ]
    if not facts.is_metric:
        lines.append("Lengths are in relative units, no metres.")
    if facts.runs:
        scenes = ", ".join(f"`{run.name}`" for run in facts.runs)
        lines.append(f"Numbers hold for scenes like those of {scenes} and say nothing about others.")
    return lines


def _unverified_lines(facts: CardFacts) -> list[str]:
    """What nobody has measured."""
    lines = []
    measured = {name for run in facts.runs for name in run.run["results"]}
    missing = [name for name in EVAL_BENCHMARKS if name not in measured]
    if missing:
        lines.append(f"No number on {', '.join(missing)}.")
    if all(run.on_rooms for run in facts.runs):
        lines.append(
            "No film of a real room was scored; the names of ScanNet's benchmarks above mean their forms, filled with procedural rooms."
        )
    if not any("given_geometry" in run.run["baselines"] for run in facts.runs):
        lines.append("No number with true poses and depth.")
    if not all(run.intervals.get("intervals") for run in facts.runs):
        lines.append("Some results have no intervals and no report.")
    lines += [
        "Intervals are over scenes. How much another training of the same recipe would differ is not known.",
        "Whether the scores of boxes are calibrated, and any bias of answers.",
    ]
    if not facts.training and not facts.untrained:
        lines.append("How the weights were trained.")
    for place, run in enumerate(facts.training, 1):
        if (run.get("git") or {}).get("changed"):
            lines.append(f"Run {place} was trained by a source tree that differed from its commit.")
    return lines


__all__ = ["behind_baselines", "card_context", "number"]
