"""Frames that are not a video file: folders and lists of photographs, PIL images, arrays.

Shapes: S frames, H W pixels of one frame.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image, ImageOps

from .video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError, decode_video


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
EXIF_ORIENTATION = 0x0112
READ_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def is_image_path(source: Any) -> bool:
    """Whether this is a path that ends like a photograph's.

    Args:
        source: Anything.

    Returns:
        `bool`: True for a `str` or `os.PathLike` with one of `IMAGE_SUFFIXES`.

    Source:
        Ours: decides between PIL and PyAV.
    """
    return isinstance(source, (str, os.PathLike)) and os.fspath(source).lower().endswith(IMAGE_SUFFIXES)


def natural_key(name: str) -> list:
    """Sort key under which `frame_9` comes before `frame_10`.

    Args:
        name (`str`): A file name.

    Returns:
        `list`: Texts and numbers in turn, so that keys of any two names compare.

    Source:
        Ours: the order in which people number frames.
    """
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(re.split(r"([0-9]+)", name))]


def read_frames(
    source: Any,
    choose: Callable[[int, list[float] | None], list[int]],
    convert: Callable[[np.ndarray, tuple[int, int], str], Any],
) -> tuple[list[Any], dict[str, Any]]:
    """Read one video from whatever holds it; only the chosen frames are decoded and kept.

    Args:
        source: Path of a video file, of a folder of photographs, or of one photograph; a list of photograph paths, PIL images
            or arrays `(H, W, 3)`; one array or tensor `(S, H, W, 3)` or `(S, 3, H, W)`. Arrays are uint8, uint16 or float in
            0..1. Folders are read in natural order; names that are decimal numbers are times in seconds.
        choose (callable): `(number of frames, their times in seconds or None) -> rising indices`.
        convert (callable): `(rgb, size_hw, frame name) -> anything`, called once per kept frame. rgb is a `numpy.ndarray` of
            shape `(height, width, 3)`, uint8 or float32 in 0..1, upright; size_hw its height and width with square pixels.

    Returns:
        `tuple`: what `convert` returned, in order, and the metadata (see `VidLLMVideoProcessor`).

    Raises:
        VidLLMInputError: The source cannot be read as frames of one video; says which frame and why.

    Source:
        Ours: one reader for all forms in which people have a filmed room.
    """
    if isinstance(source, (str, os.PathLike)):
        path = _local_path(os.fspath(source))
        if os.path.isdir(path):
            return _read_stills(_list_folder(path), path, choose, convert)
        if is_image_path(path):
            return _read_stills([path], path, choose, convert)
        return decode_video(path, choose, convert)
    if isinstance(source, Image.Image):
        return _read_stills([source], "image", choose, convert)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _read_stills(_split_array(source), "array", choose, convert)
    if isinstance(source, (list, tuple)):
        if len(source) == 0:
            raise VidLLMInputError("video: wanted at least one frame; got an empty list")
        frames = [
            _local_path(os.fspath(frame)) if isinstance(frame, (str, os.PathLike)) else frame for frame in source
        ]
        return _read_stills(frames, "list of frames", choose, convert)
    raise VidLLMInputError(
        f"video: wanted a path, a folder, a list of images or an array of frames; got {type(source).__name__}"
    )


def _local_path(path: str) -> str:
    """An existing local path, or a clear error."""
    if path.startswith("file://"):
        path = unquote(path[len("file://") :])
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise VidLLMInputError(f"{path}: wanted a local path; got an address (download the file and give its path)")
    if not path.strip():
        raise VidLLMInputError("video: wanted a path; got an empty text")
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise VidLLMMissingFileError(f"{path}: no such file or folder")
    return path


def _list_folder(folder: str) -> list[str]:
    """Photographs of a folder in natural order, by time if the names are decimal numbers."""
    entries = [name for name in os.listdir(folder) if not name.startswith(".")]
    names = [name for name in entries if is_image_path(name) and os.path.isfile(os.path.join(folder, name))]
    if not names:
        found = ", ".join(sorted(entries)[:3])
        raise VidLLMInputError(
            f"{folder}: no image in this folder" + (f" (it holds {found})" if found else " (it is empty)")
        )
    times_s = _times_from_names(names)
    names = [names[i] for i in np.argsort(times_s, kind="stable")] if times_s else sorted(names, key=natural_key)
    return [os.path.join(folder, name) for name in names]


def _times_from_names(paths: Sequence[Any]) -> list[float] | None:
    """Times in seconds if every file name is a decimal number (as TUM writes them)."""
    stems = [os.path.splitext(os.path.basename(path))[0] if isinstance(path, str) else "" for path in paths]
    return [float(stem) for stem in stems] if all(re.fullmatch(r"\d+\.\d+", stem) for stem in stems) else None


def _split_array(array: np.ndarray | torch.Tensor) -> list[np.ndarray]:
    """`(S, H, W, 3)`, `(S, 3, H, W)`, or one frame without the first axis, to a list of frames `(H, W, 3)`."""
    array = _as_numpy(array)
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[0] == 0:
        raise VidLLMInputError(
            f"video array: wanted the shape (frames, height, width, 3) or (frames, 3, height, width); got {tuple(array.shape)}"
        )
    if array.shape[-1] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        # (frames, channels, height, width) -> (frames, height, width, channels)
        array = array.transpose(0, 2, 3, 1)
    return list(array)


def _as_numpy(array: Any) -> np.ndarray:
    """An array on the CPU; bfloat16 has no numpy type."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype in (torch.bfloat16, torch.float16) else array).numpy()
    return np.asarray(array)


