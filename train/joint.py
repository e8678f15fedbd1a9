"""Stage 2, from a recipe to a checkpoint: `accelerate launch -m vidllm.train.joint RECIPE --out DIR`.

```python
from vidllm.train.joint import train_joint
from vidllm.train.recipes import chosen_recipe

train_joint(chosen_recipe("nano", ["steps=100"]), "outputs/nano")
```
"""

import argparse
import contextlib
import difflib
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from transformers import AutoConfig, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils.logging import disable_progress_bar

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.benchmarks.load import load_benchmark
from vidllm.processing.benchmarks.proposals import SceneProposals, load_proposals
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.samples import Sample
from vidllm.train.dense_labels import DenseLabels, RoomCollator
from vidllm.train.dense_matching import DenseMatching
from vidllm.train.held_out import HeldOut, HeldOutLog, held_out_rooms
from vidllm.train.initialise import build_untrained
from vidllm.train.joint_trainer import GEOMETRY_MODULES, LossPlugin, VidLLMJointTrainer, refuse_places
from vidllm.train.line_log import drop_lines_after
from vidllm.train.loc_labels import LocLabels
from vidllm.train.lora import add_lora, four_bit_settings, save_and_merge
from vidllm.train.parameter_table import parameter_table
from vidllm.train.presets import PRESETS
from vidllm.train.recipes import RECIPES, JointRecipe, chosen_recipe, known_name
from vidllm.train.room_source import RoomMakers, RoomScenes, RoomSource
from vidllm.train.run_folder import (
    ADAPTER_NAME,
    LOG_NAME,
    check_processes,
    checkpoint_to_resume,
    clear_unbegun,
    publish,
    write_recipe,
)
from vidllm.train.scene_data import SceneCollator, SceneDataset, SceneVisits, rows_fingerprint
from vidllm.train.whole_weights import whole_model, whole_state


if TYPE_CHECKING:
    from vidllm.train.distill_recipes import DistillRecipe

logger = logging.getLogger(__name__)
_HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w-][\w.-]*$")


class RunLog(TrainerCallback):
    """Writes what is logged to `log.jsonl`, the last steps included; a resumed run drops what was logged after its checkpoint and follows its own recipe.

    Args:
        out_dir (`Path`): Of the run.

    Source:
        Ours.
    """

    def __init__(self, out_dir: Path):
        self.path = Path(out_dir) / LOG_NAME

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the step that the run starts from; what comes every so many steps comes as this run's arguments say."""
        # transformers would go on as the checkpoint says, in silence.
        state.compute_steps(args, state.max_steps)
        if state.is_world_process_zero:
            drop_lines_after(self.path, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last steps get a line too, however many they are."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Add a line."""
        if state.is_world_process_zero and logs and "loss" in logs:
            # How long it still takes is for whoever looks on.
            line = {name: value for name, value in logs.items() if name != "eta_s"}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **line}) + "\n")


@dataclass(frozen=True)
class JointData:
    """What a run reads.

    Args:
        visits (`torch.utils.data.Dataset`): One item per visit of a scene, as many as the whole run needs, in order.
        collator (callable): Makes batches of them.
        has_geometry (`bool`): Whether any scene has both true cameras and depth.
        has_metric_depth (`bool`): Whether there is depth in metres.
        num_placed (`int`): Prompts with boxes or places in metres; of rooms, where nearly every visit has some, the visits.
        plugins (`tuple[LossPlugin]`): Losses that only these data allow.
        facts (`dict`): For `recipe.json`.
        held_out (`HeldOut`, *optional*): What is not learned from.

    Source:
        Ours.
    """

    visits: torch.utils.data.Dataset
    collator: Any
    has_geometry: bool
    has_metric_depth: bool
    plugins: tuple[LossPlugin, ...]
    facts: dict[str, Any]
    num_placed: int
    held_out: HeldOut | None = None


