"""VG-LLM's rows of Scan2Cap and ScanRefer: pictures of a scene, a prompt, and boxes. No arrays."""

import re
from pathlib import Path

from vidllm.processing.benchmarks.community_rows import box_of, sample_of
from vidllm.processing.benchmarks.files import AnnotatedRow, list_of, parse_json, read_annotation_bytes
from vidllm.processing.benchmarks.prompts import box_turn, reply_turn
from vidllm.processing.samples import Sample
from vidllm.processing.scenes.base import check_scene_id
from vidllm.processing.video_reading_vidllm import VidLLMInputError


# A picture's mark in a prompt, with the number that grounding prompts put before it.
_PICTURE = re.compile(r"(?:Frame-\d+:\s*)?<image>")
_PLACE = re.compile(r"\[\s*-?[\d.]+(?:e-?\d+)?\s*(?:,\s*-?[\d.]+(?:e-?\d+)?\s*){2}\]")
_DESCRIPTION = re.compile(r"^Text: (.*)$", re.MULTILINE)
# The authors blank a caption whose proposal overlaps the object less.
CAPTION_IOU = 0.5
_ANGLE_RAD = 1e-6


def read_vgllm_rows(path: str | Path, split: str = "", data_root: str | Path | None = None) -> list[Sample]:
    """VG-LLM's `scan2cap_{split}_*frames.json` and `scanrefer_{split}_*frames.json`, with its own prompts.

    Its prompts name places in the axes of a camera, and ask for a box in those of a chosen frame. Here a place becomes a point block at the
    centre of `input_box` (aligned scene), and the reply a box block; the box is `gt_box` or `gt_bbox` (aligned scene).

    Args:
        path (`str` or `Path`): A JSON list: `images`, `conversations` or `prompt`, and `gt_box`, `input_box`, `iou`, `annotations`
            (captions) or `gt_bbox` (grounding).
        split (`str`): What the samples' split is called.
        data_root (`str` or `Path`, *optional*): Where the scenes lie.

    Returns:
        `list[Sample]`: in the file's order, ids with the row's number. `official` keeps the row: the authors' frames (`images`), their
        cameras, and `iou`, below `CAPTION_IOU` of which they score an empty caption. A caption row without `input_box` has no known place.

    Raises:
        VidLLMInputError: Malformed, pictures of several scenes, or a true box that is turned; names row and field.

    Source:
        Upstream: LaVi-Lab/VG-LLM@6fbdae6 (format).
    """
    path = Path(path)
    rows = list_of(path, parse_json(path, read_annotation_bytes(path)))
    return [_sample(AnnotatedRow(path, number, values), split, data_root) for number, values in enumerate(rows)]


def _sample(row: AnnotatedRow, split: str, data_root: str | Path | None) -> Sample:
    """One row; which benchmark it is of, its fields tell."""
    named = AnnotatedRow(row.path, row.number, row.values.get("metadata") or {}, "metadata of row")
    benchmark = named.text("dataset", "scanrefer" if "gt_bbox" in row.values else "scan2cap").lower()
    if benchmark not in ("scanrefer", "scan2cap"):
        raise named.error("dataset", "scanrefer or scan2cap")
    object_id = named.values.get("object_id")
    human, reply = _first_turns(row, need_reply=benchmark == "scan2cap")
    common = {
        "scene_id": _scene(row),
        "benchmark": benchmark,
        "split": split,
        "sample_id": f"vgllm/{benchmark}/{split or 'all'}/{row.number}",
        "official_id": str(row.number),
        "object_ids": () if object_id is None else (named.number_text("object_id"),),
        "question_type": named.text("question_type", None),
        "data_root": None if data_root is None else str(data_root),
        "official": dict(row.values),
    }
    if benchmark == "scanrefer":
        prompt = row.text("prompt", human).strip()
        described = _DESCRIPTION.search(prompt)
        turns = [_user_turn(prompt), box_turn()]
        return sample_of(
            row,
            task="ground",
            messages=turns,
            question=described.group(1).strip() if described else prompt,
            boxes_annotation=_upright_box(row, "gt_bbox"),
            **common,
        )
    place, target = box_of(row, "input_box"), box_of(row, "gt_box")
    row.get("iou", "a number up to 1", _is_overlap, None)
    return sample_of(
        row,
        task="caption",
        messages=[_user_turn(human), reply_turn(reply)],
        question=human,
        references=tuple(row.texts("annotations", [reply])),
        points=None if place is None else [place[:3]],
        boxes_annotation=None if target is None else [target],
        **common,
    )


def _first_turns(row: AnnotatedRow, need_reply: bool) -> tuple[str, str]:
    """What the human asks, without the pictures' marks, and what the reply is."""
    texts = {"human": "", "gpt": ""}
    turns = row.get("conversations", "a list of turns", lambda value: isinstance(value, list), [])
    for number, values in enumerate(turns):
        turn = AnnotatedRow(row.path, number, values, f"{row.name}, conversations")
        speaker = turn.get("from", "human or gpt", lambda value: value in texts)
        texts[speaker] = turn.get("value", "a text", lambda value: isinstance(value, str))
    human, reply = _PICTURE.sub("", texts["human"]).strip(), texts["gpt"].strip()
    if not human and row.values.get("prompt") is None:
        raise row.error("conversations", "a human's turn")
    if need_reply and not reply:
        raise row.error("conversations", "a reply")
    return human, reply


def _user_turn(prompt: str) -> dict:
    """The video and the prompt, a place in it as a point block."""
    content: list[dict] = [{"type": "video"}]
    place = _PLACE.search(prompt)
    pieces = [prompt] if place is None else [prompt[: place.start()], None, prompt[place.end() :]]
    for piece in pieces:
        if piece is None:
            content.append({"type": "point"})
        elif piece:
            content.append({"type": "text", "text": piece})
    return {"role": "user", "content": content}


def _scene(row: AnnotatedRow) -> str:
    """The scene whose pictures are named, `scannet/posed_images/<scene>/00000.jpg`."""
    images = row.texts("images")
    scenes = {Path(image).parent.name for image in images}
    if len(scenes) != 1:
        raise row.error("images", "paths of pictures of one scene")
    try:
        return check_scene_id(scenes.pop())
    except VidLLMInputError:
        raise row.error("images", "paths such as scannet/posed_images/scene0000_00/00000.jpg") from None


def _upright_box(row: AnnotatedRow, field: str) -> list[list[float]] | None:
    """A box of nine numbers (centre, size, three angles) whose angles are 0; None where it is hidden."""
    box = box_of(row, field, sides=9)
    if box is None:
        return None
    if max(map(abs, box[6:])) > _ANGLE_RAD:
        raise row.error(field, "a box along the axes of the aligned scene (three angles of 0), as ScanRefer's are")
    return [box[:6]]


def _is_overlap(value: object) -> bool:
    """A number up to 1; -1 where the scene has no proposal."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1 <= value <= 1


__all__ = ["CAPTION_IOU", "read_vgllm_rows"]
