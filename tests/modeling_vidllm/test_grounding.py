"""Grounding decoder: samples and neighbours against loops, the decoder against a slow version, masks, gradients, NMS."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config
from torch import nn

from vidllm.modeling_vidllm.geometry_vidllm import box_iou
from vidllm.modeling_vidllm.grounding_vidllm import (
    VidLLMGroundingDecoder,
    VidLLMGroundingOutput,
    farthest_point_samples,
    nearest_neighbors,
    select_boxes,
)


B, N, D, WIDTH, T = 3, 16, 48, 32, 7
FIELDS = ("boxes", "boxes_per_layer", "match_logits", "no_target_logit", "query_positions", "query_mask")
INDEX = torch.tensor([2, 0, 2, 0, 2])


def build(seed=1, scale=0.2, **changes):
    """A decoder with every parameter random."""
    decoder = VidLLMGroundingDecoder(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return decoder


def inputs(filled=(16, 12, 5), seed=0, num_locs=5):
    """Scenes with different numbers of filled slots; scene 2 has fewer than there are queries."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(N) < torch.tensor(filled)[:, None]
    positions = torch.randn(B, N, 3, generator=generator).mul(2.0).masked_fill(~mask[..., None], 0.0)
    tokens = torch.randn(B, N, D, generator=generator).masked_fill(~mask[..., None], 0.0)
    return torch.randn(num_locs, D, generator=generator), INDEX[:num_locs], tokens, positions, mask


def proposals(count=4, seed=5):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.cat(
        [2 * torch.randn(B, count, 3, generator=generator), torch.rand(B, count, 3, generator=generator) + 0.2], -1
    )
    mask = torch.rand(B, count, generator=generator) > 0.3
    mask[:, :1] = True
    return boxes, mask


def slow_samples(positions, mask, num_samples, start=None):
    """One scene of FPS with plain loops over float32 numbers."""
    valid = mask.nonzero().flatten().tolist()
    if not valid:
        return []

    def squared(a, b):
        return float((positions[a] - b).square().sum())

    centroid = positions[valid].mean(0)
    chosen = [min(valid, key=lambda number: squared(number, centroid)) if start is None else start]
    while len(chosen) < min(num_samples, len(valid)):
        rest = [number for number in valid if number not in chosen]
        chosen.append(max(rest, key=lambda n: (min(squared(n, positions[c]) for c in chosen), -n)))
    return chosen


@settings(max_examples=60, deadline=None)
@given(
    num_points=st.integers(1, 20),
    num_samples=st.integers(1, 25),
    seed=st.integers(0, 999),
    lattice=st.booleans(),
)
def test_farthest_points_equal_the_loop(num_points, num_samples, seed, lattice):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randn(2, num_points, 3, generator=generator)
    if lattice:
        # Many ties and duplicates, and every coordinate and square exact.
        positions = positions.round().clamp(-1, 1)
    mask = torch.rand(2, num_points, generator=generator) > 0.3
    index, sample_mask = farthest_point_samples(positions, mask, num_samples)
    assert index.shape == sample_mask.shape == (2, num_samples)
    for scene in range(2):
        # On a lattice the rounding of the centroid decides ties for the start: check it by its property.
        start = int(index[scene, 0])
        wanted = slow_samples(positions[scene], mask[scene], num_samples, start)
        if wanted:
            valid = positions[scene, mask[scene]]
            to_centroid = (valid - valid.mean(0)).norm(dim=-1).min()
            assert (positions[scene, start] - valid.mean(0)).norm() <= to_centroid + 1e-5
            assert mask[scene, start]
        assert index[scene, : len(wanted)].tolist() == wanted
        assert len(set(wanted)) == len(wanted)
        assert sample_mask[scene].tolist() == [True] * len(wanted) + [False] * (num_samples - len(wanted))


