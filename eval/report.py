"""A run of `vidllm eval` as a page and as Markdown: scores with intervals, baselines beside them, answers and boxes that were right and wrong, provenance.

The page is one file and loads nothing.

```
<out>/report.html, report.md   neither tells on which machine they were made
<out>/intervals.json           {"results_sha256": of what they belong to, "level": 0.95, "draws": 2000, "intervals": {benchmark: {protocol: {metric: [low, high]}}}}
```
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from vidllm.eval.intervals import Marks, bootstrap_interval
from vidllm.eval.marks import row_marks
from vidllm.eval.metrics.scanrefer.scores import scanrefer_iou
from vidllm.eval.metrics.text_scorers import NAMES as TEXT_NAMES
from vidllm.eval.places import without_places
from vidllm.eval.predictions import PredictionFile
from vidllm.eval.provenance import SETTINGS_FILE
from vidllm.eval.report_pictures import best_frame, data_uri, frame_picture, map_picture
from vidllm.eval.report_reconstruction import curves_of, views_of
from vidllm.eval.results import read_results, table_rows
from vidllm.eval.scoring import can_score_text, text_obstacle
from vidllm.eval.work import RECONSTRUCTION, BenchmarkWork, EvaluationWork, plan
from vidllm.processing.benchmarks.frames import frames_of
from vidllm.processing.samples import Sample
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


HTML_NAME, MARKDOWN_NAME, INTERVALS_NAME = "report.html", "report.md", "intervals.json"
LEVEL, DRAWS = 0.95, 2000
# Which score tells good captions from bad ones where there is no right and wrong.
CAPTION_SCORE = "cider"


@dataclass(frozen=True)
class ReportRow:
    """One line of a table.

    Args:
        benchmark (`str`): Benchmark.
        protocol (`str`): Protocol.
        metric (`str`): Metric, with its kind before it if there is one.
        model (`str`): The model's number.
        interval (`str`): Of the number, empty where it is no mean over rows.
        baselines (`Mapping[str, str]`): By kind.

    Source:
        Ours.
    """

    benchmark: str
    protocol: str
    metric: str
    model: str
    interval: str = ""
    baselines: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """A question or a description, and what came of it.

    Args:
        scene (`str`): The scene.
        asked (`str`): What was asked.
        said (`str`): What the model said.
        right (`str`): What is right.
        mark (`str`): `right` or `wrong`, a score, or nothing where nothing is known.
        iou (`str`): Of boxes.
        pictures (`tuple[str, ...]`): As they stand in a page.

    Source:
        Ours.
    """

    scene: str
    asked: str
    said: str = ""
    right: str = ""
    mark: str = ""
    iou: str = ""
    pictures: tuple[str, ...] = ()


def write_report(out: str | Path, data_root: str | Path | None = None, most_examples: int = 8) -> list[Path]:
    """Write `report.html`, `report.md` and `intervals.json` beside `results.json`.

    Args:
        out (`str` or `Path`): Folder of a run of `vidllm eval`.
        data_root (`str` or `Path`, *optional*): Where its scenes lie now; by default where they lay.
        most_examples (`int`): Of each benchmark, half of them right if there are so many.

    Returns:
        `list[Path]`: the files.

    Raises:
        VidLLMInputError: The folder holds no finished run, annotations have changed since, or predictions are not those that were scored.

    Source:
        Ours.
    """
    out = Path(out).expanduser()
    document = read_results(out)
    ((name, run),) = document["runs"].items()
    work = _work_of(out, data_root, list(run["results"]))
    records = {part: PredictionFile(out / "predictions" / f"{part}.jsonl").records for part in run["results"]}
    notes = list(document["provenance"]["notes"])
    has_texts = _has_text_scores(run)
    obstacle = text_obstacle() if has_texts else None
    if obstacle is not None:
        notes.append(f"report: n-gram scores that need what is not here have no interval: {obstacle}")
    marks = row_marks(work, records, text=has_texts and can_score_text())
    intervals = _intervals(out, run, marks)
    rows = [_row(row, intervals) for row in table_rows(run)]
    kinds = list(run["baselines"])
    texts, boxes = _examples(work, records, marks, most_examples)
    if boxes and not all(example.pictures for example in boxes):
        without = sum(not example.pictures for example in boxes)
        notes.append(
            f"report: {without} of {len(boxes)} boxes without pictures, because no frame of their scene that shows them is there"
        )
    provenance = without_places(document["provenance"])
    scenes = [records[RECONSTRUCTION][scene] for scene in work.reconstructed]
    context = {
        **_heading(name, work, provenance),
        "about_numbers": _about_numbers(has_texts),
        "kinds": kinds,
        "rows": [row for row in rows if "/" not in row.metric],
        "by_kind": [row for row in rows if "/" in row.metric],
        "texts": texts,
        "boxes": boxes,
        "curves": curves_of(scenes),
        "views": views_of(scenes),
        "provenance": [(key, _plain(value)) for key, value in provenance.items() if key != "notes"],
        "notes": without_places(notes),
    }
    template = files("vidllm.eval").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False).from_string(template)
    kept = {"results_sha256": results_sha256(document), "level": LEVEL, "draws": DRAWS, "intervals": intervals}
    written = []
    for file, text in (
        (HTML_NAME, page.render(context)),
        (MARKDOWN_NAME, _markdown(context)),
        (INTERVALS_NAME, json.dumps(kept, indent=1, allow_nan=False) + "\n"),
    ):
        path = out / file
        part = path.with_suffix(f"{path.suffix}.part")
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        part.replace(path)
        written.append(path)
    return written


def _work_of(out: Path, data_root: str | Path | None, benchmarks: Sequence[str]) -> EvaluationWork:
    """What a run asked, read again; annotations must be the same."""
    try:
        settings = json.loads((out / SETTINGS_FILE).read_text(encoding="utf-8"))
        shared, own = settings["shared"], settings["benchmarks"]
        splits = {own[name]["split"] for name in benchmarks if "split" in own[name]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VidLLMInputError(f"{out / SETTINGS_FILE}: wanted the settings of an evaluation; {error!r}") from None
    root = str(Path(data_root or shared["data_root"]).expanduser().resolve())
    # Benchmarks have splits of their own; one for all was asked for only where it differs from these.
    usual = plan(benchmarks, root, shared["frames"], None, shared["prompts"], shared["limit_scenes"])
    asked = usual
    if any(part.split != own[name]["split"] for name, part in usual.benchmarks.items()) and len(splits) == 1:
        asked = plan(benchmarks, root, shared["frames"], splits.pop(), shared["prompts"], shared["limit_scenes"])
    for name, part in asked.benchmarks.items():
        if part.sha256 != own[name]["annotations_sha256"]:
            raise VidLLMInputError(f"report: the annotations of {name} in {root} are not those that were evaluated")
    return asked


def results_sha256(document: Mapping[str, Any]) -> str:
    """SHA-256 of the numbers of a results document; says whether a report belongs to it.

    Args:
        document (`Mapping`): What `results.json` says.

    Returns:
        `str`: 64 hexadecimal digits.

    Source:
        Ours.
    """
    return hashlib.sha256(json.dumps(document["runs"], sort_keys=True).encode()).hexdigest()


def _intervals(
    out: Path, run: Mapping[str, Any], marks: Mapping[str, Mapping[str, Mapping[str, Marks]]]
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Intervals by benchmark, protocol and metric; predictions that do not give a number again must not give it one."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in table_rows(run):
        benchmark, protocol, metric, value = (row[name] for name in ("benchmark", "protocol", "metric", "model"))
        of_rows = marks.get(benchmark, {}).get(protocol, {}).get(metric)
        if of_rows is None:
            continue
        mean = of_rows.metric
        if abs(mean - value) > 1e-6 * max(1.0, abs(value)):
            raise VidLLMInputError(
                f"{out / 'predictions'}: wanted the predictions that were scored; {benchmark}, {protocol}, {metric} is {mean:.6f} "
                f"by them and {value:.6f} in results.json"
            )
        found.setdefault(benchmark, {}).setdefault(protocol, {})[metric] = list(
            bootstrap_interval(of_rows, LEVEL, DRAWS)
        )
    return found


def _row(row: Mapping[str, Any], intervals: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> ReportRow:
    """A row of results, with its interval."""
    found = intervals.get(row["benchmark"], {}).get(row["protocol"], {}).get(row["metric"])
    interval = "" if found is None else "{} to {}".format(*map(_number, found))
    fixed = ("benchmark", "protocol", "metric", "model")
    baselines = {kind: _number(value) for kind, value in row.items() if kind not in fixed}
    return ReportRow(
        benchmark=row["benchmark"],
        protocol=row["protocol"],
        metric=row["metric"],
        model=_number(row["model"]),
        interval=interval,
        baselines=baselines,
    )


def _number(value: float) -> str:
    """Three digits behind the point."""
    return f"{value:.3f}"


def _heading(name: str, work: EvaluationWork, provenance: Mapping[str, Any]) -> dict[str, str]:
    """Title and summary: of this model, or of another system's predictions, of which no more is known than their user said."""
    parts = [f"geometry {provenance['geometry']}"]
    if provenance["frames"] is not None:
        parts.append(f"{provenance['frames']} frames per scene")
    parts.append(_cost(work, provenance))
    if "predictions_sha256" in provenance:
        title, who = f"{provenance['model']} on {name}", f"Predictions of another system, {provenance['model']}"
    else:
        title, who = f"Vid-LLM on {name}", provenance["model"]
    return {"title": title, "summary": f"{', '.join([who, *parts])}."}


