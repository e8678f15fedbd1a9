"""Grounding decoder: from the hidden state at a `<loc>` token and the tokens of a scene to 3D boxes in the room frame.

Shapes: B videos, N scene-token slots, D language-model width, G `<loc>` tokens, T queries, L locs of one scene, k
neighbours, E decoder width. The whole decoder runs in float32 with autocast off.

Which output trains what: `boxes_per_layer` every box head, and all that comes before the last of them;
`match_logits` the final norm, both matching projections and the last layer's update of `<loc>`; `no_target_logit`
the no-target vector.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_vidllm import VidLLMConfig
from .geometry_vidllm import box_iou, boxes_room_from_annotation
from .layers_vidllm import VidLLMMlp, attend, split_heads
from .scene_tokens_vidllm import VidLLMPositionMlp
from .scene_vidllm import VidLLMScene


# Ours: boxes that overlap a better one by more are dropped.
NMS_IOU = 0.25
# Ours: logit of a query that does not exist; its softmax is exactly 0, and its square is still finite.
MASKED_LOGIT = -1e9
# Ours: natural logarithms of the smallest (1 cm) and largest (20 m) box side.
MIN_LOG_SIZE, MAX_LOG_SIZE = -4.6, 3.0
# Ours: a usual distance between a query and its neighbours, metres.
NEIGHBOR_DISTANCE = 0.5
# Ours: distances in the attention bias stop here, so that a stray point cannot overflow it.
MAX_BIAS_DISTANCE = 100.0


@dataclass
class VidLLMGroundingOutput(ModelOutput):
    """Boxes and scores of every query for every `<loc>`; all float32.

    Args:
        boxes (`torch.FloatTensor` of shape `(num_locs, num_queries, 6)`): Boxes of the last layer, or the given
            proposals: centre and sides `(cx, cy, cz, dx, dy, dz)`, axis-aligned in the room frame, unit of the scene
            positions. Without meaning where `query_mask` is False.
        boxes_per_layer (`torch.FloatTensor` of shape `(num_locs, num_layers, num_queries, 6)`): What each layer's
            box head gives, for the losses, also where proposals are given.
        match_logits (`torch.FloatTensor` of shape `(num_locs, num_queries)`): Cosine of query and `<loc>` over the
            temperature; -1e9 where `query_mask` is False.
        no_target_logit (`torch.FloatTensor` of shape `(num_locs,)`): The same for the learned no-target vector.
        query_positions (`torch.FloatTensor` of shape `(num_locs, num_queries, 3)`): Where the queries start, room
            frame; zero where `query_mask` is False.
        query_mask (`torch.BoolTensor` of shape `(num_locs, num_queries)`): True for queries that exist.

    Source:
        Upstream: LLaVA-3D supplement (arXiv 2409.18125v3); no code was published.
    """

    boxes: torch.FloatTensor | None = None
    boxes_per_layer: torch.FloatTensor | None = None
    match_logits: torch.FloatTensor | None = None
    no_target_logit: torch.FloatTensor | None = None
    query_positions: torch.FloatTensor | None = None
    query_mask: torch.BoolTensor | None = None


@torch.no_grad()
def farthest_point_samples(
    positions: torch.Tensor, mask: torch.Tensor, num_samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Farthest-point sampling: first the point nearest the centroid, then always the one farthest from those chosen.

    Args:
        positions (`torch.Tensor` of shape `(batch, points, 3)`): Points, float32.
        mask (`torch.BoolTensor` of shape `(batch, points)`): True for points that exist.
        num_samples (`int`): Points to choose.

    Returns:
        `tuple`: `indices (batch, num_samples)` int64, each point at most once, ties to the lowest index, and
        `sample_mask (batch, num_samples)` bool, False once the points are used up (the index is 0 there).

    Source:
        Upstream: LLaVA-3D supplement (farthest-point sampling). Ours: start and ties, so that it is deterministic.
    """
    batch, num_points, _ = positions.shape
    rows = torch.arange(batch, device=positions.device)
    weight = mask.float() / mask.sum(1, keepdim=True).clamp(min=1)
    centroid = (torch.where(mask.unsqueeze(-1), positions, 0.0) * weight.unsqueeze(-1)).sum(1)
    from_centroid = (positions - centroid.unsqueeze(1)).square().sum(-1).masked_fill(~mask, torch.inf)
    chosen = from_centroid.argmin(1)
    # Squared distance to the chosen set; -1 for points that cannot be chosen (any more).
    distance = torch.full_like(from_centroid, torch.inf).masked_fill(~mask, -1.0)
    indices = [chosen]
    for _ in range(1, min(num_samples, num_points)):
        distance[rows, chosen] = -1.0
        to_chosen = (positions - positions[rows, chosen].unsqueeze(1)).square().sum(-1)
        distance = torch.minimum(distance, to_chosen)
        chosen = distance.argmax(1)
        indices.append(chosen)
    indices = torch.stack(indices, dim=1)
    if num_samples > num_points:
        indices = nn.functional.pad(indices, (0, num_samples - num_points))
    sample_mask = torch.arange(num_samples, device=positions.device) < mask.sum(1, keepdim=True)
    return indices.masked_fill(~sample_mask, 0), sample_mask