def test_farthest_points_start_at_the_lowest_of_equally_near_points():
    # Centroid exactly (0, 0, 0), four points at the same distance, one farther pair.
    positions = torch.tensor(
        [[4.0, 0, 0], [0, 1, 0], [0, -1, 0], [-4, 0, 0], [0, 0, 1], [0, 0, -1], [9, 9, 9], [9, 9, 9]]
    )
    mask = torch.tensor([[True] * 6 + [False] * 2])
    index, sample_mask = farthest_point_samples(positions[None], mask, 8)
    assert index[0, :4].tolist() == [1, 0, 3, 2]
    assert sample_mask[0].tolist() == [True] * 6 + [False] * 2


def test_farthest_points_cover_the_room():
    positions = 3 * torch.rand(1, 500, 3, generator=torch.Generator().manual_seed(0))
    index, _ = farthest_point_samples(positions, torch.ones(1, 500, dtype=torch.bool), 32)
    to_samples = torch.cdist(positions[0], positions[0, index[0]]).amin(1).max()
    between = torch.cdist(positions[0, index[0]], positions[0, index[0]]) + 99 * torch.eye(32)
    assert between.min() >= to_samples, "the property that defines farthest-point sampling"


@settings(max_examples=40, deadline=None)
@given(num_points=st.integers(1, 12), wanted=st.integers(1, 15), seed=st.integers(0, 999), lattice=st.booleans())
def test_neighbors_equal_the_loop(num_points, wanted, seed, lattice):
    generator = torch.Generator().manual_seed(seed)
    positions, queries = (torch.randn(count, 3, generator=generator) for count in (num_points, 5))
    if lattice:
        positions, queries = positions.round(), queries.round()
    mask = torch.rand(num_points, generator=generator) > 0.3
    index, neighbor_mask = nearest_neighbors(queries, positions, mask, wanted)
    assert index.shape == (5, min(wanted, num_points))
    for row, query in enumerate(queries):
        distance = {n: float((query - positions[n]).square().sum()) for n in range(num_points) if mask[n]}
        nearest = sorted(distance, key=lambda n: (distance[n], n))[:wanted]
        count = int(neighbor_mask[row].sum())
        assert count == len(nearest)
        assert index[row, :count].tolist() == nearest
        assert neighbor_mask[row, :count].all()


def heads_of(vector, number):
    return vector.view(number, -1)


