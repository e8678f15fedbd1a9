"""Chat-Scene's files, which GPT4Scene reads too: rows of all tasks, reference captions, and boxes of objects and of Mask3D's proposals.

Its model names objects by tokens `<OBJnnn>`, the numbers of proposals. Here a place in a prompt becomes a point block at the proposal's
centre, and an answer that is such a token becomes a box block. Shapes: M boxes.
"""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from vidllm.processing.benchmarks.community import LLAVA3D_SQA_TYPES, Proposals
from vidllm.processing.benchmarks.community_rows import sample_of
from vidllm.processing.benchmarks.files import AnnotatedRow, list_of, parse_json, read_annotation_bytes
from vidllm.processing.benchmarks.prompts import box_turn, reply_turn
from vidllm.processing.samples import Sample
from vidllm.processing.scenes.base import check_scene_id
from vidllm.processing.video_reading_vidllm import VidLLMInputError


OBJECT_TOKEN = re.compile(r"<OBJ(\d{3})>")
CAPTION_ENDS = ("sos ", " eos")
_BENCHMARKS = {"qa": "scanqa", "sqa": "sqa3d", "ground": "scanrefer", "caption": "scan2cap"}


def read_attributes(path: str | Path) -> dict[str, Proposals]:
    """Boxes by scene of `scannet_{train,val}_attributes.pt` (annotated objects) and `scannet_mask3d_{train,val}_attributes.pt` (proposals).

    Args:
        path (`str` or `Path`): The file: `{scene: {"objects": [names], "locs": (n, 6)}}`, aligned scene, metres, centre and size.

    Returns:
        `dict[str, Proposals]`: by scene. A mask without a vertex, which the file has as six zeros, is left out and counted; `ids` are
        the positions in the file, which is what `<OBJnnn>` and `obj_id` mean.

    Raises:
        VidLLMInputError: No such file, not PyTorch's, malformed, or it holds more than tensors, lists and texts: nothing else is loaded.

    Source:
        Upstream: ZzZZCHS/Chat-Scene@475e1069:preprocess/prepare_scannet_{,mask3d_}attributes.py (format).
    """
    import torch

    path = Path(path)
    content = read_annotation_bytes(path)
    try:
        scenes = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        # What PyTorch says at length begins with advice to switch its safety off.
        raise VidLLMInputError(
            f"{path}: wanted a file of torch.save with tensors, lists and texts only ({type(error).__name__}); anything else in it is "
            "not loaded"
        ) from None
    if not isinstance(scenes, Mapping):
        raise VidLLMInputError(f"{path}: wanted an object with boxes by scene; got {type(scenes).__name__}")
    return {check_scene_id(str(name)): _proposals(path, str(name), entry) for name, entry in scenes.items()}


def _proposals(path: Path, scene: str, entry: Any) -> Proposals:
    """Boxes of one scene."""
    where = f"{path}, scene {scene}"
    values = entry.get("locs") if isinstance(entry, Mapping) else None
    ok = hasattr(values, "numpy") and values.ndim == 2 and values.shape[1] == 6 and values.dtype.is_floating_point
    ok = ok and bool(values.isfinite().all()) and bool((values[:, 3:] >= 0).all())
    if not ok:
        got = f"a tensor of shape {tuple(values.shape)}" if hasattr(values, "shape") else type(values).__name__
        raise VidLLMInputError(
            f"{where}, field 'locs': wanted finite boxes of shape (n, 6), sizes from 0; got {got if entry is not None else 'nothing'}"
        )
    boxes = values.numpy().astype(np.float64)
    names = entry.get("objects")
    # Mask3D may find more masks than the file keeps boxes of.
    if not isinstance(names, list) or len(names) < len(boxes) or not all(isinstance(name, str) for name in names):
        raise VidLLMInputError(f"{where}, field 'objects': wanted a name for each of {len(boxes)} boxes")
    ids = np.flatnonzero((boxes != 0).any(axis=1))
    return Proposals(
        scene, boxes[ids], ids, len(boxes) - len(ids), str(path), labels=tuple(names[number] for number in ids)
    )


