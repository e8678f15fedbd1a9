"""What a run will need, before it is started: parameters, memory per device, steps, tokens, FLOPs. Stage 1: `dry_run_distill`.

The parts of the model run forward and backward on fake tensors, which have shapes and no values: what autograd keeps is added up as it is kept, FLOPs as they
are counted. Only the pooling of scene tokens, whose work depends on values, is stood in for by its matrix products. Prompts stand in rows with a mask, as they
do but on a CPU; the optimizer is taken for AdamW.

Shapes: B videos, S frames, H W pixels, P patches per frame, N scene-token slots, Q prompts, D language-model width.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.modeling_vidllm import MODULES_NOT_TO_QUANTISE, VidLLMForConditionalGeneration
from vidllm.processing.video_processing_vidllm import VidLLMVideoProcessor, resize_plan
from vidllm.train.joint_trainer import GEOMETRY_MODULES, base_model, freeze_for_joint
from vidllm.train.lora import add_lora
from vidllm.train.presets import PRESETS
from vidllm.train.recipes import JointRecipe
from vidllm.train.room_source import RoomsSettings


# AdamW keeps two numbers of 4 bytes for each trained one; gradients and what is trained are float32.
ADAM_BYTES, GRADIENT_BYTES = 8, 4
# What the losses on depth and points keep for each pixel, as measured on the losses themselves at two sizes: they sort and select by value, which fake tensors have none.
LOSS_BYTES_PER_PIXEL = 193
SHARDINGS = ("none", "zero2", "full")
# NF4: half a byte, and for each 64 weights their largest value as float32.
FOUR_BIT_BYTES = 0.5 + 4 / 64
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class PartCost:
    """Of one part of the model, for one forward of one device.

    Args:
        activation_bytes (`int`): What is kept for the backward pass.
        forward_flops (`int`): Of the forward pass.
        backward_flops (`int`): Of the backward pass, repeated forwards of checkpointing included.

    Source:
        Ours.
    """

    activation_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass(frozen=True)
class RunShape:
    """Of what a recipe's model and its frames are.

    Args:
        config (`VidLLMConfig`): Of the model.
        size_hw (`tuple[int, int]`): Height and width of the frames that the model sees.
        num_frames (`int`): Per video, unless the recipe says otherwise.

    Source:
        Ours.
    """

    config: VidLLMConfig
    size_hw: tuple[int, int]
    num_frames: int


def run_shape(model: str, rooms: RoomsSettings | None) -> RunShape:
    """Config, frames and their number of a recipe's model; weights are not read.

    Args:
        model (`str`): A preset, a checkpoint folder or a Hub id.
        rooms (`RoomsSettings`, *optional*): Whose frames it sees; without them those of a 4:3 video.

    Returns:
        `RunShape`: frames as the model's processor resizes and crops them.

    Raises:
        ValueError: There is no such model.

    Source:
        Ours.
    """
    if model in PRESETS:
        named = PRESETS[model]
        config, size = named.config(), {"shortest_edge": named.shortest_edge}
        frames, patch = named.num_frames, named.patch_size
    else:
        place = str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model
        try:
            config = VidLLMConfig.from_pretrained(place)
            videos = VidLLMVideoProcessor.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model: wanted a preset ({', '.join(PRESETS)}), a checkpoint folder or a Hub id; got {model!r}; {str(error).strip().splitlines()[0]}"
            ) from error
        size, frames, patch = videos.size, videos.num_frames, videos.patch_size
    # Any 4:3 picture: it is resized.
    source_hw = (1440, 1920) if rooms is None else rooms.size_hw
    return RunShape(config, resize_plan(source_hw, size, patch)[3], frames)


@dataclass(frozen=True)
class DryRun:
    """What a run needs.

    Args:
        parameters (`Mapping[str, int]`): By part of the model; with adapters, parts that are trained whole are there twice, as they are in memory.
        trained (`Mapping[str, int]`): Of these, trained.
        parts (`Mapping[str, PartCost]`): Costs of one forward of one device.
        weight_bytes (`int`): Per device.
        gradient_bytes (`int`): Per device.
        bucket_bytes (`int`): Per device: DDP keeps every gradient a second time, in the buckets that it sends.
        optimizer_bytes (`int`): Per device.
        activation_bytes (`int`): Per device.
        steps (`int`): Of the run.
        videos_per_step (`int`): Over all devices.
        frames_per_step (`int`): Over all devices.
        language_tokens_per_step (`int`): Over all devices.
        flops_per_step (`int`): Over all devices.
        prompts_per_video (`int`): Assumed; 0 in stage 1.
        prompt_tokens (`int`): Assumed, of a prompt and its reply.
        learned_tokens (`int`): Assumed, of the reply.
        teacher_bytes (`int`): Per device: weights of the teachers of stage 1.

    Source:
        Ours.
    """

    parameters: Mapping[str, int]
    trained: Mapping[str, int]
    parts: Mapping[str, PartCost]
    weight_bytes: int
    gradient_bytes: int
    bucket_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    steps: int
    videos_per_step: int
    frames_per_step: int
    language_tokens_per_step: int
    flops_per_step: int
    prompts_per_video: int = 0
    prompt_tokens: int = 0
    learned_tokens: int = 0
    teacher_bytes: int = 0

    @property
    def bytes_per_device(self) -> int:
        """All of it; what allocators waste is not in it."""
        states = self.gradient_bytes + self.bucket_bytes + self.optimizer_bytes
        return self.weight_bytes + self.teacher_bytes + states + self.activation_bytes


@dataclass
class _Ledger:
    """What autograd keeps within a context, without the model's own parameters."""

    own: set[int]
    kept: dict[int, int] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)

    def note(self, tensor: torch.Tensor) -> torch.Tensor:
        """Called for each tensor that is kept."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own and storage._cdata not in self.kept:
            self.kept[storage._cdata] = storage.nbytes()
            # Its number must not be given to another one.
            self.alive.append(storage)
        return tensor


def cost_of(call: Callable[[], Any], parameters: Any) -> PartCost:
    """Cost of a forward pass and of the backward pass behind it.

    Args:
        call (callable): Gives tensors `(...)`, alone or in lists, dicts or dataclasses.
        parameters (iterable of `torch.Tensor` of shape `(...)`): Not counted among what is kept.

    Returns:
        `PartCost`

    Source:
        Upstream: pytorch `saved_tensors_hooks`, `FlopCounterMode`.
    """
    ledger = _Ledger({p.untyped_storage()._cdata for p in parameters})
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(ledger.note, lambda kept: kept):
            output = call()
        forward = counter.get_total_flops()
        differentiable = [t for t in _tensors(output) if t.requires_grad]
        if differentiable:
            torch.autograd.backward([t.float().sum() for t in differentiable])
        total = counter.get_total_flops()
    return PartCost(sum(ledger.kept.values()), forward, total - forward)


def _tensors(value: Any) -> list[torch.Tensor]:
    """Floating tensors within a result."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in _tensors(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in _tensors(getattr(value, name))]
    return []


