"""A hand-held camera that walks through a furnished room without touching anything.

Frames: `annotation` is the room's own frame (z up, walls along x and y, floor at z = 0), `cam` is OpenCV's.
"""

from dataclasses import dataclass

import numpy as np


CLEARANCE_M = 0.3


@dataclass(frozen=True)
class CameraTrack:
    """Where the camera was.

    Args:
        annotation_from_cam (`np.ndarray` of shape `(frames, 4, 4)`): Poses, metres.
        horizontal_fov_deg (`float`): Field of view of the whole clip.
        sweep_deg (`float`): Heading covered, without the shake of the hand.

    Source:
        Ours.
    """

    annotation_from_cam: np.ndarray
    horizontal_fov_deg: float
    sweep_deg: float


def poses_from_angles(
    centres: np.ndarray, yaw_rad: np.ndarray, pitch_rad: np.ndarray, roll_rad: np.ndarray
) -> np.ndarray:
    """Poses of a camera by its centre and three angles.

    Args:
        centres (`np.ndarray` of shape `(frames, 3)`): Metres, annotation frame.
        yaw_rad (`np.ndarray` of shape `(frames,)`): Heading, counter-clockwise from +x seen from above.
        pitch_rad (`np.ndarray` of shape `(frames,)`): Upwards positive.
        roll_rad (`np.ndarray` of shape `(frames,)`): About the optical axis.

    Returns:
        `np.ndarray` of shape `(frames, 4, 4)`: `annotation_from_cam`, OpenCV axes of the camera.

    Source:
        Ours.
    """
    forward = np.stack(
        [np.cos(pitch_rad) * np.cos(yaw_rad), np.cos(pitch_rad) * np.sin(yaw_rad), np.sin(pitch_rad)], axis=1
    )
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    down = np.cross(forward, right)
    cos, sin = np.cos(roll_rad)[:, None], np.sin(roll_rad)[:, None]
    poses = np.tile(np.eye(4), (len(centres), 1, 1))
    poses[:, :3, 0], poses[:, :3, 1] = cos * right + sin * down, cos * down - sin * right
    poses[:, :3, 2], poses[:, :3, 3] = forward, centres
    return poses


def clearance(points_xy: np.ndarray, low_xy: np.ndarray, high_xy: np.ndarray, room_xy: np.ndarray) -> np.ndarray:
    """Distance of places on the floor to the nearest obstacle or wall.

    Args:
        points_xy (`np.ndarray` of shape `(..., 2)`): Metres, annotation frame.
        low_xy (`np.ndarray` of shape `(obstacles, 2)`): Rectangles.
        high_xy (`np.ndarray` of shape `(obstacles, 2)`): Rectangles.
        room_xy (`np.ndarray` of shape `(2, 2)`): Lower and upper corner of the room.

    Returns:
        `np.ndarray` of shape `(...)`: metres, 0 inside a rectangle, negative outside of the room.

    Source:
        Ours.
    """
    gap = np.maximum(np.maximum(low_xy - points_xy[..., None, :], points_xy[..., None, :] - high_xy), 0)
    nearest = np.linalg.norm(gap, axis=-1).min(axis=-1, initial=np.inf)
    walls = np.minimum(points_xy - room_xy[0], room_xy[1] - points_xy).min(axis=-1)
    return np.minimum(nearest, walls)


def _wobble(rng: np.random.Generator, phase: np.ndarray, size: float) -> np.ndarray:
    """Slow and fast shake of a hand along a clip, of about this size."""
    slow = np.sin(2 * np.pi * (rng.uniform(0.4, 1.2) * phase + rng.random()))
    fast = np.sin(2 * np.pi * (rng.uniform(3, 6) * phase + rng.random()))
    return size * (0.75 * slow + 0.25 * fast)


def _draw_path(
    rng: np.random.Generator, room_xy: np.ndarray, num_frames: int, walk_m: tuple[float, float], corners: int
) -> np.ndarray:
    """A path of straight legs (frames, 2); nothing is checked."""
    span = room_xy[1] - room_xy[0]
    start = room_xy[0] + CLEARANCE_M + rng.random(2) * (span - 2 * CLEARANCE_M)
    points, heading = [start], rng.uniform(0, 2 * np.pi)
    length = rng.uniform(*walk_m) / corners
    for _ in range(corners):
        points.append(points[-1] + length * np.array([np.cos(heading), np.sin(heading)]))
        heading += rng.uniform(-1.7, 1.7)
    phase = np.linspace(0, corners, num_frames)
    stops = np.arange(corners + 1)
    return np.stack([np.interp(phase, stops, np.array(points)[:, axis]) for axis in range(2)], axis=1)


