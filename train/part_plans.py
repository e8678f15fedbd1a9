"""Which tensors the sources of a starting checkpoint give and where each goes, checked by name and shape."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from transformers import AutoModel, PreTrainedConfig

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.train.source_configs import one_line
from vidllm.train.vggt_weights import check_vggt_keys, vggt_key_map
from vidllm.train.weight_sources import WeightSource


ENCODER, LANGUAGE, HEAD = "model.encoder.", "model.language_model.", "lm_head.weight"
# Buffers that old files hold and that are computed today.
_COMPUTED_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)")
# What stands before the names inside a decoder, by the class that was saved.
_DECODER_PREFIXES = ("model.", "")
# What stands before an encoder's names inside a model of pictures and words.
_VISION_PREFIX = "vision_model."
# What transformers can load an encoder from; whole numbers are for buffers.
_STORED_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


@dataclass
class PartPlan:
    """What one source gives.

    Args:
        name (`str`): `geometry`, `vision` or `language_model`.
        source (`WeightSource`): Where the tensors come from.
        targets (`dict`): Source key to pairs of our name and rows (None = all); names of `loaded` where that is given.
        left_out (`list[str]`): Source keys that have no place in the model, on purpose.
        loaded (`Mapping[str, torch.Tensor]`, *optional*): The tensors, where transformers has read them.

    Source:
        Ours.
    """

    name: str
    source: WeightSource
    targets: dict[str, list[tuple[str, slice | None]]]
    left_out: list[str] = field(default_factory=list)
    loaded: Mapping[str, torch.Tensor] | None = None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by the keys of `targets`."""
        if self.loaded is None:
            return self.source.shapes
        return {key: tuple(tensor.shape) for key, tensor in self.loaded.items()}

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a key of `targets`."""
        return self.source.dtypes[key] if self.loaded is None else self.loaded[key].dtype

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor `(...)` once, by the keys of `targets`."""
        yield from self.source.tensors() if self.loaded is None else self.loaded.items()


def plan_geometry(source: WeightSource, config: VidLLMConfig, without_encoder: bool) -> PartPlan:
    """VGGT's tensors.

    Args:
        source (`WeightSource`): Of VGGT.
        config (`VidLLMConfig`): Of a model with VGGT's own encoder.
        without_encoder (`bool`): True: the encoder comes from elsewhere, VGGT's is left out.

    Returns:
        `PartPlan`

    Raises:
        ValueError: A key is unknown or missing.

    Source:
        Ours: `vidllm.train.vggt_weights`.
    """
    key_map = vggt_key_map(config)
    left_out = check_vggt_keys(source.shapes, key_map)
    targets: dict[str, list[tuple[str, slice | None]]] = {}
    for key, rule in key_map.items():
        places = [(f"model.{name}", rows) for name, rows in rule.targets]
        if source.shapes[key] != rule.shape:
            raise ValueError(f"geometry: {key}: wanted shape {rule.shape}; got {source.shapes[key]}")
        if without_encoder and all(name.startswith(ENCODER) for name, _ in places):
            left_out.append(key)
        else:
            targets[key] = places
    return PartPlan("geometry", source, targets, sorted(left_out))


