"""How far a reconstruction is off in scale, and how far its room frame is turned.

Shapes: S frames, H W pixels.
"""

import numpy as np

from vidllm.eval.metrics.answers import check_protocol


PROTOCOLS = ("metric",)


def scale_error(points_predicted: np.ndarray, points_true: np.ndarray, valid_mask: np.ndarray) -> float | None:
    """Relative error of the mean distance of the points from the first camera.

    Args:
        points_predicted (`np.ndarray` of shape `(..., 3)`): World frame (first camera).
        points_true (`np.ndarray` of shape `(..., 3)`): World frame, metres.
        valid_mask (`np.ndarray` of shape `(...,)`, bool): Pixels with a true point.

    Returns:
        `float`: |s - s_true| / s_true with s the mean distance; None without a valid pixel. Points that are not finite count as lying at
        the camera.

    Raises:
        ValueError: Other shapes, a true point that is not finite, or true points that all lie at the camera.

    Source:
        Upstream: facebookresearch/map-anything@f7ebafb (metric scale).
    """
    a, b = np.asarray(points_predicted, dtype=np.float64), np.asarray(points_true, dtype=np.float64)
    if a.shape != b.shape or a.shape[-1] != 3 or np.shape(valid_mask) != a.shape[:-1]:
        raise ValueError(
            f"metric_scale: wanted points of one shape (..., 3) and a mask; got {a.shape}, {b.shape}, {np.shape(valid_mask)}"
        )
    if not np.any(valid_mask):
        return None
    a = np.nan_to_num(a[valid_mask], nan=0.0, posinf=0.0, neginf=0.0)
    wanted = float(np.linalg.norm(b[valid_mask], axis=-1).mean())
    if not np.isfinite(wanted) or wanted == 0:
        raise ValueError(
            f"metric_scale: wanted finite true points away from the camera; got a mean distance of {wanted} m"
        )
    return abs(float(np.linalg.norm(a, axis=-1).mean()) - wanted) / wanted


def up_error_deg(room_from_world: np.ndarray, annotation_from_world: np.ndarray) -> float:
    """Angle between the predicted and the true upward direction.

    Args:
        room_from_world (`np.ndarray` of shape `(3, 3)`): Predicted rotation to z up.
        annotation_from_world (`np.ndarray` of shape `(3, 3)` or `(4, 4)`): True rotation to z up.

    Returns:
        `float`: degrees, 0..180.

    Source:
        Ours.
    """
    up, wanted = np.asarray(room_from_world)[2, :3], np.asarray(annotation_from_world)[2, :3]
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(up, wanted)), up @ wanted)))


def heading_error_deg(room_from_world: np.ndarray, annotation_from_world: np.ndarray) -> float:
    """Angle about the true vertical between the predicted axes and the walls.

    Args:
        room_from_world (`np.ndarray` of shape `(3, 3)`): Predicted rotation; its x axis is looked at from above.
        annotation_from_world (`np.ndarray` of shape `(3, 3)` or `(4, 4)`): True rotation to axes along the walls.

    Returns:
        `float`: degrees to the nearest of the four quarter turns, 0..45.

    Source:
        Ours: which of the four walls the x axis points to no picture tells.
    """
    annotation_from_room = np.asarray(annotation_from_world)[:3, :3] @ np.asarray(room_from_world).T
    angle = np.degrees(np.arctan2(annotation_from_room[1, 0], annotation_from_room[0, 0]))
    return float(abs((angle + 45) % 90 - 45))


def metric_scale_scores(
    points_predicted: np.ndarray,
    points_true: np.ndarray,
    valid_mask: np.ndarray,
    room_from_world: np.ndarray,
    annotation_from_world: np.ndarray | None,
    protocol: str = "metric",
) -> dict[str, float]:
    """Scores of one scene's scale and room frame.

    Args:
        points_predicted (`np.ndarray` of shape `(S, H, W, 3)`): World frame.
        points_true (`np.ndarray` of shape `(S, H, W, 3)`): World frame, metres.
        valid_mask (`np.ndarray` of shape `(S, H, W)`, bool): Pixels with a true point.
        room_from_world (`np.ndarray` of shape `(3, 3)`): Predicted.
        annotation_from_world (`np.ndarray` of shape `(4, 4)`, *optional*): True; None: not known.
        protocol (`str`): `metric`: nothing is aligned.

    Returns:
        `dict[str, float]`: `scale_error` (where there is a valid pixel), `up_error_deg`, `heading_error_deg` (where the annotation frame is known).

    Raises:
        ValueError: Other shapes, or an unknown protocol.

    Source:
        Ours.
    """
    check_protocol("metric_scale", protocol, PROTOCOLS)
    error = scale_error(points_predicted, points_true, valid_mask)
    scores = {} if error is None else {"scale_error": error}
    if annotation_from_world is not None:
        scores["up_error_deg"] = up_error_deg(room_from_world, annotation_from_world)
        scores["heading_error_deg"] = heading_error_deg(room_from_world, annotation_from_world)
    return scores


__all__ = ["PROTOCOLS", "heading_error_deg", "metric_scale_scores", "scale_error", "up_error_deg"]
