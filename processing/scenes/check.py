"""What a data root holds and what it lacks, per benchmark and split.

Shapes: none; files and counts only.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vidllm.processing.scenes.annotations import read_json
from vidllm.processing.scenes.cameras import SCAN_FOLDERS
from vidllm.processing.scenes.labels import LABEL_FILE, find_label_tsv, read_label_map
from vidllm.processing.scenes.open import LAYOUTS, find_scenes
from vidllm.processing.scenes.sens import SensReader
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


ANNOTATIONS = "annotations"
HASH_CHUNK = 1 << 20
DEFAULT_NUM_FRAMES = 32
MAX_NAMED = 10
# One scan's files that boxes are made of.
SCAN_FILES = ("{}_vh_clean_2.ply", "{}_vh_clean_2.0.010000.segs.json", "{}.aggregation.json", "{}.txt")


@dataclass(frozen=True)
class _Split:
    """Files of one split of a benchmark, and the sizes that its authors or others published."""

    files: tuple[str, ...]
    num_rows: tuple[int, ...]
    num_scenes: int | None = None
    num_objects: int | None = None
    needs_boxes: bool = False


# Hints, not rules: the copies in circulation differ, and rooms of one's own have other sizes.
BENCHMARKS: dict[str, dict[str, _Split]] = {
    "scanqa": {
        "train": _Split(("ScanQA_v1.0_train.json",), (25563,), 562),
        "val": _Split(("ScanQA_v1.0_val.json",), (4675,), 71),
        "test_w_obj": _Split(("ScanQA_v1.0_test_w_obj.json",), (4976,), 70),
        "test_wo_obj": _Split(("ScanQA_v1.0_test_wo_obj.json",), (6149,), 97),
    },
    "sqa3d": {
        split: _Split(
            (f"v1_balanced_questions_{split}_scannetv2.json", f"v1_balanced_sqa_annotations_{split}_scannetv2.json"),
            rows,
            scenes,
        )
        for split, rows, scenes in (("train", (26623,), None), ("val", (3261,), None), ("test", (3519,), 67))
    },
    "scanrefer": {
        "train": _Split(("ScanRefer_filtered_train.json",), (36665,), 562, 7875, True),
        "val": _Split(("ScanRefer_filtered_val.json",), (9508, 9510), 141, 2068, True),
        "test": _Split(("ScanRefer_filtered_test.json",), (5410,), 97, 1103),
    },
    # Scan2Cap has no files of its own: one row per described object of ScanRefer.
    "scan2cap": {
        "train": _Split(("ScanRefer_filtered_train.json",), (36665,), 562, 7875, True),
        "val": _Split(("ScanRefer_filtered_val.json",), (9508, 9510), 141, 2068, True),
    },
}


@dataclass
class SplitReport:
    """State of one split.

    Args:
        files (`dict[str, dict]`): Per file `path`, and if it is there `num_bytes` and `sha256` (None if not asked for); else None.
        num_rows, num_scenes, num_objects (`int`, *optional*): What the files hold; None if they are missing or cannot be read.
        published_rows (`list[int]`): Sizes in circulation.
        published_scenes, published_objects (`int`, *optional*): Likewise.
        scenes_without_frames, scenes_without_scan (`list[str]`): Scenes of the split that the data root lacks; the second only where
            boxes are needed.
        problems (`list[str]`): What is wrong with the files.
        ready (`bool`): Files read, all frames and scans there.

    Source:
        Ours.
    """

    files: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    num_rows: int | None = None
    num_scenes: int | None = None
    num_objects: int | None = None
    published_rows: list[int] = field(default_factory=list)
    published_scenes: int | None = None
    published_objects: int | None = None
    scenes_without_frames: list[str] = field(default_factory=list)
    scenes_without_scan: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    ready: bool = False

    @property
    def is_present(self) -> bool:
        """Whether all annotation files are there."""
        return all(entry is not None for entry in self.files.values())


@dataclass
class DataReport:
    """State of a data root.

    Args:
        data_root (`str`): The folder.
        scenes (`dict[str, int]`): Scenes per layout (a scene may be there in several).
        num_scenes (`int`): Different scenes with frames.
        num_scans (`int`): Scans with all files that boxes are made of.
        label_table (`str`, *optional*): Path of ScanNet's label table.
        benchmarks (`dict[str, dict[str, SplitReport]]`): By benchmark and split.
        free_bytes (`int`): Free space on the disk.
        sens_bytes (`int`): Size of all `.sens` files.
        extraction_bytes (`int`): About what 32 frames of every scene that is there as `.sens` only will take.
        problems (`list[str]`): What concerns no split.

    Source:
        Ours.
    """

    data_root: str
    scenes: dict[str, int]
    num_scenes: int
    num_scans: int
    label_table: str | None
    benchmarks: dict[str, dict[str, SplitReport]]
    free_bytes: int
    sens_bytes: int
    extraction_bytes: int
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as text, one fact per line."""
        held = ", ".join(f"{count} {layout}" for layout, count in self.scenes.items() if count)
        text = [
            f"data root {self.data_root}",
            f"scenes with frames: {self.num_scenes}" + (f" ({held})" if held else ""),
            f"scans with meshes and objects: {self.num_scans}",
            f"label table: {self.label_table or f'missing ({LABEL_FILE}; wanted for unique and multiple)'}",
            f"disk: {_size(self.free_bytes)} free"
            + (f"; .sens files {_size(self.sens_bytes)}" if self.sens_bytes else "")
            + (
                f"; {DEFAULT_NUM_FRAMES} extracted frames of scenes without any: about {_size(self.extraction_bytes)}"
                if self.extraction_bytes
                else ""
            ),
        ]
        for benchmark, splits in self.benchmarks.items():
            for split, report in splits.items():
                text += [f"{benchmark} {split}: {line}" for line in _split_lines(report)]
        return text + self.problems


