"""Layers that several modules share: attention through the transformers interface, MLP, layer scale.

Shapes: B batch, L query tokens, M key tokens, C channels.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax attention, the slow obvious version behind `attn_implementation="eager"`.

    Args:
        module (`nn.Module`): The calling layer; only its `training` flag is read.
        query (`torch.Tensor` of shape `(batch, heads, queries, head_dim)`): Queries.
        key (`torch.Tensor` of shape `(batch, heads, keys, head_dim)`): Keys.
        value (`torch.Tensor` of shape `(batch, heads, keys, head_dim)`): Values.
        attention_mask (`torch.Tensor` broadcastable to `(batch, heads, queries, keys)`, *optional*): Added to the scores.
        scaling (`float`): Factor on the scores.
        dropout (`float`): Dropout on the weights.
        **kwargs: Ignored; other backends read them.

    Returns:
        `tuple`: output `(batch, queries, heads, head_dim)` and weights `(batch, heads, queries, keys)`.

    Source:
        Upstream: huggingface/transformers attention interface (signature). Ours: body.
    """
    scores = torch.matmul(query, key.transpose(-2, -1)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def attend(
    module: nn.Module,
    attn_implementation: str | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multi-head attention by the backend that the user chose.

    Args:
        module (`nn.Module`): The calling layer.
        attn_implementation (`str`, *optional*): `config._attn_implementation`.
        query (`torch.Tensor` of shape `(batch, heads, queries, head_dim)`): Queries.
        key (`torch.Tensor` of shape `(batch, heads, keys, head_dim)`): Keys.
        value (`torch.Tensor` of shape `(batch, heads, keys, head_dim)`): Values.
        attention_mask (`torch.Tensor` broadcastable to `(batch, heads, queries, keys)`, *optional*): Added to the scores.

    Returns:
        `torch.Tensor` of shape `(batch, queries, heads * head_dim)`.

    Source:
        Upstream: huggingface/transformers attention interface. Ours: flash kernels take neither float32 nor an additive
        mask, and the geometry heads stay in float32, so those calls use sdpa.
    """
    name = attn_implementation or "eager"
    if "flash" in name and (attention_mask is not None or query.dtype == torch.float32):
        name = "sdpa"
    if "flex" in name:
        name = "sdpa"
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    output, _ = interface(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=query.shape[-1] ** -0.5,
        dropout=0.0,
        is_causal=False,
    )
    # (batch, queries, heads, head_dim) -> (batch, queries, heads * head_dim)
    return output.flatten(2)


def split_heads(hidden_states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Split the channel axis into heads.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, tokens, channels)`): Projected tokens.
        num_heads (`int`): Number of heads.

    Returns:
        `torch.Tensor` of shape `(batch, num_heads, tokens, channels // num_heads)`.

    Source:
        Ours: the usual reshaping.
    """
    batch, tokens, channels = hidden_states.shape
    return hidden_states.view(batch, tokens, num_heads, channels // num_heads).transpose(1, 2)


class VidLLMMlp(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        in_features (`int`): Input width.
        hidden_features (`int`): Width between the layers.
        out_features (`int`, *optional*): Output width, `in_features` if not given.
        activation (`str`): Name in transformers' `ACT2FN`.

    Source:
        Paper: section 3.1 (two fully connected layers, GELU); VGGT's blocks use the same form.
    """

    def __init__(
        self, in_features: int, hidden_features: int, out_features: int | None = None, activation: str = "gelu"
    ):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = ACT2FN[activation]
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` -> `(..., out_features)`."""
        return self.fc2(self.act(self.fc1(hidden_states)))


class VidLLMLayerScale(nn.Module):
    """Learned factor per channel; its initial value is set in `_init_weights`.

    Args:
        dim (`int`): Channels.
        init_value (`float`): Initial factor.

    Source:
        Upstream: facebookresearch/vggt blocks (`ls1.gamma`).
    """

    def __init__(self, dim: int, init_value: float):
        super().__init__()
        self.init_value = init_value
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the initial factor again: a checkpoint may lack it."""
        init.constant_(self.gamma, self.init_value)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., dim)` -> `(..., dim)`."""
        return hidden_states * self.gamma


class VidLLMCentredNorm(nn.Module):
    """LayerNorm, then every channel centred and scaled over what was seen: what all tokens have in common is taken away.

    Camera tokens of a model that is trained from nothing differ little from each other; the noise of a pose loss moves what they share, and soon
    nothing else is left of them. Centred over the batch, the loss cannot move what they share at all.

    Args:
        dim (`int`): Channels.
        momentum (`float`): How fast the running statistics follow those of the batches.
        eps (`float`): Added to variances.

    Source:
        Ours: with the statistics of batch normalisation. In training those of the batch, so that a step depends on what is in it together; in
        evaluation, without gradient, where its parameters are frozen, or of a single token, which centred on itself says nothing, the running ones.
    """

    def __init__(self, dim: int, momentum: float = 0.05, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    @torch.no_grad()
    def init_weights(self) -> None:
        """No change of centred values; statistics of tokens that are centred already."""
        init.ones_(self.weight)
        init.zeros_(self.bias)
        init.zeros_(self.running_mean)
        init.ones_(self.running_var)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(..., dim)` float32 -> `(..., dim)`."""
        normed = nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=self.eps)
        has_others = tokens.shape[:-1].numel() > 1
        if self.training and torch.is_grad_enabled() and self.weight.requires_grad and has_others:
            mean = normed.flatten(0, -2).mean(dim=0)
            variance = (normed - mean).flatten(0, -2).square().mean(dim=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        else:
            mean, variance = self.running_mean.to(tokens.dtype), self.running_var.to(tokens.dtype)
        return (normed - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
