"""What stands where in the pictures, as a training signal for the language stream: category and colour of each patch.

Only procedural rooms know it for every pixel. A small model that is trained from scratch is told directly what things look like, which the few
words of an answer tell only in a roundabout way.

Shapes: B videos, S frames, H W pixels, h w patch grid, P = h * w patches, C encoder width.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.outputs_vidllm import VidLLMOutput
from vidllm.processing.benchmarks.frames import SceneFrames
from vidllm.processing.samples import Sample
from vidllm.processing.video_reading_vidllm import VidLLMInputError
from vidllm.train.collator import IGNORED_LABEL, VidLLMCollator
from vidllm.train.dense_matching import patch_matches
from vidllm.train.room_source import BACKGROUND, CATEGORY_NAMES, COLOUR_NAMES


# One class more than there are categories: walls, floor, ceiling.
NUM_CATEGORIES = len(CATEGORY_NAMES) + 1
NUM_COLOURS = len(COLOUR_NAMES)
# Below this share of its pixels nothing is said of a patch.
LEAST_SHARE = 0.6
_CODE_SEED = 20


def patch_labels(instance: np.ndarray, object_labels: np.ndarray, patch_size: int) -> np.ndarray:
    """Category and colour of what fills most of each patch.

    Args:
        instance (`np.ndarray` of shape `(S, H, W)`, uint8): Object id, `BACKGROUND` = none; sides are multiples of the patch size.
        object_labels (`np.ndarray` of shape `(objects, 2)`, int64): Category and colour (-1 = none) by object id.
        patch_size (`int`): Edge of a patch, pixels.

    Returns:
        `np.ndarray` of shape `(S, P, 2)`, int64: category (the last class is background), colour; `IGNORED_LABEL` where unknown.

    Source:
        Ours: a patch counts where one thing fills `LEAST_SHARE` of it.
    """
    frames, height, width = instance.shape
    rows, columns = height // patch_size, width // patch_size
    patches = instance.reshape(frames, rows, patch_size, columns, patch_size)
    # (S, h, p, w, p) -> (S * h * w, p * p)
    patches = patches.transpose(0, 1, 3, 2, 4).reshape(frames * rows * columns, patch_size * patch_size)
    ids = [*range(len(object_labels)), BACKGROUND]
    shares = np.stack([(patches == number).mean(axis=1) for number in ids], axis=1)
    most = shares.argmax(axis=1)
    table = np.concatenate([object_labels, [[len(CATEGORY_NAMES), -1]]])
    labels = np.where(table[most] < 0, IGNORED_LABEL, table[most])
    labels[shares.max(axis=1) < LEAST_SHARE] = IGNORED_LABEL
    return labels.reshape(frames, rows * columns, 2)


def loc_labels(samples: Sequence[Sample], object_labels: Sequence[np.ndarray]) -> torch.Tensor:
    """Category and colour of what the only `<loc>` of each prompt means.

    Args:
        samples (`Sequence[Sample]`): Of procedural rooms.
        object_labels (`Sequence[np.ndarray]` of shapes `(objects, 2)`, int64): For each sample, category and colour (-1 = none) by object id.

    Returns:
        `torch.Tensor` of shape `(Q, 2)`, int64: category, colour; `IGNORED_LABEL` where there is no `<loc>`, or several, or no thing, or
        where things differ.

    Source:
        Ours.
    """
    labels = torch.full((len(samples), 2), IGNORED_LABEL)
    for row, (sample, known) in enumerate(zip(samples, object_labels, strict=True)):
        if sample.num_box_blocks != 1 or not sample.object_ids:
            continue
        meant = known[list(sample.object_ids)]
        for which in range(2):
            values = set(meant[:, which].tolist())
            if len(values) == 1 and min(values) >= 0:
                labels[row, which] = values.pop()
    return labels


class RoomCollator(VidLLMCollator):
    """Batches of `RoomScene`s: as `VidLLMCollator`, with labels of patches in `targets`.

    `patch_labels` `(B, S, P, 2)`, int64, `patch_matches` `(B, S, S, P, 2)` and `loc_labels` `(Q, 2)`, int64, are what the functions of these names
    return.

    Args:
        processor (`VidLLMProcessor`): Of the model.
        **settings: As of `VidLLMCollator`.

    Source:
        Ours.
    """

    def __init__(self, processor: Any, **settings: Any):
        super().__init__(processor, **settings)
        self._frames_of_scene: dict[str, SceneFrames] = {}

    def __call__(self, scenes: Sequence[Any]) -> dict[str, Any]:
        """Make a batch.

        Args:
            scenes (`list[RoomScene]`): Visits; two visits of one room stay two videos.

        Returns:
            `dict`: as of `VidLLMCollator`.

        Raises:
            VidLLMInputError: The processor changes the size of the pictures, so that labels would be elsewhere.
        """
        samples, labels_of_sample = [], []
        for number, scene in enumerate(scenes):
            name = f"{scene.frames.scene_id}#{number}"
            self._frames_of_scene[name] = scene.frames
            samples += [_renamed(sample, name) for sample in scene.samples]
            labels_of_sample += [scene.object_labels] * len(scene.samples)
        try:
            batch = super().__call__(samples)
        finally:
            self._frames_of_scene.clear()
        wanted, got = batch["pixel_values_videos"].shape[-2:], scenes[0].instance.shape[-2:]
        if tuple(wanted) != tuple(got):
            raise VidLLMInputError(
                f"rooms: wanted pictures of the size that the model sees, {tuple(wanted)} (height, width); got {tuple(got)}"
            )
        labels = [
            patch_labels(s.instance, s.object_labels, self.processor.video_processor.patch_size)
            for s in scenes
            if s.samples
        ]
        targets = batch["targets"]
        targets["loc_labels"] = loc_labels(samples, labels_of_sample)
        targets["patch_labels"] = torch.from_numpy(np.stack(labels))
        targets["patch_matches"] = patch_matches(
            targets["depth_m"],
            targets["intrinsics_px"],
            targets["cam_from_world"],
            self.processor.video_processor.patch_size,
        )
        return batch

    def _frames(self, sample: Sample) -> SceneFrames:
        """Frames come with the scene."""
        return self._frames_of_scene[sample.scene_id]


def _renamed(sample: Sample, scene_id: str) -> Sample:
    """The same sample of a scene of another name."""
    renamed = copy.copy(sample)
    object.__setattr__(renamed, "scene_id", scene_id)
    return renamed


def label_codes(width: int, device: torch.device | None = None) -> torch.Tensor:
    """Fixed orthonormal directions, one per category and colour.

    Args:
        width (`int`): C.
        device (`torch.device`, *optional*): Where they go.

    Returns:
        `torch.Tensor` of shape `(NUM_CATEGORIES + NUM_COLOURS, C)`.

    Raises:
        ValueError: The width is smaller than the number of classes.

    Source:
        Ours: a classifier with fixed random weights needs no parameters of its own, which would have to be dropped after training.
    """
    count = NUM_CATEGORIES + NUM_COLOURS
    if width < count:
        raise ValueError(f"dense labels: wanted an encoder width of at least {count}; got {width}")
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(_CODE_SEED), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].T.float().to(device)


@dataclass(frozen=True)
class DenseLabels:
    """Loss on the language stream: cross-entropy of each patch's category and colour against fixed codes.

    Args:
        strength (`float`): Weight of both terms, all through the run.

    Source:
        Ours: what a model trained from scratch on small pictures lacks first is perception.
    """

    strength: float = 1.0
    name: ClassVar[str] = "dense_labels"
    forward_kwargs: ClassVar[Mapping[str, Any]] = {"output_adapter_tokens": True}

    def weight(self, progress: float) -> float:
        """Weight of both terms in the total loss.

        Args:
            progress (`float`): Share of the run that is done; not read.

        Returns:
            `float`

        Source:
            Ours.
        """
        return self.strength

    def terms(
        self, output: VidLLMOutput, batch: Mapping[str, Any], config: VidLLMConfig
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """`(sum, count)` of `dense_category` and `dense_colour`; sums over the labelled patches, float32.

        Args:
            output (`VidLLMOutput`): With `lang_tokens` `(B, S, P, C)`.
            batch (`Mapping`): With `targets["patch_labels"]` `(B, S, P, 2)`.
            config (`VidLLMConfig`): Of the model.

        Returns:
            `dict[str, tuple]`

        Source:
            Ours.
        """
        labels = batch["targets"]["patch_labels"]
        with torch.autocast(device_type=labels.device.type, enabled=False):
            tokens = torch.nn.functional.layer_norm(output.lang_tokens.float(), output.lang_tokens.shape[-1:])
            logits = tokens @ label_codes(tokens.shape[-1], tokens.device).T
            parts = logits.split([NUM_CATEGORIES, NUM_COLOURS], dim=-1)
            sums = [
                torch.nn.functional.cross_entropy(
                    part.flatten(0, -2), labels[..., which].flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
                )
                for which, part in enumerate(parts)
            ]
        counts = self.counts(batch, config)
        return {name: (value, counts[name]) for name, value in zip(counts, sums, strict=True)}

    def counts(self, batch: Mapping[str, Any], config: VidLLMConfig) -> dict[str, torch.Tensor]:
        """Labelled patches of a batch, by term; see `terms`."""
        known = (batch["targets"]["patch_labels"] != IGNORED_LABEL).flatten(0, -2).sum(dim=0).float()
        return {"dense_category": known[0], "dense_colour": known[1]}


__all__ = [
    "DenseLabels",
    "RoomCollator",
    "label_codes",
    "loc_labels",
    "patch_labels",
]
