"""Frozen teachers of stage 1: features of patches from any vision model of transformers, or from a folder where they were written before.

Shapes: F frames, H W pixels, h w patch grid of the teacher, C teacher width.
"""

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.encoder_vidllm import VidLLMEncoder
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.train.feature_folder import FeatureFacts, FeatureFolder, FeatureWriter, FrameKey, is_feature_folder
from vidllm.train.presets import IMAGENET_MEAN, IMAGENET_STD


STREAMS = ("encoder", "geometry", "language")


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
                self.encoder = encoder_of(AutoModel.from_pretrained(folder))
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
        height, width = nearest_size(self.encoder, *frames_rgb.shape[-2:])
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


def nearest_size(encoder: VidLLMEncoder, height: int, width: int) -> tuple[int, int]:
    """Size of frames that an encoder takes, nearest to what is given.

    Args:
        encoder (`VidLLMEncoder`): The encoder.
        height (`int`): Pixels.
        width (`int`): Pixels.

    Returns:
        `tuple[int, int]`: multiples of its patch, at least one.

    Source:
        Ours.
    """
    rows, columns = encoder.patch_hw
    return max(1, round(height / rows)) * rows, max(1, round(width / columns)) * columns


def encoder_of(model: nn.Module) -> VidLLMEncoder:
    """Any vision model of transformers, or the one that a model holds, behind the encoder's interface.

    Args:
        model (`nn.Module`): Such as a CLIP.

    Returns:
        `VidLLMEncoder`: with the model's weights.

    Raises:
        ValueError: The model does not hold the tensors that its vision config says.

    Source:
        Ours.
    """
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
    if is_feature_folder(place):
        return FeatureFolder(place)
    return VisionTeacher(place, stream).to(device)


__all__ = [
    "FeatureFacts",
    "FeatureFolder",
    "FeatureWriter",
    "FrameKey",
    "Teacher",
    "VisionTeacher",
    "encoder_of",
    "nearest_size",
    "open_teacher",
]