@contextlib.contextmanager
def joint_data(
    chosen: JointRecipe, config: VidLLMConfig, processor: VidLLMProcessor, num_visits: int, out_dir: Path
) -> Iterator[JointData]:
    """Open the data of a recipe; what runs beside the training to make them ends with the context.

    Args:
        chosen (`JointRecipe`): The recipe.
        config (`VidLLMConfig`): Of the model.
        processor (`VidLLMProcessor`): Of the model.
        num_visits (`int`): Scenes that the run will see.
        out_dir (`Path`): Of the run.

    Yields:
        `JointData`

    Raises:
        ValueError: Files are absent or malformed, or nothing in them can be used.

    Source:
        Ours.
    """
    for name in ("proposals", "loc_labels"):
        if getattr(chosen, name) and config.box_output == "text":
            raise ValueError(f'{chosen.name}: wanted a model of box_output="decoder" for {name}; got "text"')
    settings = {
        "num_frames": chosen.num_frames,
        "reply_choice": chosen.reply_choice,
        "seed": chosen.seed,
        "box_output": config.box_output,
    }
    if chosen.rooms is not None:
        collator = RoomCollator(processor, **settings)
        cache = Path(chosen.rooms_cache or out_dir / "rooms")
        source = RoomSource(chosen.rooms, cache)
        held = None
        if chosen.held_out is not None:
            others = RoomSource(held_out_rooms(chosen.rooms, chosen.held_out), cache / "held_out")
            number = chosen.held_out.scenes
            held = HeldOut(
                RoomScenes(others, number, collator.num_frames, chosen.prompts_per_scene, chosen.seed, each_once=True),
                collator,
            )
        visits = RoomScenes(source, num_visits, collator.num_frames, chosen.prompts_per_scene, seed=chosen.seed)
        plugins: tuple[LossPlugin, ...] = ()
        if chosen.dense_labels:
            plugins += (DenseLabels(chosen.dense_labels),)
        if chosen.loc_labels:
            plugins += (LocLabels(chosen.loc_labels),)
        if chosen.dense_matching:
            plugins += (DenseMatching(chosen.dense_matching),)
        makers = RoomMakers(source) if PartialState().is_local_main_process else contextlib.nullcontext()
        with makers:
            yield JointData(visits, collator, True, True, plugins, {}, num_visits, held)
        return
    collator = SceneCollator(processor, frame_choice=chosen.frame_choice, **settings)
    rows, weights = {}, {}
    # Other processes find the cache that the first one writes.
    with PartialState().main_process_first():
        for name, weight in chosen.benchmarks.items():
            variant = chosen.variants.get(name, "default")
            rows[name] = load_benchmark(name, chosen.data_root, chosen.split, variant=variant, strict=False)
            weights[name] = weight
        if chosen.data is not None:
            rows["jsonl"] = load_benchmark("jsonl", chosen.data, "train")
            weights["jsonl"] = chosen.data_weight
    scenes = SceneDataset(rows, chosen.prompts_per_scene, chosen.seed, weights, collator.num_frames)
    proposals = collator.proposals = _proposals(chosen, scenes)
    facts = {
        "data": {
            "scenes": len(scenes),
            "fingerprint": rows_fingerprint(rows),
            "rows": {name: len(part) for name, part in rows.items()},
            "skipped": {name: skipped.summary() for name, skipped in scenes.skipped.items()},
            **({} if proposals is None else {"proposals": proposals.settings}),
        }
    }
    per_step = chosen.batch_size * chosen.accumulation * PartialState().num_processes
    visits = SceneVisits(scenes, num_visits, chosen.seed, per_step if chosen.group_by_length else 1)
    held = None
    if chosen.held_out is not None:
        held = _held_out_files(chosen, SceneCollator(processor, frame_choice="uniform", **settings))
        facts["data"]["held_out_scenes"] = len(held.scenes)
    if scenes.has_poses and not scenes.has_geometry:
        logger.warning("%s: cameras teach nothing without depth, and no scene has both", chosen.name)
    yield JointData(visits, collator, scenes.has_geometry, scenes.has_depth, (), facts, scenes.num_placed, held)