def slow_decoder(decoder, loc, tokens, positions, mask, centres, centre_mask):
    """One loc in one scene, query by query, head by head; the same weights, none of the batching."""
    heads = 4
    scene = decoder.scene_proj(decoder.scene_norm(tokens))
    encoding = decoder.query_encoding.mlp(centres / 2.0)
    loc = decoder.loc_proj(decoder.loc_norm(loc))
    existing = mask.nonzero().flatten().tolist()
    nearest = [min(existing, key=lambda n: (float((place - positions[n]).square().sum()), n)) for place in centres]
    queries = scene[nearest]
    layer_boxes = []
    for k, layer, head in zip(decoder.num_neighbors, decoder.layers, decoder.box_heads, strict=True):
        cross, updated = layer.neighbor_attention, []
        for query, place, code in zip(queries, centres, encoding, strict=True):
            distance = {n: float((place - positions[n]).square().sum()) for n in mask.nonzero().flatten().tolist()}
            near = sorted(distance, key=lambda n: (distance[n], n))[:k]
            asked = heads_of(cross.q_proj(cross.norm(query + code)), heads)
            read = [scene[n] + cross.offset_mlp.mlp((positions[n] - place) / 0.5) for n in near]
            result = []
            for h in range(heads):
                scores = torch.stack([asked[h] @ heads_of(cross.k_proj(r), heads)[h] for r in read])
                weights = (scores / math.sqrt(WIDTH / heads)).softmax(0)
                result.append(sum(w * heads_of(cross.v_proj(r), heads)[h] for w, r in zip(weights, read, strict=True)))
            updated.append(query + cross.o_proj(torch.cat(result)))
        queries = torch.stack(updated)

        attention = layer.self_attention
        normed = [attention.norm(query + code) for query, code in zip(queries, encoding, strict=True)]
        normed.append(attention.norm(loc))
        states, real = [*queries, loc], [*centre_mask.tolist(), True]
        updated = []
        for i in range(len(states)):
            result = []
            for h in range(heads):
                scores, values = [], []
                for j in range(len(states)):
                    if not real[j]:
                        continue
                    score = (
                        heads_of(attention.q_proj(normed[i]), heads)[h]
                        @ heads_of(attention.k_proj(normed[j]), heads)[h]
                    )
                    score = score / math.sqrt(WIDTH / heads)
                    if i < len(queries) and j < len(queries):
                        sigma = nn.functional.softplus(attention.sigma_proj(normed[i]))[h]
                        score = score - sigma * (centres[i] - centres[j]).norm()
                    scores.append(score)
                    values.append(heads_of(attention.v_proj(normed[j]), heads)[h])
                weights = torch.stack(scores).softmax(0)
                result.append(sum(w * v for w, v in zip(weights, values, strict=True)))
            updated.append(states[i] + attention.o_proj(torch.cat(result)))
        updated = [state + layer.mlp(layer.norm_mlp(state)) for state in updated]
        queries, loc = torch.stack(updated[:-1]), updated[-1]
        raw = head.mlp(head.norm(queries))
        layer_boxes.append(torch.cat([centres + raw[:, :3], raw[:, 3:].clamp(-4.6, 3.0).exp()], -1))
    asked = decoder.match_loc(decoder.match_norm(loc))
    logits = nn.functional.cosine_similarity(decoder.match_query(decoder.match_norm(queries)), asked[None], dim=-1)
    nothing = nn.functional.cosine_similarity(decoder.no_target.vector, asked, dim=0)
    return torch.stack(layer_boxes), logits / 0.07, nothing / 0.07


@torch.no_grad()
@pytest.mark.parametrize("with_proposals", [False, True])
def test_equals_the_slow_version(with_proposals):
    decoder = build()
    locs, index, tokens, positions, mask = inputs()
    boxes, boxes_mask = proposals() if with_proposals else (None, None)
    out = decoder(locs, index, tokens, positions, mask, boxes, boxes_mask)
    for g, scene in enumerate(index.tolist()):
        if with_proposals:
            real = boxes_mask[scene]
            centres = boxes[scene, :, :3] * real[:, None]
            torch.testing.assert_close(out.boxes[g], boxes[scene] * real[:, None])
        else:
            chosen = slow_samples(positions[scene], mask[scene], T)
            centres = torch.zeros(T, 3)
            centres[: len(chosen)] = positions[scene, chosen]
            real = torch.arange(T) < len(chosen)
            assert torch.equal(out.boxes[g], out.boxes_per_layer[g, -1])
        layer_boxes, logits, nothing = slow_decoder(
            decoder, locs[g], tokens[scene], positions[scene], mask[scene], centres, real
        )
        assert torch.equal(out.query_mask[g], real)
        torch.testing.assert_close(out.query_positions[g], centres)
        torch.testing.assert_close(out.boxes_per_layer[g][:, real], layer_boxes[:, real], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.match_logits[g, real], logits[real], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.no_target_logit[g], nothing, rtol=1e-4, atol=1e-4)
        assert (out.match_logits[g, ~real] == -1e9).all()


def stand_in(out):
    """Weighted sum of squares on every output that carries a gradient."""
    generator = torch.Generator().manual_seed(3)
    total = 0.0
    for name in ("boxes_per_layer", "match_logits", "no_target_logit"):
        tensor = out[name]
        total = total + (torch.rand(tensor.shape, generator=generator) * tensor.square()).sum()
    return total


