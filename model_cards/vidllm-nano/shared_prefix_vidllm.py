"""Prompts about one video in one row: their common beginning, scene tokens included, goes through the language model once.

A row holds the beginning that all prompts of a scene share, then the rest of each prompt; the rests do not see each other and each counts its
positions on from the beginning. Causal attention lets nothing flow back into the beginning, so every hidden state equals that of a prompt that
runs alone.

Shapes: Q prompts, L text tokens, R packed rows, K tokens of a packed row, D language-model width.
"""

from dataclasses import dataclass

import torch

from .prompt_vidllm import is_token_mask, position_ids_from_mask, resolve_scene_index
from .scene_vidllm import VidLLMScene


@dataclass
class VidLLMSharedPrefix:
    """Which token of which prompt stands where in the packed rows.

    Args:
        prompt (`torch.Tensor` of shape `(R, K)`, int64): Prompt whose token this is.
        column (`torch.Tensor` of shape `(R, K)`, int64): Its column in that prompt.
        segment (`torch.Tensor` of shape `(R, K)`, int64): 0 = beginning that all share, n = rest of the row's n-th prompt, -1 = padding.
        row (`torch.Tensor` of shape `(Q, L)`, int64): Packed row of each token of each prompt.
        place (`torch.Tensor` of shape `(Q, L)`, int64): Its place in the row.

    Source:
        Ours.
    """

    prompt: torch.Tensor
    column: torch.Tensor
    segment: torch.Tensor
    row: torch.Tensor
    place: torch.Tensor

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Values of tokens in their packed places.

        Args:
            values (`torch.Tensor` of shape `(Q, L, ...)`): One per token.

        Returns:
            `torch.Tensor` of shape `(R, K, ...)`: at padding that of any token.

        Source:
            Ours.
        """
        return values[self.prompt, self.column]

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Values of packed places, back at the tokens; prompts of a scene get the same values for what they share.

        Args:
            values (`torch.Tensor` of shape `(R, K, ...)`): One per place.

        Returns:
            `torch.Tensor` of shape `(Q, L, ...)`

        Source:
            Ours.
        """
        return values[self.row, self.place]

    def visible(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Which place sees which: earlier places of the shared beginning and of its own prompt; a place always sees itself.

        Args:
            attention_mask (`torch.Tensor` of shape `(Q, L)`, int64): 0 at padding and at empty slots.

        Returns:
            `torch.Tensor` of shape `(R, 1, K, K)`, bool: `[r, 0, i, j]` says that place i sees place j.

        Source:
            Ours: a place that saw nothing would get NaN from the softmax.
        """
        real = self.pack(attention_mask).bool() & (self.segment >= 0)
        places = torch.arange(real.shape[1], device=real.device)
        earlier = places[None, :] <= places[:, None]  # (K, K)
        related = (self.segment[:, None, :] == 0) | (self.segment[:, None, :] == self.segment[:, :, None])
        seen = related & earlier & real[:, None, :]
        return (seen | torch.eye(len(places), dtype=torch.bool, device=real.device))[:, None]

    def language_mask(
        self, attention_mask: torch.Tensor, language_model: torch.nn.Module, dtype: torch.dtype
    ) -> torch.Tensor:
        """`visible`, as a language model's attention takes it.

        Args:
            attention_mask (`torch.Tensor` of shape `(Q, L)`, int64): 0 at padding and at empty slots.
            language_model (`torch.nn.Module`): Reads its attention backend: sdpa takes bool, eager adds to the scores.
            dtype (`torch.dtype`): Of the scores.

        Returns:
            `torch.Tensor` of shape `(R, 1, K, K)`.

        Source:
            Upstream: huggingface/transformers masks.
        """
        visible = self.visible(attention_mask)
        if language_model.config._attn_implementation == "sdpa":
            return visible
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill(~visible, torch.finfo(dtype).min)

    def position_ids(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Positions that each prompt would have alone.

        Args:
            attention_mask (`torch.Tensor` of shape `(Q, L)`, int64): 0 at padding and at empty slots.

        Returns:
            `torch.Tensor` of shape `(R, K)`, int64.

        Source:
            Ours.
        """
        return self.pack(position_ids_from_mask(attention_mask))


def prefix_obstacle(language_model: torch.nn.Module) -> str | None:
    """Why the prompts of a scene cannot share a row in a language model.

    Args:
        language_model (`torch.nn.Module`): Reads its config: attention backend, kinds of layers, sliding window.

    Returns:
        `str`, or None where they can.

    Source:
        Ours: flash attention takes no ready mask; a window counts distances within the row; a recurrent layer would carry one prompt into the next.
    """
    config = language_model.config
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention by {config._attn_implementation}"
    kinds = getattr(config, "layer_types", None)
    others = sorted(set(kinds or ()) - {"full_attention"})
    if others:
        return f"layers of kind {', '.join(others)}"
    window = getattr(config, "sliding_window", None)
    return f"a sliding window of {window}" if kinds is None and window else None


def check_prefix_arguments(
    language_model: torch.nn.Module,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cached: bool,
    kwargs: dict,
) -> None:
    """Refuse what packed rows cannot take, or cannot give back per prompt.

    Args:
        language_model (`torch.nn.Module`): See `prefix_obstacle`.
        input_ids (`torch.Tensor` of shape `(Q, L)`, int64, *optional*): Of the forward, as are the others.
        attention_mask (`torch.Tensor` of shape `(Q, L)`, int64, *optional*): Other shapes are refused.
        position_ids (`torch.Tensor` of shape `(Q, L)`, int64, *optional*): Must be None.
        cached (`bool`): Whether a cache is given or wanted; must not be True.
        kwargs (`dict`): Must not ask for hidden states or attentions.

    Raises:
        ValueError: One of these does not hold.

    Source:
        Ours.
    """
    if input_ids is None or position_ids is not None or cached:
        raise ValueError(
            "share_prefix: wanted input_ids, without position_ids and without a cache; got something else"
        )
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name):
            raise ValueError(f"share_prefix: wanted no {name}, which would be those of the packed rows; got it")
    obstacle = prefix_obstacle(language_model)
    if obstacle:
        raise ValueError(f"share_prefix: wanted full attention by sdpa or eager, which take any mask; got {obstacle}")
    if attention_mask is not None and (not is_token_mask(attention_mask) or attention_mask.shape != input_ids.shape):
        raise ValueError(f"share_prefix: wanted an attention mask of shape {tuple(input_ids.shape)}; got another")


