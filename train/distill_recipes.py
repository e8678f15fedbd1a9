"""Recipes of stage 1: functions that return everything a distillation run depends on, complete and frozen.

Fields are changed as those of stage 2, see `vidllm.train.recipes`.
"""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vidllm.train.clip_data import FRAMES_KEPT
from vidllm.train.feature_folder import FeatureFolder, is_feature_folder
from vidllm.train.held_out import HeldOutSettings
from vidllm.train.presets import PRESETS
from vidllm.train.recipe_settings import check_factors, known_name, require, with_settings
from vidllm.train.recipes import PRECISIONS, SCHEDULES
from vidllm.train.room_source import RoomsSettings
from vidllm.train.teachers import STREAMS


@dataclass(frozen=True)
class DistillRecipe:
    """Everything that a run of stage 1 depends on.

    Args:
        name (`str`): Of the recipe.
        model (`str`, *optional*): The student: a preset (random weights), a checkpoint folder, or a Hub id.
        geometry_teacher (`str`, *optional*): For the geometry stream: Hub id or folder of a vision model or of a Vid-LLM checkpoint, or a folder
            that `vidllm train precompute` wrote, of the very clips that are learned from and of those that are held out.
        language_teacher (`str`, *optional*): For the language stream, likewise.
        geometry_stream (`str`): Of a geometry teacher that is a Vid-LLM checkpoint: `encoder`, `geometry` or `language`.
        language_stream (`str`): Of a semantic teacher that is one.
        weights_dtype (`str`): Of the weights that are not trained.
        clips (`str`, *optional*): A folder of videos or of folders of pictures, or a data root.
        frames_kept (`int`): Frames of a clip that are ever seen, spread evenly; 0 keeps all.
        rooms (`RoomsSettings`, *optional*): Procedural rooms made on the fly, instead of clips.
        rooms_cache (`str`, *optional*): Folder that keeps the rooms; by default `rooms` in the run's folder.
        num_frames (`int`, *optional*): Frames per clip and step; by default the processor's.
        steps (`int`): Optimizer steps.
        batch_size (`int`): Clips per process and forward.
        accumulation (`int`): Forwards per step.
        learning_rate (`float`): At its highest.
        learning_rate_factors (`Mapping[str, float]`): Regular expression of parameter names to a factor; the first that is found counts.
        schedule (`str`): `cosine` or `linear` to zero, or `constant_with_warmup`.
        warmup (`float`): Share of the steps in which the learning rate rises.
        weight_decay (`float`): Of matrices.
        betas (`tuple` of `float`): AdamW's.
        clip (`float`): Largest norm of the gradient.
        precision (`str`): `float32`, or `bfloat16` for autocast.
        activation_checkpointing (`bool`): Compute activations twice instead of keeping them.
        workers (`int`): Processes per training process that read data.
        weights (`Mapping[str, float]`): Of the terms `geometry_feature`, `language_feature`, `structure`; those not named weigh 1.
        freeze_encoder (`bool`): Whether the adapter alone is trained.
        held_out (`HeldOutSettings`, *optional*): Clips that are not learned from, and how often all losses are measured on them.
        seed (`int`): Of everything that is drawn.
        log_every (`int`): Steps between lines of the log.
        save_every (`int`): Steps between checkpoints.
        keep_checkpoints (`int`): How many are kept.
        report_to (`tuple` of `str`): Where the log goes besides the folder of the run, such as `tensorboard` or `wandb`.

    Raises:
        ValueError: A field is out of range.

    Source:
        Paper: AdamW, betas, weight decay, clip (section 3). Ours: everything else, which the paper does not state.
    """

    name: str
    model: str | None
    geometry_teacher: str | None = None
    language_teacher: str | None = None
    geometry_stream: str = "encoder"
    language_stream: str = "encoder"
    weights_dtype: str = "float32"
    # data
    clips: str | None = None
    frames_kept: int = FRAMES_KEPT
    rooms: RoomsSettings | None = None
    rooms_cache: str | None = None
    num_frames: int | None = None
    # optimisation
    steps: int = 1000
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-4
    learning_rate_factors: Mapping[str, float] = field(default_factory=dict)
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    precision: str = "float32"
    activation_checkpointing: bool = False
    workers: int = 2
    # what is learned
    weights: Mapping[str, float] = field(default_factory=dict)
    freeze_encoder: bool = False
    held_out: HeldOutSettings | None = None
    # the run
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("frames_kept", "workers", "seed"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("weight_decay", "clip"):
            require(0 <= getattr(self, name) < math.inf, name, "a number of at least 0", getattr(self, name))
        require(0 < self.learning_rate < math.inf, "learning_rate", "a positive number", self.learning_rate)
        require(0 <= self.warmup < 1, "warmup", "a share of the steps, 0..1", self.warmup)
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "betas",
            "two numbers in 0..1",
            self.betas,
        )
        check_factors(self.learning_rate_factors)
        require(self.num_frames is None or self.num_frames >= 1, "num_frames", "at least 1", self.num_frames)
        for name, known in (
            ("precision", PRECISIONS),
            ("weights_dtype", PRECISIONS),
            ("schedule", SCHEDULES),
            ("geometry_stream", STREAMS),
            ("language_stream", STREAMS),
        ):
            require(getattr(self, name) in known, name, f"one of {', '.join(known)}", getattr(self, name))
        terms = ("geometry_feature", "language_feature", "structure")
        for name, weight in self.weights.items():
            require(name in terms, "weights", f"names among {', '.join(terms)}", name)
            require(0 <= weight < math.inf, f"weights.{name}", "a number of at least 0", weight)

    def check(self) -> None:
        """Check what only the finished recipe can say.

        Raises:
            ValueError: Student, teachers or clips are missing, there are two kinds of data, what is held out is learned from, or features on
                disk are of other frames.

        Source:
            Ours.
        """
        for name, example in (
            ("model", "PATH_OR_PRESET"),
            (
                "geometry_teacher",
                "a checkpoint of `vidllm init --geometry`, or an encoder that the student does not start from",
            ),
            ("language_teacher", "openai/clip-vit-large-patch14-336"),
        ):
            if getattr(self, name) is None:
                raise ValueError(f"{self.name}: wanted {name}: --set {name}=..., such as {example}")
        if (self.clips is None) == (self.rooms is None):
            raise ValueError(
                f"{self.name}: wanted either clips (--clips DIR) or rooms; got {'both' if self.rooms else 'neither'}"
            )
        if self.held_out is not None and (self.clips is None) == (self.held_out.clips is not None):
            raise ValueError(
                f"{self.name}: wanted held_out.clips=DIR with clips, and none with rooms; got {self.held_out.clips!r}"
            )
        if self.held_out is not None:
            self.held_out.check_read(self.name, None if self.clips is None else "clips")
            if self.clips is not None and _overlap(self.clips, self.held_out.clips or ""):
                raise ValueError(
                    f"{self.name}: wanted held_out.clips beside the clips that are learned from; got {self.held_out.clips} and {self.clips}"
                )
        if self.geometry_teacher == self.language_teacher and self.geometry_stream == self.language_stream:
            raise ValueError(f"{self.name}: wanted two teachers; got {self.geometry_teacher} twice")
        if self.model == self.geometry_teacher and self.geometry_stream == "encoder":
            raise ValueError(
                f"{self.name}: wanted a student other than its geometry teacher; got {self.model} for both: there would be nothing to learn"
            )
        if self.freeze_encoder and self.model in PRESETS:
            raise ValueError(
                f"{self.name}: wanted a checkpoint with freeze_encoder; got the preset {self.model}, which is random"
            )
        for kind in ("geometry", "language"):
            place = getattr(self, f"{kind}_teacher")
            if is_feature_folder(place):
                self._check_features(f"{kind}_teacher", place, getattr(self, f"{kind}_stream"))

    def _check_features(self, teacher: str, place: str, stream: str) -> None:
        """Features on disk are of the frames that a run will see."""
        facts = FeatureFolder(place).facts
        if self.rooms is not None:
            raise ValueError(
                f"{self.name}: wanted a model as {teacher} of rooms, which are made on the fly; got features of clips in {place}"
            )
        if facts.frames_kept not in (0, self.frames_kept):
            raise ValueError(
                f"{self.name}: {teacher}: wanted features of {self.frames_kept or 'all'} frames of each clip (frames_kept); {place} holds those of "
                f"{facts.frames_kept}: --set frames_kept={facts.frames_kept}, or make them again with --frames-kept {self.frames_kept}"
            )
        if stream not in ("encoder", facts.stream):
            raise ValueError(
                f"{self.name}: {teacher}: wanted features of the stream {stream}; {place} holds those of {facts.stream}"
            )


