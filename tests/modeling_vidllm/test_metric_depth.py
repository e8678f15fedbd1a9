"""Metric depth: fresh bins, ordinal probabilities, levels, chunks, gradients."""

import itertools
import math

import numpy as np
import pytest
import torch
from tiny import tiny_config
from torch import nn
from torch.utils.checkpoint import checkpoint

from vidllm.modeling_vidllm.metric_depth_vidllm import (
    FLOOR_FRACTION,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    VidLLMMetricBins,
    VidLLMMetricDepth,
    VidLLMMetricProbabilities,
    spread_frames,
)


B, S, C = 2, 3, 32
GRID_HW, SIZE_HW = (3, 5), (42, 70)


def fresh(**changes):
    """A model as `_init_weights` leaves it: layers drawn, children before parents."""
    config = tiny_config(**changes)

    def initialise(module):
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=config.initializer_range)
            nn.init.zeros_(module.bias)
        if hasattr(module, "init_weights"):
            module.init_weights()

    return VidLLMMetricDepth(config).apply(initialise)


def randomised(**changes):
    """Every parameter random, so that zero-initialised layers hide nothing."""
    model = fresh(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            # Variance kept from layer to layer: what explodes also magnifies rounding.
            spread = 0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(spread * torch.randn(parameter.shape))
    return model


def layers(grid_hw=GRID_HW, batch=B, frames=S):
    return tuple(torch.randn(batch, frames, grid_hw[0] * grid_hw[1], C) for _ in range(4))


# ---- bins


@pytest.mark.parametrize(("num_bins", "low", "high"), [(64, 0.1, 10.0), (12, 0.05, 80.0), (2, 0.001, 300.0)])
def test_fresh_centres_are_log_spaced(num_bins, low, high):
    bins = VidLLMMetricBins(tiny_config(num_depth_bins=num_bins, min_depth_m=low, max_depth_m=high))
    built = bins.raw_centres.detach().clone()
    with torch.no_grad():
        bins.raw_centres.fill_(7.0)
    bins.init_weights()
    assert torch.equal(bins.raw_centres, built)
    torch.testing.assert_close(bins().double(), torch.tensor(np.geomspace(low, high, num_bins)), rtol=2e-6, atol=0)


def test_one_bin_is_allowed():
    model = randomised(num_depth_bins=1)
    assert model(layers(), GRID_HW, SIZE_HW).isfinite().all()


def test_offset_is_added_in_metres_far_away_and_never_crosses_the_floor():
    bins = VidLLMMetricBins(tiny_config(num_depth_bins=12))
    base = bins()
    offset = torch.full((2, 12, 3, 4), 0.5)
    moved = bins(offset)
    assert moved.shape == (2, 12, 3, 4)
    assert (moved > base.view(1, -1, 1, 1)).all()
    torch.testing.assert_close(moved[0, -1, 0, 0], base[-1] + 0.5, rtol=1e-3, atol=0)
    low = bins(torch.full((2, 12, 3, 4), -1e6))
    assert (low >= FLOOR_FRACTION * tiny_config().min_depth_m * 0.999).all()


def test_a_fresh_model_has_the_base_centres_everywhere():
    model, seen = fresh(dense_frame_chunk=2), []
    base = model.decoder.bins().view(1, -1, 1, 1)
    model.decoder.bins.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(layers(), GRID_HW, SIZE_HW)
    for centres in seen:
        torch.testing.assert_close(centres, base.expand_as(centres), rtol=1e-6, atol=0)
    assert len(seen) == 3


# ---- probabilities


def probabilities_of(num_bins, logit, raw_temperature):
    module = VidLLMMetricProbabilities(tiny_config(num_depth_bins=num_bins), 8)
    nn.init.zeros_(module.out.weight)
    with torch.no_grad():
        module.out.bias.copy_(torch.tensor([logit, raw_temperature]))
    return module(torch.randn(2, 8, 3, 5)).detach()


@pytest.mark.parametrize("num_bins", [1, 2, 12, 64])
@pytest.mark.parametrize(("logit", "raw_temperature"), [(0.0, 0.0), (-1.3, 0.4), (2.0, -0.5), (0.7, 3.0)])
def test_probabilities_against_exact_binomials(num_bins, logit, raw_temperature):
    p = 1 / (1 + math.exp(-logit))
    fraction = 1 / (1 + math.exp(-raw_temperature))
    temperature = MIN_TEMPERATURE ** (1 - fraction) * MAX_TEMPERATURE**fraction
    n = num_bins - 1
    mass = np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(num_bins)])
    expected = np.power(mass / mass.max(), 1 / temperature)
    expected = torch.tensor(expected / expected.sum(), dtype=torch.float32)
    found = probabilities_of(num_bins, logit, raw_temperature)
    assert found.shape == (2, num_bins, 3, 5)
    torch.testing.assert_close(found[1, :, 2, 3], expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("num_bins", [64, 300])
@pytest.mark.parametrize("logit", [-300.0, -5.0, 0.3, 40.0, 300.0])
@pytest.mark.parametrize("raw_temperature", [-200.0, 0.0, 200.0])
def test_probabilities_stay_ordinal_and_finite(num_bins, logit, raw_temperature):
    found = probabilities_of(num_bins, logit, raw_temperature)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, 3, 5))
    steps = found[0, 1:, 0, 0] - found[0, :-1, 0, 0]
    # One peak: once it falls it never rises again.
    has_fallen = (steps < 0).long().cummax(dim=0).values.bool()
    assert not (has_fallen & (steps > 0)).any()
    assert found[0, :, 0, 0].argmax().item() == pytest.approx((num_bins - 1) / (1 + math.exp(-logit)), abs=1)


