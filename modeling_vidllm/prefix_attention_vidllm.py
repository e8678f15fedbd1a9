"""Attention of prompts that share what they begin with, block by block instead of through one mask.

A packed row with a mask costs the square of all that stands in it, though a prompt sees only the beginning and itself. Here the tokens of
all rows stand in one flat row, in blocks: first the beginnings, then the rests in a few groups of about the same length. Everything of a
language model but its attention works token by token and does not notice. The attention weights are kept for the gradients, which a fused
kernel would compute again: faster, at the price of memory.

Shapes: Q prompts, L text tokens, R scenes, N tokens of the longest beginning, T flat tokens, G prompts of a group, K tokens of its longest rest,
H heads, V heads of keys and values, D width of a head.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .prompt_vidllm import position_ids_from_mask
from .shared_prefix_vidllm import VidLLMSharedPrefix


BLOCK_ATTENTION = "vidllm_prefix_blocks"
# Groups of rests: more waste less on padding, and call more small operations.
NUM_GROUPS = 4


@dataclass
class VidLLMPrefixBlocks:
    """Which token of which prompt stands where in the flat row.

    Args:
        prompt (`torch.Tensor` of shape `(T,)`, int64): Prompt whose token this is; at padding that of any token.
        column (`torch.Tensor` of shape `(T,)`, int64): Its column in that prompt.
        place (`torch.Tensor` of shape `(Q, L)`, int64): Place in the flat row of each token of each prompt.
        beginning_shape (`tuple` of `int`): R and N of the first block.
        beginning_mask (`torch.Tensor` of shape `(R, N)`, bool): Tokens of the beginnings that are seen: neither padding nor empty slots.
        groups (`tuple`): Row `(G,)`, int64, of each prompt of a group, and K.

    Source:
        Ours.
    """

    prompt: torch.Tensor
    column: torch.Tensor
    place: torch.Tensor
    beginning_shape: tuple[int, int]
    beginning_mask: torch.Tensor
    groups: tuple[tuple[torch.Tensor, int], ...]

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Values of tokens in the flat row.

        Args:
            values (`torch.Tensor` of shape `(Q, L, ...)`): One per token.

        Returns:
            `torch.Tensor` of shape `(1, T, ...)`.

        Source:
            Ours.
        """
        return values[self.prompt, self.column][None]

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the flat row, back at the tokens; prompts of a scene get the same values for what they share.

        Args:
            values (`torch.Tensor` of shape `(1, T, ...)`): One per place.

        Returns:
            `torch.Tensor` of shape `(Q, L, ...)`.

        Source:
            Ours.
        """
        return values[0][self.place]

    def position_ids(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Positions that each prompt would have alone.

        Args:
            attention_mask (`torch.Tensor` of shape `(Q, L)`, int64): 0 at padding and at empty slots.

        Returns:
            `torch.Tensor` of shape `(1, T)`, int64.

        Source:
            Ours.
        """
        return self.pack(position_ids_from_mask(attention_mask))


