"""Weights of a model that is spread over processes (FSDP2, ZeRO-3), brought together: what is published is whole.

Shapes: those of the parameters.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration


def whole_state(model: nn.Module, ask_engine: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The weights of a model that holds only its share of them; every process must ask.

    Args:
        model (`nn.Module`): Without what distributed training wrapped around it.
        ask_engine (callable): What DeepSpeed gathers: asked only where parameters are DeepSpeed's.

    Returns:
        `dict[str, torch.Tensor]`: on the host, on the first process; of no use on the others. None where the model holds all its weights.

    Raises:
        ValueError: DeepSpeed is not set up to gather them (`stage3_gather_16bit_weights_on_model_save`).

    Source:
        Upstream: pytorch/pytorch `get_model_state_dict`, huggingface/accelerate `get_state_dict`.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # What ZeRO-3 marks its parameters with; their own tensors are empty.
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return ask_engine()
    return None


def whole_model(
    model: VidLLMForConditionalGeneration, state: Mapping[str, torch.Tensor]
) -> VidLLMForConditionalGeneration:
    """A model that holds all its weights.

    Args:
        model (`VidLLMForConditionalGeneration`): It holds a share of them; is left as it is.
        state (`Mapping[str, torch.Tensor]`): All of them, see `whole_state`; taken over, not copied.

    Returns:
        `VidLLMForConditionalGeneration`: to be saved; what is no weight, such as tables of positions, is not filled in.

    Source:
        Ours: made without memory of its own.
    """
    with torch.device("meta"):
        whole = VidLLMForConditionalGeneration(copy.deepcopy(model.config))
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole


__all__ = ["whole_model", "whole_state"]