@pytest.mark.parametrize("with_proposals", [False, True])
def test_every_parameter_gets_a_gradient(with_proposals):
    decoder = build()
    locs, index, tokens, positions, mask = inputs()
    for tensor in (locs, tokens, positions):
        tensor.requires_grad_()
    out = decoder(locs, index, tokens, positions, mask, *(proposals() if with_proposals else ()))
    stand_in(out).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-4, name
    assert positions.grad is None
    assert (locs.grad.abs().amax(-1) > 0).all()
    assert (tokens.grad[0].abs().amax(-1) > 0).any()
    assert not tokens.grad[1].any(), "no loc asks scene 1"
    assert not tokens.grad[~mask].any(), "empty slots are never read"


def test_the_matching_score_trains_the_last_layers_loc():
    decoder = build()
    data = inputs()
    out = decoder(*data)
    last = decoder.layers[-1]
    gradients = torch.autograd.grad(out.no_target_logit.square().sum(), [*last.parameters()], allow_unused=True)
    reached = {
        name for (name, _), g in zip(last.named_parameters(), gradients, strict=True) if g is not None and g.any()
    }
    assert {"self_attention.q_proj.weight", "self_attention.o_proj.weight", "mlp.fc2.weight"} <= reached
    head = build().box_heads[-1]
    assert not any(
        torch.equal(a, b) for a, b in zip(head.parameters(), decoder.box_heads[0].parameters(), strict=True)
    )


def test_a_loc_alone_equals_the_loc_in_a_batch():
    decoder = build()
    locs, index, tokens, positions, mask = inputs()
    boxes, boxes_mask = proposals()
    for extra in ((), (boxes, boxes_mask)):
        out = decoder(locs, index, tokens, positions, mask, *extra)
        for g, scene in enumerate(index.tolist()):
            row = slice(scene, scene + 1)
            alone = decoder(
                locs[g : g + 1], torch.tensor([0]), tokens[row], positions[row], mask[row], *(t[row] for t in extra)
            )
            for name in FIELDS:
                torch.testing.assert_close(alone[name][0], out[name][g], rtol=1e-5, atol=1e-5)
    # In training all scenes are decoded at once; outside of it other scenes in the batch change no bit.
    together = decoder(locs, index, tokens, positions, mask)
    decoder.eval()
    for name in FIELDS:
        one_by_one = decoder(locs, index, tokens, positions, mask)
        torch.testing.assert_close(together[name], one_by_one[name], rtol=1e-5, atol=1e-5)
    chosen = index == 2
    other = decoder(locs[chosen], index[chosen] - 2, tokens[2:], positions[2:], mask[2:])
    together = decoder(locs, index, tokens, positions, mask)
    for name in FIELDS:
        assert torch.equal(other[name], together[name][chosen])


def test_empty_slots_and_slots_beyond_change_nothing():
    decoder = build()
    locs, index, tokens, positions, mask = inputs()
    out = decoder(locs, index, tokens, positions, mask)
    noisy_tokens = tokens.masked_fill(~mask[..., None], 7.0)
    noisy_positions = positions.masked_fill(~mask[..., None], -3.0)
    noisy = decoder(locs, index, noisy_tokens, noisy_positions, mask)
    assert not torch.equal(noisy_positions, positions)
    for name in FIELDS:
        torch.testing.assert_close(noisy[name], out[name], rtol=1e-5, atol=1e-5)
    # A scene with fewer tokens than neighbours wanted reads what there is.
    few = decoder(locs, index, tokens[:, :2], positions[:, :2], mask[:, :2])
    assert few.query_mask.sum(1).tolist() == [2] * 5
    assert few.match_logits[few.query_mask].isfinite().all()