def read_caption_corpus(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Reference captions by object: `scan2cap_val_corpus.json`, and LEO's `scanrefer_corpus.json`.

    Args:
        path (`str` or `Path`): The file: `{"scene|object id": ["sos Caption. eos"]}`; LEO's keys go on with `|object name`.

    Returns:
        `dict[str, tuple[str, ...]]`: as the file has them, with `sos` and `eos`, in its order: the scorers compare these very texts.

    Raises:
        VidLLMInputError: Malformed; names the key.

    Source:
        Upstream: ZzZZCHS/Chat-Scene@475e1069:preprocess/prepare_scan2cap_annos.py, embodied-generalist/embodied-generalist@567f2d8 (formats).
    """
    path = Path(path)
    content = parse_json(path, read_annotation_bytes(path))
    if not isinstance(content, Mapping):
        raise VidLLMInputError(f"{path}: wanted an object with captions by object; got {type(content).__name__}")
    corpus = {}
    for number, (key, captions) in enumerate(content.items()):
        row = AnnotatedRow(path, number, {key: captions}, "entry")
        parts = key.split("|")
        if len(parts) not in (2, 3) or not parts[1].isdecimal() or not _is_scene(parts[0]):
            raise row.error(key, "a key such as scene0000_00|3", key)
        corpus[key] = tuple(row.texts(key))
    return corpus


def read_chatscene_rows(
    path: str | Path,
    task: str,
    split: str = "",
    data_root: str | Path | None = None,
    proposals: Mapping[str, Proposals] | None = None,
    objects: Mapping[str, Proposals] | None = None,
) -> list[Sample]:
    """Rows of `scanqa_*`, `sqa3d_*`, `scanrefer_mask3d_*` and `scan2cap_mask3d_*`, with Chat-Scene's own prompts.

    Its SQA3D rows have one wording of the standpoint, drawn at random when the file was made, also in `val` and `test`: compare on the
    same file. Its rows have no ids; here they are numbered.

    Args:
        path (`str` or `Path`): A JSON list of `scene_id`, `obj_id`, `prompt`, then `caption` (training) or `ref_captions` (the rest).
        task (`str`): `qa`, `sqa`, `ground` or `caption`.
        split (`str`): What the samples' split is called.
        data_root (`str` or `Path`, *optional*): Where the scenes lie.
        proposals (`Mapping`, *optional*): From `read_attributes` of the segmenter's file: where a caption is asked for, and the box of a
            training row of ScanRefer. Without it these are not known.
        objects (`Mapping`, *optional*): From `read_attributes` of the annotated objects: true boxes of the other rows.

    Returns:
        `list[Sample]`: in the file's order. A caption's references come without `sos` and `eos`; the row itself (`official`) keeps them,
        and the overlap (`iou`) of proposal and object.

    Raises:
        VidLLMInputError: Malformed, or `proposals` or `objects` lack what a row names; names row and field.

    Source:
        Upstream: ZzZZCHS/Chat-Scene@475e1069:preprocess/prepare_{scanqa,sqa3d,scanrefer,scan2cap}_annos.py (format).
    """
    path = Path(path)
    if task not in _BENCHMARKS:
        raise VidLLMInputError(f"{path}: wanted a task among {', '.join(_BENCHMARKS)}; got {task!r}")
    rows = list_of(path, parse_json(path, read_annotation_bytes(path)))
    return [
        _sample(AnnotatedRow(path, number, values), task, split, data_root, proposals, objects)
        for number, values in enumerate(rows)
    ]


def _sample(
    row: AnnotatedRow,
    task: str,
    split: str,
    data_root: str | Path | None,
    proposals: Mapping[str, Proposals] | None,
    objects: Mapping[str, Proposals] | None,
) -> Sample:
    """One row."""
    scene, prompt, object_id = row.scene(), row.text("prompt"), row.integer("obj_id")
    learned = row.text("caption", None)
    texts = [learned] if learned is not None else row.texts("ref_captions")
    if task == "caption":
        texts = [text.removeprefix(CAPTION_ENDS[0]).removesuffix(CAPTION_ENDS[1]).strip() for text in texts]
    kind = row.integer("sqa_type", None)
    if kind is not None and not 0 <= kind < len(LLAVA3D_SQA_TYPES):
        raise row.error("sqa_type", f"0 to {len(LLAVA3D_SQA_TYPES) - 1}")
    content, box, point = [{"type": "video"}, {"type": "text", "text": prompt}], None, None
    messages: list[dict] = [{"role": "user", "content": content}]
    if task == "caption":
        asked = row.integer("pred_id")
        if OBJECT_TOKEN.findall(prompt) != [f"{asked:03}"]:
            raise row.error("prompt", f"one object token, that of pred_id {asked}")
        before, after = OBJECT_TOKEN.split(prompt)[::2]
        content[1:] = [{"type": "text", "text": before}, {"type": "point"}, {"type": "text", "text": after}]
        point = _box(row, "pred_id", proposals, scene, asked)
        box = _box(row, "obj_id", objects, scene, object_id)
    elif task == "ground":
        for text in texts:
            if OBJECT_TOKEN.fullmatch(text.rstrip(".")) is None:
                raise row.error("caption" if learned is not None else "ref_captions", "an object token")
        # Training rows name the proposal that is to be chosen, the others the true object.
        known = objects if learned is None else proposals
        box = _box(row, "obj_id", known, scene, object_id)
        messages.append(box_turn())
    if task != "ground" and texts and texts[0].strip():
        messages.append(reply_turn(texts[0].strip()))
    # In training rows of ScanRefer the number is that of a proposal, in SQA3D it is always 0.
    names_object = task in ("qa", "caption") or (task == "ground" and learned is None)
    return sample_of(
        row,
        sample_id=f"chatscene/{_BENCHMARKS[task]}/{split or 'all'}/{row.number}",
        scene_id=scene,
        task=task,
        messages=[turn | {"content": [b for b in turn["content"] if b.get("text") != ""]} for turn in messages],
        benchmark=_BENCHMARKS[task],
        split=split,
        official_id=str(row.number),
        question=prompt,
        answers=tuple(texts) if task in ("qa", "sqa") else (),
        references=tuple(texts) if task == "caption" else (),
        object_ids=(object_id,) if names_object else (),
        boxes_annotation=None if box is None else [box],
        points=None if point is None else [point[:3]],
        question_type=None if kind is None else LLAVA3D_SQA_TYPES[kind],
        data_root=None if data_root is None else str(data_root),
        official=dict(row.values),
    )


def _box(
    row: AnnotatedRow, field: str, known: Mapping[str, Proposals] | None, scene: str, number: int
) -> np.ndarray | None:
    """The box of an object or proposal, None where no boxes were given."""
    if known is None:
        return None
    if scene not in known:
        raise row.error("scene_id", "a scene whose boxes were given")
    (found,) = np.nonzero(known[scene].ids == number)
    if not len(found):
        raise row.error(field, f"one of the boxes of {known[scene].source}")
    return known[scene].boxes_annotation[found[0]]


def _is_scene(name: str) -> bool:
    """Whether a text can be a scene's name."""
    try:
        check_scene_id(name)
    except VidLLMInputError:
        return False
    return True


__all__ = ["read_attributes", "read_caption_corpus", "read_chatscene_rows"]
