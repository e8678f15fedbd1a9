"""The trainer of stage 2: every loss term is divided by its count over the whole step, whatever the step is cut into.

A step is `gradient_accumulation_steps` forwards on each of the processes. The counts of all terms depend on the batches alone, so they are
added up over the step and over the processes before the first backward pass, and `batch 8 = 2 forwards of 4 = 2 processes of 4`.
Nothing waits for the device within a step: what is logged is added up there, and a loss that is not finite is noticed one step later.

Shapes: B videos, Q prompts, L text tokens, S frames, H W pixels.
"""

import contextlib
import itertools
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.modeling_vidllm.outputs_vidllm import VidLLMOutput
from vidllm.modeling_vidllm.shared_prefix_vidllm import prefix_obstacle
from vidllm.train.collator import IGNORED_LABEL, keyed_generator, model_inputs
from vidllm.train.dense_labels import given_language_stream, label_tokens
from vidllm.train.losses import TERMS, JointLossSettings, joint_loss_counts, joint_loss_terms, total_loss
from vidllm.train.recipes import MixingSchedule


# What the model reads on the host anyway.
HOST_INPUTS = ("sample_ids", "video_size_shw", "scale_frames")
GEOMETRY_MODULES = ("reconstruction", "metric_depth")
GIVEN_PARTS = ("cam_from_world", "intrinsics_px", "depth_m")
# What the trainer adds to a batch for itself.
_GIVEN_MASK, _GIVEN_LABELS_MASK, _FIRST_LOGIT = "given_mask", "given_labels_mask", "first_logit"