@pytest.mark.parametrize("with_proposals", [False, True])
def test_no_loc_gives_empty_outputs_that_touch_every_parameter(with_proposals):
    decoder = build()
    locs, index, tokens, positions, mask = inputs()
    tokens.requires_grad_()
    extra = proposals() if with_proposals else ()
    out = decoder(locs[:0], index[:0], tokens, positions, mask, *extra)
    count = 4 if with_proposals else T
    shapes = {name: tuple(out[name].shape) for name in FIELDS}
    assert shapes == {
        "boxes": (0, count, 6),
        "boxes_per_layer": (0, 2, count, 6),
        "match_logits": (0, count),
        "no_target_logit": (0,),
        "query_positions": (0, count, 3),
        "query_mask": (0, count),
    }
    stand_in(out).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert tokens.grad is not None
    boxes, scores, no_target, keep = select_boxes(out, 3)
    assert (boxes.shape, scores.shape, no_target.shape, keep.shape) == ((0, 3, 6), (0, 3), (0,), (0, 3))


def test_no_loc_and_no_scene():
    locs, index, tokens, positions, mask = inputs()
    out = build()(locs[:0], index[:0], tokens[:0], positions[:0], mask[:0])
    assert out.match_logits.shape == (0, T)
    assert out.match_logits.requires_grad


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("how", ["empty scene", "no scene", "proposals all masked", "no proposals"])
def test_nothing_to_choose_from_means_no_target(how, implementation):
    decoder = build()
    for module in decoder.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = implementation
    locs, index, tokens, positions, mask = inputs()
    extra = ()
    nothing = index == 2
    if how == "empty scene":
        mask[2] = False
    elif how == "no scene":
        index = index.masked_fill(nothing, -1)
    else:
        boxes, boxes_mask = proposals(0 if how == "no proposals" else 4)
        if how == "no proposals":
            nothing = torch.ones_like(nothing)
        else:
            boxes_mask[2] = False
            boxes[2] = float("nan")
        extra = (boxes, boxes_mask)
    out = decoder(locs, index, tokens, positions, mask, *extra)
    stand_in(out).backward()
    assert all(parameter.grad.isfinite().all() for parameter in decoder.parameters() if parameter.grad is not None)
    for name in FIELDS:
        assert out[name].isfinite().all(), name
    assert not out.query_mask[nothing].any()
    assert out.query_mask[~nothing].any(1).all()
    boxes, scores, no_target, keep = select_boxes(out, 3)
    assert not keep[nothing].any()
    assert (no_target[nothing] == 1).all()
    assert not boxes[nothing].any()
    assert not scores[nothing].any()
    assert keep[~nothing].any(1).all()
    assert (no_target[~nothing] < 1).all()


def test_stray_positions_and_huge_states_stay_finite():
    decoder = build()
    locs, index, tokens, positions, mask = inputs()
    positions[2, 1] = 1e30
    positions[0, 3, 1] = -3e38
    out = decoder(100 * locs, index, 100 * tokens, positions, mask)
    select = select_boxes(out, 3)
    assert out.match_logits.isfinite().all()
    assert select[1].isfinite().all()
    out.match_logits.masked_fill(~out.query_mask, 0).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in decoder.parameters() if parameter.grad is not None)


def test_bfloat16_inputs_and_autocast_run_in_float32():
    decoder = build()
    locs, index, tokens, positions, mask = inputs()
    locs, tokens = locs.bfloat16(), tokens.bfloat16()
    wanted = decoder(locs.float(), index, tokens.float(), positions, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = decoder(locs, index, tokens, positions, mask)
    for name in FIELDS:
        assert torch.equal(got[name], wanted[name])
    assert got.boxes.dtype == got.match_logits.dtype == torch.float32


def test_sdpa_equals_eager_and_checkpointing_changes_nothing():
    results = []
    for implementation, checkpointing in (("eager", False), ("sdpa", False), ("eager", True)):
        decoder = build().train()
        for module in decoder.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = implementation
        if checkpointing:
            for layer in decoder.layers:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
                    function, *args, use_reentrant=False
                )
        out = decoder(*inputs())
        stand_in(out).backward()
        results.append([out[name].detach() for name in FIELDS] + [p.grad for p in decoder.parameters()])
    for plain, sdpa, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(sdpa, plain, rtol=1e-3, atol=1e-3)
        assert torch.equal(checkpointed, plain)


