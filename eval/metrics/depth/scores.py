"""Errors of depth maps under several alignments, one alignment for all frames of a scene.

Depth in float32 is scored in float32 with PyTorch, as the reference does: where the reweighted steps of `scale` meet a pixel almost exactly,
its weight is set by rounding alone, and only the same arithmetic gives the same number.

Shapes: S frames, H W pixels; N valid pixels of all frames.
"""

import numpy as np
import torch

from vidllm.eval.metrics.answers import check_protocol


PROTOCOLS = ("metric", "median", "scale", "scale_shift")
MAX_DEPTH_M = 80.0
# What a prediction that is not positive counts as in ratios and logarithms.
LEAST_DEPTH_M = 1e-5
LEAST_SCALE = 1e-3
_SCALE_STEPS, _SCALE_EPSILON = 10, 1e-8


def _same_kind(predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in float32 if neither is wider, else in float64."""
    predicted, true = np.asarray(predicted), np.asarray(true)
    narrow = (np.float16, np.float32)
    kind = np.float32 if predicted.dtype in narrow and true.dtype in narrow else np.float64
    return predicted.astype(kind), true.astype(kind)


def align_depth(predicted: np.ndarray, true: np.ndarray, protocol: str) -> np.ndarray:
    """Predicted depth after the alignment of a protocol.

    Args:
        predicted (`np.ndarray` of shape `(N,)`): Finite depth, any unit.
        true (`np.ndarray` of shape `(N,)`): Metres, positive.
        protocol (`str`): `metric`: as it is. `median`: times the ratio of (lower) medians. `scale`: times the factor of least absolute
            error, by ten reweighted steps from the ratio of means. `scale_shift`: factor and offset of least squares.

    Returns:
        `np.ndarray` of shape `(N,)`: metres; float32 if both are float32 or float16, else float64.

    Raises:
        ValueError: An unknown protocol.

    Source:
        Upstream: CUT3R/CUT3R@8bc15dc eval/video_depth/tools.py; a negative median turns depth around (`median`), a negative factor becomes the
        least one (`scale`). Ours: where the factor is not finite (a median, mean or all of it 0), depth is left as it is; upstream gives infinite or
        undefined scores there.
    """
    check_protocol("depth", protocol, PROTOCOLS)
    predicted, true = _same_kind(predicted, true)
    if protocol == "metric":
        return predicted
    if protocol == "scale_shift":
        columns = np.stack([predicted, np.ones_like(predicted)], axis=1)
        (factor, offset), *_ = np.linalg.lstsq(columns, true, rcond=None)
        return factor * predicted + offset
    values, wanted = torch.from_numpy(predicted), torch.from_numpy(true)
    if protocol == "median":
        factor = wanted.median() / values.median()
        return (factor * values).numpy() if factor.isfinite() else predicted
    factor = wanted.mean() / values.mean()
    for _ in range(_SCALE_STEPS):
        weights = 1 / ((factor * values - wanted).abs() + _SCALE_EPSILON)
        factor = (weights * values * wanted).sum() / (weights * values**2).sum()
    return (factor.clamp(min=LEAST_SCALE) * values).numpy() if factor.isfinite() else predicted


def depth_errors(
    predicted: np.ndarray, true: np.ndarray, protocol: str = "metric", max_depth_m: float | None = MAX_DEPTH_M
) -> dict[str, float]:
    """All measures of one scene's depth maps.

    Args:
        predicted (`np.ndarray` of shape `(S, H, W)`): Depth along the optical axis; what is not finite counts as 0.
        true (`np.ndarray` of shape `(S, H, W)`): Metres; 0, negative or not finite = invalid.
        protocol (`str`): Alignment, see `align_depth`.
        max_depth_m (`float`, *optional*): True depth from here on is left out.

    Returns:
        `dict[str, float]`: with p predicted and g true: `abs_rel`, mean of |p - g| / g; `sq_rel_m`, mean of (p - g)^2 / g, metres; `rmse_m`, root mean
        square of p - g, metres; `log_rmse`, root mean square of log p - log g, p at least 1e-5; `delta_1`, `delta_2`, `delta_3`, share of
        pixels with a ratio below 1.25, 1.25^2, 1.25^3 either way; `valid_pixels`, their number. Without valid pixels nothing.

    Raises:
        ValueError: Other shapes, or an unknown protocol.

    Source:
        Upstream: CUT3R/CUT3R@8bc15dc eval/video_depth/tools.py. Ours: without valid pixels there is no score (upstream: zeros, the best error).
    """
    check_protocol("depth", protocol, PROTOCOLS)
    predicted, true = _same_kind(predicted, true)
    if predicted.shape != true.shape:
        raise ValueError(f"depth: wanted predicted and true depth of one shape; got {predicted.shape}, {true.shape}")
    valid_mask = np.isfinite(true) & (true > 0)
    if max_depth_m is not None:
        valid_mask &= true < max_depth_m
    if not valid_mask.any():
        return {}
    wanted = true[valid_mask]
    aligned = align_depth(np.nan_to_num(predicted[valid_mask], nan=0.0, posinf=0.0, neginf=0.0), wanted, protocol)
    values, wanted = torch.from_numpy(aligned), torch.from_numpy(wanted)
    off = values - wanted
    positive = values.clamp(min=LEAST_DEPTH_M)
    ratio = torch.maximum(positive / wanted, wanted / positive)
    return {
        "abs_rel": float((off.abs() / wanted).mean()),
        "sq_rel_m": float((off**2 / wanted).mean()),
        "rmse_m": float((off**2).mean().sqrt()),
        "log_rmse": float(((positive.log() - wanted.log()) ** 2).mean().sqrt()),
        **{f"delta_{power}": float((ratio < 1.25**power).double().mean()) for power in (1, 2, 3)},
        "valid_pixels": float(len(wanted)),
    }


def depth_scores(
    predicted: np.ndarray, true: np.ndarray, protocol: str = "metric", max_depth_m: float | None = MAX_DEPTH_M
) -> dict[str, float]:
    """The two measures of one scene's depth maps that results are compared by.

    Args:
        predicted (`np.ndarray` of shape `(S, H, W)`): Depth along the optical axis; what is not finite counts as 0.
        true (`np.ndarray` of shape `(S, H, W)`): Metres, 0 = invalid.
        protocol (`str`): Alignment, see `align_depth`.
        max_depth_m (`float`, *optional*): True depth from here on is left out.

    Returns:
        `dict[str, float]`: `abs_rel` and `delta_1` of `depth_errors`; without valid pixels nothing.

    Raises:
        ValueError: Other shapes, or an unknown protocol.

    Source:
        Upstream: CUT3R/CUT3R@8bc15dc eval/video_depth/tools.py.
    """
    errors = depth_errors(predicted, true, protocol, max_depth_m)
    return {name: errors[name] for name in ("abs_rel", "delta_1")} if errors else {}


__all__ = ["MAX_DEPTH_M", "PROTOCOLS", "align_depth", "depth_errors", "depth_scores"]
