"""Recipes of training runs: functions that return everything a run depends on, complete and frozen.

A field is changed by `with_settings(recipe, ["learning_rate=1e-4", "losses.weights.token=2", "rooms.num_rooms=100"])`; texts are parsed
by the field's type and never evaluated.
"""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from vidllm.train.held_out import HeldOutSettings, same_place
from vidllm.train.losses import JointLossSettings
from vidllm.train.muon import OPTIMIZERS
from vidllm.train.presets import PRESETS
from vidllm.train.recipe_parts import LoraSettings, MixingSchedule
from vidllm.train.recipe_settings import check_expression, check_factors, known_name, plain, require, with_settings
from vidllm.train.room_source import RoomsSettings


PRECISIONS = ("float32", "bfloat16")
# Weights of losses on what only rooms know.
ROOM_LOSSES = ("dense_labels", "loc_labels", "dense_matching")
SCHEDULES = ("cosine", "linear", "constant_with_warmup")


@dataclass(frozen=True)
class JointRecipe:
    """Everything that a joint run depends on.

    Args:
        name (`str`): Of the recipe.
        model (`str`, *optional*): A preset (random weights), a checkpoint folder, or a Hub id.
        weights_dtype (`str`): Of the weights that are not trained; geometry heads and what is trained are float32.
        rooms (`RoomsSettings`, *optional*): Procedural rooms made on the fly, instead of files.
        rooms_cache (`str`, *optional*): Folder that keeps the rooms for other runs; by default `rooms` in the run's folder.
        data_root (`str`, *optional*): Folder with scenes and annotations.
        benchmarks (`Mapping[str, float]`): Benchmarks of the data root and their shares among a scene's prompts.
        variants (`Mapping[str, str]`): Variant of a benchmark's rows where it is not the default, see `load_benchmark`.
        split (`str`): Split of the benchmarks.
        data (`str`, *optional*): A JSONL file of own videos; beside a data root, or alone.
        data_weight (`float`): Share of the file's prompts where a scene has others too.
        num_frames (`int`, *optional*): Frames per video; by default the processor's.
        frame_choice (`str`): `uniform`, `max_coverage` or `random`.
        reply_choice (`str`): `first` or `random`: which of several good replies is learned.
        prompts_per_scene (`int`): Most prompts of a scene in a step, 0 = all.
        steps (`int`): Optimizer steps.
        batch_size (`int`): Scenes per process and forward.
        accumulation (`int`): Forwards per step.
        optimizer (`str`): `adamw`, or `muon`: `torch.optim.Muon` for the weights of linear layers, AdamW for the rest.
        learning_rate (`float`): At its highest.
        learning_rate_factors (`Mapping[str, float]`): Regular expression of parameter names to a factor of their learning rate; the first that is found counts.
        schedule (`str`): `cosine` or `linear` to zero, or `constant_with_warmup`.
        warmup (`float`): Share of the steps in which the learning rate rises.
        weight_decay (`float`): Of matrices; norms, biases and other one-dimensional parameters have none.
        betas (`tuple` of `float`): AdamW's.
        clip (`float`): Largest norm of the gradient.
        precision (`str`): `float32`, or `bfloat16` for autocast.
        activation_checkpointing (`bool`): Compute activations twice instead of keeping them.
        workers (`int`): Processes per training process that read data.
        losses (`JointLossSettings`): Weights and constants of the losses.
        dense_labels (`float`): Weight of the loss on category, colour and pattern of patches; only rooms know these. 0 leaves it out.
        loc_labels (`float`): Weight of the loss on category and colour of what a `<loc>` means; for rooms. 0 leaves it out.
        dense_matching (`float`): Weight of the loss on which patches of two frames see the same place; for rooms. 0 leaves it out.
        given_geometry (`MixingSchedule`): Schedule of true geometry.
        proposals (`str`, *optional*): What the grounding decoder chooses among, see `load_proposals`: `true` for the scenes' own boxes, or a file
            or folder; by default it finds boxes by itself.
        freeze_encoder (`bool`): Whether the vision encoder stays as it is.
        train_only (`str`, *optional*): Regular expression of parameter names: all others stay as they are, and their modules in evaluation mode.
        lora (`LoraSettings`, *optional*): Adapters on the language model instead of training it.
        group_by_length (`bool`): Whether forwards of a step hold scenes of about the same length, of files; every step keeps its scenes.
        held_out (`HeldOutSettings`, *optional*): Scenes that are not learned from, and how often all losses are measured on them.
        seed (`int`): Of everything that is drawn.
        log_every (`int`): Steps between lines of the log.
        save_every (`int`): Steps between checkpoints.
        keep_checkpoints (`int`): How many are kept.
        report_to (`tuple` of `str`): Where the log goes besides the folder of the run, such as `tensorboard` or `wandb`.

    Raises:
        ValueError: A field is out of range.

    Source:
        Paper: AdamW, betas, weight decay, clip, frozen encoder (Fig. 3). Ours: everything else.
    """

    name: str
    model: str | None
    weights_dtype: str = "float32"
    # data
    rooms: RoomsSettings | None = None
    rooms_cache: str | None = None
    data_root: str | None = None
    benchmarks: Mapping[str, float] = field(default_factory=dict)
    variants: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    data: str | None = None
    data_weight: float = 1.0
    num_frames: int | None = None
    frame_choice: str = "random"
    reply_choice: str = "random"
    prompts_per_scene: int = 8
    # optimisation
    steps: int = 1000
    batch_size: int = 1
    accumulation: int = 1
    optimizer: str = "adamw"
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
    losses: JointLossSettings = field(default_factory=JointLossSettings)
    dense_labels: float = 0.0
    loc_labels: float = 0.0
    dense_matching: float = 0.0
    given_geometry: MixingSchedule = field(default_factory=MixingSchedule)
    proposals: str | None = None
    freeze_encoder: bool = True
    train_only: str | None = None
    lora: LoraSettings | None = None
    group_by_length: bool = False
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
        for name in ("prompts_per_scene", "workers", "seed"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("weight_decay", "clip", *ROOM_LOSSES, "data_weight"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, "a number of at least 0", value)
        require(0 < self.learning_rate < math.inf, "learning_rate", "a positive number", self.learning_rate)
        require(0 <= self.warmup < 1, "warmup", "a share of the steps, 0..1", self.warmup)
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "betas",
            "two numbers in 0..1",
            self.betas,
        )
        require(self.num_frames is None or self.num_frames >= 1, "num_frames", "at least 1", self.num_frames)
        for name, known in (
            ("precision", PRECISIONS),
            ("weights_dtype", PRECISIONS),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("frame_choice", ("uniform", "max_coverage", "random")),
            ("reply_choice", ("first", "random")),
        ):
            value = getattr(self, name)
            require(value in known, name, f"one of {', '.join(known)}", value)
        check_factors(self.learning_rate_factors)
        if self.train_only is not None:
            check_expression("train_only", self.train_only)
        unknown = sorted(set(self.variants) - set(self.benchmarks))
        require(not unknown, "variants", f"names among the benchmarks {', '.join(self.benchmarks)}", unknown)

    def check(self) -> None:
        """Check what only the finished recipe can say: that there is a model and data, and that the fields fit together.

        Raises:
            ValueError: Something is missing or contradicts something else.

        Source:
            Ours.
        """
        if self.model is None:
            raise ValueError(f"{self.name}: wanted a model to start from: --set model=PATH_OR_PRESET")
        if self.rooms is not None and (self.data_root is not None or self.data is not None):
            raise ValueError(
                f"{self.name}: wanted rooms or files to read; got both; --set rooms=none trains on the files"
            )
        if self.rooms is None and self.data_root is None and self.data is None:
            raise ValueError(f"{self.name}: wanted data: --data-root DIR, --data FILE.jsonl, or --set rooms=default")
        if (self.data_root is not None) != bool(self.benchmarks):
            raise ValueError(
                f"{self.name}: wanted a data root and benchmarks of it, or neither; got data_root {self.data_root!r} and "
                f"benchmarks {', '.join(self.benchmarks) or 'none'}"
            )
        for name in ROOM_LOSSES:
            if getattr(self, name) and self.rooms is None:
                raise ValueError(f"{self.name}: wanted rooms for {name}; files do not know what each pixel shows")
        if self.proposals is not None and self.data_root is None:
            raise ValueError(f"{self.name}: wanted a data root for proposals; they are of its scenes")
        held = self.held_out
        if held is not None and (self.rooms is None) and (self.data_root is None) != (held.data is not None):
            raise ValueError(
                f"{self.name}: wanted held_out.data=FILE.jsonl with a JSONL file alone, and the data root's split {held.split!r} otherwise; "
                f"got held_out.data {held.data!r}"
            )
        if held is not None and self.data_root is not None and held.split == self.split:
            raise ValueError(
                f"{self.name}: wanted another split for held_out than is learned from; got {held.split!r}"
            )
        if held is not None:
            files = "data" if self.data_root is None else "split"
            held.check_read(self.name, None if self.rooms is not None else files)
            if self.data is not None and held.data is not None and same_place(held.data, self.data):
                raise ValueError(
                    f"{self.name}: wanted another file for held_out than is learned from; got {held.data}"
                )
        if self.lora is not None and not self.freeze_encoder:
            raise ValueError(f"{self.name}: wanted freeze_encoder with lora; got a trained encoder")
        if self.lora is not None and self.model in PRESETS:
            raise ValueError(
                f"{self.name}: wanted a checkpoint for lora; got the preset {self.model}, whose weights are random"
            )
        if self.weights_dtype != "float32" and self.precision == "float32":
            raise ValueError(f"{self.name}: wanted precision {self.weights_dtype}, as the weights; got float32")