@torch.no_grad()
def nearest_neighbors(
    queries: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, num_neighbors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest points of each query, nearest first, ties to the lowest index.

    Args:
        queries (`torch.Tensor` of shape `(..., queries, 3)`): Query positions, float32.
        positions (`torch.Tensor` of shape `(..., points, 3)`): Points, float32.
        mask (`torch.BoolTensor` of shape `(..., points)`): True for points that exist.
        num_neighbors (`int`): Neighbours wanted.

    Returns:
        `tuple`: `indices (..., queries, k)` int64 and `neighbor_mask (..., queries, k)` bool, `k = min(num_neighbors,
        points)`; a shorter list is a prefix of a longer one.

    Source:
        Upstream: LLaVA-3D supplement (k-NN cross-attention). Ours: a stable sort, because `topk` leaves ties open.
    """
    distance = queries.new_zeros(*queries.shape[:-1], positions.shape[-2])
    for axis in range(3):
        distance = distance + (queries[..., :, None, axis] - positions[..., None, :, axis]).square()
    distance = distance.masked_fill(~mask.unsqueeze(-2), torch.inf)
    indices = distance.sort(dim=-1, stable=True).indices[..., :num_neighbors]
    return indices, mask.unsqueeze(-2).expand(distance.shape).gather(-1, indices)


def _of_neighbors(values: torch.Tensor, neighbor_index: torch.Tensor) -> torch.Tensor:
    """`(scenes, slots, size)` at `(scenes, queries, neighbors)` -> `(scenes, queries, neighbors, size)`."""
    return values[torch.arange(len(values), device=values.device)[:, None, None], neighbor_index]


class VidLLMNoTarget(nn.Module):
    """The learned vector that stands for "nothing in the room matches".

    Args:
        config (`VidLLMConfig`): Reads `grounding_hidden_size` and `initializer_range`.

    Source:
        Upstream: Video-3D-LLM's zero target. Ours: a module of its own, so that `device_map` and FSDP place the bare
        parameter.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        self.initializer_range = config.initializer_range
        self.vector = nn.Parameter(torch.zeros(config.grounding_hidden_size))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the vector; a zero vector has no direction."""
        init.normal_(self.vector, mean=0.0, std=self.initializer_range)

    def forward(self) -> torch.Tensor:
        """Return a copy of the vector, shape `(grounding_hidden_size,)`; sharded, the parameter itself is gone once this returns."""
        return self.vector.clone()


class VidLLMNeighborAttention(nn.Module):
    """Each query reads its nearest scene tokens, told where they lie relative to it.

    Args:
        config (`VidLLMConfig`): Reads `grounding_hidden_size` and `num_grounding_heads`.

    Source:
        Upstream: LLaVA-3D supplement (k-NN cross-attention, MLP of the relative offset). Ours: the offset's
        embedding is added to the neighbour before key and value; keys have no bias, because softmax cancels it.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        width = config.grounding_hidden_size
        self.config = config
        self.num_heads = config.num_grounding_heads
        self.norm = nn.LayerNorm(width)
        self.offset_mlp = VidLLMPositionMlp(width, width, scale=NEIGHBOR_DISTANCE)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, queries: torch.Tensor, neighbors: torch.Tensor, offsets: torch.Tensor, neighbor_mask: torch.Tensor
    ) -> torch.Tensor:
        """Attend from the queries of all locs to the neighbours that they share.

        Args:
            queries (`torch.Tensor` of shape `(scenes, locs, queries, width)`): Query states with their position encoding.
            neighbors (`torch.Tensor` of shape `(scenes, queries, neighbors, width)`): Projected scene tokens.
            offsets (`torch.Tensor` of shape `(scenes, queries, neighbors, 3)`): Neighbour minus query, room frame, metres.
            neighbor_mask (`torch.BoolTensor` of shape `(scenes, queries, neighbors)`): True for neighbours that exist.

        Returns:
            `torch.Tensor` of shape `(scenes, locs, queries, width)`: the update, without the residual.
        """
        num_scenes = queries.shape[0]
        neighbors = (neighbors + self.offset_mlp(offsets, neighbors.dtype)).flatten(0, 1)
        # (scenes, locs, queries, width) -> (scenes * queries, heads, locs, head width): all locs of a scene share a query's
        # neighbours
        query = split_heads(self.q_proj(self.norm(queries)).transpose(1, 2).flatten(0, 1), self.num_heads)
        key = split_heads(self.k_proj(neighbors), self.num_heads)
        value = split_heads(self.v_proj(neighbors), self.num_heads)
        neighbor_mask = neighbor_mask.flatten(0, 1)
        bias = torch.zeros_like(neighbor_mask, dtype=query.dtype)
        bias = bias.masked_fill(~neighbor_mask, torch.finfo(query.dtype).min)[:, None, None, :]
        attended = attend(self, self.config._attn_implementation, query, key, value, bias)
        # (scenes * queries, locs, width) -> (scenes, locs, queries, width)
        return self.o_proj(attended).unflatten(0, (num_scenes, -1)).transpose(1, 2)