def part_costs(
    model: VidLLMForConditionalGeneration,
    batch_size: int,
    num_frames: int,
    size_hw: tuple[int, int],
    prompts_per_video: int,
    prompt_tokens: int,
    learned_tokens: int,
    loc_video: torch.Tensor | None = None,
) -> dict[str, PartCost]:
    """Costs of one forward, by part.

    Args:
        model (`VidLLMForConditionalGeneration`): In training mode; frozen where it will be. Its parameters may be fake.
        batch_size (`int`): B.
        num_frames (`int`): S.
        size_hw (`tuple[int, int]`): H, W.
        prompts_per_video (`int`): Each with one `<loc>`.
        prompt_tokens (`int`): Of a prompt and its reply, scene tokens left out.
        learned_tokens (`int`): Of the reply: logits are computed from there on.
        loc_video (`torch.Tensor` of shape `(B * prompts_per_video,)`, int64, *optional*): Video of each `<loc>`; real, where the rest is fake.

    Returns:
        `dict[str, PartCost]`

    Source:
        Ours.
    """
    core, config = model.model, model.config
    parameters = list(model.parameters())
    device, dtype = parameters[0].device, core.dtype
    height, width = size_hw
    grid_hw = core.encoder.grid_hw(height, width)
    patches, encoder_width = grid_hw[0] * grid_hw[1], config.vision_config.hidden_size
    text_width, slots = config.text_config.hidden_size, config.num_scene_tokens

    def learned(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(*shape, device=device, dtype=kind, requires_grad=True)

    def trained(part: nn.Module) -> bool:
        return any(p.requires_grad for p in part.parameters())

    frames = torch.zeros(batch_size * num_frames, 3, height, width, device=device, dtype=dtype)
    with_layers = core.metric_depth is not None
    costs = {"encoder": cost_of(lambda: core.encoder(frames, return_layers=with_layers), parameters)}
    # What a frozen encoder gives needs no gradient.
    base = torch.zeros(batch_size, num_frames, patches, encoder_width, device=device, dtype=dtype)
    base.requires_grad_(trained(core.encoder))
    costs["adapter"] = cost_of(lambda: core.adapter(base, base), parameters)
    stream = torch.zeros_like(base).requires_grad_(trained(core.adapter) or base.requires_grad)
    costs["reconstruction"] = cost_of(lambda: core.reconstruction(stream, grid_hw, size_hw), parameters)
    if core.metric_depth is not None:
        layers = [torch.zeros_like(base).requires_grad_(base.requires_grad) for _ in config.metric_depth_layers]
        costs["metric_depth"] = cost_of(lambda: core.metric_depth(tuple(layers), grid_hw, size_hw), parameters)
    # Frozen heads hand gradients of their losses on to an adapter that is trained.
    if stream.requires_grad or trained(core.reconstruction) or trained(core.metric_depth or nn.Module()):
        costs["losses"] = PartCost(LOSS_BYTES_PER_PIXEL * batch_size * num_frames * height * width)
    scene_tokens = core.scene_tokens
    positions = torch.zeros(batch_size * num_frames * patches, 3, device=device)

    def pooled() -> list[torch.Tensor]:
        normed = nn.functional.layer_norm(stream.flatten(0, 2).float(), (encoder_width,))
        if scene_tokens.position_mlp is not None:
            normed = normed + scene_tokens.position_mlp(positions, dtype).float()
        kept = learned(batch_size * slots, encoder_width)
        return [normed.to(dtype), scene_tokens.norm(scene_tokens.projector(kept))]

    costs["scene_tokens"] = cost_of(pooled, parameters)
    prefix = slots
    length = prefix + prompts_per_video * prompt_tokens

    def language() -> list[torch.Tensor]:
        embeds = learned(batch_size, length, text_width)
        mask = torch.zeros(batch_size, 1, length, length, dtype=torch.bool, device=device)
        places = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
        hidden = core.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state
        # Rests are unpacked to prompts before the head.
        states = hidden[:, -1:].expand(-1, prompts_per_video * learned_tokens, -1).flatten(0, 1)
        logits = model.lm_head(states).float()
        labels = torch.zeros(len(logits), dtype=torch.int64, device=device)
        return [hidden, nn.functional.cross_entropy(logits, labels, reduction="sum")]

    costs["language_model"] = cost_of(language, parameters)
    if core.grounding is not None:
        locs = batch_size * prompts_per_video
        index = torch.arange(batch_size).repeat_interleave(prompts_per_video) if loc_video is None else loc_video
        costs["grounding"] = cost_of(
            lambda: core.grounding(
                learned(locs, text_width),
                index,
                learned(batch_size, slots, text_width),
                torch.zeros(batch_size, slots, 3, device=device),
                torch.ones(batch_size, slots, dtype=torch.bool, device=device),
            ),
            parameters,
        )
    return costs


def dry_run(
    chosen: JointRecipe,
    config: VidLLMConfig,
    size_hw: tuple[int, int],
    num_devices: int = 8,
    sharding: str = "none",
    prompt_tokens: int = 64,
    learned_tokens: int = 16,
) -> DryRun:
    """What a recipe needs on so many devices.

    Args:
        chosen (`JointRecipe`): The recipe; its model need not exist.
        config (`VidLLMConfig`): Of the model.
        size_hw (`tuple[int, int]`): Height and width of the frames that the model sees.
        num_devices (`int`): Processes.
        sharding (`str`): `none` (DDP, where there are several), `zero2` (gradients and optimizer state over the devices), `full` (weights too:
            ZeRO-3, FSDP2).
        prompt_tokens (`int`): Of a prompt and its reply.
        learned_tokens (`int`): Of the reply.

    Returns:
        `DryRun`

    Raises:
        ValueError: An unknown sharding, or the number of frames is open.

    Source:
        Ours. Geometry is taken to be trained, unless the recipe has neither rooms nor benchmarks: a JSONL file's videos have no depth.
    """
    check_sharding(sharding)
    if chosen.num_frames is None:
        raise ValueError("dry run: wanted num_frames; --set num_frames=32")
    prompts = (chosen.prompts_per_scene or 1) + (0 if chosen.rooms is None else chosen.rooms.plain_prompts)
    loc_video = torch.arange(chosen.batch_size).repeat_interleave(prompts)
    with_geometry = chosen.rooms is not None or bool(chosen.benchmarks)
    whole: Any = untouched_model(config, chosen.weights_dtype)
    four_bits = _four_bit_names(whole) if chosen.lora is not None and chosen.lora.four_bits else set()
    if chosen.lora is not None:
        with torch.device("meta"):
            whole = add_lora(
                whole, chosen.lora, GEOMETRY_MODULES if with_geometry else (), chosen.seed, chosen.train_only
            )
    with FakeTensorMode(allow_non_fake_inputs=True):
        give_shapes(whole.train())
        freeze_for_joint(whole, chosen.freeze_encoder, not with_geometry, chosen.train_only)
        model = base_model(whole)
        if chosen.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=chosen.precision == "bfloat16"):
            parts = part_costs(
                model, chosen.batch_size, chosen.num_frames, size_hw, prompts, prompt_tokens, learned_tokens, loc_video
            )
    per_step = chosen.batch_size * chosen.accumulation * num_devices
    flops = sum(cost.forward_flops + cost.backward_flops for cost in parts.values())
    return DryRun(
        parameters=counted(model, lambda p: True),
        trained=counted(model, lambda p: p.requires_grad),
        parts=parts,
        **state_bytes(model, num_devices, sharding, four_bits),
        activation_bytes=sum(cost.activation_bytes for cost in parts.values()),
        steps=chosen.steps,
        videos_per_step=per_step,
        frames_per_step=per_step * chosen.num_frames,
        language_tokens_per_step=per_step * (config.num_scene_tokens + prompts * prompt_tokens),
        flops_per_step=flops * chosen.accumulation * num_devices,
        prompts_per_video=prompts,
        prompt_tokens=prompt_tokens,
        learned_tokens=learned_tokens,
    )


