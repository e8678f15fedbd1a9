"""The trainer below both stages: every loss term is divided by its count over the whole step, whatever the step is cut into.

A step is `gradient_accumulation_steps` forwards on each of the processes. The counts of all terms depend on the batches alone, so they are
added up over the step and over the processes before the first backward pass, and `batch 8 = 2 forwards of 4 = 2 processes of 4`.
Nothing waits for the device within a step: what is logged is added up there, and a loss that is not finite is noticed one step later, before
anything is saved: the run stops, the ids of the samples are in `not-finite-<step>-<process>.json`, and the last checkpoint is one from before.
"""

import itertools
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerControl, TrainingArguments

from vidllm.train.held_out import HeldOut, held_out_terms
from vidllm.train.muon import IS_MUON, OPTIMIZERS, MuonWithAdamW, linear_weights
from vidllm.train.resumed_optimizer import keeping_settings


# What is read on the host anyway.
HOST_INPUTS = ("sample_ids", "video_size_shw", "scale_frames")


class CountedTrainer(Trainer):
    """A Trainer of losses that are sums and counts; says nothing of what they are.

    Args:
        model (`nn.Module`): What is trained.
        args (`TrainingArguments`): With `remove_unused_columns=False`; one process per device.
        learning_rate_factors (`Mapping[str, float]`, *optional*): Regular expression of parameter names to a factor of their learning rate.
        optimizer_name (`str`): `adamw`, or `muon` for the weights of linear layers and AdamW for the rest.
        held_out (`HeldOut`, *optional*): What `evaluate` looks at, with its own collator.
        **kwargs: As of `Trainer`: `train_dataset`, `data_collator`, `processing_class`, `callbacks`, ...

    Raises:
        ValueError: The arguments drop columns, one process would use several devices, or the optimizer is unknown.

    Source:
        Upstream: huggingface/transformers `Trainer`. Ours: counts over the whole step.
    """

    # The loss is divided by counts of the whole step; the Trainer must not divide it again.
    loss_is_scaled_for_ga = True
    # What is logged as a share of the videos; subclasses count into `_window_shares` and `_window_videos`.
    share_names: ClassVar[tuple[str, ...]] = ()
    optimizer: torch.optim.Optimizer | None
    control: TrainerControl
    # Sums and counts of the terms since the last line of the log, on the device.
    _window_sums: Any
    _window_counts: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        learning_rate_factors: Mapping[str, float] | None = None,
        optimizer_name: str = "adamw",
        held_out: HeldOut | None = None,
        **kwargs: Any,
    ):
        self.check_arguments(args)
        if optimizer_name not in OPTIMIZERS:
            raise ValueError(f"optimizer_name: wanted one of {', '.join(OPTIMIZERS)}; got {optimizer_name!r}")
        # It would look at every loss on the host, and hide those that are not finite.
        args.logging_nan_inf_filter = False
        if held_out is not None:
            kwargs["eval_dataset"] = held_out.scenes
        super().__init__(model=model, args=args, **kwargs)
        self.held_out_collator = self.data_collator if held_out is None else held_out.collator
        self.learning_rate_factors = dict(learning_rate_factors or {})
        self.optimizer_name = optimizer_name
        self._names: list[str] | None = None
        self._unchecked: list[_NumbersOnTheirWay] = []
        self._step_ids: list[str] = []
        self._window_start: tuple[float, int] | None = None
        self._forget_window()

    @staticmethod
    def check_arguments(args: TrainingArguments) -> None:
        """Refuse what would silently train something else.

        Args:
            args (`TrainingArguments`): As given.

        Raises:
            ValueError: See the class.
        """
        if args.remove_unused_columns:
            raise ValueError("trainer: wanted remove_unused_columns=False, or targets would be dropped; got True")
        if args.n_gpu > 1:
            raise ValueError(
                f"trainer: wanted one process per GPU (accelerate launch --num_processes {args.n_gpu}); got one for {args.n_gpu}"
            )

    # ------------------------------------------------------------------ what a stage says

    def completed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with whatever the trainer adds to it, on the host.

        Args:
            batch (`dict`): From the collator, with `sample_ids`.

        Returns:
            `dict`: by default the same.
        """
        return batch

    def batch_counts(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Counts of all terms, from the batch alone.

        Args:
            batch (`dict`): Completed, on the host.

        Returns:
            `dict[str, torch.Tensor]`: by term, shape `()`, float32; always the same names.

        Raises:
            TypeError: The stage does not say.
        """
        raise TypeError(f"{type(self).__name__}: wanted batch_counts of its own")

    def weighted_terms(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, float], Any]:
        """One forward.

        Args:
            model (`nn.Module`): As wrapped for distributed training.
            inputs (`dict`): A batch, on the device.

        Returns:
            `tuple`: sum and count `()` by term; weight by term; the forward's output.

        Raises:
            TypeError: The stage does not say.
        """
        raise TypeError(f"{type(self).__name__}: wanted weighted_terms of its own")

    # ------------------------------------------------------------------ data

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """As the Trainer makes it, but batches stay on the host: counting there waits for nothing.

        Returns:
            `torch.utils.data.DataLoader`: this process's share of the batches.

        Source:
            Ours: see `_prepare_inputs` for what goes to the device.
        """
        loader = super().get_train_dataloader()
        loader.device = None
        return loader

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0..1."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of a step, completed, and the counts of all terms over step and processes.

        Args:
            epoch_iterator (`Iterator`): Gives batches.
            num_batches (`int`): Of the step.
            device (`torch.device`): Of the counts.

        Returns:
            `tuple`: the batches; counts by term, 0-dim float32, or None where there is no batch.

        Raises:
            FloatingPointError: The loss of the step before was not finite.

        Source:
            Ours: the Trainer passes the second part on to `compute_loss` as `num_items_in_batch`.
        """
        self._raise_if_not_finite()
        if self._window_start is None:
            self._window_start = (time.perf_counter(), self.state.global_step)
        batches = [self.completed(batch) for batch in itertools.islice(epoch_iterator, num_batches)]
        if not batches:
            return batches, None
        self._step_ids = [sample_id for batch in batches for sample_id in batch["sample_ids"]]
        counts = self._counts_of(batches)
        stacked = torch.stack([counts[name].double() for name in counts]).to(device, non_blocking=True)
        if self.args.world_size > 1:
            stacked = self.accelerator.reduce(stacked, reduction="sum")
        self._names = list(counts)
        self._window_counts = self._window_counts + stacked
        return batches, dict(zip(counts, stacked.float().unbind(), strict=True))

    def _counts_of(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Counts by term, of this process."""
        total: dict[str, torch.Tensor] = {}
        for batch in batches:
            counts = self.batch_counts(batch)
            total = {name: total[name] + value if total else value for name, value in counts.items()}
        return total

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device, all but what the model reads on the host."""
        return {name: value if name in HOST_INPUTS else self._placed(value) for name, value in inputs.items()}

    def _placed(self, value: Any) -> Any:
        """A tensor, or those of a dict, on the device."""
        if isinstance(value, Mapping):
            return {name: self._placed(item) for name, item in value.items()}
        return value.to(self.args.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    # ------------------------------------------------------------------ loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, torch.Tensor] | None = None,
    ) -> Any:
        """One forward, all terms, their weighted sum over the counts of the step.

        Args:
            model (`nn.Module`): As wrapped for distributed training.
            inputs (`dict`): A batch, on the device.
            return_outputs (`bool`): Whether to return the output too.
            num_items_in_batch (`Mapping[str, torch.Tensor]`, *optional*): Counts of the step; by default those of the batch.

        Returns:
            `torch.Tensor`: this forward's share of the step's loss, 0-dim; times the number of processes, because gradients are averaged over
            them. With `return_outputs` a tuple of it and the output.

        Source:
            Ours.
        """
        terms, weights, output = self.weighted_terms(model, inputs)
        counts = num_items_in_batch or {name: count for name, (_, count) in terms.items()}
        loss = torch.zeros((), device=next(iter(terms.values()))[0].device)
        for name, (value, _) in terms.items():
            loss = loss + weights[name] * value / counts[name].clamp(min=1)
        if num_items_in_batch is not None:
            values = torch.stack([terms[name][0].detach().double() for name in self._names])
            self._window_sums = self._window_sums + values
            self._unchecked.append(_NumbersOnTheirWay(values, list(self._names), inputs["sample_ids"], self._step))
        loss = loss * self.args.world_size
        return (loss, output) if return_outputs else loss

    @property
    def _step(self) -> int:
        """The step that is being computed, from 1."""
        return self.state.global_step + 1

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradient, clipped or not; noted, because it may be infinite where no loss is."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None:
            whole = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
            self._unchecked.append(_NumbersOnTheirWay(whole.detach()[None], ["gradient"], self._step_ids, self._step))
        return norm

    def _raise_if_not_finite(self) -> None:
        """Stop if a loss that was computed since the last look is not finite; the samples stay behind in a file."""
        unchecked, self._unchecked = self._unchecked, []
        for numbers in unchecked:
            wrong = numbers.not_finite()
            if wrong:
                self._write_not_finite(numbers, wrong)
                raise FloatingPointError(
                    f"step {numbers.step}: wanted finite losses; got {', '.join(wrong)} for the samples {', '.join(numbers.sample_ids)}"
                )

    def _write_not_finite(self, numbers: "_NumbersOnTheirWay", wrong: list[str]) -> None:
        """`not-finite-<step>-<process>.json` in the folder of the run: what was seen when the loss was not finite."""
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        document = {"step": numbers.step, "not_finite": wrong, "sample_ids": numbers.sample_ids}
        path = folder / f"not-finite-{numbers.step}-{self.args.process_index}.json"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the formula of the Trainer is for text alone.

        Args:
            inputs (`dict`): A batch.

        Returns:
            `int`: 0.

        Source:
            Ours.
        """
        return 0

    # ------------------------------------------------------------------ log and checkpoints

    def _forget_window(self) -> None:
        """Start adding up anew."""
        self._window_counts, self._window_sums = 0.0, 0.0
        self._window_shares = dict.fromkeys(self.share_names, 0)
        self._window_videos = 0
        self._window_start = (time.perf_counter(), self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with every term's mean over what was seen since the last line, the shares of videos of `share_names`, and what time is left.

        Args:
            logs (`dict[str, float]`): Of the Trainer: `loss` (mean of the steps' totals), `grad_norm`, `learning_rate`.
            start_time (`float`, *optional*): Of the training.

        Raises:
            FloatingPointError: A loss was not finite.

        Source:
            Ours: sum of the sums by sum of the counts; terms that nothing counted for are left out.
        """
        self._raise_if_not_finite()
        if "loss" in logs and self._names is not None:
            shares = [*self._window_shares.values(), self._window_videos]
            shares = torch.tensor(shares, dtype=torch.float64, device=self.args.device)
            sums = torch.cat([self._window_sums, shares])
            if self.args.world_size > 1:
                sums = self.accelerator.reduce(sums, reduction="sum")
            numbers = sums.tolist()
            sums, shared, videos = numbers[: len(self._names)], numbers[len(self._names) : -1], numbers[-1]
            counts = self._window_counts.tolist()
            logs.update({n: s / c for n, s, c in zip(self._names, sums, counts, strict=True) if c > 0})
            logs.update({name: n / max(videos, 1) for name, n in zip(self.share_names, shared, strict=True)})
            if self._window_start is not None:
                started, step = self._window_start
                seconds = (time.perf_counter() - started) / max(self.state.global_step - step, 1)
                logs["seconds_per_step"] = seconds
                logs["eta_s"] = round(seconds * (self.state.max_steps - self.state.global_step))
            self._forget_window()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """All loss terms on scenes that are not learned from.

        Args:
            eval_dataset (`torch.utils.data.Dataset`, *optional*): The scenes; by default those of the trainer.
            ignore_keys (`list[str]`, *optional*): Not read: no outputs are gathered.
            metric_key_prefix (`str`): Put before the names.

        Returns:
            `dict[str, float]`: by prefix, `_` and term; also `_loss`, the weighted sum, and `_seconds`.

        Raises:
            ValueError: There are no such scenes.
            FloatingPointError: A loss is not finite.

        Source:
            Ours: see `held_out_terms`; what the Trainer does averages batches.
        """
        scenes = self.eval_dataset if eval_dataset is None else eval_dataset
        if scenes is None or not len(scenes):
            raise ValueError("evaluate: wanted held-out scenes (eval_dataset); got none")
        begun = time.perf_counter()
        terms = held_out_terms(self, scenes, self.held_out_collator, self.args.per_device_eval_batch_size)
        seconds = time.perf_counter() - begun
        if self._window_start is not None:
            # Seconds per step are those of training.
            started, step = self._window_start
            self._window_start = (started + seconds, step)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in {**terms, "seconds": seconds}.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save, but never weights that came out of a loss that was not finite.

        Args:
            output_dir (`str`, *optional*): Folder.

        Raises:
            FloatingPointError: A loss was not finite.

        Source:
            Upstream: huggingface/transformers `Trainer`.
        """
        self._raise_if_not_finite()
        super().save_model(output_dir, _internal_call=_internal_call)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as the Trainer does.

        Args:
            *args: As of `Trainer.train`.
            **kwargs: As of `Trainer.train`.

        Returns:
            `TrainOutput`

        Raises:
            FloatingPointError: A loss was not finite.

        Source:
            Upstream: huggingface/transformers `Trainer`.
        """
        self._unchecked.clear()
        self._forget_window()
        # Where a resumed run goes on is known at its first step.
        self._window_start = None
        result = super().train(*args, **kwargs)
        self._raise_if_not_finite()
        return result

    # ------------------------------------------------------------------ optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or Muon with AdamW, with groups by weight decay and learning rate.

        Args:
            model (`nn.Module`, *optional*): Whose parameters; by default the trainer's.

        Returns:
            `torch.optim.Optimizer`

        Raises:
            ValueError: An expression of the learning rates fits no trained parameter.

        Source:
            Paper: AdamW, weight decay. Ours: none on norms, biases and whatever else has one dimension.
        """
        if self.optimizer is None:
            maker, settings = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            groups = self.parameter_groups(model or self.model, settings["lr"])
            if self.optimizer_name == "muon":
                # It would come to stand in Muon's groups too, which has no fused step.
                settings.pop("fused", None)
                maker = MuonWithAdamW
            self.optimizer = maker(groups, **settings)
        return self.optimizer

    def parameter_groups(self, model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        """Trained parameters by weight decay and learning rate; those of the plain learning rate come first.

        Args:
            model (`nn.Module`): Whose parameters.
            learning_rate (`float`): Without a factor.

        Returns:
            `list[dict]`: as optimizers take them.

        Raises:
            ValueError: See `create_optimizer`.

        Source:
            Ours.
        """
        matrices = linear_weights(model) if self.optimizer_name == "muon" else set()
        groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
        used: set[str] = set()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            fits = next((e for e in self.learning_rate_factors if re.search(e, name)), None)
            used.add(fits)
            groups.setdefault((fits or "", parameter.ndim > 1, id(parameter) in matrices), []).append(parameter)
        unused = [expression for expression in self.learning_rate_factors if expression not in used]
        if unused:
            raise ValueError(
                f"learning_rate_factors: wanted names of trained parameters; nothing is left for {', '.join(unused)}"
            )
        made = []
        # Neither number nor order of the groups hangs on a value, so that a resumed run finds its moments again whatever it changes.
        for key in sorted(groups):
            expression, has_decay, is_matrix = key
            factor = self.learning_rate_factors.get(expression, 1.0)
            decay = self.args.weight_decay if has_decay else 0.0
            group = {"params": groups[key], "lr": learning_rate * factor, "weight_decay": decay}
            made.append({**group, IS_MUON: is_matrix} if matrices else group)
        return made

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load moments and the place in the schedule; rates, decays and betas stay this run's, which the states would replace in silence.

        DeepSpeed loads its optimizer elsewhere, with the rates that it had.
        """
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with keeping_settings(self.optimizer, self.lr_scheduler):
            super()._load_optimizer_and_scheduler(checkpoint)


class _NumbersOnTheirWay:
    """Numbers that a device will have computed some time, copied to the host without waiting for it."""

    def __init__(self, values: torch.Tensor, names: list[str], sample_ids: list[str], step: int):
        self.names, self.sample_ids, self.step = names, sample_ids, step
        self.event = None
        self.host = values
        if values.is_cuda:
            self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def not_finite(self) -> list[str]:
        """`name = value` of those that are not finite; waits for this copy, not for what was started after it."""
        if self.event is not None:
            self.event.synchronize()
        return [f"{n} = {v}" for n, v in zip(self.names, self.host.tolist(), strict=True) if not math.isfinite(v)]


__all__ = ["HOST_INPUTS", "CountedTrainer"]
