"""Supervised fine-tuning through trl, for scripts that are built on it: `VidLLMSFTTrainer`, and a program that reads YAML and a command line.

`accelerate launch -m vidllm.train.sft --config run.yaml --model_path DIR --data my.jsonl --output_dir outputs/mine`

trl's own loss calls the model without its heads, so that boxes, depth and poses would be lost in silence; here the losses of stage 2 are computed.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer, TrlParser

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.benchmarks.load import load_benchmark
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.samples import Sample
from vidllm.train.collator import VidLLMCollator
from vidllm.train.joint import log_to_stderr
from vidllm.train.joint_trainer import VidLLMJointTrainer, refuse_places
from vidllm.train.lora import add_lora, save_and_merge
from vidllm.train.parameter_table import parameter_table
from vidllm.train.recipes import LoraSettings, plain
from vidllm.train.run_folder import ADAPTER_NAME, check_processes, checkpoint_to_resume, publish, write_recipe
from vidllm.train.scene_data import has_places, rows_fingerprint
from vidllm.train.whole_weights import whole_model, whole_state


logger = logging.getLogger(__name__)
# Arguments that say nothing of what is learned, or that the record of a run has already.
_UNRECORDED = ("output_dir", "resume_from_checkpoint", "run_name", "push_to_hub_token", "hub_token")


class VidLLMSFTTrainer(VidLLMJointTrainer, SFTTrainer):
    """trl's trainer with the losses of stage 2.

    Args:
        model (`VidLLMForConditionalGeneration`): Or a `PeftModel` around it.
        args (`SFTConfig`): See `sft_arguments`.
        train_dataset (`datasets.Dataset`): Rows of `load_benchmark`.
        data_collator (`VidLLMCollator`): Makes batches of them; rows about one video share it within a batch.
        processing_class (`VidLLMProcessor`): Of the model.
        **kwargs: As of `VidLLMJointTrainer` and `SFTTrainer`.

    Raises:
        ValueError: The arguments would let trl prepare, cut or pack the rows.

    Source:
        Upstream: huggingface/trl `SFTTrainer`. Ours: loss, optimizer groups, counts over the step, log.
    """

    def __init__(self, model: nn.Module, args: SFTConfig, **kwargs: Any):
        prepared = (args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
        if not prepared or args.max_length is not None or args.packing:
            raise ValueError(
                "sft: wanted dataset_kwargs={'skip_prepare_dataset': True}, max_length=None and packing=False, because rows hold videos and "
                f"boxes; got {args.dataset_kwargs}, {args.max_length}, {args.packing} (sft_arguments makes them so)"
            )
        super().__init__(model=model, args=args, **kwargs)


def sft_arguments(args: SFTConfig) -> SFTConfig:
    """Arguments of trl with what videos and boxes need.

    Args:
        args (`SFTConfig`): As given; changed in place.

    Returns:
        `SFTConfig`: the same.

    Source:
        Upstream: huggingface/trl. Ours: trl would otherwise tokenize, cut and pack the rows itself, and look for parameters without gradient in every step.
    """
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    args.max_length, args.packing, args.remove_unused_columns = None, False, False
    args.ddp_find_unused_parameters = False
    return args


@dataclass
class SftScript:
    """What is trained on what; besides `SFTConfig`.

    Args:
        model_path (`str`): Checkpoint folder or Hub id.
        data (`str`): A JSONL file of own videos.
        num_frames (`int`, *optional*): Frames per video; by default the processor's.
        lora_rank (`int`): Of adapters on the language model; 0 trains all of it.
        lora_alpha (`float`): Their scale times the rank.
        train_only (`str`, *optional*): Regular expression of the names of the parameters that are trained.

    Source:
        Ours.
    """

    model_path: str = field(metadata={"help": "checkpoint folder or Hub id"})
    data: str = field(metadata={"help": "a JSONL file of own videos"})
    num_frames: int | None = field(default=None, metadata={"help": "frames per video"})
    lora_rank: int = field(default=8, metadata={"help": "0 trains all of the language model"})
    lora_alpha: float = field(default=16.0, metadata={"help": "scale of the adapters times the rank"})
    train_only: str | None = field(default=None, metadata={"help": "expression of parameter names"})


def train_sft(script: SftScript, args: SFTConfig) -> VidLLMSFTTrainer:
    """Fine-tune on own videos.

    Args:
        script (`SftScript`): What on what.
        args (`SFTConfig`): How; `resume_from_checkpoint` is a folder `checkpoint-N`, or `true` for the last one in the output folder.

    Returns:
        `VidLLMSFTTrainer`: after training; the output folder is a complete Hub folder with `recipe.json`, the record of the run; of adapters,
        with `adapter/` too.

    Raises:
        ValueError: Model, data or the checkpoint to go on from are not usable, or a run would go on with other rows per step.

    Source:
        Ours.
    """
    out_dir, checkpoint = Path(args.output_dir), None
    if args.resume_from_checkpoint:
        named = str(args.resume_from_checkpoint)
        checkpoint = checkpoint_to_resume(out_dir, True if named.lower() == "true" else named)
    batch_size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    check_processes(checkpoint, args.world_size, batch_size, accumulation)
    AutoConfig.register(VidLLMConfig.model_type, VidLLMConfig, exist_ok=True)
    place = Path(script.model_path).expanduser()
    place = str(place) if place.is_dir() else script.model_path
    model = VidLLMForConditionalGeneration.from_pretrained(place, dtype=torch.float32)
    processor = VidLLMProcessor.from_pretrained(place)
    if script.num_frames is not None:
        processor.video_processor.num_frames = script.num_frames
    rows = load_benchmark("jsonl", str(Path(script.data).expanduser()), "train")
    trained: Any = model
    lora = LoraSettings(script.lora_rank, script.lora_alpha) if script.lora_rank else None
    if lora is not None:
        trained = add_lora(model, lora, geometry=(), seed=args.seed, train_only=script.train_only)
    collator = VidLLMCollator(processor, num_frames=processor.video_processor.num_frames, seed=args.seed)
    trainer = VidLLMSFTTrainer(
        model=trained,
        args=sft_arguments(args),
        train_dataset=rows,
        data_collator=collator,
        processing_class=processor,
        freeze_geometry=True,
        train_only=script.train_only,
    )
    if not trainer.model_config.is_metric:
        # Before the first step, which may hold none.
        refuse_places(sum(has_places(Sample.from_row(row)) for row in rows))
    if trainer.is_world_process_zero():
        logger.info("sft: what is trained\n%s", parameter_table(trained, trainer.unreachable_parameters))
        arguments = {name: value for name, value in args.to_dict().items() if name not in _UNRECORDED}
        record = {
            "name": "sft",
            "model": script.model_path,
            "data": script.data,
            "num_frames": processor.video_processor.num_frames,
            "train_only": script.train_only,
            "lora": plain(lora),
            "batch_size": batch_size,
            "accumulation": accumulation,
            **arguments,
        }
        facts = {
            "data": {"rows": {"jsonl": len(rows)}, "fingerprint": rows_fingerprint({"jsonl": rows})},
            "processes": args.world_size,
        }
        for line in write_recipe(record, out_dir, checkpoint, facts):
            logger.warning("resumed with other arguments: %s", line)
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=checkpoint)
    finished = trainer.accelerator.unwrap_model(trainer.model)
    weights = whole_state(finished, lambda: trainer.accelerator.get_state_dict(trainer.model_wrapped))
    if trainer.is_world_process_zero():
        if lora is not None:
            base = (
                None if weights is None else VidLLMForConditionalGeneration.from_pretrained(place, dtype=torch.float32)
            )
            finished = save_and_merge(finished, out_dir / ADAPTER_NAME, base, weights)
        elif weights is not None:
            finished = whole_model(finished, weights)
        publish(finished.eval(), processor, out_dir)
    trainer.accelerator.wait_for_everyone()
    return trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; `--config FILE` reads YAML, what stands on the command line goes before it.

    Args:
        arguments (`Sequence[str]`, *optional*): By default those of the process.

    Returns:
        `int`: exit code; 2 on bad input, with one line on stderr.

    Source:
        Upstream: huggingface/trl `TrlParser`.
    """
    log_to_stderr()
    disable_progress_bar()
    try:
        script, args = TrlParser((SftScript, SFTConfig)).parse_args_and_config(arguments)
        train_sft(script, args)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


__all__ = ["SftScript", "VidLLMSFTTrainer", "main", "sft_arguments", "train_sft"]


if __name__ == "__main__":
    sys.exit(main())