class VidLLMDistanceAttention(nn.Module):
    """Self-attention over the queries and `<loc>`, in which far queries count less.

    Args:
        config (`VidLLMConfig`): Reads `grounding_hidden_size` and `num_grounding_heads`.

    Source:
        Upstream: LLaVA-3D supplement (bias -sigma * D, sigma predicted from the query, 0 for pairs with LOC). Ours:
        one sigma per head, kept positive by softplus.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        width = config.grounding_hidden_size
        self.config = config
        self.num_heads = config.num_grounding_heads
        self.norm = nn.LayerNorm(width)
        self.sigma_proj = nn.Linear(width, self.num_heads)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor, distances: torch.Tensor, query_mask: torch.Tensor) -> torch.Tensor:
        """Attend among the queries of a loc and the loc itself, which is the last token.

        Args:
            hidden_states (`torch.Tensor` of shape `(scenes, locs, queries + 1, width)`): States with their position encoding.
            distances (`torch.Tensor` of shape `(scenes, queries, queries)`): Metres between queries.
            query_mask (`torch.BoolTensor` of shape `(scenes, queries)`): True for queries that exist; others are not read.

        Returns:
            `torch.Tensor` of shape `(scenes, locs, queries + 1, width)`: the update, without the residual.
        """
        num_scenes, num_locs = hidden_states.shape[:2]
        hidden_states = self.norm(hidden_states).flatten(0, 1)  # (scenes, locs, ...) -> (scenes * locs, ...)

        def per_loc(values: torch.Tensor) -> torch.Tensor:
            return values.unsqueeze(1).expand(-1, num_locs, *values.shape[1:]).flatten(0, 1).unsqueeze(1)

        distances, query_mask = per_loc(distances), per_loc(query_mask).unsqueeze(1)
        # (locs, queries, heads) -> (locs, heads, queries, 1)
        sigma = nn.functional.softplus(self.sigma_proj(hidden_states[:, :-1])).transpose(1, 2).unsqueeze(-1)
        unread = torch.finfo(hidden_states.dtype).min
        bias = (-sigma * distances).masked_fill(~query_mask, unread)
        # The loc reads every query, and every query the loc, at no cost of distance; nobody reads a query that does
        # not exist.
        loc_row = torch.zeros_like(query_mask, dtype=bias.dtype).masked_fill(~query_mask, unread)
        bias = torch.cat([bias, loc_row.expand(-1, self.num_heads, -1, -1)], dim=2)
        bias = nn.functional.pad(bias, (0, 1))
        query = split_heads(self.q_proj(hidden_states), self.num_heads)
        key = split_heads(self.k_proj(hidden_states), self.num_heads)
        value = split_heads(self.v_proj(hidden_states), self.num_heads)
        attended = attend(self, self.config._attn_implementation, query, key, value, bias)
        return self.o_proj(attended).unflatten(0, (num_scenes, num_locs))


class VidLLMGroundingLayer(GradientCheckpointingLayer):
    """Neighbour attention, distance-biased self-attention with `<loc>`, feed-forward; pre-LayerNorm, residual.

    Args:
        config (`VidLLMConfig`): Reads `grounding_hidden_size` and `num_grounding_heads`.

    Source:
        Upstream: LLaVA-3D supplement (order of the parts). Ours: normalisation, feed-forward width 4, position
        encoding added at each attention.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        width = config.grounding_hidden_size
        self.neighbor_attention = VidLLMNeighborAttention(config)
        self.self_attention = VidLLMDistanceAttention(config)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = VidLLMMlp(width, 4 * width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        query_encoding: torch.Tensor,
        scene_tokens: torch.Tensor,
        scene_positions: torch.Tensor,
        query_positions: torch.Tensor,
        query_mask: torch.Tensor,
        neighbor_index: torch.Tensor,
        neighbor_mask: torch.Tensor,
        distances: torch.Tensor,
    ) -> torch.Tensor:
        """Update the queries and the locs of scenes.

        Args:
            hidden_states (`torch.Tensor` of shape `(scenes, locs, queries + 1, width)`): Query contents, then the loc.
            query_encoding (`torch.Tensor` of shape `(scenes, queries, width)`): Position encoding of the queries.
            scene_tokens (`torch.Tensor` of shape `(scenes, slots, width)`): Projected scene tokens.
            scene_positions (`torch.Tensor` of shape `(scenes, slots, 3)`): Their positions, room frame.
            query_positions (`torch.Tensor` of shape `(scenes, queries, 3)`): Positions of the queries, room frame.
            query_mask (`torch.BoolTensor` of shape `(scenes, queries)`): True for queries that exist.
            neighbor_index (`torch.Tensor` of shape `(scenes, queries, neighbors)`): Slots next to each query, int64.
            neighbor_mask (`torch.BoolTensor` of shape `(scenes, queries, neighbors)`): True for slots that are filled.
            distances (`torch.Tensor` of shape `(scenes, queries, queries)`): Metres between queries.

        Returns:
            `torch.Tensor` of shape `(scenes, locs, queries + 1, width)`.
        """
        queries, loc = hidden_states[:, :, :-1], hidden_states[:, :, -1:]
        query_encoding = query_encoding.unsqueeze(1)
        offsets = _of_neighbors(scene_positions, neighbor_index) - query_positions.unsqueeze(2)
        neighbors = _of_neighbors(scene_tokens, neighbor_index)
        queries = queries + self.neighbor_attention(queries + query_encoding, neighbors, offsets, neighbor_mask)
        hidden_states = torch.cat([queries, loc], dim=2)
        # The loc has no place, hence no encoding.
        encoded = torch.cat([queries + query_encoding, loc], dim=2)
        hidden_states = hidden_states + self.self_attention(encoded, distances, query_mask)
        return hidden_states + self.mlp(self.norm_mlp(hidden_states))


