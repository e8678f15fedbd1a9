"""Objects of a ScanNet scan: boxes on axis-aligned vertices, labels, Votenet's table.

Shapes: V vertices of the mesh, M objects.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidllm.processing.scenes.base import check_scene_id
from vidllm.processing.scenes.cameras import SCAN_FOLDERS, axis_alignment
from vidllm.processing.scenes.labels import LabelMap, find_label_tsv, read_label_map
from vidllm.processing.scenes.ply import read_ply_vertices
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


UNANNOTATED = 0
# NYU40 ids that Votenet keeps boxes of: all but wall, floor and ceiling.
VOTENET_NYU40_IDS = tuple(number for number in range(3, 41) if number != 22)


@dataclass(frozen=True, eq=False)
class SceneObjects:
    """Annotated objects of a scan that have vertices, in the order of the aggregation file.

    Args:
        scene_id (`str`): The scan.
        object_ids (`np.ndarray` of shape `(M,)`, int64): `objectId` of the aggregation file, counted from 0.
        labels (`list[str]`): Raw category names.
        nyu40_ids (`np.ndarray` of shape `(M,)`, int64): NYU40 ids; 0 where the label table does not know the name, or was not given.
        boxes_annotation (`np.ndarray` of shape `(M, 6)`, float64): `(cx, cy, cz, dx, dy, dz)`, metres, axis-aligned scene.
        num_vertices (`np.ndarray` of shape `(M,)`, int64): Vertices of each.
        vertices_annotation (`np.ndarray` of shape `(V, 3)`, float64): The mesh's vertices, metres, axis-aligned scene.
        instance_labels (`np.ndarray` of shape `(V,)`, int64): Votenet's labels: `objectId + 1`, 0 = no object.
        annotation_from_scene (`np.ndarray` of shape `(4, 4)`, float64): The alignment; the identity if the scan's file has none.
        overwritten_ids (`tuple[int, ...]`): Objects that later groups have taken all vertices from.
        problems (`tuple[str, ...]`): What was dropped or is unknown, with counts.
        source (`str`): The aggregation file.

    Source:
        Upstream: daveredrum/ScanRefer@694f7c1:data/scannet/load_scannet_data.py (Votenet's). Ours: boxes are made of aligned vertices
        always; upstream's `_aligned_bbox.npy` may hold unaligned ones.
    """

    scene_id: str
    object_ids: np.ndarray
    labels: list[str]
    nyu40_ids: np.ndarray
    boxes_annotation: np.ndarray
    num_vertices: np.ndarray
    vertices_annotation: np.ndarray
    instance_labels: np.ndarray
    annotation_from_scene: np.ndarray
    overwritten_ids: tuple[int, ...]
    problems: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.object_ids)

    def row(self, object_id: int | str) -> int:
        """Row of an object by its id (benchmarks write it as a number or as text).

        Raises:
            VidLLMInputError: No such object, or none with vertices; names the file.
        """
        try:
            number = int(object_id)
        except (TypeError, ValueError):
            raise VidLLMInputError(f"{self.source}: wanted an object id (a whole number); got {object_id!r}") from None
        found = np.flatnonzero(self.object_ids == number)
        if found.size:
            return int(found[0])
        if number in self.overwritten_ids:
            raise VidLLMInputError(
                f"{self.source}: object {number} of scene {self.scene_id} has no vertex of its own: later groups hold all of its segments"
            )
        raise VidLLMInputError(
            f"{self.source}: no object {number} in scene {self.scene_id}; its {len(self)} objects have ids "
            f"{self.object_ids.min(initial=0)}..{self.object_ids.max(initial=0)}"
        )

    def box(self, object_id: int | str) -> np.ndarray:
        """Box of an object by its id, `(6,)`, float64, annotation frame, metres."""
        return self.boxes_annotation[self.row(object_id)]

    def votenet_table(self) -> np.ndarray:
        """Votenet's rows `(cx, cy, cz, dx, dy, dz, nyu40id, objectId)`, `(rows, 8)`, float64: wall, floor, ceiling, unknown left out."""
        keep = np.isin(self.nyu40_ids, VOTENET_NYU40_IDS)
        keep = np.flatnonzero(keep)[np.argsort(self.object_ids[keep], kind="stable")]
        return np.concatenate(
            [self.boxes_annotation[keep], self.nyu40_ids[keep, None], self.object_ids[keep, None]], axis=1
        ).astype(np.float64)


def find_scan_dir(data_root: str | Path, scene_id: str) -> Path:
    """Folder `scans/<scene>` of a data root.

    Args:
        data_root (`str` or `Path`): The root.
        scene_id (`str`): The scan.

    Returns:
        `Path`

    Raises:
        VidLLMInputError: There is none (then also `FileNotFoundError`).

    Source:
        Ours.
    """
    check_scene_id(scene_id)
    folders = [Path(data_root).expanduser() / name / scene_id for name in SCAN_FOLDERS]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise VidLLMMissingFileError(f"{folders[0]}: no such folder; wanted the scan of scene {scene_id}")


def load_scene_objects(
    scan_dir: str | Path, label_tsv: str | Path | LabelMap | None = None, overlap: str = "later"
) -> SceneObjects:
    """Boxes and labels of a scan.

    Args:
        scan_dir (`str` or `Path`): `scans/<scene>` with `<scene>_vh_clean_2.ply`, `<scene>_vh_clean_2.0.010000.segs.json`,
            `<scene>.aggregation.json` and, for the alignment, `<scene>.txt`.
        label_tsv (`str`, `Path` or `LabelMap`, *optional*): ScanNet's label table; by default that of the data root that `scan_dir` lies in,
            if it has one.
        overlap (`str`): Whose a segment is that several groups name: `later` (the last group's, as in Votenet's pipeline and so in
            ScanRefer's), or `own` (each one's).

    Returns:
        `SceneObjects`

    Raises:
        VidLLMInputError: A file is missing (then also `FileNotFoundError`) or malformed; names file, row and field.

    Source:
        Upstream: daveredrum/ScanRefer@694f7c1:data/scannet/load_scannet_data.py. Ours: float64, aligned, `own`.
    """
    if overlap not in ("later", "own"):
        raise VidLLMInputError(f"overlap: wanted later or own; got {overlap!r}")
    folder = Path(scan_dir).expanduser()
    scene_id = folder.name
    mesh_file = folder / f"{scene_id}_vh_clean_2.ply"
    segments_file = folder / f"{scene_id}_vh_clean_2.0.010000.segs.json"
    aggregation_file = folder / f"{scene_id}.aggregation.json"
    info_file = folder / f"{scene_id}.txt"
    vertices = read_ply_vertices(mesh_file).astype(np.float64)
    segment_of_vertex = _read_segments(segments_file, len(vertices))
    problems: list[str] = []
    groups = _read_groups(aggregation_file, problems)
    alignment = np.eye(4)
    if info_file.is_file():
        alignment = axis_alignment(info_file)
    else:
        problems.append(f"{info_file}: no such file; the axis alignment is taken as the identity")
    vertices = vertices @ alignment[:3, :3].T + alignment[:3, 3]
    label_map = _label_map(label_tsv, folder)

    segments, compact = np.unique(segment_of_vertex, return_inverse=True)
    rows_of_groups = [_segment_rows(group, segments, aggregation_file, segments_file) for group in groups]
    owner = np.full(len(segments), -1)
    for number, rows in enumerate(rows_of_groups):
        owner[rows] = number
    low, high, count = _segment_bounds(vertices, compact, len(segments))

    kept, boxes, num_vertices, overwritten = [], [], [], []
    for number, rows in enumerate(rows_of_groups):
        mine = rows[owner[rows] == number] if overlap == "later" else rows
        if not mine.size:
            overwritten.append(groups[number]["objectId"])
            continue
        lowest, highest = low[mine].min(axis=0), high[mine].max(axis=0)
        kept.append(number)
        boxes.append(np.concatenate([(lowest + highest) / 2, highest - lowest]))
        num_vertices.append(int(count[mine].sum()))
    if overwritten:
        problems.append(
            f"{aggregation_file}: {len(overwritten)} of {len(groups)} objects have no segment of their own (first: object {overwritten[0]})"
        )
    labels = [groups[number]["label"] for number in kept]
    nyu40_ids = [UNANNOTATED if label_map is None else label_map.nyu40_ids.get(name, UNANNOTATED) for name in labels]
    unknown = [name for name, number in zip(labels, nyu40_ids, strict=True) if number == UNANNOTATED]
    if label_map is not None and unknown:
        problems.append(
            f"{aggregation_file}: {len(unknown)} labels are not in {label_map.source} (first: {unknown[0]!r})"
        )
    object_of_group = np.array([group["objectId"] for group in groups] + [-1], dtype=np.int64)
    return SceneObjects(
        scene_id=scene_id,
        object_ids=object_of_group[kept] if kept else np.zeros(0, dtype=np.int64),
        labels=labels,
        nyu40_ids=np.array(nyu40_ids, dtype=np.int64),
        boxes_annotation=np.array(boxes, dtype=np.float64).reshape(-1, 6),
        num_vertices=np.array(num_vertices, dtype=np.int64),
        vertices_annotation=vertices,
        instance_labels=object_of_group[owner][compact] + 1,
        annotation_from_scene=alignment,
        overwritten_ids=tuple(overwritten),
        problems=tuple(problems),
        source=str(aggregation_file),
    )


def read_json(path: str | Path, wanted: str = "JSON") -> Any:
    """Parse a JSON file.

    Args:
        path (`str` or `Path`): The file.
        wanted (`str`): What it should hold, for messages.

    Returns:
        What the file says.

    Raises:
        VidLLMInputError: Missing (then also `FileNotFoundError`), unreadable, or not JSON; names line and column.

    Source:
        Ours.
    """
    path = Path(path)
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise VidLLMMissingFileError(f"{path}: no such file; wanted {wanted}") from None
    except json.JSONDecodeError as error:
        raise VidLLMInputError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise VidLLMInputError(f"{path}: cannot be read as {wanted} ({str(error)[:80]})") from None


def _read_segments(path: Path, num_vertices: int) -> np.ndarray:
    """`segIndices` of a segs.json, (V,)."""
    content = read_json(path, "segments of the mesh")
    values = content.get("segIndices") if isinstance(content, Mapping) else None
    if not isinstance(values, list):
        raise VidLLMInputError(f"{path}: wanted the key 'segIndices' with a list; got {_shown(content)}")
    bad = next(
        (row for row, value in enumerate(values) if not isinstance(value, int) or isinstance(value, bool)), None
    )
    if bad is not None:
        raise VidLLMInputError(f"{path}, segIndices, entry {bad}: wanted a whole number; got {values[bad]!r:.40}")
    if len(values) != num_vertices:
        raise VidLLMInputError(
            f"{path}, segIndices: wanted one entry per vertex of the mesh ({num_vertices}); got {len(values)}"
        )
    return np.array(values, dtype=np.int64)


def _read_groups(path: Path, problems: list[str]) -> list[dict]:
    """`segGroups` of an aggregation file, checked; a group that is there twice word for word counts once."""
    content = read_json(path, "objects of the scan (test scans have none)")
    groups = content.get("segGroups") if isinstance(content, Mapping) else None
    if not isinstance(groups, list):
        raise VidLLMInputError(f"{path}: wanted the key 'segGroups' with a list; got {_shown(content)}")
    kinds = {"objectId": (int, "a whole number"), "segments": (list, "a list"), "label": (str, "text")}
    by_id: dict[int, dict] = {}
    for row, group in enumerate(groups):
        for key, (kind, words) in kinds.items():
            if not isinstance(group, Mapping) or key not in group:
                raise VidLLMInputError(f"{path}, segGroups, entry {row}: wanted the key {key!r}; got {_shown(group)}")
            if not isinstance(group[key], kind) or isinstance(group[key], bool):
                raise VidLLMInputError(
                    f"{path}, segGroups, entry {row}, {key}: wanted {words}; got {group[key]!r:.40}"
                )
        bad = next(
            (value for value in group["segments"] if not isinstance(value, int) or isinstance(value, bool)), None
        )
        if bad is not None or group["objectId"] < 0:
            key, value = ("segments", bad) if bad is not None else ("objectId", group["objectId"])
            raise VidLLMInputError(
                f"{path}, segGroups, entry {row}, {key}: wanted whole numbers from 0; got {value!r:.40}"
            )
        known = by_id.setdefault(group["objectId"], group)
        if known is not group:
            if known["label"] != group["label"] or set(known["segments"]) != set(group["segments"]):
                raise VidLLMInputError(
                    f"{path}, segGroups, entry {row}, objectId: wanted each id once; got {group['objectId']} for two different objects"
                )
            problems.append(f"{path}: object {group['objectId']} is there twice, word for word; it counts once")
    return list(by_id.values())


def _segment_rows(group: dict, segments: np.ndarray, path: Path, segments_file: Path) -> np.ndarray:
    """Rows of a group's segments in the sorted segment ids."""
    wanted = np.unique(np.array(group["segments"], dtype=np.int64))
    rows = np.searchsorted(segments, wanted)
    missing = np.flatnonzero(segments[np.minimum(rows, len(segments) - 1)] != wanted) if wanted.size else rows
    if missing.size:
        raise VidLLMInputError(
            f"{path}, object {group['objectId']}, segments: segment {wanted[missing[0]]} is not in {segments_file.name}"
        )
    return rows


def _segment_bounds(vertices: np.ndarray, compact: np.ndarray, num_segments: int) -> tuple[np.ndarray, ...]:
    """Lowest and highest corner (segments, 3) and number of vertices (segments,) of every segment."""
    order = np.argsort(compact, kind="stable")
    count = np.bincount(compact, minlength=num_segments)
    starts = np.concatenate([[0], np.cumsum(count)[:-1]])
    return (
        np.minimum.reduceat(vertices[order], starts, axis=0),
        np.maximum.reduceat(vertices[order], starts, axis=0),
        count,
    )


def _label_map(label_tsv: str | Path | LabelMap | None, scan_dir: Path) -> LabelMap | None:
    """The label table given, or that of the data root around a scan's folder, or None."""
    if isinstance(label_tsv, LabelMap):
        return label_tsv
    if label_tsv is None:
        label_tsv = find_label_tsv(scan_dir.parent.parent) or find_label_tsv(scan_dir.parent)
    return None if label_tsv is None else read_label_map(label_tsv)


def _shown(value: Any) -> str:
    """A JSON value for a message: keys of an object, else its type."""
    return f"the keys {sorted(value)[:8]}" if isinstance(value, Mapping) else type(value).__name__
