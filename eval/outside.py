"""Predictions of any other system, from a file: read, checked, and brought into the form of our own. No model, no tensors.

A file holds one JSON object per line (`.jsonl`), or one list of such objects, or one object of them by id (`.json`); UTF-8. What an object says:

```
scanqa     {"id": question_id, "answer": "text"}        or "answers": ["best", "second", ...] in order of preference
sqa3d      {"id": question_id, "answer": "text"}        the id as a number or as text
scanrefer  {"id": "scene|object_id|ann_id", "box": BOX}
scan2cap   {"id": "scene|object_id|object_name", "caption": "text"}    and "box": BOX of the proposal that it describes, if there were proposals

BOX        [cx, cy, cz, dx, dy, dz], or those and [.., a, b, c] for a box turned by Rz(a) Rx(b) Ry(c) (radians), or its 8 corners
           [[x, y, z], ...]; axis-aligned frame of the annotations, metres; null: nothing was found
```

Instead of `id` the authors' own keys are taken: `question_id` of the two question sets; `scene_id`, `object_id` and `ann_id` of ScanRefer;
`answer_top10` for `answers`; `pred_bbox` for `box`. `"benchmark"` says of which benchmark a row is, where a file holds several. Other keys are not
read. A folder holds `<benchmark>.jsonl` or `<benchmark>.json` of each.

What becomes of broken predictions:

* no row for a question, two rows for one, a row for none, another type, a number that is not finite, a negative edge, half of a surrogate
  pair, JSON that is none: one error that names the file and the row, and nothing is scored;
* a row for a question of the split that is not asked now (`limit_scenes`; what is right is not known): not read, and counted in the notes;
* blank texts, line breaks of any kind, emoji, thousands of letters: texts like any other; n-gram scores see a blank where a line breaks, exact
  matches what the protocol makes of it (`eval/metrics/scanqa/README.md`);
* a caption without a `box` where other rows have one: an error, because it would count as described at its true place.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vidllm.eval.metrics.scanrefer.scores import scanrefer_iou
from vidllm.eval.oriented import oriented_corners
from vidllm.eval.work import RECONSTRUCTION, BenchmarkWork
from vidllm.processing.samples import Sample
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


SUFFIXES = (".jsonl", ".json")
_ANSWERS, _BOXES = ("answer", "answers", "answer_top10"), ("box", "pred_bbox", "box_oriented", "box_annotation")


@dataclass(frozen=True)
class OutsidePredictions:
    """Predictions of another system, one record per question asked.

    Args:
        records (`dict[str, list[dict]]`): By benchmark, in the order of its questions, in the form of our own predictions.
        sha256 (`dict[str, str]`): Of the file, by benchmark.
        notes (`list[str]`): What was not read.

    Source:
        Ours.
    """

    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Row:
    """An object of a file, and how messages call it."""

    where: str
    values: Mapping[str, Any]

    def error(self, wanted: str, got: Any) -> VidLLMInputError:
        return VidLLMInputError(f"{self.where}: wanted {wanted}; got {got!r:.80}")

    def one_of(self, names: Sequence[str]) -> str:
        """Which of several keys it has; the first that is there."""
        found = next((name for name in names if name in self.values), None)
        if found is None:
            raise self.error(f"`{names[0]}`", list(self.values))
        return found

    def text(self, name: str, value: Any) -> str:
        """A text that can be written down."""
        if not isinstance(value, str):
            raise self.error(f"a text as `{name}`", value)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(f"characters as `{name}`, not half of a surrogate pair", value) from None
        return value


def read_outside(source: str | Path, works: Mapping[str, BenchmarkWork]) -> OutsidePredictions:
    """Read predictions of another system and check them against what is asked.

    Args:
        source (`str` or `Path`): File, or folder with a file per benchmark; see above for the form.
        works (`Mapping[str, BenchmarkWork]`): What is asked, by benchmark.

    Returns:
        `OutsidePredictions`: complete.

    Raises:
        VidLLMInputError: See above; names file and row.

    Source:
        Ours. Upstream: ATR-DBI/ScanQA (`question_id`, `answer_top10`), daveredrum/ScanRefer (`scene_id`, `object_id`, `ann_id`, `pred_bbox`): the keys of
        their submissions.
    """
    if RECONSTRUCTION in works:
        raise VidLLMInputError(f"predictions: wanted benchmarks with a file of predictions; {RECONSTRUCTION} has none")
    path = Path(source).expanduser()
    found = OutsidePredictions()
    whole = None if path.is_dir() else _rows(path)
    for name, work in works.items():
        file, rows = _rows_in(path, name) if whole is None else (path, whole)
        mine = [row for row in rows if _is_of(row, name, several=whole is not None and len(works) > 1)]
        found.records[name] = _records(mine, work, file, found.notes)
        found.sha256[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _is_of(row: _Row, name: str, several: bool) -> bool:
    """Whether a row belongs to a benchmark."""
    said = row.values.get("benchmark")
    if said is None:
        if several:
            raise row.error("`benchmark`, because several are asked for", list(row.values))
        return True
    return row.text("benchmark", said) == name


def _rows_in(folder: Path, name: str) -> tuple[Path, list[_Row]]:
    """The file of a benchmark in a folder, and its rows."""
    files = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").is_file()]
    if len(files) != 1:
        there = " and ".join(file.name for file in files) or "none"
        raise VidLLMMissingFileError(f"{folder}: wanted one of {name}.jsonl and {name}.json; got {there}")
    return files[0], _rows(files[0])


def _rows(path: Path) -> list[_Row]:
    """Objects of a file, in its order."""
    if path.suffix not in SUFFIXES:
        raise VidLLMInputError(
            f"{path}: wanted predictions as .jsonl, .json or a folder of them; got {path.suffix or 'no suffix'}"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VidLLMMissingFileError(
            f"{path}: wanted a file of predictions; cannot be read ({error.strerror})"
        ) from None
    return list(_objects(path, content.removeprefix(b"\xef\xbb\xbf")))


def _objects(path: Path, content: bytes) -> Iterator[_Row]:
    """Objects of lines, of a list, or by id."""
    if path.suffix == ".jsonl":
        # Only a line feed ends a line: a text may hold other breaks as they are.
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _row(where, _parsed(where, line))
        return
    document = _parsed(str(path), content)
    if isinstance(document, list):
        for number, value in enumerate(document):
            where = f"{path}, row {number}"
            yield _row(where, value)
    elif isinstance(document, Mapping):
        for key, value in document.items():
            row = _row(f"{path}, {key!r:.80}", value)
            if "id" in row.values and str(row.values["id"]) != key:
                raise row.error("the same `id` as its key", row.values["id"])
            yield _Row(row.where, {**row.values, "id": key})
    else:
        raise VidLLMInputError(
            f"{path}: wanted a list of predictions, or an object of them by id; got {document!r:.80}"
        )


def _row(where: str, value: Any) -> _Row:
    if not isinstance(value, Mapping):
        raise VidLLMInputError(f"{where}: wanted an object; got {value!r:.80}")
    return _Row(where, value)


def _parsed(where: str, content: bytes) -> Any:
    """JSON whose objects have every key once."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise VidLLMInputError(f"{where}: wanted every key once; {key!r:.80} is there twice")
            found[key] = value
        return found

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except VidLLMInputError:
        raise
    except (ValueError, RecursionError) as error:
        raise VidLLMInputError(f"{where}: wanted JSON in UTF-8; got {content[:40]!r} ({str(error)[:80]})") from None