def _cost(work: EvaluationWork, provenance: Mapping[str, Any]) -> str:
    """Scenes and seconds."""
    seconds = provenance["seconds_per_scene"]
    return f"{len(work.scenes)} scenes" + (
        "" if seconds is None else f", {seconds:.2f} s per scene on {provenance['device']}"
    )


def _plain(value: Any) -> str:
    """A value of the provenance as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class _Texts:
    """Examples of one benchmark."""

    title: str
    items_: list[Example]


def _examples(
    work: EvaluationWork,
    records: Mapping[str, Mapping[str, Mapping[str, Any]]],
    marks: Mapping[str, Mapping[str, Mapping[str, Marks]]],
    most: int,
) -> tuple[list[_Texts], list[Example]]:
    """Answers, captions and boxes that were right, and such that were wrong, spread over the scenes."""
    texts: list[_Texts] = []
    boxes: list[Example] = []
    for name, part in work.benchmarks.items():
        if not part.samples:
            continue
        chosen = _chosen(part, marks.get(name, {}), most)
        if name == "scanrefer":
            boxes = [_box_example(part.samples[n], records[name], work) for n in chosen]
        else:
            texts.append(_Texts(name, [_text_example(part, n, records[name], mark) for n, mark in chosen.items()]))
    return texts, boxes


def _chosen(work: BenchmarkWork, marks: Mapping[str, Mapping[str, Marks]], most: int) -> dict[int, str]:
    """Numbers of samples to show, half of them good if there are so many, and how each is marked."""
    numbers = range(len(work.samples))
    first = next(iter(marks.values()), {})
    name, found = next(iter(first.items()), ("", None))
    if work.name != "scan2cap" or name == "category_and_colour":
        hits = [n for n in numbers if found.values[n] > 0]
        misses = sorted(set(numbers) - set(hits))
        chosen = [*_spread(hits, most // 2), *_spread(misses, most - most // 2)]
        return {n: "right" if found.values[n] > 0 else "wrong" for n in chosen}
    if CAPTION_SCORE not in first:
        return dict.fromkeys(_spread(numbers, most), "")
    # Of captions compared with people's those that are nearest to them and those that are farthest.
    values = first[CAPTION_SCORE].values
    order = np.argsort(-values, kind="stable").tolist()
    chosen = order if len(order) <= most else [*order[: most // 2], *order[len(order) - (most - most // 2) :]]
    return {n: f"{CAPTION_SCORE} {_number(values[n])}" for n in chosen}


def _about_numbers(has_texts: bool) -> str:
    """What stands in the tables."""
    said = f"Each number with its protocol; in brackets where the mean lies in {100 * LEVEL:g} % of {DRAWS:,} draws of as many scenes."
    if has_texts:
        said += (
            " BLEU has no interval: it is made of the counts of all texts together and is no mean. METEOR's is that of the mean of the texts' own, "
            "moved by what the program's number of the whole differs from it."
        )
    return said


def _has_text_scores(run: Mapping[str, Any]) -> bool:
    """Whether results hold n-gram scores."""
    return any(row["metric"].split("/")[-1].startswith(TEXT_NAMES) for row in table_rows(run))


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    """Some of many, evenly."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[n * len(numbers) // most] for n in range(most)]


