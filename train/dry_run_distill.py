"""What a run of stage 1 will need, before it is started: as `dry_run` for stage 2, with the teachers.

Shapes: B clips, S frames, F = B * S, P patches of the student's grid, C student width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.encoder_vidllm import VidLLMEncoder
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.train.distill_recipes import DistillRecipe
from vidllm.train.distillation import DistillationStudent
from vidllm.train.distillation_losses import (
    geometry_feature_loss,
    language_feature_loss,
    resized_to_grid,
    structure_loss,
)
from vidllm.train.dry_run import (
    DryRun,
    PartCost,
    check_sharding,
    cost_of,
    counted,
    give_shapes,
    state_bytes,
    untouched_model,
)
from vidllm.train.feature_folder import FeatureFolder, is_feature_folder
from vidllm.train.teachers import encoder_of, nearest_size


@dataclass(frozen=True)
class TeacherCost:
    """Of one teacher.

    Args:
        width (`int`): Of its features.
        weight_bytes (`int`): Of its weights, as float32; 0 of features on disk.
        forward_flops (`int`): Of one forward of the student's frames on one device.
        grid_hw (`tuple[int, int]`, *optional*): Its rows and columns of patches; None: not known before the features are read.

    Source:
        Ours.
    """

    width: int
    weight_bytes: int = 0
    forward_flops: int = 0
    grid_hw: tuple[int, int] | None = None


def teacher_cost(place: str, stream: str, num_frames: int, size_hw: tuple[int, int]) -> TeacherCost:
    """What a teacher costs; of a model only its config is read.

    Args:
        place (`str`): As of `open_teacher`.
        stream (`str`): See `VisionTeacher`.
        num_frames (`int`): F.
        size_hw (`tuple[int, int]`): Height and width of the student's frames.

    Returns:
        `TeacherCost`

    Raises:
        ValueError: There is no such model.

    Source:
        Ours: no activations, because a frozen teacher keeps none.
    """
    if is_feature_folder(place):
        return TeacherCost(FeatureFolder(place).width)
    folder = str(Path(place).expanduser()) if Path(place).expanduser().is_dir() else place
    AutoConfig.register(VidLLMConfig.model_type, VidLLMConfig, exist_ok=True)
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            encoder, adapter = _parts_of(config, stream)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"teacher {place}: wanted a vision model of transformers; {str(error).strip().splitlines()[0]}"
        ) from error
    size = nearest_size(encoder, *size_hw)
    with FakeTensorMode(allow_non_fake_inputs=True):
        held = sum(p.numel() for part in (encoder, adapter) if part is not None for p in part.parameters())
        for part in (encoder, adapter):
            if part is not None:
                give_shapes(part.float())
        frames = torch.zeros(num_frames, 3, *size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            tokens = encoder(frames, return_layers=False).patch_tokens
            if adapter is not None:
                adapter(tokens.unsqueeze(1), tokens.unsqueeze(1))
    return TeacherCost(encoder.model.config.hidden_size, 4 * held, counter.get_total_flops(), encoder.grid_hw(*size))


def _parts_of(config: Any, stream: str) -> tuple[VidLLMEncoder, nn.Module | None]:
    """Encoder and, where it is wanted, adapter of a teacher by its config."""
    if config.model_type != VidLLMConfig.model_type:
        return encoder_of(AutoModel.from_config(config)), None
    core = VidLLMForConditionalGeneration(config).model
    return core.encoder, None if stream == "encoder" else core.adapter


def dry_run_distill(
    chosen: DistillRecipe,
    config: VidLLMConfig,
    size_hw: tuple[int, int],
    num_devices: int = 8,
    sharding: str = "none",
) -> DryRun:
    """What a recipe of stage 1 needs on so many devices.

    Args:
        chosen (`DistillRecipe`): The recipe; its model need not exist. A teacher that it does not name is not counted, and as wide as the student.
        config (`VidLLMConfig`): Of the student.
        size_hw (`tuple[int, int]`): Height and width of the frames that the student sees.
        num_devices (`int`): Processes.
        sharding (`str`): As of `dry_run`.

    Returns:
        `DryRun`: FLOPs with the teachers' under the parts `geometry_teacher` and `language_teacher`.

    Raises:
        ValueError: An unknown sharding, the number of frames is open, or there is no such teacher.

    Source:
        Ours.
    """
    check_sharding(sharding)
    if chosen.num_frames is None:
        raise ValueError("dry run: wanted num_frames; --set num_frames=32")
    frames, width = chosen.batch_size * chosen.num_frames, config.vision_config.hidden_size
    teachers = [
        TeacherCost(width) if place is None else teacher_cost(place, stream, frames, size_hw)
        for place, stream in (
            (chosen.geometry_teacher, chosen.geometry_stream),
            (chosen.language_teacher, chosen.language_stream),
        )
    ]
    model = untouched_model(config, chosen.weights_dtype)
    with torch.device("meta"):
        student = DistillationStudent(model, teachers[0].width, teachers[1].width)
    model.requires_grad_(False)
    model.model.adapter.requires_grad_(True)
    model.model.encoder.requires_grad_(not chosen.freeze_encoder)
    model.model.encoder.freeze_unreachable()
    with FakeTensorMode(allow_non_fake_inputs=True):
        give_shapes(student.train())
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if chosen.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        parts = _student_costs(student, chosen, size_hw, [teacher.grid_hw for teacher in teachers])
    for name, teacher in zip(("geometry_teacher", "language_teacher"), teachers, strict=True):
        parts[name] = PartCost(forward_flops=teacher.forward_flops)
    per_step = chosen.batch_size * chosen.accumulation * num_devices
    flops = sum(cost.forward_flops + cost.backward_flops for cost in parts.values())
    projections = (student.project_geometry, student.project_language)
    projected = {"projections": sum(p.numel() for part in projections for p in part.parameters())}
    return DryRun(
        parameters=counted(model, lambda p: True) | projected,
        trained=counted(model, lambda p: p.requires_grad) | projected,
        parts=parts,
        **state_bytes(student, num_devices, sharding),
        activation_bytes=sum(cost.activation_bytes for cost in parts.values()),
        steps=chosen.steps,
        videos_per_step=per_step,
        frames_per_step=per_step * chosen.num_frames,
        language_tokens_per_step=0,
        flops_per_step=flops * chosen.accumulation * num_devices,
        teacher_bytes=sum(teacher.weight_bytes for teacher in teachers),
    )


def _student_costs(
    student: DistillationStudent,
    chosen: DistillRecipe,
    size_hw: tuple[int, int],
    grids: list[tuple[int, int] | None],
) -> dict[str, PartCost]:
    """Costs of one forward, by part; within a `FakeTensorMode`."""
    core, parameters = student.model.model, list(student.parameters())
    batch, frames, width = chosen.batch_size, chosen.num_frames or 0, student.project_geometry.in_features
    own = core.encoder.grid_hw(*size_hw)
    patches = own[0] * own[1]
    pixels = torch.zeros(batch * frames, 3, *size_hw, dtype=core.dtype)

    def costs_of(call: Callable[[], Any], mixed: bool = True) -> PartCost:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed and chosen.precision == "bfloat16"):
            return cost_of(call, parameters)

    # What a frozen encoder gives needs no gradient.
    base = torch.zeros(batch, frames, patches, width, dtype=core.dtype, requires_grad=not chosen.freeze_encoder)
    costs = {
        "encoder": costs_of(lambda: core.encoder(pixels, return_layers=False)),
        "adapter": costs_of(lambda: core.adapter(base, base)),
    }
    geometry, language = (torch.zeros(batch * frames, patches, width, requires_grad=True) for _ in range(2))
    costs["projections"] = costs_of(lambda: [student.project_geometry(geometry), student.project_language(language)])
    made = [
        torch.zeros(batch * frames, patches, projection.out_features, requires_grad=True)
        for projection in (student.project_geometry, student.project_language)
    ]

    def losses() -> list[torch.Tensor]:
        targets = []
        for grid, features in zip(grids, made, strict=True):
            rows, columns = grid or own
            target = torch.zeros(batch * frames, rows * columns, features.shape[-1])
            targets.append(resized_to_grid(target, (rows, columns), own))
        return [
            geometry_feature_loss(made[0], targets[0])[0],
            language_feature_loss(made[1], targets[1])[0],
            structure_loss((geometry, language), (targets[0], targets[1]))[0],
        ]

    costs["losses"] = costs_of(losses, mixed=False)
    return costs


__all__ = ["TeacherCost", "dry_run_distill", "teacher_cost"]