def _overlap(one: str, other: str) -> bool:
    """Whether one folder is, or lies in, the other."""
    first, second = (Path(place).expanduser().resolve() for place in (one, other))
    return first.is_relative_to(second) or second.is_relative_to(first)


def debug_stage1() -> DistillRecipe:
    """Seconds on a laptop: the tiny model on four rooms, two steps; wants two teachers.

    Returns:
        `DistillRecipe`: complete but for the teachers.

    Source:
        Ours.
    """
    return DistillRecipe(
        name="debug_stage1",
        model="vidllm-tiny",
        rooms=RoomsSettings(
            num_rooms=4, block_size=4, first_blocks=1, makers=0, size_hw=(28, 42), frames_kept=6, jpeg_share=0.0
        ),
        num_frames=3,
        steps=2,
        batch_size=2,
        learning_rate=1e-3,
        workers=0,
        log_every=1,
        save_every=2,
    )


def nano_stage1() -> DistillRecipe:
    """The small model from random weights, on procedural rooms; wants two teachers.

    Returns:
        `DistillRecipe`: complete but for the teachers.

    Source:
        Ours.
    """
    return DistillRecipe(
        name="nano_stage1",
        model="vidllm-nano",
        rooms=RoomsSettings(
            num_rooms=12000,
            levels={"easy": 0.9, "standard": 0.1},
            frames_kept=8,
            first_blocks=64,
            unlocked_at=0.6,
            makers=1,
        ),
        num_frames=4,
        steps=600,
        batch_size=8,
        learning_rate=8e-4,
        warmup=0.02,
        betas=(0.9, 0.95),
        precision="bfloat16",
        workers=1,
        log_every=20,
        save_every=100,
    )


