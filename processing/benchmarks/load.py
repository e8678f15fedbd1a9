"""`load_benchmark`: a benchmark's split as a `datasets` data set, with a report of what is in it and what is not.

Shapes: none; see `FEATURES` for the columns.
"""

import difflib
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from vidllm.processing import samples
from vidllm.processing.benchmarks.builder import (
    BenchmarkBuilder,
    BenchmarkContent,
    BenchmarkRequest,
    BoxesOfScans,
    complete_record,
    find_scan,
    forget_contents,
    read_content,
    scans_state,
)
from vidllm.processing.benchmarks.files import sha256_of
from vidllm.processing.benchmarks.jsonl import JsonlBuilder
from vidllm.processing.benchmarks.prompts import DEFAULT_STYLE, prompt_style
from vidllm.processing.benchmarks.scan2cap import Scan2CapBuilder
from vidllm.processing.benchmarks.scanqa import ScanQABuilder
from vidllm.processing.benchmarks.scanrefer import ScanReferBuilder
from vidllm.processing.benchmarks.sqa3d import SQA3DBuilder
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


BENCHMARKS: dict[str, type[BenchmarkBuilder]] = {
    builder.benchmark: builder
    for builder in (ScanQABuilder, SQA3DBuilder, ScanReferBuilder, Scan2CapBuilder, JsonlBuilder)
}


@dataclass(frozen=True)
class BenchmarkReport:
    """What a split holds, and what was left out.

    Args:
        benchmark (`str`): Which.
        split (`str`): Which split.
        variant (`str`): Which rows are made of the file's.
        sha256 (`dict[str, str]`): Of each file that was read, by path.
        num_official_rows (`int`): Rows of the main file.
        num_rows (`int`): Rows of the data set.
        num_scenes (`int`): Distinct scenes among them.
        num_scenes_without_scan (`int`): Scenes of them whose scan's files are absent, so that their rows have no boxes.
        num_rows_without_boxes (`int`): Rows that name objects but have no boxes.
        num_skipped (`int`): Malformed rows that were left out.
        skipped (`tuple[str, ...]`): One line per reason, with the first rows.
        question_types (`dict[str, int]`): Rows per kind of question.
        published_rows (`int`, *optional*): Rows by the authors' publication.
        published_scenes (`int`, *optional*): Scenes by the authors' publication.
        notes (`tuple[str, ...]`): What else is missing.

    Source:
        Ours: annotation files change in silence, so their content is recorded.
    """

    benchmark: str
    split: str
    variant: str
    sha256: dict[str, str]
    num_official_rows: int
    num_rows: int
    num_scenes: int
    num_scenes_without_scan: int
    num_rows_without_boxes: int
    num_skipped: int
    skipped: tuple[str, ...]
    question_types: dict[str, int]
    published_rows: int | None
    published_scenes: int | None
    notes: tuple[str, ...]

    def summary(self) -> list[str]:
        """Lines for a person."""
        published = "" if self.published_rows is None else f" (published: {self.published_rows})"
        scenes = "" if self.published_scenes is None else f" (published: {self.published_scenes})"
        lines = [f"{self.benchmark} {self.split}: {self.num_rows} rows{published}, {self.num_scenes} scenes{scenes}"]
        if self.question_types:
            lines.append("types: " + ", ".join(f"{kind} {count}" for kind, count in self.question_types.items()))
        if self.num_rows_without_boxes:
            lines.append(
                f"{self.num_rows_without_boxes} rows without boxes; the scans of {self.num_scenes_without_scan} scenes are absent"
            )
        lines += [*self.skipped, *self.notes]
        return lines + [f"sha256 {value}  {path}" for path, value in self.sha256.items()]