class VidLLMBoxHead(nn.Module):
    """Reads a box off a query: centre as an offset from the query's position, sides as logarithms.

    Args:
        config (`VidLLMConfig`): Reads `grounding_hidden_size`.

    Source:
        Upstream: LLaVA-3D supplement (two-layer MLP per layer). Ours: the parameterisation.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        width = config.grounding_hidden_size
        self.norm = nn.LayerNorm(width)
        self.mlp = VidLLMMlp(width, width, 6)

    def forward(self, queries: torch.Tensor, query_positions: torch.Tensor) -> torch.Tensor:
        """Decode boxes.

        Args:
            queries (`torch.Tensor` of shape `(scenes, locs, queries, width)`): Query contents.
            query_positions (`torch.Tensor` of shape `(scenes, queries, 3)`): Their positions, room frame.

        Returns:
            `torch.Tensor` of shape `(scenes, locs, queries, 6)`: centre and sides, room frame; sides between 1 cm and 20 m.
        """
        offset, log_size = self.mlp(self.norm(queries)).split(3, dim=-1)
        return torch.cat(
            [query_positions.unsqueeze(1) + offset, log_size.clamp(MIN_LOG_SIZE, MAX_LOG_SIZE).exp()], dim=-1
        )


class VidLLMGroundingDecoder(nn.Module):
    """Finds the boxes that a `<loc>` token asks for, among queries spread over the room or among given proposals.

    Queries, neighbours and the projected scene tokens are made once per scene; all locs of a scene share them.

    Args:
        config (`VidLLMConfig`): Reads `grounding_hidden_size`, `num_grounding_heads`, `num_grounding_queries`,
            `grounding_neighbors`, `grounding_temperature` and the language model's width.

    Source:
        Upstream: LLaVA-3D supplement (arXiv 2409.18125v3). Ours: what its layers' docstrings say, the no-target
        score, proposals as query centres, contents that start as the nearest scene token instead of zero (an average over
        neighbours hides what a query stands on, and what fits a description was then not learned from scratch).
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        width, text_width = config.grounding_hidden_size, config.text_config.hidden_size
        self.num_queries = config.num_grounding_queries
        self.num_neighbors = list(config.grounding_neighbors)
        self.temperature = config.grounding_temperature
        self.scene_norm = nn.LayerNorm(text_width)
        self.scene_proj = nn.Linear(text_width, width)
        self.loc_norm = nn.LayerNorm(text_width)
        self.loc_proj = nn.Linear(text_width, width)
        self.query_encoding = VidLLMPositionMlp(width, width)
        self.layers = nn.ModuleList(VidLLMGroundingLayer(config) for _ in self.num_neighbors)
        self.box_heads = nn.ModuleList(VidLLMBoxHead(config) for _ in self.num_neighbors)
        self.match_norm = nn.LayerNorm(width)
        self.match_query = nn.Linear(width, width)
        self.match_loc = nn.Linear(width, width)
        self.no_target = VidLLMNoTarget(config)

    def forward(
        self,
        loc_states: torch.Tensor,
        loc_scene_index: torch.Tensor,
        scene_tokens: torch.Tensor,
        scene_positions: torch.Tensor,
        scene_mask: torch.Tensor,
        proposal_boxes: torch.Tensor | None = None,
        proposal_mask: torch.Tensor | None = None,
    ) -> VidLLMGroundingOutput:
        """Decode all locs of a batch.

        Args:
            loc_states (`torch.Tensor` of shape `(num_locs, text_hidden_size)`): Last hidden states at the `<loc>`
                tokens, any float dtype. No loc at all gives empty outputs that still hang on every parameter (zero
                gradients).
            loc_scene_index (`torch.Tensor` of shape `(num_locs,)`): Scene of each, int64; -1 = no scene: no query
                exists.
            scene_tokens (`torch.Tensor` of shape `(batch, slots, text_hidden_size)`): Scene tokens before the
                language model.
            scene_positions (`torch.Tensor` of shape `(batch, slots, 3)`): Their positions, room frame, metres;
                detached here.
            scene_mask (`torch.BoolTensor` of shape `(batch, slots)`): True for filled slots.
            proposal_boxes (`torch.Tensor` of shape `(batch, proposals, 6)`, *optional*): Boxes to choose from, in
                the frame and unit of the positions. Then their centres are the queries and `boxes` returns them; an
                empty list counts as one query that does not exist.
            proposal_mask (`torch.BoolTensor` of shape `(batch, proposals)`, *optional*): True for real proposals;
                all if not given.

        Returns:
            `VidLLMGroundingOutput`.

        Raises:
            ValueError: A scene index is out of range, or a proposal is not finite.

        Source:
            Upstream: LLaVA-3D supplement.
        """
        num_locs, batch = loc_states.shape[0], scene_tokens.shape[0]
        # Which scenes have locs: decoded scene by scene, put back into the order of the locs at the end.
        groups = {}
        for number, scene in enumerate(loc_scene_index.tolist()):
            groups.setdefault(scene, []).append(number)
        if groups and not -1 <= min(groups) <= max(groups) < batch:
            raise ValueError(f"loc_scene_index: wanted numbers in -1..{batch - 1}; got {sorted(groups)}")
        if proposal_boxes is not None:
            if proposal_mask is None:
                proposal_mask = torch.ones_like(proposal_boxes[..., 0], dtype=torch.bool)
            if not proposal_boxes[proposal_mask].isfinite().all():
                raise ValueError("proposal_boxes: wanted finite numbers; got NaN or infinity")
            if proposal_boxes.shape[1] == 0:
                # Attention kernels want at least one query: one that does not exist.
                proposal_boxes = nn.functional.pad(proposal_boxes, (0, 0, 0, 1))
                proposal_mask = nn.functional.pad(proposal_mask, (0, 1))
        if num_locs == 0:
            # One stand-in loc runs through all modules and is cut off below.
            loc_states, groups = loc_states.new_zeros(1, loc_states.shape[1]), {0 if batch else -1: [0]}
        if -1 in groups:
            # An empty scene at the end, where the index -1 finds it.
            scene_tokens, scene_positions, scene_mask, proposal_boxes, proposal_mask = (
                None if tensor is None else torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])
                for tensor in (scene_tokens, scene_positions, scene_mask, proposal_boxes, proposal_mask)
            )
        device = scene_tokens.device
        scenes = torch.tensor(list(groups), device=device)
        with torch.autocast(device_type=device.type, enabled=False):
            positions, mask = scene_positions[scenes].detach().float(), scene_mask[scenes]
            proposals = None
            if proposal_boxes is None:
                index, query_mask = farthest_point_samples(positions, mask, self.num_queries)
                # (scenes, slots, 3) -> (scenes, queries, 3)
                query_positions = positions.gather(1, index.unsqueeze(-1).expand(-1, -1, 3))
            else:
                query_mask = proposal_mask[scenes]
                proposals = proposal_boxes[scenes].detach().float()
                proposals = torch.where(query_mask.unsqueeze(-1), proposals, 0.0)
                query_positions = proposals[..., :3]
            query_positions = torch.where(query_mask.unsqueeze(-1), query_positions, 0.0)
            # Scene by scene, so that no bit depends on the neighbours; all at once in training, where thousands of small steps
            # would take longer than the arithmetic in them. Rows with fewer locs than others repeat their first one.
            rows = [list(range(len(groups)))] if self.training else [[row] for row in range(len(groups))]
            members_of = list(groups.values())
            parts, places, start = [], {}, 0
            for chosen in rows:
                most = max(len(members_of[row]) for row in chosen)
                members = [members_of[row] + members_of[row][:1] * (most - len(members_of[row])) for row in chosen]
                # Where every loc comes out, copies left out.
                for place, row in enumerate(chosen):
                    places.update({number: start + place * most + i for i, number in enumerate(members_of[row])})
                start += len(chosen) * most
                part = slice(chosen[0], chosen[-1] + 1)
                parts.append(
                    self._decode_scenes(
                        loc_states[torch.tensor(members, device=device)].float(),
                        scene_tokens[scenes[part]].float(),
                        positions[part],
                        mask[part],
                        query_positions[part],
                        query_mask[part],
                        None if proposals is None else proposals[part],
                    )
                )
        order = torch.tensor([places[number] for number in range(num_locs)], dtype=torch.int64).to(device)
        return VidLLMGroundingOutput(
            **{name: torch.cat([part[name].flatten(0, 1) for part in parts])[order] for name in parts[0]}
        )

    def _decode_scenes(
        self,
        loc_states: torch.Tensor,
        scene_tokens: torch.Tensor,
        scene_positions: torch.Tensor,
        scene_mask: torch.Tensor,
        query_positions: torch.Tensor,
        query_mask: torch.Tensor,
        proposals: torch.Tensor | None,
    ) -> dict:
        """The `(scenes, locs, text_hidden_size)` locs of scenes; the fields of the output for them."""
        num_locs = loc_states.shape[1]
        neighbor_index, neighbor_mask = nearest_neighbors(
            query_positions, scene_positions, scene_mask, max(self.num_neighbors)
        )
        distances = (
            (query_positions.unsqueeze(2) - query_positions.unsqueeze(1))
            .square()
            .sum(-1)
            .sqrt()
            .clamp(max=MAX_BIAS_DISTANCE)
        )
        encoding = self.query_encoding(query_positions, torch.float32)
        scene_states = self.scene_proj(self.scene_norm(scene_tokens))
        loc = self.loc_proj(self.loc_norm(loc_states)).unsqueeze(2)
        # A query starts as the scene token at its place, or nearest to it; its position comes in with its encoding.
        nearest = _of_neighbors(scene_states, neighbor_index[..., :1]).squeeze(2) * neighbor_mask[..., 0, None]
        # (scenes, queries, width) -> (scenes, locs, queries, width)
        contents = nearest.unsqueeze(1).expand(-1, num_locs, -1, -1)
        hidden_states = torch.cat([contents, loc], dim=2)
        boxes_per_layer = []
        for num_neighbors, layer, box_head in zip(self.num_neighbors, self.layers, self.box_heads, strict=True):
            hidden_states = layer(
                hidden_states,
                encoding,
                scene_states,
                scene_positions,
                query_positions,
                query_mask,
                neighbor_index[..., :num_neighbors],
                neighbor_mask[..., :num_neighbors],
                distances,
            )
            boxes_per_layer.append(box_head(hidden_states[:, :, :-1], query_positions))
        boxes_per_layer = torch.stack(boxes_per_layer, dim=2)

        hidden_states = self.match_norm(hidden_states)
        candidates = self.match_query(hidden_states[:, :, :-1])
        loc = nn.functional.normalize(self.match_loc(hidden_states[:, :, -1]), dim=-1)
        # (scenes, locs, queries, width) and (scenes, locs, width) -> (scenes, locs, queries)
        match_logits = (nn.functional.normalize(candidates, dim=-1) * loc.unsqueeze(2)).sum(-1) / self.temperature
        no_target_logit = (loc * nn.functional.normalize(self.no_target(), dim=-1)).sum(-1) / self.temperature
        if proposals is None:
            boxes = boxes_per_layer[:, :, -1]
        else:
            boxes = proposals.unsqueeze(1).expand(-1, num_locs, -1, -1)
        query_mask = query_mask.unsqueeze(1).expand(-1, num_locs, -1)
        return {
            "boxes": boxes,
            "boxes_per_layer": boxes_per_layer,
            "match_logits": match_logits.masked_fill(~query_mask, MASKED_LOGIT),
            "no_target_logit": no_target_logit,
            "query_positions": query_positions.unsqueeze(1).expand(-1, num_locs, -1, -1),
            "query_mask": query_mask,
        }


