"""Stage 1: encoder and adapter learn from two frozen teachers, `L = L_geo + L_lang + lambda L_sc`.

`accelerate launch -m vidllm.train.distillation RECIPE --out DIR`

Shapes: B clips, S frames, H W pixels, F frames of one size, P patches of the student's grid, C student width.
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.modeling_vidllm.ragged_vidllm import group_rows_by_size
from vidllm.train.clip_data import ClipCollator, ClipFolder, ClipVisits, RoomClips
from vidllm.train.counted_trainer import CountedTrainer
from vidllm.train.distill_recipes import DISTILL_RECIPES, DistillRecipe, chosen_distill_recipe
from vidllm.train.distillation_losses import (
    geometry_feature_loss,
    language_feature_loss,
    resized_to_grid,
    structure_loss,
)
from vidllm.train.held_out import HeldOut, HeldOutLog, held_out_rooms
from vidllm.train.joint import RunLog, log_to_stderr, starting_model, training_arguments
from vidllm.train.parameter_table import parameter_table
from vidllm.train.room_source import RoomMakers, RoomSource
from vidllm.train.run_folder import check_processes, checkpoint_to_resume, clear_unbegun, publish, write_recipe
from vidllm.train.teachers import FrameKey, Teacher, open_teacher
from vidllm.train.whole_weights import whole_model, whole_state


logger = logging.getLogger(__name__)
TERMS = ("geometry_feature", "language_feature", "structure")
PROJECTIONS_NAME = "distillation.safetensors"
# Mean distance of directions below which features are the same model's: bfloat16 makes 0.006 of 24 layers, weights that differ by a tenth 0.2.
_EQUAL = 0.03


@dataclass
class StudentStreams:
    """What the student makes of the frames of one size.

    Args:
        rows (`list[int]`): Clips of the batch that these are, S frames each.
        grid_hw (`tuple[int, int]`): Rows and columns of patches.
        geometry (`torch.Tensor` of shape `(F, P, C)`): Geometry stream of the adapter.
        language (`torch.Tensor` of shape `(F, P, C)`): Language stream.
        geometry_projected (`torch.Tensor` of shape `(F, P, Cg)`): In the geometry teacher's width.
        language_projected (`torch.Tensor` of shape `(F, P, Cl)`): In the semantic teacher's width.

    Source:
        Ours.
    """

    rows: list[int]
    grid_hw: tuple[int, int]
    geometry: torch.Tensor
    language: torch.Tensor
    geometry_projected: torch.Tensor
    language_projected: torch.Tensor


class DistillationStudent(nn.Module):
    """Encoder and adapter of a model, with a projection to the width of each teacher; all that stage 1 runs.

    Args:
        model (`VidLLMForConditionalGeneration`): Its other parts stay as they are.
        geometry_width (`int`): Of the geometry teacher.
        language_width (`int`): Of the semantic teacher.

    Source:
        Paper: section 3.3 (light linear projections). Ours: dropped afterwards.
    """

    def __init__(self, model: VidLLMForConditionalGeneration, geometry_width: int, language_width: int):
        super().__init__()
        self.model = model
        width = model.config.vision_config.hidden_size
        self.project_geometry = nn.Linear(width, geometry_width)
        self.project_language = nn.Linear(width, language_width)

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Compute activations twice instead of keeping them.

        Args:
            **settings: As of `PreTrainedModel.activation_checkpointing_enable`.
        """
        self.model.activation_checkpointing_enable(**settings)

    def forward(self, pixel_values_videos: torch.Tensor, video_size_shw: torch.Tensor) -> list[StudentStreams]:
        """Run encoder and adapter; each size of video unpadded.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(B, S, 3, H, W)`): Normalised, padded.
            video_size_shw (`torch.Tensor` of shape `(B, 3)`, int64): Sizes without padding.

        Returns:
            `list[StudentStreams]`: by size.
        """
        core, streams = self.model.model, []
        for (frames, height, width), rows in group_rows_by_size(video_size_shw.cpu()):
            pixels = pixel_values_videos[rows][:, :frames, :, :height, :width].flatten(0, 1)
            base = core.encoder(pixels.to(core.dtype), return_layers=False).patch_tokens
            base = base.unflatten(0, (len(rows), frames))  # (B * S, P, C) -> (B, S, P, C)
            geometry, language = (stream.flatten(0, 1) for stream in core.adapter(base, base))
            streams.append(
                StudentStreams(
                    rows=rows,
                    grid_hw=core.encoder.grid_hw(height, width),
                    geometry=geometry,
                    language=language,
                    geometry_projected=self.project_geometry(geometry),
                    language_projected=self.project_language(language),
                )
            )
        return streams


