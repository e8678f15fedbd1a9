"""Which VGGT tensor goes where: state-dict mapping from VGGT-1B to Vid-LLM, tensor by tensor.

Names on our side are those inside `VidLLMModel` (`encoder.`, `reconstruction.`). No weight is shipped; the conversion runs on the
user's side.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.encoder_vidllm import VidLLMEncoder
from vidllm.modeling_vidllm.reconstruction_vidllm import VidLLMReconstructor


# Heads of VGGT that Vid-LLM has no use for: points are unprojected depth, nothing is tracked.
LEFT_OUT_PREFIXES = ("point_head.", "track_head.")
# Parts of ours that VGGT does not have and that keep their fresh values.
FRESH_PREFIXES = ("reconstruction.room_head.",)

# Our name -> VGGT's name; the first matching line counts.
_RULES = tuple(
    (re.compile(pattern), source)
    for pattern, source in (
        (r"encoder\.model\.embeddings\.position_embeddings", r"aggregator.patch_embed.pos_embed"),
        (
            r"encoder\.model\.embeddings\.patch_embeddings\.projection\.(\w+)",
            r"aggregator.patch_embed.patch_embed.proj.\1",
        ),
        (r"encoder\.model\.embeddings\.(cls_token|mask_token|register_tokens)", r"aggregator.patch_embed.\1"),
        (r"encoder\.model\.layernorm\.(\w+)", r"aggregator.patch_embed.norm.\1"),
        (
            r"encoder\.model\.encoder\.layer\.(\d+)\.attention\.[qkv]_proj\.(\w+)",
            r"aggregator.patch_embed.blocks.\1.attn.qkv.\2",
        ),
        (
            r"encoder\.model\.encoder\.layer\.(\d+)\.attention\.o_proj\.(\w+)",
            r"aggregator.patch_embed.blocks.\1.attn.proj.\2",
        ),
        (
            r"encoder\.model\.encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1",
            r"aggregator.patch_embed.blocks.\1.ls\2.gamma",
        ),
        (
            r"encoder\.model\.encoder\.layer\.(\d+)\.((?:norm[12]|mlp\.fc[12])\.\w+)",
            r"aggregator.patch_embed.blocks.\1.\2",
        ),
        (r"reconstruction\.tokens\.(\w+)", r"aggregator.\1"),
        (r"reconstruction\.((?:frame|global)_blocks\..+)", r"aggregator.\1"),
        (r"reconstruction\.camera_head\.empty_pose\.pose", r"camera_head.empty_pose_tokens"),
        (r"reconstruction\.camera_head\.modulation\.1\.(\w+)", r"camera_head.poseLN_modulation.1.\1"),
        (r"reconstruction\.(camera_head\..+)", r"\1"),
        (
            r"reconstruction\.depth_head\.fusions\.(\d)\.lateral_unit\.(.+)",
            r"depth_head.scratch.refinenet{\1}.resConfUnit1.\2",
        ),
        (
            r"reconstruction\.depth_head\.fusions\.(\d)\.output_unit\.(.+)",
            r"depth_head.scratch.refinenet{\1}.resConfUnit2.\2",
        ),
        (r"reconstruction\.depth_head\.fusions\.(\d)\.(out_conv\..+)", r"depth_head.scratch.refinenet{\1}.\2"),
        (r"reconstruction\.depth_head\.level_convs\.(\d)\.(\w+)", r"depth_head.scratch.layer{\1}_rn.\2"),
        (r"reconstruction\.depth_head\.neck_conv\.(\w+)", r"depth_head.scratch.output_conv1.\1"),
        (r"reconstruction\.depth_head\.output_convs\.(.+)", r"depth_head.scratch.output_conv2.\1"),
        (r"reconstruction\.(depth_head\.(?:norm|projects|resize_layers)\..+)", r"\1"),
    )
)


@dataclass(frozen=True)
class VGGTTensorRule:
    """Where one VGGT tensor goes.

    Args:
        shape (`tuple[int, ...]`): Shape that the tensor must have.
        targets (`tuple` of `(str, slice | None)`): Our names, each with the rows that it takes (None = all).

    Source:
        Ours.
    """

    shape: tuple[int, ...]
    targets: tuple[tuple[str, slice | None], ...]


def _source_key(target: str) -> str | None:
    """VGGT's name of our tensor, None if no rule knows it. Numbers in braces count from 1 there."""
    for pattern, replacement in _RULES:
        match = pattern.fullmatch(target)
        if match:
            return re.sub(r"\{(\d)\}", lambda number: str(int(number[1]) + 1), match.expand(replacement))
    return None


