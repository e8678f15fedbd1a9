"""Frames of a sample, decoded when they are asked for, with all that is known about their geometry.

Shapes: F frames of a scene, S sampled frames, H W pixels of a picture, h w pixels of a depth map.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vidllm.processing.given_geometry_vidllm import prepare_geometry
from vidllm.processing.image_reading_vidllm import is_image_path, natural_key
from vidllm.processing.samples import Sample
from vidllm.processing.scenes.base import Frame, PoseUnavailableError, SceneReader, SkipCounter, invert_pose
from vidllm.processing.scenes.choose import choose_frames
from vidllm.processing.scenes.open import open_path, open_scene
from vidllm.processing.scenes.recordings import ImageFolderReader
from vidllm.processing.video_reading_vidllm import VidLLMInputError


METHODS = ("uniform", "max_coverage", "random")


@dataclass(frozen=True, eq=False)
class SceneFrames:
    """Sampled frames of a scene.

    Args:
        scene_id (`str`): The scene.
        source (`str`): File or folder, for messages.
        indices (`list[int]`): Positions among the scene's frames, rising.
        frame_ids (`list[int]`): Numbers in the original recording.
        rgb (`list[np.ndarray]`): Per frame a picture of shape `(H, W, 3)`, uint8.
        depth_m (`list[np.ndarray]`, *optional*): Per frame a depth map of shape `(h, w)`, float32, metres along the optical axis, as the colour camera
            sees it; 0 = invalid. None if there is none or it was not asked for.
        intrinsics_px (`np.ndarray` of shape `(S, 3, 3)`, float64, *optional*): Pixels of `rgb`.
        cam_from_world (`np.ndarray` of shape `(S, 4, 4)`, float64, *optional*): World: camera of the first sampled frame, so the first is the identity.
            None: the scene has no poses, or one of the sampled frames lacks its own.
        annotation_from_world (`np.ndarray` of shape `(4, 4)`, float64, *optional*): None: not known.
        timestamps_s (`list[float]`, *optional*): Seconds.

    Source:
        Ours.
    """

    scene_id: str
    source: str
    indices: list[int]
    frame_ids: list[int]
    rgb: list[np.ndarray]
    depth_m: list[np.ndarray] | None
    intrinsics_px: np.ndarray | None
    cam_from_world: np.ndarray | None
    annotation_from_world: np.ndarray | None
    timestamps_s: list[float] | None


def scene_key(sample: Sample, data_root: str | Path | None = None) -> tuple[str, ...]:
    """Equal for samples that show the same frames.

    Args:
        sample (`Sample`): The sample.
        data_root (`str` or `Path`, *optional*): Instead of the sample's own.

    Returns:
        `tuple[str, ...]`

    Source:
        Ours: a video is decoded and encoded once for all its prompts.
    """
    root = str(data_root or sample.data_root or "")
    return (root, sample.scene_id if sample.video is None else sample.video, sample.poses or "")


def open_sample(sample: Sample, data_root: str | Path | None = None, layout: str | None = None) -> SceneReader:
    """Reader of the scene that a sample is about.

    Args:
        sample (`Sample`): The sample.
        data_root (`str` or `Path`, *optional*): Where the scene lies; by default what the sample says.
        layout (`str`, *optional*): Take this layout and no other, see `open_scene`.

    Returns:
        `SceneReader`

    Raises:
        VidLLMInputError: The scene is not there; names the sample.

    Source:
        Ours.
    """
    root = data_root or sample.data_root
    if root is None:
        raise VidLLMInputError(f"sample {sample.sample_id}: wanted data_root; neither the sample nor the call says it")
    root, video, _ = scene_key(sample, Path(root).expanduser())
    return _open(root, sample.scene_id, video if sample.video is not None else None, layout)


@lru_cache(maxsize=64)
def _open(root: str, scene_id: str, video: str | None, layout: str | None) -> SceneReader:
    """Readers hold no open file, only poses and names; finding these again for each question would take longer than a frame."""
    if video is None:
        return open_scene(root, scene_id, layout)
    return open_path(Path(root) / Path(video).expanduser(), scene_id, layout)


def sample_indices(
    sample: Sample,
    reader: SceneReader,
    num_frames: int,
    method: str = "uniform",
    generator: np.random.Generator | None = None,
) -> list[int]:
    """Choose frames of a sample's scene.

    Args:
        sample (`Sample`): The sample.
        reader (`SceneReader`): Its scene.
        num_frames (`int`): How many.
        method (`str`): `uniform` and `max_coverage` as `choose_frames` has them; `random`: one at random of each of `num_frames` equal stretches.
        generator (`np.random.Generator`, *optional*): For `random`.

    Returns:
        `list[int]`: rising. Of people's own videos the first frame is kept, because places may be told from it.

    Raises:
        PoseUnavailableError: No frame has a valid pose.
        VidLLMInputError: Unknown method, or `random` without a generator.

    Source:
        Ours.
    """
    if method not in METHODS or (method == "random" and generator is None):
        raise VidLLMInputError(f"method: wanted {', '.join(METHODS)} (random with a generator); got {method!r}")
    if method != "random":
        return choose_frames(reader, num_frames, method)
    allowed = np.flatnonzero(reader.valid_pose_mask) if reader.has_poses else np.arange(len(reader))
    if not allowed.size:
        raise PoseUnavailableError(f"{reader.source}: none of the {len(reader)} frames has a valid pose")
    if allowed.size <= num_frames:
        return allowed.tolist()
    edges = np.arange(num_frames + 1) * allowed.size // num_frames
    drawn = edges[:-1] + np.floor(generator.random(num_frames) * (edges[1:] - edges[:-1])).astype(int)
    # Not only where this sample needs it: all samples of a video see the same frames.
    if sample.video is not None or not reader.has_poses:
        drawn[0] = 0
    return allowed[drawn].tolist()


def frames_of(
    sample: Sample,
    data_root: str | Path | None = None,
    num_frames: int = 32,
    method: str = "uniform",
    depth: bool = False,
    generator: np.random.Generator | None = None,
    layout: str | None = None,
) -> SceneFrames:
    """Decode frames of the scene that a sample is about.

    Args:
        sample (`Sample`): The sample.
        data_root (`str` or `Path`, *optional*): Where the scene lies; by default what the sample says.
        num_frames (`int`): How many; a scene with fewer gives all.
        method (`str`): See `sample_indices`.
        depth (`bool`): Whether to decode depth, where there is any.
        generator (`np.random.Generator`, *optional*): For `method="random"`.
        layout (`str`, *optional*): Take this layout and no other.

    Returns:
        `SceneFrames`

    Raises:
        VidLLMInputError: The scene is not there, or a frame cannot be decoded.

    Source:
        Ours.
    """
    reader = open_sample(sample, data_root, layout)
    indices = sample_indices(sample, reader, num_frames, method, generator)
    frames = reader.frames(indices, depth=depth and reader.has_depth)
    cam_from_scene = reader.poses()[indices] if reader.has_poses else None
    intrinsics = [frame.intrinsics_px for frame in frames]
    intrinsics_px = None if any(matrix is None for matrix in intrinsics) else np.stack(intrinsics)
    if sample.poses is not None:
        given = _given_geometry(sample, Path(data_root or sample.data_root).expanduser(), reader, indices, frames)
        cam_from_scene = given.get("cam_from_world", cam_from_scene)
        intrinsics_px = given.get("intrinsics_px", intrinsics_px)
    first_is_valid = cam_from_scene is not None and np.isfinite(cam_from_scene[0]).all()
    cam_from_world = None
    if cam_from_scene is not None and np.isfinite(cam_from_scene).all():
        cam_from_world = cam_from_scene @ invert_pose(cam_from_scene[0])
        cam_from_world[0] = np.eye(4)
    annotation_from_world = annotation_of_frames(
        sample, reader, indices, cam_from_scene[0] if first_is_valid else None, sample.poses is not None
    )
    depth_m = None
    if depth and reader.has_depth:
        depth_m = [depth_as_colour_sees_it(frame) for frame in frames]
    times = [frame.timestamp_s for frame in frames]
    return SceneFrames(
        scene_id=sample.scene_id,
        source=reader.source,
        indices=list(indices),
        frame_ids=[frame.frame_id for frame in frames],
        rgb=[frame.rgb for frame in frames],
        depth_m=depth_m,
        intrinsics_px=intrinsics_px,
        cam_from_world=cam_from_world,
        annotation_from_world=annotation_from_world,
        timestamps_s=None if None in times else times,
    )


def annotation_of_frames(
    sample: Sample,
    reader: SceneReader,
    indices: Sequence[int],
    cam_from_scene: np.ndarray | None,
    poses_are_given: bool = False,
) -> np.ndarray | None:
    """Where the annotation frame is, seen from the first sampled frame.

    Args:
        sample (`Sample`): The sample.
        reader (`SceneReader`): Its scene.
        indices (`Sequence[int]`): Sampled frames.
        cam_from_scene (`np.ndarray` of shape `(4, 4)`, *optional*): Pose of the first of them, if it has a valid one.
        poses_are_given (`bool`): Whether the pose is of the sample's own file; its frame then is the annotation frame, unless the scene knows better.

    Returns:
        `np.ndarray` of shape `(4, 4)`, float64, or None: not known.

    Raises:
        PoseUnavailableError: The sample's places are told from the video's first frame, which is not the first sampled one.

    Source:
        Ours.
    """
    if sample.told_from_first_frame and indices[0] != 0:
        raise PoseUnavailableError(
            f"sample {sample.sample_id}: its places are told from the first frame of {reader.source}, which was not sampled (no valid pose?)"
        )
    if sample.annotation_from_world is not None:
        return sample.annotation_from_world
    annotation_from_scene = reader.annotation_from_scene
    if annotation_from_scene is None and poses_are_given:
        annotation_from_scene = np.eye(4)
    if annotation_from_scene is None or cam_from_scene is None:
        return None
    return annotation_from_scene @ invert_pose(cam_from_scene)


def depth_as_colour_sees_it(frame: Frame) -> np.ndarray:
    """Depth resampled to the view of the colour camera, at the depth map's own size.

    Args:
        frame (`Frame`): With depth; both intrinsics are used if they are there.

    Returns:
        `np.ndarray` of shape `(h, w)`, float32: metres, nearest value, 0 = invalid or outside.

    Raises:
        VidLLMInputError: The frame has no depth.

    Source:
        Ours: ScanNet's two cameras differ by up to a pixel at the border; both are taken to stand at the same place, as its exports do.
    """
    if frame.depth_m is None:
        raise VidLLMInputError(f"frame {frame.frame_id}: wanted depth; it has none")
    if frame.intrinsics_px is None or frame.depth_intrinsics_px is None:
        return frame.depth_m
    height, width = frame.depth_m.shape
    colour, depth = frame.intrinsics_px, frame.depth_intrinsics_px
    # Column x of the depth-sized colour picture is column x * W / w of the colour picture.
    columns = _resampled(np.arange(width) * frame.rgb.shape[1] / width, colour[0], depth[0, 0], depth[0, 2], 0)
    rows = _resampled(np.arange(height) * frame.rgb.shape[0] / height, colour[1], depth[1, 1], depth[1, 2], 1)
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None]
    values = frame.depth_m[np.clip(rows, 0, height - 1)[:, None], np.clip(columns, 0, width - 1)[None]]
    return np.where(inside, values, np.float32(0))


def _resampled(pixels: np.ndarray, colour_row: np.ndarray, focal_px: float, centre_px: float, axis: int) -> np.ndarray:
    """Nearest depth column (row) of colour columns (rows), through the ray that both look along."""
    rays = (pixels - colour_row[2]) / colour_row[axis]
    return np.floor(rays * focal_px + centre_px + 0.5).astype(int)


def usable_rows(
    rows: Iterable[dict], data_root: str | Path | None = None, num_frames: int = 32, need_boxes: bool = True
) -> tuple[list[int], SkipCounter]:
    """Which rows can be trained on: their frames are there, and the annotation frame is known where they need it.

    Args:
        rows (`Iterable[dict]`): Rows of `load_benchmark`.
        data_root (`str` or `Path`, *optional*): As of `frames_of`.
        num_frames (`int`): Frames that will be sampled.
        need_boxes (`bool`): Whether rows of the task `ground` are useless without boxes.

    Returns:
        `tuple`: numbers of the usable rows (for `Dataset.select`), and the others counted by reason.

    Raises:
        VidLLMInputError: A scene is there but malformed.

    Source:
        Ours: a sample whose first sampled frame has no valid pose is skipped and counted, before training rather than within a batch.
    """
    usable, skipped, state = [], SkipCounter(), {}
    for number, row in enumerate(rows):
        sample = Sample.from_row(row)
        key = (*scene_key(sample, data_root), num_frames)
        if key not in state:
            state[key] = _scene_problem(sample, data_root, num_frames)
        problem, knows_annotation = state[key]
        if problem is None and sample.num_point_blocks and sample.points is None:
            problem = "the place that it asks about is not known (no scan)"
        if problem is None and sample.task == "ground" and need_boxes and not sample.box_block:
            problem = "it has no box to learn"
        if (
            problem is None
            and sample.needs_annotation_frame
            and sample.annotation_from_world is None
            and not knows_annotation
        ):
            problem = "the annotation frame is not known from the first sampled frame"
        if problem is None:
            usable.append(number)
        else:
            skipped.add(problem, sample.sample_id)
    return usable, skipped


def _scene_problem(sample: Sample, data_root: str | Path | None, num_frames: int) -> tuple[str | None, bool]:
    """Why a scene cannot be used at all, and whether its annotation frame is known; decodes no picture."""
    try:
        reader = open_sample(sample, data_root)
    except FileNotFoundError:
        return "its scene is absent", False
    try:
        indices = sample_indices(sample, reader, num_frames)
        if sample.told_from_first_frame and indices[0] != 0:
            return "its places are told from a first frame without a valid pose", False
    except PoseUnavailableError:
        return "none of its scene's frames has a valid pose", False
    known = reader.annotation_from_scene is not None and bool(reader.valid_pose_mask[indices[0]])
    return None, known or sample.poses is not None


def _given_geometry(
    sample: Sample, root: Path, reader: SceneReader, indices: Sequence[int], frames: Sequence[Frame]
) -> dict[str, np.ndarray]:
    """Poses, and intrinsics where the file has them, of the sampled frames."""
    height, width = frames[0].rgb.shape[:2]
    times = [frame.timestamp_s for frame in frames]
    metadata: dict[str, Any] = {
        "frames_indices": list(indices),
        "total_num_frames": len(reader),
        "timestamps_s": None if None in times else times,
        "frame_names": None,
        "height": height,
        "width": width,
        "resized_hw": (height, width),
        "crop_top_left": (0, 0),
        "out_hw": (height, width),
    }
    if isinstance(reader, ImageFolderReader):
        names = sorted(
            (path.name for path in reader.path.iterdir() if is_image_path(str(path)) and path.name[0] != "."),
            key=natural_key,
        )
        # Names that are times may be in another order; COLMAP's images then go by number.
        if len(names) == len(reader) and None in times:
            metadata["frame_names"] = [names[index] for index in indices]
    given = prepare_geometry([str(root / Path(sample.poses).expanduser())], [metadata])
    return {name: value[0].double().numpy() for name, value in given.items()}


__all__ = [
    "METHODS",
    "SceneFrames",
    "annotation_of_frames",
    "depth_as_colour_sees_it",
    "frames_of",
    "open_sample",
    "sample_indices",
    "scene_key",
    "usable_rows",
]
