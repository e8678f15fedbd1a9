"""The trainer of stage 2: reconstruction, language and grounding together.

Shapes: B videos, Q prompts, L text tokens, S frames, H W pixels.
"""

import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.cross_task_adapter_vidllm import VidLLMCrossTaskAdapter
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.modeling_vidllm.outputs_vidllm import VidLLMOutput
from vidllm.modeling_vidllm.shared_prefix_vidllm import prefix_obstacle
from vidllm.train.collator import IGNORED_LABEL, keyed_generator, model_inputs
from vidllm.train.counted_trainer import CountedTrainer
from vidllm.train.losses import TERMS, JointLossSettings, joint_loss_counts, joint_loss_terms
from vidllm.train.recipes import MixingSchedule


GEOMETRY_MODULES = ("reconstruction", "metric_depth")
GIVEN_PARTS = ("cam_from_world", "intrinsics_px", "depth_m")
# What the trainer adds to a batch for itself.
_GIVEN_MASK, _FIRST_LOGIT = "given_mask", "first_logit"


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


def learns_metres(model: nn.Module) -> bool:
    """Whether the part that gives metres is trained.

    Args:
        model (`nn.Module`): A `VidLLMForConditionalGeneration`, or a `PeftModel` around it.

    Returns:
        `bool`: of the metric depth, or, of a model without it, of the reconstruction.

    Source:
        Ours: a model must not say metres of what nobody taught it.
    """
    core = base_model(model).model
    part = core.reconstruction if core.metric_depth is None else core.metric_depth
    return any(parameter.requires_grad for parameter in part.parameters())


def refuse_places(number: int, example: str = "") -> None:
    """Refuse to learn boxes or places, which are in metres, with a model that gives relative lengths.

    Args:
        number (`int`): Prompts that name some.
        example (`str`): One of them.

    Raises:
        ValueError: There is one.

    Source:
        Ours: nothing says how many metres a unit of such a reconstruction is; tokens would stand at one scale and targets at another.
    """
    if number:
        raise ValueError(
            f"trainer: wanted a model that gives metres (is_metric), or depth in the data and a trained metric depth, for boxes and places in "
            f"metres; got a relative one and {number} such prompts{f', the first {example}' if example else ''}"
        )


