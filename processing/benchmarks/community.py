"""Files that other works derived from the benchmarks and that people compare on: samples, answers, and proposal boxes.

Shapes: M boxes, K instance masks, V vertices.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidllm.processing.benchmarks.community_rows import box_of, conversation_of, sample_of, scene_of
from vidllm.processing.benchmarks.files import (
    AnnotatedRow,
    list_of,
    parse_json,
    parse_json_lines,
    read_annotation_bytes,
)
from vidllm.processing.samples import Sample
from vidllm.processing.scenes.cameras import axis_alignment
from vidllm.processing.scenes.ply import read_ply_vertices
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


# Video-3D-LLM takes the first 50 masks of a scene.
VIDEO3DLLM_MASKS = 50
LLAVA3D_SQA_TYPES = ("what", "is", "how", "can", "which", "others")
_TASKS = {"scanqa": "qa", "sqa3d": "sqa", "scanrefer": "ground", "scan2cap": "caption"}


@dataclass(frozen=True, eq=False)
class Proposals:
    """Candidate boxes of a scene.

    Args:
        scene_id (`str`): The scene.
        boxes_annotation (`np.ndarray` of shape `(M, 6)`, float64): `(cx, cy, cz, dx, dy, dz)`, axis-aligned scene, metres.
        ids (`np.ndarray` of shape `(M,)`, int64): Position of each in its file; masks without a vertex have no box.
        num_empty (`int`): Masks without a vertex.
        source (`str`): The file.
        labels (`tuple[str, ...]`): Name of each, where the file has names.

    Source:
        Ours.
    """

    scene_id: str
    boxes_annotation: np.ndarray
    ids: np.ndarray
    num_empty: int
    source: str
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def read_box_file(path: str | Path) -> dict[str, Proposals]:
    """Video-3D-LLM's `scannet_{train_gt,val_pred,test_pred}_box.json`: boxes by scene.

    Args:
        path (`str` or `Path`): The file: `{"scannet/<scene>": [[cx, cy, cz, w, h, l], ...]}`.

    Returns:
        `dict[str, Proposals]`: by scene, without the prefix.

    Raises:
        VidLLMInputError: Malformed; names scene and row.

    Source:
        Upstream: LaVi-Lab/Video-3D-LLM@3ff70e8 (format).
    """
    path = Path(path)
    content = parse_json(path, read_annotation_bytes(path))
    if not isinstance(content, Mapping):
        raise VidLLMInputError(f"{path}: wanted an object with boxes by scene; got {type(content).__name__}")
    proposals = {}
    for number, (name, boxes) in enumerate(content.items()):
        row = AnnotatedRow(path, number, {name: boxes}, "scene")
        scene_id = scene_of(row, name)
        values = np.array(row.boxes(name) or [], dtype=np.float64).reshape(-1, 6)
        if (values[:, 3:] < 0).any():
            raise row.error(name, "edge lengths from 0")
        proposals[scene_id] = Proposals(scene_id, values, np.arange(len(values)), 0, str(path))
    return proposals


def read_mask_proposals(
    path: str | Path,
    scan_dir: str | Path | None = None,
    vertices_annotation: np.ndarray | None = None,
    max_masks: int | None = None,
) -> Proposals:
    """LEO's Mask3D masks (`mask/<scene>.mask.npz`) as boxes around the masked vertices.

    Args:
        path (`str` or `Path`): A `scipy.sparse` file, instances by vertices of `_vh_clean_2.ply`.
        scan_dir (`str` or `Path`, *optional*): `scans/<scene>` with the mesh and `<scene>.txt`.
        vertices_annotation (`np.ndarray` of shape `(V, 3)`, *optional*): Aligned vertices, instead of `scan_dir`.
        max_masks (`int`, *optional*): Take the first ones only; Video-3D-LLM takes `VIDEO3DLLM_MASKS`.

    Returns:
        `Proposals`: masks without a vertex are left out and counted; `ids` are their positions in the file.

    Raises:
        VidLLMInputError: No such file, not a sparse matrix, or one for another number of vertices.

    Source:
        Upstream: embodied-generalist/embodied-generalist@567f2d8 (format); LaVi-Lab/Video-3D-LLM@3ff70e8 (first 50).
    """
    from scipy import sparse

    path = Path(path)
    if not path.is_file():
        raise VidLLMMissingFileError(f"{path}: no such file; wanted the instance masks of a scene")
    try:
        masks = sparse.csr_matrix(sparse.load_npz(path))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise VidLLMInputError(
            f"{path}: wanted a sparse matrix as scipy.sparse.save_npz writes it ({str(error)[:80]})"
        ) from None
    if vertices_annotation is None:
        if scan_dir is None:
            raise VidLLMInputError(
                f"{path}: wanted scan_dir or vertices_annotation, for the places of the vertices; got neither"
            )
        vertices_annotation = _aligned_vertices(Path(scan_dir).expanduser())
    if masks.shape[1] != len(vertices_annotation):
        raise VidLLMInputError(
            f"{path}: wanted masks over the mesh's {len(vertices_annotation)} vertices; got {masks.shape[1]} columns"
        )
    count = masks.shape[0] if max_masks is None else min(max_masks, masks.shape[0])
    boxes, ids = [], []
    for number in range(count):
        row = masks.getrow(number)
        points = vertices_annotation[row.indices[row.data != 0]]
        if len(points):
            low, high = points.min(axis=0), points.max(axis=0)
            boxes.append(np.concatenate([(low + high) / 2, high - low]))
            ids.append(number)
    return Proposals(
        path.name.split(".")[0],
        np.array(boxes, dtype=np.float64).reshape(-1, 6),
        np.array(ids, dtype=np.int64),
        count - len(ids),
        str(path),
    )


def _aligned_vertices(scan_dir: Path) -> np.ndarray:
    """Vertices of a scan's mesh, (V, 3), annotation frame."""
    vertices = read_ply_vertices(scan_dir / f"{scan_dir.name}_vh_clean_2.ply").astype(np.float64)
    alignment = axis_alignment(scan_dir / f"{scan_dir.name}.txt")
    return vertices @ alignment[:3, :3].T + alignment[:3, 3]


