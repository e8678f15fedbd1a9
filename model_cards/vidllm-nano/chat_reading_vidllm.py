"""Reading of chats: what a prompt asks about (a video, an encoded scene, points) and what a template may render.

Shapes: B videos, Q prompts, M points of a prompt.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from .video_reading_vidllm import VidLLMInputError


ROLES = ("system", "user", "assistant")
MEDIA_KEYS = ("video", "path", "url", "image")


@dataclass
class VidLLMPackedChats:
    """Chats ready for a template, and all that is not text.

    Args:
        chats (`list[list[dict]]`): Messages without media: blocks `text`, `video`, `point`, `box`.
        sources (`list`): The distinct videos, in order of first use.
        scene_index (`list[int]`): Per prompt the row of its video (or of its scene); -1 is text only.
        points_world (`list[list[list[float]]]`): Per prompt its points in order, world frame.

    Source:
        Ours: several prompts may share a video, which is decoded and encoded once.
    """

    chats: list[list[dict]]
    sources: list[Any]
    scene_index: list[int]
    points_world: list[list[list[float]]]


def pack_chats(
    chats: list[Any], scene: Any = None, scene_index: Any = None, room_from_world: torch.Tensor | None = None
) -> VidLLMPackedChats:
    """Check chats and take their media out.

    Args:
        chats (`list`): One list of messages per prompt.
        scene (`VidLLMScene`, *optional*): An encoded scene with one row or more; then no media is loaded.
        scene_index (`list[int]`, *optional*): Row of the scene per prompt, -1 = text only. Default: 0 if the scene has one row,
            else the prompt's number.
        room_from_world (`torch.Tensor` of shape `(3, 3)` or `(videos, 3, 3)`, *optional*): Rotation for points given in the
            room frame. Default: the scene's.

    Returns:
        `VidLLMPackedChats`.

    Raises:
        VidLLMInputError: A message, a block, a coordinate or the scene index is not usable; says which.

    Source:
        Ours: design of the prompts; see CONVENTIONS.md for the frames.
    """
    if not chats:
        raise VidLLMInputError("chat: wanted at least one chat; got none")
    num_rows = None
    if scene is not None:
        num_rows = int(scene.tokens.shape[0])
        scene_index = _scene_rows(scene_index, num_rows, len(chats))
        if room_from_world is None and getattr(scene, "reconstruction", None) is not None:
            room_from_world = scene.reconstruction.room_from_world
    elif scene_index is not None:
        raise VidLLMInputError(
            "scene_index: it says which row of scene= a chat is about; give scene=, or a video in each chat"
        )
    rotations = _checked_rotations(room_from_world)
    packed = VidLLMPackedChats([], [], [], [])
    row_of_source: dict[Any, int] = {}
    for number, chat in enumerate(chats):
        where = f"chat {number}" if len(chats) > 1 else "chat"
        messages, media = _clean_chat(chat, where, load_media=scene is None)
        if scene is not None:
            row = scene_index[number]
            if row < 0 and media:
                raise VidLLMInputError(f"{where}: its scene_index is -1 (text only), but it holds a video")
            if row >= 0 and not media:
                _insert_video(messages, where)
        elif media:
            key = _source_key(media[0])
            row = row_of_source.setdefault(key, len(row_of_source))
            if row == len(packed.sources):
                packed.sources.append(media[0])
        else:
            row = -1
        packed.chats.append(messages)
        packed.scene_index.append(row)
        packed.points_world.append(_take_points(messages, rotations, row, where))
    return packed


def _scene_rows(scene_index: Any, num_rows: int, num_chats: int) -> list[int]:
    """Row of the scene per chat, checked."""
    if scene_index is None:
        if num_rows not in (1, num_chats):
            raise VidLLMInputError(
                f"scene: it has {num_rows} rows for {num_chats} chats; say with scene_index which row each chat is about"
            )
        return [0] * num_chats if num_rows == 1 else list(range(num_chats))
    rows = [scene_index] * num_chats if isinstance(scene_index, int) else [int(row) for row in scene_index]
    if len(rows) != num_chats or any(not -1 <= row < num_rows for row in rows):
        raise VidLLMInputError(f"scene_index: wanted {num_chats} numbers from -1 to {num_rows - 1}; got {rows}")
    return rows


def _checked_rotations(room_from_world: Any) -> torch.Tensor | None:
    """`(rows, 3, 3)` in float64, or None."""
    if room_from_world is None:
        return None
    rotations = torch.as_tensor(room_from_world).detach().to("cpu", torch.float64)
    rotations = rotations[None] if rotations.ndim == 2 else rotations
    if rotations.ndim != 3 or rotations.shape[1:] != (3, 3):
        raise VidLLMInputError(
            f"room_from_world: wanted the shape (3, 3) or (rows, 3, 3); got {tuple(rotations.shape)}"
        )
    error = (rotations @ rotations.mT - torch.eye(3, dtype=torch.float64)).abs().amax()
    if not torch.isfinite(rotations).all() or error > 1e-2 or (torch.linalg.det(rotations) < 0).any():
        raise VidLLMInputError(f"room_from_world: wanted rotations; got {rotations.tolist()}")
    return rotations


def _source_key(source: Any) -> Any:
    """Equal for chats that name the same file or hold the same object."""
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        return path if "://" in path else os.path.abspath(os.path.expanduser(path))
    if isinstance(source, (list, tuple)) and all(isinstance(item, (str, os.PathLike)) for item in source):
        return tuple(_source_key(item) for item in source)
    return id(source)


def _clean_chat(chat: Any, where: str, load_media: bool) -> tuple[list[dict], list[Any]]:
    """Copies of the messages with bare blocks, and the media of the chat (at most one)."""
    chat = getattr(chat, "messages", chat)
    if not isinstance(chat, (list, tuple)) or not chat:
        raise VidLLMInputError(f"{where}: wanted a list of messages; got {chat!r:.80}")
    messages, media = [], []
    for turn, message in enumerate(chat):
        at = f"{where}, message {turn}"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise VidLLMInputError(f"{at}: wanted a dict with a role among {', '.join(ROLES)}; got {message!r:.80}")
        role, content = message["role"], message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, (list, tuple)):
            raise VidLLMInputError(f"{at}: wanted content as a text or a list of blocks; got {content!r:.80}")
        blocks = [_clean_block(block, role, at, load_media, media) for block in content]
        is_asked = any(block["type"] == "point" or block.get("text", "").strip() for block in blocks)
        if role == "user" and not is_asked:
            raise VidLLMInputError(f"{at}: the question is empty")
        messages.append({"role": role, "content": blocks})
    if len(media) > 1:
        raise VidLLMInputError(
            f"{where}: wanted at most one video; got {len(media)} (frames of one video go as a list into one video block)"
        )
    return messages, media


def _clean_block(block: Any, role: str, at: str, load_media: bool, media: list[Any]) -> dict:
    """One checked content block; a video's source goes to `media`."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text":
        if not isinstance(block.get("text"), str):
            raise VidLLMInputError(f"{at}: wanted a text block with a text; got {block!r:.80}")
        return {"type": "text", "text": block["text"]}
    if kind in ("video", "image"):
        if role != "user":
            raise VidLLMInputError(f"{at}: a video belongs into a user's message; got one in a message of the {role}")
        given = [block[key] for key in MEDIA_KEYS if block.get(key) is not None]
        if load_media and len(given) != 1:
            raise VidLLMInputError(
                f"{at}: wanted a video block with one of {', '.join(MEDIA_KEYS)} (or scene=); got {sorted(block)}"
            )
        media.append(given[0] if given else None)
        return {"type": "video"}
    if kind == "point":
        if role != "user":
            raise VidLLMInputError(f"{at}: a point belongs into a user's message; got one in a message of the {role}")
        return {"type": "point", **_checked_point(block, at)}
    if kind == "box":
        if role != "assistant":
            raise VidLLMInputError(
                f"{at}: a box belongs into an assistant's message; got one in a message of the {role}"
            )
        return {"type": "box"}
    raise VidLLMInputError(f"{at}: wanted blocks of the type text, video, point or box; got {block!r:.80}")


