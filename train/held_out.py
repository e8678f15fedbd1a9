"""What a run is measured on while it trains: scenes that it never learns from, and the same losses on them.

`held_out.jsonl` in the folder of the run has one line per look, before the first step and every so many steps: each loss term's mean over all
held-out scenes, without a draw that changes from look to look, in evaluation mode, from the video alone.

Shapes: none; losses are sums and counts `()`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from vidllm.train.line_log import drop_lines_after


if TYPE_CHECKING:
    from vidllm.train.counted_trainer import CountedTrainer
    from vidllm.train.room_source import RoomsSettings

HELD_OUT_NAME = "held_out.jsonl"
_PREFIX = "eval_"
# Added to the seed of the rooms that are learned from; a run would need as many rooms as this times the scene numbers of a seed to meet them.
_SEED_STEP = 1_000_000


@dataclass(frozen=True)
class HeldOutSettings:
    """How often a run looks at what it does not learn from, and at what.

    Args:
        every (`int`): Steps between looks; the first one is before the first step.
        scenes (`int`): Scenes of a look, always the same; of files, at most as many as there are.
        split (`str`): Of the benchmarks of a data root (stage 2).
        data (`str`, *optional*): A JSONL file (stage 2 on a JSONL file).
        clips (`str`, *optional*): A folder of clips (stage 1 on clips).

    Raises:
        ValueError: A number is out of range.

    Source:
        Ours. Rooms need no more settings: they are made with another seed.
    """

    every: int = 100
    scenes: int = 64
    split: str = "val"
    data: str | None = None
    clips: str | None = None

    def __post_init__(self) -> None:
        for name in ("every", "scenes"):
            if getattr(self, name) < 1:
                raise ValueError(f"held_out.{name}: wanted at least 1; got {getattr(self, name)}")

    def check_read(self, name: str, read: str | None) -> None:
        """Refuse settings that a run would not read.

        Args:
            name (`str`): Of the recipe, for the message.
            read (`str`, *optional*): Which of `split`, `data` and `clips` the run reads, if any.

        Raises:
            ValueError: Another one of them was changed.

        Source:
            Ours: who sets them believes that they say what is looked at.
        """
        usual = HeldOutSettings()
        for setting in ("split", "data", "clips"):
            got = getattr(self, setting)
            if setting != read and got != getattr(usual, setting):
                raise ValueError(
                    f"{name}: wanted {'no setting of held-out data' if read is None else f'held_out.{read} alone'}, which is what this run reads; "
                    f"got held_out.{setting}={got}"
                )


def same_place(one: str | Path, other: str | Path) -> bool:
    """Whether two paths name the same file or folder.

    Args:
        one (`str` or `Path`): `~` is the home folder; it need not exist.
        other (`str` or `Path`): Likewise.

    Returns:
        `bool`

    Source:
        Ours.
    """
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def held_out_rooms(settings: "RoomsSettings", held_out: HeldOutSettings) -> "RoomsSettings":
    """Rooms like those that are learned from, but others.

    Args:
        settings (`RoomsSettings`): Of the training.
        held_out (`HeldOutSettings`): How many.

    Returns:
        `RoomsSettings`: evenly spread frames, no JPEG.

    Source:
        Ours.
    """
    return replace(
        settings, num_rooms=held_out.scenes, seed=settings.seed + _SEED_STEP, makers=0, jpeg_share=0.0, even_share=1.0
    )


@dataclass(frozen=True)
class HeldOut:
    """Scenes of a look, and what makes batches of them.

    Args:
        scenes (`torch.utils.data.Dataset`): The scenes.
        collator (callable): Makes a batch of some of them.

    Source:
        Ours.
    """

    scenes: torch.utils.data.Dataset
    collator: Any


def held_out_terms(
    trainer: "CountedTrainer", scenes: torch.utils.data.Dataset, collator: Any, batch_size: int
) -> dict[str, float]:
    """Means of all loss terms over some scenes, on all processes of a run together.

    Args:
        trainer (`CountedTrainer`): Its model, and what it learns by.
        scenes (`torch.utils.data.Dataset`): At least one.
        collator (callable): Makes a batch of some of them.
        batch_size (`int`): Scenes per process and forward; changes nothing but the time.

    Returns:
        `dict[str, float]`: by term (those that nothing counted for are left out), and `loss`, their weighted sum.

    Raises:
        FloatingPointError: A loss is not finite; names the samples.

    Source:
        Ours: sums and counts, so that it does not matter how scenes are cut into batches and shared among processes.
    """
    args, accelerator = trainer.args, trainer.accelerator
    own = list(range(args.process_index, len(scenes), args.world_size))
    batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    # Sharded models want as many forwards of every process; one more than it has scenes for is not counted.
    most = -(-len(range(0, len(scenes), args.world_size)) // batch_size)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    model = trainer.model_wrapped if sharded else trainer.model
    was_training, totals, weights = model.training, {}, {}
    model.eval()
    try:
        for number in range(most):
            chosen = batches[number] if number < len(batches) else [0]
            batch = collator([scenes[scene] for scene in chosen])
            inputs = trainer._prepare_inputs(batch)
            with torch.no_grad(), trainer.compute_loss_context_manager():
                terms, weights, _ = trainer.weighted_terms(model, inputs)
            for name, (value, count) in terms.items():
                pair = torch.stack([value.detach().double(), count.detach().double()]).to(args.device)
                if not bool(pair.isfinite().all()):
                    raise FloatingPointError(
                        f"held-out scenes, step {trainer.state.global_step}: wanted finite losses; got {name} = {value.item()} for the samples "
                        f"{', '.join(batch['sample_ids'])}"
                    )
                before = totals.get(name, torch.zeros_like(pair))
                totals[name] = before + pair if number < len(batches) else before
    finally:
        model.train(was_training)
    sums = torch.stack(list(totals.values()))
    if args.world_size > 1:
        sums = accelerator.reduce(sums, reduction="sum")
    means = {name: s / c for name, (s, c) in zip(totals, sums.tolist(), strict=True) if c > 0}
    return {**means, "loss": sum(weights[name] * mean for name, mean in means.items())}


class HeldOutLog(TrainerCallback):
    """Writes what the looks found; a resumed run drops the lines after its checkpoint.

    Args:
        out_dir (`Path`): Of the run.

    Source:
        Ours.
    """

    def __init__(self, out_dir: Path):
        self.path = Path(out_dir) / HELD_OUT_NAME

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the step that the run starts from."""
        if state.is_world_process_zero:
            drop_lines_after(self.path, state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **kwargs: Any) -> None:
        """Add a line."""
        if state.is_world_process_zero:
            line = {"step": state.global_step}
            line |= {name.removeprefix(_PREFIX): value for name, value in metrics.items() if name.startswith(_PREFIX)}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


__all__ = [
    "HELD_OUT_NAME",
    "HeldOut",
    "HeldOutLog",
    "HeldOutSettings",
    "held_out_rooms",
    "held_out_terms",
    "same_place",
]
