"""What stands where in the pictures, as a training signal for the language stream: category, colour and pattern of each patch.

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
from vidllm.train.room_source import BACKGROUND, CATEGORY_NAMES, COLOUR_NAMES, LABEL_KINDS, PATTERN_NAMES


# One class more than there are categories: walls, floor, ceiling.
NUM_CATEGORIES = len(CATEGORY_NAMES) + 1
NUM_COLOURS, NUM_PATTERNS = len(COLOUR_NAMES), len(PATTERN_NAMES)
_CLASSES = (NUM_CATEGORIES, NUM_COLOURS, NUM_PATTERNS)
_TERMS = ("dense_category", "dense_colour", "dense_pattern")
# A patch shows a thing from this share of its pixels on, and nothing from that share of background on; between them nothing is said.
LEAST_SHARE, LEAST_BACKGROUND = 0.3, 0.9
# Background among the things of patches.
NOTHING = -1
_CODE_SEED = 20


def patch_things(instance: np.ndarray, num_objects: int, patch_size: int) -> np.ndarray:
    """Which thing each patch shows.

    Args:
        instance (`np.ndarray` of shape `(S, H, W)`, uint8): Object id, `BACKGROUND` = none; sides are multiples of the patch size.
        num_objects (`int`): Objects of the room.
        patch_size (`int`): Edge of a patch, pixels.

    Returns:
        `np.ndarray` of shape `(S, P)`, int64: object id, `NOTHING` for background, `IGNORED_LABEL` where neither can be said.

    Source:
        Ours: small things seldom fill a patch, so that a thing counts before the background that shows around it.
    """
    frames, height, width = instance.shape
    rows, columns = height // patch_size, width // patch_size
    patches = instance.reshape(frames, rows, patch_size, columns, patch_size)
    # (S, h, p, w, p) -> (S, h * w, p * p)
    patches = patches.transpose(0, 1, 3, 2, 4).reshape(frames, rows * columns, patch_size * patch_size)
    shares = np.stack([(patches == number).mean(axis=2) for number in range(num_objects)], axis=2)
    things = np.where(shares.max(axis=2) >= LEAST_SHARE, shares.argmax(axis=2), IGNORED_LABEL)
    return np.where((patches == BACKGROUND).mean(axis=2) >= LEAST_BACKGROUND, NOTHING, things)


def patch_labels(things: np.ndarray, object_labels: np.ndarray) -> np.ndarray:
    """Category, colour and pattern of each patch.

    Args:
        things (`np.ndarray` of shape `(S, P)`, int64): Of `patch_things`.
        object_labels (`np.ndarray` of shape `(objects, 3)`, int64): Category, colour and pattern (-1 = none) by object id.

    Returns:
        `np.ndarray` of shape `(S, P, 3)`, int64: category (the last class is background), colour, pattern; `IGNORED_LABEL` where unknown.

    Source:
        Ours.
    """
    known = np.where(object_labels < 0, IGNORED_LABEL, object_labels)
    unknown = np.full(len(LABEL_KINDS), IGNORED_LABEL)
    labels = np.where((things >= 0)[..., None], known[np.maximum(things, 0)], unknown)
    labels[things == NOTHING, 0] = len(CATEGORY_NAMES)
    return labels


def patch_weights(things: np.ndarray) -> np.ndarray:
    """How much each patch counts: those of a thing in a frame together as much as the square root of their number; so with background.

    Args:
        things (`np.ndarray` of shape `(S, P)`, int64): Of `patch_things`.

    Returns:
        `np.ndarray` of shape `(S, P)`, float32: 0 where nothing can be said.

    Source:
        Ours: else the few patches of small things drown among those of walls and large things.
    """
    same = (things[:, :, None] == things[:, None, :]).sum(axis=2)
    return np.where(things == IGNORED_LABEL, 0.0, same**-0.5).astype(np.float32)


def loc_labels(samples: Sequence[Sample], object_labels: Sequence[np.ndarray]) -> torch.Tensor:
    """Category and colour of what the only `<loc>` of each prompt means.

    Args:
        samples (`Sequence[Sample]`): Of procedural rooms.
        object_labels (`Sequence[np.ndarray]` of shapes `(objects, 2 or more)`, int64): For each sample, category, colour (-1 = none) and more by object id.

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

    `patch_labels` `(B, S, P, 3)`, int64, `patch_weights` `(B, S, P)`, float32, `patch_matches` `(B, S, S, P, 2)` and `loc_labels` `(Q, 2)`, int64, are what the functions of these names
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
        size = self.processor.video_processor.patch_size
        seen = [scene for scene in scenes if scene.samples]
        things = [patch_things(scene.instance, len(scene.object_labels), size) for scene in seen]
        labels = [patch_labels(known, scene.object_labels) for known, scene in zip(things, seen, strict=True)]
        targets = batch["targets"]
        targets["loc_labels"] = loc_labels(samples, labels_of_sample)
        targets["patch_labels"] = torch.from_numpy(np.stack(labels))
        targets["patch_weights"] = torch.from_numpy(np.stack([patch_weights(known) for known in things]))
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
    """Fixed orthonormal directions, one per category, colour and pattern.

    Args:
        width (`int`): C.
        device (`torch.device`, *optional*): Where they go.

    Returns:
        `torch.Tensor` of shape `(NUM_CATEGORIES + NUM_COLOURS + NUM_PATTERNS, C)`.

    Raises:
        ValueError: The width is smaller than the number of classes.

    Source:
        Ours: a classifier with fixed random weights needs no parameters of its own, which would have to be dropped after training.
    """
    count = sum(_CLASSES)
    if width < count:
        raise ValueError(f"dense labels: wanted an encoder width of at least {count}; got {width}")
    generator = torch.Generator().manual_seed(_CODE_SEED)
    # Patterns are drawn last, apart: the directions of the others are those that models were trained with before there were any.
    sizes = (NUM_CATEGORIES + NUM_COLOURS, NUM_PATTERNS)
    drawn = torch.cat([torch.randn(width, size, generator=generator, dtype=torch.float64) for size in sizes], dim=1)
    return torch.linalg.qr(drawn)[0].T.float().to(device)


