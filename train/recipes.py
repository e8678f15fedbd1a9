"""Recipes of training runs: functions that return everything a run depends on, complete and frozen.

A field is changed by `with_settings(recipe, ["learning_rate=1e-4", "losses.weights.token=2", "rooms.num_rooms=100"])`; texts are parsed
by the field's type and never evaluated.
"""

import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from vidllm.train.held_out import HeldOutSettings
from vidllm.train.losses import JointLossSettings
from vidllm.train.presets import PRESETS
from vidllm.train.room_source import RoomsSettings


Recipe = typing.TypeVar("Recipe")
PRECISIONS = ("float32", "bfloat16")
# Weights of losses on what only rooms know.
ROOM_LOSSES = ("dense_labels", "loc_labels", "dense_matching")
SCHEDULES = ("cosine", "linear", "constant_with_warmup")
# Attention and feed-forward of the language model, by the names that most decoders of transformers use.
LANGUAGE_MODEL_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def _wanted(held: bool, where: str, wanted: str, got: Any) -> None:
    """One clear error."""
    if not held:
        raise ValueError(f"{where}: wanted {wanted}; got {got!r}")


@dataclass(frozen=True)
class MixingSchedule:
    """With which probability a video is given something true instead of what the model predicts.

    Args:
        start (`float`): At the first step.
        end (`float`): From `until` on.
        until (`float`): Share of the run after which the end is reached.
        shape (`str`): `linear` or `cosine` between them.

    Raises:
        ValueError: A number is not in 0..1, or the shape is unknown.

    Source:
        Ours: language can be learned while perception is not there yet; a model that is never told learns to live with its own.
    """

    start: float = 1.0
    end: float = 0.0
    until: float = 0.5
    shape: str = "cosine"

    def __post_init__(self) -> None:
        for name in ("start", "end", "until"):
            _wanted(0 <= getattr(self, name) <= 1, f"mixing.{name}", "a number in 0..1", getattr(self, name))
        _wanted(self.shape in ("linear", "cosine"), "mixing.shape", "linear or cosine", self.shape)

    def share(self, progress: float) -> float:
        """Probability at a point of the run.

        Args:
            progress (`float`): Steps done by steps of the run, 0..1.

        Returns:
            `float`: 0..1.

        Source:
            Ours.
        """
        done = 1.0 if progress >= self.until else progress / self.until
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the language model; its own weights stay as they are.

    Args:
        rank (`int`): Of the adapters.
        alpha (`float`): Their scale times the rank.
        dropout (`float`): On their input.
        targets (`str`): Regular expression of the names of the linear layers that get one.
        dora (`bool`): DoRA: the length of each row of a weight is learned apart from its direction.
        four_bits (`bool`): Hold the language model's own weights in 4 bits while it is trained (QLoRA); wants bitsandbytes. What is written at
            the end has the checkpoint's own weights.

    Raises:
        ValueError: A number is out of range.

    Source:
        Upstream: huggingface/peft LoraConfig.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = LANGUAGE_MODEL_LAYERS
    dora: bool = False
    four_bits: bool = False

    def __post_init__(self) -> None:
        _wanted(self.rank >= 1, "lora.rank", "at least 1", self.rank)
        _wanted(self.alpha > 0, "lora.alpha", "a positive number", self.alpha)
        _wanted(0 <= self.dropout < 1, "lora.dropout", "a number in 0..1", self.dropout)
        _check_expression("lora.targets", self.targets)