_BENCHMARKS = {"scanqa": 1.0, "sqa3d": 1.0, "scanrefer": 1.0, "scan2cap": 1.0}
_VARIANTS = {"scan2cap": "per_description"}


def debug() -> JointRecipe:
    """Seconds on a laptop: the tiny model, four rooms, two steps.

    Returns:
        `JointRecipe`: complete.

    Source:
        Ours: what the tests train and resume.
    """
    return JointRecipe(
        name="debug",
        model="vidllm-tiny",
        rooms=RoomsSettings(
            num_rooms=4, block_size=4, first_blocks=1, makers=0, size_hw=(28, 42), frames_kept=6, jpeg_share=0.0
        ),
        num_frames=3,
        prompts_per_scene=3,
        steps=2,
        batch_size=2,
        learning_rate=1e-3,
        workers=0,
        freeze_encoder=False,
        log_every=1,
        save_every=2,
    )


def nano_perception() -> JointRecipe:
    """The small model from random weights, on procedural rooms, first part: what is where. For two processes on two CPU cores, 16 rooms per step.

    `vidllm train joint nano_perception --out DIR --num-processes 2 --cpu`; `nano` goes on from there.

    Returns:
        `JointRecipe`: complete.

    Source:
        Ours: a language model of random weights learns to look things up in a scene only once its tokens say what is in it and stay as they are;
        both at once took longer than one after the other. The blocks of the reconstruction learn slowly, or the noise of the first steps
        drowns what tells camera tokens apart. True geometry is given throughout: only language and boxes would read what is predicted, the
        weights come out the same bit for bit, and no pose has to be refined.
    """
    weights = {
        "camera_fov": 0.3,
        "depth_confidence": 0.05,
        "depth_regression": 2.0,
        "points_confidence": 0.05,
        "metric_depth": 5.0,
        "room_rotation": 0.2,
        # few words of language would be noise in the way of what is seen
        "token": 0.0,
        "box_l1": 0.0,
        "box_diou": 0.0,
        "match": 0.0,
    }
    losses = JointLossSettings()
    return JointRecipe(
        name="nano_perception",
        model="vidllm-nano",
        train_only=r"\.(encoder|adapter|reconstruction|metric_depth)\.",
        rooms=_nano_rooms(),
        num_frames=4,
        prompts_per_scene=1,
        steps=1800,
        batch_size=8,
        optimizer="muon",
        learning_rate=1.5e-3,
        learning_rate_factors={r"reconstruction\.(tokens|frame_blocks|global_blocks)": 0.1},
        warmup=0.02,
        betas=(0.9, 0.95),
        precision="bfloat16",
        workers=1,
        losses=replace(losses, weights={**losses.weights, **weights}),
        dense_labels=1.0,
        dense_matching=1.0,
        given_geometry=MixingSchedule(start=1.0, end=1.0),
        freeze_encoder=False,
        log_every=20,
        save_every=100,
    )


