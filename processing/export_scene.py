"""One reconstructed video as plain numpy arrays: what every export file and picture is made from.

Shapes: S frames, H W pixels, M boxes, N points.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


UNITS = ("m", "relative")


class LabelledBox(NamedTuple):
    """A box with its name; a plain tuple `(label, box_room, score)` serves as well.

    Args:
        label (`str`): What is shown beside it.
        box_room (`Sequence[float]` of length 6): `(cx, cy, cz, dx, dy, dz)`, room frame, unit of the scene.
        score (`float`, *optional*): 0..1, shown behind the label.

    Source:
        Ours.
    """

    label: str
    box_room: Sequence[float]
    score: float | None = None


@dataclass(frozen=True)
class ExportScene:
    """A reconstruction of one video, without padding and on the CPU.

    Args:
        cam_from_world (`np.ndarray` of shape `(frames, 4, 4)`, float32): Poses, OpenCV axes; world = first camera.
        intrinsics_px (`np.ndarray` of shape `(frames, 3, 3)`, float32): Pinhole, pixels, integer coordinates at pixel centres.
        depth (`np.ndarray` of shape `(frames, height, width)`, float32): Along the optical axis, `unit`; 0 where invalid.
        depth_confidence (`np.ndarray` of shape `(frames, height, width)`, float32): Higher is surer; 0 where invalid.
        points_world (`np.ndarray` of shape `(frames, height, width, 3)`, float32): World frame, `unit`; 0 where invalid.
        valid_mask (`np.ndarray` of shape `(frames, height, width)`, bool): True = the pixel has a point.
        room_from_world (`np.ndarray` of shape `(3, 3)`, float32): Rotation to z up; origin = first camera.
        unit (`str`): `m` or `relative`.
        frames_rgb (`np.ndarray` of shape `(frames, height, width, 3)`, uint8): The pictures, pixel for pixel.
        frame_indices (`np.ndarray` of shape `(frames,)`, int64): Numbers of the frames in the source video.
        timestamps_s (`np.ndarray` of shape `(frames,)`, *optional*): Seconds in the source video.
        boxes (`tuple` of `LabelledBox`): Boxes in the room frame.

    Source:
        Ours: conventions of the package (CONVENTIONS.md).
    """

    cam_from_world: np.ndarray
    intrinsics_px: np.ndarray
    depth: np.ndarray
    depth_confidence: np.ndarray
    points_world: np.ndarray
    valid_mask: np.ndarray
    room_from_world: np.ndarray
    unit: str
    frames_rgb: np.ndarray
    frame_indices: np.ndarray
    timestamps_s: np.ndarray | None
    boxes: tuple[LabelledBox, ...]

    @property
    def num_frames(self) -> int:
        """Frames S."""
        return len(self.depth)

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.depth.shape[1:]

    @property
    def world_from_cam(self) -> np.ndarray:
        """Poses the other way round, `(frames, 4, 4)`, float64."""
        rotation = self.cam_from_world[:, :3, :3].astype(np.float64).transpose(0, 2, 1)
        poses = np.tile(np.eye(4), (self.num_frames, 1, 1))
        poses[:, :3, :3] = rotation
        poses[:, :3, 3] = -np.einsum("sij,sj->si", rotation, self.cam_from_world[:, :3, 3])
        return poses

    @property
    def room_from_cam(self) -> np.ndarray:
        """Camera poses in the room frame, `(frames, 4, 4)`, float64."""
        turn = np.eye(4)
        turn[:3, :3] = self.room_from_world
        return turn @ self.world_from_cam

    @property
    def times(self) -> np.ndarray:
        """Timestamps in seconds, or the source frame numbers where there are none; `(frames,)`, float64."""
        return self.frame_indices.astype(np.float64) if self.timestamps_s is None else self.timestamps_s

    def select_points(self, keep_fraction: float = 0.8, max_points: int | None = None) -> np.ndarray:
        """Which pixels become points.

        Args:
            keep_fraction (`float`): Share of the valid pixels that stays, surest first, over all frames; equal confidences
                stay together, so that constant confidence drops nothing.
            max_points (`int`, *optional*): Most points; a fixed random subset is taken where there are more.

        Returns:
            `np.ndarray` of shape `(N,)`, int64: rising indices into the flattened `(frames, height, width)`.

        Raises:
            ValueError: `keep_fraction` is not in (0, 1], or `max_points` is negative.

        Source:
            Ours: 0.8 removes most of the smear along depth edges, where confidence is lowest, and leaves walls whole.
        """
        if not 0 < keep_fraction <= 1:
            raise ValueError(f"keep_fraction: wanted a number in (0, 1]; got {keep_fraction}")
        if max_points is not None and max_points < 0:
            raise ValueError(f"max_points: wanted 0 or more; got {max_points}")
        index = np.flatnonzero(self.valid_mask)
        if index.size and keep_fraction < 1:
            confidence = self.depth_confidence.reshape(-1)[index]
            rank = min(int((1 - keep_fraction) * index.size), index.size - 1)
            index = index[confidence >= np.partition(confidence, rank)[rank]]
        if max_points is not None and index.size > max_points:
            index = np.sort(np.random.default_rng(0).choice(index, max_points, replace=False))
        return index

    def points_and_colours(self, index: np.ndarray, frame: str = "room") -> tuple[np.ndarray, np.ndarray]:
        """Coordinates and colours of selected pixels.

        Args:
            index (`np.ndarray` of shape `(N,)`, int64): From `select_points`.
            frame (`str`): `room` (z up) or `world` (first camera).

        Returns:
            `tuple`: points `(N, 3)` float32 in `unit`, colours `(N, 3)` uint8.

        Raises:
            ValueError: Another frame was asked for.

        Source:
            Ours.
        """
        if frame not in ("room", "world"):
            raise ValueError(f"frame: wanted 'room' or 'world'; got {frame!r}")
        points = self.points_world.reshape(-1, 3)[index]
        if frame == "room":
            points = points @ self.room_from_world.T
        return points, self.frames_rgb.reshape(-1, 3)[index]

    def diagonal(self) -> float:
        """Size of the seen space in `unit`: diagonal of the 2..98 percentile box of the points, with the cameras."""
        index = self.select_points(max_points=20_000)
        corners = [self.world_from_cam[:, :3, 3]]
        if index.size:
            corners.append(np.percentile(self.points_world.reshape(-1, 3)[index], [2, 98], axis=0))
        span = np.ptp(np.concatenate(corners), axis=0)
        return float(np.linalg.norm(span)) or 1.0


def _to_numpy(value: Any) -> np.ndarray:
    """Array from a tensor on any device, an array or a list."""
    if hasattr(value, "detach"):
        value = value.detach().float() if value.is_floating_point() else value.detach()
        value = value.cpu().numpy()
    return np.asarray(value)


def check_boxes(boxes: Sequence | None) -> tuple[LabelledBox, ...]:
    """Boxes as `LabelledBox`, checked.

    Args:
        boxes (`Sequence` of `LabelledBox` or tuples `(label, (6,), score)`, *optional*): Room frame.

    Returns:
        `tuple` of `LabelledBox`.

    Raises:
        ValueError: A box has not six finite numbers, or a negative size.

    Source:
        Ours.
    """
    checked = []
    for number, given in enumerate(boxes or ()):
        label, box, *score = given
        box = _to_numpy(box).astype(np.float64)
        if box.shape != (6,) or not np.isfinite(box).all() or (box[3:] < 0).any():
            raise ValueError(
                f"box {number} ({label!r}): wanted 6 finite numbers cx cy cz dx dy dz with sizes not negative; got {box.tolist()}"
            )
        score = None if not score or score[0] is None else float(score[0])
        checked.append(LabelledBox(str(label), tuple(box.tolist()), score))
    return tuple(checked)


def export_scene(
    reconstruction: Any,
    frames_rgb: Any,
    frame_indices: Sequence[int] | None = None,
    timestamps_s: Sequence[float] | None = None,
    boxes: Sequence | None = None,
    row: int = 0,
) -> ExportScene:
    """Take one video out of a reconstruction.

    Args:
        reconstruction (`VidLLMReconstruction`): What `model.reconstruct` returns.
        frames_rgb (`np.ndarray` or `torch.Tensor` of shape `(frames, height, width, 3)`, uint8): The sampled frames as the model
            saw them (resized and cropped), before normalisation.
        frame_indices (`Sequence[int]`, *optional*): Frame numbers in the source; 0, 1, 2, ... if not given.
        timestamps_s (`Sequence[float]`, *optional*): Seconds in the source.
        boxes (`Sequence` of `LabelledBox`, *optional*): Boxes of this video in the room frame, in the reconstruction's unit.
        row (`int`): Row of the batch.

    Returns:
        `ExportScene`: padding cut off, invalid pixels zeroed.

    Raises:
        ValueError: Sizes disagree, a camera is not finite, or a box is malformed.

    Source:
        Ours.
    """
    batch = len(reconstruction.cam_from_world)
    if not 0 <= row < batch:
        raise ValueError(f"row: wanted 0..{batch - 1}; got {row}")
    num_frames, height, width = _to_numpy(reconstruction.video_size_shw[row]).tolist()
    frames_rgb = _to_numpy(frames_rgb)
    if frames_rgb.shape != (num_frames, height, width, 3) or frames_rgb.dtype != np.uint8:
        raise ValueError(
            f"frames_rgb: wanted uint8 of shape {(num_frames, height, width, 3)}, the size of the depth maps; "
            f"got {frames_rgb.dtype} of shape {frames_rgb.shape}"
        )
    frame_indices = np.arange(num_frames) if frame_indices is None else _to_numpy(frame_indices).astype(np.int64)
    times = None if timestamps_s is None else _to_numpy(timestamps_s).astype(np.float64)
    for name, values in (("frame_indices", frame_indices), ("timestamps_s", times)):
        if values is not None and (values.shape != (num_frames,) or not np.isfinite(values).all()):
            raise ValueError(f"{name}: wanted {num_frames} finite numbers, one per frame; got {values.tolist()}")

    def cut(name: str, *size: int) -> np.ndarray:
        """The real part of one field, float32."""
        value = getattr(reconstruction, name)[row]
        return _to_numpy(value[tuple(slice(0, length) for length in size)]).astype(np.float32)

    cam_from_world = cut("cam_from_world", num_frames)
    intrinsics_px = cut("intrinsics_px", num_frames)
    for frame in range(num_frames):
        if not (np.isfinite(cam_from_world[frame]).all() and np.isfinite(intrinsics_px[frame]).all()):
            raise ValueError(f"frame {frame} (source frame {frame_indices[frame]}): the camera is not finite")
    depth = cut("depth", num_frames, height, width)
    confidence = cut("depth_confidence", num_frames, height, width)
    points_world = cut("points_world", num_frames, height, width)
    with np.errstate(invalid="ignore"):
        valid_mask = (
            np.isfinite(depth) & (depth > 0) & np.isfinite(confidence) & np.isfinite(points_world).all(axis=-1)
        )
    return ExportScene(
        cam_from_world=cam_from_world,
        intrinsics_px=intrinsics_px,
        depth=np.where(valid_mask, depth, 0.0),
        depth_confidence=np.where(valid_mask, confidence, 0.0),
        points_world=np.where(valid_mask[..., None], points_world, 0.0),
        valid_mask=valid_mask,
        room_from_world=_to_numpy(reconstruction.room_from_world[row]).astype(np.float32),
        unit=UNITS[0] if bool(reconstruction.metric_mask[row]) else UNITS[1],
        frames_rgb=frames_rgb,
        frame_indices=frame_indices,
        timestamps_s=times,
        boxes=check_boxes(boxes),
    )


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name once it is complete; a failed or killed write leaves the old file.

    Args:
        path (`str` or `Path`): File to write; parent folders are made.

    Yields:
        `Path`: where to write; it keeps the suffix.

    Raises:
        ValueError: The folder or the file cannot be written.

    Source:
        Ours.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    partial = Path(name)
    try:
        yield partial
        # mkstemp makes the file private; give it what a plain open() would have.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
