"""LoRA on the language model: its own weights stay, adapters and the geometry and grounding modules are trained."""

import contextlib
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from vidllm.modeling_vidllm.modeling_vidllm import MODULES_NOT_TO_QUANTISE, VidLLMForConditionalGeneration
from vidllm.train.joint_trainer import GEOMETRY_MODULES
from vidllm.train.recipes import LoraSettings


# What is trained whole; the vision encoder stays as it is.
_WHOLE_MODULES = ("adapter", "scene_tokens", "point_embedding", "grounding")


def add_lora(
    model: VidLLMForConditionalGeneration,
    settings: LoraSettings,
    geometry: Collection[str] = GEOMETRY_MODULES,
    seed: int = 0,
    train_only: str | None = None,
) -> Any:
    """Put adapters on the language model.

    Args:
        model (`VidLLMForConditionalGeneration`): It is changed in place.
        settings (`LoraSettings`): Rank, scale, names of the layers.
        geometry (`Collection[str]`): Which of `GEOMETRY_MODULES` are trained too.
        seed (`int`): Of the adapters' first values; the caller's random state is left as it was.
        train_only (`str`, *optional*): Names of the parameters that will be trained; a part without any is not saved with the adapter.

    Returns:
        `PeftModel`: around the model.

    Raises:
        ValueError: No layer has such a name, or one outside the language model has.

    Source:
        Upstream: huggingface/peft. Ours: the rows of `<loc>` and `<coord>` are trained in the embedding and, where it is not tied, in the
        head: with adapters on attention alone they would stay as they were drawn.
    """
    from peft import LoraConfig, get_peft_model

    core = model.model
    embedding = core.get_input_embeddings()
    embedding_name = next(name for name, module in model.named_modules() if module is embedding)
    token_ids = sorted({model.config.loc_token_id, model.config.coord_token_id})
    rows = {embedding_name: token_ids}
    if model.lm_head.weight is not embedding.weight:
        rows["lm_head"] = token_ids
    whole = [*_WHOLE_MODULES, *geometry]
    whole = [f"model.{name}" for name in whole if _is_trained(name, getattr(core, name), train_only)]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        trainable_token_indices=rows,
        modules_to_save=whole,
        use_dora=settings.dora,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    outside = [n for n, p in wrapped.named_parameters() if "lora_" in n and ".language_model." not in n]
    if outside:
        raise ValueError(f"lora.targets: wanted layers of the language model alone; got {outside[0]}")
    return wrapped


def _is_trained(name: str, part: nn.Module | None, train_only: str | None) -> bool:
    """Whether an expression of trained parameters, if there is one, fits any of a part that is trained whole, by the names it will have."""
    if part is None or train_only is None:
        return part is not None
    names = [f"base_model.model.model.{name}.modules_to_save.default.{of}" for of, _ in part.named_parameters()]
    return any(re.search(train_only, known) for known in names)


def four_bit_settings(compute_dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` must be told so that the language model's layers are held in 4 bits, and nothing else is.

    Args:
        compute_dtype (`torch.dtype`): Of the products.

    Returns:
        `dict`: keyword arguments; weights go to this process's device.

    Raises:
        ValueError: bitsandbytes is not installed.

    Source:
        Upstream: huggingface/transformers `BitsAndBytesConfig` (QLoRA's NF4). Ours: geometry, grounding and the head stay as they are.
    """
    if not is_bitsandbytes_available():
        raise ValueError("lora.four_bits: wanted bitsandbytes: pip install 'vidllm[quant]'")
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=MODULES_NOT_TO_QUANTISE,
    )
    return {"quantization_config": quantised, "device_map": {"": str(PartialState().device)}}


def save_and_merge(
    model: Any,
    folder: str | Path | None,
    base: VidLLMForConditionalGeneration | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> PreTrainedModel | nn.Module:
    """Save the adapter, and melt it into the weights.

    Args:
        model (`PeftModel`): Trained; it is taken apart, unless there is a base.
        folder (`str` or `Path`, *optional*): For the adapter; None keeps none.
        base (`VidLLMForConditionalGeneration`, *optional*): Whose weights it is melted into instead of the model's own: what the model was
            before it was held in 4 bits, or spread over processes. It is changed.
        state (`Mapping[str, torch.Tensor]`, *optional*): Weights of the model where it does not hold them itself; wants a base.

    Returns:
        `VidLLMForConditionalGeneration`: with the adapters merged.

    Source:
        Upstream: huggingface/peft. Ours: into the weights of the checkpoint, because 4 bits would be rounded a second time.
    """
    from peft import PeftModel

    if base is None:
        if folder is not None:
            model.save_pretrained(str(folder))
        return model.merge_and_unload()
    with contextlib.nullcontext(str(folder)) if folder is not None else tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place, state_dict=state)
        base.config.is_metric = model.get_base_model().config.is_metric
        return PeftModel.from_pretrained(base, place).merge_and_unload()


__all__ = ["add_lora", "four_bit_settings", "save_and_merge"]