def _proposals(chosen: JointRecipe, scenes: SceneDataset) -> SceneProposals | None:
    """Proposals of those scenes that are asked for boxes."""
    if chosen.proposals is None:
        return None
    samples = (
        Sample.from_row(scenes.datasets[name][number])
        for rows in scenes.rows_of_scene
        for name, numbers in rows.items()
        for number in numbers
    )
    asked = {
        sample.scene_id: None for sample in samples if sample.num_box_blocks and sample.boxes_annotation is not None
    }
    return load_proposals(chosen.proposals, str(Path(chosen.data_root).expanduser().resolve()), list(asked))


def _held_out_files(chosen: JointRecipe, collator: SceneCollator) -> HeldOut:
    """Scenes of another split or file; evenly spread frames."""
    rows, weights, settings = {}, {}, chosen.held_out
    with PartialState().main_process_first():
        if settings.data is not None:
            rows["jsonl"] = load_benchmark("jsonl", settings.data, "train")
        else:
            for name, weights[name] in chosen.benchmarks.items():
                variant = chosen.variants.get(name, "default")
                rows[name] = load_benchmark(name, chosen.data_root, settings.split, variant=variant, strict=False)
    scenes = SceneDataset(rows, chosen.prompts_per_scene, chosen.seed, weights, collator.num_frames)
    collator.proposals = _proposals(chosen, scenes)
    return HeldOut(SceneVisits(scenes, min(settings.scenes, len(scenes)), chosen.seed), collator)


def starting_model(
    chosen: "JointRecipe | DistillRecipe", four_bits: bool = False
) -> tuple[VidLLMForConditionalGeneration, VidLLMProcessor]:
    """The model that a run starts from, and its processor with the recipe's number of frames.

    Args:
        chosen (`JointRecipe` or `DistillRecipe`): The recipe.
        four_bits (`bool`): Whether a checkpoint's language model is held in 4 bits.

    Returns:
        `tuple`: model, processor.

    Raises:
        ValueError: `model` is neither a preset nor a checkpoint, or 4 bits are wanted without bitsandbytes.

    Source:
        Ours.
    """
    name, folder = chosen.model, Path(chosen.model).expanduser()
    if name in PRESETS:
        model, processor = build_untrained(name, seed=chosen.seed, dtype=chosen.weights_dtype)
    elif folder.is_dir() or _HUB_ID.match(name):
        path = str(folder) if folder.is_dir() else name
        # Loading the tokenizer looks the config up, and would ask whether to run the checkpoint's own code.
        AutoConfig.register(VidLLMConfig.model_type, VidLLMConfig, exist_ok=True)
        dtype = getattr(torch, chosen.weights_dtype)
        more = four_bit_settings(dtype) if four_bits else {}
        model = VidLLMForConditionalGeneration.from_pretrained(path, dtype=dtype, **more)
        processor = VidLLMProcessor.from_pretrained(path)
    else:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"model: wanted a preset ({', '.join(PRESETS)}), a checkpoint folder or a Hub id; got {name!r}; did you mean {close!r}?"
        )
    if chosen.num_frames is not None:
        processor.video_processor.num_frames = chosen.num_frames
    return model, processor


