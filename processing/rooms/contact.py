"""A sheet of pictures from several rooms, to see what they look like."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .layout import SPLIT_NUMBERS, make_room
from .render import RoomRenderer


def contact_sheet(
    path: str | Path,
    difficulty: str = "standard",
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    frames_per_room: int = 4,
    size_hw: tuple[int, int] = (144, 192),
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Write one picture with a row per room, its frames evenly spread.

    Args:
        path (`str` or `Path`): PNG or JPEG file, by its ending; parent folders are made.
        difficulty (`str`): `easy`, `standard` or `hard`.
        seed (`int`): Of the data set.
        numbers (`Sequence` of `int`, *optional*): Scene numbers; the first six of the train split by default.
        frames_per_room (`int`): Pictures in a row.
        size_hw (`tuple` of `int`): Of one picture, pixels.
        device (`str` or `torch.device`): Where to render.

    Returns:
        `np.ndarray` of shape `(H, W, 3)`, uint8: the sheet.

    Raises:
        ValueError: No room, or no frame.

    Source:
        Ours.
    """
    numbers = SPLIT_NUMBERS["train"][:6] if numbers is None else numbers
    if len(numbers) < 1 or frames_per_room < 1:
        raise ValueError(
            f"contact_sheet: wanted at least one room and frame; got {len(numbers)} and {frames_per_room}"
        )
    rows = []
    for number in numbers:
        room = make_room(seed, number, difficulty)
        frames = np.linspace(0, len(room.track.annotation_from_cam) - 1, frames_per_room).round().astype(int).tolist()
        pictures = RoomRenderer(room, device).render(size_hw, frames, antialias=True).rgb.cpu().numpy()
        rows.append(
            np.concatenate([np.pad(p, ((2, 2), (2, 2), (0, 0)), constant_values=255) for p in pictures], axis=1)
        )
    sheet = np.concatenate(rows, axis=0)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # The quality matters to JPEG only.
    Image.fromarray(sheet).save(path, quality=82, optimize=True)
    return sheet
