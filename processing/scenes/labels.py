"""ScanNet's table of labels, and the two rules by which a described object counts as unique or multiple.

Shapes: none; names and numbers only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


LABEL_FILE = "scannetv2-labels.combined.tsv"
LABEL_FOLDERS = ("", "annotations", "scans", "scannet", "meta_data")
RAW_COLUMN, NYU40_ID_COLUMN, NYU40_CLASS_COLUMN = 1, 4, 7

# ScanRefer's classes by the column `nyu40class`, compared letter by letter, as its loader does.
SCANREFER_CLASSES = (
    "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture", "counter", "desk", "curtain",
    "refrigerator", "shower curtain", "toilet", "sink", "bathtub", "others",
)  # fmt: skip
OTHERS = SCANREFER_CLASSES.index("others")
# ScanNet's benchmark classes as NYU40 ids, without wall and floor where boxes are concerned.
NYU40_BENCHMARK_IDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)
NYU40_OTHER_FURNITURE = 39
RULES = ("official", "nyu40")


@dataclass(frozen=True)
class LabelMap:
    """What ScanNet's raw category names mean.

    Args:
        nyu40_ids (`dict[str, int]`): Column `nyu40id` by raw name.
        nyu40_classes (`dict[str, str]`): Column `nyu40class` by raw name.
        source (`str`): The file.

    Source:
        Upstream: ScanNet's `scannetv2-labels.combined.tsv`.
    """

    nyu40_ids: dict[str, int]
    nyu40_classes: dict[str, str]
    source: str

    def scanrefer_class(self, raw_name: str) -> int:
        """Class 0..17 by ScanRefer's own mapping; 17 (`others`) for everything else, unknown names too."""
        name = self.nyu40_classes.get(raw_name)
        return SCANREFER_CLASSES.index(name) if name in SCANREFER_CLASSES else OTHERS

    def nyu40_benchmark_id(self, raw_name: str) -> int:
        """NYU40 id if it is one of the benchmark's twenty, else 39; unknown names too."""
        number = self.nyu40_ids.get(raw_name, NYU40_OTHER_FURNITURE)
        return number if number in NYU40_BENCHMARK_IDS else NYU40_OTHER_FURNITURE


def find_label_tsv(data_root: str | Path) -> Path | None:
    """`scannetv2-labels.combined.tsv` of a data root.

    Args:
        data_root (`str` or `Path`): Itself and its folders `annotations`, `scans`, `scannet`, `meta_data` are looked into.

    Returns:
        `Path` or None.

    Source:
        Ours.
    """
    files = (Path(data_root) / folder / LABEL_FILE for folder in LABEL_FOLDERS)
    return next((file for file in files if file.is_file()), None)


def read_label_map(path: str | Path) -> LabelMap:
    """Read `scannetv2-labels.combined.tsv`; tab-separated, either kind of line end.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `LabelMap`: of a repeated raw name the last row counts, as in ScanRefer's loader.

    Raises:
        VidLLMInputError: No such file, another header, a row that is too short, an id that is no number; names row and field.

    Source:
        Upstream: daveredrum/ScanRefer@9d74830:lib/dataset.py (columns 1 and 7), 3dlg-hcvc/M3DRef-CLIP (column 4).
    """
    path = Path(path)
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise VidLLMMissingFileError(f"{path}: no such file; wanted ScanNet's {LABEL_FILE}") from None
    header = [name.strip() for name in lines[0].split("\t")] if lines else []
    wanted = {RAW_COLUMN: "raw_category", NYU40_ID_COLUMN: "nyu40id", NYU40_CLASS_COLUMN: "nyu40class"}
    for column, name in wanted.items():
        if len(header) <= column or header[column] != name:
            got = header[column] if len(header) > column else f"{len(header)} columns"
            raise VidLLMInputError(
                f"{path}, row 1: wanted {name!r} in column {column + 1} (tab-separated); got {got!r}"
            )
    ids, classes = {}, {}
    for row, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) <= NYU40_CLASS_COLUMN:
            raise VidLLMInputError(
                f"{path}, row {row}: wanted at least {NYU40_CLASS_COLUMN + 1} columns; got {len(fields)}"
            )
        raw_name, number = fields[RAW_COLUMN], fields[NYU40_ID_COLUMN].strip()
        if not number.isdecimal():
            raise VidLLMInputError(f"{path}, row {row}, nyu40id: wanted a whole number; got {number[:40]!r}")
        ids[raw_name], classes[raw_name] = int(number), fields[NYU40_CLASS_COLUMN].strip()
    return LabelMap(ids, classes, str(path))


def unique_multiple(rows: Sequence[Mapping], labels: LabelMap, rule: str = "official") -> list[str]:
    """Whether each ScanRefer row describes the only annotated object of its class in the scene.

    Objects are counted once per (scene, object), among the objects that the given rows describe: give the whole file of a split.

    Args:
        rows (`Sequence[Mapping]`): Rows with `scene_id`, `object_id`, `object_name` (with underscores).
        labels (`LabelMap`): From `read_label_map`.
        rule (`str`): `official` (ScanRefer: 18 classes by name; an object of class `others` is unique if alone) or `nyu40` (M3DRef-CLIP,
            Video-3D-LLM: 20 benchmark ids, all else 39).

    Returns:
        `list[str]`: `unique` or `multiple` per row.

    Raises:
        VidLLMInputError: Unknown rule, or a row lacks a key; names the row.

    Source:
        Upstream: daveredrum/ScanRefer@9d74830:lib/dataset.py; 3dlg-hcvc/M3DRef-CLIP:dataset/scanrefer/add_evaluation_labels.py.
    """
    if rule not in RULES:
        raise VidLLMInputError(f"unique/multiple rule: wanted {' or '.join(RULES)}; got {rule!r}")
    classify = labels.scanrefer_class if rule == "official" else labels.nyu40_benchmark_id
    keys = []
    for number, row in enumerate(rows):
        missing = [key for key in ("scene_id", "object_id", "object_name") if key not in row]
        if missing:
            raise VidLLMInputError(f"ScanRefer row {number}: wanted the key {missing[0]!r}; got {sorted(row)}")
        name = " ".join(str(row["object_name"]).split("_"))
        keys.append((row["scene_id"], str(row["object_id"]), classify(name)))
    # An object's class is that of its first row, as upstream stores it.
    first: dict[tuple, int] = {}
    for scene_id, object_id, kind in keys:
        first.setdefault((scene_id, object_id), kind)
    counts: dict[tuple, int] = {}
    for (scene_id, _), kind in first.items():
        counts[scene_id, kind] = counts.get((scene_id, kind), 0) + 1
    # As upstream: a row whose name is of another class than its object's first row finds no object of its own class.
    return ["unique" if counts.get((scene_id, kind)) == 1 else "multiple" for scene_id, _, kind in keys]