def paper_stage1() -> DistillRecipe:
    """The paper's first stage: wants `--set model=PATH`, a checkpoint of public DINOv2, the two teachers, and clips.

    Returns:
        `DistillRecipe`: complete but for model, teachers and clips.

    Source:
        Paper: AdamW (0.9, 0.999), weight decay 0.05, clip 1.0, 32 frames, teachers VGGT's encoder and LLaVA-3D's CLIP. Ours, because the paper
        does not state it:
        - lambda 1: as the unit weights of eq. 8; no term is known to matter more.
        - learning rate 1e-4: usual for layers that start from nothing, as the adapter does; a tenth of it for the encoder, which is pretrained.
        - 20,000 steps: as many as stage 2; `held_out` says whether more help.
        - batch: one clip per device and forward, because 32 frames at 518 pixels and two teachers fill a device; two forwards per step, because
          a step of few clips is noisy.
        - warm-up 3 % of the steps: AdamW's averages know nothing at first.
        - 64 frames kept per clip: twice what a visit takes, so that visits differ and features still fit on a disk.
        - the student starts from public DINOv2: from VGGT's encoder it would be its own geometry teacher, with nothing to learn.
    """
    return DistillRecipe(
        name="paper_stage1",
        model=None,
        weights_dtype="bfloat16",
        num_frames=32,
        frames_kept=FRAMES_KEPT,
        steps=20000,
        batch_size=1,
        accumulation=2,
        learning_rate=1e-4,
        learning_rate_factors={r"model\.encoder": 0.1},
        precision="bfloat16",
        activation_checkpointing=True,
        workers=8,
    )


DISTILL_RECIPES: Mapping[str, Callable[[], DistillRecipe]] = types.MappingProxyType(
    {function.__name__: function for function in (debug_stage1, nano_stage1, paper_stage1)}
)


def changed_distill_recipe(name: str, settings: Sequence[str] = (), clips: str | None = None) -> DistillRecipe:
    """A recipe of what a command line says; it may be incomplete.

    Args:
        name (`str`): Of a recipe.
        settings (`Sequence[str]`): `field=value`.
        clips (`str`, *optional*): A folder of clips, instead of the recipe's rooms.

    Returns:
        `DistillRecipe`

    Raises:
        ValueError: There is no such recipe, or see `with_settings`.

    Source:
        Ours.
    """
    chosen = DISTILL_RECIPES[known_name("recipe", name, DISTILL_RECIPES)]()
    if clips is not None:
        chosen = replace(chosen, rooms=None, clips=clips)
    return with_settings(chosen, settings)


def chosen_distill_recipe(name: str, settings: Sequence[str] = (), clips: str | None = None) -> DistillRecipe:
    """A complete, checked recipe of what a command line says.

    Args:
        name (`str`): See `changed_distill_recipe`.
        settings (`Sequence[str]`): See there.
        clips (`str`, *optional*): See there.

    Returns:
        `DistillRecipe`

    Raises:
        ValueError: See `changed_distill_recipe` and `DistillRecipe.check`.

    Source:
        Ours.
    """
    chosen = changed_distill_recipe(name, settings, clips)
    chosen.check()
    return chosen


__all__ = [
    "DISTILL_RECIPES",
    "DistillRecipe",
    "changed_distill_recipe",
    "chosen_distill_recipe",
    "debug_stage1",
    "nano_stage1",
    "paper_stage1",
]
