"""The scale between relative and metric depth: exact, robust, never NaN."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidllm.modeling_vidllm.metric_depth_vidllm import align_scale


B, S, H, W = 2, 4, 5, 7
BAD = [0.0, -1.0, -math.inf, math.inf, math.nan]
seeds = st.integers(0, 2**31 - 1)


def maps(seed):
    """Relative depth, metric depth (unrelated), confidence above 1."""
    generator = torch.Generator().manual_seed(seed)
    relative, metric_m, confidence = torch.rand(3, B, S, H, W, generator=generator)
    return relative + 0.2, 4 * metric_m + 0.3, 1 + 3 * confidence


def everything(count=S):
    return torch.arange(count).expand(B, count)


def slow_scale(relative, metric_m, confidence, frame_index, pixel_mask=None):
    """The definition, pixel by pixel in double precision."""
    scales, valid = [], []
    for b in range(relative.shape[0]):
        votes = []
        for frame in frame_index[b].tolist():
            if frame < 0:
                continue
            above = below = 0.0
            for y in range(relative.shape[2]):
                for x in range(relative.shape[3]):
                    r, m, w = (t[b, frame, y, x].item() for t in (relative, metric_m, confidence))
                    usable = all(math.isfinite(v) and v > 0 for v in (r, m, w))
                    if usable and (pixel_mask is None or pixel_mask[b, frame, y, x]):
                        above += w * r * m
                        below += w * r * r
            if below > 0:
                votes.append(above / below)
        scales.append(statistics.median_low(votes) if votes else 1.0)
        valid.append(bool(votes))
    return torch.tensor(scales), torch.tensor(valid)


def spoil(tensor, share, seed, values=BAD):
    """Replace a share of the pixels by bad values."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.rand(tensor.shape, generator=generator) < share
    which = torch.randint(len(values), tensor.shape, generator=generator)
    return torch.where(where, torch.tensor(values)[which], tensor)