def nano() -> JointRecipe:
    """The small model, second part: language and boxes, on what `nano_perception` made. Wants `--set model=DIR`.

    `vidllm train joint nano --set model=DIR --out DIR2 --num-processes 2 --cpu`: 8 rooms per step.

    Returns:
        `JointRecipe`: complete but for the model.

    Source:
        Ours: many prompts of few rooms, because each room is encoded once: on two cores 17 of 8 rooms are 121 prompts per second, 12 of 16 rooms 84.
    """
    weights = {"token": 2.0, "box_l1": 0.5, "box_diou": 0.5}
    losses = JointLossSettings()
    return JointRecipe(
        name="nano",
        model=None,
        train_only=r"scene_tokens|point_embedding|language_model|lm_head|grounding",
        rooms=replace(
            _nano_rooms(),
            tasks={"qa": 0.65, "sqa": 0.16, "ground": 0.13, "caption": 0.06},
            plain_prompts=8,
            unlocked_at=0.3,
        ),
        num_frames=4,
        prompts_per_scene=9,
        steps=2300,
        batch_size=4,
        optimizer="muon",
        learning_rate=2e-3,
        learning_rate_factors={r"scene_tokens": 0.1},
        warmup=0.02,
        betas=(0.9, 0.95),
        precision="bfloat16",
        workers=1,
        losses=replace(losses, weights={**losses.weights, **weights}),
        loc_labels=0.5,
        given_geometry=MixingSchedule(start=1.0, end=0.0, until=0.6),
        freeze_encoder=True,
        log_every=20,
        save_every=100,
    )


