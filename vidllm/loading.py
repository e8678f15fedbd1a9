"""From a checkpoint and a video to a model and an encoded scene: what every command starts with.

Heavy libraries are imported on first use, so that `vidllm --help` stays quick.

Shapes: S frames, H W pixels.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch
    from transformers.feature_extraction_utils import BatchFeature

    from vidllm import VidLLMForConditionalGeneration, VidLLMProcessor, VidLLMScene

HOW_TO_MAKE_ONE = "`vidllm init vidllm-nano --out DIR` makes one with untrained weights"


def check_model(model: str | Path | None) -> str:
    """Say what is wrong with a checkpoint before anything heavy is imported.

    Args:
        model (`str` or `Path`, *optional*): Folder or Hub id.

    Returns:
        `str`: the folder with `~` expanded, or the Hub id.

    Raises:
        ValueError: None is given, or the folder is missing, is no checkpoint of this package, or holds no weights.

    Source:
        Ours: transformers' own messages speak of the Hub when a local folder is meant.
    """
    if model is None or not str(model).strip():
        raise ValueError(f"--model: wanted a checkpoint folder or a Hub id; got none ({HOW_TO_MAKE_ONE})")
    name = os.path.expanduser(str(model))
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"model {name}: wanted a folder or a Hub id; got a file")
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            raise ValueError(f"model {name}: no such folder, and not a Hub id like owner/name ({HOW_TO_MAKE_ONE})")
        return name
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"model {name}: no config.json in this folder; wanted a checkpoint ({HOW_TO_MAKE_ONE})")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model {name}: config.json is not a model's config ({error!r})") from error
    if model_type != "vidllm":
        raise ValueError(f"model {name}: wanted a checkpoint of type 'vidllm'; config.json says {model_type!r}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"model {name}: no weights (*.safetensors) in this folder; was the checkpoint copied whole?")
    missing = [file for file in ("processor_config.json", "tokenizer_config.json") if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"model {name}: no {' and no '.join(missing)} in this folder; was the checkpoint copied whole?"
        )
    return name


def choose_device(device: str | None = None) -> "torch.device":
    """Where the model runs.

    Args:
        device (`str`, *optional*): As torch names them; by default the first CUDA device if there is one, else the CPU.

    Returns:
        `torch.device`.

    Raises:
        ValueError: There is no such device.

    Source:
        Ours.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: not available here ({str(error).splitlines()[0]})") from error
    return chosen


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch transformers' progress bars off for a while; they are as they were afterwards.

    Source:
        Ours: they would run through a command's own messages.
    """
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def load_processor(model: str | Path | None) -> "VidLLMProcessor":
    """Load the processor alone: enough to find out that a video is unusable.

    Args:
        model (`str` or `Path`): Checkpoint folder or Hub id.

    Returns:
        `VidLLMProcessor`.

    Raises:
        ValueError: See `check_model`; or the files cannot be read.

    Source:
        Ours.
    """
    name = check_model(model)
    from vidllm import VidLLMProcessor

    return _loaded(name, VidLLMProcessor.from_pretrained)


def load_model(model: str | Path | None, device: str | None = None) -> "VidLLMForConditionalGeneration":
    """Load the model in evaluation mode.

    Args:
        model (`str` or `Path`): Checkpoint folder or Hub id.
        device (`str`, *optional*): See `choose_device`.

    Returns:
        `VidLLMForConditionalGeneration`.

    Raises:
        ValueError: See `check_model`; or the files cannot be read, lack weights, or do not fit the config.

    Source:
        Ours: a command needs all weights; transformers would fill in random ones with a warning.
    """
    name = check_model(model)
    place = choose_device(device)
    from vidllm import VidLLMForConditionalGeneration

    # A download shows its progress; reading a local folder has none worth a bar.
    with no_progress_bars() if os.path.isdir(name) else contextlib.nullcontext():
        loaded, info = _loaded(name, VidLLMForConditionalGeneration.from_pretrained, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"model {name}: {len(missing)} weights are missing, such as {missing[0]}")
    return loaded.to(place).eval()


def load(
    model: str | Path | None, device: str | None = None
) -> tuple["VidLLMForConditionalGeneration", "VidLLMProcessor"]:
    """Load model and processor.

    Args:
        model (`str` or `Path`): Checkpoint folder or Hub id.
        device (`str`, *optional*): See `choose_device`.

    Returns:
        `tuple`: model in evaluation mode, processor.

    Raises:
        ValueError: See `load_model`.

    Source:
        Ours.
    """
    processor = load_processor(model)
    return load_model(model, device), processor


def _loaded(name: str, from_pretrained: Callable, **kwargs) -> Any:
    """One part of a checkpoint; whatever is wrong with the files is a ValueError of one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        return from_pretrained(name, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A strict config wraps the reason in a first line of its own.
        reason = lines[-1] if isinstance(error, StrictDataclassError) and lines else " ".join(lines)[:300]
        raise ValueError(f"model {name}: cannot be loaded: {reason or type(error).__name__}") from error


def read_video(processor: "VidLLMProcessor", source: Any, num_frames: int | None = None) -> "BatchFeature":
    """Read one video: a file, a folder of images, an image, or arrays.

    Args:
        processor (`VidLLMProcessor`): Of the model that will see it.
        source: See `VidLLMVideoProcessor.preprocess`.
        num_frames (`int`, *optional*): Frames to sample; the checkpoint's own number if not given.

    Returns:
        `BatchFeature`: `pixel_values_videos` `(1, S, 3, H, W)`, `video_size_shw` `(1, 3)`; its attribute `video_metadata` says which
        frames were sampled.

    Raises:
        ValueError: The video cannot be read.

    Source:
        Ours.
    """
    from vidllm.processing.video_processing_vidllm import VidLLMVideoList

    return processor.video_processor(VidLLMVideoList([source]), num_frames=num_frames, return_tensors="pt")


def frames_rgb(processor: "VidLLMProcessor", inputs: "BatchFeature") -> "torch.Tensor":
    """The sampled frames as pictures.

    Args:
        processor (`VidLLMProcessor`): That made the inputs.
        inputs (`BatchFeature`): From `read_video`.

    Returns:
        `torch.Tensor` of shape `(S, H, W, 3)`, uint8: what the model sees, before normalisation.

    Source:
        Ours.
    """
    return processor.video_processor.denormalize(inputs["pixel_values_videos"][0])


def encode(
    model: "VidLLMForConditionalGeneration", inputs: "BatchFeature", geometry: dict | None = None
) -> "VidLLMScene":
    """Encode a video once, to ask about it often.

    Args:
        model (`VidLLMForConditionalGeneration`): The model.
        inputs (`BatchFeature`): From `read_video`.
        geometry (`dict`, *optional*): From `processor.prepare_geometry(source, inputs)`.

    Returns:
        `VidLLMScene`: of one video.

    Raises:
        ValueError: A given pose is wrong.

    Source:
        Ours.
    """
    return model.encode_scene(
        inputs["pixel_values_videos"].to(model.device), inputs["video_size_shw"], geometry=geometry
    )
