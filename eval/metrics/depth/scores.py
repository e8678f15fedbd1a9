"""Errors of depth maps under several alignments, one alignment for all frames of a scene.

Shapes: S frames, H W pixels; N valid pixels of all frames.
"""

import numpy as np

from vidllm.eval.metrics.answers import check_protocol


PROTOCOLS = ("metric", "median", "scale", "scale_shift")
MAX_DEPTH_M = 80.0
# What a prediction that is not positive counts as in ratios.
LEAST_DEPTH_M = 1e-5
_SCALE_STEPS = 10


def _lower_median(values: np.ndarray) -> float:
    """The lower of the two middle values."""
    middle = (len(values) - 1) // 2
    return float(np.partition(values, middle)[middle])


def align_depth(predicted: np.ndarray, true: np.ndarray, protocol: str) -> np.ndarray:
    """Predicted depth after the alignment of a protocol.

    Args:
        predicted (`np.ndarray` of shape `(N,)`): Depth, any unit.
        true (`np.ndarray` of shape `(N,)`): Metres, positive.
        protocol (`str`): `metric`: as it is. `median`: times the ratio of (lower) medians. `scale`: times the factor of least absolute
            error, by ten reweighted steps from the ratio of means. `scale_shift`: factor and offset of least squares.

    Returns:
        `np.ndarray` of shape `(N,)`, float64: metres.

    Raises:
        ValueError: An unknown protocol.

    Source:
        Upstream: CUT3R/CUT3R@8bc15dc eval/video_depth/tools.py. Ours: depth whose median (`scale`: all of which) is not
        positive is left as it is.
    """
    check_protocol("depth", protocol, PROTOCOLS)
    predicted, true = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if protocol == "metric":
        return predicted
    if protocol == "median":
        middle = _lower_median(predicted)
        return predicted * (_lower_median(true) / middle) if middle > 0 else predicted
    if protocol == "scale_shift":
        columns = np.stack([predicted, np.ones_like(predicted)], axis=1)
        (factor, offset), *_ = np.linalg.lstsq(columns, true, rcond=None)
        return factor * predicted + offset
    if not (predicted > 0).any():
        return predicted
    factor = true.mean() / predicted.mean()
    for _ in range(_SCALE_STEPS):
        weights = 1 / (np.abs(factor * predicted - true) + 1e-8)
        factor = (weights * predicted * true).sum() / (weights * predicted**2).sum()
    return max(factor, 1e-3) * predicted


def depth_scores(
    predicted: np.ndarray, true: np.ndarray, protocol: str = "metric", max_depth_m: float | None = MAX_DEPTH_M
) -> dict[str, float]:
    """Scores of one scene's depth maps.

    Args:
        predicted (`np.ndarray` of shape `(S, H, W)`): Depth along the optical axis; what is not finite counts as 0.
        true (`np.ndarray` of shape `(S, H, W)`): Metres, 0 = invalid.
        protocol (`str`): Alignment, see `align_depth`.
        max_depth_m (`float`, *optional*): True depth from here on is left out.

    Returns:
        `dict[str, float]`: `abs_rel`, mean of |predicted - true| / true; `delta_1`, share of pixels with a ratio below 1.25 either way;
        without valid pixels nothing.

    Raises:
        ValueError: Other shapes, or an unknown protocol.

    Source:
        Upstream: CUT3R/CUT3R@8bc15dc eval/video_depth/tools.py.
    """
    check_protocol("depth", protocol, PROTOCOLS)
    predicted, true = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if predicted.shape != true.shape:
        raise ValueError(f"depth: wanted predicted and true depth of one shape; got {predicted.shape}, {true.shape}")
    valid_mask = np.isfinite(true) & (true > 0)
    if max_depth_m is not None:
        valid_mask &= true < max_depth_m
    if not valid_mask.any():
        return {}
    values, wanted = np.nan_to_num(predicted[valid_mask], nan=0.0, posinf=0.0, neginf=0.0), true[valid_mask]
    values = align_depth(values, wanted, protocol)
    ratio = np.maximum(values, LEAST_DEPTH_M) / wanted
    return {
        "abs_rel": float((np.abs(values - wanted) / wanted).mean()),
        "delta_1": float((np.maximum(ratio, 1 / ratio) < 1.25).mean()),
    }


__all__ = ["MAX_DEPTH_M", "PROTOCOLS", "align_depth", "depth_scores"]