def _nano_rooms() -> RoomsSettings:
    """The rooms that both parts see."""
    return RoomsSettings(
        num_rooms=12000,
        levels={"easy": 0.9, "standard": 0.1},
        frames_kept=8,
        first_blocks=64,
        unlocked_at=0.6,
        makers=1,
    )


def nano_lora() -> JointRecipe:
    """Fine-tune a small trained model on own videos: wants `--set model=PATH --data FILE.jsonl`.

    Returns:
        `JointRecipe`: complete but for model and data.

    Source:
        Ours.
    """
    return JointRecipe(
        name="nano_lora",
        model=None,
        prompts_per_scene=4,
        steps=200,
        batch_size=4,
        learning_rate=1e-3,
        workers=0,
        lora=LoraSettings(rank=8, alpha=16.0),
        log_every=5,
        save_every=50,
    )


def scannet() -> JointRecipe:
    """The paper's second stage on ScanNet's benchmarks: wants `--set model=PATH --data-root DIR`.

    Returns:
        `JointRecipe`: complete but for model and data.

    Source:
        Paper: 32 uniform frames, AdamW, frozen encoder. Ours: adapters instead of the whole language model; learning rate (no factor for the
        language model: all of it that is trained is adapters, which start from nothing, and the rows of two new tokens), batch, steps, shares.
        Without adapters it is `paper_stage2`, at half its length and without its factor.
    """
    return JointRecipe(
        name="scannet",
        model=None,
        weights_dtype="bfloat16",
        benchmarks=_BENCHMARKS,
        variants=_VARIANTS,
        num_frames=32,
        frame_choice="uniform",
        prompts_per_scene=8,
        steps=10000,
        batch_size=1,
        accumulation=2,
        learning_rate=1e-4,
        precision="bfloat16",
        activation_checkpointing=True,
        workers=8,
        lora=LoraSettings(rank=64, alpha=128.0),
    )


def paper_stage2() -> JointRecipe:
    """The paper's second stage, all of it: wants `--set model=PATH`, a checkpoint of stage 1, and `--data-root DIR`.

    Returns:
        `JointRecipe`: complete but for model and data.

    Source:
        Paper: AdamW (0.9, 0.999), weight decay 0.05, clip 1.0, 32 uniform frames, frozen encoder (its Fig. 3; its text trains everything), unit
        weights (eq. 8). Ours, because the paper does not state it:
        - learning rate 1e-4: usual for parts that start from random weights; a tenth of it for the language model, which is pretrained and
          should not forget how to speak.
        - 20,000 steps: as many as stage 1; `held_out` says whether more help.
        - batch: one scene per device and forward, because 32 frames at 518 pixels leave room for no second one on common devices; two forwards
          per step, because a step of few scenes is noisy.
        - warm-up 3 % of the steps: AdamW's averages know nothing at first.
        - 8 prompts per scene: they share the encoding of the scene, which costs most; more would make the language model's row the longer part.
        - equal shares of the benchmarks: the paper reports all of them, and none stands for another; Scan2Cap has a row per description, so that
          each one is learned.
    """
    return JointRecipe(
        name="paper_stage2",
        model=None,
        weights_dtype="bfloat16",
        benchmarks=_BENCHMARKS,
        variants=_VARIANTS,
        num_frames=32,
        frame_choice="uniform",
        prompts_per_scene=8,
        steps=20000,
        batch_size=1,
        accumulation=2,
        learning_rate=1e-4,
        learning_rate_factors={r"language_model|lm_head": 0.1},
        precision="bfloat16",
        activation_checkpointing=True,
        workers=8,
    )


