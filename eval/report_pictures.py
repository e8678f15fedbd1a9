"""Pictures of a report: a frame with the true and the found box, and a map from above. Pillow, no tensors.

Shapes: each box is `(cx, cy, cz, dx, dy, dz)`, axis-aligned in the annotation frame, metres.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from vidllm.processing.benchmarks.frames import SceneFrames


TRUE_COLOUR, FOUND_COLOUR, CAMERA_COLOUR = (20, 160, 60), (210, 60, 30), (60, 90, 200)
NEAR_M = 0.05
# Corners by the bits of their number, and the edges between those that differ in one bit.
_EDGES = [(a, a | bit) for a in range(8) for bit in (1, 2, 4) if not a & bit]


def box_corners(box: Sequence[float]) -> np.ndarray:
    """Corners of a box.

    Args:
        box (`Sequence[float]`): Centre and sides.

    Returns:
        `np.ndarray` of shape `(8, 3)`: corner n lies above the centre along axis i where bit i of n is set.

    Source:
        Ours.
    """
    box = np.asarray(box, dtype=np.float64)
    signs = np.array([[1 if number >> axis & 1 else -1 for axis in range(3)] for number in range(8)])
    return box[:3] + signs * box[3:] / 2


def box_lines_px(box: Sequence[float], cam_from_annotation: np.ndarray, intrinsics_px: np.ndarray) -> list[np.ndarray]:
    """Edges of a box as a camera sees them.

    Args:
        box (`Sequence[float]`): In the annotation frame.
        cam_from_annotation (`np.ndarray` of shape `(4, 4)`): The camera.
        intrinsics_px (`np.ndarray` of shape `(3, 3)`): Its intrinsics.

    Returns:
        `list` of `np.ndarray` of shape `(2, 2)`: ends of the parts that lie before the camera, pixels.

    Source:
        Ours: an edge that passes the camera is cut, or it would appear mirrored.
    """
    corners = box_corners(box) @ cam_from_annotation[:3, :3].T + cam_from_annotation[:3, 3]
    lines = []
    for a, b in _EDGES:
        ends = corners[[a, b]]
        behind = ends[:, 2] < NEAR_M
        if behind.all():
            continue
        if behind.any():
            hidden, seen = (0, 1) if behind[0] else (1, 0)
            share = (NEAR_M - ends[hidden, 2]) / (ends[seen, 2] - ends[hidden, 2])
            ends[hidden] = ends[hidden] + share * (ends[seen] - ends[hidden])
        pixels = ends @ intrinsics_px.T
        lines.append(pixels[:, :2] / pixels[:, 2:])
    return lines


def best_frame(box: Sequence[float], frames: SceneFrames) -> int | None:
    """Which of the frames shows the centre of a box nearest to its own middle.

    Args:
        box (`Sequence[float]`): In the annotation frame.
        frames (`SceneFrames`): With cameras.

    Returns:
        `int`, or None: none shows it, or there are no cameras.

    Source:
        Ours.
    """
    cameras = _cameras(frames)
    if cameras is None or frames.intrinsics_px is None:
        return None
    best, least = None, np.inf
    for number, (camera, intrinsics) in enumerate(zip(cameras, frames.intrinsics_px, strict=True)):
        centre = camera[:3, :3] @ np.asarray(box[:3], float) + camera[:3, 3]
        if centre[2] < NEAR_M:
            continue
        pixel = (intrinsics @ centre)[:2] / centre[2]
        height, width = frames.rgb[number].shape[:2]
        off = np.abs(pixel / (width, height) - 0.5).max()
        if off < 0.5 and off < least:
            best, least = number, float(off)
    return best


def _cameras(frames: SceneFrames) -> np.ndarray | None:
    """Cameras as seen from the annotation frame."""
    if frames.cam_from_world is None or frames.annotation_from_world is None:
        return None
    return frames.cam_from_world @ np.linalg.inv(frames.annotation_from_world)


def frame_picture(
    frames: SceneFrames, number: int, true: Sequence[float], found: Sequence[float] | None, width_px: int = 320
) -> Image.Image:
    """A frame with both boxes.

    Args:
        frames (`SceneFrames`): With cameras.
        number (`int`): Which frame.
        true (`Sequence[float]`): Drawn green.
        found (`Sequence[float]`, *optional*): Drawn red.
        width_px (`int`): Of the picture.

    Returns:
        `PIL.Image.Image`

    Source:
        Ours.
    """
    rgb = frames.rgb[number]
    scale = width_px / rgb.shape[1]
    picture = Image.fromarray(rgb).resize((width_px, round(rgb.shape[0] * scale)), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    camera = _cameras(frames)[number]
    for box, colour in ((true, TRUE_COLOUR), (found, FOUND_COLOUR)):
        for line in [] if box is None else box_lines_px(box, camera, frames.intrinsics_px[number]):
            draw.line([tuple(point) for point in (line * scale).clip(-10_000, 10_000)], fill=colour, width=2)
    return picture


def map_picture(
    frames: SceneFrames, true: Sequence[float], found: Sequence[float] | None, size_px: int = 240
) -> Image.Image:
    """Both boxes and the cameras from above, x to the right and y up, in the annotation frame.

    Args:
        frames (`SceneFrames`): With cameras.
        true (`Sequence[float]`): Drawn green.
        found (`Sequence[float]`, *optional*): Drawn red.
        size_px (`int`): Of the picture.

    Returns:
        `PIL.Image.Image`

    Source:
        Ours.
    """
    boxes = [np.asarray(box, float) for box in (true, found) if box is not None]
    cameras = np.linalg.inv(_cameras(frames))
    places = np.concatenate([cameras[:, :2, 3], *[np.stack([b[:2] - b[3:5] / 2, b[:2] + b[3:5] / 2]) for b in boxes]])
    low, high = places.min(axis=0), places.max(axis=0)
    extent = max(float((high - low).max()), 1.0) * 1.15
    corner = (low + high) / 2 - extent / 2

    def at(place: np.ndarray) -> tuple[float, float]:
        x, y = (place - corner) / extent * size_px
        return float(x), float(size_px - y)

    picture = Image.new("RGB", (size_px, size_px), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    draw.line([at(place) for place in cameras[:, :2, 3]], fill=CAMERA_COLOUR, width=2)
    for camera in cameras:
        start = camera[:2, 3]
        draw.line([at(start), at(start + 0.06 * extent * camera[:2, 2])], fill=CAMERA_COLOUR, width=1)
    for box, colour in zip(boxes, (TRUE_COLOUR, FOUND_COLOUR), strict=False):
        (left, bottom), (right, top) = at(box[:2] - box[3:5] / 2), at(box[:2] + box[3:5] / 2)
        draw.rectangle([left, top, right, bottom], outline=colour, width=2)
    metre = size_px / extent
    draw.line([(8, size_px - 8), (8 + metre, size_px - 8)], fill=(0, 0, 0), width=2)
    draw.text((8, size_px - 24), "1 m", fill=(0, 0, 0))
    return picture


def data_uri(picture: Image.Image) -> str:
    """A picture as text that stands in a page.

    Args:
        picture (`PIL.Image.Image`): Any.

    Returns:
        `str`: `data:image/png;base64,...`.

    Source:
        Ours: a page that loads nothing.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


__all__ = ["best_frame", "box_corners", "box_lines_px", "data_uri", "frame_picture", "map_picture"]