def load_benchmark(
    name: str,
    data_root: str | Path,
    split: str,
    streaming: bool = False,
    num_proc: int | None = None,
    variant: str = "default",
    prompts: str = DEFAULT_STYLE,
    strict: bool = True,
    cache_dir: str | Path | None = None,
    with_report: bool = False,
) -> Any:
    """Load a split of a benchmark from the files that its authors distribute.

    Args:
        name (`str`): One of `BENCHMARKS`: scanqa, sqa3d, scanrefer, scan2cap, jsonl.
        data_root (`str` or `Path`): Folder with `annotations/` and, for boxes, `scans/`. Of `jsonl`: the file, or its folder.
        split (`str`): As distributed (of ScanQA train, val, test_w_obj, test_wo_obj).
        streaming (`bool`): Whether to make rows when they are asked for instead of writing a cache.
        num_proc (`int`, *optional*): Processes that write the cache.
        variant (`str`): Which rows: `default`; for training `per_answer` (scanqa), `all_situations` (sqa3d), `per_description` (scan2cap).
        prompts (`str`): Name of the prompts, one of `STYLES`.
        strict (`bool`): False skips malformed rows and counts them; else the first is an error.
        cache_dir (`str` or `Path`, *optional*): Where the cache lies; by default where `datasets` keeps it.
        with_report (`bool`): Whether to return the report too.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` with `streaming`; with `with_report` a tuple of it and a `BenchmarkReport`. Rows
        become samples by `Sample.from_row`.

    Raises:
        VidLLMInputError: Unknown name, split, variant or prompts; a file that is absent or malformed (file, row and field are named).

    Source:
        Upstream: huggingface/datasets builders. Ours: the cache is named after the contents of all that rows depend on.
    """
    builder_class, request = _request(name, data_root, split, variant, prompts, strict)
    content = read_content(builder_class, request)
    report = _report(builder_class, request, content)
    if report.num_skipped or report.num_rows_without_boxes:
        warnings.warn("; ".join(report.summary()[: -len(report.sha256)]), stacklevel=2)
    scene_ids = [record["scene_id"] for record in content.records if record.get("object_ids")]
    state = scans_state(request.data_root, scene_ids) if builder_class.uses_scans else ""
    builder = builder_class(
        cache_dir=None if cache_dir is None else str(cache_dir),
        data_root=request.data_root,
        split=split,
        variant=variant,
        prompts=prompts,
        strict=strict,
        files_sha256=content.sha256_of_all,
        fingerprint=sha256_of(f"{content.sha256_of_all} {state} {_code_state()}".encode()),
        num_rows=len(content.records),
    )
    if streaming:
        dataset = builder.as_streaming_dataset(split=split)
    else:
        try:
            builder.download_and_prepare(num_proc=num_proc)
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, VidLLMInputError):
                raise error.__cause__ from None
            # Another process's error arrives without its cause; the row that it stopped at stops here too.
            for record, where in zip(content.records, content.row_of_record, strict=True):
                complete_record(record, BoxesOfScans(request.data_root), where)
            raise
        finally:
            forget_contents()
        dataset = builder.as_dataset(split=split)
    return (dataset, report) if with_report else dataset


def benchmark_report(
    name: str, data_root: str | Path, split: str, variant: str = "default", strict: bool = False
) -> BenchmarkReport:
    """What a split holds, without making a data set of it.

    Args:
        name (`str`): As of `load_benchmark`.
        data_root (`str` or `Path`): As of `load_benchmark`.
        split (`str`): As of `load_benchmark`.
        variant (`str`): As of `load_benchmark`.
        strict (`bool`): Whether a malformed row is an error; else it is counted.

    Returns:
        `BenchmarkReport`

    Raises:
        VidLLMInputError: See `load_benchmark`.

    Source:
        Ours.
    """
    builder_class, request = _request(name, data_root, split, variant, DEFAULT_STYLE, strict)
    return _report(builder_class, request, read_content(builder_class, request))


def _request(
    name: str, data_root: str | Path, split: str, variant: str, prompts: str, strict: bool
) -> tuple[type[BenchmarkBuilder], BenchmarkRequest]:
    """The builder and a checked request."""
    builder = BENCHMARKS[_checked("benchmark", name, tuple(BENCHMARKS))]
    if builder.splits:
        _checked(f"split of {name}", split, builder.splits)
    elif not split.isidentifier():
        raise VidLLMInputError(f"split: wanted a name of letters, digits and underscores; got {split!r}")
    _checked(f"variant of {name}", variant, builder.variants)
    prompt_style(prompts)
    root = Path(data_root).expanduser().absolute()
    if not root.exists():
        raise VidLLMMissingFileError(f"{root}: no such folder; wanted a data root")
    return builder, BenchmarkRequest(str(root), split, variant, prompts, strict)


def _checked(what: str, value: str, known: tuple[str, ...]) -> str:
    """A known name, or an error with the nearest one."""
    if value in known:
        return value
    near = difflib.get_close_matches(str(value), known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise VidLLMInputError(f"{what}: wanted one of {', '.join(known)}; got {value!r}{hint}")


def _report(builder: type[BenchmarkBuilder], request: BenchmarkRequest, content: BenchmarkContent) -> BenchmarkReport:
    """Count what was read."""
    with_objects = [record for record in content.records if record.get("object_ids")] if builder.uses_scans else []
    without_scan = {
        scene for scene in {r["scene_id"] for r in with_objects} if find_scan(request.data_root, scene) is None
    }
    kinds = Counter(r["question_type"] for r in content.records if r.get("question_type") is not None)
    is_default = request.variant == "default"
    return BenchmarkReport(
        benchmark=builder.benchmark,
        split=request.split,
        variant=request.variant,
        sha256=dict(content.sha256),
        num_official_rows=content.num_official_rows,
        num_rows=len(content.records),
        num_scenes=len({record["scene_id"] for record in content.records}),
        num_scenes_without_scan=len(without_scan),
        num_rows_without_boxes=sum(record["scene_id"] in without_scan for record in with_objects),
        num_skipped=content.skipped.total,
        skipped=tuple(content.skipped.summary()),
        question_types=dict(kinds.most_common()),
        published_rows=builder.published_rows.get(request.split) if is_default else None,
        published_scenes=builder.published_scenes.get(request.split),
        notes=tuple(content.notes),
    )


def _code_state() -> str:
    """Of the code that makes rows: a cache written by other code is not read."""
    files = [Path(samples.__file__), *sorted(Path(__file__).parent.glob("*.py"))]
    return sha256_of(b"".join(path.read_bytes() for path in files))


__all__ = ["BENCHMARKS", "BenchmarkReport", "benchmark_report", "load_benchmark"]
