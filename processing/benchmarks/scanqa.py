"""ScanQA: questions about a scene. Texts, ids and boxes `(M, 6)` of the objects that an answer is about."""

from pathlib import Path
from typing import ClassVar

from vidllm.processing.benchmarks.builder import BenchmarkBuilder, BenchmarkContent, BenchmarkRequest, UniqueIds, fill
from vidllm.processing.benchmarks.files import AnnotatedRow, list_of, parse_json
from vidllm.processing.benchmarks.prompts import reply_turn, spoken, user_turn
from vidllm.processing.benchmarks.question_types import scanqa_type


class ScanQABuilder(BenchmarkBuilder):
    """`ScanQA_v1.0_{split}.json`. Variant `per_answer`: one row per answer, `<id>#<number>`.

    Source:
        Upstream: ATR-DBI/ScanQA@0a9f162 (format). Published sizes: the paper.
    """

    benchmark: ClassVar[str] = "scanqa"
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test_w_obj", "test_wo_obj")
    variants: ClassVar[tuple[str, ...]] = ("default", "per_answer")
    published_rows: ClassVar[dict[str, int]] = {"train": 25563, "val": 4675, "test_w_obj": 4976, "test_wo_obj": 6149}
    published_scenes: ClassVar[dict[str, int]] = {"train": 562, "val": 71, "test_w_obj": 70, "test_wo_obj": 97}

    @classmethod
    def file_names(cls, split: str) -> list[str]:
        """One file."""
        return [f"ScanQA_v1.0_{split}.json"]

    @classmethod
    def read(cls, request: BenchmarkRequest, files: list[tuple[Path, bytes]], content: BenchmarkContent) -> None:
        """Answers are absent in test files, and objects may be."""
        path, raw = files[0]
        rows = list_of(path, parse_json(path, raw))
        content.num_official_rows = len(rows)
        is_test = request.split.startswith("test")
        unique = UniqueIds()

        def convert(row: AnnotatedRow) -> list[dict]:
            official_id, question = row.text("question_id"), row.text("question")
            answers = row.texts("answers", [] if is_test else _required(row, "answers"))
            record = {
                "sample_id": f"{cls.benchmark}/{request.split}/{official_id}",
                "scene_id": row.scene(),
                "task": "qa",
                "benchmark": cls.benchmark,
                "split": request.split,
                "official_id": official_id,
                "question": question,
                "answers": answers,
                "object_ids": row.integers("object_ids", [] if is_test else _required(row, "object_ids")),
                "object_names": row.texts("object_names", []),
                "question_type": scanqa_type(question),
                "official": dict(row.values),
            }
            unique.add(row, "question_id", official_id)
            prompt = user_turn(request.prompts, "qa", question=question)
            spoken_answers = [spoken(answer) for answer in answers if answer.strip()]
            if answers and not spoken_answers:
                raise row.error("answers", "an answer that is not blank")
            if request.variant == "default":
                reply = [reply_turn(spoken_answers[0])] if spoken_answers else []
                return [{**record, "messages": [prompt, *reply]}]
            if not spoken_answers:
                raise row.error("answers", "answers, for one row per answer")
            return [
                {**record, "sample_id": f"{record['sample_id']}#{number}", "messages": [prompt, reply_turn(answer)]}
                for number, answer in enumerate(spoken_answers)
            ]

        fill(content, request, ((path, number, values) for number, values in enumerate(rows)), convert)


def _required(row: AnnotatedRow, name: str) -> list:
    """The default of a field that must be there: an error."""
    if row.values.get(name) is None:
        raise row.error(name, "a list")
    return []


__all__ = ["ScanQABuilder"]