def plan_language_model(source: WeightSource, names: Mapping[str, tuple[int, ...]], tied: bool) -> PartPlan:
    """A causal language model's tensors.

    Args:
        source (`WeightSource`): Of a decoder with or without its head.
        names (`Mapping[str, tuple[int, ...]]`): Shapes by our names, of the whole model.
        tied (`bool`): Whether the head is the embedding.

    Returns:
        `PartPlan`

    Raises:
        ValueError: A key has no place, one is missing, or the head is not where the config says.

    Source:
        Upstream: huggingface/transformers names (`model.layers...`, `lm_head.weight`).
    """
    wanted = {name for name in names if name.startswith(LANGUAGE)}
    prefix = next(p for p in _DECODER_PREFIXES if not p or any(key.startswith(p) for key in source.shapes))
    plan = PartPlan("language_model", source, {})
    for key in source.shapes:
        inside = key.removeprefix(prefix)
        target = HEAD if key == HEAD else LANGUAGE + inside
        if _COMPUTED_BUFFERS.fullmatch(key) or (key == HEAD and tied):
            plan.left_out.append(key)
        elif target in wanted or target == HEAD:
            plan.targets[key] = [(target, None)]
        else:
            raise ValueError(
                f"language model: {key}: wanted a tensor of the decoder; got one that it has no place for"
            )
    found = {name for places in plan.targets.values() for name, _ in places}
    missing = sorted((wanted | (set() if tied else {HEAD})) - found)
    if missing:
        key = missing[0] if missing[0] == HEAD else prefix + missing[0].removeprefix(LANGUAGE)
        raise ValueError(
            f"language model: {key}: wanted a tensor of shape {names[missing[0]]}; got no such key ({len(missing)} missing in all)"
        )
    plan.left_out.sort()
    return plan


def plan_vision(source: WeightSource, config: PreTrainedConfig, is_part: bool) -> PartPlan:
    """An image encoder's tensors, through transformers, which knows the names of older files.

    Args:
        source (`WeightSource`): Of the encoder.
        config (`PreTrainedConfig`): Of the encoder.
        is_part (`bool`): Whether the source is a model of pictures and words, whose other tensors are left out.

    Returns:
        `PartPlan`: all tensors in the widest dtype that the source has.

    Raises:
        ValueError: Tensors are missing, have no place, or are of another shape or dtype.

    Source:
        Ours.
    """
    left_out = sorted(key for key in source.shapes if is_part and not key.startswith(_VISION_PREFIX))
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    wanted, who = model.state_dict(), type(model).__name__
    for key in sorted(set(source.shapes) - set(left_out)):
        place = wanted.get(key.removeprefix(_VISION_PREFIX))
        kind = source.dtypes[key]
        if kind not in _STORED_DTYPES or (place is not None and place.is_floating_point() != kind.is_floating_point):
            raise ValueError(
                f"vision: {key} in {source.file_of(key)}: wanted a tensor in float32 or another floating dtype; got {kind}"
            )
    # mapped files are closed while the next is read
    state = {key: tensor.clone() for key, tensor in source.tensors() if key not in left_out}
    kinds = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    if not kinds:
        raise ValueError(f"vision: {source.place}: wanted tensors of {who}; got none")
    try:
        model, info = type(model).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=functools.reduce(torch.promote_types, kinds),
            output_loading_info=True,
            # they are told below
            ignore_mismatched_sizes=True,
        )
    except (ValueError, RuntimeError, LookupError, TypeError) as error:
        raise ValueError(
            f"vision: {source.place}: wanted tensors of {who}; they do not load ({one_line(error)})"
        ) from error
    if missing := sorted(info["missing_keys"]):
        shape = tuple(wanted[missing[0]].shape)
        raise ValueError(
            f"vision: {missing[0]}: wanted a tensor of shape {shape} in {source.place}; got no such key ({len(missing)} in all)"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        raise ValueError(
            f"vision: {unexpected[0]} in {source.place}: wanted a tensor of {who}; got one that it has no place for ({len(unexpected)} in all)"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        key, got, shape = mismatched[0]
        raise ValueError(f"vision: {key} in {source.place}: wanted shape {tuple(shape)}; got {tuple(got)}")
    loaded = model.state_dict()
    targets: dict[str, list[tuple[str, slice | None]]] = {key: [(f"{ENCODER}model.{key}", None)] for key in loaded}
    return PartPlan("vision", source, targets, left_out, loaded)


__all__ = ["ENCODER", "HEAD", "LANGUAGE", "PartPlan", "plan_geometry", "plan_language_model", "plan_vision"]