def untouched_model(config: VidLLMConfig, weights_dtype: str) -> VidLLMForConditionalGeneration:
    """A model that takes no memory.

    Args:
        config (`VidLLMConfig`): Its shapes.
        weights_dtype (`str`): As of a recipe.

    Returns:
        `VidLLMForConditionalGeneration`: on the device `meta`.

    Source:
        Upstream: pytorch.
    """
    with torch.device("meta"):
        model = VidLLMForConditionalGeneration(config).to(getattr(torch, weights_dtype))
    # A head that is the embedding would be counted, and trained, twice.
    model.tie_weights()
    return model


def give_shapes(model: nn.Module) -> None:
    """Put tensors on the CPU in place of those on `meta`, within a `FakeTensorMode`.

    Args:
        model (`nn.Module`): Changed in place; what was one tensor stays one.

    Source:
        Ours: `to_empty` would part what is tied, and cannot exchange fake tensors for each other.
    """
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                store[name] = made[id(tensor)]


def check_sharding(sharding: str) -> None:
    """A known sharding.

    Args:
        sharding (`str`): See `dry_run`.

    Raises:
        ValueError: It is not known.

    Source:
        Ours.
    """
    if sharding not in SHARDINGS:
        raise ValueError(f"dry run: sharding: wanted one of {', '.join(SHARDINGS)}; got {sharding!r}")