def read_llava_style(path: str | Path, split: str = "", data_root: str | Path | None = None) -> list[Sample]:
    """Video-3D-LLM's `{scanqa,sqa3d,scanrefer_vg,scan2cap}_{split}_llava_style.json` (also 3DRS, Ross3D), with their own prompts.

    Args:
        path (`str` or `Path`): The file.
        split (`str`): What the samples' split is called.
        data_root (`str` or `Path`, *optional*): Where the scenes lie.

    Returns:
        `list[Sample]`: in the file's order. Ids are the file's with `#<row>`, because SQA3D's training file repeats them. A caption's
        point is the centre of `box_input`; where that is null (no proposal) it has none, and its boxes are those of `gt_box`.

    Raises:
        VidLLMInputError: Malformed; names row and field.

    Source:
        Upstream: LaVi-Lab/Video-3D-LLM@3ff70e8 (format).
    """
    path = Path(path)
    rows = list_of(path, parse_json(path, read_annotation_bytes(path)))
    return [_llava_sample(AnnotatedRow(path, number, values), split, data_root) for number, values in enumerate(rows)]


def _llava_sample(row: AnnotatedRow, split: str, data_root: str | Path | None) -> Sample:
    """One row of a llava-style file."""
    given_id = row.get("id", "a text or a number", lambda value: isinstance(value, str | int))
    metadata = AnnotatedRow(
        row.path, row.number, row.get("metadata", "an object", lambda v: isinstance(v, Mapping)), "metadata of row"
    )
    dataset = metadata.text("dataset").lower()
    task = _TASKS.get(dataset)
    if task is None:
        raise metadata.error("dataset", f"one of {', '.join(_TASKS)}")
    messages, question, reply = conversation_of(row)
    target = box_of(row, "box" if task == "ground" else "gt_box") if task in ("ground", "caption") else None
    prompt_box = box_of(row, "box_input") if task == "caption" else None
    answers = metadata.texts("answers", None) if task == "qa" else None
    references = row.texts("annotations", [reply]) if task == "caption" else []
    object_id = metadata.values.get("object_id")
    kind = metadata.values.get("question_type")
    return sample_of(
        row,
        sample_id=f"{dataset}/{split or 'all'}/{given_id}#{row.number}",
        scene_id=scene_of(row, row.text("video"), "video"),
        task=task,
        messages=messages,
        benchmark=dataset,
        split=split,
        official_id=_official_id(str(given_id), task),
        question=question,
        answers=tuple(answers if answers is not None else [reply] if task in ("qa", "sqa") else []),
        references=tuple(references),
        object_ids=() if object_id is None else (metadata.number_text("object_id"),),
        boxes_annotation=None if target is None else [target],
        points=[prompt_box[:3]] if prompt_box is not None else None,
        question_type=kind if isinstance(kind, str) and kind != "unknow" else None,
        data_root=None if data_root is None else str(data_root),
        official=dict(row.values),
    )


def _official_id(given_id: str, task: str) -> str:
    """The authors' id inside `scanqa_<id>_<answer>`; else the file's own."""
    if task == "qa" and given_id.startswith("scanqa_") and given_id.rpartition("_")[2].isdecimal():
        return given_id.removeprefix("scanqa_").rpartition("_")[0]
    return given_id