@given(
    seed=seeds,
    share=st.sampled_from([0.0, 0.1, 0.5, 0.97, 1.0]),
    frames=st.lists(st.integers(-1, S - 1), min_size=B * 3, max_size=B * 3),
    with_mask=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_against_the_slow_version(seed, share, frames, with_mask):
    relative, metric_m, confidence = maps(seed)
    relative, metric_m = spoil(relative, share, seed + 1), spoil(metric_m, share / 2, seed + 2)
    confidence = spoil(confidence, share / 4, seed + 3)
    mask = torch.rand(B, S, H, W, generator=torch.Generator().manual_seed(seed + 4)) < 0.7 if with_mask else None
    index = torch.tensor(frames).view(B, 3)
    scale, valid = align_scale(relative, metric_m, confidence, index, mask)
    expected, expected_valid = slow_scale(relative, metric_m, confidence, index, mask)
    assert scale.dtype == torch.float32
    assert scale.shape == valid.shape == (B,)
    assert torch.equal(valid, expected_valid)
    torch.testing.assert_close(scale, expected, rtol=3e-6, atol=0)


@given(seed=seeds, known=st.floats(1e-3, 1e3), share=st.sampled_from([0.0, 0.6]))
@settings(deadline=None, max_examples=40)
def test_recovers_a_known_scale(seed, known, share):
    relative, _, confidence = maps(seed)
    known = torch.tensor([known, 2.5 * known], dtype=torch.float32)
    metric_m = spoil(known.view(B, 1, 1, 1) * relative, share, seed)
    scale, valid = align_scale(spoil(relative, share / 2, seed + 1), metric_m, confidence, everything())
    assert valid.all()
    torch.testing.assert_close(scale, known, rtol=2e-6, atol=0)


@given(seed=seeds, factor=st.sampled_from([1e-20, 1e-3, 7.0, 1e20]))
@settings(deadline=None, max_examples=30)
def test_only_ratios_of_confidence_matter(seed, factor):
    relative, metric_m, confidence = maps(seed)
    plain, _ = align_scale(relative, metric_m, confidence, everything())
    scaled, valid = align_scale(relative, metric_m, factor * confidence, everything())
    assert valid.all()
    torch.testing.assert_close(scaled, plain, rtol=3e-6, atol=0)


def test_confidence_weighs_the_pixels():
    relative, metric_m = torch.ones(B, 1, 2, 3), torch.ones(B, 1, 2, 3)
    metric_m[:, :, 0, 0] = 5.0
    confidence = torch.ones(B, 1, 2, 3)
    confidence[1, :, 0, 0] = 20.0
    scale, _ = align_scale(relative, metric_m, confidence, everything(1))
    torch.testing.assert_close(scale, torch.tensor([10 / 6, 105 / 25]))


@pytest.mark.parametrize(
    ("votes", "expected"),
    [([3.0, 1.0, 2.0, 8.0], 2.0), ([3.0, 1.0, 2.0], 2.0), ([5.0, 4.0], 4.0), ([7.0], 7.0), ([9.0, 1.0, 1.0], 1.0)],
)
def test_median_is_the_lower_middle(votes, expected):
    relative = torch.rand(B, len(votes), H, W) + 0.5
    metric_m = relative * torch.tensor(votes).view(1, -1, 1, 1)
    scale, _ = align_scale(relative, metric_m, torch.ones_like(relative), everything(len(votes)))
    torch.testing.assert_close(scale, torch.full((B,), expected), rtol=1e-6, atol=0)


def test_one_wild_frame_does_not_move_the_scale():
    relative, _, confidence = maps(1)
    metric_m = 2 * relative
    metric_m[:, 2] *= 1000
    scale, _ = align_scale(relative, metric_m, confidence, everything())
    torch.testing.assert_close(scale, torch.full((B,), 2.0), rtol=1e-6, atol=0)


def test_frames_not_chosen_have_no_vote():
    relative, _, confidence = maps(2)
    factors = torch.tensor([1.0, 2, 3, 4])
    metric_m = relative * factors.view(1, S, 1, 1)
    index = torch.tensor([[3, -1, -1], [-1, 1, 1]])
    scale, valid = align_scale(relative, metric_m, confidence, index)
    assert valid.all()
    torch.testing.assert_close(scale, torch.tensor([4.0, 2.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", ["relative", "metric", "confidence"])
def test_no_usable_pixel_gives_one_and_false(bad, which):
    tensors = dict(zip(("relative", "metric", "confidence"), maps(3), strict=True))
    tensors[which][0] = bad
    scale, valid = align_scale(*tensors.values(), everything())
    assert valid.tolist() == [False, True]
    assert scale[0] == 1
    # The other video does not notice.
    alone, _ = align_scale(*(tensor[1:] for tensor in tensors.values()), everything()[1:])
    torch.testing.assert_close(scale[1:], alone, rtol=1e-6, atol=0)


def test_nothing_chosen_or_all_masked_gives_one_and_false():
    relative, metric_m, confidence = maps(4)
    index = torch.tensor([[-1, -1], [0, 2]])
    scale, valid = align_scale(relative, metric_m, confidence, index)
    assert valid.tolist() == [False, True]
    assert scale[0] == 1
    scale, valid = align_scale(relative, metric_m, confidence, index, torch.zeros(B, S, H, W, dtype=torch.bool))
    assert valid.tolist() == [False, False]
    assert scale.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("relative_unit", "metric_unit"), [(1e30, 1e30), (1e-30, 1e-30), (1e-18, 1e18), (1e18, 1e-18)]
)
def test_extreme_units_neither_overflow_nor_vanish(relative_unit, metric_unit):
    relative, _, confidence = maps(5)
    scale, valid = align_scale(relative_unit * relative, metric_unit * relative, confidence * 1e30, everything())
    assert valid.all()
    torch.testing.assert_close(scale, torch.full((B,), metric_unit / relative_unit), rtol=1e-5, atol=0)


def test_a_scale_beyond_float32_is_no_vote():
    relative, _, confidence = maps(6)
    scale, valid = align_scale(relative * 1e-30, relative * 1e30, confidence, everything())
    assert valid.tolist() == [False, False]
    assert scale.tolist() == [1, 1]


def test_any_finite_input_gives_a_finite_positive_scale():
    values = torch.tensor([1e-45, 1e-38, 1e-20, 1.0, 1e20, 3e38, *BAD])
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(values), (3, B, S, H, W), generator=generator)
        scale, valid = align_scale(*values[picks], everything())
        assert scale.isfinite().all()
        assert (scale > 0).all()
        assert (scale[~valid] == 1).all()


def test_neither_gradient_nor_autocast():
    relative, metric_m, confidence = maps(7)
    plain, _ = align_scale(relative, metric_m, confidence, everything())
    for tensor in (relative, metric_m, confidence):
        tensor.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scale, valid = align_scale(relative, metric_m, confidence, everything())
    assert not scale.requires_grad
    assert valid.all()
    assert torch.equal(scale, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth_metric_m": torch.ones(B, S, H, W + 1)}, "depth_metric_m: wanted"),
        ({"confidence": torch.ones(B, S, H)}, "confidence: wanted"),
        ({"pixel_mask": torch.ones(B, S, 1, 1, dtype=torch.bool)}, "pixel_mask: wanted"),
        ({"frame_index": torch.arange(S)}, "frame_index: wanted"),
        ({"frame_index": torch.zeros(B, 0, dtype=torch.long)}, "frame_index: wanted"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    names = ("depth_relative", "depth_metric_m", "confidence")
    arguments = dict(zip(names, maps(8), strict=True)) | {"frame_index": everything()} | change
    with pytest.raises(ValueError, match=message):
        align_scale(**arguments)
