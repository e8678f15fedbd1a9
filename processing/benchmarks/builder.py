"""What all benchmark builders share: columns, shards, boxes from the scans, and a cache that notices edited files.

Shapes: M boxes of a row.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import datasets
from datasets import Features, List, Value

from vidllm.processing import samples
from vidllm.processing.benchmarks.files import (
    AnnotatedRow,
    MalformedRowError,
    checked_rows,
    find_annotation_file,
    read_annotation_bytes,
    sha256_of,
)
from vidllm.processing.scenes.annotations import load_scene_objects, read_json
from vidllm.processing.scenes.base import SkipCounter
from vidllm.processing.scenes.cameras import SCAN_FOLDERS
from vidllm.processing.video_reading_vidllm import VidLLMInputError


MAX_SHARDS = 64
SCAN_FILES = ("{}.aggregation.json", "{}_vh_clean_2.0.010000.segs.json", "{}_vh_clean_2.ply", "{}.txt")

FEATURES = Features(
    {
        "sample_id": Value("string"),
        "scene_id": Value("string"),
        "task": Value("string"),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "benchmark": Value("string"),
        "split": Value("string"),
        "official_id": Value("string"),
        "question": Value("string"),
        "answers": List(Value("string")),
        "references": List(Value("string")),
        "object_ids": List(Value("int64")),
        "object_names": List(Value("string")),
        "boxes_annotation": List(List(Value("float64"))),
        "box_frame": Value("string"),
        "box_block": List(Value("int64")),
        "points": List(List(Value("float64"))),
        "point_frame": Value("string"),
        "question_type": Value("string"),
        "situation": Value("string"),
        "alternative_situations": List(Value("string")),
        "position_m": List(Value("float64")),
        "rotation_xyzw": List(Value("float64")),
        "video": Value("string"),
        "poses": Value("string"),
        "annotation_from_world": List(List(Value("float64"))),
        "data_root": Value("string"),
        "official": Value("string"),
    }
)


@dataclass(frozen=True)
class BenchmarkRequest:
    """What was asked for.

    Args:
        data_root (`str`): Absolute path of the data root (of `jsonl`: of the file).
        split (`str`): Split, as distributed.
        variant (`str`): Which rows are made of the file's.
        prompts (`str`): Name of the prompts.
        strict (`bool`): Whether a malformed row is an error; else it is skipped and counted.

    Source:
        Ours.
    """

    data_root: str
    split: str
    variant: str = "default"
    prompts: str = "vidllm"
    strict: bool = True


@dataclass
class BenchmarkContent:
    """A split as read from its files.

    Args:
        records (`list[dict]`): Rows without boxes from scans.
        row_of_record (`list[str]`): File and row of each record, for messages.
        sha256 (`dict[str, str]`): Of each file, by path.
        skipped (`SkipCounter`): Malformed rows, where they are not an error.
        num_official_rows (`int`): Rows of the main file.
        notes (`list[str]`): What the files lack.

    Source:
        Ours.
    """

    records: list[dict] = field(default_factory=list)
    row_of_record: list[str] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)
    skipped: SkipCounter = field(default_factory=SkipCounter)
    num_official_rows: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def sha256_of_all(self) -> str:
        """One number for the contents of all files."""
        return sha256_of("".join(sorted(self.sha256.values())).encode())


@dataclass
class BenchmarkConfig(datasets.BuilderConfig):
    """Configuration of a builder; every field is part of the cache's name.

    Args:
        data_root (`str`): See `BenchmarkRequest`.
        split (`str`): See `BenchmarkRequest`.
        variant (`str`): See `BenchmarkRequest`.
        prompts (`str`): See `BenchmarkRequest`.
        strict (`bool`): See `BenchmarkRequest`.
        files_sha256 (`str`): Of the annotation files' contents.
        fingerprint (`str`): Of all that rows depend on: annotation files, scans, this code.
        num_rows (`int`): Rows in all.

    Source:
        Ours: `datasets` does not notice edited files by itself.
    """

    data_root: str = ""
    split: str = "train"
    variant: str = "default"
    prompts: str = "vidllm"
    strict: bool = True
    files_sha256: str = ""
    fingerprint: str = ""
    num_rows: int = 0

    @property
    def request(self) -> BenchmarkRequest:
        """The same as a request."""
        return BenchmarkRequest(self.data_root, self.split, self.variant, self.prompts, self.strict)


class BenchmarkBuilder(datasets.GeneratorBasedBuilder):
    """Base of the builders; a benchmark says which files it has and what their rows mean.

    Use `load_benchmark`, which reads the files, checks them, and makes the configuration.

    Source:
        Upstream: huggingface/datasets `GeneratorBasedBuilder`. Ours: shards are ranges of rows, so that several processes can share one
        file.
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = BenchmarkConfig
    benchmark: ClassVar[str] = ""
    splits: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[str, ...]] = ("default",)
    published_rows: ClassVar[dict[str, int]] = {}
    published_scenes: ClassVar[dict[str, int]] = {}
    uses_scans: ClassVar[bool] = True

    @classmethod
    def annotation_files(cls, data_root: str, split: str) -> list[Path]:
        """Files of a split, the main one first."""
        return [find_annotation_file(data_root, name) for name in cls.file_names(split)]

    @classmethod
    def file_names(cls, split: str) -> list[str]:
        """Names of a split's files as distributed, the main one first."""
        return []

    @classmethod
    def read(cls, request: BenchmarkRequest, files: list[tuple[Path, bytes]], content: BenchmarkContent) -> None:
        """Fill `content` with the records of the files."""

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(name=self.config.split, gen_kwargs={"shards": row_ranges(self.config.num_rows)})
        ]

    def _generate_examples(self, shards: list[str]) -> Iterator[tuple[str, dict]]:
        content = _content_again(type(self), self.config.request, self.config.files_sha256)
        boxes = BoxesOfScans(self.config.data_root)
        for shard in shards:
            start, stop = map(int, shard.split(":"))
            for number in range(start, stop):
                record = content.records[number]
                yield (
                    record["sample_id"],
                    complete_record(record, boxes, content.row_of_record[number]),
                )