def read_llava3d_answers(path: str | Path) -> dict[str, dict[str, Any]]:
    """LLaVA-3D's `llava3d_scanqa_val_answer.json` and its SQA3D twin.

    Args:
        path (`str` or `Path`): Rows `{"question_id", "text": [answers]}`, for SQA3D with `type` 0-5; a JSON list, or one object per line.

    Returns:
        `dict[str, dict]`: by question id (as text): `answers` (`list[str]`) and `question_type` (a name, or None).

    Raises:
        VidLLMInputError: Malformed, or an id is there twice; names row and field.

    Source:
        Upstream: ZCMax/LLaVA-3D@91d979d (format).
    """
    path = Path(path)
    answers: dict[str, dict[str, Any]] = {}
    for row in _list_or_lines(path):
        question_id = str(row.get("question_id", "a text or a number", lambda value: isinstance(value, str | int)))
        text = row.values.get("text")
        texts = [text] if isinstance(text, str) else row.texts("text")
        kind = row.integer("type", None)
        if kind is not None and not 0 <= kind < len(LLAVA3D_SQA_TYPES):
            raise row.error("type", f"0 to {len(LLAVA3D_SQA_TYPES) - 1}")
        if question_id in answers:
            raise row.error("question_id", "an id that no other row has")
        answers[question_id] = {"answers": texts, "question_type": None if kind is None else LLAVA3D_SQA_TYPES[kind]}
    return answers


def read_llava3d_questions(
    path: str | Path,
    answers: Mapping[str, Mapping[str, Any]] | None = None,
    task: str = "qa",
    split: str = "",
    data_root: str | Path | None = None,
) -> list[Sample]:
    """LLaVA-3D's question and training files: rows `{"id", "video", "conversations", "target": {"boxes": [[x, y, z, ...]]}}`.

    Args:
        path (`str` or `Path`): A JSON list, or one object per line.
        answers (`Mapping`, *optional*): From `read_llava3d_answers`.
        task (`str`): What the file is for: `qa`, `sqa`, `caption` or `chat`.
        split (`str`): What the samples' split is called.
        data_root (`str` or `Path`, *optional*): Where the scenes lie.

    Returns:
        `list[Sample]`: in the file's order; points are the centres of `target.boxes`.

    Raises:
        VidLLMInputError: Malformed, a question has no answers in `answers`, or the video is a list of pictures.

    Source:
        Upstream: ZCMax/LLaVA-3D@91d979d (format).
    """
    path = Path(path)
    samples = []
    for row in _list_or_lines(path):
        name = row.values.get("question_id", row.values.get("id"))
        if not isinstance(name, str | int):
            raise row.error("id", "a text or a number")
        messages, question, reply = conversation_of(row)
        known = None if answers is None else answers.get(str(name))
        if answers is not None and known is None:
            raise row.error("id", "an id that the answer file has")
        target = row.values.get("target")
        boxes = target.get("boxes") if isinstance(target, Mapping) else None
        points = _centres(row, boxes) if boxes else None
        texts = tuple(known["answers"]) if known else (reply,) if reply else ()
        samples.append(
            sample_of(
                row,
                sample_id=f"llava3d/{split or 'all'}/{name}#{row.number}",
                scene_id=scene_of(row, row.text("video"), "video"),
                task=task,
                messages=_spread_points(messages, points),
                benchmark="llava3d",
                split=split,
                official_id=str(name),
                question=question,
                answers=texts if task != "caption" else (),
                references=texts if task == "caption" else (),
                points=points,
                question_type=known["question_type"] if known else None,
                data_root=None if data_root is None else str(data_root),
                official=dict(row.values),
            )
        )
    return samples


def _spread_points(messages: list[dict], points: Sequence | None) -> list[dict]:
    """One mark may stand for several places: then it becomes as many point blocks."""
    marks = sum(block["type"] == "point" for turn in messages for block in turn["content"])
    if not points or marks != 1 or len(points) == 1:
        return messages
    spread = []
    for turn in messages:
        content: list[dict] = []
        for block in turn["content"]:
            content += [dict(block)] * (len(points) if block["type"] == "point" else 1)
        spread.append({**turn, "content": content})
    return spread


def _centres(row: AnnotatedRow, boxes: Any) -> list[list[float]]:
    """Centres (first three numbers) of boxes of any length."""
    ok = isinstance(boxes, list) and all(isinstance(box, list) and len(box) >= 3 for box in boxes)
    if not ok:
        raise row.error("target", "boxes of at least three numbers each")
    return AnnotatedRow(row.path, row.number, {"target": [box[:3] for box in boxes]}).boxes("target", sides=3)


def _list_or_lines(path: Path) -> Iterable[AnnotatedRow]:
    """Rows of a JSON list or of JSON Lines."""
    content = read_annotation_bytes(path)
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        rows, what = list(enumerate(list_of(path, parse_json(path, content)))), "row"
    else:
        rows, what = parse_json_lines(path, content), "line"
    return [AnnotatedRow(path, number, values, what) for number, values in rows]


__all__ = [
    "VIDEO3DLLM_MASKS",
    "Proposals",
    "read_box_file",
    "read_llava3d_answers",
    "read_llava3d_questions",
    "read_llava_style",
    "read_mask_proposals",
]