# ---- decoder


@pytest.mark.parametrize(
    ("grid_hw", "size_hw"), [((3, 5), (42, 70)), ((2, 3), (28, 42)), ((1, 4), (16, 64)), ((5, 1), (71, 19))]
)
def test_depth_is_metric_positive_and_of_the_image_size(grid_hw, size_hw):
    depth_m = randomised()(layers(grid_hw), grid_hw, size_hw)
    assert depth_m.shape == (B, S, *size_hw)
    assert depth_m.dtype == torch.float32
    assert depth_m.isfinite().all()
    assert (depth_m > 0).all()


def test_depth_stays_positive_under_huge_offsets():
    model = randomised()
    with torch.no_grad():
        for level in model.decoder.levels:
            level.offset_out.bias.fill_(-1e4)
    depth_m = model(layers(), GRID_HW, SIZE_HW)
    assert (depth_m > 0).all()


def test_fresh_depth_lies_between_the_outer_centres():
    depth_m = fresh(min_depth_m=0.5, max_depth_m=4.0)(layers(), GRID_HW, SIZE_HW)
    assert (depth_m >= 0.5 * 0.999).all()
    assert (depth_m <= 4.0 * 1.001).all()


def test_five_levels_from_half_to_eight_times_the_grid():
    model, sizes = fresh(), []
    for level in model.decoder.levels:
        level.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output[0].shape[-2:])))
    model(layers(batch=1, frames=1), GRID_HW, SIZE_HW)
    assert sizes == [(2, 3), (3, 5), (6, 10), (12, 20), (24, 40)]


@pytest.mark.parametrize("index", range(5))
def test_every_level_refines_the_bins(index):
    model, tokens = fresh(), layers()
    before = model(tokens, GRID_HW, SIZE_HW)
    with torch.no_grad():
        model.decoder.levels[index].offset_out.bias.fill_(0.3)
    assert (model(tokens, GRID_HW, SIZE_HW) > before).all()


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
def test_chunks_do_not_change_the_result(chunk):
    model, tokens = randomised(), layers()
    model.frame_chunk = 6
    whole = model(tokens, GRID_HW, SIZE_HW)
    model.frame_chunk = chunk
    # Convolutions round differently for another number of frames; cold temperatures magnify that a little.
    torch.testing.assert_close(model(tokens, GRID_HW, SIZE_HW), whole, atol=0, rtol=2e-5)
    assert randomised(dense_frame_chunk=chunk).frame_chunk == chunk