def state_bytes(
    model: nn.Module, num_devices: int, sharding: str, four_bits: set[str] | frozenset[str] = frozenset()
) -> dict[str, int]:
    """Memory per device of what hangs on the parameters.

    Args:
        model (`nn.Module`): Frozen where it will be; trained parameters are taken to be float32, frozen ones as they are.
        num_devices (`int`): Processes.
        sharding (`str`): See `dry_run`.
        four_bits (`set[str]`): Names of frozen weights that are held in 4 bits.

    Returns:
        `dict[str, int]`: `weight_bytes`, `gradient_bytes`, `bucket_bytes`, `optimizer_bytes`.

    Raises:
        ValueError: An unknown sharding.

    Source:
        Ours: `gradient_as_bucket_view` is off, as accelerate has it, so that DDP's buckets are a second copy of the gradients.
    """
    check_sharding(sharding)
    learned, frozen = 0, 0.0
    # a tied head once
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            learned += parameter.numel()
        else:
            size = FOUR_BIT_BYTES if name.replace(".base_layer.", ".") in four_bits else parameter.element_size()
            frozen += size * parameter.numel()
    whole = num_devices if sharding == "full" else 1
    states = num_devices if sharding in ("zero2", "full") else 1
    return {
        "weight_bytes": (round(frozen) + 4 * learned) // whole,
        "gradient_bytes": GRADIENT_BYTES * learned // states,
        "bucket_bytes": GRADIENT_BYTES * learned if sharding == "none" and num_devices > 1 else 0,
        "optimizer_bytes": ADAM_BYTES * learned // states,
    }


