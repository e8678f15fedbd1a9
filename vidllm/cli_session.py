"""What the commands on a video share: cheap checks first, then processor, video, model, scene, and the notices that go with them."""

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vidllm.cli_console import progress, say
from vidllm.loading import check_model, encode, load_model, load_processor, read_video


if TYPE_CHECKING:
    from transformers.feature_extraction_utils import BatchFeature

    from vidllm import VidLLMForConditionalGeneration, VidLLMProcessor, VidLLMScene


@dataclass
class Session:
    """A loaded checkpoint and a video that it has read.

    Args:
        name (`str`): Checkpoint folder or Hub id.
        video (`str`): Path.
        processor (`VidLLMProcessor`): Of the checkpoint.
        inputs (`BatchFeature`): The sampled frames.
        geometry (`dict`, *optional*): Given poses, intrinsics, depth.
        device (`str`, *optional*): Where the model will run.
        untrained (`bool`): Whether the checkpoint has not been trained, see `untrained_notice`.
        model (`VidLLMForConditionalGeneration`, *optional*): After `load`.
    """

    name: str
    video: str
    processor: "VidLLMProcessor"
    inputs: "BatchFeature"
    geometry: dict | None
    device: str | None
    untrained: bool
    model: "VidLLMForConditionalGeneration | None" = None

    @property
    def metadata(self) -> dict[str, Any]:
        """Of the video, see `VidLLMVideoProcessor`."""
        return self.inputs.video_metadata[0]

    def load(self) -> None:
        """Load the weights, the slow part, once everything else is known to be usable."""
        is_local = os.path.isdir(self.name)
        # A download draws bars of its own.
        with progress("loading the model") if is_local else contextlib.nullcontext():
            self.model = load_model(self.name, self.device)

    def encode(self) -> "VidLLMScene":
        """Encode the video; says so if its geometry has no unit."""
        if self.model is None:
            self.load()
        with progress(f"encoding {len(self.metadata['frames_indices'])} frames"):
            scene = encode(self.model, self.inputs, self.geometry)
        warn_if_relative(scene.reconstruction.unit)
        return scene

    def header(self, unit: str) -> dict[str, Any]:
        """What every JSON document says about where its results come from."""
        given = {} if self.geometry is None else {"given": sorted(self.geometry)}
        return {
            "model": self.name,
            "untrained": self.untrained,
            "video": self.video,
            "frames": list(self.metadata["frames_indices"]),
            "geometry": "predicted" if self.geometry is None else "given",
            **given,
            "unit": unit,
        }


def warn_if_relative(unit: str) -> None:
    """Lengths without a unit must not be taken for metres."""
    if unit != "m":
        say(
            "warning: relative geometry: these weights give no metres, so lengths mean something only within this video",
            style="yellow",
        )


def check_exists(path: str, what: str) -> None:
    """Fail before anything heavy is imported."""
    if not path.strip():
        raise ValueError(f"{what}: wanted a path; got an empty text")
    if "://" not in path and not os.path.exists(os.path.expanduser(path)):
        raise ValueError(f"{what} {path}: no such file or folder")


def open_session(
    video: str, model: str | None, frames: int | None, geometry: str | None, device: str | None
) -> Session:
    """Check, read the video, prepare given geometry; the weights are not loaded yet."""
    name = check_model(model)
    check_exists(video, "video")
    if geometry is not None:
        check_exists(geometry, "--geometry")
    with progress("starting"):
        processor = load_processor(name)
    with progress(f"reading {video}"):
        inputs = read_video(processor, video, frames)
    given = None if geometry is None else processor.prepare_geometry(os.path.expanduser(geometry), inputs)
    from vidllm.train.initialise import untrained_notice

    notice = untrained_notice(name)
    if notice is not None:
        say(f"notice: {notice}", style="yellow")
    return Session(name, video, processor, inputs, given, device, notice is not None)
