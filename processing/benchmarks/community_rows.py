"""What the readers of community files have in common: conversations, boxes and scenes of a row. No arrays."""

from typing import Any

from vidllm.processing.benchmarks.files import AnnotatedRow, MalformedRowError
from vidllm.processing.benchmarks.prompts import box_turn, reply_turn
from vidllm.processing.samples import Sample
from vidllm.processing.scenes.base import check_scene_id
from vidllm.processing.video_reading_vidllm import VidLLMInputError


SCANNET_PREFIX = "scannet/"
VIDEO_MARKS = ("<image>", "<video>")
POINT_MARKS = ("<coord>", "<boxes>")
BOX_MARK = "<ground>"


def conversation_of(row: AnnotatedRow) -> tuple[list[dict], str, str]:
    """Messages of a row with `conversations` (human and gpt in turn, marks for the video, for places and for boxes).

    Args:
        row (`AnnotatedRow`): The row.

    Returns:
        `tuple`: messages, the last human text as the file has it, the last gpt text as the file has it (empty if there is none).

    Raises:
        MalformedRowError: No such turns; names row and field.

    Source:
        Upstream: LaVi-Lab/Video-3D-LLM@3ff70e8, ZCMax/LLaVA-3D@91d979d (format).
    """
    turns = row.get("conversations", "a list of turns", lambda value: isinstance(value, list) and bool(value))
    messages, texts = [], {"human": "", "gpt": ""}
    for number, values in enumerate(turns):
        turn = AnnotatedRow(row.path, number, values, f"{row.name}, conversations")
        speaker = turn.get("from", "human or gpt", lambda value: value in ("human", "gpt"))
        value = turn.values.get("value")
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            # LLaVA-3D writes some replies as a list of one.
            value = value[0]
        if not isinstance(value, str) or not value.strip():
            raise turn.error("value", "a text")
        texts[speaker] = value
        if speaker == "gpt":
            messages.append(box_turn() if value.strip() == BOX_MARK else reply_turn(value.strip()))
            continue
        content = [] if any(turn["role"] == "user" for turn in messages) else [{"type": "video"}]
        for mark in VIDEO_MARKS:
            value = value.replace(mark, "")
        for mark in POINT_MARKS:
            value = value.replace(mark, "\0")
        for position, text in enumerate(value.strip().split("\0")):
            if position:
                content.append({"type": "point"})
            if text:
                content.append({"type": "text", "text": text})
        messages.append({"role": "user", "content": content})
    return messages, texts["human"], texts["gpt"]


def box_of(row: AnnotatedRow, field: str, sides: int = 6) -> list[float] | None:
    """A box of a row.

    Args:
        row (`AnnotatedRow`): The row.
        field (`str`): Where it stands.
        sides (`int`): How many numbers it has.

    Returns:
        `list[float]`, *optional*: the numbers, None where the field is null or absent.

    Raises:
        MalformedRowError: Something else than so many finite numbers; names row and field.

    Source:
        Ours.
    """
    value = row.values.get(field)
    if value is None:
        return None
    return AnnotatedRow(row.path, row.number, {field: [value]}).boxes(field, sides)[0]


def scene_of(row: AnnotatedRow, name: str, field: str | None = None) -> str:
    """A ScanNet scene out of `scannet/<scene>`.

    Args:
        row (`AnnotatedRow`): The row.
        name (`str`): What it says.
        field (`str`, *optional*): Where it says it; by default the name is a key.

    Returns:
        `str`: without the prefix.

    Raises:
        MalformedRowError: Not a scene's name; names row and field.

    Source:
        Ours.
    """
    try:
        return check_scene_id(name.removeprefix(SCANNET_PREFIX))
    except VidLLMInputError:
        raise row.error(field or name, "a scene such as scannet/scene0000_00", name) from None


def sample_of(row: AnnotatedRow, **fields: Any) -> Sample:
    """A sample, whose errors name the row.

    Args:
        row (`AnnotatedRow`): What it is made of.
        **fields: Of `Sample`.

    Returns:
        `Sample`

    Raises:
        MalformedRowError: The fields do not make one.

    Source:
        Ours.
    """
    try:
        return Sample(**fields)
    except VidLLMInputError as error:
        raise MalformedRowError(row.where, str(error), "not a valid sample") from None


__all__ = [
    "BOX_MARK",
    "POINT_MARKS",
    "SCANNET_PREFIX",
    "VIDEO_MARKS",
    "box_of",
    "conversation_of",
    "sample_of",
    "scene_of",
]