def _four_bit_names(model: VidLLMForConditionalGeneration) -> set[str]:
    """Weights that bitsandbytes would hold in 4 bits."""
    kept = re.compile("|".join(rf"^{re.escape(name)}(\.|$)" for name in MODULES_NOT_TO_QUANTISE))
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not kept.search(name)
    }


def counted(model: VidLLMForConditionalGeneration, wanted: Callable[[nn.Parameter], bool]) -> dict[str, int]:
    """Parameters by part, a tied head once.

    Args:
        model (`VidLLMForConditionalGeneration`): The model.
        wanted (callable): Which parameters count.

    Returns:
        `dict[str, int]`: the parts of the model, and `lm_head`.

    Source:
        Ours.
    """
    counts: dict[str, int] = {}
    seen: set[int] = set()
    for name, part in [*model.model.named_children(), ("lm_head", model.lm_head)]:
        own = {id(p): p.numel() for p in part.parameters() if id(p) not in seen and wanted(p)}
        seen.update(own)
        counts[name] = sum(own.values())
    return counts


__all__ = [
    "DryRun",
    "PartCost",
    "RunShape",
    "check_sharding",
    "cost_of",
    "counted",
    "dry_run",
    "give_shapes",
    "part_costs",
    "run_shape",
    "state_bytes",
    "untouched_model",
]
