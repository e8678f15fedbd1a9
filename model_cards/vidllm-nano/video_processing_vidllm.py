"""From a video to `pixel_values_videos`: sampling, resize, crop, normalisation, packing of a ragged batch.

Shapes: B videos, S frames, H W pixels after the crop.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import VideosKwargs

from .image_reading_vidllm import is_image_path, read_frames
from .video_reading_vidllm import VidLLMInputError, choose_frames


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_NUM_FRAMES = 32
MAX_ASPECT = 20


class VidLLMVideosKwargs(VideosKwargs, total=False):
    """Arguments of `VidLLMVideoProcessor.__call__` beyond those that transformers knows.

    Args:
        patch_size (`int`): Both sides are cropped to multiples of it.

    Source:
        Upstream: huggingface/transformers `VideosKwargs`. Ours: the field.
    """

    patch_size: int | None


def resize_plan(
    source_hw: Sequence[int], size: dict[str, int], patch_size: int
) -> tuple[tuple[int, int], int, int, tuple[int, int]]:
    """How a frame of a given size is brought to the model: resize, then centre crop. Frames, depth and intrinsics share it.

    Args:
        source_hw (`tuple[int, int]`): Height and width of the upright source frame, pixels.
        size (`dict`): `shortest_edge` in pixels; optionally `longest_edge`, a bound that wins over it.
        patch_size (`int`): Both output sides are multiples of it.

    Returns:
        `tuple`: `resized_hw`, `crop_top`, `crop_left`, `out_hw`, all in pixels.

    Raises:
        VidLLMInputError: The frame is too small or too narrow to hold one patch.

    Source:
        Paper: implementation details (shorter side 518, sides cropped to multiples of 14). Ours: the crop is centred.
    """
    height, width = source_hw
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise VidLLMInputError(
            f"frame: wanted sides that differ at most {MAX_ASPECT} times; got {width}x{height} pixels"
        )
    factor = size["shortest_edge"] / min(height, width)
    if size.get("longest_edge"):
        factor = min(factor, size["longest_edge"] / max(height, width))
    resized_hw = tuple(max(1, math.floor(side * factor + 0.5)) for side in (height, width))
    out_hw = tuple(side // patch_size * patch_size for side in resized_hw)
    if 0 in out_hw:
        raise VidLLMInputError(
            f"frame: {width}x{height} pixels become {resized_hw[1]}x{resized_hw[0]}, less than one patch of {patch_size}"
        )
    return resized_hw, (resized_hw[0] - out_hw[0]) // 2, (resized_hw[1] - out_hw[1]) // 2, out_hw


def resize_frame(rgb: np.ndarray, resized_hw: tuple[int, int]) -> torch.Tensor:
    """Bicubic resize with antialiasing of one frame.

    Args:
        rgb (`numpy.ndarray` of shape `(height, width, 3)`, uint8 or float32): Pixels, 0..255 or 0..1.
        resized_hw (`tuple[int, int]`): Wanted height and width.

    Returns:
        `torch.Tensor` of shape `(3, *resized_hw)`: float32 in 0..1.

    Source:
        Ours: channel by channel, because a frame of 8K video in float32 would take 400 MB at once.
    """
    unit = 255.0 if rgb.dtype == np.uint8 else 1.0
    channels = []
    for channel in range(3):
        plane = torch.from_numpy(np.ascontiguousarray(rgb[..., channel])).to(torch.float32)
        if tuple(plane.shape) != tuple(resized_hw):
            plane = nn.functional.interpolate(
                plane[None, None], size=tuple(resized_hw), mode="bicubic", antialias=True, align_corners=False
            )[0, 0]
        channels.append(plane)
    return (torch.stack(channels) / unit).clamp_(0, 1)


class VidLLMVideoProcessor(ImageProcessingMixin):
    """Reads videos and brings them to the encoder's form.

    Needs no torchvision: it stands in a processor's `image_processor` slot, and `VidLLMProcessor.video_processor` returns it.
    A video is a path (video file, folder of photographs, one photograph), a list of photograph paths, PIL images or arrays, or
    one array `(S, H, W, 3)` or `(S, 3, H, W)`; see `read_frames`.

    Args:
        num_frames (`int`, *optional*): Frames per video, spread evenly, last one included; videos with fewer give all. Default 32.
        fps (`float`, *optional*): Frames per second instead of `num_frames`.
        do_sample_frames (`bool`): False keeps all frames.
        size (`dict`, *optional*): `shortest_edge` in pixels, default 518; optionally `longest_edge`, a bound.
        patch_size (`int`): Both sides are centre-cropped to multiples of the encoder's patch size.
        image_mean (`list[float]`, *optional*): Mean of the encoder's input per channel, default ImageNet.
        image_std (`list[float]`, *optional*): Standard deviation of the encoder's input per channel, default ImageNet.

    Raises:
        ValueError: `num_frames` and `fps` are both given, or a value is out of range.

    Source:
        Paper: implementation details (32 frames, shorter side 518). Ours: the rest.
    """

    _auto_class = "AutoImageProcessor"
    model_input_names = ["pixel_values_videos", "video_size_shw"]
    valid_kwargs = VidLLMVideosKwargs

    def __init__(
        self,
        num_frames: int | None = None,
        fps: float | None = None,
        do_sample_frames: bool = True,
        size: dict[str, int] | None = None,
        patch_size: int = 14,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if num_frames is None and fps is None:
            num_frames = DEFAULT_NUM_FRAMES
        self.num_frames = num_frames
        self.fps = fps
        self.do_sample_frames = do_sample_frames
        self.size = {"shortest_edge": 518} if size is None else _checked_size(size)
        self.patch_size = patch_size
        self.image_mean = list(IMAGENET_MEAN if image_mean is None else image_mean)
        self.image_std = list(IMAGENET_STD if image_std is None else image_std)
        _check_sampling(num_frames, fps)
        if patch_size < 1 or len(self.image_mean) != 3 or len(self.image_std) != 3 or not min(self.image_std) > 0:
            raise ValueError(
                "video processor: wanted patch_size >= 1, three values of image_mean and three positive ones of image_std; got "
                f"{patch_size}, {self.image_mean}, {self.image_std}"
            )

    def __call__(self, videos: Any, **kwargs) -> BatchFeature:
        """Same as `preprocess`."""
        return self.preprocess(videos, **kwargs)

    def preprocess(
        self,
        videos: Any,
        num_frames: int | None = None,
        fps: float | None = None,
        do_sample_frames: bool | None = None,
        size: dict[str, int] | int | None = None,
        patch_size: int | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        return_metadata: bool | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Read, sample, resize, crop, normalise and pack one or several videos.

        Args:
            videos: One video or a list of videos. A flat list of photographs (paths, images, arrays) is one video.
            num_frames (`int`, *optional*): Overrides the processor's.
            fps (`float`, *optional*): Overrides the processor's; excludes `num_frames`.
            do_sample_frames (`bool`, *optional*): Overrides the processor's.
            size (`dict` or `int`, *optional*): Overrides the processor's; a number means `shortest_edge`.
            patch_size (`int`, *optional*): Overrides the processor's.
            image_mean (`list[float]`, *optional*): Overrides the processor's.
            image_std (`list[float]`, *optional*): Overrides the processor's.
            return_metadata (`bool`, *optional*): Whether the result holds `video_metadata`. It is an attribute of the result either
                way.
            return_tensors (`str`, *optional*): `pt` or `np`; tensors are torch's if not given.
            **kwargs: Refused, unless None: what this processor does not do must not be asked for in silence.

        Returns:
            `BatchFeature`:
            - pixel_values_videos (`torch.Tensor` of shape `(videos, frames, 3, height, width)`): normalised; smaller or shorter
              videos are padded with zeros at the end, the bottom and the right.
            - video_size_shw (`torch.Tensor` of shape `(videos, 3)`, int64): frames, height, width in pixels before padding.
            - video_metadata (`list[dict]`): per video `source`, `total_num_frames`, `frames_indices` (of the sampled frames in the
              source), `timestamps_s` (seconds since the first frame, or what the file names say; None if unknown), `fps`,
              `duration`, `frame_names` (of photographs), `height`, `width` (upright source frame, square pixels), and the
              plan `resized_hw`, `crop_top_left`, `out_hw`.

        Raises:
            VidLLMInputError: A video cannot be read; see `read_frames`.

        Source:
            Ours: frames are resized one by one as they are decoded, so that memory holds no frame at source size.
        """
        unknown = sorted(key for key, value in kwargs.items() if value is not None)
        if unknown:
            raise ValueError(f"video processor: unknown argument {', '.join(unknown)}")
        _check_sampling(num_frames, fps)
        if num_frames is None and fps is None:
            num_frames, fps = self.num_frames, self.fps
        if not (self.do_sample_frames if do_sample_frames is None else do_sample_frames):
            num_frames = fps = None
        size = self.size if size is None else _checked_size(size)
        patch_size = self.patch_size if patch_size is None else patch_size
        mean = torch.tensor(list(self.image_mean if image_mean is None else image_mean)).view(3, 1, 1)
        std = torch.tensor(list(self.image_std if image_std is None else image_std)).view(3, 1, 1)

        def choose(num_source_frames: int, times_s: list[float] | None) -> list[int]:
            return choose_frames(num_source_frames, times_s, num_frames, fps)

        videos_pixels, metadata = [], []
        for source in split_videos(videos):
            pixels, info = _read_video(source, choose, size, patch_size)
            for frame in pixels:
                frame.sub_(mean).div_(std)
            videos_pixels.append(pixels)
            metadata.append(info)
        sizes = [(len(pixels), *pixels[0].shape[1:]) for pixels in videos_pixels]
        largest = [max(side) for side in zip(*sizes, strict=True)]
        packed = torch.zeros(len(sizes), largest[0], 3, largest[1], largest[2])
        for row, (pixels, (_, height, width)) in enumerate(zip(videos_pixels, sizes, strict=True)):
            for position in range(len(pixels)):
                packed[row, position, :, :height, :width] = pixels[position]
                pixels[position] = None
        data = {"pixel_values_videos": packed, "video_size_shw": torch.tensor(sizes, dtype=torch.int64)}
        if return_metadata:
            data["video_metadata"] = metadata
        batch = BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["video_metadata"])
        batch.video_metadata = metadata
        return batch

    def denormalize(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Pixels as people see them.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(..., 3, height, width)`): Normalised by this processor.

        Returns:
            `torch.Tensor` of shape `(..., height, width, 3)`, uint8: RGB.

        Source:
            Ours: for pictures with boxes drawn on them.
        """
        pixels = pixel_values_videos.detach().float().cpu()
        pixels = pixels * torch.tensor(self.image_std).view(3, 1, 1) + torch.tensor(self.image_mean).view(3, 1, 1)
        # (..., 3, height, width) -> (..., height, width, 3)
        return (pixels * 255).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


class VidLLMVideoList(list):
    """A list with exactly one entry per video, so that a list of two photographs cannot be taken for one video of two frames.

    Source:
        Ours: chats name their videos one by one.
    """

    is_video_list = True


def split_videos(videos: Any) -> VidLLMVideoList:
    """Whether one video was given or several.

    Args:
        videos: One video, or a list of videos. A flat list of photograph paths, PIL images or single frames is one video; a list
            of other paths, of lists, or of arrays with four axes is several; an array with five axes too.

    Returns:
        `VidLLMVideoList`: One entry per video.

    Raises:
        VidLLMInputError: There is none.

    Source:
        Ours: like transformers, save that a flat list of photograph paths is one video.
    """
    if getattr(videos, "is_video_list", False):
        return videos
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim == 5:
        return VidLLMVideoList(videos)
    if not isinstance(videos, (list, tuple)):
        return VidLLMVideoList([videos])
    if len(videos) == 0:
        raise VidLLMInputError("videos: wanted at least one video; got an empty list")
    if all(_is_frame(item) for item in videos):
        return VidLLMVideoList([videos])
    return VidLLMVideoList(
        video for item in videos for video in (split_videos(item) if isinstance(item, (list, tuple)) else [item])
    )


def _is_frame(item: Any) -> bool:
    """Whether an entry of a list is one frame rather than one video."""
    return isinstance(item, Image.Image) or is_image_path(item) or getattr(item, "ndim", 0) in (2, 3)


def _read_video(source: Any, choose: Callable, size: dict[str, int], patch_size: int) -> tuple[list, dict[str, Any]]:
    """Frames of one video, resized and cropped, float32 in 0..1, and its metadata."""
    first_hw, plan, other_sizes = None, None, []

    def convert(rgb: np.ndarray, size_hw: tuple[int, int], name: str) -> torch.Tensor:
        nonlocal first_hw, plan
        if first_hw is None:
            first_hw, plan = tuple(size_hw), resize_plan(size_hw, size, patch_size)
        elif tuple(size_hw) != first_hw:
            rgb = _crop_to_aspect(rgb, size_hw, first_hw, name)
            other_sizes.append(f"{name} is {size_hw[1]}x{size_hw[0]}")
        resized_hw, top, left, out_hw = plan
        return resize_frame(rgb, resized_hw)[:, top : top + out_hw[0], left : left + out_hw[1]].clone()

    pixels, metadata = read_frames(source, choose, convert)
    name = metadata["source"]
    if other_sizes:
        warnings.warn(
            f"{name}: frames of different size are cropped to the first one's {first_hw[1]}x{first_hw[0]} pixels "
            f"({len(other_sizes)} of {len(pixels)}; {other_sizes[0]})",
            stacklevel=4,
        )
    if len(pixels) == 1:
        warnings.warn(f"{name}: one frame only; geometry needs motion, so expect a poor reconstruction", stacklevel=4)
    resized_hw, top, left, out_hw = plan
    return pixels, {
        **metadata,
        "height": int(first_hw[0]),
        "width": int(first_hw[1]),
        "resized_hw": tuple(resized_hw),
        "crop_top_left": (top, left),
        "out_hw": tuple(out_hw),
    }


def _crop_to_aspect(rgb: np.ndarray, size_hw: tuple[int, int], first_hw: tuple[int, int], name: str) -> np.ndarray:
    """Centre region with the first frame's aspect; resizing it is what cover-resize and centre crop would give."""
    height, width = size_hw
    if (height - width) * (first_hw[0] - first_hw[1]) < 0:
        raise VidLLMInputError(
            f"{name}: wanted frames of one orientation; this one is {width}x{height}, the first one {first_hw[1]}x{first_hw[0]}"
        )
    factor = min(height / first_hw[0], width / first_hw[1])
    # Stored pixels need not be square, so the kept share of each side counts.
    keep_h = max(1, round(rgb.shape[0] * first_hw[0] * factor / height))
    keep_w = max(1, round(rgb.shape[1] * first_hw[1] * factor / width))
    top, left = (rgb.shape[0] - keep_h) // 2, (rgb.shape[1] - keep_w) // 2
    return rgb[top : top + keep_h, left : left + keep_w]


def _checked_size(size: Any) -> dict[str, int]:
    """`{"shortest_edge": ..}` from a number or a mapping."""
    sizes = (
        {"shortest_edge": size} if isinstance(size, int) else {k: v for k, v in dict(size).items() if v is not None}
    )
    if "shortest_edge" not in sizes or set(sizes) - {"shortest_edge", "longest_edge"} or min(sizes.values()) < 1:
        raise ValueError(f"size: wanted shortest_edge (and longest_edge, if bounded) in pixels; got {size}")
    return {key: int(value) for key, value in sizes.items()}


def _check_sampling(num_frames: int | None, fps: float | None) -> None:
    """`num_frames` and `fps` exclude each other; both are positive."""
    if num_frames is not None and fps is not None:
        raise ValueError(f"sampling: wanted num_frames or fps, not both; got {num_frames} and {fps}")
    if (num_frames is not None and num_frames < 1) or (fps is not None and not fps > 0):
        raise ValueError(f"sampling: wanted a positive number; got num_frames={num_frames}, fps={fps}")


__all__ = ["VidLLMInputError", "VidLLMVideoProcessor", "VidLLMVideosKwargs", "resize_frame", "resize_plan"]
