"""Scenes for training: prompts of all benchmarks grouped by scene, visited in a fixed random order, some prompts per visit.

A visit depends on the seed and on its number alone, so any process may make it, batches may be cut anywhere, and a run can go on
where it stopped.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vidllm.processing.benchmarks.frames import SceneFrames, frames_of, open_sample, scene_key, usable_rows
from vidllm.processing.samples import Sample
from vidllm.processing.scenes.base import SkipCounter
from vidllm.processing.video_reading_vidllm import VidLLMInputError
from vidllm.train.collator import VidLLMCollator, keyed_generator


logger = logging.getLogger(__name__)
# Fractional parts of its multiples fill 0..1 evenly, however many are taken.
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, eq=False)
class SceneVisit:
    """A scene as it is seen in one training step.

    Args:
        samples (`list[Sample]`): Prompts about it.
        epoch (`int`): How many times every scene was visited before.

    Source:
        Ours.
    """

    samples: list[Sample]
    epoch: int


class SceneDataset(torch.utils.data.Dataset):
    """Scenes with some of their prompts; which prompts, changes with the epoch.

    Args:
        datasets (`Mapping[str, Sequence]`): Rows of `load_benchmark` by the name of the benchmark.
        prompts_per_scene (`int`): Most prompts of an item; 0 takes all.
        seed (`int`): Of the choice of prompts.
        weights (`Mapping[str, float]`, *optional*): Share of each benchmark among the prompts of a scene that has several; by default 1 each.
            A benchmark of weight 0 is left out.
        num_frames (`int`): Frames that will be sampled: rows whose first sampled frame has no valid pose cannot be used.
        data_root (`str` or `Path`, *optional*): As of `frames_of`.

    Raises:
        ValueError: A number is out of range, a weight names no benchmark, or nothing can be used.

    Source:
        Ours. Every prompt of a benchmark comes once before one comes twice. `num_placed` counts the usable rows with boxes or places in metres.
    """

    def __init__(
        self,
        datasets: Mapping[str, Sequence[Mapping[str, Any]]],
        prompts_per_scene: int,
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
        num_frames: int = 32,
        data_root: Any = None,
    ):
        weights = dict(weights or {})
        unknown = sorted(set(weights) - set(datasets))
        if unknown or prompts_per_scene < 0 or any(not 0 <= value < float("inf") for value in weights.values()):
            raise ValueError(
                f"scenes: wanted prompts_per_scene of at least 0 and weights of at least 0 of {', '.join(datasets)}; got "
                f"{prompts_per_scene} and {weights}"
            )
        self.datasets = {name: rows for name, rows in datasets.items() if weights.get(name, 1.0) > 0}
        self.weights = {name: float(weights.get(name, 1.0)) for name in self.datasets}
        self.prompts_per_scene, self.seed, self.data_root = prompts_per_scene, seed, data_root
        self.num_frames = num_frames
        self._frames: dict[int, int] = {}
        self.skipped: dict[str, SkipCounter] = {}
        self.num_placed = 0
        rows_of_scene: dict[tuple, dict[str, list[int]]] = {}
        for name, rows in self.datasets.items():
            usable, skipped = usable_rows(rows, data_root, num_frames)
            for number in usable:
                sample = Sample.from_row(rows[number])
                if not sample.has_reply:
                    skipped.add("it has no reply to learn", sample.sample_id)
                    continue
                key = scene_key(sample, data_root)
                rows_of_scene.setdefault(key, {}).setdefault(name, []).append(number)
                self.num_placed += has_places(sample)
            self.skipped[name] = skipped
            for line in skipped.summary():
                logger.warning("%s: of %d rows %s", name, len(rows), line)
        if not rows_of_scene:
            reasons = [line for skipped in self.skipped.values() for line in skipped.summary()]
            raise ValueError(f"scenes: wanted at least one usable row; got none ({'; '.join(reasons) or 'no rows'})")
        self.keys = list(rows_of_scene)
        self.rows_of_scene = [rows_of_scene[key] for key in self.keys]
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def has_depth(self) -> bool:
        """Whether any scene has depth maps, which are metric."""
        return any(open_sample(self._some_sample(scene), self.data_root).has_depth for scene in range(len(self)))

    @property
    def has_poses(self) -> bool:
        """Whether any scene has cameras."""
        return any(self._knows_poses(scene) for scene in range(len(self)))

    @property
    def has_geometry(self) -> bool:
        """Whether any scene has both depth maps and cameras: the losses on the reconstruction want both."""
        return any(
            self._knows_poses(scene) and open_sample(self._some_sample(scene), self.data_root).has_depth
            for scene in range(len(self))
        )

    def _knows_poses(self, scene: int) -> bool:
        """Whether a scene has cameras."""
        sample = self._some_sample(scene)
        return sample.poses is not None or open_sample(sample, self.data_root).has_poses

    def _some_sample(self, scene: int) -> Sample:
        """One of a scene's samples."""
        name, numbers = next(iter(self.rows_of_scene[scene].items()))
        return Sample.from_row(self.datasets[name][numbers[0]])

    @property
    def epoch(self) -> int:
        """Epoch that items are chosen for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Change the epoch, also in the processes of a running loader."""
        self._epoch.fill_(epoch)

    def __getitem__(self, scene: int) -> list[Sample]:
        return self.prompts(scene, self.epoch)

    def length(self, scene: int, epoch: int) -> tuple[int, int]:
        """How long a visit is.

        Args:
            scene (`int`): Number of the scene.
            epoch (`int`): Number of the epoch.

        Returns:
            `tuple[int, int]`: frames, at most `num_frames`; letters of all its prompts and their replies.

        Raises:
            VidLLMInputError: A row is malformed.

        Source:
            Ours.
        """
        if scene not in self._frames:
            reader = open_sample(self._some_sample(scene), self.data_root)
            self._frames[scene] = min(len(reader), self.num_frames)
        return self._frames[scene], sum(_letters(sample) for sample in self.prompts(scene, epoch))

    def prompts(self, scene: int, epoch: int) -> list[Sample]:
        """Prompts of a scene in an epoch.

        Args:
            scene (`int`): Number of the scene.
            epoch (`int`): Number of the epoch.

        Returns:
            `list[Sample]`: at most `prompts_per_scene`, none twice.

        Raises:
            VidLLMInputError: A row is malformed.

        Source:
            Ours: the prompts of a scene are dealt like cards, a benchmark's shuffled anew when they are through; which benchmark is next
            follows a low-discrepancy sequence, so that even few prompts keep the shares.
        """
        rows, most = self.rows_of_scene[scene], self.prompts_per_scene
        if not most or sum(map(len, rows.values())) <= most:
            return [Sample.from_row(self.datasets[name][number]) for name in rows for number in rows[name]]
        key, names = self.keys[scene][1], list(rows)
        shares = np.cumsum([self.weights[name] for name in names])
        start = keyed_generator(self.seed, 0, "benchmarks", key).random()
        spread = (start + _GOLDEN * np.arange((epoch + 1) * most)) % 1.0
        dealt = np.minimum(np.searchsorted(shares, spread * shares[-1], side="right"), len(names) - 1)
        chosen: dict[tuple[str, int], None] = {}
        for which, name in enumerate(names):
            before = int((dealt[: epoch * most] == which).sum())
            for number in range(before, before + int((dealt[epoch * most :] == which).sum())):
                cycle, place = divmod(number, len(rows[name]))
                order = keyed_generator(self.seed, cycle, "prompts", name, key).permutation(len(rows[name]))
                chosen[name, rows[name][order[place]]] = None
        return [Sample.from_row(self.datasets[name][number]) for name, number in chosen]


