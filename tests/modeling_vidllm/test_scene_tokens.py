"""Scene tokens: voxel pooling against a dictionary of voxels, invariances, gradients, stray points."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config
from torch import nn

from vidllm.modeling_vidllm.scene_tokens_vidllm import (
    VidLLMEmbeddingNorm,
    VidLLMPointEmbedding,
    VidLLMSceneTokens,
    fitting_voxel_keys,
    group_by_voxel,
    patch_positions,
    relative_point_scale,
    segment_means,
    voxel_keys,
)


B, S, ROWS, COLUMNS, PATCH = 2, 3, 2, 3, 14
H, W, C, D, N = ROWS * PATCH, COLUMNS * PATCH, 32, 48, 16


def normalised(points, valid):
    """Points at a median distance of 2."""
    return points * relative_point_scale(points, valid)[:, None, None, None, None]


def build(seed=1, **changes):
    """Scene tokens with every parameter random."""
    module = VidLLMSceneTokens(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def inputs(seed=0, batch=B, frames=S, spread=1.5, holes=0.3):
    """Each patch on its own small surface, in a room of about `spread` metres, with holes."""
    generator = torch.Generator().manual_seed(seed)
    lang = torch.randn(batch, frames, ROWS * COLUMNS, C, generator=generator)
    centres = spread * torch.randn(batch, frames, ROWS, 1, COLUMNS, 1, 3, generator=generator)
    points = centres + 0.02 * torch.randn(batch, frames, ROWS, PATCH, COLUMNS, PATCH, 3, generator=generator)
    confidence = 1.0 + torch.rand(batch, frames, H, W, generator=generator).exp()
    valid = torch.rand(batch, frames, H, W, generator=generator) > holes
    valid[:, 0, :PATCH, :PATCH] = False
    return lang, points.reshape(batch, frames, H, W, 3), confidence, valid


def slow_patch_positions(points, confidence, valid):
    """Pixel by pixel."""
    positions, kept = [], []
    for frame in range(points.shape[0]):
        for row in range(ROWS):
            for column in range(COLUMNS):
                total, weight = np.zeros(3), 0.0
                for y in range(row * PATCH, (row + 1) * PATCH):
                    for x in range(column * PATCH, (column + 1) * PATCH):
                        point, weighs = points[frame, y, x].double().numpy(), float(confidence[frame, y, x])
                        if valid[frame, y, x] and np.isfinite(point).all() and np.isfinite(weighs) and weighs > 0:
                            total, weight = total + weighs * point, weight + weighs
                kept.append(weight > 0)
                positions.append(total / weight if weight > 0 else total)
    return torch.tensor(np.array(positions), dtype=torch.float32), torch.tensor(kept)


def slow_voxels(positions, voxel_size, num_slots):
    """A dictionary from voxel to the patches in it; insertion order is order of sight."""
    k = 0
    while True:
        edge = np.float32(voxel_size * 2.0 ** (k / 4))
        voxels = {}
        for number, position in enumerate(positions.numpy()):
            voxels.setdefault(tuple(np.floor(position / edge + np.float32(0.5)).tolist()), []).append(number)
        if len(voxels) <= num_slots:
            return list(voxels.values()), k
        k += 1


def slow_scene(module, lang, points, confidence, valid):
    """Paper eq. 3-4 and the pooling for one scene, one patch at a time; tokens, positions, filled slots."""
    positions, kept = slow_patch_positions(points, confidence, valid)
    numbers = kept.nonzero().flatten()
    voxels, _ = slow_voxels(positions[numbers], module.voxel_size_m, module.num_scene_tokens)
    tokens, places = torch.zeros(N, D), torch.zeros(N, 3)
    flat = lang.flatten(0, 1)
    for slot, members in enumerate(voxels):
        members = numbers[members]
        feature = torch.zeros(C)
        for member in members:
            patch = flat[member] - flat[member].mean()
            feature = feature + patch / (patch.square().mean() + 1e-5).sqrt() / len(members)
            if module.position_mlp is not None:
                mlp = module.position_mlp.mlp
                feature = feature + mlp.fc2(nn.functional.gelu(mlp.fc1(positions[member] / 2.0))) / len(members)
        projected = module.projector.fc2(nn.functional.gelu(module.projector.fc1(feature)))
        projected = projected / (projected.square().mean() + 1e-6).sqrt()
        tokens[slot] = projected * module.norm.weight * 0.02
        places[slot] = positions[members].mean(0)
    return tokens, places, len(voxels)


@pytest.mark.parametrize("position_embedding", [True, False])
@pytest.mark.parametrize("spread", [0.2, 1.5, 40.0])
def test_equals_the_slow_version(spread, position_embedding):
    module = build(position_embedding=position_embedding)
    lang, points, confidence, valid = inputs(spread=spread)
    out = module(lang, points, confidence, valid, (ROWS, COLUMNS))
    for scene in range(B):
        tokens, positions, filled = slow_scene(module, lang[scene], points[scene], confidence[scene], valid[scene])
        assert out.mask[scene].tolist() == [slot < filled for slot in range(N)]
        torch.testing.assert_close(out.positions_room[scene], positions, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.tokens[scene], tokens, rtol=1e-4, atol=2e-6)
    assert 1 < out.mask.sum() < B * N or spread > 1.0
    assert not out.tokens[~out.mask].any()
    assert not out.positions_room[~out.mask].any()


def test_position_embedding_switch_builds_no_module():
    assert build(position_embedding=False).position_mlp is None
    with_positions, without = build(), build(position_embedding=False)
    without.load_state_dict(
        {name: value for name, value in with_positions.state_dict().items() if "position" not in name}
    )
    data = inputs()
    moved = (with_positions(*data, (ROWS, COLUMNS)).tokens - without(*data, (ROWS, COLUMNS)).tokens).abs().max()
    assert moved > 1e-3


def test_tokens_have_the_size_of_word_embeddings_whatever_the_streams_size():
    module, data = build(scene_token_scale=0.03, projector_hidden_size=70), inputs()
    with torch.no_grad():
        module.norm.init_weights()
    assert module.projector.fc1.out_features == 70
    out = module(*data, (ROWS, COLUMNS))
    sizes = out.tokens[out.mask].square().mean(-1).sqrt()
    torch.testing.assert_close(sizes, torch.full_like(sizes, 0.03), rtol=1e-4, atol=0)
    louder = module(100 * data[0] + 5, *data[1:], (ROWS, COLUMNS))
    torch.testing.assert_close(louder.tokens, out.tokens, rtol=1e-2, atol=1e-4)


def test_embedding_norm_is_a_learned_factor_on_unit_size_in_any_precision():
    norm = VidLLMEmbeddingNorm(tiny_config(scene_token_scale=0.5))
    values = 300 * torch.randn(3, 7, D, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, D))
    wanted = torch.stack([0.5 * row / row.square().mean().sqrt() * norm.weight for row in values.view(-1, D)])
    torch.testing.assert_close(norm(values).view(-1, D), wanted)
    half = norm(values.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), norm(values), rtol=3e-3, atol=1e-3)
    zero = torch.zeros(2, D, requires_grad=True)
    norm(zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_patch_positions_equal_the_slow_version_and_ignore_bad_pixels():
    _, points, confidence, valid = inputs()
    points, confidence, valid = points[0], confidence[0], valid[0]
    points[1, 3, 5, 0], points[1, 20, 30, 2] = float("nan"), float("inf")
    confidence[2, 4, 4], confidence[2, 4, 5], confidence[2, 4, 6] = float("nan"), 0.0, -1.0
    valid[1, 3, 5] = valid[1, 20, 30] = valid[2, 4, 4:7] = True
    positions, kept = patch_positions(points, confidence, valid, (ROWS, COLUMNS))
    wanted, wanted_kept = slow_patch_positions(points, confidence, valid)
    assert torch.equal(kept, wanted_kept)
    assert not kept[0]
    torch.testing.assert_close(positions, wanted, rtol=1e-5, atol=1e-6)
    # Weights count only relative to each other, however large.
    scaled, _ = patch_positions(points, confidence * 1e37, valid, (ROWS, COLUMNS))
    torch.testing.assert_close(scaled, wanted, rtol=1e-5, atol=1e-6)
    # One pixel with nearly all the weight wins.
    confidence[:] = 1e-3
    confidence[:, 7::PATCH, 3::PATCH] = 1e6
    valid[:] = True
    winner, _ = patch_positions(points.nan_to_num(0.0, 0.0), confidence, valid, (ROWS, COLUMNS))
    torch.testing.assert_close(
        winner, points.nan_to_num(0.0, 0.0)[:, 7::PATCH, 3::PATCH].reshape(-1, 3), rtol=0, atol=1e-4
    )


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 60),
    num_slots=st.integers(1, 12),
    spread=st.sampled_from([0.0, 0.05, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_voxels_equal_a_dictionary(count, num_slots, spread, seed):
    positions = spread * torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    keys, k = fitting_voxel_keys(positions, 0.2, num_slots)
    order, lengths = group_by_voxel(keys, num_slots)
    voxels, wanted_k = slow_voxels(positions, 0.2, num_slots)
    assert k == wanted_k
    assert lengths.shape == (num_slots,)
    assert lengths.tolist() == [len(members) for members in voxels] + [0] * (num_slots - len(voxels))
    assert order.tolist() == [member for members in voxels for member in members]


def test_smallest_edge_that_fits_is_found_although_counts_are_not_monotone():
    # Pairs that share a cube at 0.2 m and are cut apart at a slightly larger edge.
    line = torch.zeros(40, 3)
    line[:, 0] = torch.linspace(-9.0, 9.0, 40)
    seen = set()
    for num_slots in range(1, 41):
        _, k = fitting_voxel_keys(line, 0.2, num_slots)
        assert k == slow_voxels(line, 0.2, num_slots)[1]
        seen.add(k)
    assert len(seen) > 5


@pytest.mark.parametrize("num_slots", [1, 2, 16])
@pytest.mark.parametrize("spread", [1e6, 1e12, 3e38])
def test_scattered_points_end_the_search(spread, num_slots):
    positions = (spread * torch.empty(300, 3).uniform_(-1, 1, generator=torch.Generator().manual_seed(2))).clamp(
        -3e38, 3e38
    )
    keys, k = fitting_voxel_keys(positions, 0.2, num_slots)
    assert len(set(keys.tolist())) <= num_slots
    assert 0 <= k <= 4 * 131
    order, lengths = group_by_voxel(keys, num_slots)
    assert lengths.sum() == 300
    assert sorted(order.tolist()) == list(range(300))
    assert segment_means(positions[order], lengths).isfinite().all()


def test_voxel_keys_are_exact_and_share_the_outermost_cell():
    # Cells -3..3 in each axis: all keys differ, and points in the middle and near the faces of a cell agree.
    cells = torch.cartesian_prod(*[torch.arange(-3.0, 4.0)] * 3)
    keys = voxel_keys(0.2 * cells, torch.tensor([0.2, 0.4]))
    assert len(set(keys[0].tolist())) == 7**3
    assert len(set(keys[1].tolist())) == 4**3
    for shift in (-0.09, 0.09):
        assert torch.equal(voxel_keys(0.2 * cells + shift, torch.tensor([0.2])), keys[:1])
    far = torch.zeros(6, 3)
    far[:, 1] = torch.tensor([3e5, 1e9, 1e20, 3e38, -1e9, -1e30])
    key = voxel_keys(far, torch.tensor([0.2]))[0]
    assert len(set(key[:4].tolist())) == len(set(key[4:].tolist())) == 1
    assert not set(key.tolist()) & set(keys[0].tolist())
    assert (key >= 0).all(), "the three cells of a key must not reach into each other"


def test_stray_points_leave_everything_finite():
    lang, points, confidence, valid = inputs()
    points[0, 1] = 1e30
    points[0, 2, :, :, 1] = float("-inf")
    points[1] = float("nan")
    module = build()
    lang.requires_grad_()
    out = module(lang, points, confidence, valid, (ROWS, COLUMNS))
    assert out.tokens.isfinite().all()
    assert out.positions_room.isfinite().all()
    assert out.mask[0].any()
    assert not out.mask[1].any(), "no valid point, no token"
    assert not out.tokens[1].any()
    out.tokens.square().sum().backward()
    assert lang.grad.isfinite().all()
    assert lang.grad[0, 1].abs().max() > 0
    assert not lang.grad[0, 2].any()
    assert not lang.grad[1].any()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_same_input_same_bits_also_alone_and_beside_padding():
    module = build()
    data = inputs()
    out = module(*data, (ROWS, COLUMNS))
    again = module(*data, (ROWS, COLUMNS))
    alone = module(*(tensor[1:] for tensor in data), (ROWS, COLUMNS))
    lang, points, confidence, valid = (torch.cat([tensor, tensor[:, :2]], dim=1) for tensor in data)
    valid[:, S:] = False
    padded = module(lang, points, confidence, valid, (ROWS, COLUMNS))
    for name in ("tokens", "positions_room", "mask"):
        assert torch.equal(out[name], again[name])
        assert torch.equal(out[name][1:], alone[name])
        assert torch.equal(out[name], padded[name])


def test_patch_order_changes_only_the_order_of_the_slots():
    module = build()
    lang, points, confidence, valid = inputs(spread=0.5)
    out = module(lang, points, confidence, valid, (ROWS, COLUMNS))
    order = torch.tensor([4, 0, 5, 2, 1, 3])

    def permute(pixels):
        """Move whole patches inside each frame."""
        tail = pixels.shape[4:]
        patches = pixels.view(B, S, ROWS, PATCH, COLUMNS, PATCH, *tail).transpose(3, 4).flatten(2, 3)[:, :, order]
        return patches.unflatten(2, (ROWS, COLUMNS)).transpose(3, 4).reshape(B, S, H, W, *tail)

    moved = module(lang[:, :, order], permute(points), permute(confidence), permute(valid), (ROWS, COLUMNS))
    assert torch.equal(out.mask.sum(1), moved.mask.sum(1))
    assert (out.mask.sum(1) < S * ROWS * COLUMNS - 1).all(), "some voxels must hold several patches"
    assert not torch.equal(out.positions_room, moved.positions_room)
    for scene in range(B):
        filled = out.mask[scene]
        distance = torch.cdist(out.positions_room[scene, filled], moved.positions_room[scene, filled])
        nearest = distance.argmin(1)
        assert len(set(nearest.tolist())) == int(filled.sum())
        torch.testing.assert_close(
            moved.positions_room[scene, nearest], out.positions_room[scene, filled], rtol=0, atol=1e-6
        )
        torch.testing.assert_close(moved.tokens[scene, nearest], out.tokens[scene, filled], rtol=1e-5, atol=1e-5)


def test_slots_are_in_order_of_first_sight():
    module = build(voxel_size_m=0.001, num_scene_tokens=S * ROWS * COLUMNS)
    lang, points, confidence, valid = inputs(holes=0.0, spread=3.0)
    valid[:] = True
    positions, _ = patch_positions(points[0], confidence[0], valid[0], (ROWS, COLUMNS))
    out = module(lang, points, confidence, valid, (ROWS, COLUMNS))
    torch.testing.assert_close(out.positions_room[0], positions)
    assert out.mask.all()


def test_every_parameter_and_the_tokens_get_a_gradient_and_the_geometry_none():
    module = build()
    lang, points, confidence, valid = inputs()
    lang.requires_grad_()
    points.requires_grad_()
    confidence.requires_grad_()
    out = module(lang, points, confidence, valid, (ROWS, COLUMNS))
    (torch.rand(out.tokens.shape) * out.tokens.square()).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 1e-4, name
    assert points.grad is None
    assert confidence.grad is None
    assert not out.positions_room.requires_grad
    reached = lang.grad.abs().amax(-1) > 0
    assert torch.equal(
        reached.flatten(1),
        torch.stack([patch_positions(points[b], confidence[b], valid[b], (ROWS, COLUMNS))[1] for b in range(B)]),
    )


def test_a_scene_without_any_point_still_touches_every_parameter():
    module = build()
    lang, points, confidence, valid = inputs()
    out = module(lang, points, confidence, torch.zeros_like(valid), (ROWS, COLUMNS))
    assert not out.mask.any()
    out.tokens.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


def test_bfloat16_tokens_keep_float32_voxels():
    data = inputs()
    module = build()
    full = module(*data, (ROWS, COLUMNS))
    lang, *geometry = data
    half = module.to(torch.bfloat16)(lang.bfloat16(), *geometry, (ROWS, COLUMNS))
    assert half.tokens.dtype == torch.bfloat16
    assert half.positions_room.dtype == torch.float32
    assert torch.equal(half.mask, full.mask)
    assert torch.equal(half.positions_room, full.positions_room)
    torch.testing.assert_close(half.tokens.float(), full.tokens, rtol=0.05, atol=0.15)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = build()(*data, (ROWS, COLUMNS))
    assert torch.equal(autocast.positions_room, full.positions_room)


@pytest.mark.parametrize("bad", ["grid", "patches", "points", "confidence", "valid"])
def test_wrong_shapes_are_named(bad):
    lang, points, confidence, valid = inputs()
    grid = (ROWS, COLUMNS)
    if bad == "grid":
        grid = (3, 2)
    elif bad == "patches":
        lang = lang[:, :, :-1]
    elif bad == "points":
        points = points[:, :2]
    elif bad == "confidence":
        confidence = confidence[..., :-1]
    else:
        valid = valid[:1]
    with pytest.raises(ValueError, match="wanted"):
        build()(lang, points, confidence, valid, grid)


def test_relative_points_get_median_distance_two():
    _, points, _, valid = inputs(spread=7.0)
    points[0, 0, 0, 0] = float("nan")
    valid[0, 0, 0, 0] = True
    for factor in (1e-6, 0.3, 1e5):
        scaled = normalised(factor * points, valid)
        for scene in range(B):
            counts = valid[scene] & points[scene].isfinite().all(-1)
            median = scaled[scene][counts].norm(dim=-1).median()
            torch.testing.assert_close(median, torch.tensor(2.0), rtol=1e-5, atol=0)
    scale = relative_point_scale(points, valid)
    torch.testing.assert_close(normalised(points, valid)[1], points[1] * scale[1])
    alone = normalised(points[1:], valid[1:])
    assert torch.equal(alone, normalised(points, valid)[1:])


def test_relative_points_without_a_scale_stay_as_they_are():
    _, points, _, valid = inputs()
    assert torch.equal(normalised(points, torch.zeros_like(valid)), points)
    assert torch.equal(normalised(torch.zeros_like(points), valid), torch.zeros_like(points))
    assert torch.equal(relative_point_scale(torch.full_like(points, float("nan")), valid), torch.ones(B))


def test_fresh_position_mlp_tells_places_apart_beyond_their_direction():
    torch.manual_seed(0)
    module = VidLLMPointEmbedding(tiny_config(position_hidden_size=512))
    nn.init.normal_(module.position_mlp.mlp.fc2.weight, std=0.02)
    nn.init.zeros_(module.position_mlp.mlp.fc2.bias)
    module.position_mlp.init_weights()
    ray = torch.tensor([[0.6, 0.8, 0.1]]) * torch.tensor([[0.5], [1.0], [2.0], [4.0]])
    assert module(ray).shape == (4, D)
    # before the norm, which takes the size away
    embedded = module.position_mlp(ray, torch.float32)
    # Along a ray the embedding must bend: a map that is straight there knows a direction and a length, but no place.
    slope_near, slope_far = embedded[2] - embedded[1], (embedded[3] - embedded[2]) / 2
    assert (slope_far - slope_near).norm() > 0.2 * slope_near.norm()
    nn.init.normal_(module.position_mlp.mlp.fc1.weight, std=0.02)
    nn.init.zeros_(module.position_mlp.mlp.fc1.bias)
    usual = module.position_mlp(ray, torch.float32)
    assert (usual[3] - 3 * usual[2] + 2 * usual[1]).norm() < 0.2 * (usual[2] - usual[1]).norm()
    assert 0.1 < embedded.std() < 3.0
    assert module(ray.unsqueeze(0), dtype=torch.float32).shape == (1, 4, D)


def test_point_embedding_runs_in_the_dtype_that_is_asked_and_saturates():
    torch.manual_seed(0)
    module = VidLLMPointEmbedding(tiny_config())
    points = torch.tensor([[[1.0, -2.0, 0.5], [1e30, 0.0, 0.0], [200.0, 0.0, 0.0]]])
    full = module(points)
    assert torch.equal(full[0, 1], full[0, 2])
    assert full.isfinite().all()
    half = module.to(torch.bfloat16)(points, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.2)
    full[0, 0].square().sum().backward()
    assert module.position_mlp.mlp.fc1.weight.grad is not None