def shared_prefix(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    scene: VidLLMScene | None,
    scene_index: torch.Tensor | None,
    coord_token_id: int,
) -> VidLLMSharedPrefix:
    """Plan the packed rows: one row per scene, in the order in which scenes appear; a prompt without a scene has its own.

    Args:
        input_ids (`torch.Tensor` of shape `(Q, L)`, int64): Prompts, padded on the right.
        attention_mask (`torch.Tensor` of shape `(Q, L)`, int64): 1 = real token, before empty slots are masked.
        scene (`VidLLMScene`, *optional*): Encoded videos; without it every prompt is text alone.
        scene_index (`torch.Tensor` of shape `(Q,)`, int64, *optional*): See `resolve_scene_index`.
        coord_token_id (`int`): Placeholder of a point; the same ids can mean different places, so nothing is shared from there on.

    Returns:
        [`VidLLMSharedPrefix`], on the device of `input_ids`.

    Raises:
        ValueError: A prompt is padded on the left, has a gap, or has no token.

    Source:
        Ours.
    """
    if scene is None:
        scene_index = torch.full((len(input_ids),), -1)
    else:
        scene_index = resolve_scene_index(len(input_ids), scene, scene_index, input_ids.device)
    ids, lengths = input_ids.cpu(), attention_mask.cpu().bool().sum(dim=1)
    solid = torch.arange(ids.shape[1])[None] < lengths[:, None]
    wrong = (solid != attention_mask.cpu().bool()).any(dim=1) | (lengths == 0)
    if wrong.any():
        raise ValueError(
            "share_prefix: wanted prompts padded on the right; got padding or a gap before the last token, or no token, in "
            f"prompt {int(wrong.nonzero()[0])}"
        )
    rows: dict[tuple[int, int], list[int]] = {}
    for prompt, scene in enumerate(scene_index.tolist()):
        rows.setdefault((scene, -1) if scene >= 0 else (-1, prompt), []).append(prompt)
    prompt_of, column_of, segment_of = [], [], []
    row_of, place_of = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, members in enumerate(rows.values()):
        # each rest keeps at least one token
        shared = int(lengths[members].min()) - 1
        first = ids[members[0], :shared]
        differs = ((ids[members, :shared] != first).any(dim=0) | (first == coord_token_id)).nonzero()
        shared = int(differs[0]) if len(differs) else shared
        prompts, columns, segments = [torch.full((shared,), members[0])], [torch.arange(shared)], [torch.zeros(shared)]
        next_place = shared
        for number, prompt in enumerate(members, start=1):
            rest = int(lengths[prompt]) - shared
            prompts.append(torch.full((rest,), prompt))
            columns.append(torch.arange(shared, shared + rest))
            segments.append(torch.full((rest,), number))
            row_of[prompt] = row
            place_of[prompt, :shared] = torch.arange(shared)
            place_of[prompt, shared : shared + rest] = torch.arange(next_place, next_place + rest)
            next_place += rest
        prompt_of.append(torch.cat(prompts))
        column_of.append(torch.cat(columns))
        segment_of.append(torch.cat(segments).long())
    pad = torch.nn.utils.rnn.pad_sequence
    device = input_ids.device
    return VidLLMSharedPrefix(
        prompt=pad(prompt_of, batch_first=True).to(device),
        column=pad(column_of, batch_first=True).to(device),
        segment=pad(segment_of, batch_first=True, padding_value=-1).to(device),
        row=row_of.to(device),
        place=place_of.to(device),
    )


__all__ = ["VidLLMSharedPrefix", "check_prefix_arguments", "prefix_obstacle", "shared_prefix"]