@torch.no_grad()
def place_proposals(
    boxes: torch.Tensor | None,
    mask: torch.Tensor | None,
    annotation_from_world: torch.Tensor | None,
    scene: VidLLMScene,
    device: torch.device,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Given proposals as the decoder takes them.

    Args:
        boxes (`torch.Tensor` of shape `(batch, M, 6)`, *optional*): `(cx, cy, cz, dx, dy, dz)` in the reconstruction's unit; room frame, or
            annotation frame.
        mask (`torch.Tensor` of shape `(batch, M)`, *optional*): Real proposals.
        annotation_from_world (`torch.Tensor` of shape `(batch, 4, 4)`, *optional*): Rigid, from the first camera: says that the boxes are in the
            annotation frame.
        scene (`VidLLMScene`): Of the batch.
        device (`torch.device`): Of the decoder's inputs.

    Returns:
        `tuple`: boxes `(batch, M, 6)`, float32, room frame, position units; the mask as bool, or None. Both None where no boxes are given.

    Raises:
        ValueError: A shape is not as said, or there is a frame and no boxes.

    Source:
        Ours: a model that is trained predicts the room frame on its way, so that nobody can turn annotated boxes into it beforehand.
    """
    if boxes is None:
        if annotation_from_world is not None:
            raise ValueError("annotation_from_world: wanted together with proposal_boxes; got it without")
        return None, None
    batch = scene.num_scenes
    if boxes.ndim != 3 or boxes.shape[::2] != (batch, 6):
        raise ValueError(
            f"proposal_boxes: wanted shape ({batch}, proposals, 6), one row per video; got {tuple(boxes.shape)}"
        )
    if mask is not None and mask.shape != boxes.shape[:2]:
        raise ValueError(f"proposal_mask: wanted shape {tuple(boxes.shape[:2])}; got {tuple(mask.shape)}")
    boxes, mask = boxes.float().to(device), None if mask is None else mask.bool().to(device)
    if annotation_from_world is not None:
        if tuple(annotation_from_world.shape) != (batch, 4, 4):
            raise ValueError(
                f"annotation_from_world: wanted shape ({batch}, 4, 4), one per video; got {tuple(annotation_from_world.shape)}"
            )
        room_from_world = scene.reconstruction.room_from_world.float().to(device)
        boxes = boxes_room_from_annotation(boxes, annotation_from_world.float().to(device), room_from_world)
    # the decoder thinks in position units; what comes in and goes out is in the reconstruction's
    return boxes * scene.position_scale.to(device)[:, None, None], mask


@torch.no_grad()
def select_boxes(
    grounding: VidLLMGroundingOutput, max_boxes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best boxes of each `<loc>`, best first, without those that overlap a better one by an IoU over 0.25.

    Whether anything matches at all is left to the caller: compare the best score with the no-target score.

    Args:
        grounding (`VidLLMGroundingOutput`): Of the decoder.
        max_boxes (`int`): Most boxes per `<loc>`, at least 1.

    Returns:
        `tuple`: `boxes (num_locs, max_boxes, 6)` in the frame and unit of the decoder's, zero where there is none;
        `scores (num_locs, max_boxes)`, probabilities over queries and no target, 0 where there is none;
        `no_target_scores (num_locs,)`; `keep_mask (num_locs, max_boxes)` bool, True for boxes that exist, which come
        first.

    Source:
        Upstream: LLaVA-3D supplement takes the single best query. Ours: several boxes, suppression, no target; ties
        go to the lowest query.
    """
    boxes, query_mask = grounding.boxes.float(), grounding.query_mask
    logits = torch.cat([grounding.match_logits, grounding.no_target_logit.unsqueeze(1)], dim=1)
    probabilities = logits.float().softmax(dim=1)
    rows = torch.arange(boxes.shape[0], device=boxes.device)
    # -1 for queries that do not exist, are chosen, or overlap a chosen one.
    remaining = probabilities[:, :-1].masked_fill(~query_mask, -1.0)
    chosen_boxes, chosen_scores = [], []
    for _ in range(max_boxes):
        best = remaining.argmax(dim=1)
        chosen_boxes.append(boxes[rows, best])
        chosen_scores.append(remaining[rows, best])
        remaining = remaining.masked_fill(box_iou(boxes, chosen_boxes[-1].unsqueeze(1)) > NMS_IOU, -1.0)
        remaining[rows, best] = -1.0
    chosen_boxes, chosen_scores = torch.stack(chosen_boxes, dim=1), torch.stack(chosen_scores, dim=1)
    keep_mask = chosen_scores >= 0
    return (
        chosen_boxes.masked_fill(~keep_mask.unsqueeze(-1), 0.0),
        chosen_scores.masked_fill(~keep_mask, 0.0),
        probabilities[:, -1],
        keep_mask,
    )


__all__ = ["VidLLMGroundingDecoder", "VidLLMGroundingOutput", "place_proposals", "select_boxes"]