def training_arguments(
    chosen: "JointRecipe | DistillRecipe", out_dir: str | Path, use_cpu: bool = False
) -> TrainingArguments:
    """What the Trainer must know of a recipe.

    Args:
        chosen (`JointRecipe` or `DistillRecipe`): The recipe.
        out_dir (`str` or `Path`): Of the run.
        use_cpu (`bool`): Whether to leave accelerators alone.

    Returns:
        `TrainingArguments`

    Raises:
        ValueError: `report_to` names what transformers does not know, or what is not installed.

    Source:
        Paper: AdamW, betas, weight decay, clip. Ours: everything else.
    """
    on_gpu = torch.cuda.is_available() and not use_cpu
    return TrainingArguments(
        output_dir=str(out_dir),
        use_cpu=use_cpu,
        max_steps=chosen.steps,
        per_device_train_batch_size=chosen.batch_size,
        per_device_eval_batch_size=chosen.batch_size,
        eval_strategy="no" if chosen.held_out is None else "steps",
        eval_steps=None if chosen.held_out is None else chosen.held_out.every,
        gradient_accumulation_steps=chosen.accumulation,
        # Visits come in the order of the run; see SceneVisits.
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        learning_rate=chosen.learning_rate,
        lr_scheduler_type=chosen.schedule,
        warmup_steps=round(chosen.warmup * chosen.steps),
        weight_decay=chosen.weight_decay,
        adam_beta1=chosen.betas[0],
        adam_beta2=chosen.betas[1],
        max_grad_norm=chosen.clip,
        bf16=chosen.precision == "bfloat16",
        activation_checkpointing=chosen.activation_checkpointing,
        # Every step touches every trained parameter.
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_num_workers=chosen.workers,
        dataloader_persistent_workers=chosen.workers > 0,
        dataloader_pin_memory=on_gpu,
        logging_steps=chosen.log_every,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=chosen.save_every,
        save_total_limit=chosen.keep_checkpoints,
        report_to=_checked_reporters(chosen.report_to),
        seed=chosen.seed,
        disable_tqdm=not sys.stderr.isatty(),
    )


def _checked_reporters(names: Sequence[str]) -> list[str]:
    """Where else the log goes; what the Trainer takes for nowhere is no name at all."""
    for name in names:
        known_name("report_to", name, INTEGRATION_TO_CALLBACK)
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to: wanted what is installed; got {name!r}, whose package is not")
    return list(names)