def test_chunks_bound_the_frames_per_pass():
    model, frames = fresh(dense_frame_chunk=4), []
    model.decoder.register_forward_hook(lambda module, inputs, output: frames.append(output.shape[0]))
    model(layers(), GRID_HW, SIZE_HW)
    assert frames == [4, 2]


def test_frames_are_independent():
    model, tokens = randomised(), layers()
    whole = model(tokens, GRID_HW, SIZE_HW)
    alone = model(tuple(x[1:, 2:] for x in tokens), GRID_HW, SIZE_HW)
    torch.testing.assert_close(alone, whole[1:, 2:], atol=0, rtol=2e-5)


def test_full_precision_under_autocast_and_for_bfloat16_tokens():
    model, tokens = randomised(), tuple(x.bfloat16() for x in layers())
    plain = model(tuple(x.float() for x in tokens), GRID_HW, SIZE_HW)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = model(tokens, GRID_HW, SIZE_HW)
    assert torch.equal(under_autocast, plain)


def test_every_parameter_and_every_layer_gets_gradient():
    model, tokens = randomised(), tuple(x.requires_grad_() for x in layers())
    depth_m = model(tokens, GRID_HW, SIZE_HW)
    (torch.rand_like(depth_m) * depth_m.square()).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    for number, tensor in enumerate(tokens):
        assert (tensor.grad.abs().amax(dim=-1) > 0).all(), f"layer {number}: a patch without gradient"


def test_fresh_model_moves_every_parameter_within_three_steps():
    model, tokens = fresh(), layers()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    target = 1 + torch.rand(B, S, *SIZE_HW)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (model(tokens, GRID_HW, SIZE_HW).log() - target.log()).square().mean().backward()
        optimiser.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, start[name]), name


def test_activation_checkpointing_changes_nothing():
    model, tokens = randomised(dense_frame_chunk=2).train(), layers()
    grads = []
    for enabled in (False, True):
        model.decoder.gradient_checkpointing = enabled
        calls = []
        model.decoder._gradient_checkpointing_func = lambda function, *args, calls=calls: (
            calls.append(1),
            checkpoint(function, *args, use_reentrant=False),
        )[1]
        model.zero_grad()
        model(tokens, GRID_HW, SIZE_HW).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
        assert len(calls) == 3 * enabled
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_learns_depth_from_its_tokens():
    model = fresh()
    tokens, target = layers((2, 3), batch=1, frames=2), torch.tensor([0.6, 4.0]).view(1, 2, 1, 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        loss = (model(tokens, (2, 3), (28, 42)).log() - target.log()).abs().mean()
        loss.backward()
        optimiser.step()
    assert loss < 0.1


def test_tokens_that_do_not_fit_are_named():
    model = fresh()
    with pytest.raises(ValueError, match=r"layer_tokens: wanted 4 tensors of shape \(batch, frames, 3 \* 5"):
        model(layers((2, 3)), GRID_HW, SIZE_HW)
    with pytest.raises(ValueError, match="layer_tokens: wanted 4"):
        model(layers()[:3], GRID_HW, SIZE_HW)


# ---- frames that vote for the scale


@pytest.mark.parametrize("num_frames", [1, 2, 3, 16, 17, 31, 32, 33, 500])
@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_spread_frames(num_frames, count):
    chosen = spread_frames(num_frames, count)
    assert len(chosen) == min(num_frames, count)
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    if len(chosen) > 1:
        assert chosen[-1] == num_frames - 1
        gaps = [b - a for a, b in itertools.pairwise(chosen)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("num_frames", "count"), [(0, 4), (4, 0), (3, -1)])
def test_spread_frames_wants_frames(num_frames, count):
    with pytest.raises(ValueError, match="num_frames, count"):
        spread_frames(num_frames, count)
