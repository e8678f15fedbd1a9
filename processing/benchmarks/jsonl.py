"""People's own videos: one JSON object per line. Boxes `(M, 6)`, points `(P, 3)`.

| field | meaning |
|---|---|
| `video` | path of a video, or of a folder with frames, relative to the file's folder. Required |
| `messages` | turns `{"role": "user" / "assistant" / "system", "content": text or blocks}`. Required. Blocks: `{"type": "text", "text"}`, `{"type": "point"}` in a user's turn, `{"type": "box"}` in an assistant's. The video needs no block |
| `id` | text or number, unique; by default the line's number |
| `scene` | name of the scene; by default the video's path |
| `task` | `chat` (default), `qa`, `sqa`, `ground`, `caption` |
| `answers` | other accepted replies, for scoring |
| `boxes` | the boxes `[cx, cy, cz, dx, dy, dz]` that the box block stands for; of several box blocks a list per block; metres |
| `box_frame` | `annotation` (default), `world` or `room` |
| `points` | the places `[x, y, z]` of the point blocks, in order; metres |
| `point_frame` | `world` (default), `annotation` or `room` |
| `poses` | `cameras.json`, TUM trajectory or COLMAP text folder, relative to the file's folder |
| `room_from_world` | 3x3 rotation to z up and axes along the walls; needed for `room`, and for boxes in `world` |

Frames: `world` is the camera of the video's first frame; `room` shares its origin; `annotation` is the frame of the poses, which must then have z up and
axes along the walls (of a scene in one of ScanNet's layouts: its aligned frame). A box's edges lie along the axes of `annotation`, or of `room`.
"""

from pathlib import Path
from typing import ClassVar

import numpy as np

from vidllm.processing.benchmarks.builder import BenchmarkBuilder, BenchmarkContent, BenchmarkRequest, UniqueIds, fill
from vidllm.processing.benchmarks.files import AnnotatedRow, MalformedRowError, find_annotation_file, parse_json_lines
from vidllm.processing.samples import ROLES, TASKS, Sample
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


FIELDS = (
    "video", "messages", "id", "scene", "task", "answers", "boxes", "box_frame", "points", "point_frame", "poses",
    "room_from_world",
)  # fmt: skip
FRAMES = ("annotation", "world", "room")


class JsonlBuilder(BenchmarkBuilder):
    """`<split>.jsonl` of a folder (or of its `annotations` folder), or any file by its path; see the module's text for the fields.

    Source:
        Ours.
    """

    benchmark: ClassVar[str] = "jsonl"
    uses_scans: ClassVar[bool] = False

    @classmethod
    def annotation_files(cls, data_root: str, split: str) -> list[Path]:
        """The file itself, or that of the split."""
        root = Path(data_root).expanduser()
        if root.is_file():
            return [root]
        if not root.is_dir():
            raise VidLLMMissingFileError(f"{root}: no such file or folder; wanted a .jsonl file or a folder with one")
        if (root / f"{split}.jsonl").is_file():
            return [root / f"{split}.jsonl"]
        return [find_annotation_file(root, f"{split}.jsonl")]

    @classmethod
    def read(cls, request: BenchmarkRequest, files: list[tuple[Path, bytes]], content: BenchmarkContent) -> None:
        """One row per line."""
        path, raw = files[0]
        rows = parse_json_lines(path, raw)
        content.num_official_rows = len(rows)
        unique = UniqueIds()

        def convert(row: AnnotatedRow) -> list[dict]:
            record = _record(row, request)
            unique.add(row, "id", record["official_id"])
            record["sample_id"] = f"{cls.benchmark}/{request.split}/{record['official_id']}"
            record |= {"benchmark": cls.benchmark, "split": request.split}
            try:
                Sample.from_row(record)
            except VidLLMInputError as error:
                raise MalformedRowError(row.where, str(error), "not a valid sample") from None
            return [record]

        fill(content, request, ((path, number, values) for number, values in rows), convert, "line")


