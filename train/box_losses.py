"""Losses of the grounding decoder, without batches and weights: which queries answer for which true box, and what follows from it.

Shapes: G `<loc>` tokens, M boxes, T queries, C = 1 + T + M columns.
"""

import torch

from vidllm.modeling_vidllm.geometry_vidllm import box_diou, box_iou
from vidllm.modeling_vidllm.grounding_vidllm import VidLLMGroundingOutput


# A cost that no pair of a query and a box reaches: a box that costs more stays without a query.
_UNMATCHED = 1e5
# From this overlap, the lesser of ScanRefer's two, the proposal that fits a box best stands for it.
_LEAST_IOU = 0.25
# Up to so many boxes all steps are done blindly; for more it pays to wait for the device and look whether any search goes on.
_BLIND_BOXES = 8


def box_losses(
    found: VidLLMGroundingOutput,
    true_boxes: torch.Tensor,
    box_mask: torch.Tensor,
    cost_l1: float = 1.0,
    cost_diou: float = 1.0,
    cost_score: float = 1.0,
    margin: float = 0.3,
    proposal_iou: float | None = None,
) -> dict[str, torch.Tensor]:
    """Boxes of matched queries after every layer, and how well the queries and "no target" are told apart.

    A box is matched with the query that `assign_boxes` gives it, and with all queries that start in it or near it. Which of these see the thing
    itself, and which the floor under it, is for the model to find out: the box must be found by any of them, and each is taught the box as
    much as it is trusted among them. Where the queries are given proposals, overlap alone tells which of them are a box.

    Args:
        found (`VidLLMGroundingOutput`): Of the decoder.
        true_boxes (`torch.Tensor` of shape `(G, M, 6)`): `(cx, cy, cz, dx, dy, dz)` in the frame and unit of the decoder's boxes.
        box_mask (`torch.Tensor` of shape `(G, M)`, bool): Which of them the `<loc>` means.
        cost_l1 (`float`): Weight of the L1 distance when queries are assigned to boxes.
        cost_diou (`float`): Weight of 1 - DIoU.
        cost_score (`float`): Weight of the query's matching probability.
        margin (`float`): How far from a box, along each axis, a query may start that is matched with it; same unit.
        proposal_iou (`float`, *optional*): `found` is of given proposals; a box is matched with those that overlap it by so much, and with the
            one that overlaps it most if that is by 0.25. None: the queries are the decoder's own.

    Returns:
        `dict`: `l1` (sum over the six numbers) and `diou` (1 - DIoU), means over the layers and over the matched queries by their probability
        among them (without gradient), `(G, M)`, 0 where a box has no query; `match` `(G,)`: minus the logarithm of the probability of all
        matched queries of a box together, among all queries and no target, mean over the boxes; of no target where no box is meant; 0 where
        there are boxes and no query.

    Source:
        Upstream: LLaVA-3D supplement (DIoU, InfoNCE between matched queries and `<loc>`), Video-3D-LLM (no target); VoteNet
        (arXiv 1904.09664) for many points that answer for the box they lie in; LaVi-Lab/Video-3D-LLM@3ff70e8 for proposals, of which several may
        be right. Ours: L1, assignment by the last layer for all layers, one
        probability for all matched queries. With the assigned query alone, 44 % of the things of procedural rooms were matched with a query on
        the floor or wall beside them, and which query fits a description was not learned.
    """
    scores = torch.cat([found.match_logits, found.no_target_logit[:, None]], dim=1).float().log_softmax(dim=1)
    boxes = found.boxes_per_layer.float()
    with torch.no_grad():
        wanted = true_boxes[:, :, None]
        if proposal_iou is not None:
            overlap = box_iou(found.boxes[:, None].float(), wanted)  # (G, 1, T, 6) and (G, M, 1, 6) -> (G, M, T)
            overlap = overlap.masked_fill(~found.query_mask[:, None] | ~box_mask[..., None], -1.0)
            most = overlap.amax(dim=2, keepdim=True)
            matched = (overlap >= proposal_iou) | ((overlap == most) & (most >= _LEAST_IOU))
            has_query = matched.any(dim=2)
        else:
            last = boxes[:, -1, None]
            cost = cost_l1 * (last - wanted).abs().sum(-1) + cost_diou * (1 - box_diou(last, wanted))
            query, has_query = assign_boxes(cost - cost_score * scores[:, None, :-1].exp(), box_mask, found.query_mask)
            # (G, 1, T, 3) - (G, M, 1, 3) -> (G, M, T)
            offset = (found.query_positions.float()[:, None] - wanted[..., :3]).abs()
            matched = (offset <= wanted[..., 3:] / 2 + margin).all(-1) & found.query_mask[:, None]
            matched = matched.scatter(2, query[..., None], True) & has_query[..., None]
    of_matched = scores[:, None, :-1].masked_fill(~matched, -torch.inf)
    # A box without a query has none to be trusted; any finite row keeps its gradient finite.
    of_matched = torch.where(has_query[..., None], of_matched, torch.zeros_like(of_matched))
    trust = of_matched.detach().softmax(dim=-1) * matched
    # (G, layers, 1, T, 6) and (G, 1, M, 1, 6) -> (G, layers, M, T)
    guessed, wanted = boxes[:, :, None], true_boxes[:, None, :, None]
    l1, far = (guessed - wanted).abs().sum(-1), 1 - box_diou(guessed, wanted)
    losses = {name: (trust[:, None] * value).sum(-1).mean(1) for name, value in (("l1", l1), ("diou", far))}

    surprise = torch.where(has_query, -of_matched.logsumexp(dim=-1), torch.zeros_like(of_matched[..., 0]))
    per_loc = surprise.sum(1) / has_query.sum(1).clamp(min=1)
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
