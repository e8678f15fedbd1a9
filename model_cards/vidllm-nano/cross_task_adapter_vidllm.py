"""Cross-Task Adapter: one patch token becomes a geometry token and a language token, coupled by a few bridge tokens.

Shapes: B videos, S frames, P patches per frame, C encoder width, K bridge tokens.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vidllm import VidLLMConfig
from .layers_vidllm import VidLLMMlp, attend, split_heads


class VidLLMBridgeTokens(nn.Module):
    """The learned start values of the bridge tokens.

    Args:
        config (`VidLLMConfig`): Reads `num_bridge_tokens` and the encoder width.

    Source:
        Paper: eq. 2. Ours: a module of its own, so that `device_map` and FSDP place the bare parameter; unit
        variance, for tokens that start small are drowned by the first attention output, all alike, and then hardly
        learn to differ.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(config.num_bridge_tokens, config.vision_config.hidden_size))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the tokens; equal tokens would stay equal for ever."""
        init.normal_(self.tokens, mean=0.0, std=1.0)

    def forward(self, batch_size: int) -> torch.Tensor:
        """Give one copy of the tokens to each video or frame.

        Args:
            batch_size (`int`): Number of copies.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_bridge_tokens, encoder_width)`: copies; where parameters are sharded, a view of one
            would outlive its memory.
        """
        return self.tokens.unsqueeze(0).repeat(batch_size, 1, 1)


class VidLLMAdapterMlp(nn.Module):
    """`phi_geom` or `phi_lang`: a residual MLP that starts as the identity.

    Args:
        config (`VidLLMConfig`): Reads `adapter_expansion` and the encoder width.

    Source:
        Paper: eq. 1 (two linear layers, expansion 4, GELU). Ours: the residual, and the zero start.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.mlp = VidLLMMlp(width, config.adapter_expansion * width)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Zero the last linear: a fresh branch is the identity."""
        init.zeros_(self.mlp.fc2.weight)
        init.zeros_(self.mlp.fc2.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., encoder_width)` -> `(..., encoder_width)`."""
        return hidden_states + self.mlp(hidden_states)


class VidLLMAdapterAttention(nn.Module):
    """Multi-head attention from one token set to another, LayerNorm on both inputs, residual left to the caller.

    Args:
        config (`VidLLMConfig`): Reads `num_adapter_heads` and the encoder width.
        is_write_back (`bool`): Whether the result goes into a patch stream; then the output projection starts at zero.

    Source:
        Paper: eq. 2 (standard multi-head attention). Ours: heads, normalisation, zero start; keys have no bias because
        softmax cancels it, so it could never be trained.
    """

    def __init__(self, config: VidLLMConfig, is_write_back: bool):
        super().__init__()
        width = config.vision_config.hidden_size
        self.config = config
        self.num_heads = config.num_adapter_heads
        self.is_write_back = is_write_back
        self.norm_query = nn.LayerNorm(width, eps=1e-6)
        self.norm_context = nn.LayerNorm(width, eps=1e-6)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Unit-gain projections; zero output of a write-back: a fresh adapter changes no patch token."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init.normal_(projection.weight, mean=0.0, std=projection.in_features**-0.5)
        if self.is_write_back:
            init.zeros_(self.o_proj.weight)
            init.zeros_(self.o_proj.bias)

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Attend from `hidden_states` to `context`.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, queries, encoder_width)`): Tokens that ask.
            context (`torch.Tensor` of shape `(batch, keys, encoder_width)`): Tokens that are read.

        Returns:
            `torch.Tensor` of shape `(batch, queries, encoder_width)`: the update, without the residual.
        """
        context = self.norm_context(context)
        query = split_heads(self.q_proj(self.norm_query(hidden_states)), self.num_heads)
        key = split_heads(self.k_proj(context), self.num_heads)
        value = split_heads(self.v_proj(context), self.num_heads)
        return self.o_proj(attend(self, self.config._attn_implementation, query, key, value))


class VidLLMBridgeLayer(GradientCheckpointingLayer):
    """One exchange: the bridge tokens read both streams, then both streams read the bridge tokens.

    Args:
        config (`VidLLMConfig`): Passed to the four attentions.

    Source:
        Paper: eq. 2 for the bridge update. Ours: its residual, and the write-back, of which the paper gives no
        formula.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        self.bridge_from_geom = VidLLMAdapterAttention(config, is_write_back=False)
        self.bridge_from_lang = VidLLMAdapterAttention(config, is_write_back=False)
        self.geom_from_bridge = VidLLMAdapterAttention(config, is_write_back=True)
        self.lang_from_bridge = VidLLMAdapterAttention(config, is_write_back=True)

    def forward(
        self, geom_tokens: torch.Tensor, lang_tokens: torch.Tensor, bridge_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Update the three token sets.

        Args:
            geom_tokens (`torch.Tensor` of shape `(batch, tokens, encoder_width)`): Geometry stream.
            lang_tokens (`torch.Tensor` of shape `(batch, tokens, encoder_width)`): Language stream.
            bridge_tokens (`torch.Tensor` of shape `(batch, num_bridge_tokens, encoder_width)`): Bridge tokens.

        Returns:
            `tuple` of the three, updated, same shapes.
        """
        bridge_tokens = (
            bridge_tokens
            + self.bridge_from_geom(bridge_tokens, geom_tokens)
            + self.bridge_from_lang(bridge_tokens, lang_tokens)
        )
        geom_tokens = geom_tokens + self.geom_from_bridge(geom_tokens, bridge_tokens)
        lang_tokens = lang_tokens + self.lang_from_bridge(lang_tokens, bridge_tokens)
        return geom_tokens, lang_tokens, bridge_tokens