def rows_fingerprint(datasets: Mapping[str, Iterable[Mapping[str, Any]]]) -> str:
    """What tells whether a resumed run reads the same conversations about the same scenes in the same order.

    Args:
        datasets (`Mapping[str, Iterable]`): Rows of `load_benchmark` by the name of the benchmark.

    Returns:
        `str`: SHA-256, in hex.

    Source:
        Ours: of names of the scenes, not of the folder that they lie in today.
    """
    seen = hashlib.sha256()
    for name, rows in datasets.items():
        for sample in map(Sample.from_row, rows):
            seen.update(json.dumps([name, scene_key(sample)[1], sample.sample_id, sample.messages]).encode())
    return seen.hexdigest()


def has_places(sample: Sample) -> bool:
    """Whether a sample's conversation holds boxes or places, which are in metres.

    Args:
        sample (`Sample`): The sample.

    Returns:
        `bool`

    Source:
        Ours.
    """
    has_boxes = sample.num_box_blocks > 0 and len(sample.box_block) > 0
    return has_boxes or (sample.num_point_blocks > 0 and sample.points is not None)


def _letters(sample: Sample) -> int:
    """Letters of a conversation."""
    return sum(len(block.get("text") or "") for turn in sample.messages for block in turn["content"])


class SceneVisits(torch.utils.data.Dataset):
    """A whole run's visits of the scenes of a `SceneDataset`: all scenes in random order, then all in another, and so on.

    Args:
        scenes (`SceneDataset`): The scenes.
        num_visits (`int`): Length: steps of the run times scenes per step.
        seed (`int`): Of the order.
        window (`int`): Within each stretch of so many visits the longest come first, so that forwards hold visits of about the same length and
            little padding. With the scenes of a step (batch size times accumulation times processes) every step has the very visits that it
            has without. 1 leaves the order as it is.

    Raises:
        ValueError: A window of no visit.

    Source:
        Ours: in one sequence, so that no step at the end of an epoch is smaller and nothing is dropped or seen twice to fill it. Length is told by
        frames, then by letters of the prompts: a video's prompts share one row of the language model.
    """

    def __init__(self, scenes: SceneDataset, num_visits: int, seed: int = 0, window: int = 1):
        if window < 1:
            raise ValueError(f"scenes: wanted a window of at least 1 visit; got {window}")
        self.scenes, self.num_visits, self.seed, self.window = scenes, num_visits, seed, window
        self._orders: dict[int, np.ndarray] = {}
        self._windows: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self.num_visits

    def scene_of(self, visit: int) -> tuple[int, int]:
        """Number of the scene and epoch of a visit."""
        if self.window > 1:
            window, number = divmod(visit, self.window)
            visit = self._sorted(window)[number]
        return self._drawn(visit)

    def _sorted(self, window: int) -> list[int]:
        """Visits of a window, the longest first."""
        if window not in self._windows:
            start = window * self.window
            visits = range(start, min(start + self.window, self.num_visits))
            lengths = {visit: self.scenes.length(*self._drawn(visit)) for visit in visits}
            # What is equally long stays in the order of the draw.
            order = sorted(visits, key=lambda visit: lengths[visit], reverse=True)
            self._windows = {**dict(list(self._windows.items())[-1:]), window: order}
        return self._windows[window]

    def _drawn(self, visit: int) -> tuple[int, int]:
        """Number of the scene and epoch of a visit before any are sorted."""
        epoch, place = divmod(visit, len(self.scenes))
        if epoch not in self._orders:
            order = keyed_generator(self.seed, epoch, "order of scenes").permutation(len(self.scenes))
            # A batch lies in two epochs at most, unless there are fewer scenes than it holds.
            self._orders = {**dict(list(self._orders.items())[-3:]), epoch: order}
        return int(self._orders[epoch][place]), epoch

    def __getitem__(self, visit: int) -> SceneVisit:
        if not 0 <= visit < self.num_visits:
            raise IndexError(visit)
        scene, epoch = self.scene_of(visit)
        return SceneVisit(self.scenes.prompts(scene, epoch), epoch)


