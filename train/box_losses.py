"""Losses of the grounding decoder, without batches and weights: which query answers for which true box, and what follows from it.

Shapes: G `<loc>` tokens, M boxes, T queries, C = 1 + T + M columns.
"""

import torch

from vidllm.modeling_vidllm.geometry_vidllm import box_diou
from vidllm.modeling_vidllm.grounding_vidllm import VidLLMGroundingOutput


# A cost that no pair of a query and a box reaches: a box that costs more stays without a query.
_UNMATCHED = 1e5
# Up to so many boxes all steps are done blindly; for more it pays to wait for the device and look whether any search goes on.
_BLIND_BOXES = 8


def box_losses(
    found: VidLLMGroundingOutput,
    true_boxes: torch.Tensor,
    box_mask: torch.Tensor,
    cost_l1: float = 1.0,
    cost_diou: float = 1.0,
    cost_score: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Boxes of matched queries after every layer, and how well the queries and "no target" are told apart.

    Args:
        found (`VidLLMGroundingOutput`): Of the decoder.
        true_boxes (`torch.Tensor` of shape `(G, M, 6)`): `(cx, cy, cz, dx, dy, dz)` in the frame and unit of the decoder's boxes.
        box_mask (`torch.Tensor` of shape `(G, M)`, bool): Which of them the `<loc>` means.
        cost_l1 (`float`): Weight of the L1 distance when queries are matched to boxes.
        cost_diou (`float`): Weight of 1 - DIoU.
        cost_score (`float`): Weight of the query's matching probability.

    Returns:
        `dict`: `l1` (sum over the six numbers) and `diou` (1 - DIoU), means over the layers, `(G, M)`, 0 where a box has no query; `match`
        `(G,)`: cross-entropy over queries and no target, mean over the matched queries, each against all others; of no target where no box
        is meant; 0 where there are boxes and no query.

    Source:
        Upstream: LLaVA-3D supplement (DIoU, InfoNCE between matched queries and `<loc>`), Video-3D-LLM (no target). Ours: L1, matching by the
        last layer for all layers, so that a query keeps its box.
    """
    scores = torch.cat([found.match_logits, found.no_target_logit[:, None]], dim=1).float().log_softmax(dim=1)
    boxes = found.boxes_per_layer.float()
    with torch.no_grad():
        last, wanted = boxes[:, -1, None], true_boxes[:, :, None]
        cost = cost_l1 * (last - wanted).abs().sum(-1) + cost_diou * (1 - box_diou(last, wanted))
        query, matched = assign_boxes(cost - cost_score * scores[:, None, :-1].exp(), box_mask, found.query_mask)
    # (G, layers, T, 6) -> (G, layers, M, 6)
    picked = boxes.gather(2, query[:, None, :, None].expand(-1, boxes.shape[1], -1, 6))
    wanted = true_boxes[:, None]
    losses = {"l1": (picked - wanted).abs().sum(-1).mean(1), "diou": (1 - box_diou(picked, wanted)).mean(1)}
    losses = {name: torch.where(matched, value, torch.zeros_like(value)) for name, value in losses.items()}

    surprise = -scores[:, :-1].gather(1, query)
    per_loc = torch.where(matched, surprise, torch.zeros_like(surprise)).sum(1) / matched.sum(1).clamp(min=1)
    losses["match"] = torch.where(box_mask.any(1), per_loc, -scores[:, -1])
    return losses


@torch.no_grad()
def assign_boxes(
    cost: torch.Tensor, box_mask: torch.Tensor, query_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each box a query of its own, so that the sum of the costs is smallest.

    Args:
        cost (`torch.Tensor` of shape `(G, M, T)`): Cost of each pair; what is not finite counts as very high.
        box_mask (`torch.Tensor` of shape `(G, M)`, bool): Boxes that exist.
        query_mask (`torch.Tensor` of shape `(G, T)`, bool): Queries that exist.

    Returns:
        `tuple`: `query (G, M)` int64, 0 where there is none, and `matched (G, M)` bool: False for boxes that do not exist, or for which there
        are too few queries.

    Source:
        Upstream: shortest augmenting paths with potentials (Kuhn 1955, Jonker and Volgenant 1987). Ours: all rows of the batch in step, so that
        the device is never waited for.
    """
    num_locs, num_boxes, num_queries = cost.shape
    device = cost.device
    if cost.numel() == 0:
        none = torch.zeros(num_locs, num_boxes, dtype=torch.int64, device=device)
        return none, none.bool()
    # MPS has no float64
    cost = cost.to(torch.float32 if device.type == "mps" else torch.float64)
    cost = torch.nan_to_num(cost, nan=_UNMATCHED / 2).clamp(-_UNMATCHED / 2, _UNMATCHED / 2)
    cost = cost.masked_fill(~query_mask[:, None], 2 * _UNMATCHED)
    if num_boxes == 1:
        query, matched = cost.argmin(2), box_mask & query_mask.any(1, keepdim=True)
        return torch.where(matched, query, torch.zeros_like(query)), matched
    # column 0 is where each search starts; behind the queries a column for each box that finds none
    start, spare = cost.new_zeros(num_locs, num_boxes, 1), cost.new_full((num_locs, num_boxes, num_boxes), _UNMATCHED)
    cost = torch.cat([start, cost, spare], dim=2)
    locs, boxes = torch.arange(num_locs, device=device), torch.arange(num_boxes, device=device)
    box_potential, column_potential = torch.zeros_like(cost[:, :, 0]), torch.zeros_like(cost[:, 0])
    box_of = torch.full_like(column_potential, -1, dtype=torch.int64)
    for box in range(num_boxes):
        box_of[:, 0] = box
        column = torch.zeros_like(locs)
        slack = torch.full_like(column_potential, torch.inf)
        came_from = torch.zeros_like(box_of)
        visited = torch.zeros_like(box_of, dtype=torch.bool)
        searching = box_mask[:, box].clone()
        # each step visits one column more; those of earlier boxes are `box` at most
        for _ in range(box + 1):
            visited[locs, column] |= searching
            here = box_of[locs, column].clamp(min=0)
            reduced = cost[locs, here] - box_potential[locs, here, None] - column_potential
            better = ~visited & (reduced < slack) & searching[:, None]
            slack = torch.where(better, reduced, slack)
            came_from = torch.where(better, column[:, None], came_from)
            step, nearest = slack.masked_fill(visited, torch.inf).min(dim=1)
            step = torch.where(searching, step, torch.zeros_like(step))[:, None]
            in_tree = ((box_of[:, None] == boxes[:, None]) & visited[:, None]).any(2)
            box_potential = box_potential + in_tree * step
            column_potential = column_potential - visited * step
            slack = torch.where(visited, slack, slack - step)
            column = torch.where(searching, nearest, column)
            searching = searching & (box_of[locs, column] >= 0)
            if num_boxes > _BLIND_BOXES and not searching.any():
                break
        # back along the path, every column takes the box of the one before
        for _ in range(box + 1):
            before = came_from[locs, column]
            box_of[locs, column] = torch.where(column > 0, box_of[locs, before], box_of[locs, column])
            column = torch.where(column > 0, before, column)
    given = (box_of[:, None, 1 : num_queries + 1] == boxes[:, None]) & box_mask[..., None]
    return given.int().argmax(2), given.any(2)


__all__ = ["assign_boxes", "box_losses"]