class LossPlugin(Protocol):
    """A further loss, for instance on labels that only some data have.

    Args:
        name (`str`): For messages.
        forward_kwargs (`Mapping[str, Any]`): What the forward must be asked for, such as `{"output_adapter_tokens": True}`.

    Source:
        Ours.
    """

    name: str
    forward_kwargs: Mapping[str, Any]

    def weight(self, progress: float) -> float:
        """Factor of its terms in the total, at a point of the run (0..1)."""

    def terms(
        self, output: VidLLMOutput, batch: Mapping[str, Any], config: VidLLMConfig
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """`(sum, count)` of each term, 0-dim float32; the sum with gradient, always the same keys."""

    def counts(self, batch: Mapping[str, Any], config: VidLLMConfig) -> dict[str, torch.Tensor]:
        """The counts of `terms`, from the batch alone."""


def base_model(model: nn.Module) -> nn.Module:
    """The `VidLLMForConditionalGeneration` inside adapters.

    Args:
        model (`nn.Module`): It, or a `PeftModel` around it.

    Returns:
        `nn.Module`: with `.model` and `.lm_head`.

    Source:
        Upstream: huggingface/peft `get_base_model`.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def freeze_for_joint(model: nn.Module, freeze_encoder: bool, freeze_geometry: bool = False) -> list[str]:
    """Decide what is trained: everything that a loss reaches, the encoder by choice; of a model with adapters what they left trainable.

    What is trained becomes float32: the steps of an optimizer are lost in half precision.

    Args:
        model (`nn.Module`): A `VidLLMForConditionalGeneration`, or a `PeftModel` around it.
        freeze_encoder (`bool`): Whether the vision encoder stays as it is.
        freeze_geometry (`bool`): Whether reconstruction and metric depth stay as they are: without true geometry in the data, weight decay is
            all that would change them.

    Returns:
        `list[str]`: names of the parameters that are not trained because no output depends on them.

    Source:
        Paper: Fig. 3 (frozen DINOv2). Ours: distributed training wants a gradient for whatever asks for one.
    """
    core = base_model(model).model
    unreachable = []
    for name in ("encoder", "language_encoder"):
        encoder = getattr(core, name)
        if encoder is None:
            continue
        if core is model.model:
            encoder.requires_grad_(not freeze_encoder)
        encoder.freeze_unreachable()
        unreachable += [f"model.{name}.{parameter}" for parameter in encoder.unreachable_parameters]
    for name in GEOMETRY_MODULES:
        if freeze_geometry and getattr(core, name) is not None:
            getattr(core, name).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return unreachable


class VidLLMJointTrainer(Trainer):
    """Trains reconstruction, language and grounding together: `L = L_recon + L_VL + L_MD`.

    Args:
        model (`VidLLMForConditionalGeneration`): Or a `PeftModel` around it.
        args (`TrainingArguments`): With `remove_unused_columns=False`; one process per device.
        losses (`JointLossSettings`, *optional*): Weights and constants of the losses.
        given_geometry (`MixingSchedule`, *optional*): With which probability a video with true cameras and depth is given them. Keyed by the
            run's seed, the step and the video's first sample.
        given_labels (`MixingSchedule`, *optional*): With which probability the scene tokens of a video with labelled patches are made of the
            labels; keyed in the same way.
        plugins (`Sequence[LossPlugin]`): Further losses.
        has_metric_depth (`bool`): Whether the data has depth in metres; the model then says so of its outputs, from the start.
        freeze_encoder (`bool`): Whether the vision encoder stays as it is.
        freeze_geometry (`bool`): Whether reconstruction and metric depth stay as they are, see `freeze_for_joint`.
        learning_rate_factors (`Mapping[str, float]`, *optional*): Regular expression of parameter names to a factor of their learning rate.
        **kwargs: As of `Trainer`: `train_dataset`, `data_collator`, `processing_class`, `callbacks`, ...

    Raises:
        ValueError: The arguments drop columns, or one process would use several devices.

    Source:
        Paper: section 3.4, eq. 8. Upstream: huggingface/transformers `Trainer`. Ours: counts over the whole step.
    """

    # The loss is divided by counts of the whole step; the Trainer must not divide it again.
    loss_is_scaled_for_ga = True
    optimizer: torch.optim.Optimizer | None
    # Sums and counts of the terms since the last line of the log, on the device.
    _window_sums: Any
    _window_counts: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        losses: JointLossSettings | None = None,
        given_geometry: MixingSchedule | None = None,
        given_labels: MixingSchedule | None = None,
        plugins: Sequence[LossPlugin] = (),
        has_metric_depth: bool = False,
        freeze_encoder: bool = True,
        freeze_geometry: bool = False,
        learning_rate_factors: Mapping[str, float] | None = None,
        **kwargs: Any,
    ):
        if args.remove_unused_columns:
            raise ValueError(
                "joint trainer: wanted remove_unused_columns=False, or targets would be dropped; got True"
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"joint trainer: wanted one process per GPU (accelerate launch --num_processes {args.n_gpu}); got one for {args.n_gpu}"
            )
        # It would look at every loss on the host, and hide those that are not finite.
        args.logging_nan_inf_filter = False
        self.unreachable_parameters = freeze_for_joint(model, freeze_encoder, freeze_geometry)
        config = base_model(model).config
        config.is_metric = config.is_metric or has_metric_depth
        has_use_cache = "use_cache" in config.__dict__
        super().__init__(model=model, args=args, **kwargs)
        if not has_use_cache:
            # The Trainer writes False into the config, which would be saved with it.
            config.__dict__.pop("use_cache", None)
        self.model_config = config
        self._share_prefix = prefix_obstacle(base_model(model).model.language_model) is None
        self.losses = losses or JointLossSettings()
        self.given_geometry = given_geometry or MixingSchedule(start=0.0, end=0.0)
        self.given_labels = given_labels or MixingSchedule(start=0.0, end=0.0)
        self.plugins = list(plugins)
        self.learning_rate_factors = dict(learning_rate_factors or {})
        self._names: list[str] | None = None
        self._unchecked: list[_NumbersOnTheirWay] = []
        self._step_ids: list[str] = []
        self._window_start: tuple[float, int] | None = None
        self._forget_window()

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
        """The batches of a step, which videos of them are given their geometry, and the counts of all terms over step and processes.

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
        batches = [self._completed(batch) for batch in itertools.islice(epoch_iterator, num_batches)]
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
            counts = dict(joint_loss_counts(batch, self.model_config, self.losses))
            for plugin in self.plugins:
                counts.update(plugin.counts(batch, self.model_config))
            total = {name: total[name] + value if total else value for name, value in counts.items()}
        return total

    def _completed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch that says where its labels start, and which videos are given their true geometry or labels, if any are."""
        batch = {**batch, _FIRST_LOGIT: first_logit(batch["labels"])}
        targets = batch["targets"]
        geometry = targets["camera_mask"] & targets["depth_mask"]
        if "depth_m" not in targets:
            geometry = torch.zeros_like(geometry)
        labels = torch.full_like(geometry, "patch_labels" in targets)
        first_prompt: dict[int, str] = {}
        for sample_id, video in zip(batch["sample_ids"], batch["scene_index"].tolist(), strict=True):
            first_prompt.setdefault(video, sample_id)
        names = [first_prompt.get(video, "") for video in range(len(geometry))]
        for what, mask_name, known, schedule in (
            ("given geometry", _GIVEN_MASK, geometry, self.given_geometry),
            ("given labels", _GIVEN_LABELS_MASK, labels, self.given_labels),
        ):
            share = schedule.share(self.progress)
            given = torch.tensor([share > 0 and self._drawn(what, name) < share for name in names]) & known
            self._window_given[mask_name] += int(given.sum())
            if given.any():
                batch[mask_name] = given
        self._window_videos += len(geometry)
        return batch

    def _drawn(self, what: str, name: str) -> float:
        """A number in 0..1 of this step."""
        return float(keyed_generator(self.args.seed, self.state.global_step, what, name).random())

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device, all but what the model reads on the host."""
        return {name: value if name in HOST_INPUTS else self._placed(value) for name, value in inputs.items()}

    def _placed(self, value: Any) -> Any:
        """A tensor, or those of a dict, on the device."""
        if isinstance(value, Mapping):
            return {name: self._placed(item) for name, item in value.items()}
        return value.to(self.args.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    # ------------------------------------------------------------------ loss

    def forward_inputs(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """What goes into the forward, and from which token on logits are wanted.

        Args:
            batch (`dict`): From `VidLLMCollator`, on the device.

        Returns:
            `tuple`: keyword arguments; number of the first position whose logits are computed.

        Source:
            Ours: scene tokens come before everything that is learned, and their logits would take most of the memory. Without points the
            batch gets some that are none, so that their embedding takes part in every step. Where the language
            model allows it, prompts of a video share its tokens in one row.
        """
        own = ("labels", _GIVEN_MASK, _GIVEN_LABELS_MASK, _FIRST_LOGIT)
        inputs = {name: value for name, value in model_inputs(batch).items() if name not in own}
        if "coord_points_world" not in inputs:
            prompts, device = len(batch["input_ids"]), batch["input_ids"].device
            inputs["coord_points_world"] = torch.zeros(prompts, 1, 3, device=device)
            inputs["coord_mask"] = torch.zeros(prompts, 1, dtype=torch.bool, device=device)
        if _GIVEN_MASK in batch:
            inputs["geometry"] = {name: batch["targets"][name] for name in GIVEN_PARTS}
            inputs["geometry"]["mask"] = batch[_GIVEN_MASK]
        for plugin in self.plugins:
            inputs.update(plugin.forward_kwargs)
        inputs["share_prefix"] = self._share_prefix
        first = batch[_FIRST_LOGIT] if _FIRST_LOGIT in batch else first_logit(batch["labels"])
        return {**inputs, "use_cache": False, "logits_to_keep": batch["labels"].shape[1] - first}, first

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
            Paper: eq. 8.
        """
        arguments, first = self.forward_inputs(inputs)
        with self._given_labels(inputs):
            output = model(**arguments)
        # As if the first position were the first that is kept: no label lies before it.
        batch = {**inputs, "labels": inputs["labels"][:, first:]}
        terms = joint_loss_terms(output, batch, self.model_config, self.losses)
        counts = num_items_in_batch or {name: count for name, (_, count) in terms.items()}
        loss = total_loss(terms, self.losses, counts)
        for plugin in self.plugins:
            added = plugin.terms(output, inputs, self.model_config)
            if num_items_in_batch is None:
                counts = {**counts, **{name: count for name, (_, count) in added.items()}}
            weight = plugin.weight(self.progress)
            for name, (value, _) in added.items():
                loss = loss + weight * value / counts[name].clamp(min=1)
            terms = {**terms, **added}
        if num_items_in_batch is not None:
            values = torch.stack([terms[name][0].detach().double() for name in self._names])
            self._window_sums = self._window_sums + values
            self._unchecked.append(_NumbersOnTheirWay(values, list(self._names), inputs["sample_ids"], self._step))
        loss = loss * self.args.world_size
        return (loss, output) if return_outputs else loss

    def _given_labels(self, batch: Mapping[str, Any]) -> contextlib.AbstractContextManager:
        """Where some videos of the batch are given their labels, a forward that uses them."""
        if _GIVEN_LABELS_MASK not in batch:
            return contextlib.nullcontext()
        tokens = label_tokens(batch["targets"]["patch_labels"], self.model_config.vision_config.hidden_size)
        scene_tokens = base_model(self.model).model.scene_tokens
        return given_language_stream(scene_tokens, tokens, batch[_GIVEN_LABELS_MASK])

    @property
    def _step(self) -> int:
        """The step that is being computed, from 1."""
        return self.state.global_step + 1

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Clip, and note the norm, which may be infinite where no loss is."""
        norm = super()._clip_grad_norm(model)
        if isinstance(norm, torch.Tensor):
            self._unchecked.append(_NumbersOnTheirWay(norm.detach()[None], ["gradient"], self._step_ids, self._step))
        return norm

    def _raise_if_not_finite(self) -> None:
        """Stop if a loss that was computed since the last look is not finite."""
        unchecked, self._unchecked = self._unchecked, []
        for numbers in unchecked:
            wrong = numbers.not_finite()
            if wrong:
                raise FloatingPointError(
                    f"step {numbers.step}: wanted finite losses; got {', '.join(wrong)} for the samples {', '.join(numbers.sample_ids)}"
                )

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
        self._window_given = {_GIVEN_MASK: 0, _GIVEN_LABELS_MASK: 0}
        self._window_videos = 0
        self._window_start = (time.perf_counter(), self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with every term's mean over what was seen since the last line, and the shares of videos that were given their geometry and labels.

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
            given = torch.tensor(
                [*self._window_given.values(), self._window_videos], dtype=torch.float64, device=self.args.device
            )
            sums = torch.cat([self._window_sums, given])
            if self.args.world_size > 1:
                sums = self.accelerator.reduce(sums, reduction="sum")
            *sums, geometry, labels, videos = sums.tolist()
            counts = self._window_counts.tolist()
            logs.update({n: s / c for n, s, c in zip(self._names, sums, counts, strict=True) if c > 0})
            logs["given_geometry"] = geometry / max(videos, 1)
            logs["given_labels"] = labels / max(videos, 1)
            if self._window_start is not None:
                started, step = self._window_start
                logs["seconds_per_step"] = (time.perf_counter() - started) / max(self.state.global_step - step, 1)
            self._forget_window()
        super().log(logs, start_time)

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights to go on from; the Trainer itself would leave out, in silence, whatever transformers saves under another name."""
        if base_model(self.model) is not self.model or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # float32 holds every value of a half-precision checkpoint.
        saved = VidLLMForConditionalGeneration.from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        self.model.load_state_dict(saved.state_dict())

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
        """AdamW with groups by weight decay and learning rate.

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
            self.optimizer = maker(self.parameter_groups(model or self.model, settings["lr"]), **settings)
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
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        used: set[str] = set()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            fits = next((e for e in self.learning_rate_factors if re.search(e, name)), None)
            used.add(fits)
            factor = 1.0 if fits is None else self.learning_rate_factors[fits]
            decay = self.args.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((factor, decay), []).append(parameter)
        unused = [expression for expression in self.learning_rate_factors if expression not in used]
        if unused:
            raise ValueError(
                f"learning_rate_factors: wanted names of trained parameters; nothing is left for {', '.join(unused)}"
            )
        order = sorted(groups, key=lambda key: (key[0] != 1.0, key))
        return [{"params": groups[key], "lr": learning_rate * key[0], "weight_decay": key[1]} for key in order]


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


def first_logit(labels: torch.Tensor) -> int:
    """First position whose logits any label needs.

    Args:
        labels (`torch.Tensor` of shape `(Q, L)`, int64): -100 = not learned; on the host.

    Returns:
        `int`: the position before the first label.

    Source:
        Ours.
    """
    columns = (labels != IGNORED_LABEL).any(dim=0).nonzero()
    return max(int(columns[0]) - 1, 0) if len(columns) else labels.shape[1] - 1


__all__ = ["TERMS", "LossPlugin", "VidLLMJointTrainer", "base_model", "first_logit", "freeze_for_joint"]