def _text_example(work: BenchmarkWork, number: int, records: Mapping[str, Mapping[str, Any]], mark: str) -> Example:
    """An answer or a caption."""
    sample = work.samples[number]
    record = records[sample.official_id]
    situation = f"{sample.situation} " if getattr(sample, "situation", None) else ""
    asked = f"{situation}{sample.question}" if sample.question else f"object {', '.join(map(str, sample.object_ids))}"
    said = record.get("answer", record.get("caption", ""))
    right = "; ".join(sample.answers) or "; ".join(sample.replies[:1])
    return Example(sample.scene_id, asked, said, right, mark)


def _box_example(sample: Sample, records: Mapping[str, Mapping[str, Any]], work: EvaluationWork) -> Example:
    """A box, on a frame and on a map where the frames are there and cameras are known."""
    true, found = sample.boxes_annotation[0].tolist(), records[sample.official_id]["box_annotation"]
    iou = 0.0 if found is None else float(scanrefer_iou(found, true))
    pictures: tuple[str, ...] = ()
    try:
        frames = frames_of(sample, work.data_root, 8)
    except VidLLMMissingFileError:
        # Predictions of another system may be scored where there are annotations alone.
        return Example(sample.scene_id, sample.question or "", iou=f"{iou:.2f}")
    number = best_frame(true, frames)
    if number is not None:
        pictures = (
            data_uri(frame_picture(frames, number, true, found)),
            data_uri(map_picture(frames, true, found)),
        )
    return Example(sample.scene_id, sample.question or "", iou=f"{iou:.2f}", pictures=pictures)