def prefix_blocks(plan: VidLLMSharedPrefix, attention_mask: torch.Tensor) -> VidLLMPrefixBlocks:
    """Blocks of packed rows.

    Args:
        plan (`VidLLMSharedPrefix`): The rows.
        attention_mask (`torch.Tensor` of shape `(Q, L)`, int64): 0 at padding and at empty slots.

    Returns:
        [`VidLLMPrefixBlocks`], on the device of `attention_mask`.

    Source:
        Ours.
    """
    device = attention_mask.device
    segment, row_of, place_in_row = plan.segment.cpu(), plan.row.cpu(), plan.place.cpu()
    num_rows = len(segment)
    shared = (segment == 0).sum(dim=1)
    longest = int(shared.max())
    # The first token of a row stands for padding: it is real, whatever it says.
    prompt = [plan.prompt.cpu()[:, :1].expand(num_rows, longest).clone()]
    column = [plan.column.cpu()[:, :1].expand(num_rows, longest).clone()]
    inside = torch.arange(longest)[None] < shared[:, None]
    prompt[0][inside] = plan.prompt.cpu()[segment == 0]
    column[0][inside] = plan.column.cpu()[segment == 0]
    begins = shared[row_of[:, 0]]  # (Q,)
    lengths = torch.zeros(len(row_of), dtype=torch.int64)
    lengths.index_add_(0, plan.prompt.cpu()[segment > 0], torch.ones(int((segment > 0).sum()), dtype=torch.int64))
    place = row_of * longest + place_in_row  # right for what is shared
    columns = torch.arange(row_of.shape[1])
    start, groups = num_rows * longest, []
    for members in torch.argsort(lengths, stable=True).tensor_split(min(NUM_GROUPS, len(lengths))):
        most = int(lengths[members].max())
        offset = columns[None] - begins[members, None]  # (G, L): how far into the rest
        own = (offset >= 0) & (offset < lengths[members, None])
        first = start + torch.arange(len(members))[:, None] * most
        place[members] = torch.where(own, first + offset, place[members])
        steps = torch.minimum(torch.arange(most)[None], lengths[members, None] - 1)
        prompt.append(members[:, None].expand(-1, most))
        column.append(begins[members, None] + steps)
        groups.append((row_of[members, 0].to(device), most))
        start += len(members) * most
    # Columns of padding: any place.
    place = place.clamp(max=start - 1)
    flat_prompt = torch.cat([part.reshape(-1) for part in prompt]).to(device)
    flat_column = torch.cat([part.reshape(-1) for part in column]).to(device)
    seen = attention_mask[flat_prompt, flat_column][: num_rows * longest].bool().view(num_rows, longest)
    return VidLLMPrefixBlocks(
        prompt=flat_prompt,
        column=flat_column,
        place=place.to(device),
        beginning_shape=(num_rows, longest),
        beginning_mask=seen & inside.to(device),
        groups=tuple(groups),
    )


