"""Scenes that are a plain video or a folder of photographs: pictures only, no depth, no poses.

Shapes: F frames, H W pixels.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vidllm.processing.scenes.base import Frame, SceneReader
from vidllm.processing.scenes.cameras import find_annotation_from_scene
from vidllm.processing.video_reading_vidllm import VidLLMInputError, decode_video


VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class _CountedError(Exception):
    """Leaves a decoder as soon as it has counted the frames."""


class _PassReader(SceneReader):
    """A scene that one pass of a decoder reads: `frames` takes one pass for all frames asked for, `frame` one for each."""

    def __init__(self, path: str | Path, scene_id: str | None, data_root: str | Path | None):
        self.path = Path(path)
        scene_id = scene_id or self.path.stem
        num_frames, self._times_s = self._count()
        super().__init__(
            scene_id,
            str(self.path),
            range(num_frames),
            annotation_from_scene=find_annotation_from_scene(data_root, scene_id),
        )

    def frame(self, index: int, depth: bool = True) -> Frame:
        """Decode one frame; for several use `frames`, which reads the source once."""
        return self.frames([index], depth=depth)[0]

    def frames(self, indices: Sequence[int], depth: bool = True) -> list[Frame]:
        """Decode several frames in one pass. Returns them in the order asked for."""
        for index in indices:
            self._check_index(index)
        wanted = sorted(set(indices))
        kept, info = self._decode(lambda total, times: [index for index in wanted if index < total], _square_pixels)
        if len(kept) < len(wanted):
            raise VidLLMInputError(
                f"{self.source}: wanted frame {wanted[len(kept)]} of {len(self)} announced; only "
                f"{info['total_num_frames']} could be decoded"
            )
        times = info["timestamps_s"] or [None] * len(wanted)
        by_index = {
            index: Frame(rgb, None, None, None, None, self.frame_ids[index], time_s)
            for index, rgb, time_s in zip(wanted, kept, times, strict=True)
        }
        return [by_index[index] for index in indices]

    def _count(self) -> tuple[int, list[float] | None]:
        """Number of frames and their times, without decoding them."""
        counted: list = []

        def stop(total: int, times_s: list[float] | None) -> list[int]:
            counted[:] = [total, times_s]
            raise _CountedError

        with contextlib.suppress(_CountedError):
            self._decode(stop, _square_pixels)
        if not counted or not counted[0]:
            raise VidLLMInputError(f"{self.path}: no frame could be read")
        return counted[0], counted[1]

    def _decode(self, choose: Callable, convert: Callable) -> tuple[list[Any], dict[str, Any]]:
        """One pass over the source; see `decode_video`."""
        return decode_video(str(self.path), choose, convert)


class VideoReader(_PassReader):
    """A video file. Frames are decoded in one pass per call of `frames`.

    Args:
        path (`str` or `Path`): The file.
        scene_id (`str`, *optional*): The file's name without suffix if not given.
        data_root (`str` or `Path`, *optional*): Where to look for `<scene>.txt`.

    Raises:
        VidLLMInputError: Not a video, or no picture in it.

    Source:
        Ours: the package's own video reading.
    """

    def __init__(self, path: str | Path, scene_id: str | None = None, data_root: str | Path | None = None):
        super().__init__(path, scene_id, data_root)

    @classmethod
    def find(cls, data_root: Path, scene_id: str) -> Path | None:
        """Path of a scene's video below a data root, or None."""
        files = (data_root / "videos" / f"{scene_id}{suffix}" for suffix in VIDEO_SUFFIXES)
        return next((file for file in files if file.is_file()), None)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a path looks like a video file."""
        return path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES


class ImageFolderReader(_PassReader):
    """A folder of photographs in natural order; names that are decimal numbers are times in seconds.

    Args:
        path (`str` or `Path`): The folder.
        scene_id (`str`, *optional*): The folder's name if not given.
        data_root (`str` or `Path`, *optional*): Where to look for `<scene>.txt`.

    Raises:
        VidLLMInputError: No picture in the folder.

    Source:
        Ours: the package's own reading of photographs.
    """

    def __init__(self, path: str | Path, scene_id: str | None = None, data_root: str | Path | None = None):
        super().__init__(path, scene_id or Path(path).name, data_root)

    @classmethod
    def find(cls, data_root: Path, scene_id: str) -> Path | None:
        """Folder of a scene's photographs below a data root, or None."""
        folders = (data_root / "images" / scene_id, data_root / scene_id)
        return next((folder for folder in folders if cls.accepts(folder)), None)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a path is a folder with pictures in it."""
        return path.is_dir() and any(
            file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") for file in path.iterdir()
        )

    def _decode(self, choose: Callable, convert: Callable) -> tuple[list[Any], dict[str, Any]]:
        # Imports torch, which the other readers do without.
        from vidllm.processing.image_reading_vidllm import read_frames

        return read_frames(str(self.path), choose, convert)


def _square_pixels(rgb: np.ndarray, size_hw: tuple[int, int], name: str) -> np.ndarray:
    """A decoded picture as it is shown, uint8 of its own memory."""
    if rgb.shape[:2] != tuple(size_hw):
        return np.asarray(Image.fromarray(rgb).resize((size_hw[1], size_hw[0]), Image.Resampling.BILINEAR))
    return np.array(rgb)
