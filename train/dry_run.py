"""What a run of stage 2 will need, before it is started: parameters, memory per device, steps, tokens, FLOPs.

The parts of the model run forward and backward on fake tensors, which have shapes and no values: what autograd keeps is added up as it is kept, FLOPs as they
are counted. Only the pooling of scene tokens, whose work depends on values, is stood in for by its matrix products.

Shapes: B videos, S frames, H W pixels, P patches per frame, N scene-token slots, Q prompts, D language-model width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.train.joint_trainer import freeze_for_joint
from vidllm.train.recipes import JointRecipe


# AdamW keeps two numbers of 4 bytes for each trained one; gradients and what is trained are float32.
ADAM_BYTES, GRADIENT_BYTES = 8, 4
# What the losses on depth and points keep for each pixel, as measured on the losses themselves at two sizes: they sort and select by value, which fake tensors have none.
LOSS_BYTES_PER_PIXEL = 193
SHARDINGS = ("none", "zero2", "full")


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
class DryRun:
    """What a run needs.

    Args:
        parameters (`Mapping[str, int]`): By part of the model.
        trained (`Mapping[str, int]`): Of these, trained.
        parts (`Mapping[str, PartCost]`): Costs of one forward of one device.
        weight_bytes (`int`): Per device.
        gradient_bytes (`int`): Per device.
        optimizer_bytes (`int`): Per device.
        activation_bytes (`int`): Per device.
        steps (`int`): Of the run.
        videos_per_step (`int`): Over all devices.
        frames_per_step (`int`): Over all devices.
        language_tokens_per_step (`int`): Over all devices.
        flops_per_step (`int`): Over all devices.

    Source:
        Ours.
    """

    parameters: Mapping[str, int]
    trained: Mapping[str, int]
    parts: Mapping[str, PartCost]
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    steps: int
    videos_per_step: int
    frames_per_step: int
    language_tokens_per_step: int
    flops_per_step: int

    @property
    def bytes_per_device(self) -> int:
        """All of it; what allocators waste is not in it."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


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
    if trained(core.reconstruction) or trained(core.metric_depth or nn.Module()):
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
        sharding (`str`): `none` (DDP), `zero2` (gradients and optimizer state over the devices), `full` (weights too: ZeRO-3, FSDP2).
        prompt_tokens (`int`): Of a prompt and its reply.
        learned_tokens (`int`): Of the reply.

    Returns:
        `DryRun`

    Raises:
        ValueError: An unknown sharding, or a recipe with adapters, whose parameters exist only once they are put in.

    Source:
        Ours.
    """
    if sharding not in SHARDINGS:
        raise ValueError(f"dry run: sharding: wanted one of {', '.join(SHARDINGS)}; got {sharding!r}")
    if chosen.lora is not None:
        raise ValueError("dry run: wanted a recipe without lora; --set lora=none shows what training all of it needs")
    prompts = chosen.prompts_per_scene or 1
    loc_video = torch.arange(chosen.batch_size).repeat_interleave(prompts)
    frames = chosen.num_frames or 32
    with torch.device("meta"):
        model = VidLLMForConditionalGeneration(config).to(getattr(torch, chosen.weights_dtype))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        # A head that is the embedding would be counted, and trained, twice.
        model.tie_weights()
        freeze_for_joint(model, chosen.freeze_encoder, train_only=chosen.train_only)
        if chosen.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=chosen.precision == "bfloat16"):
            parts = part_costs(
                model, chosen.batch_size, frames, size_hw, prompts, prompt_tokens, learned_tokens, loc_video
            )
    sizes = {"float32": 4, "bfloat16": 2}
    parameters, trained = _counted(model, lambda p: True), _counted(model, lambda p: p.requires_grad)
    learned = sum(trained.values())
    frozen = sum(
        p.numel() * (4 if p.dtype == torch.float32 else sizes[chosen.weights_dtype])
        for p in _unique(model)
        if not p.requires_grad
    )
    weights = frozen + 4 * learned
    whole = num_devices if sharding == "full" else 1
    states = num_devices if sharding in ("zero2", "full") else 1
    per_step = chosen.batch_size * chosen.accumulation * num_devices
    flops = sum(cost.forward_flops + cost.backward_flops for cost in parts.values())
    return DryRun(
        parameters=parameters,
        trained=trained,
        parts=parts,
        weight_bytes=weights // whole,
        gradient_bytes=GRADIENT_BYTES * learned // states,
        optimizer_bytes=ADAM_BYTES * learned // states,
        activation_bytes=sum(cost.activation_bytes for cost in parts.values()),
        steps=chosen.steps,
        videos_per_step=per_step,
        frames_per_step=per_step * frames,
        language_tokens_per_step=per_step * (config.num_scene_tokens + prompts * prompt_tokens),
        flops_per_step=flops * chosen.accumulation * num_devices,
    )


def _unique(model: nn.Module) -> list[nn.Parameter]:
    """Parameters, a tied head once."""
    return list(dict.fromkeys(model.parameters()))


def _counted(model: VidLLMForConditionalGeneration, wanted: Callable[[nn.Parameter], bool]) -> dict[str, int]:
    """Parameters by part, a tied head once."""
    counts: dict[str, int] = {}
    seen: set[int] = set()
    for name, part in [*model.model.named_children(), ("lm_head", model.lm_head)]:
        own = {id(p): p.numel() for p in part.parameters() if id(p) not in seen and wanted(p)}
        seen.update(own)
        counts[name] = sum(own.values())
    return counts


__all__ = ["DryRun", "PartCost", "cost_of", "dry_run", "part_costs"]