def check_data_root(
    data_root: str | Path, sha256: bool = True, progress: Callable[[str], None] | None = None
) -> DataReport:
    """Look through a data root. Nothing is written, no frame is decoded.

    Args:
        data_root (`str` or `Path`): The folder.
        sha256 (`bool`): Whether to hash the annotation files.
        progress (callable, *optional*): Called with a few words before each step.

    Returns:
        `DataReport`: what is missing or malformed is in it; published sizes are hints.

    Raises:
        VidLLMInputError: There is no such folder.

    Source:
        Ours.
    """
    root = Path(data_root).expanduser()
    say = progress or (lambda step: None)
    say("scenes")
    scenes = find_scenes(root)
    per_layout = {layout: sum(layout in found for found in scenes.values()) for layout in LAYOUTS}
    only_sens = [scene for scene, found in scenes.items() if found == ["sens"]]
    sens_files = {scene: path for scene in scenes if (path := LAYOUTS["sens"].find(root, scene)) is not None}
    say("scans")
    scans = _whole_scans(root)
    problems: list[str] = []
    label_table = find_label_tsv(root)
    if label_table is not None:
        try:
            read_label_map(label_table)
        except VidLLMInputError as error:
            problems.append(str(error))
    known: dict[str, tuple[dict, Any]] = {}
    benchmarks: dict[str, dict[str, SplitReport]] = {}
    for benchmark, splits in BENCHMARKS.items():
        benchmarks[benchmark] = {}
        for split, expected in splits.items():
            say(f"{benchmark} {split}")
            benchmarks[benchmark][split] = _check_split(root, benchmark, expected, scenes, scans, sha256, known)
    return DataReport(
        data_root=str(root),
        scenes=per_layout,
        num_scenes=len(scenes),
        num_scans=len(scans),
        label_table=None if label_table is None else str(label_table),
        benchmarks=benchmarks,
        free_bytes=shutil.disk_usage(root).free,
        sens_bytes=sum(path.stat().st_size for path in sens_files.values()),
        extraction_bytes=_extraction_bytes([sens_files[scene] for scene in only_sens], problems),
        problems=problems,
    )


def _whole_scans(root: Path) -> set[str]:
    """Scans that have every file that boxes are made of."""
    whole = set()
    for name in SCAN_FOLDERS:
        if (root / name).is_dir():
            for folder in (root / name).iterdir():
                if all((folder / file.format(folder.name)).is_file() for file in SCAN_FILES):
                    whole.add(folder.name)
    return whole


def _extraction_bytes(files: list[Path], problems: list[str]) -> int:
    """About what 32 frames of each recording take once extracted: the share of the recording that they are."""
    total = 0.0
    for path in files:
        try:
            num_frames = SensReader.announced_frames(path)
        except VidLLMInputError as error:
            problems.append(str(error))
            continue
        total += path.stat().st_size * min(1.0, DEFAULT_NUM_FRAMES / max(num_frames, 1))
    return round(total)