def block_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    prefix_blocks: VidLLMPrefixBlocks | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention over the blocks of a flat row, as transformers calls its attention functions.

    Args:
        module (`nn.Module`): The attention layer.
        query (`torch.Tensor` of shape `(1, H, T, D)`): Of the flat row.
        key (`torch.Tensor` of shape `(1, V, T, D)`): Of the flat row.
        value (`torch.Tensor` of shape `(1, V, T, D)`): Of the flat row.
        attention_mask (`torch.Tensor` of shape `(1, 1, T, T)`, *optional*): Not read; the blocks say what is seen.
        dropout (`float`): Share of the attention weights that is dropped.
        scaling (`float`, *optional*): Factor of the scores; by default `D ** -0.5`.
        prefix_blocks (`VidLLMPrefixBlocks`): The blocks.
        kwargs: What else transformers passes on.

    Returns:
        `tuple`: `(1, T, H, D)`, and no attention weights.

    Raises:
        ValueError: There are no blocks.

    Source:
        Ours: matrix products with a softmax in float32 between them; each place sees the earlier places of its own block and, in the rest of a
        prompt, the beginning.
    """
    if prefix_blocks is None:
        raise ValueError(f"attention {BLOCK_ATTENTION}: wanted the blocks of packed prompts; got none")
    rows, begin = prefix_blocks.beginning_shape
    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[-1]
    shared = heads // kv_heads
    scaling = width**-0.5 if scaling is None else scaling

    def block(values: torch.Tensor, start: int, count: int, length: int) -> torch.Tensor:
        """`(1, heads, T, D)` -> `(count, V, heads / V * length, D)`: heads that share keys stand below each other."""
        part = values[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)
        return part.reshape(count, kv_heads, -1, width)

    def hidden(length: int, dtype: torch.dtype) -> torch.Tensor:
        """`(length, length)`: what is added to the scores of later places."""
        later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        return torch.zeros(length, length, dtype=dtype, device=query.device).masked_fill(later, lowest)

    def weights(scores: torch.Tensor) -> torch.Tensor:
        probabilities = torch.softmax(scores * scaling, dim=-1, dtype=torch.float32).to(value.dtype)
        return nn.functional.dropout(probabilities, p=dropout, training=module.training)

    # A quarter of what the type holds: a score and both masks are added up.
    lowest = torch.finfo(query.dtype).min / 4
    unseen = torch.zeros(rows, begin, dtype=query.dtype, device=query.device)
    unseen = unseen.masked_fill(~prefix_blocks.beginning_mask, lowest)[:, None, None, None]  # (R, 1, 1, 1, N)
    begin_keys, begin_values = block(key, 0, rows, begin), block(value, 0, rows, begin)
    scores = (block(query, 0, rows, begin) @ begin_keys.transpose(-1, -2)).view(rows, kv_heads, shared, begin, begin)
    probabilities = weights(scores + hidden(begin, query.dtype) + unseen).view(rows, kv_heads, shared * begin, begin)
    out = [(probabilities @ begin_values).view(rows, heads, begin, width).transpose(0, 1).flatten(1, 2)]
    start = rows * begin
    for row, length in prefix_blocks.groups:
        count = len(row)
        own_query, own_keys, own_values = (block(part, start, count, length) for part in (query, key, value))
        to_begin = (own_query @ begin_keys[row].transpose(-1, -2)).view(count, kv_heads, shared, length, begin)
        to_own = (own_query @ own_keys.transpose(-1, -2)).view(count, kv_heads, shared, length, length)
        scores = torch.cat([to_begin + unseen[row], to_own + hidden(length, query.dtype)], dim=-1)
        probabilities = weights(scores).view(count, kv_heads, shared * length, begin + length)
        mixed = probabilities[..., :begin] @ begin_values[row] + probabilities[..., begin:] @ own_values
        out.append(mixed.view(count, heads, length, width).transpose(0, 1).flatten(1, 2))
        start += count * length
    return torch.cat(out, dim=1).transpose(0, 1)[None].contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(BLOCK_ATTENTION, block_attention)


def attends_by_blocks(language_model: nn.Module, device: torch.device) -> bool:
    """Whether packed prompts go through a language model block by block, or in rows with a mask.

    Args:
        language_model (`nn.Module`): Whose layers must not be computed again for the gradients: that would happen after `attention_by_blocks`.
        device (`torch.device`): Where it runs.

    Returns:
        `bool`: on a CPU, where it was measured to be faster.

    Source:
        Ours.
    """
    recomputes = language_model.training and language_model.is_activation_checkpointing
    return device.type == "cpu" and not recomputes


@contextlib.contextmanager
def attention_by_blocks(language_model: nn.Module) -> Iterator[None]:
    """Let a language model attend by `block_attention` for the time of a context.

    Args:
        language_model (`nn.Module`): Called with `attention_mask=None` and `prefix_blocks=...` inside.

    Yields:
        None.

    Source:
        Upstream: huggingface/transformers chooses the attention function by its config at every call.
    """
    config = language_model.config
    usual = config._attn_implementation
    config._attn_implementation = BLOCK_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = usual


def decode_packed(
    language_model: nn.Module,
    plan: VidLLMSharedPrefix,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    kwargs: dict[str, Any],
) -> BaseModelOutputWithPast:
    """Run a language model on prompts that share what they begin with: by blocks where `attends_by_blocks`, else in rows with a mask.

    Args:
        language_model (`nn.Module`): One that `prefix_obstacle` has nothing against.
        plan (`VidLLMSharedPrefix`): Of the prompts.
        inputs_embeds (`torch.Tensor` of shape `(Q, L, hidden)`): With scene tokens and points in their places.
        attention_mask (`torch.Tensor` of shape `(Q, L)`, int64): 0 at padding and at empty slots.
        kwargs (`dict`): Passed on.

    Returns:
        `BaseModelOutputWithPast`: hidden states `(Q, L, hidden)`, at padding those of any place.

    Source:
        Ours.
    """
    if attends_by_blocks(language_model, inputs_embeds.device):
        packed: VidLLMPrefixBlocks | VidLLMSharedPrefix = prefix_blocks(plan, attention_mask)
        attention = attention_by_blocks(language_model)
        kwargs = {**kwargs, "prefix_blocks": packed}
    else:
        packed, attention = plan, contextlib.nullcontext()
        mask = plan.language_mask(attention_mask, language_model, inputs_embeds.dtype)
        kwargs = {**kwargs, "attention_mask": mask}
    with attention:
        decoded = language_model(
            inputs_embeds=packed.pack(inputs_embeds),
            position_ids=packed.position_ids(attention_mask),
            use_cache=False,
            **kwargs,
        )
    decoded.last_hidden_state = packed.unpack(decoded.last_hidden_state)
    return decoded


__all__ = [
    "VidLLMPrefixBlocks",
    "attends_by_blocks",
    "attention_by_blocks",
    "block_attention",
    "decode_packed",
    "prefix_blocks",
]