def _markdown(context: Mapping[str, Any]) -> str:
    """The same without pictures."""
    kinds = context["kinds"]
    lines = [f"# {_cell(context['title'])}", "", _cell(context["summary"]), ""]
    for title, rows in (("Scores", context["rows"]), ("By kind", context["by_kind"])):
        if not rows:
            continue
        lines += [f"## {title}", ""]
        if title == "Scores":
            lines += [_cell(context["about_numbers"]), ""]
        lines += [
            f"| benchmark | protocol | metric | model | {' | '.join(kinds)} |",
            "|---|---|---|--:|" + "--:|" * len(kinds),
        ]
        for row in rows:
            model = row.model + (f" [{row.interval}]" if row.interval else "")
            cells = [row.benchmark, row.protocol, row.metric, model, *(row.baselines.get(kind, "") for kind in kinds)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    for part in context["texts"]:
        lines += [f"## {part.title}", "", "| | scene | asked | said | right |", "|---|---|---|---|---|"]
        for item in part.items_:
            cells = [
                item.mark,
                *(_cell(text) for text in (item.scene, item.asked, item.said, item.right)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if context["boxes"]:
        lines += ["## Boxes", "", "| IoU | scene | asked |", "|--:|---|---|"]
        lines += [f"| {item.iou} | {_cell(item.scene)} | {_cell(item.asked)} |" for item in context["boxes"]]
        lines.append("")
    if context["curves"]:
        lines += ["## Reconstruction", ""]
    for curve in context["curves"]:
        names = [name for name, _, _ in curve.lines]
        lines += [f"{curve.title}.", "", f"| {curve.unit} | {' | '.join(names)} |", "|--:|" + "--:|" * len(names)]
        lines += [*(f"| {' | '.join(row)} |" for row in curve.table), ""]
    lines += [f"- {view.title}: {_cell(view.scene)}, {view.scores}" for view in context["views"]]
    lines += [""] * bool(context["views"])
    lines += ["## Provenance", ""]
    # Within code nothing is escaped but its own end.
    lines += [f"- {name}: `{' '.join(value.split()).replace('`', chr(39))}`" for name, value in context["provenance"]]
    if context["notes"]:
        lines += ["", "## Notes", "", *(f"- {_cell(note)}" for note in context["notes"])]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text that stays within its cell and is read as it stands: no tag, link, picture or code, whatever a model said."""
    text = " ".join(text.split())
    for sign in "\\<&[!`|":
        text = text.replace(sign, f"\\{sign}")
    return text


__all__ = [
    "DRAWS",
    "HTML_NAME",
    "INTERVALS_NAME",
    "LEVEL",
    "MARKDOWN_NAME",
    "Example",
    "ReportRow",
    "results_sha256",
    "write_report",
]