def _check_expression(where: str, expression: str) -> None:
    """A regular expression that compiles."""
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{where}: wanted a regular expression; got {expression!r} ({error})") from None


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
        dense_labels (`float`): Weight of the loss on category and colour of patches; only rooms know these. 0 leaves it out.
        loc_labels (`float`): Weight of the loss on category and colour of what a `<loc>` means; for rooms. 0 leaves it out.
        dense_matching (`float`): Weight of the loss on which patches of two frames see the same place; for rooms. 0 leaves it out.
        given_geometry (`MixingSchedule`): Schedule of true geometry.
        freeze_encoder (`bool`): Whether the vision encoder stays as it is.
        train_only (`str`, *optional*): Regular expression of parameter names: all others stay as they are, and their modules in evaluation mode.
        lora (`LoraSettings`, *optional*): Adapters on the language model instead of training it.
        held_out (`HeldOutSettings`, *optional*): Scenes that are not learned from, and how often all losses are measured on them.
        seed (`int`): Of everything that is drawn.
        log_every (`int`): Steps between lines of the log.
        save_every (`int`): Steps between checkpoints.
        keep_checkpoints (`int`): How many are kept.

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
    freeze_encoder: bool = True
    train_only: str | None = None
    lora: LoraSettings | None = None
    held_out: HeldOutSettings | None = None
    # the run
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "keep_checkpoints"):
            _wanted(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("prompts_per_scene", "workers", "seed"):
            _wanted(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("weight_decay", "clip", *ROOM_LOSSES, "data_weight"):
            value = getattr(self, name)
            _wanted(0 <= value < math.inf, name, "a number of at least 0", value)
        _wanted(0 < self.learning_rate < math.inf, "learning_rate", "a positive number", self.learning_rate)
        _wanted(0 <= self.warmup < 1, "warmup", "a share of the steps, 0..1", self.warmup)
        _wanted(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "betas",
            "two numbers in 0..1",
            self.betas,
        )
        _wanted(self.num_frames is None or self.num_frames >= 1, "num_frames", "at least 1", self.num_frames)
        for name, known in (
            ("precision", PRECISIONS),
            ("weights_dtype", PRECISIONS),
            ("schedule", SCHEDULES),
            ("frame_choice", ("uniform", "max_coverage", "random")),
            ("reply_choice", ("first", "random")),
        ):
            value = getattr(self, name)
            _wanted(value in known, name, f"one of {', '.join(known)}", value)
        for expression, factor in self.learning_rate_factors.items():
            _check_expression("learning_rate_factors", expression)
            _wanted(0 <= factor < math.inf, f"learning_rate_factors.{expression}", "a factor of at least 0", factor)
        if self.train_only is not None:
            _check_expression("train_only", self.train_only)
        unknown = sorted(set(self.variants) - set(self.benchmarks))
        _wanted(not unknown, "variants", f"names among the benchmarks {', '.join(self.benchmarks)}", unknown)

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
        drowns what tells camera tokens apart.
    """
    weights = {
        "camera_translation": 5.0,
        "camera_rotation": 5.0,
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
        learning_rate=8e-4,
        learning_rate_factors={r"reconstruction\.(tokens|frame_blocks|global_blocks)": 0.1},
        warmup=0.02,
        betas=(0.9, 0.95),
        precision="bfloat16",
        workers=1,
        losses=replace(losses, weights={**losses.weights, **weights}),
        dense_labels=1.0,
        dense_matching=2.0,
        given_geometry=MixingSchedule(start=1.0, end=0.0, until=0.6),
        freeze_encoder=False,
        log_every=20,
        save_every=100,
    )


def nano() -> JointRecipe:
    """The small model, second part: language and boxes, on what `nano_perception` made. Wants `--set model=DIR`.

    `vidllm train joint nano --set model=DIR --out DIR2 --num-processes 2 --cpu`.

    Returns:
        `JointRecipe`: complete but for the model.

    Source:
        Ours.
    """
    weights = {"token": 2.0, "box_l1": 0.5, "box_diou": 0.5}
    losses = JointLossSettings()
    return JointRecipe(
        name="nano",
        model=None,
        train_only=r"scene_tokens|point_embedding|language_model|lm_head|grounding",
        rooms=replace(_nano_rooms(), plain_prompts=8, unlocked_at=0.3),
        num_frames=4,
        prompts_per_scene=4,
        steps=1650,
        batch_size=8,
        learning_rate=8e-4,
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
        even_share=0.5,
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
        Paper: 32 uniform frames, AdamW, frozen encoder. Ours: learning rates, batch, steps, shares.
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
        learning_rate_factors={r"language_model|lm_head": 0.1},
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
        weights (eq. 8). Ours, because the paper does not state it: learning rates, steps, batch, warm-up, prompts per scene, and shares of
        the benchmarks.
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
        Ours.
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
        learning_rate_factors={**seeing.learning_rate_factors, **speaking.learning_rate_factors},
        losses=replace(seeing.losses, weights=weights),
        loc_labels=speaking.loc_labels,
        prompts_per_scene=speaking.prompts_per_scene,
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


def known_name(where: str, name: str, known: typing.Iterable[str]) -> str:
    """A known name, or an error with the closest one.

    Args:
        where (`str`): What is named, for the message.
        name (`str`): As given.
        known (`Iterable[str]`): All names.

    Returns:
        `str`: the name.

    Raises:
        ValueError: It is not known.

    Source:
        Ours.
    """
    known = list(known)
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{where}: wanted one of {', '.join(known)}; got {name!r}{hint}")


def with_settings(base: Recipe, settings: Sequence[str]) -> Recipe:
    """A recipe with other values.

    Args:
        base (a dataclass such as `JointRecipe`): To start from.
        settings (`Sequence[str]`): `field=value`; parts of a field by dots (`rooms.num_rooms=100`, `benchmarks.scanqa=0.5`). `none` empties
            a field that may be empty, `default` gives one of several parts its defaults; tuples are separated by commas, mappings
            written as `name:value,name:value`.

    Returns:
        The same kind of recipe; the others unchanged.

    Raises:
        ValueError: No `=`, an unknown field (the closest one is suggested), or a value of another type or out of range.

    Source:
        Ours: parsed by the field's type.
    """
    changed = base
    for setting in settings:
        path, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting}: wanted field=value")
        changed = _replaced(changed, path.strip().split("."), text.strip(), f"--set {path.strip()}")
    return changed


def _replaced(part: Any, path: list[str], text: str, where: str) -> Any:
    """A dataclass with one value changed, however deep it lies."""
    name = known_name(where, path[0], [item.name for item in fields(part)])
    hint = typing.get_type_hints(type(part))[name]
    value, inner = getattr(part, name), _without_none(hint)
    if len(path) == 1:
        return replace(part, **{name: _parsed(hint, text, where)})
    if is_dataclass(inner):
        value = inner() if value is None else value
        return replace(part, **{name: _replaced(value, path[1:], text, where)})
    if typing.get_origin(inner) is Mapping:
        entry = _parsed(typing.get_args(inner)[1], text, where)
        return replace(part, **{name: {**value, ".".join(path[1:]): entry}})
    raise ValueError(f"{where}: wanted {name} without further parts")


def _without_none(hint: Any) -> Any:
    """`X` of `X | None`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(option for option in typing.get_args(hint) if option is not type(None))
    return hint


def _parsed(hint: Any, text: str, where: str) -> Any:
    """A value of a type from its text."""
    inner = _without_none(hint)
    if inner is not hint and text.lower() == "none":
        return None
    if is_dataclass(inner):
        _wanted(
            text == "default", where, f"{'none or ' * (inner is not hint)}default, or one of its parts by a dot", text
        )
        return inner()
    origin = typing.get_origin(inner)
    if origin is tuple:
        kinds, texts = typing.get_args(inner), text.split(",")
        kinds = (kinds[0],) * len(texts) if kinds[-1] is ... else kinds
        _wanted(len(texts) == len(kinds), where, f"{len(kinds)} values separated by commas", text)
        return tuple(_parsed(kind, item.strip(), where) for kind, item in zip(kinds, texts, strict=True))
    if origin is Mapping:
        pairs = [pair.rpartition(":") for pair in text.split(",") if pair.strip()]
        _wanted(all(middle for _, middle, _ in pairs), where, "name:value, several separated by commas", text)
        return {key.strip(): _parsed(typing.get_args(inner)[1], value.strip(), where) for key, _, value in pairs}
    if inner is bool:
        _wanted(text.lower() in ("true", "false"), where, "true or false", text)
        return text.lower() == "true"
    if inner is str:
        return text
    try:
        value = inner(text)
    except ValueError:
        value = math.nan
    _wanted(math.isfinite(value), where, {int: "a whole number", float: "a number"}[inner], text)
    return value


def chosen_recipe(
    name: str, settings: Sequence[str] = (), data: str | None = None, data_root: str | None = None
) -> JointRecipe:
    """A complete, checked recipe of what a command line says.

    Args:
        name (`str`): Of a recipe.
        settings (`Sequence[str]`): `field=value`.
        data (`str`, *optional*): A JSONL file of own videos; unless `data_root` is given too, instead of the recipe's data.
        data_root (`str`, *optional*): Data root of the recipe's benchmarks, instead of its rooms.

    Returns:
        `JointRecipe`

    Raises:
        ValueError: See `with_settings` and `JointRecipe.check`.

    Source:
        Ours.
    """
    chosen = recipe(name)
    if data is not None or data_root is not None:
        chosen = replace(chosen, rooms=None, data=data, data_root=data_root, **dict.fromkeys(ROOM_LOSSES, 0.0))
        if data_root is None:
            chosen = replace(chosen, benchmarks={}, variants={})
    chosen = with_settings(chosen, settings)
    chosen.check()
    return chosen


def plain(value: Any) -> Any:
    """Settings as JSON takes them.

    Args:
        value: A dataclass, or anything in its fields.

    Returns:
        dicts, lists, texts, numbers.

    Source:
        Ours.
    """
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


__all__ = [
    "RECIPES",
    "JointRecipe",
    "LoraSettings",
    "MixingSchedule",
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