def film_room(
    rng: np.random.Generator,
    room_low: np.ndarray,
    room_high: np.ndarray,
    boxes_low: np.ndarray,
    boxes_high: np.ndarray,
    num_frames: int,
    sweep_deg: tuple[float, float],
    walk_m: tuple[float, float],
    corners: int = 1,
) -> CameraTrack | None:
    """Choose, among random collision-free tracks, the one that has most furniture in view.

    Args:
        rng (`np.random.Generator`): Source of all choices.
        room_low (`np.ndarray` of shape `(3,)`): Corners of the room, metres, annotation frame.
        room_high (`np.ndarray` of shape `(3,)`): Corners of the room, metres, annotation frame.
        boxes_low (`np.ndarray` of shape `(objects, 3)`): Boxes of what stands in it.
        boxes_high (`np.ndarray` of shape `(objects, 3)`): Boxes of what stands in it.
        num_frames (`int`): Frames to film.
        sweep_deg (`tuple` of `float`): Least and greatest heading to cover.
        walk_m (`tuple` of `float`): Least and greatest length of the path.
        corners (`int`): Straight legs of the path.

    Returns:
        `CameraTrack`, or `None` where no track keeps its distance.

    Source:
        Ours.
    """
    room_xy = np.stack([room_low[:2], room_high[:2]])
    centres = (boxes_low + boxes_high) / 2
    phase = np.linspace(0, 1, num_frames)
    best, best_score, found = None, -np.inf, 0
    for attempt in range(240):
        # The longer nothing is found, the shorter the walk: a full room has little space.
        shrink = 1.0 if attempt < 80 else 0.5 if attempt < 160 else 0.2
        path = _draw_path(rng, room_xy, num_frames, (walk_m[0] * shrink, walk_m[1] * shrink), corners)
        path = path + np.stack([_wobble(rng, phase, 0.015), _wobble(rng, phase, 0.015)], axis=1)
        fov, sweep = rng.uniform(55, 80), rng.uniform(sweep_deg[0] + 1, sweep_deg[1] - 1)
        target = centres[rng.integers(len(centres))]
        towards = np.arctan2(target[1] - path[0, 1], target[0] - path[0, 0])
        turn = rng.choice([-1.0, 1.0])
        lead = rng.uniform(0.1, 0.9)
        if clearance(path, boxes_low[:, :2], boxes_high[:, :2], room_xy).min() < CLEARANCE_M:
            continue
        yaw = towards + turn * np.radians(sweep) * (phase - lead)
        height = rng.uniform(1.2, 1.7) + _wobble(rng, phase, 0.05)
        pitch = np.radians(rng.uniform(-27, -9) + _wobble(rng, phase, 3))
        spots = np.concatenate([path, np.minimum(height, room_high[2] - 0.3)[:, None]], axis=1)
        seen = np.linspace(0, num_frames - 1, 8).astype(int)
        offset = centres[None] - spots[seen][:, None]
        distance = np.linalg.norm(offset[..., :2], axis=-1)
        bearing = np.arctan2(offset[..., 1], offset[..., 0]) - yaw[seen][:, None]
        bearing = np.abs((bearing + np.pi) % (2 * np.pi) - np.pi)
        elevation = np.arctan2(offset[..., 2], distance) - pitch[seen][:, None]
        inside = (bearing < np.radians(fov * 0.42)) & (np.abs(elevation) < np.radians(fov * 0.34)) & (distance > 0.8)
        # Everything should be seen once, and no frame should show a bare wall.
        score = inside.any(axis=0).mean() + 0.5 * np.minimum(inside.sum(axis=1), 2).mean() + 0.2 * inside.mean()
        found += 1
        if score > best_score:
            yaw = yaw + np.radians(_wobble(rng, phase, 0.4))
            roll = np.radians(rng.uniform(-2, 2) + _wobble(rng, phase, 1))
            best_score, best = score, CameraTrack(poses_from_angles(spots, yaw, pitch, roll), float(fov), float(sweep))
        if found >= 16:
            break
    return best