class VidLLMConcatSelfAttentionLayer(GradientCheckpointingLayer):
    """Ablation: self-attention over the two streams of a frame, laid one after the other.

    Args:
        config (`VidLLMConfig`): Passed to the attention.

    Source:
        Paper: Table 6 (Concat-SA). Ours: per frame, residual, zero start.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        self.attention = VidLLMConcatSelfAttention(config)

    def forward(self, geom_tokens: torch.Tensor, lang_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(frames, patches, encoder_width)` twice -> the same twice, updated."""
        # (frames, patches, width) + (frames, patches, width) -> (frames, 2 * patches, width)
        both = torch.cat([geom_tokens, lang_tokens], dim=1)
        geom_update, lang_update = self.attention(both).chunk(2, dim=1)
        return geom_tokens + geom_update, lang_tokens + lang_update


class VidLLMConcatSelfAttention(nn.Module):
    """Self-attention with one LayerNorm on its input and a zero-initialised output projection.

    Args:
        config (`VidLLMConfig`): Reads `num_adapter_heads` and the encoder width.

    Source:
        Paper: Table 6 (Concat-SA). Ours: heads, normalisation, zero start.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.config = config
        self.num_heads = config.num_adapter_heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Unit-gain projections; zero output: a fresh adapter changes no patch token."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            init.normal_(projection.weight, mean=0.0, std=projection.in_features**-0.5)
        init.zeros_(self.o_proj.weight)
        init.zeros_(self.o_proj.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, encoder_width)` -> the update of the same shape, without the residual."""
        hidden_states = self.norm(hidden_states)
        query = split_heads(self.q_proj(hidden_states), self.num_heads)
        key = split_heads(self.k_proj(hidden_states), self.num_heads)
        value = split_heads(self.v_proj(hidden_states), self.num_heads)
        return self.o_proj(attend(self, self.config._attn_implementation, query, key, value))


class VidLLMCrossAttentionLayer(GradientCheckpointingLayer):
    """Ablation: the two streams of a frame read each other directly, both from their values before the layer.

    Args:
        config (`VidLLMConfig`): Passed to the two attentions.

    Source:
        Paper: Table 6 (without bridge tokens). Ours: per frame, residual, zero start.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        self.geom_from_lang = VidLLMAdapterAttention(config, is_write_back=True)
        self.lang_from_geom = VidLLMAdapterAttention(config, is_write_back=True)

    def forward(self, geom_tokens: torch.Tensor, lang_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(frames, patches, encoder_width)` twice -> the same twice, updated."""
        geom_update = self.geom_from_lang(geom_tokens, lang_tokens)
        lang_update = self.lang_from_geom(lang_tokens, geom_tokens)
        return geom_tokens + geom_update, lang_tokens + lang_update


ADAPTER_LAYERS = {
    "bridge": VidLLMBridgeLayer,
    "concat_self_attention": VidLLMConcatSelfAttentionLayer,
    "cross_attention": VidLLMCrossAttentionLayer,
}


class VidLLMCrossTaskAdapter(nn.Module):
    """Splits the encoder's tokens into a geometry and a language stream and couples the two.

    With random weights the gradient of a loss on one stream reaches the other stream's MLP through the coupling layers
    only; `adapter_type="none"` has none, so there it does not reach it. A fresh adapter returns its inputs unchanged.

    Args:
        config (`VidLLMConfig`): Reads `adapter_type`, `bridge_scope`, `num_adapter_layers` and what the layers read.

    Source:
        Paper: section 3.1, eq. 1-2, Table 6. Ours: layers, scope of the bridge tokens, write-back, zero start.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        self.adapter_type = config.adapter_type
        self.bridge_scope = config.bridge_scope
        self.phi_geom = VidLLMAdapterMlp(config)
        self.phi_lang = VidLLMAdapterMlp(config)
        num_layers = 0 if config.adapter_type == "none" else config.num_adapter_layers
        self.layers = nn.ModuleList(ADAPTER_LAYERS[config.adapter_type](config) for _ in range(num_layers))
        if config.adapter_type == "bridge":
            self.bridge = VidLLMBridgeTokens(config)

    def forward(self, geom_base: torch.Tensor, lang_base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run both MLPs and the coupling layers.

        Args:
            geom_base (`torch.Tensor` of shape `(batch, frames, patches, encoder_width)`): Patch tokens for the
                geometry stream.
            lang_base (`torch.Tensor` of shape `(batch, frames, patches, encoder_width)`): Patch tokens for the
                language stream; the same tensor unless `shared_encoder=False`.

        Returns:
            `tuple` of `geom_tokens` and `lang_tokens`, each `(batch, frames, patches, encoder_width)`.

        Source:
            Paper: eq. 1-2.
        """
        shape = geom_base.shape
        # One attention sees the tokens of a whole video, or of one frame.
        first_axis = 1 if self.adapter_type == "bridge" and self.bridge_scope == "scene" else 0
        # (batch, frames, patches, width) -> (batch, frames * patches, width) or (batch * frames, patches, width)
        geom_tokens = self.phi_geom(geom_base).flatten(first_axis, first_axis + 1)
        lang_tokens = self.phi_lang(lang_base).flatten(first_axis, first_axis + 1)

        if self.adapter_type == "bridge":
            bridge_tokens = self.bridge(geom_tokens.shape[0]).to(geom_tokens.dtype)
            for layer in self.layers:
                geom_tokens, lang_tokens, bridge_tokens = layer(geom_tokens, lang_tokens, bridge_tokens)
        else:
            for layer in self.layers:
                geom_tokens, lang_tokens = layer(geom_tokens, lang_tokens)
        # back to (batch, frames, patches, width)
        return geom_tokens.reshape(shape), lang_tokens.reshape(shape)


__all__ = ["VidLLMCrossTaskAdapter"]