def test_bad_scene_index_and_proposals_are_named():
    decoder = build()
    locs, index, tokens, positions, mask = inputs()
    with pytest.raises(ValueError, match="loc_scene_index"):
        decoder(locs, index + 1, tokens, positions, mask)
    with pytest.raises(ValueError, match="loc_scene_index"):
        decoder(locs, index - 3, tokens, positions, mask)
    boxes, boxes_mask = proposals()
    boxes[1, 0, 4] = float("inf")
    with pytest.raises(ValueError, match="proposal_boxes"):
        decoder(locs, index, tokens, positions, mask, boxes, boxes_mask)


def grounding_of(boxes, logits, no_target, query_mask):
    return VidLLMGroundingOutput(
        boxes=boxes,
        boxes_per_layer=boxes[:, None],
        match_logits=logits.masked_fill(~query_mask, -1e9),
        no_target_logit=no_target,
        query_positions=boxes[..., :3],
        query_mask=query_mask,
    )


def slow_select(boxes, probabilities, query_mask, max_boxes):
    """Greedy suppression with a plain loop."""
    kept = []
    for query in sorted(range(len(boxes)), key=lambda q: (-float(probabilities[q]), q)):
        if query_mask[query] and all(box_iou(boxes[query], boxes[other]) <= 0.25 for other in kept):
            kept.append(query)
    return kept[:max_boxes]


@settings(max_examples=60, deadline=None)
@given(num_queries=st.integers(1, 10), max_boxes=st.integers(1, 12), seed=st.integers(0, 9999), ties=st.booleans())
def test_selection_equals_the_loop(num_queries, max_boxes, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(2, num_queries, 6, generator=generator) + torch.tensor([0.0, 0, 0, 0.4, 0.4, 0.4])
    logits = 2 * torch.randn(2, num_queries, generator=generator)
    if ties:
        logits = logits.round()
    query_mask = torch.rand(2, num_queries, generator=generator) > 0.2
    no_target = torch.randn(2, generator=generator)
    got, scores, no_target_scores, keep = select_boxes(grounding_of(boxes, logits, no_target, query_mask), max_boxes)
    assert got.shape == (2, max_boxes, 6)
    for g in range(2):
        real = logits[g].masked_fill(~query_mask[g], -math.inf)
        probabilities = torch.cat([real, no_target[g : g + 1]]).softmax(0)
        kept = slow_select(boxes[g], probabilities, query_mask[g], max_boxes)
        assert keep[g].tolist() == [True] * len(kept) + [False] * (max_boxes - len(kept))
        assert torch.equal(got[g, : len(kept)], boxes[g, kept])
        torch.testing.assert_close(scores[g, : len(kept)], probabilities[kept])
        assert not got[g, len(kept) :].any()
        torch.testing.assert_close(no_target_scores[g], probabilities[-1])


def test_selection_keeps_separate_boxes_and_drops_copies():
    chair, other_chair = torch.tensor([0.0, 0, 0, 1, 1, 1]), torch.tensor([3.0, 0, 0, 1, 1, 1])
    boxes = torch.stack([chair, chair + 0.01, other_chair, other_chair - 0.01, torch.zeros(6)])[None]
    logits = torch.tensor([[2.0, 3.0, 1.0, 0.5, 0.0]])
    mask = torch.tensor([[True, True, True, True, True]])
    got, scores, no_target, keep = select_boxes(grounding_of(boxes, logits, torch.tensor([9.0]), mask), 4)
    assert keep[0].tolist() == [True, True, True, False]
    assert torch.equal(got[0, 0], boxes[0, 1])
    assert torch.equal(got[0, 1], boxes[0, 2])
    assert not got[0, 2].any(), "a box without volume overlaps nothing, not even itself, and is returned once"
    assert no_target[0] > 0.9 > 0.1 > scores[0, 0]
