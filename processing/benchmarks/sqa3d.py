"""SQA3D: questions from a described standpoint. Texts, ids, a position `(3,)` and a heading `(4,)`."""

import math
from pathlib import Path
from typing import ClassVar

from vidllm.processing.benchmarks.builder import BenchmarkBuilder, BenchmarkContent, BenchmarkRequest, UniqueIds, fill
from vidllm.processing.benchmarks.files import AnnotatedRow, MalformedRowError, list_of, parse_json
from vidllm.processing.benchmarks.prompts import reply_turn, spoken, user_turn
from vidllm.processing.benchmarks.question_types import sqa3d_type
from vidllm.processing.samples import RIGID_TOLERANCE


class SQA3DBuilder(BenchmarkBuilder):
    """`v1_balanced_questions_{split}_scannetv2.json` joined with `v1_balanced_sqa_annotations_{split}_scannetv2.json` by question id.

    Variant `all_situations`: one row per wording of the standpoint, `<id>#<number>`, number 0 being `situation`; for training.

    Source:
        Upstream: SilongYong/SQA3D@a98da8f (format). Published sizes: the paper.
    """

    benchmark: ClassVar[str] = "sqa3d"
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    variants: ClassVar[tuple[str, ...]] = ("default", "all_situations")
    published_rows: ClassVar[dict[str, int]] = {"train": 26623, "val": 3261, "test": 3519}
    published_scenes: ClassVar[dict[str, int]] = {"test": 67}
    uses_scans: ClassVar[bool] = False

    @classmethod
    def file_names(cls, split: str) -> list[str]:
        """Questions, then annotations."""
        return [f"v1_balanced_questions_{split}_scannetv2.json", f"v1_balanced_sqa_annotations_{split}_scannetv2.json"]

    @classmethod
    def read(cls, request: BenchmarkRequest, files: list[tuple[Path, bytes]], content: BenchmarkContent) -> None:
        """Questions in their file's order, each with its one annotation."""
        (path, raw), (annotation_path, annotation_raw) = files
        rows = list_of(path, parse_json(path, raw), "questions")
        annotation_rows = list_of(annotation_path, parse_json(annotation_path, annotation_raw), "annotations")
        content.num_official_rows = len(rows)
        annotations: dict[int, AnnotatedRow] = {}
        unique, unique_annotation = UniqueIds(), UniqueIds()

        def index(row: AnnotatedRow) -> list[dict]:
            number = row.integer("question_id")
            unique_annotation.add(row, "question_id", number)
            annotations[number] = row
            return []

        def convert(row: AnnotatedRow) -> list[dict]:
            number = row.integer("question_id")
            unique.add(row, "question_id", number)
            if number not in annotations:
                raise row.error("question_id", f"an id that {annotation_path.name} has too")
            return _records(cls, request, row, annotations[number])

        fill(content, request, ((annotation_path, n, values) for n, values in enumerate(annotation_rows)), index)
        fill(content, request, ((path, n, values) for n, values in enumerate(rows)), convert)
        asked = {
            row.get("question_id") for row in rows if isinstance(row, dict) and isinstance(row.get("question_id"), int)
        }
        for number, row in annotations.items():
            if number not in asked:
                error = row.error("question_id", f"an id that {path.name} has too")
                if request.strict:
                    raise error
                content.skipped.add(error.kind, row.where)


def _records(cls: type[SQA3DBuilder], request: BenchmarkRequest, row: AnnotatedRow, given: AnnotatedRow) -> list[dict]:
    """Rows of one question."""
    scene_id, question, situation = row.scene(), row.text("question"), row.text("situation")
    if given.scene() != scene_id:
        raise given.error("scene_id", f"{scene_id!r}, as the question with this id says")
    others = [text for text in row.texts("alternative_situation", []) if text.strip()]
    answers = given.get("answers", "a list", lambda value: isinstance(value, list))
    words = [
        AnnotatedRow(given.path, number, answer, f"{given.name}, answers").text("answer")
        for number, answer in enumerate(answers)
    ]
    if len(words) != 1:
        raise MalformedRowError(
            given.where, f"field 'answers': wanted exactly one answer; got {len(words)}", "answers: wanted exactly one"
        )
    official_id = str(row.integer("question_id"))
    # By name: the order of the keys is not the same in the documentation and in the files.
    rotation = given.named_numbers("rotation", ("_x", "_y", "_z", "_w"))
    if abs(math.hypot(*rotation) - 1) > RIGID_TOLERANCE:
        raise given.error("rotation", "a unit quaternion")
    record = {
        "sample_id": f"{cls.benchmark}/{request.split}/{official_id}",
        "scene_id": scene_id,
        "task": "sqa",
        "benchmark": cls.benchmark,
        "split": request.split,
        "official_id": official_id,
        "question": question,
        "answers": words,
        "question_type": sqa3d_type(question),
        "situation": situation,
        "alternative_situations": others,
        "position_m": given.named_numbers("position", "xyz"),
        "rotation_xyzw": rotation,
        "official": {"question": dict(row.values), "annotation": dict(given.values)},
    }
    reply = reply_turn(spoken(words[0]))
    if request.variant == "default":
        turn = user_turn(request.prompts, "sqa", situation=situation, question=question)
        return [{**record, "messages": [turn, reply]}]
    return [
        {
            **record,
            "sample_id": f"{record['sample_id']}#{number}",
            "situation": text,
            "alternative_situations": [],
            "messages": [user_turn(request.prompts, "sqa", situation=text, question=question), reply],
        }
        for number, text in enumerate([situation, *others])
    ]


__all__ = ["SQA3DBuilder"]