def _read_stills(
    frames: list[Any], source: str, choose: Callable, convert: Callable
) -> tuple[list[Any], dict[str, Any]]:
    """Choose, open and convert frames that exist one by one."""
    times_s = _times_from_names(frames)
    wanted = choose(len(frames), times_s)
    names = [frame if isinstance(frame, str) else f"{source}, frame {index}" for index, frame in enumerate(frames)]
    _check_orientation(frames, names)
    kept = []
    for index in wanted:
        rgb = _as_rgb(frames[index], names[index])
        kept.append(convert(rgb, rgb.shape[:2], names[index]))
    fps = duration = None
    if times_s and len(times_s) > 1 and times_s[-1] > times_s[0]:
        duration = times_s[-1] - times_s[0]
        fps = (len(times_s) - 1) / duration
    is_files = all(isinstance(frame, str) for frame in frames)
    return kept, {
        "source": source,
        "total_num_frames": len(frames),
        "frames_indices": list(wanted),
        "timestamps_s": [times_s[index] for index in wanted] if times_s else None,
        "fps": fps,
        "duration": duration,
        "frame_names": [os.path.basename(frames[index]) for index in wanted] if is_files else None,
        "video_backend": "pil" if is_files else "array",
    }


def _check_orientation(frames: list[Any], names: list[str]) -> None:
    """Portrait and landscape in one video is a mistake; file headers and shapes suffice to see it."""
    seen = {}
    for frame, name in zip(frames, names, strict=True):
        height, width = _frame_hw(frame, name)
        if height != width:
            seen.setdefault("portrait" if height > width else "landscape", f"{name} is {width}x{height}")
    if len(seen) > 1:
        raise VidLLMInputError(
            "video: wanted frames of one orientation; got portrait and landscape mixed: "
            + "; ".join(f"{shown} ({kind})" for kind, shown in seen.items())
        )


def _frame_hw(frame: Any, name: str) -> tuple[int, int]:
    """Height and width as shown, without decoding pixels."""
    if isinstance(frame, str):
        try:
            with Image.open(frame) as image:
                return _image_hw(image)
        except READ_ERRORS as error:
            raise VidLLMInputError(f"{name}: not an image that can be read ({_short(error)})") from None
    if isinstance(frame, Image.Image):
        return _image_hw(frame)
    shape = tuple(getattr(frame, "shape", ()))
    if len(shape) == 3 and shape[-1] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        shape = shape[1:]
    if len(shape) not in (2, 3) or 0 in shape:
        raise VidLLMInputError(
            f"{name}: wanted an image or an array (height, width, 3); got {type(frame).__name__} {shape}"
        )
    return shape[0], shape[1]


def _image_hw(image: Image.Image) -> tuple[int, int]:
    """Size of a PIL image after its EXIF orientation, if the header holds one."""
    turned = "exif" in image.info and image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def _as_rgb(frame: Any, name: str) -> np.ndarray:
    """One frame as `(H, W, 3)`, uint8 or float32 in 0..1."""
    if isinstance(frame, str):
        try:
            with Image.open(frame) as image:
                image.load()
                return _rgb_from_image(image, name)
        except VidLLMInputError:
            raise
        except READ_ERRORS as error:
            raise VidLLMInputError(f"{name}: this image cannot be decoded ({_short(error)})") from None
    if isinstance(frame, Image.Image):
        return _rgb_from_image(frame, name)
    return _rgb_from_array(_as_numpy(frame), name)


def _rgb_from_image(image: Image.Image, name: str) -> np.ndarray:
    """Orientation, transparency (on white), grey, palettes and 16 bits to RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        values = np.asarray(image)
        if image.mode == "I":
            # PIL reads some 16-bit greys as 32-bit integers.
            values = np.clip(values, 0, 65535).astype(np.uint16)
        return _rgb_from_array(values, name)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.asarray(image.convert("RGB"))


def _rgb_from_array(array: np.ndarray, name: str) -> np.ndarray:
    """`(H, W)`, `(H, W, 1 | 3 | 4)` or channels first; uint8, wider integers or float in 0..1."""
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise VidLLMInputError(f"{name}: {int((~np.isfinite(array)).sum())} values are NaN or infinite")
        if array.min() < -1e-4 or array.max() > 1 + 1e-4:
            raise VidLLMInputError(
                f"{name}: wanted float pixels in 0..1 (or uint8 in 0..255); got {array.min():.4g}..{array.max():.4g}"
            )
        array, white = np.clip(array, 0, 1).astype(np.float32), np.float32(1)
    elif array.dtype == np.uint16:
        # 65535 = 257 * 255
        array, white = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8), 255
    elif np.issubdtype(array.dtype, np.integer):
        if array.min() < 0 or array.max() > 255:
            raise VidLLMInputError(f"{name}: wanted integer pixels in 0..255; got {array.min()}..{array.max()}")
        array, white = array.astype(np.uint8), 255
    else:
        raise VidLLMInputError(f"{name}: wanted pixels of type uint8 or float; got {array.dtype}")
    if array.shape[-1] == 1:
        return np.repeat(array, 3, axis=-1)
    if array.shape[-1] == 4:
        alpha = array[..., 3:].astype(np.float32) / white
        blended = array[..., :3] * alpha + white * (1 - alpha)
        return (np.round(blended) if white == 255 else blended).astype(array.dtype)
    return np.ascontiguousarray(array)


def _short(error: Exception) -> str:
    """First line of an error without its type, shortened."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
