"""Frames without questions, for stage 1: clips of a folder, or of procedural rooms; visited in a fixed random order.

A visit depends on the seed and on its number alone, so that a run can go on where it stopped.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidllm.processing.scenes.base import SceneReader
from vidllm.processing.scenes.open import SCENE_FOLDERS, find_scenes, open_path, open_scene
from vidllm.processing.video_processing_vidllm import VidLLMVideoList
from vidllm.processing.video_reading_vidllm import VidLLMInputError, spread_indices
from vidllm.train.collator import keyed_generator
from vidllm.train.feature_folder import FrameKey, content_identity
from vidllm.train.room_source import RoomScenes, RoomSource


VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# Frames of a clip that are ever seen, unless a recipe says otherwise: twice what a visit of the paper takes.
FRAMES_KEPT = 64


@dataclass(frozen=True, eq=False)
class ClipFrames:
    """Some frames of a clip.

    Args:
        clip (`str`): Its name.
        indices (`list[int]`): Numbers of the frames, rising.
        rgb (`list[np.ndarray]`): Pictures `(H, W, 3)`, uint8.
        identity (`str`): `content_identity` of the clip; empty where it is not read from files.

    Source:
        Ours.
    """

    clip: str
    indices: list[int]
    rgb: list[np.ndarray]
    identity: str = ""


class ClipFolder:
    """The clips of a folder: videos and folders of pictures at any depth, or the scenes of a data root.

    Args:
        root (`str` or `Path`): The folder.
        frames_kept (`int`): Frames of a clip that are ever seen, spread evenly over it; 0 keeps all.

    Raises:
        ValueError: There is no clip.

    Source:
        Ours: whatever was filmed serves stage 1, which needs no labels.
    """

    def __init__(self, root: str | Path, frames_kept: int = FRAMES_KEPT):
        self.root, self.frames_kept = Path(root).expanduser(), frames_kept
        self._identities: dict[str, str] = {}
        if not self.root.is_dir():
            raise ValueError(f"clips: wanted a folder of videos; got {self.root}")
        if any((self.root / name).is_dir() for name in ("annotations", *SCENE_FOLDERS)):
            self.names = list(find_scenes(self.root))
            self._is_data_root = True
        else:
            self.names = sorted(_clips_below(self.root))
            self._is_data_root = False
        if not self.names:
            raise ValueError(f"clips: wanted videos or folders of pictures below {self.root}; found none")

    def __len__(self) -> int:
        return len(self.names)

    def reader(self, name: str) -> SceneReader:
        """Reader of a clip by its name."""
        return open_scene(self.root, name) if self._is_data_root else open_path(self.root / name)

    def identity(self, name: str, reader: SceneReader | None = None) -> str:
        """`content_identity` of a clip by its name; looked at once. A reader saves opening another one."""
        if name not in self._identities:
            path = self.root / name if not self._is_data_root else Path((reader or self.reader(name)).source)
            self._identities[name] = content_identity(path)
        return self._identities[name]

    def kept(self, reader: SceneReader) -> list[int]:
        """Numbers of the frames of a clip that are ever seen."""
        total = len(reader)
        return (
            list(range(total))
            if not self.frames_kept or total <= self.frames_kept
            else spread_indices(total, self.frames_kept)
        )


def _clips_below(root: Path) -> Iterator[str]:
    """Names, relative to a folder, of the videos below it and of the folders that hold pictures."""
    for folder, _, files in os.walk(root):
        lower = [name.lower() for name in files]
        if folder != str(root) and any(name.endswith(IMAGE_SUFFIXES) for name in lower):
            yield str(Path(folder).relative_to(root))
        for name in files:
            if name.lower().endswith(VIDEO_SUFFIXES):
                yield str((Path(folder) / name).relative_to(root))


class ClipVisits(torch.utils.data.Dataset):
    """Visits of the clips of a folder: every clip once before one comes twice, frames at random among the kept ones.

    Args:
        clips (`ClipFolder`): The clips.
        num_visits (`int`): Length.
        num_frames (`int`): Frames per visit, one at random of each of as many stretches.
        seed (`int`): Of everything that is drawn.

    Source:
        Ours.
    """

    def __init__(self, clips: ClipFolder, num_visits: int, num_frames: int, seed: int = 0):
        self.clips, self.num_visits, self.num_frames, self.seed = clips, num_visits, num_frames, seed

    def __len__(self) -> int:
        return self.num_visits

    def __getitem__(self, visit: int) -> ClipFrames:
        epoch, place = divmod(visit, len(self.clips))
        order = keyed_generator(self.seed, epoch, "clips").permutation(len(self.clips))
        name = self.clips.names[int(order[place])]
        reader = self.clips.reader(name)
        kept = self.clips.kept(reader)
        count = min(self.num_frames, len(kept))
        edges = np.arange(count + 1) * len(kept) // count
        rng = keyed_generator(self.seed, epoch, "frames", name)
        indices = [kept[int(n)] for n in edges[:-1] + np.floor(rng.random(count) * np.diff(edges)).astype(int)]
        rgb = [frame.rgb for frame in reader.frames(indices, depth=False)]
        return ClipFrames(name, indices, rgb, self.clips.identity(name, reader))


class RoomClips(torch.utils.data.Dataset):
    """Visits of procedural rooms without their prompts.

    Args:
        source (`RoomSource`): The rooms.
        num_visits (`int`): Length.
        num_frames (`int`): Frames per visit.
        seed (`int`): Of everything that is drawn.
        each_once (`bool`): As of `RoomScenes`.

    Source:
        Ours.
    """

    def __init__(self, source: RoomSource, num_visits: int, num_frames: int, seed: int = 0, each_once: bool = False):
        self.scenes = RoomScenes(source, num_visits, num_frames, 0, seed, each_once)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, visit: int) -> ClipFrames:
        frames = self.scenes[visit].frames
        return ClipFrames(frames.scene_id, list(frames.indices), list(frames.rgb))


class ClipCollator:
    """Batches of clips.

    Args:
        processor (`VidLLMProcessor`): Of the student.

    Source:
        Ours.
    """

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, clips: Sequence[ClipFrames]) -> dict[str, Any]:
        """Make a batch.

        Args:
            clips (`Sequence[ClipFrames]`): At least one.

        Returns:
            `dict`: `pixel_values_videos (B, S, 3, H, W)` float32, `video_size_shw (B, 3)` int64, `frame_keys` (a list of `FrameKey` per
            clip), `sample_ids`.

        Raises:
            VidLLMInputError: No clip.

        Source:
            Ours.
        """
        if not clips:
            raise VidLLMInputError("clips: wanted at least one; got none")
        videos = self.processor.video_processor(
            VidLLMVideoList([clip.rgb for clip in clips]), do_sample_frames=False, return_tensors="pt"
        )
        return {
            "pixel_values_videos": videos["pixel_values_videos"],
            "video_size_shw": videos["video_size_shw"],
            "frame_keys": [[FrameKey(clip.clip, index, clip.identity) for index in clip.indices] for clip in clips],
            "sample_ids": [f"{clip.clip}:{','.join(map(str, clip.indices))}" for clip in clips],
        }


__all__ = ["FRAMES_KEPT", "ClipCollator", "ClipFolder", "ClipFrames", "ClipVisits", "RoomClips"]
