"""Scan2Cap: describe the object at a place. ScanRefer's rows grouped per object; the place is the centre of its box `(M, 6)`."""

from pathlib import Path
from typing import ClassVar

from vidllm.processing.benchmarks.builder import BenchmarkBuilder, BenchmarkContent, BenchmarkRequest
from vidllm.processing.benchmarks.files import AnnotatedRow
from vidllm.processing.benchmarks.prompts import prompt_style, reply_turn, spoken, user_turn
from vidllm.processing.benchmarks.scanrefer import description_record, read_descriptions


class Scan2CapBuilder(BenchmarkBuilder):
    """`ScanRefer_filtered_{split}.json`, one row per object, key `scene|object id|object name`; references are all its descriptions.

    `official` holds the file's rows of the object. Variant `per_description`: one row per description, `<key>|<ann_id>`; for training.

    Source:
        Upstream: daveredrum/Scan2Cap@b9e9610 (grouping and key). Published sizes: the papers.
    """

    benchmark: ClassVar[str] = "scan2cap"
    splits: ClassVar[tuple[str, ...]] = ("train", "val")
    variants: ClassVar[tuple[str, ...]] = ("default", "per_description")
    published_rows: ClassVar[dict[str, int]] = {"train": 7875, "val": 2068}
    published_scenes: ClassVar[dict[str, int]] = {"train": 562, "val": 141}

    @classmethod
    def file_names(cls, split: str) -> list[str]:
        """ScanRefer's file."""
        return [f"ScanRefer_filtered_{split}.json"]

    @classmethod
    def read(cls, request: BenchmarkRequest, files: list[tuple[Path, bytes]], content: BenchmarkContent) -> None:
        """Objects in the order in which the file first names them."""
        capitalise = prompt_style(request.prompts).capitalise

        def convert(row: AnnotatedRow) -> list[dict]:
            record = description_record(cls, request, row)
            key = f"{record['scene_id']}|{record['object_ids'][0]}|{record['object_names'][0]}"
            reply = reply_turn(spoken(record["question"], capitalise))
            record.update(
                {
                    "task": "caption",
                    "official_id": key,
                    "sample_id": f"{cls.benchmark}/{request.split}/{key}|{row.values['ann_id']}",
                    "references": [record["question"]],
                    "messages": [user_turn(request.prompts, "caption"), reply],
                }
            )
            return [record]

        read_descriptions(request, files, content, convert)
        if request.variant == "default":
            _group(content, f"{cls.benchmark}/{request.split}/")


def _group(content: BenchmarkContent, prefix: str) -> None:
    """Records of one object become one."""
    grouped: dict[str, dict] = {}
    where: dict[str, str] = {}
    for record, row in zip(content.records, content.row_of_record, strict=True):
        key = record["official_id"]
        if key not in grouped:
            grouped[key] = {**record, "sample_id": prefix + key, "references": [], "official": {"rows": []}}
            grouped[key]["question"] = ""
            where[key] = row
        grouped[key]["references"].append(record["question"])
        grouped[key]["official"]["rows"].append(record["official"])
    content.records = list(grouped.values())
    content.row_of_record = list(where.values())


__all__ = ["Scan2CapBuilder"]
