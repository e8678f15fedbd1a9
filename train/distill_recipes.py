"""Recipes of stage 1: functions that return everything a distillation run depends on, complete and frozen.

Fields are changed as those of stage 2, see `vidllm.train.recipes`.
"""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from vidllm.train.held_out import HeldOutSettings
from vidllm.train.presets import PRESETS
from vidllm.train.recipes import PRECISIONS, SCHEDULES, known_name, with_settings
from vidllm.train.room_source import RoomsSettings
from vidllm.train.teachers import STREAMS


@dataclass(frozen=True)
class DistillRecipe:
    """Everything that a run of stage 1 depends on.

    Args:
        name (`str`): Of the recipe.
        model (`str`, *optional*): The student: a preset (random weights), a checkpoint folder, or a Hub id.
        geometry_teacher (`str`, *optional*): For the geometry stream: Hub id or folder of a vision model or of a Vid-LLM checkpoint, or a folder
            that `vidllm train precompute` wrote.
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
    frames_kept: int = 32
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

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "keep_checkpoints"):
            _wanted(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("frames_kept", "workers", "seed"):
            _wanted(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("weight_decay", "clip"):
            _wanted(0 <= getattr(self, name) < math.inf, name, "a number of at least 0", getattr(self, name))
        _wanted(0 < self.learning_rate < math.inf, "learning_rate", "a positive number", self.learning_rate)
        _wanted(0 <= self.warmup < 1, "warmup", "a share of the steps, 0..1", self.warmup)
        _wanted(self.num_frames is None or self.num_frames >= 1, "num_frames", "at least 1", self.num_frames)
        for name, known in (
            ("precision", PRECISIONS),
            ("weights_dtype", PRECISIONS),
            ("schedule", SCHEDULES),
            ("geometry_stream", STREAMS),
            ("language_stream", STREAMS),
        ):
            _wanted(getattr(self, name) in known, name, f"one of {', '.join(known)}", getattr(self, name))
        terms = ("geometry_feature", "language_feature", "structure")
        for name, weight in self.weights.items():
            _wanted(name in terms, "weights", f"names among {', '.join(terms)}", name)
            _wanted(0 <= weight < math.inf, f"weights.{name}", "a number of at least 0", weight)

    def check(self) -> None:
        """Check what only the finished recipe can say.

        Raises:
            ValueError: Student, teachers or clips are missing, or there are two kinds of data.

        Source:
            Ours.
        """
        for name, example in (
            ("model", "PATH_OR_PRESET"),
            ("geometry_teacher", "facebook/dinov2-with-registers-large or a checkpoint of `vidllm init --geometry`"),
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


def _wanted(held: bool, where: str, wanted: str, got: object) -> None:
    """One clear error."""
    if not held:
        raise ValueError(f"{where}: wanted {wanted}; got {got!r}")


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
        does not state it: lambda 1, learning rate, steps, batch, warm-up, and that the student starts from public DINOv2.
    """
    return DistillRecipe(
        name="paper_stage1",
        model=None,
        weights_dtype="bfloat16",
        num_frames=32,
        frames_kept=64,
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


def chosen_distill_recipe(name: str, settings: Sequence[str] = (), clips: str | None = None) -> DistillRecipe:
    """A complete, checked recipe of what a command line says.

    Args:
        name (`str`): Of a recipe.
        settings (`Sequence[str]`): `field=value`.
        clips (`str`, *optional*): A folder of clips, instead of the recipe's rooms.

    Returns:
        `DistillRecipe`

    Raises:
        ValueError: See `with_settings` and `DistillRecipe.check`.

    Source:
        Ours.
    """
    chosen = DISTILL_RECIPES[known_name("recipe", name, DISTILL_RECIPES)]()
    if clips is not None:
        chosen = replace(chosen, rooms=None, clips=clips)
    chosen = with_settings(chosen, settings)
    chosen.check()
    return chosen


__all__ = [
    "DISTILL_RECIPES",
    "DistillRecipe",
    "chosen_distill_recipe",
    "debug_stage1",
    "nano_stage1",
    "paper_stage1",
]
