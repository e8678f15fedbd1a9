"""ScanRefer: find the object that a description means. Texts, ids and boxes `(M, 6)`."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from vidllm.processing.benchmarks.builder import BenchmarkBuilder, BenchmarkContent, BenchmarkRequest, UniqueIds, fill
from vidllm.processing.benchmarks.files import AnnotatedRow, list_of, parse_json, read_annotation_bytes, sha256_of
from vidllm.processing.benchmarks.prompts import box_turn, user_turn
from vidllm.processing.scenes.labels import find_label_tsv, read_label_map, unique_multiple


class ScanReferBuilder(BenchmarkBuilder):
    """`ScanRefer_filtered_{split}.json`. Rows may carry others' `eval_type`; it stays in `official` and is not our question type.

    The question type is `unique` or `multiple` by ScanRefer's own rule, where the data root has ScanNet's label table.

    Source:
        Upstream: daveredrum/ScanRefer@9d74830 (format). Published sizes: the paper.
    """

    benchmark: ClassVar[str] = "scanrefer"
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    published_rows: ClassVar[dict[str, int]] = {"train": 36665, "val": 9508, "test": 5410}
    published_scenes: ClassVar[dict[str, int]] = {"train": 562, "val": 141, "test": 97}

    @classmethod
    def file_names(cls, split: str) -> list[str]:
        """One file."""
        return [f"ScanRefer_filtered_{split}.json"]

    @classmethod
    def read(cls, request: BenchmarkRequest, files: list[tuple[Path, bytes]], content: BenchmarkContent) -> None:
        """One row per description."""

        def convert(row: AnnotatedRow) -> list[dict]:
            record = description_record(cls, request, row)
            record["official_id"] = f"{record['scene_id']}|{row.values['object_id']}|{row.values['ann_id']}"
            record["sample_id"] = f"{cls.benchmark}/{request.split}/{record['official_id']}"
            turn = user_turn(request.prompts, "ground", description=record["question"])
            return [{**record, "task": "ground", "messages": [turn, box_turn()]}]

        read_descriptions(request, files, content, convert)


def read_descriptions(
    request: BenchmarkRequest,
    files: list[tuple[Path, bytes]],
    content: BenchmarkContent,
    convert: Callable[[AnnotatedRow], list[dict]],
) -> None:
    """Rows of a ScanRefer file, each description once, with question types.

    Args:
        request (`BenchmarkRequest`): Which split, and how.
        files (`list`): The file and its bytes.
        content (`BenchmarkContent`): Filled.
        convert (callable): Records of a row.

    Raises:
        VidLLMInputError: A row is malformed.

    Source:
        Upstream: daveredrum/ScanRefer@9d74830: a description is known by scene, object and annotation.
    """
    path, raw = files[0]
    rows = list_of(path, parse_json(path, raw))
    content.num_official_rows = len(rows)
    unique = UniqueIds()

    def checked(row: AnnotatedRow) -> list[dict]:
        records = convert(row)
        unique.add(row, "ann_id", (row.values["scene_id"], row.number_text("object_id"), row.number_text("ann_id")))
        return records

    fill(content, request, ((path, number, values) for number, values in enumerate(rows)), checked)
    table = find_label_tsv(request.data_root)
    if table is None:
        content.notes.append(
            f"{request.data_root}: no scannetv2-labels.combined.tsv, so rows are not told apart as unique and multiple"
        )
        return
    content.sha256[str(table)] = sha256_of(read_annotation_bytes(table))
    kinds = unique_multiple([record["official"] for record in content.records], read_label_map(table))
    for record, kind in zip(content.records, kinds, strict=True):
        record["question_type"] = kind


def description_record(cls: type[BenchmarkBuilder], request: BenchmarkRequest, row: AnnotatedRow) -> dict:
    """What a ScanRefer row says, for both tasks that are made of it.

    Args:
        cls (`type[BenchmarkBuilder]`): The benchmark.
        request (`BenchmarkRequest`): Which split.
        row (`AnnotatedRow`): The row.

    Returns:
        `dict`: a record without task, ids and messages.

    Raises:
        MalformedRowError: A field is absent or has a wrong form.

    Source:
        Upstream: daveredrum/ScanRefer@9d74830 (ids are written as text).
    """
    row.number_text("ann_id")
    has_name = request.split != "test" or "object_name" in row.values
    return {
        "scene_id": row.scene(),
        "benchmark": cls.benchmark,
        "split": request.split,
        "question": row.text("description"),
        "object_ids": [row.number_text("object_id")],
        "object_names": [row.text("object_name")] if has_name else [],
        "official": {"object_name": "", **row.values},
    }


__all__ = ["ScanReferBuilder", "description_record", "read_descriptions"]
