"""Transformer block of the reconstruction network and its 2D rotary embedding.

Shapes: B batch (videos or frames), L tokens, C channels, D channels per head.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vidllm import VidLLMConfig
from .layers_vidllm import VidLLMLayerScale, VidLLMMlp, attend, split_heads


def token_positions(grid_hw: tuple[int, int], num_special_tokens: int, device: torch.device) -> torch.Tensor:
    """Rotary positions of one frame's tokens, special tokens first.

    Args:
        grid_hw (`tuple[int, int]`): Rows and columns of patches.
        num_special_tokens (`int`): Camera and register tokens; they stand at (0, 0), which means no rotation.
        device (`torch.device`): Where to make it.

    Returns:
        `torch.Tensor` of shape `(num_special_tokens + h * w, 2)`, int64: row and column, patches from 1.

    Source:
        Upstream: facebookresearch/vggt aggregator. Ours: from Python ints, without a device synchronisation.
    """
    rows = torch.arange(1, grid_hw[0] + 1, device=device)
    columns = torch.arange(1, grid_hw[1] + 1, device=device)
    # (h, w, 2) -> (h * w, 2)
    patches = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cat([patches.new_zeros(num_special_tokens, 2), patches])


def rope_2d(positions_yx: torch.Tensor, head_dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the 2D rotary embedding.

    Args:
        positions_yx (`torch.Tensor` of shape `(tokens, 2)`, int64): Row and column of each token.
        head_dim (`int`): Channels per head, a multiple of 4; the first half turns with the row, the second with the column.
        base (`float`): Base of the frequencies.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(tokens, head_dim)`, float32: cosines, sines.

    Source:
        Upstream: facebookresearch/vggt (base 100, frequencies repeated by concatenation within each half).
    """
    quarter = head_dim // 4
    exponents = torch.arange(quarter, device=positions_yx.device, dtype=torch.float32) / quarter
    frequencies = 1.0 / base**exponents
    # (tokens, 2, 1) * (quarter,) -> (tokens, 2, quarter)
    angles = positions_yx.to(torch.float32).unsqueeze(-1) * frequencies
    # (tokens, 2, quarter) -> (tokens, 2, 2, quarter) -> (tokens, head_dim)
    angles = angles.unsqueeze(-2).expand(-1, -1, 2, -1).flatten(1)
    return angles.cos(), angles.sin()


def apply_rope_2d(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys.

    Args:
        states (`torch.Tensor` of shape `(batch, heads, tokens, head_dim)`): Queries or keys.
        cos (`torch.Tensor` of shape `(tokens, head_dim)`): From [`rope_2d`].
        sin (`torch.Tensor` of shape `(tokens, head_dim)`): From [`rope_2d`].

    Returns:
        `torch.Tensor` of shape `(batch, heads, tokens, head_dim)`.

    Source:
        Upstream: facebookresearch/vggt (half rotation inside each axis: channel i goes with channel i + head_dim / 4).
    """
    # (..., head_dim) -> two of (..., 2 axes, quarter)
    first, second = states.unflatten(-1, (2, 2, -1)).unbind(-2)
    # two of (..., 2 axes, quarter) -> (..., head_dim)
    turned = torch.stack([-second, first], dim=-2).flatten(-3)
    return states * cos + turned * sin


class VidLLMReconstructionAttention(nn.Module):
    """Self-attention with a fused projection, optional q/k LayerNorm and optional 2D rotary embedding.

    Args:
        config (`VidLLMConfig`): Reads the attention backend.
        dim (`int`): Channels.
        num_heads (`int`): Heads.
        qk_norm (`bool`): Whether queries and keys are normalised per head (eps 1e-5).

    Source:
        Upstream: facebookresearch/vggt blocks (`attn.qkv` rows: queries, keys, values).
    """

    def __init__(self, config: VidLLMConfig, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, hidden_states: torch.Tensor, cos: torch.Tensor | None = None, sin: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(batch, tokens, dim)` and, for rotation, two `(tokens, dim // num_heads)` -> `(batch, tokens, dim)`."""
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(hidden_states).chunk(3, dim=-1))
        query, key = self.q_norm(query), self.k_norm(key)
        if cos is not None:
            query, key = apply_rope_2d(query, cos, sin), apply_rope_2d(key, cos, sin)
        # Autocast gives normed states in float32; attention wants one dtype.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return self.proj(attend(self, self.config._attn_implementation, query, key, value))


class VidLLMReconstructionBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block with layer scale, used within frames, over all frames and in the camera trunk.

    Args:
        config (`VidLLMConfig`): Reads `reconstruction_layer_scale` and the attention backend.
        dim (`int`): Channels.
        num_heads (`int`): Heads.
        qk_norm (`bool`): Whether queries and keys are normalised per head.

    Source:
        Upstream: facebookresearch/vggt blocks (LayerNorm eps 1e-5, exact GELU, MLP x4).
    """

    def __init__(self, config: VidLLMConfig, dim: int, num_heads: int, qk_norm: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = VidLLMReconstructionAttention(config, dim, num_heads, qk_norm)
        self.ls1 = VidLLMLayerScale(dim, config.reconstruction_layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = VidLLMMlp(dim, 4 * dim)
        self.ls2 = VidLLMLayerScale(dim, config.reconstruction_layer_scale)

    def forward(
        self, hidden_states: torch.Tensor, cos: torch.Tensor | None = None, sin: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(batch, tokens, dim)` and, for rotation, two `(tokens, dim // num_heads)` -> `(batch, tokens, dim)`."""
        hidden_states = hidden_states + self.ls1(self.attn(self.norm1(hidden_states), cos, sin))
        return hidden_states + self.ls2(self.mlp(self.norm2(hidden_states)))


__all__ = [
    "VidLLMReconstructionAttention",
    "VidLLMReconstructionBlock",
    "apply_rope_2d",
    "rope_2d",
    "token_positions",
]