def row_ranges(num_rows: int, max_shards: int = MAX_SHARDS) -> list[str]:
    """Rows cut into consecutive ranges, "start:stop"; at least one.

    Args:
        num_rows (`int`): Rows in all.
        max_shards (`int`): Most ranges.

    Returns:
        `list[str]`

    Source:
        Ours: `datasets` shares work between processes, workers and nodes by list entries.
    """
    count = max(1, min(num_rows, max_shards))
    edges = [num_rows * number // count for number in range(count + 1)]
    return [f"{start}:{stop}" for start, stop in pairwise(edges)]


def read_content(builder: type[BenchmarkBuilder], request: BenchmarkRequest) -> BenchmarkContent:
    """Read and check the annotation files of a split.

    Args:
        builder (`type[BenchmarkBuilder]`): The benchmark.
        request (`BenchmarkRequest`): Which split, and how.

    Returns:
        `BenchmarkContent`

    Raises:
        VidLLMInputError: A file is absent or malformed; names file, row and field.

    Source:
        Ours.
    """
    content = BenchmarkContent()
    files = [
        (path, read_annotation_bytes(path)) for path in builder.annotation_files(request.data_root, request.split)
    ]
    content.sha256.update({str(path): sha256_of(value) for path, value in files})
    builder.read(request, files, content)
    counts = Counter(record["sample_id"] for record in content.records)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise VidLLMInputError(f"{files[0][0]}: wanted every id once; {twice} is there {counts[twice]} times")
    if builder.uses_scans:
        _check_object_ids(content, request)
    return content


@lru_cache(maxsize=4)
def _content_again(builder: type[BenchmarkBuilder], request: BenchmarkRequest, files_sha256: str) -> BenchmarkContent:
    """The content in a process that generates rows; the files must still be those that the cache is named after."""
    content = read_content(builder, request)
    if content.sha256_of_all != files_sha256:
        raise VidLLMInputError(f"{', '.join(content.sha256)}: changed while it was being read; load it again")
    return content


def forget_contents() -> None:
    """Let go of the annotation files that this process keeps while it makes rows of them.

    Source:
        Ours: a written cache needs them no longer.
    """
    _content_again.cache_clear()


def find_scan(data_root: str | Path, scene_id: str) -> Path | None:
    """Folder of a scan with all files that boxes come from.

    Args:
        data_root (`str` or `Path`): The data root.
        scene_id (`str`): The scene.

    Returns:
        `Path` or None.

    Source:
        Ours: exported frames alone, and test scans, have no boxes.
    """
    for name in SCAN_FOLDERS:
        folder = Path(data_root) / name / scene_id
        if all((folder / file.format(scene_id)).is_file() for file in SCAN_FILES[:3]):
            return folder
    return None


def scans_state(data_root: str | Path, scene_ids: list[str]) -> str:
    """A text that changes when a file that boxes come from does (by size and time of change).

    Args:
        data_root (`str` or `Path`): The data root.
        scene_ids (`list[str]`): Scenes to look at.

    Returns:
        `str`

    Source:
        Ours: meshes are too large to read each time.
    """
    parts = []
    for scene_id in sorted(set(scene_ids)):
        folder = find_scan(data_root, scene_id)
        parts.append(f"{scene_id}:{'-' if folder is None else _scan_state(folder)}")
    return ";".join(parts)


def _scan_state(folder: Path) -> str:
    """Sizes and times of change of a scan's files."""
    stats = [(folder / name.format(folder.name)) for name in SCAN_FILES]
    return ",".join(f"{s.st_size}.{s.st_mtime_ns}" for s in (path.stat() for path in stats if path.is_file()))


@lru_cache(maxsize=4096)
def _scan_boxes(folder: Path, state: str) -> dict[int, list[float]]:
    """Box of each object of a scan that has vertices; `state` is there so that edited scans are read again."""
    objects = load_scene_objects(folder)
    return {
        int(number): box.tolist() for number, box in zip(objects.object_ids, objects.boxes_annotation, strict=True)
    }


@lru_cache(maxsize=4096)
def _aggregation_ids(path: Path, state: str) -> frozenset[int]:
    """`objectId`s of an aggregation file."""
    content = read_json(path, "objects of the scan")
    groups = content.get("segGroups") if isinstance(content, Mapping) else None
    if not isinstance(groups, list):
        raise VidLLMInputError(f"{path}: wanted the key 'segGroups' with a list")
    return frozenset(
        AnnotatedRow(path, row, group, "segGroups, entry").integer("objectId") for row, group in enumerate(groups)
    )


def _check_object_ids(content: BenchmarkContent, request: BenchmarkRequest) -> None:
    """Objects that rows name must be in the aggregation files that are there."""
    bad: list[int] = []
    scans: dict[str, tuple[Path, frozenset[int]] | None] = {}
    for number, (record, where) in enumerate(zip(content.records, content.row_of_record, strict=True)):
        scene_id, wanted = record["scene_id"], record.get("object_ids")
        if not wanted:
            continue
        if scene_id not in scans:
            folder = find_scan(request.data_root, scene_id)
            path = None if folder is None else folder / SCAN_FILES[0].format(scene_id)
            scans[scene_id] = None if path is None else (path, _aggregation_ids(path, _scan_state(folder)))
        path, known = scans[scene_id] or (None, frozenset(wanted))
        missing = sorted(set(wanted) - known)
        if not missing:
            continue
        if request.strict:
            raise MalformedRowError(where, f"object id: no object {missing[0]} in {path}", "object id not in the scan")
        content.skipped.add("object id not in the scan", where)
        bad.append(number)
    for number in reversed(bad):
        del content.records[number], content.row_of_record[number]


class BoxesOfScans:
    """Boxes of a data root's scans by scene and object; each scan is looked for once in the life of this object.

    Args:
        data_root (`str`): The data root.

    Source:
        Ours.
    """

    def __init__(self, data_root: str):
        self.data_root = data_root
        self._boxes: dict[str, dict[int, list[float]]] = {}

    def of(self, scene_id: str) -> dict[int, list[float]]:
        """Box of each object of a scene; empty where the scan's files are absent."""
        if scene_id not in self._boxes:
            folder = find_scan(self.data_root, scene_id)
            self._boxes[scene_id] = {} if folder is None else _scan_boxes(folder, _scan_state(folder))
        return self._boxes[scene_id]


def complete_record(record: dict, scans: BoxesOfScans, where: str) -> dict:
    """A row with all columns, and with its boxes.

    Args:
        record (`dict`): What the benchmark's reader made.
        scans (`BoxesOfScans`): Of the data root.
        where (`str`): File and row, for messages.

    Returns:
        `dict`: columns as in `FEATURES`.

    Raises:
        VidLLMInputError: The scan is malformed, or the row makes no valid sample; names the row.

    Source:
        Ours: a caption's point is the centre of its object's box.
    """
    row = {
        **dict.fromkeys(FEATURES),
        **{name: [] for name in ("answers", "references", "object_ids", "object_names", "alternative_situations")},
        "official_id": "",
        "question": "",
        "box_frame": "annotation",
        "point_frame": "annotation",
        "box_block": [],
        "data_root": scans.data_root,
        **record,
    }
    if row["object_ids"] and row["boxes_annotation"] is None:
        boxes = scans.of(row["scene_id"])
        if all(number in boxes for number in row["object_ids"]):
            row["boxes_annotation"] = [boxes[number] for number in row["object_ids"]]
            row["box_block"] = [0] * len(row["object_ids"])
    if row["task"] == "caption" and row["points"] is None and row["boxes_annotation"]:
        row["points"] = [row["boxes_annotation"][0][:3]]
    row["official"] = json.dumps(row["official"], ensure_ascii=False)
    try:
        samples.Sample.from_row(row)
    except VidLLMInputError as error:
        raise VidLLMInputError(f"{where}: {error}") from None
    return row


class UniqueIds:
    """Remembers ids, and in which row each was.

    Source:
        Ours.
    """

    def __init__(self) -> None:
        self._rows: dict[Any, str] = {}

    def add(self, row: AnnotatedRow, name: str, key: Any) -> None:
        """Remember an id; one that was there before is an error of this row."""
        first = self._rows.setdefault(key, row.name)
        if first != row.name:
            raise row.error(name, f"an id that no other row has ({first} has it too)", key)


def fill(
    content: BenchmarkContent,
    request: BenchmarkRequest,
    rows: Iterable[tuple[Path, int, Any]],
    convert: Callable[[AnnotatedRow], list[dict]],
    what: str = "row",
) -> None:
    """Convert rows into records of `content`; malformed ones are an error, or counted.

    Args:
        content (`BenchmarkContent`): Filled.
        request (`BenchmarkRequest`): Says whether malformed rows are an error.
        rows (`Iterable[tuple]`): Path, number and values of each row.
        convert (callable): `(AnnotatedRow) -> list of records`.
        what (`str`): How messages call a row.

    Raises:
        MalformedRowError: With `strict`.

    Source:
        Ours.
    """

    def one(path: Path, number: int, values: Any) -> tuple[str, list[dict]]:
        row = AnnotatedRow(path, number, values, what)
        return row.where, convert(row)

    for where, records in checked_rows(rows, one, None if request.strict else content.skipped):
        content.records.extend(records)
        content.row_of_record.extend([where] * len(records))


__all__ = [
    "FEATURES",
    "BenchmarkBuilder",
    "BenchmarkConfig",
    "BenchmarkContent",
    "BenchmarkRequest",
    "BoxesOfScans",
    "UniqueIds",
    "complete_record",
    "fill",
    "find_scan",
    "forget_contents",
    "read_content",
    "row_ranges",
    "scans_state",
]