@dataclass(frozen=True)
class DenseLabels:
    """Loss on the language stream: cross-entropy of each patch's category, colour and pattern against fixed codes.

    Args:
        strength (`float`): Weight of the terms, all through the run.

    Source:
        Ours: what a model trained from scratch on small pictures lacks first is perception.
    """

    strength: float = 1.0
    name: ClassVar[str] = "dense_labels"
    forward_kwargs: ClassVar[Mapping[str, Any]] = {"output_adapter_tokens": True}

    def weight(self, progress: float) -> float:
        """Weight of the terms in the total loss.

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
        """`(sum, count)` of `dense_category`, `dense_colour` and `dense_pattern`; sums over the labelled patches by their weights, float32.

        Args:
            output (`VidLLMOutput`): With `lang_tokens` `(B, S, P, C)`.
            batch (`Mapping`): With `targets["patch_labels"]` `(B, S, P, 3)` and `targets["patch_weights"]` `(B, S, P)`.
            config (`VidLLMConfig`): Of the model.

        Returns:
            `dict[str, tuple]`

        Source:
            Ours.
        """
        labels, weights = (batch["targets"][name] for name in ("patch_labels", "patch_weights"))
        with torch.autocast(device_type=labels.device.type, enabled=False):
            tokens = torch.nn.functional.layer_norm(output.lang_tokens.float(), output.lang_tokens.shape[-1:])
            logits = tokens @ label_codes(tokens.shape[-1], tokens.device).T
            sums = []
            for which, part in enumerate(logits.split(_CLASSES, dim=-1)):
                losses = torch.nn.functional.cross_entropy(
                    part.flatten(0, -2), labels[..., which].flatten(), ignore_index=IGNORED_LABEL, reduction="none"
                )
                sums.append((losses * weights.flatten()).sum())
        counts = self.counts(batch, config)
        return {name: (value, counts[name]) for name, value in zip(counts, sums, strict=True)}

    def counts(self, batch: Mapping[str, Any], config: VidLLMConfig) -> dict[str, torch.Tensor]:
        """Weights of the labelled patches of a batch, by term; see `terms`."""
        targets = batch["targets"]
        known = (targets["patch_labels"] != IGNORED_LABEL) * targets["patch_weights"][..., None]
        sums = known.flatten(0, -2).sum(dim=0)
        return dict(zip(_TERMS, sums, strict=True))


__all__ = [
    "NUM_CATEGORIES",
    "NUM_COLOURS",
    "NUM_PATTERNS",
    "DenseLabels",
    "RoomCollator",
    "label_codes",
    "loc_labels",
    "patch_labels",
    "patch_things",
    "patch_weights",
]