def _id(row: _Row, name: str) -> str:
    """Id of a row, as our samples have it."""
    if "id" not in row.values and name == "scanrefer" and "ann_id" in row.values:
        parts = [row.values.get(key) for key in ("scene_id", "object_id", "ann_id")]
        if not all(isinstance(part, str | int) and not isinstance(part, bool) for part in parts):
            raise row.error("`scene_id`, `object_id` and `ann_id`", parts)
        return "|".join(map(str, parts))
    value = row.values[row.one_of(("id", "question_id"))]
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise row.error("a text or a whole number as `id`", value)
    return str(value)


def _records(rows: Sequence[_Row], work: BenchmarkWork, file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """One record per question, or one clear error."""
    by_id: dict[str, _Row] = {}
    asked, known = {sample.official_id: sample for sample in work.samples}, set(work.ids)
    not_asked = 0
    for row in rows:
        key = _id(row, work.name)
        if key in by_id:
            raise VidLLMInputError(f"{row.where}: wanted one prediction of {key}; {by_id[key].where} is one, too")
        if key not in known:
            near = difflib.get_close_matches(key, list(asked)[:5000], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise VidLLMInputError(
                f"{row.where}: wanted an id of {work.name}'s {work.split} split; got {key!r:.80}{hint}"
            )
        by_id[key] = row
        not_asked += key not in asked
    absent = [key for key in asked if key not in by_id]
    if absent:
        raise VidLLMInputError(
            f"{file}: wanted a prediction of each of {len(asked)} rows of {work.name}; {len(absent)} have none, such as {', '.join(absent[:3])}"
        )
    if not_asked:
        notes.append(f"{work.name}: {not_asked} predictions were not read, because their rows are not scored here")
    make = {"scanrefer": _box_record, "scan2cap": _caption_record}.get(work.name, _answer_record)
    has_boxes = {"box" in by_id[key].values for key in asked} if work.name == "scan2cap" else set()
    if len(has_boxes) == 2:
        bare = next(by_id[key] for key in asked if "box" not in by_id[key].values)
        raise bare.error("`box`, because other rows have one (null: no proposal)", list(bare.values))
    return [
        {"id": key, "scene": sample.scene_id, **make(by_id[key], sample, work.name)} for key, sample in asked.items()
    ]


def _answer_record(row: _Row, _: Sample, name: str) -> dict[str, Any]:
    """An answer, or several in order."""
    field_name = row.one_of(_ANSWERS)
    value = row.values[field_name]
    if field_name == "answer":
        return {"answer": row.text("answer", value)}
    if not isinstance(value, list) or not value:
        raise row.error(f"a list of texts as `{field_name}`", value)
    texts = [row.text(field_name, text) for text in value]
    return {"answer": texts[0], **({"answers": texts} if name == "scanqa" and len(texts) > 1 else {})}


def _box(row: _Row, name: str) -> list[float] | None:
    """A box as nine numbers."""
    value = row.values[name]
    if value is None:
        return None
    try:
        numbers = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.zeros(0)
    plain = isinstance(value, list) and not any(
        isinstance(item, str | bool) for item in np.ravel(np.array(value, dtype=object))
    )
    if not plain or numbers.shape not in ((6,), (9,), (8, 3)) or not np.isfinite(numbers).all():
        raise row.error(f"6, 9 or 8 x 3 finite numbers, or null, as `{name}`", value)
    if numbers.shape == (8, 3):
        low, high = numbers.min(axis=0), numbers.max(axis=0)
        numbers = np.concatenate([(low + high) / 2, high - low])
    if (numbers[3:6] < 0).any():
        raise row.error(f"edge lengths from 0 in `{name}`", value)
    return [*numbers.tolist(), *([0.0] * (9 - len(numbers)))]


def _upright(box: list[float] | None) -> list[float] | None:
    """The six numbers around the corners of a turned box, as ScanRefer's own script takes corners."""
    if box is None or not any(box[6:]):
        return None if box is None else box[:6]
    corners = oriented_corners(np.array(box))
    low, high = corners.min(axis=0), corners.max(axis=0)
    return [*((low + high) / 2).tolist(), *(high - low).tolist()]


def _box_record(row: _Row, _: Sample, __: str) -> dict[str, Any]:
    """A box; of our own records both forms are kept."""
    box = _box(row, row.one_of(_BOXES))
    own = "box" not in row.values and "pred_bbox" not in row.values and "box_annotation" in row.values
    upright = _box(row, "box_annotation") if own else None
    return {"box_annotation": upright[:6] if upright is not None else _upright(box), "box_oriented": box}


def _caption_record(row: _Row, sample: Sample, _: str) -> dict[str, Any]:
    """A caption, and how well its proposal lies."""
    caption = row.values[row.one_of(("caption",))]
    record: dict[str, Any] = {"caption": "" if caption is None else row.text("caption", caption)}
    if "box" in row.values:
        box = _upright(_box(row, "box"))
        if sample.boxes_annotation is None or not len(sample.boxes_annotation):
            raise row.error("no `box`, because the true one is not known (no scan)", box)
        iou = 0.0 if box is None else float(scanrefer_iou(np.array(box), sample.boxes_annotation[0]))
        record.update(iou=iou, proposal=box)
    elif caption is None:
        record.update(iou=0.0, proposal=None)
    return record


__all__ = ["OutsidePredictions", "read_outside"]
