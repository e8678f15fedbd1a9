"""Which frames of a scene the model sees: evenly spread, or those that together see most of the room.

Shapes: F frames of a scene, C candidates, N points, h w pixels of a depth map.
"""

from collections.abc import Sequence

import numpy as np

from vidllm.processing.scenes.base import PoseUnavailableError, SceneReader
from vidllm.processing.video_reading_vidllm import VidLLMInputError


METHODS = ("uniform", "max_coverage")
VOXEL_BITS = 21


def choose_frames(
    reader: SceneReader,
    num_frames: int,
    method: str = "uniform",
    require_pose: bool | None = None,
    voxel_size_m: float = 0.1,
    candidate_step: int = 2,
    pixel_step: int = 4,
    points_annotation: np.ndarray | None = None,
    stop_ratio: float = 1.0,
) -> list[int]:
    """Choose frames of a scene.

    `uniform` spreads them over the frames in question, first and last included, positions truncated as
    `numpy.linspace(0, n - 1, num_frames, dtype=int)` does. `max_coverage` takes, one after the other, the frame that adds most
    voxels not yet seen; of equals the earliest. Both return all frames if there are not more than wanted.

    Args:
        reader (`SceneReader`): The scene.
        num_frames (`int`): How many.
        method (`str`): `uniform` or `max_coverage` (needs depth, poses and depth intrinsics).
        require_pose (`bool`, *optional*): Choose among frames with a valid pose only. By default if the scene has poses at all.
        voxel_size_m (`float`): Edge of a voxel, metres.
        candidate_step (`int`): Every how many frames are candidates; all are where that would leave fewer than wanted.
        pixel_step (`int`): Every how many depth pixels, in both directions, are looked at.
        points_annotation (`np.ndarray` of shape `(N, 3)`, *optional*): Points of the scene's mesh in the annotation frame; only voxels that
            hold one count.
        stop_ratio (`float`): Stop once this share of the voxels that the candidates see is covered. At 1 exactly `num_frames` are returned.

    Returns:
        `list[int]`: rising indices without repeats.

    Raises:
        PoseUnavailableError: Poses are required and no frame has a valid one.
        VidLLMInputError: Unknown method, or something that it needs is missing.

    Source:
        Upstream: LaVi-Lab/Video-3D-LLM@3ff70e8 (both rules; its maximum coverage breaks ties at random). Ours: the fixed tie-break, pixels
        taken in steps.
    """
    if num_frames < 1:
        raise VidLLMInputError(f"num_frames: wanted 1 or more; got {num_frames}")
    if method not in METHODS:
        raise VidLLMInputError(f"method: wanted {' or '.join(METHODS)}; got {method!r}")
    require_pose = reader.has_poses if require_pose is None else require_pose
    allowed = np.flatnonzero(reader.valid_pose_mask) if require_pose else np.arange(len(reader))
    if not allowed.size:
        raise PoseUnavailableError(f"{reader.source}: none of the {len(reader)} frames has a valid pose")
    if method == "uniform":
        if allowed.size <= num_frames:
            return allowed.tolist()
        return allowed[np.linspace(0, allowed.size - 1, num_frames, dtype=int)].tolist()
    if not reader.has_depth:
        raise VidLLMInputError(f"{reader.source}: maximum coverage wants depth maps; this scene has none")
    allowed = np.flatnonzero(reader.valid_pose_mask)
    if not allowed.size:
        raise PoseUnavailableError(f"{reader.source}: none of the {len(reader)} frames has a valid pose")
    stepped = allowed[::candidate_step]
    candidates = allowed if stepped.size < num_frames else stepped
    if candidates.size <= num_frames and stop_ratio >= 1:
        return candidates.tolist()
    voxels = [_voxels_of_frame(reader, int(index), voxel_size_m, pixel_step) for index in candidates]
    if points_annotation is not None:
        inside = np.unique(_keys(np.asarray(points_annotation, dtype=np.float64), voxel_size_m))
        voxels = [seen[np.isin(seen, inside, assume_unique=True)] for seen in voxels]
    chosen = greedy_cover(voxels, num_frames, stop_ratio)
    return sorted(candidates[chosen].tolist())


def greedy_cover(sets: Sequence[np.ndarray], num_sets: int, stop_ratio: float = 1.0) -> list[int]:
    """Greedy maximum coverage: always the set that adds most; of equals the first.

    Args:
        sets (`Sequence[np.ndarray]` of shape `(elements,)` each, int64): Elements without repeats.
        num_sets (`int`): How many to take at most.
        stop_ratio (`float`): Stop once this share of all elements is covered; at 1 the number is filled up even with sets that add nothing.

    Returns:
        `list[int]`: indices in the order in which they were taken.

    Source:
        Upstream: LaVi-Lab/Video-3D-LLM@3ff70e8. Ours: ties go to the first.
    """
    elements, compact = np.unique(np.concatenate(sets), return_inverse=True)
    owner = np.repeat(np.arange(len(sets)), [len(members) for members in sets])
    covered = np.zeros(len(elements), dtype=bool)
    taken: list[int] = []
    while len(taken) < min(num_sets, len(sets)):
        gains = np.bincount(owner[~covered[compact]], minlength=len(sets))
        gains[taken] = -1
        best = int(np.argmax(gains))
        taken.append(best)
        covered[compact[owner == best]] = True
        if stop_ratio < 1 and covered.sum() >= stop_ratio * len(elements):
            break
    return taken


def _voxels_of_frame(reader: SceneReader, index: int, voxel_size_m: float, pixel_step: int) -> np.ndarray:
    """Keys of the voxels that a frame's depth pixels lie in, annotation frame where it is known, else the scene's own."""
    depth_m, intrinsics_px = reader.depth(index)
    if depth_m is None:
        return np.zeros(0, dtype=np.int64)
    if intrinsics_px is None:
        raise VidLLMInputError(
            f"{reader.source}: maximum coverage wants intrinsics of the depth camera; there are none"
        )
    depth_m = depth_m[::pixel_step, ::pixel_step].astype(np.float64)
    rows, columns = np.nonzero(depth_m > 0)
    z = depth_m[rows, columns]
    pixels = np.stack([columns * pixel_step, rows * pixel_step, np.ones_like(rows)], axis=-1).astype(np.float64)
    points_cam = pixels @ np.linalg.inv(intrinsics_px).T * z[:, None]
    scene_from_cam = np.linalg.inv(reader.poses()[index])
    if reader.annotation_from_scene is not None:
        scene_from_cam = reader.annotation_from_scene @ scene_from_cam
    points = points_cam @ scene_from_cam[:3, :3].T + scene_from_cam[:3, 3]
    return np.unique(_keys(points, voxel_size_m))


def _keys(points: np.ndarray, voxel_size_m: float) -> np.ndarray:
    """One integer per point: its voxel, nearest grid point as upstream rounds; `(N, 3)` -> `(N,)`."""
    half = 1 << (VOXEL_BITS - 1)
    cells = np.clip(np.rint(points / voxel_size_m), -half, half - 1).astype(np.int64) + half
    return (cells[:, 0] << (2 * VOXEL_BITS)) | (cells[:, 1] << VOXEL_BITS) | cells[:, 2]
