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

from jinja2 import Environment, StrictUndefined

from vidllm.eval.intervals import Marks, bootstrap_interval, row_marks
from vidllm.eval.metrics.scanrefer.scores import scanrefer_iou
from vidllm.eval.places import without_places
from vidllm.eval.predictions import PredictionFile
from vidllm.eval.provenance import SETTINGS_FILE
from vidllm.eval.report_pictures import best_frame, data_uri, frame_picture, map_picture
from vidllm.eval.results import read_results, table_rows
from vidllm.eval.work import BenchmarkWork, EvaluationWork, plan
from vidllm.processing.benchmarks.frames import frames_of
from vidllm.processing.samples import Sample
from vidllm.processing.video_reading_vidllm import VidLLMInputError


HTML_NAME, MARKDOWN_NAME, INTERVALS_NAME = "report.html", "report.md", "intervals.json"
LEVEL, DRAWS = 0.95, 2000


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
        hit (`bool`): Whether it counts.
        iou (`str`): Of boxes.
        pictures (`tuple[str, ...]`): As they stand in a page.

    Source:
        Ours.
    """

    scene: str
    asked: str
    said: str = ""
    right: str = ""
    hit: bool = False
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
    marks = row_marks(work, records)
    intervals = _intervals(out, run, marks)
    rows = [_row(row, intervals) for row in table_rows(run)]
    kinds = list(run["baselines"])
    texts, boxes = _examples(work, records, marks, most_examples)
    provenance = without_places(document["provenance"])
    context = {
        "title": f"Vid-LLM on {name}",
        "summary": f"{provenance['model']}, geometry {provenance['geometry']}, {provenance['frames']} frames per scene, {_cost(work, provenance)}.",
        "level": f"{100 * LEVEL:g} %",
        "draws": f"{DRAWS:,}",
        "kinds": kinds,
        "rows": [row for row in rows if "/" not in row.metric],
        "by_kind": [row for row in rows if "/" in row.metric],
        "texts": texts,
        "boxes": boxes,
        "provenance": [(key, _plain(value)) for key, value in provenance.items() if key != "notes"],
        "notes": provenance["notes"],
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
        mean = float(of_rows.values.mean())
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
        if name not in marks:
            continue
        protocol = next(iter(marks[name].values()))
        hits = next(iter(protocol.values())).values > 0
        chosen = [
            *_spread([n for n, hit in enumerate(hits) if hit], most // 2),
            *_spread([n for n, hit in enumerate(hits) if not hit], most - most // 2),
        ]
        if name == "scanrefer":
            boxes = [_box_example(part.samples[n], records[name], work, bool(hits[n])) for n in chosen]
        else:
            texts.append(_Texts(name, [_text_example(part, n, records[name], bool(hits[n])) for n in chosen]))
    return texts, boxes


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    """Some of many, evenly."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[n * len(numbers) // most] for n in range(most)]


def _text_example(work: BenchmarkWork, number: int, records: Mapping[str, Mapping[str, Any]], hit: bool) -> Example:
    """An answer or a caption."""
    sample = work.samples[number]
    record = records[sample.official_id]
    situation = f"{sample.situation} " if getattr(sample, "situation", None) else ""
    asked = f"{situation}{sample.question}" if sample.question else f"object {', '.join(map(str, sample.object_ids))}"
    said = record.get("answer", record.get("caption", ""))
    right = "; ".join(sample.answers) or "; ".join(sample.replies[:1])
    return Example(sample.scene_id, asked, said, right, hit)


def _box_example(sample: Sample, records: Mapping[str, Mapping[str, Any]], work: EvaluationWork, hit: bool) -> Example:
    """A box, on a frame and on a map where cameras are known."""
    true, found = sample.boxes_annotation[0].tolist(), records[sample.official_id]["box_annotation"]
    iou = 0.0 if found is None else float(scanrefer_iou(found, true))
    frames = frames_of(sample, work.data_root, 8)
    number = best_frame(true, frames)
    pictures: tuple[str, ...] = ()
    if number is not None:
        pictures = (
            data_uri(frame_picture(frames, number, true, found)),
            data_uri(map_picture(frames, true, found)),
        )
    return Example(sample.scene_id, sample.question or "", hit=hit, iou=f"{iou:.2f}", pictures=pictures)


def _markdown(context: Mapping[str, Any]) -> str:
    """The same without pictures."""
    kinds = context["kinds"]
    lines = [f"# {context['title']}", "", context["summary"], ""]
    for title, rows in (("Scores", context["rows"]), ("By kind", context["by_kind"])):
        if not rows:
            continue
        lines += [
            f"## {title}",
            "",
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
                "right" if item.hit else "wrong",
                *(_cell(text) for text in (item.scene, item.asked, item.said, item.right)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if context["boxes"]:
        lines += ["## Boxes", "", "| IoU | scene | asked |", "|--:|---|---|"]
        lines += [f"| {item.iou} | {_cell(item.scene)} | {_cell(item.asked)} |" for item in context["boxes"]]
        lines.append("")
    lines += ["## Provenance", ""]
    lines += [f"- {name}: `{_cell(value).replace('`', chr(39))}`" for name, value in context["provenance"]]
    if context["notes"]:
        lines += ["", "## Notes", "", *(f"- {_cell(note)}" for note in context["notes"])]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text that stays within its cell."""
    return " ".join(text.split()).replace("|", "\\|")


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