class SceneCollator(VidLLMCollator):
    """Batches of scenes: as `VidLLMCollator`, of lists of samples or of `SceneVisit`s.

    Two visits of one scene stay two videos, with draws of their own epochs; their ids end in `@` and the epoch.

    Args:
        processor (`VidLLMProcessor`): Of the model.
        **settings: As of `VidLLMCollator`.

    Source:
        Ours: what a scene contributes does not depend on what else is in its batch.
    """

    def __init__(self, processor: Any, **settings: Any):
        super().__init__(processor, **settings)
        self._original: dict[tuple, tuple[Sample, str]] = {}

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """Make a batch.

        Args:
            items (`list`): `SceneVisit`s, or lists of samples (or rows) of one scene each, which are seen in the collator's epoch.

        Returns:
            `dict`: as of `VidLLMCollator`.

        Raises:
            VidLLMInputError: See `VidLLMCollator`; or a visit has no prompt.
        """
        samples = []
        for item in items:
            visit = item if isinstance(item, SceneVisit) else SceneVisit(list(item), self.epoch)
            if not visit.samples:
                raise VidLLMInputError("collator: wanted at least one prompt per scene; got none")
            samples += [self._in_epoch(sample, visit.epoch) for sample in visit.samples]
        try:
            return super().__call__(samples)
        finally:
            self._original.clear()

    def _in_epoch(self, row: Mapping[str, Any] | Sample, epoch: int) -> Sample:
        """The same sample under names of its epoch."""
        original = row if isinstance(row, Sample) else Sample.from_row(row)
        renamed = copy.copy(original)
        for name in ("sample_id", "scene_id", "video"):
            value = getattr(original, name)
            if value is not None:
                object.__setattr__(renamed, name, f"{value}@{epoch}")
        self._original[scene_key(renamed, self.data_root)] = (
            original,
            f"{scene_key(original, self.data_root)[1]}@{epoch}",
        )
        return renamed

    def _generator(self, what: str, *names: str) -> np.random.Generator:
        """Random numbers for one purpose and one scene or sample of an epoch."""
        name, epoch = names[0].rsplit("@", 1)
        return keyed_generator(self.seed, int(epoch), what, name)

    def _scene_id(self, sample: Sample) -> str | None:
        """Name without the epoch."""
        return self._original[scene_key(sample, self.data_root)][0].scene_id

    def _frames(self, sample: Sample) -> SceneFrames:
        """Frames of the scene under its real name."""
        original, name = self._original[scene_key(sample, self.data_root)]
        return frames_of(
            original,
            self.data_root,
            self.num_frames,
            method=self.frame_choice,
            depth=self.depth,
            generator=self._generator("frames", name) if self.frame_choice == "random" else None,
        )


__all__ = ["SceneCollator", "SceneDataset", "SceneVisit", "SceneVisits", "has_places", "rows_fingerprint"]