def _check_split(
    root: Path,
    benchmark: str,
    expected: _Split,
    scenes: Mapping[str, list[str]],
    scans: set[str],
    sha256: bool,
    known: dict[str, tuple[dict, Any]],
) -> SplitReport:
    """One split: its files, counts, and which of its scenes are missing."""
    report = SplitReport(
        published_rows=list(expected.num_rows),
        published_scenes=expected.num_scenes,
        published_objects=expected.num_objects,
    )
    contents = []
    for name in expected.files:
        path = root / ANNOTATIONS / name
        if name not in known:
            known[name] = _read_file(path, sha256)
        entry, content = known[name]
        report.files[name] = entry
        if isinstance(content, VidLLMInputError):
            if entry is not None:
                report.problems.append(str(content))
        else:
            contents.append((path, content))
    if len(contents) < len(expected.files):
        return report
    try:
        rows = _rows_of(benchmark, contents)
    except VidLLMInputError as error:
        report.problems.append(str(error))
        return report
    wanted = sorted({row["scene_id"] for row in rows})
    report.num_rows, report.num_scenes = len(rows), len(wanted)
    if expected.num_objects is not None:
        report.num_objects = len({(row["scene_id"], str(row.get("object_id"))) for row in rows})
    report.scenes_without_frames = [scene for scene in wanted if scene not in scenes]
    if expected.needs_boxes:
        report.scenes_without_scan = [scene for scene in wanted if scene not in scans]
    report.ready = not (report.scenes_without_frames or report.scenes_without_scan or report.problems)
    return report


def _read_file(path: Path, sha256: bool) -> tuple[dict[str, Any] | None, Any]:
    """(path, size, hash) and the parsed content, or the error that reading it gave."""
    if not path.is_file():
        return None, VidLLMMissingFileError(f"{path}: no such file")
    entry: dict[str, Any] = {"path": str(path), "num_bytes": path.stat().st_size, "sha256": None}
    if sha256:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK):
                digest.update(chunk)
        entry["sha256"] = digest.hexdigest()
    try:
        return entry, read_json(path, "annotations")
    except VidLLMInputError as error:
        return entry, error


def _rows_of(benchmark: str, contents: list[tuple[Path, Any]]) -> list[dict]:
    """Rows with a scene id, out of the files of a split."""
    path, content = contents[0]
    if benchmark == "sqa3d":
        for (file, part), key in zip(contents, ("questions", "annotations"), strict=True):
            if not isinstance(part, dict) or not isinstance(part.get(key), list):
                raise VidLLMInputError(f"{file}: wanted the key {key!r} with a list")
        content = content["questions"]
        asked = {row.get("question_id") for row in content if isinstance(row, dict)}
        answered = {row.get("question_id") for row in contents[1][1]["annotations"] if isinstance(row, dict)}
        if asked != answered:
            raise VidLLMInputError(
                f"{contents[1][0]}: wanted one annotation per question of {path.name}; {len(asked - answered)} questions have none, "
                f"{len(answered - asked)} annotations have no question"
            )
    if not isinstance(content, list):
        raise VidLLMInputError(f"{path}: wanted a list of rows; got {type(content).__name__}")
    for number, row in enumerate(content):
        if not isinstance(row, dict) or not isinstance(row.get("scene_id"), str):
            raise VidLLMInputError(f"{path}, row {number}, scene_id: wanted text; got {str(row)[:60]}")
    return content


def _split_lines(report: SplitReport) -> list[str]:
    """One split as text."""
    missing = [name for name, entry in report.files.items() if entry is None]
    if len(missing) == len(report.files):
        return [f"missing {', '.join(missing)}"]
    lines = [f"missing {name}" for name in missing] + list(report.problems)
    if report.num_rows is not None:
        hints = " or ".join(str(number) for number in report.published_rows)
        line = f"{report.num_rows} rows" + (
            "" if report.num_rows in report.published_rows else f" (published: {hints})"
        )
        line += f", {report.num_scenes} scenes"
        if report.published_scenes not in (None, report.num_scenes):
            line += f" (published: {report.published_scenes})"
        if report.num_objects is not None:
            line += f", {report.num_objects} objects"
            if report.published_objects not in (None, report.num_objects):
                line += f" (published: {report.published_objects})"
        lines.append(line + (", ready" if report.ready else ""))
    for what, scenes in (("frames", report.scenes_without_frames), ("mesh and objects", report.scenes_without_scan)):
        if scenes:
            more = f", and {len(scenes) - MAX_NAMED} more" if len(scenes) > MAX_NAMED else ""
            lines.append(f"{len(scenes)} scenes without {what}: {', '.join(scenes[:MAX_NAMED])}{more}")
    lines += [f"sha256 {entry['sha256']} {name}" for name, entry in report.files.items() if entry and entry["sha256"]]
    return lines


def _size(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