def single_gpu_lora() -> JointRecipe:
    """ScanNet's benchmarks on one GPU: low-rank adapters on the language model, geometry left as it is. Wants model and data root.

    Returns:
        `JointRecipe`: complete but for model and data.

    Source:
        Ours: adapters and the rows of two new tokens learn at the full rate, see `scannet`; half the frames and rank fit one device, and eight
        forwards per step stand for the devices that are not there.
    """
    return replace(
        scannet(),
        name="single_gpu_lora",
        train_only=r"lora_|trainable_tokens|\.(adapter|scene_tokens|point_embedding|grounding)\.",
        num_frames=16,
        accumulation=8,
        workers=4,
        lora=LoraSettings(rank=32, alpha=64.0),
    )


def nano_stage2() -> JointRecipe:
    """The small model's second stage in one part, all of it trained: wants `--set model=DIR`, such as the result of `nano_stage1`.

    Returns:
        `JointRecipe`: complete but for the model.

    Source:
        Ours.
    """
    seeing, speaking = nano_perception(), nano()
    weights = {
        **seeing.losses.weights,
        **{name: speaking.losses.weight(name) for name in ("token", "box_l1", "box_diou", "match")},
    }
    return replace(
        seeing,
        name="nano_stage2",
        model=None,
        train_only=None,
        # as the study of both stages was run
        optimizer="adamw",
        learning_rate=8e-4,
        learning_rate_factors={**seeing.learning_rate_factors, **speaking.learning_rate_factors},
        losses=replace(seeing.losses, weights=weights),
        loc_labels=speaking.loc_labels,
        prompts_per_scene=4,
        rooms=replace(_nano_rooms(), plain_prompts=4),
    )


RECIPES: Mapping[str, Callable[[], JointRecipe]] = types.MappingProxyType(
    {
        function.__name__: function
        for function in (
            debug,
            nano_perception,
            nano,
            nano_lora,
            nano_stage2,
            scannet,
            single_gpu_lora,
            paper_stage2,
        )
    }
)


def recipe(name: str) -> JointRecipe:
    """A recipe by name.

    Args:
        name (`str`): One of `RECIPES`.

    Returns:
        `JointRecipe`: as its function returns it.

    Raises:
        ValueError: There is none of that name; the closest one is suggested.

    Source:
        Ours.
    """
    return RECIPES[known_name("recipe", name, RECIPES)]()


def changed_recipe(
    name: str, settings: Sequence[str] = (), data: str | None = None, data_root: str | None = None
) -> JointRecipe:
    """A recipe of what a command line says; it may be incomplete.

    Args:
        name (`str`): Of a recipe.
        settings (`Sequence[str]`): `field=value`.
        data (`str`, *optional*): A JSONL file of own videos; unless `data_root` is given too, instead of the recipe's data.
        data_root (`str`, *optional*): Data root of the recipe's benchmarks, instead of its rooms.

    Returns:
        `JointRecipe`

    Raises:
        ValueError: See `recipe` and `with_settings`.

    Source:
        Ours.
    """
    chosen = recipe(name)
    if data is not None or data_root is not None:
        chosen = replace(chosen, rooms=None, data=data, data_root=data_root, **dict.fromkeys(ROOM_LOSSES, 0.0))
        if data_root is None:
            chosen = replace(chosen, benchmarks={}, variants={})
    return with_settings(chosen, settings)


def chosen_recipe(
    name: str, settings: Sequence[str] = (), data: str | None = None, data_root: str | None = None
) -> JointRecipe:
    """A complete, checked recipe of what a command line says.

    Args:
        name (`str`): See `changed_recipe`.
        settings (`Sequence[str]`): See there.
        data (`str`, *optional*): See there.
        data_root (`str`, *optional*): See there.

    Returns:
        `JointRecipe`

    Raises:
        ValueError: See `changed_recipe` and `JointRecipe.check`.

    Source:
        Ours.
    """
    chosen = changed_recipe(name, settings, data, data_root)
    chosen.check()
    return chosen


__all__ = [
    "RECIPES",
    "JointRecipe",
    "LoraSettings",
    "MixingSchedule",
    "changed_recipe",
    "chosen_recipe",
    "debug",
    "known_name",
    "nano",
    "nano_lora",
    "nano_perception",
    "plain",
    "recipe",
    "scannet",
    "with_settings",
]