def _checked_point(block: dict, at: str) -> dict:
    """Coordinates and frame of a point block."""
    frame, xyz = block.get("frame", "world"), block.get("xyz")
    if frame not in ("world", "room"):
        raise VidLLMInputError(f"{at}: a point's frame is world or room; got {frame!r}")
    try:
        xyz = [float(value) for value in ([] if isinstance(xyz, str) else xyz)]
    except (TypeError, ValueError):
        raise VidLLMInputError(
            f"{at}: wanted a point with xyz = three numbers; got {block.get('xyz')!r:.80}"
        ) from None
    if len(xyz) != 3 or not all(math.isfinite(value) for value in xyz):
        raise VidLLMInputError(f"{at}: wanted a point with three finite coordinates; got {block.get('xyz')!r:.80}")
    return {"xyz": xyz, "frame": frame}


def _insert_video(messages: list[dict], where: str) -> None:
    """The placeholder of a scene comes first in the first user message, where a video block would stand."""
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is None:
        raise VidLLMInputError(f"{where}: wanted a user's message to ask about the scene; got none")
    first["content"].insert(0, {"type": "video"})


def _take_points(messages: list[dict], rotations: torch.Tensor | None, row: int, where: str) -> list[list[float]]:
    """Points of a chat in the world frame; the blocks keep nothing but their type."""
    points = []
    for message in messages:
        for block in message["content"]:
            if block["type"] != "point":
                continue
            xyz, frame = block.pop("xyz"), block.pop("frame")
            if frame == "room":
                if rotations is None:
                    raise VidLLMInputError(
                        f"{where}: a point in the room frame wants scene= or room_from_world=; or give it in the world frame"
                    )
                if rotations.shape[0] > 1 and not 0 <= row < rotations.shape[0]:
                    raise VidLLMInputError(
                        f"{where}: wanted room_from_world of its video (row {row}); got {rotations.shape[0]} rows"
                    )
                rotation = rotations[row if rotations.shape[0] > 1 else 0]
                # point_room = R point_world, so point_world = R^T point_room
                xyz = (rotation.mT @ torch.tensor(xyz, dtype=torch.float64)).tolist()
            points.append(xyz)
    return points