def train_joint(
    chosen: JointRecipe,
    out_dir: str | Path,
    resume: bool | str = False,
    use_cpu: bool = False,
    plugins: Sequence[LossPlugin] = (),
    callbacks: Sequence[TrainerCallback] = (),
) -> VidLLMJointTrainer:
    """Run a recipe, on every process of a launch.

    Args:
        chosen (`JointRecipe`): Complete.
        out_dir (`str` or `Path`): New or empty folder, unless a run is resumed.
        resume (`bool` or `str`): Go on from the last checkpoint of the folder, or from the one named.
        use_cpu (`bool`): Whether to leave accelerators alone.
        plugins (`Sequence[LossPlugin]`): Losses besides those of the recipe.
        callbacks (`Sequence[TrainerCallback]`): Of the Trainer.

    Returns:
        `VidLLMJointTrainer`: after training; `<out>` is a complete Hub folder.

    Raises:
        ValueError: The recipe, the folder or the data are not usable, or a run would go on with other scenes per step.
        FloatingPointError: A loss was not finite; names the samples.

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
    four_bits = chosen.lora is not None and chosen.lora.four_bits
    model, processor = starting_model(chosen, four_bits)
    if chosen.num_frames is None:
        chosen = replace(chosen, num_frames=processor.video_processor.num_frames)
    num_visits = chosen.steps * chosen.batch_size * chosen.accumulation * state.num_processes
    with joint_data(chosen, model.config, processor, num_visits, out_dir) as data:
        was_metric = model.config.is_metric
        if chosen.lora is not None:
            geometry = [
                name
                for name, known in zip(GEOMETRY_MODULES, (data.has_geometry, data.has_metric_depth), strict=True)
                if known
            ]
            model = add_lora(model, chosen.lora, geometry, chosen.seed, chosen.train_only)
        trainer = VidLLMJointTrainer(
            model=model,
            args=args,
            losses=chosen.losses,
            given_geometry=chosen.given_geometry,
            plugins=[*data.plugins, *plugins],
            has_metric_depth=data.has_metric_depth,
            freeze_encoder=chosen.freeze_encoder,
            # Nothing would hold either where it is.
            freeze_geometry=not data.has_geometry,
            freeze_metric_depth=not data.has_metric_depth,
            train_only=chosen.train_only,
            learning_rate_factors=chosen.learning_rate_factors,
            optimizer_name=chosen.optimizer,
            train_dataset=data.visits,
            data_collator=data.collator,
            held_out=data.held_out,
            processing_class=processor,
            callbacks=[RunLog(out_dir), HeldOutLog(out_dir), *callbacks],
        )
        if not trainer.model_config.is_metric:
            # Before the first step, which may hold none.
            refuse_places(data.num_placed)
        # PEFT puts an adapter on a model that still says that its lengths are relative: boxes would be in another unit than those learned.
        has_adapter = chosen.lora is not None and trainer.model_config.is_metric == was_metric
        if state.is_main_process:
            logger.info("%s: what is trained\n%s", chosen.name, parameter_table(model, trainer.unreachable_parameters))
            if resume and checkpoint is None:
                logger.warning("--resume: %s has no checkpoint yet; the run starts anew", out_dir)
                clear_unbegun(out_dir)
            if chosen.lora is not None and not has_adapter:
                logger.warning(
                    "lora: this run teaches %s metres, which an adapter alone cannot say: the merged model is written, and no %s/; an adapter "
                    "wants a base that gives metres, or train_only without metric_depth",
                    chosen.model,
                    ADAPTER_NAME,
                )
            facts = {**data.facts, "processes": state.num_processes}
            for line in write_recipe(chosen, out_dir, checkpoint, facts):
                logger.warning("resumed with another recipe: %s", line)
        state.wait_for_everyone()
        trainer.train(resume_from_checkpoint=checkpoint)
    finished = trainer.accelerator.unwrap_model(trainer.model)
    weights = whole_state(finished, lambda: trainer.accelerator.get_state_dict(trainer.model_wrapped))
    if state.is_main_process:
        if chosen.lora is not None:
            base = starting_model(chosen)[0] if four_bits or weights is not None else None
            finished = save_and_merge(finished, out_dir / ADAPTER_NAME if has_adapter else None, base, weights)
        elif weights is not None:
            finished = whole_model(finished, weights)
        publish(finished.eval(), processor, out_dir)
    state.wait_for_everyone()
    return trainer


def log_to_stderr() -> None:
    """What a training command says besides its log: warnings, and of this package what is trained.

    Source:
        Ours.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("vidllm.train").setLevel(logging.INFO)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Args:
        arguments (`Sequence[str]`, *optional*): By default those of the process.

    Returns:
        `int`: exit code; 2 on bad input, with one line on stderr.

    Source:
        Ours.
    """
    parser = argparse.ArgumentParser(prog="python -m vidllm.train.joint", description="Train stage 2 by a recipe.")
    parser.add_argument("recipe", help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE")
    parser.add_argument("--data", metavar="FILE", help="a JSONL file of own videos")
    parser.add_argument("--data-root", metavar="DIR", help="scenes and annotations of the recipe's benchmarks")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    parser.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    given = parser.parse_args(arguments)
    log_to_stderr()
    disable_progress_bar()
    disable_progress_bars()
    try:
        chosen = chosen_recipe(given.recipe, given.settings, given.data, given.data_root)
        train_joint(chosen, given.out, resume=given.resume, use_cpu=given.cpu)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


__all__ = [
    "JointData",
    "LossPlugin",
    "RunLog",
    "VidLLMJointTrainer",
    "joint_data",
    "log_to_stderr",
    "main",
    "starting_model",
    "train_joint",
    "training_arguments",
]


if __name__ == "__main__":
    sys.exit(main())