class VidLLMDistillationTrainer(CountedTrainer):
    """Trains encoder and adapter on two teachers.

    Args:
        model (`VidLLMForConditionalGeneration`): The student.
        args (`TrainingArguments`): With `remove_unused_columns=False`.
        geometry_teacher (`Teacher`): For the geometry stream.
        language_teacher (`Teacher`): For the language stream.
        weights (`Mapping[str, float]`, *optional*): Of `TERMS`, 1 each if not given; that of `structure` is the paper's lambda.
        freeze_encoder (`bool`): Whether the adapter alone is trained.
        **kwargs: As of `CountedTrainer`.

    Raises:
        ValueError: The student's encoder is its geometry teacher; or see `CountedTrainer`.

    Source:
        Paper: section 3.3, eq. 5-7. Ours: lambda is 1, because it is not stated.
    """

    share_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: VidLLMForConditionalGeneration,
        args: TrainingArguments,
        geometry_teacher: Teacher,
        language_teacher: Teacher,
        weights: Mapping[str, float] | None = None,
        freeze_encoder: bool = False,
        **kwargs: Any,
    ):
        if model.model.language_encoder is not None:
            raise ValueError("distillation: wanted a model with shared_encoder=True; got two encoders")
        self.check_arguments(args)
        model.requires_grad_(False)
        model.model.encoder.requires_grad_(not freeze_encoder)
        model.model.encoder.freeze_unreachable()
        model.model.adapter.requires_grad_(True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            student = DistillationStudent(model, geometry_teacher.width, language_teacher.width)
        super().__init__(model=student, args=args, **kwargs)
        self.student = model
        self.geometry_teacher, self.language_teacher = geometry_teacher, language_teacher
        for teacher in (geometry_teacher, language_teacher):
            if isinstance(teacher, nn.Module):
                teacher.to(self.args.device)
        self.weights = {name: float(dict(weights or {}).get(name, 1.0)) for name in TERMS}
        self._is_checked = False

    def batch_counts(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Patches and frames of a batch; see `CountedTrainer.batch_counts`."""
        frames, height, width = batch["video_size_shw"].double().unbind(1)
        rows, columns = self.student.model.encoder.patch_hw
        patches = (frames * (height / rows).floor() * (width / columns).floor()).sum().float()
        return {
            "geometry_feature": patches,
            "language_feature": frames.sum().float(),
            "structure": frames.sum().float(),
        }

    def weighted_terms(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, float], list[StudentStreams]]:
        """One forward of the student, and one of the teachers.

        Args:
            model (`nn.Module`): The student, as wrapped for distributed training.
            inputs (`dict`): From `ClipCollator`, on the device.

        Returns:
            `tuple`: sum and count `()` by term; weights; the student's streams by size.

        Raises:
            ValueError: In the first step: the student's encoder is its geometry teacher.
        """
        streams = model(pixel_values_videos=inputs["pixel_values_videos"], video_size_shw=inputs["video_size_shw"])
        terms: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for part in streams:
            frames, keys = self._frames_of(part, inputs)
            with torch.no_grad(), torch.autocast(device_type=frames.device.type, enabled=False):
                targets = []
                for teacher in (self.geometry_teacher, self.language_teacher):
                    features, grid = teacher.features(frames, keys)
                    targets.append(resized_to_grid(features, grid, part.grid_hw))
            self._refuse_equal(part, targets[0])
            with torch.autocast(device_type=frames.device.type, enabled=False):
                added = (
                    geometry_feature_loss(part.geometry_projected, targets[0]),
                    language_feature_loss(part.language_projected, targets[1]),
                    structure_loss((part.geometry, part.language), (targets[0], targets[1])),
                )
            for name, (value, count) in zip(TERMS, added, strict=True):
                before = terms.get(name, (0.0, 0.0))
                terms[name] = (before[0] + value, before[1] + count)
        return terms, self.weights, streams

    def _frames_of(self, part: StudentStreams, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, list[FrameKey]]:
        """Frames `(F, 3, H, W)` in 0..1 of a group, and which they are."""
        rows, columns = self.student.model.encoder.patch_hw
        height, width = part.grid_hw[0] * rows, part.grid_hw[1] * columns
        keys = [key for row in part.rows for key in inputs["frame_keys"][row]]
        frames = len(keys) // len(part.rows)
        pixels = inputs["pixel_values_videos"][part.rows][:, :frames, :, :height, :width].flatten(0, 1).float()
        processor = self.processing_class.video_processor
        mean, std = (
            torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (processor.image_mean, processor.image_std)
        )
        return (pixels * std + mean).clamp(0, 1), keys

    def _refuse_equal(self, part: StudentStreams, target: torch.Tensor) -> None:
        """In the first step of a run: a student that is its geometry teacher has nothing to learn from it."""
        if self._is_checked or self.state.global_step > 0:
            return
        self._is_checked = True
        own = part.geometry.detach().float()
        if own.shape != target.shape:
            return
        distance = (nn.functional.normalize(own, dim=-1) - nn.functional.normalize(target, dim=-1)).norm(dim=-1)
        if distance.mean() < _EQUAL:
            raise ValueError(
                "distillation: wanted a student that differs from its geometry teacher; they give the same features, so that there is nothing "
                "to learn: start from another encoder (--vision of vidllm init), or choose another teacher"
            )

    # ------------------------------------------------------------------ checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The student as a Hub folder, the projections beside it; of a model that is spread over processes the Trainer hands the weights in."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        student = self.accelerator.unwrap_model(self.model)
        weights = student.state_dict() if state_dict is None else state_dict
        student.model.save_pretrained(str(folder), state_dict=None if state_dict is None else _of_student(weights))
        self.processing_class.save_pretrained(str(folder))
        tensors = {
            name: value.detach().cpu().contiguous() for name, value in weights.items() if name.startswith("project_")
        }
        save_file(tensors, folder / PROJECTIONS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Student and projections to go on from."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = VidLLMForConditionalGeneration.from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        self.student.load_state_dict(saved.state_dict())
        tensors = load_file(Path(resume_from_checkpoint) / PROJECTIONS_NAME)
        student = self.accelerator.unwrap_model(self.model)
        for name in ("project_geometry", "project_language"):
            part = {
                key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")
            }
            getattr(student, name).load_state_dict(part)


def _of_student(state: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of the student among those of `DistillationStudent`."""
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


@contextlib.contextmanager
def distill_data(
    chosen: DistillRecipe, num_visits: int, out_dir: Path
) -> Iterator[tuple[torch.utils.data.Dataset, torch.utils.data.Dataset | None]]:
    """Open the clips of a recipe; what makes rooms beside the training ends with the context.

    Args:
        chosen (`DistillRecipe`): The recipe.
        num_visits (`int`): Clips that the run will see.
        out_dir (`Path`): Of the run.

    Yields:
        `tuple` of two `torch.utils.data.Dataset` of `ClipFrames`: what is learned from, and what is held out, if anything is.

    Raises:
        ValueError: There are no clips.

    Source:
        Ours.
    """
    held: torch.utils.data.Dataset | None = None
    if chosen.rooms is None:
        if chosen.held_out is not None:
            others = ClipFolder(chosen.held_out.clips, chosen.frames_kept)
            held = ClipVisits(others, min(chosen.held_out.scenes, len(others)), chosen.num_frames, chosen.seed)
        clips = ClipFolder(chosen.clips, chosen.frames_kept)
        yield ClipVisits(clips, num_visits, chosen.num_frames, chosen.seed), held
        return
    cache = Path(chosen.rooms_cache or out_dir / "rooms")
    source = RoomSource(chosen.rooms, cache)
    if chosen.held_out is not None:
        others = RoomSource(held_out_rooms(chosen.rooms, chosen.held_out), cache / "held_out")
        held = RoomClips(others, chosen.held_out.scenes, chosen.num_frames, chosen.seed, each_once=True)
    with RoomMakers(source) if PartialState().is_local_main_process else contextlib.nullcontext():
        yield RoomClips(source, num_visits, chosen.num_frames, chosen.seed), held


def train_distill(
    chosen: DistillRecipe,
    out_dir: str | Path,
    resume: bool | str = False,
    use_cpu: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> VidLLMDistillationTrainer:
    """Run a recipe of stage 1, on every process of a launch.

    Args:
        chosen (`DistillRecipe`): Complete.
        out_dir (`str` or `Path`): New or empty folder, unless a run is resumed.
        resume (`bool` or `str`): Go on from the last checkpoint of the folder, or from the one named.
        use_cpu (`bool`): Whether to leave accelerators alone.
        callbacks (`Sequence[TrainerCallback]`): Of the Trainer.

    Returns:
        `VidLLMDistillationTrainer`: after training; `<out>` is a complete Hub folder, from which stage 2 starts.

    Raises:
        ValueError: The recipe, the folder, the clips or a teacher are not usable.
        FloatingPointError: A loss was not finite; names the clips.

    Source:
        Ours.
    """
    chosen.check()
    out_dir = Path(out_dir).expanduser()
    args = training_arguments(chosen, out_dir, use_cpu)
    state = PartialState()
    checkpoint = checkpoint_to_resume(out_dir, resume) if resume or state.is_main_process else None
    check_processes(checkpoint, state.num_processes, chosen.batch_size, chosen.accumulation)
    args.eval_on_start = chosen.held_out is not None and checkpoint is None
    # Nobody writes before everybody has looked.
    state.wait_for_everyone()
    model, processor = starting_model(chosen)
    if chosen.num_frames is None:
        chosen = replace(chosen, num_frames=processor.video_processor.num_frames)
    teachers = [
        open_teacher(place, stream)
        for place, stream in (
            (chosen.geometry_teacher, chosen.geometry_stream),
            (chosen.language_teacher, chosen.language_stream),
        )
    ]
    num_visits = chosen.steps * chosen.batch_size * chosen.accumulation * state.num_processes
    with distill_data(chosen, num_visits, out_dir) as (clips, held):
        collator = ClipCollator(processor)
        trainer = VidLLMDistillationTrainer(
            model=model,
            args=args,
            geometry_teacher=teachers[0],
            language_teacher=teachers[1],
            weights=chosen.weights,
            freeze_encoder=chosen.freeze_encoder,
            learning_rate_factors=chosen.learning_rate_factors,
            train_dataset=clips,
            data_collator=collator,
            held_out=None if held is None else HeldOut(held, collator),
            processing_class=processor,
            callbacks=[RunLog(out_dir), HeldOutLog(out_dir), *callbacks],
        )
        if state.is_main_process:
            unreachable = [f"model.encoder.{name}" for name in model.model.encoder.unreachable_parameters]
            logger.info("%s: what is trained\n%s", chosen.name, parameter_table(model, unreachable))
            if resume and checkpoint is None:
                logger.warning("--resume: %s has no checkpoint yet; the run starts anew", out_dir)
                clear_unbegun(out_dir)
            for line in write_recipe(chosen, out_dir, checkpoint, {"processes": state.num_processes}):
                logger.warning("resumed with another recipe: %s", line)
        state.wait_for_everyone()
        trainer.train(resume_from_checkpoint=checkpoint)
    student = trainer.accelerator.unwrap_model(trainer.model)
    weights = whole_state(student, lambda: trainer.accelerator.get_state_dict(trainer.model_wrapped))
    if state.is_main_process:
        finished = trainer.student if weights is None else whole_model(trainer.student, _of_student(weights))
        publish(finished.eval(), processor, out_dir)
    state.wait_for_everyone()
    return trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Args:
        arguments (`Sequence[str]`, *optional*): By default those of the process.

    Returns:
        `int`: exit code; 2 on bad input, with one line on stderr.

    Source:
        Ours.
    """
    parser = argparse.ArgumentParser(prog="python -m vidllm.train.distillation", description="Train stage 1.")
    parser.add_argument("recipe", help=f"one of {', '.join(DISTILL_RECIPES)}")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE")
    parser.add_argument("--clips", metavar="DIR", help="a folder of videos, or a data root")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    parser.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    given = parser.parse_args(arguments)
    log_to_stderr()
    disable_progress_bar()
    try:
        chosen = chosen_distill_recipe(given.recipe, given.settings, given.clips)
        train_distill(chosen, given.out, resume=given.resume, use_cpu=given.cpu)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


__all__ = [
    "DistillationStudent",
    "StudentStreams",
    "VidLLMDistillationTrainer",
    "distill_data",
    "main",
    "train_distill",
]


if __name__ == "__main__":
    sys.exit(main())