def freeze_for_joint(
    model: nn.Module,
    freeze_encoder: bool,
    freeze_geometry: bool = False,
    train_only: str | None = None,
    freeze_metric_depth: bool | None = None,
) -> list[str]:
    """Decide what is trained: everything that a loss reaches, the encoder by choice; of a model with adapters what they left trainable.

    What is trained becomes float32: the steps of an optimizer are lost in half precision.

    Args:
        model (`nn.Module`): A `VidLLMForConditionalGeneration`, or a `PeftModel` around it.
        freeze_encoder (`bool`): Whether the vision encoder stays as it is.
        freeze_geometry (`bool`): Whether the reconstruction stays as it is, with whatever of the adapter is for it alone: without scenes of true
            cameras and depth, nothing would hold it where it is.
        train_only (`str`, *optional*): Regular expression of names: all other parameters stay as they are, and parts of the model without
            any other run in evaluation mode.
        freeze_metric_depth (`bool`, *optional*): Whether the metric depth stays as it is, which depth alone teaches; by default as `freeze_geometry`.

    Returns:
        `list[str]`: names of the parameters that are not trained because no output depends on them.

    Raises:
        ValueError: `train_only` fits no parameter.

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
    frozen = (freeze_geometry, freeze_geometry if freeze_metric_depth is None else freeze_metric_depth)
    for name, is_frozen in zip(GEOMETRY_MODULES, frozen, strict=True):
        if is_frozen and getattr(core, name) is not None:
            getattr(core, name).requires_grad_(False)
    if freeze_geometry:
        _freeze_geometry_stream(core)
    if train_only is not None:
        _train_only(model, core, train_only)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return unreachable


def _freeze_geometry_stream(core: nn.Module) -> None:
    """Freeze what of the adapter its language stream does not hang on."""
    # Of shapes alone: the weights themselves may be spread over processes already.
    with torch.device("meta"):
        adapter = VidLLMCrossTaskAdapter(core.config)
        # a video of one frame of two patches
        probe = torch.zeros(1, 1, 2, core.config.vision_config.hidden_size)
    language = adapter(probe, probe)[1]
    parameters = dict(adapter.named_parameters())
    reached: tuple[torch.Tensor | None, ...] = (None,) * len(parameters)
    if language.requires_grad:
        reached = torch.autograd.grad(language.sum(), list(parameters.values()), allow_unused=True)
    unreached = {name for name, gradient in zip(parameters, reached, strict=True) if gradient is None}
    for name, parameter in core.adapter.named_parameters():
        # adapters hold a module that they train whole beside the one that it was
        if name.removeprefix("modules_to_save.default.") in unreached:
            parameter.requires_grad_(False)


def _train_only(model: nn.Module, core: nn.Module, expression: str) -> None:
    """Freeze what an expression does not fit."""
    names = [name for name, _ in model.named_parameters()]
    if not any(re.search(expression, name) for name in names):
        raise ValueError(f"train_only: wanted an expression that fits names of parameters; {expression!r} fits none")
    for name, parameter in model.named_parameters():
        if not re.search(expression, name):
            parameter.requires_grad_(False)
    for part in core.children():
        if not any(parameter.requires_grad for parameter in part.parameters()):
            # Statistics of a batch would otherwise go on changing in a part that stays as it is.
            part.train(False)
            part.train = types.MethodType(_stay_in_evaluation, part)


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    """`train` of a part that is not trained: what gradients pass through may still be computed twice instead of kept, which is asked of layers in training."""
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = mode
    return module


class VidLLMJointTrainer(CountedTrainer):
    """Trains reconstruction, language and grounding together: `L = L_recon + L_VL + L_MD`.

    Args:
        model (`VidLLMForConditionalGeneration`): Or a `PeftModel` around it.
        args (`TrainingArguments`): With `remove_unused_columns=False`; one process per device.
        losses (`JointLossSettings`, *optional*): Weights and constants of the losses.
        given_geometry (`MixingSchedule`, *optional*): With which probability a video with true cameras and depth is given them. Keyed by the
            run's seed, the step and the video's first sample.
        plugins (`Sequence[LossPlugin]`): Further losses.
        has_metric_depth (`bool`): Whether the data has depth in metres; a model that learns from it says so of its outputs, from the start.
        freeze_encoder (`bool`): Whether the vision encoder stays as it is.
        freeze_geometry (`bool`): Whether the reconstruction stays as it is, see `freeze_for_joint`.
        freeze_metric_depth (`bool`, *optional*): Whether the metric depth does; by default as `freeze_geometry`.
        train_only (`str`, *optional*): Names of the parameters that are trained, see `freeze_for_joint`.
        learning_rate_factors (`Mapping[str, float]`, *optional*): Regular expression of parameter names to a factor of their learning rate.
        **kwargs: As of `CountedTrainer`: `train_dataset`, `data_collator`, `processing_class`, `callbacks`, `held_out`, ...

    Raises:
        ValueError: The arguments drop columns, or one process would use several devices; while training, a batch names boxes or places in metres
            and the model does not give metres.

    Source:
        Paper: section 3.4, eq. 8. Ours: boxes in metres cannot be learned among tokens at relative places.
    """

    share_names = ("given_geometry",)

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        losses: JointLossSettings | None = None,
        given_geometry: MixingSchedule | None = None,
        plugins: Sequence[LossPlugin] = (),
        has_metric_depth: bool = False,
        freeze_encoder: bool = True,
        freeze_geometry: bool = False,
        train_only: str | None = None,
        learning_rate_factors: Mapping[str, float] | None = None,
        freeze_metric_depth: bool | None = None,
        **kwargs: Any,
    ):
        # Before anything of the model is changed.
        self.check_arguments(args)
        self.unreachable_parameters = freeze_for_joint(
            model, freeze_encoder, freeze_geometry, train_only, freeze_metric_depth
        )
        config = base_model(model).config
        config.is_metric = config.is_metric or (has_metric_depth and learns_metres(model))
        has_use_cache = "use_cache" in config.__dict__
        super().__init__(model=model, args=args, learning_rate_factors=learning_rate_factors, **kwargs)
        if not has_use_cache:
            # The Trainer writes False into the config, which would be saved with it.
            config.__dict__.pop("use_cache", None)
        self.model_config = config
        self._share_prefix = prefix_obstacle(base_model(model).model.language_model) is None
        self.losses = losses or JointLossSettings()
        self.given_geometry = given_geometry or MixingSchedule(start=0.0, end=0.0)
        self.plugins = list(plugins)

    # ------------------------------------------------------------------ data

    def completed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch that says where its labels start, and which videos are given their true geometry, if any are.

        Args:
            batch (`dict`): From `VidLLMCollator`.

        Returns:
            `dict`
        """
        batch = {**batch, _FIRST_LOGIT: first_logit(batch["labels"])}
        targets = batch["targets"]
        if not self.model_config.is_metric:
            masks = [mask for mask in (batch.get("coord_mask"), targets.get("box_mask")) if mask is not None]
            placed = [
                sample
                for number, sample in enumerate(batch["sample_ids"])
                if any(mask[number].any() for mask in masks)
            ]
            refuse_places(len(placed), placed[0] if placed else "")
        known = targets["camera_mask"] & targets["depth_mask"]
        if "depth_m" not in targets:
            known = torch.zeros_like(known)
        first_prompt: dict[int, str] = {}
        for sample_id, video in zip(batch["sample_ids"], batch["scene_index"].tolist(), strict=True):
            first_prompt.setdefault(video, sample_id)
        names = [first_prompt.get(video, "") for video in range(len(known))]
        share = self.given_geometry.share(self.progress)
        given = torch.tensor([share > 0 and self._drawn("given geometry", name) < share for name in names]) & known
        self._window_shares["given_geometry"] += int(given.sum())
        if given.any():
            batch[_GIVEN_MASK] = given
        self._window_videos += len(known)
        return batch

    def _drawn(self, what: str, name: str) -> float:
        """A number in 0..1 of this step."""
        return float(keyed_generator(self.args.seed, self.state.global_step, what, name).random())

    def batch_counts(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Counts of all terms, from the batch alone.

        Args:
            batch (`dict`): Completed, on the host.

        Returns:
            `dict[str, torch.Tensor]`: by term, shape `()`, float32.
        """
        counts = dict(joint_loss_counts(batch, self.model_config, self.losses))
        for plugin in self.plugins:
            counts.update(plugin.counts(batch, self.model_config))
        return counts

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
        own = ("labels", _GIVEN_MASK, _FIRST_LOGIT)
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

    def weighted_terms(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, float], VidLLMOutput]:
        """One forward: the terms of the joint loss, then those of the plugins.

        Args:
            model (`nn.Module`): As wrapped for distributed training.
            inputs (`dict`): A batch, on the device.

        Returns:
            `tuple`: sum and count `()` by term; weight by term; `VidLLMOutput`.
        """
        arguments, first = self.forward_inputs(inputs)
        output = model(**arguments)
        # As if the first position were the first that is kept: no label lies before it.
        batch = {**inputs, "labels": inputs["labels"][:, first:]}
        terms = dict(joint_loss_terms(output, batch, self.model_config, self.losses))
        weights = {name: self.losses.weight(name) for name in terms}
        for plugin in self.plugins:
            added = plugin.terms(output, inputs, self.model_config)
            weights.update(dict.fromkeys(added, plugin.weight(self.progress)))
            terms.update(added)
        return terms, weights, output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights to go on from; the Trainer itself would leave out, in silence, whatever transformers saves under another name."""
        if base_model(self.model) is not self.model or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # float32 holds every value of a half-precision checkpoint.
        saved = VidLLMForConditionalGeneration.from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        self.model.load_state_dict(saved.state_dict())


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


__all__ = [
    "TERMS",
    "LossPlugin",
    "VidLLMJointTrainer",
    "base_model",
    "first_logit",
    "freeze_for_joint",
    "learns_metres",
    "refuse_places",
]