def _record(row: AnnotatedRow, request: BenchmarkRequest) -> dict:
    """What one line says."""
    unknown = sorted(set(row.values) - set(FIELDS))
    if unknown:
        raise row.error(unknown[0], f"fields among {', '.join(FIELDS)}")
    official_id = row.get(
        "id",
        "a text or a whole number",
        lambda v: isinstance(v, str | int) and not isinstance(v, bool) and v != "",
        row.number,
    )
    video = _path(row, "video", request)
    task = row.get("task", f"one of {', '.join(TASKS)}", lambda value: value in TASKS, "chat")
    rotation = _rotation(row)
    box_frame, boxes, blocks = _boxes(row)
    points = row.boxes("points", sides=3)
    point_frame = row.get("point_frame", f"one of {', '.join(FRAMES)}", lambda value: value in FRAMES, "world")
    messages = _messages(row)
    num_blocks = sum(block["type"] == "box" for turn in messages for block in turn["content"])
    num_points = sum(block["type"] == "point" for turn in messages for block in turn["content"])
    if num_points != len(points or []):
        raise row.error("points", f"{num_points} points, one per point block of the messages", points)
    if boxes and max(blocks) >= num_blocks:
        raise row.error("boxes", f"boxes for the {num_blocks} box blocks of the messages", row.values["boxes"])
    if rotation is None and (point_frame == "room" or (boxes and box_frame != "annotation")):
        raise row.error("room_from_world", "a rotation, for boxes or points that are not in the annotation frame")
    if point_frame == "room" and points:
        # p_room = R p_world, so p_world = R^T p_room; as rows: p_room R
        points, point_frame = (np.array(points) @ rotation).tolist(), "world"
    if point_frame == "room":
        point_frame = "world"
    annotation_from_world = None
    if boxes and box_frame != "annotation":
        annotation_from_world = np.eye(4)
        annotation_from_world[:3, :3] = rotation
        if point_frame == "annotation" and points:
            raise row.error("point_frame", f"world or room where boxes are in {box_frame}")
        if box_frame == "world":
            boxes = [[*(rotation @ np.array(box[:3])).tolist(), *box[3:]] for box in boxes]
    if boxes and min(side for box in boxes for side in box[3:]) < 0:
        raise row.error("boxes", "edge lengths from 0", row.values["boxes"])
    answers = row.texts("answers", [])
    users = [
        block["text"] for turn in messages if turn["role"] == "user" for block in turn["content"] if "text" in block
    ]
    return {
        "official_id": str(official_id),
        "scene_id": row.text("scene", Path(video).with_suffix("").as_posix().replace("/", "_").lstrip(".") or video),
        "task": task,
        "messages": messages,
        "question": users[-1] if users else "",
        "answers": answers,
        "references": answers if task == "caption" else [],
        "boxes_annotation": boxes,
        "box_block": blocks,
        "points": points if num_points else None,
        "point_frame": point_frame,
        "video": video,
        "poses": _path(row, "poses", request) if row.values.get("poses") is not None else None,
        "annotation_from_world": None if annotation_from_world is None else annotation_from_world.tolist(),
        "data_root": str(_folder(request)),
        "official": dict(row.values),
    }


def _folder(request: BenchmarkRequest) -> Path:
    """Folder that paths are relative to."""
    root = Path(request.data_root)
    return root.parent if root.is_file() else root


def _path(row: AnnotatedRow, field: str, request: BenchmarkRequest) -> str:
    """A path that exists."""
    given = row.text(field)
    if not (_folder(request) / Path(given).expanduser()).exists():
        raise row.error(field, f"a path that exists (below {_folder(request)})")
    return given


def _rotation(row: AnnotatedRow) -> np.ndarray | None:
    """`room_from_world`, (3, 3)."""
    rows = row.boxes("room_from_world", sides=3)
    if rows is None:
        return None
    matrix = np.array(rows)
    ok = matrix.shape == (3, 3) and np.abs(matrix @ matrix.T - np.eye(3)).max() < 1e-3 and np.linalg.det(matrix) > 0
    if not ok:
        raise row.error("room_from_world", "a 3x3 rotation")
    return matrix


def _boxes(row: AnnotatedRow) -> tuple[str, list[list[float]] | None, list[int]]:
    """Frame, boxes, and the box block of each."""
    frame = row.get("box_frame", f"one of {', '.join(FRAMES)}", lambda value: value in FRAMES, "annotation")
    value = row.values.get("boxes")
    if value is None:
        return frame, None, []
    nested = (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(group, list) and all(isinstance(box, list) for box in group) for group in value)
    )
    if not nested:
        boxes = row.boxes("boxes")
        return frame, boxes, [0] * len(boxes)
    boxes, blocks = [], []
    for number, group in enumerate(value):
        boxes += AnnotatedRow(row.path, row.number, {"boxes": group}, "line").boxes("boxes")
        blocks += [number] * len(group)
    return frame, boxes, blocks


def _messages(row: AnnotatedRow) -> list[dict]:
    """Turns with content blocks, the video first in the first user's turn."""
    turns = row.get("messages", "a list of turns", lambda value: isinstance(value, list) and bool(value))
    messages, has_video = [], False
    for number, given in enumerate(turns):
        turn = AnnotatedRow(row.path, number, given, f"{row.name}, messages")
        role = turn.get("role", f"one of {', '.join(ROLES)}", lambda value: value in ROLES)
        content = turn.get("content", "a text or a list of blocks", lambda value: isinstance(value, str | list))
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        clean = []
        for position, given_block in enumerate(blocks):
            block = AnnotatedRow(row.path, position, given_block, f"{turn.name}, content")
            kind = block.get(
                "type", "text, video, point or box", lambda value: value in ("text", "video", "point", "box")
            )
            clean.append({"type": kind, "text": block.text("text")} if kind == "text" else {"type": kind})
        if role == "user" and not has_video:
            clean = [{"type": "video"}, *[block for block in clean if block["type"] != "video"]]
            has_video = True
        messages.append({"role": role, "content": clean})
    return messages


__all__ = ["FIELDS", "JsonlBuilder"]