def vggt_key_map(config: VidLLMConfig | None = None) -> dict[str, VGGTTensorRule]:
    """Mapping of all VGGT tensors that a model of this config takes.

    Args:
        config (`VidLLMConfig`, *optional*): Config of the model; the default fits VGGT-1B.

    Returns:
        `dict[str, VGGTTensorRule]`: VGGT's key -> expected shape and our names. Shapes come from our own modules, built on the
        meta device.

    Raises:
        ValueError: The encoder is not DINOv2 with registers, or a tensor of ours has no counterpart.

    Source:
        Upstream: facebookresearch/vggt key names. Ours: queries, keys and values of the encoder are split in thirds, as
        transformers stores them; our own blocks keep them fused.
    """
    config = VidLLMConfig() if config is None else config
    if config.vision_config.model_type != "dinov2_with_registers":
        raise ValueError(
            f"vision_config.model_type: wanted 'dinov2_with_registers', VGGT's image encoder; got {config.vision_config.model_type!r}"
        )
    with torch.device("meta"):
        modules = torch.nn.ModuleDict(
            {"encoder": VidLLMEncoder(config), "reconstruction": VidLLMReconstructor(config)}
        )
    targets_of: dict[str, list[tuple[str, slice | None]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for target, tensor in modules.state_dict().items():
        if target.startswith(FRESH_PREFIXES):
            continue
        source = _source_key(target)
        if source is None:
            raise ValueError(f"{target}: wanted a VGGT tensor for it; no rule names one")
        rows = None
        shape = tuple(tensor.shape)
        third = re.search(r"\.([qkv])_proj\.", target)
        if third:
            start = "qkv".index(third[1]) * shape[0]
            rows = slice(start, start + shape[0])
            shape = (3 * shape[0], *shape[1:])
        targets_of.setdefault(source, []).append((target, rows))
        shapes[source] = shape
    return {source: VGGTTensorRule(shapes[source], tuple(targets)) for source, targets in targets_of.items()}


def is_left_out(key: str) -> bool:
    """Whether Vid-LLM has no use for this VGGT tensor.

    Args:
        key (`str`): VGGT's key.

    Returns:
        `bool`: True for the point and track heads.

    Source:
        Ours: design without a point head.
    """
    return key.startswith(LEFT_OUT_PREFIXES)


def check_vggt_keys(keys: Iterable[str], key_map: Mapping[str, VGGTTensorRule]) -> list[str]:
    """Compare the keys of a VGGT checkpoint with the mapping, before any tensor is read.

    Args:
        keys (iterable of `str`): All keys of the checkpoint.
        key_map (`Mapping[str, VGGTTensorRule]`): From [`vggt_key_map`].

    Returns:
        `list[str]`: Keys that are left out on purpose, sorted.

    Raises:
        ValueError: A key is unknown, or one that the model needs is missing.

    Source:
        Ours: a silent gap would leave random weights in a network that looks loaded.
    """
    keys = set(keys)
    unknown = sorted(key for key in keys if key not in key_map and not is_left_out(key))
    if unknown:
        raise ValueError(f"{unknown[0]}: wanted a VGGT-1B tensor; got an unknown key ({len(unknown)} in all)")
    missing = sorted(key for key in key_map if key not in keys)
    if missing:
        rule = key_map[missing[0]]
        raise ValueError(
            f"{missing[0]}: wanted a tensor of shape {rule.shape}; got no such key ({len(missing)} missing in all)"
        )
    return sorted(key for key in keys if is_left_out(key))


def convert_vggt_tensor(
    key: str, tensor: torch.Tensor, key_map: Mapping[str, VGGTTensorRule]
) -> dict[str, torch.Tensor]:
    """Convert one tensor.

    Args:
        key (`str`): VGGT's key.
        tensor (`torch.Tensor` of shape `(...)`, that of `key_map[key]`): Its values, any dtype and device (meta too).
        key_map (`Mapping[str, VGGTTensorRule]`): From [`vggt_key_map`].

    Returns:
        `dict[str, torch.Tensor]`: Our names and tensors; row slices are copies, whole tensors are passed on. Empty for a tensor
        that is left out.

    Raises:
        ValueError: Unknown key or wrong shape.

    Source:
        Ours: one tensor at a time, so that a checkpoint can be converted shard by shard.
    """
    if key not in key_map:
        if is_left_out(key):
            return {}
        raise ValueError(f"{key}: wanted a VGGT-1B tensor; got an unknown key")
    rule = key_map[key]
    if tuple(tensor.shape) != rule.shape:
        raise ValueError(f"{key}: wanted shape {rule.shape}; got {tuple(tensor.shape)}")
    return {target: tensor if rows is None else tensor[rows].clone() for target, rows in rule.targets}


def convert_vggt_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: VidLLMConfig | None = None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Convert a whole VGGT state dict.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): VGGT-1B, with or without the heads that are left out.
        config (`VidLLMConfig`, *optional*): Config of the model; the default fits VGGT-1B.

    Returns:
        `tuple`: our state dict (names inside `VidLLMModel`), sorted keys that were left out.

    Raises:
        ValueError: Unknown key, missing key or wrong shape; the message names key, wanted and got.

    Source:
        Ours.
    """
    key_map = vggt_key_map(config)
    left_out = check_vggt_keys(state_dict, key_map)
    ours: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        ours.update(convert_vggt_tensor(key, tensor, key_map))
    return ours, left_out


__all__ = [
    "FRESH_PREFIXES",
    "LEFT_OUT_PREFIXES",
    "VGGTTensorRule",
    "check_vggt_keys",
    "convert_vggt_state_dict",
    "convert_vggt_tensor",
    "is_left_out",
    "vggt_key_map",
]
