"""Small scenes with known contents, for the tests of the readers."""

import numpy as np


HW, DEPTH_HW = (48, 64), (30, 40)
INTRINSICS = np.array([[55.0, 0, 32.5], [0, 56.0, 23.5], [0, 0, 1]])
DEPTH_INTRINSICS = np.array([[33.0, 0, 20.25], [0, 34.0, 14.75], [0, 0, 1]])
ALIGNMENT = np.array([[0, -1, 0, 1.5], [1, 0, 0, -0.5], [0, 0, 1, 0.25], [0, 0, 0, 1.0]])


def picture(index, hw=HW):
    """Smooth, so that JPEG keeps it, and different for every frame."""
    rows, columns = np.mgrid[: hw[0], : hw[1]]
    return np.stack(
        [rows * 3 + index, columns * 2 + 5 * index, (rows + columns + 11 * index) % 200 // 8 * 8], axis=-1
    ).astype(np.uint8)


def depth_raw(index, hw=DEPTH_HW):
    """Millimetres; a corner is invalid."""
    raw = 1000 + np.arange(hw[0] * hw[1]).reshape(hw) + 7 * index
    raw[: 3 + index % 3, :4] = 0
    return raw.astype(np.uint16)


def pose(index):
    """scene_from_cam: a rotation by a formula of its own, and a place."""
    angle = 0.3 + 0.1 * index
    about_z = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, 0.6, -0.8], [0, 0.8, 0.6]])
    matrix = np.eye(4)
    matrix[:3, :3] = about_z @ tilt
    matrix[:3, 3] = (1 + 0.2 * index, 2 - 0.1 * index, 1.4)
    return matrix


def lost():
    """What ScanNet writes where tracking was lost."""
    return np.full((4, 4), -np.inf)


def contents(num_frames=6, lost_frames=()):
    """Pictures, raw depths, scene_from_cam."""
    poses = [lost() if index in lost_frames else pose(index) for index in range(num_frames)]
    return [picture(i) for i in range(num_frames)], [depth_raw(i) for i in range(num_frames)], poses
