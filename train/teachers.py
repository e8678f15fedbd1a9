"""Frozen teachers of stage 1: features of patches from any vision model of transformers, or from a folder where they were written before.

Shapes: F frames, H W pixels, h w patch grid of the teacher, C teacher width.
"""

import hashlib
import json
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.encoder_vidllm import VidLLMEncoder
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.train.presets import IMAGENET_MEAN, IMAGENET_STD


MANIFEST_NAME = "manifest.json"
STREAMS = ("encoder", "geometry", "language")


@dataclass(frozen=True)
class FrameKey:
    """Which frame of which clip.

    Args:
        clip (`str`): Name of the clip.
        index (`int`): Number of the frame in it.

    Source:
        Ours.
    """

    clip: str
    index: int


class Teacher(Protocol):
    """Gives features of frames.

    Args:
        width (`int`): C.

    Source:
        Ours.
    """

    width: int

    def features(self, frames_rgb: torch.Tensor, keys: Sequence[FrameKey]) -> tuple[torch.Tensor, tuple[int, int]]:
        """Features `(F, h * w, C)` of frames `(F, 3, H, W)` in 0..1, and their grid (rows, columns)."""


class VisionTeacher(nn.Module):
    """A vision model of transformers, or the encoder of a Vid-LLM checkpoint, frozen.

    Args:
        place (`str`): Hub id or folder: a vision model, a model that holds one (CLIP, SigLIP), or a Vid-LLM checkpoint.
        stream (`str`): Of a Vid-LLM checkpoint: `encoder` (VGGT's patch encoder where it came from there), `geometry` or `language` (after its
            adapter, frame by frame).

    Raises:
        ValueError: There is no such model, or it gives no patch tokens.

    Source:
        Paper: teachers are frozen encoders. Ours: any of them.
    """

    def __init__(self, place: str, stream: str = "encoder"):
        super().__init__()
        if stream not in STREAMS:
            raise ValueError(f"teacher {place}: wanted a stream of {', '.join(STREAMS)}; got {stream!r}")
        self.place, self.stream = place, stream
        AutoConfig.register(VidLLMConfig.model_type, VidLLMConfig, exist_ok=True)
        folder = str(Path(place).expanduser()) if Path(place).expanduser().is_dir() else place
        try:
            config = AutoConfig.from_pretrained(folder)
            self.adapter = None
            if config.model_type == VidLLMConfig.model_type:
                whole = VidLLMForConditionalGeneration.from_pretrained(folder)
                self.encoder = whole.model.encoder
                self.adapter = None if stream == "encoder" else whole.model.adapter
                videos = VidLLMProcessor.from_pretrained(folder).video_processor
                mean, std = videos.image_mean, videos.image_std
            else:
                if stream != "encoder":
                    raise ValueError(f"stream {stream!r} is of Vid-LLM checkpoints alone")
                self.encoder = _wrapped(AutoModel.from_pretrained(folder))
                mean, std = _pixels_of(folder)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"teacher {place}: wanted a vision model of transformers; {reason}") from error
        self.width = self.encoder.model.config.hidden_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "VisionTeacher":
        """Stays in evaluation mode.

        Args:
            mode (`bool`): Not read.

        Returns:
            `VisionTeacher`: itself.
        """
        return super().train(False)

    @torch.no_grad()
    def features(self, frames_rgb: torch.Tensor, keys: Sequence[FrameKey]) -> tuple[torch.Tensor, tuple[int, int]]:
        """Features of frames.

        Args:
            frames_rgb (`torch.Tensor` of shape `(F, 3, H, W)`): In 0..1.
            keys (`Sequence[FrameKey]`): Not read.

        Returns:
            `tuple`: `torch.Tensor` of shape `(F, h * w, C)`, float32; rows and columns. Frames are resized to the multiples of the
            patch size that are nearest.
        """
        height, width = self._size(*frames_rgb.shape[-2:])
        if (height, width) != tuple(frames_rgb.shape[-2:]):
            frames_rgb = nn.functional.interpolate(
                frames_rgb, (height, width), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        pixels = ((frames_rgb - self.mean) / self.std).to(next(self.encoder.parameters()).dtype)
        tokens = self.encoder(pixels, return_layers=False).patch_tokens
        if self.adapter is not None:
            streams = self.adapter(tokens.unsqueeze(1), tokens.unsqueeze(1))
            tokens = streams[STREAMS.index(self.stream) - 1].squeeze(1)
        return tokens.float(), self.encoder.grid_hw(height, width)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Size that the model takes, nearest to what is given."""
        rows, columns = self.encoder.patch_hw
        return max(1, round(height / rows)) * rows, max(1, round(width / columns)) * columns


def _wrapped(model: nn.Module) -> VidLLMEncoder:
    """Any vision model behind the encoder's interface."""
    vision = getattr(model, "vision_model", model)
    config = types.SimpleNamespace(vision_config=vision.config, metric_depth_layers=[0], encoder_frame_chunk=8)
    encoder = VidLLMEncoder(config)
    wanted = encoder.model
    missing, unexpected = wanted.load_state_dict(vision.state_dict(), strict=False)
    if missing or unexpected:
        raise ValueError(
            f"{type(vision).__name__} does not hold the tensors of {type(wanted).__name__} ({(missing + unexpected)[0]})"
        )
    return encoder


def _pixels_of(folder: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of what a model's image processor makes; ImageNet's where it has none."""
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError):
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    return (IMAGENET_MEAN, IMAGENET_STD) if mean is None or std is None else (tuple(mean), tuple(std))


# ---------------------------------------------------------------------- features on disk


@dataclass(frozen=True)
class FeatureFacts:
    """What a folder of features was made of; a folder made of something else is refused.

    Args:
        teacher (`str`): Place of the model.
        stream (`str`): See `VisionTeacher`.
        width (`int`): C.
        size_hw (`tuple[int, int]`, *optional*): Height and width of the frames, if they are all of one size.
        frames_kept (`int`): Frames per clip.

    Source:
        Ours.
    """

    teacher: str
    stream: str
    width: int
    size_hw: tuple[int, int] | None
    frames_kept: int


class FeatureFolder:
    """Features that were computed once: one safetensors file per clip, and a manifest; a `Teacher`.

    Args:
        folder (`str` or `Path`): Existing, complete.

    Raises:
        ValueError: There is no manifest, or it is not of this package.

    Source:
        Ours.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        path = self.folder / MANIFEST_NAME
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            self.facts = FeatureFacts(**document["facts"])
            self.clips: Mapping[str, str] = document["clips"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"features: wanted {path} as `vidllm train precompute` writes it; {error}") from error
        self.width = self.facts.width

    def features(self, frames_rgb: torch.Tensor, keys: Sequence[FrameKey]) -> tuple[torch.Tensor, tuple[int, int]]:
        """Features of frames.

        Args:
            frames_rgb (`torch.Tensor` of shape `(F, 3, H, W)`): Read for its device and size.
            keys (`Sequence[FrameKey]`): Which frames these are.

        Returns:
            `tuple`: `torch.Tensor` of shape `(F, h * w, C)`, float32; rows and columns.

        Raises:
            ValueError: A frame is not there, or frames of other sizes were written.

        Source:
            Ours.
        """
        rows, grids = [], set()
        for key in keys:
            if key.clip not in self.clips:
                raise ValueError(f"features: {self.folder} holds nothing of the clip {key.clip}")
            with safe_open(self.folder / self.clips[key.clip], "pt") as file:
                indices = file.get_tensor("indices").tolist()
                grid, size = (tuple(file.get_tensor(name).tolist()) for name in ("grid_hw", "size_hw"))
                if key.index not in indices:
                    raise ValueError(
                        f"features: {self.folder} holds the frames {indices} of {key.clip}; wanted {key.index}"
                    )
                if size != tuple(frames_rgb.shape[-2:]):
                    raise ValueError(
                        f"features: {key.clip}: wanted features of frames of {tuple(frames_rgb.shape[-2:])}; got those of {size}"
                    )
                rows.append(file.get_slice("features")[indices.index(key.index)])
                grids.add(grid)
        if len(grids) != 1:
            raise ValueError(f"features: wanted frames of one grid; got {sorted(grids)}")
        return torch.stack(rows).float().to(frames_rgb.device), grids.pop()


class FeatureWriter:
    """Writes features clip by clip; a run that was killed goes on where it stopped.

    Args:
        folder (`str` or `Path`): New, or of a run with the same facts.
        facts (`FeatureFacts`): What is written.

    Raises:
        ValueError: The folder holds features of something else.

    Source:
        Ours.
    """

    def __init__(self, folder: str | Path, facts: FeatureFacts):
        self.folder, self.facts = Path(folder).expanduser(), facts
        self.clips: dict[str, str] = {}
        path = self.folder / MANIFEST_NAME
        if path.is_file():
            before = FeatureFolder(self.folder)
            known = (
                before.facts
                if before.facts.size_hw is None
                else FeatureFacts(**{**asdict(before.facts), "size_hw": tuple(before.facts.size_hw)})
            )
            if known != facts:
                raise ValueError(f"features: {self.folder} holds those of {known}; wanted {facts}")
            self.clips = dict(before.clips)
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"features: wanted a new folder or one with features; got {self.folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_manifest()

    def __contains__(self, clip: str) -> bool:
        """Whether a clip was written whole."""
        if clip not in self.clips:
            return False
        try:
            with safe_open(self.folder / self.clips[clip], "pt"):
                return True
        except (SafetensorError, OSError):
            return False

    def write(
        self,
        clip: str,
        indices: Sequence[int],
        features: torch.Tensor,
        grid_hw: tuple[int, int],
        size_hw: tuple[int, int],
    ) -> None:
        """Write the features of a clip's frames.

        Args:
            clip (`str`): Its name.
            indices (`Sequence[int]`): Numbers of the frames.
            features (`torch.Tensor` of shape `(F, h * w, C)`): Stored as float16.
            grid_hw (`tuple[int, int]`): Rows and columns.
            size_hw (`tuple[int, int]`): Height and width of the frames, pixels.
        """
        name = f"features-{hashlib.sha256(clip.encode()).hexdigest()[:20]}.safetensors"
        part = self.folder / f"{name}.part"
        save_file(
            {
                "features": features.to("cpu", torch.float16).contiguous(),
                "indices": torch.tensor(list(indices)),
                "grid_hw": torch.tensor(grid_hw),
                "size_hw": torch.tensor(size_hw),
            },
            part,
        )
        os.replace(part, self.folder / name)
        self.clips[clip] = name
        self._write_manifest()

    def _write_manifest(self) -> None:
        """Appears whole or not at all."""
        document = {"facts": asdict(self.facts), "clips": self.clips}
        part = self.folder / f"{MANIFEST_NAME}.part"
        part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.folder / MANIFEST_NAME)


def open_teacher(place: str, stream: str = "encoder", device: Any = "cpu") -> Teacher:
    """A teacher by its place: a folder of features, or a model.

    Args:
        place (`str`): See `FeatureFolder` and `VisionTeacher`.
        stream (`str`): See `VisionTeacher`; of features it is fixed.
        device (`torch.device`): Where a model runs.

    Returns:
        `Teacher`

    Raises:
        ValueError: It is neither.

    Source:
        Ours.
    """
    if (Path(place).expanduser() / MANIFEST_NAME).is_file():
        return FeatureFolder(place)
    return VisionTeacher(place, stream).to(device)


__all__ = [
    "FeatureFacts",
    "FeatureFolder",
    "FeatureWriter",
    "FrameKey",
    "Teacher",
    "VisionTeacher",
    "open_teacher",
]
