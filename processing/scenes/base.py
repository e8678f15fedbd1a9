"""What a filmed scene is to the rest of the package: frames, poses, alignment, and what was lost on the way.

The frame called `scene` is the world that a scene's own pose files use (ScanNet: the raw scan, not axis-aligned). The model's
`world` is the camera of the first sampled frame; `annotation` is the axis-aligned scene in which boxes are given.

Shapes: F frames of a scene, S sampled frames, H W pixels of a colour picture, h w pixels of a depth map.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from vidllm.processing.video_reading_vidllm import VidLLMInputError


class PoseUnavailableError(VidLLMInputError):
    """The pose that something hangs on is invalid or absent; whoever reads samples skips and counts it.

    Source:
        Ours: it differs from a malformed file, which is an error.
    """


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a scene, decoded.

    Args:
        rgb (`np.ndarray` of shape `(H, W, 3)`, uint8): The picture, upright.
        depth_m (`np.ndarray` of shape `(h, w)`, float32, *optional*): Metres along the optical axis at the depth camera's own size, 0 =
            invalid. None if there is none or it was not asked for.
        cam_from_scene (`np.ndarray` of shape `(4, 4)`, float64, *optional*): OpenCV axes, metres. None if invalid or absent.
        intrinsics_px (`np.ndarray` of shape `(3, 3)`, float64, *optional*): Pinhole, pixels of `rgb`.
        depth_intrinsics_px (`np.ndarray` of shape `(3, 3)`, float64, *optional*): Pinhole, pixels of `depth_m`.
        frame_id (`int`): Number of the frame in the original recording, as far as the files tell.
        timestamp_s (`float`, *optional*): Seconds.

    Source:
        Ours: what every layout of a ScanNet scene, a video and a folder have in common.
    """

    rgb: np.ndarray
    depth_m: np.ndarray | None
    cam_from_scene: np.ndarray | None
    intrinsics_px: np.ndarray | None
    depth_intrinsics_px: np.ndarray | None
    frame_id: int
    timestamp_s: float | None


class SceneReader(ABC):
    """A scene whose frames are decoded when they are asked for. Holds no open file: it can be pickled and forked.

    Args:
        scene_id (`str`): Name of the scene.
        source (`str`): File or folder, for messages.
        frame_ids (`Sequence[int]`): Number of each frame in the original recording.
        cam_from_scene (`np.ndarray` of shape `(F, 4, 4)`, float64, *optional*): Poses, NaN where invalid; None: the layout has none.
        annotation_from_scene (`np.ndarray` of shape `(4, 4)`, float64, *optional*): ScanNet's axis alignment; None: nothing is known.
        has_depth (`bool`): Whether there are depth maps.
        problems (`Sequence[str]`): What was dropped or lost, with counts.

    Source:
        Ours: one interface for `.sens` files, exported layouts, videos and folders.
    """

    def __init__(
        self,
        scene_id: str,
        source: str,
        frame_ids: Sequence[int],
        cam_from_scene: np.ndarray | None = None,
        annotation_from_scene: np.ndarray | None = None,
        has_depth: bool = False,
        problems: Sequence[str] = (),
    ):
        self.scene_id = scene_id
        self.source = source
        self.frame_ids = [int(number) for number in frame_ids]
        self.has_poses = cam_from_scene is not None
        self.has_depth = has_depth
        self.annotation_from_scene = annotation_from_scene
        self.problems = list(problems)
        if cam_from_scene is None:
            cam_from_scene = np.full((len(self.frame_ids), 4, 4), np.nan)
        self._cam_from_scene = np.array(cam_from_scene, dtype=np.float64)
        self._cam_from_scene.setflags(write=False)
        self.valid_pose_mask = np.isfinite(self._cam_from_scene).all(axis=(1, 2))

    def __len__(self) -> int:
        return len(self.frame_ids)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {len(self)} frames, {int(self.valid_pose_mask.sum())} with a pose)"

    @abstractmethod
    def frame(self, index: int, depth: bool = True) -> Frame:
        """Decode one frame.

        Args:
            index (`int`): Position in 0..F-1 (not the frame's number).
            depth (`bool`): Whether to decode depth too.

        Returns:
            `Frame`

        Raises:
            VidLLMInputError: There is no such frame, or it cannot be decoded; names the file.
        """

    def frames(self, indices: Sequence[int], depth: bool = True) -> list[Frame]:
        """Decode several frames; where single access is slow (videos) this takes one pass. Returns them in the order asked for."""
        return [self.frame(index, depth=depth) for index in indices]

    def poses(self) -> np.ndarray:
        """All `cam_from_scene`, `(F, 4, 4)`, float64, NaN where invalid; read-only, decodes no picture."""
        return self._cam_from_scene

    def depth(self, index: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Depth `(h, w)` and its intrinsics `(3, 3)` as in `Frame`, without decoding the picture where the layout allows it."""
        frame = self.frame(index)
        return frame.depth_m, frame.depth_intrinsics_px

    def stored_jpeg(self, index: int) -> bytes | None:
        """The picture's JPEG file byte for byte, None if it is not stored as one: lets an export copy instead of re-encode."""
        self._check_index(index)
        return None

    def close(self) -> None:
        """Nothing stays open between calls; here so that readers can be used like files."""
        return

    def __enter__(self) -> "SceneReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_index(self, index: int) -> None:
        """One clear error for a frame that does not exist."""
        if not 0 <= index < len(self):
            raise VidLLMInputError(f"{self.source}: wanted a frame index in 0..{len(self) - 1}; got {index}")

    def _pose(self, index: int) -> np.ndarray | None:
        """`cam_from_scene` of one frame, or None."""
        return self._cam_from_scene[index] if self.valid_pose_mask[index] else None


def annotation_from_world(reader: SceneReader, indices: Sequence[int]) -> np.ndarray:
    """Where boxes lie as seen from the first sampled frame, the model's world.

    Args:
        reader (`SceneReader`): The scene.
        indices (`Sequence[int]`): Sampled frames; only the first counts.

    Returns:
        `np.ndarray` of shape `(4, 4)`, float64: metres.

    Raises:
        PoseUnavailableError: That frame has no valid pose, or the scene no known alignment. Such samples are skipped and counted.

    Source:
        Ours: `annotation_from_scene @ inverse(cam_from_scene[first])`.
    """
    if not len(indices):
        raise VidLLMInputError(f"{reader.source}: wanted at least one sampled frame; got none")
    first = indices[0]
    if reader.annotation_from_scene is None:
        raise PoseUnavailableError(f"{reader.source}: the axis alignment of scene {reader.scene_id} is not known")
    if not reader.valid_pose_mask[first]:
        raise PoseUnavailableError(
            f"{reader.source}: the first sampled frame (number {reader.frame_ids[first]}) has no valid pose"
        )
    return reader.annotation_from_scene @ invert_pose(reader.poses()[first])


def cam_from_world(reader: SceneReader, indices: Sequence[int]) -> np.ndarray:
    """Poses of sampled frames in the model's world, the camera of the first of them.

    Args:
        reader (`SceneReader`): The scene.
        indices (`Sequence[int]`): Sampled frames.

    Returns:
        `np.ndarray` of shape `(S, 4, 4)`, float64: metres; the first is exactly the identity; NaN where a pose is invalid.

    Raises:
        PoseUnavailableError: The first sampled frame has no valid pose.

    Source:
        Ours.
    """
    if not len(indices) or not reader.valid_pose_mask[indices[0]]:
        raise PoseUnavailableError(f"{reader.source}: the first sampled frame has no valid pose")
    sampled = reader.poses()[list(indices)]
    poses = sampled @ invert_pose(sampled[0])
    poses[0] = np.eye(4)
    return poses


def invert_pose(target_from_source: np.ndarray) -> np.ndarray:
    """Inverse of a pose whose bottom row is 0 0 0 1; NaN stays NaN.

    Args:
        target_from_source (`np.ndarray` of shape `(..., 4, 4)`): Rotation and translation, as a file gives them.

    Returns:
        `np.ndarray` of shape `(..., 4, 4)`, float64: source_from_target.

    Source:
        Ours: the true inverse of the 3x3 part, so that rotations rounded in text come back as written.
    """
    matrix = np.asarray(target_from_source, dtype=np.float64)
    inverse = np.full(matrix.shape, np.nan)
    finite = np.isfinite(matrix).all(axis=(-2, -1))
    turn = np.linalg.inv(matrix[finite][..., :3, :3])
    part = np.zeros((*turn.shape[:-2], 4, 4))
    part[..., :3, :3] = turn
    part[..., :3, 3:] = -turn @ matrix[finite][..., :3, 3:]
    part[..., 3, 3] = 1
    inverse[finite] = part
    return inverse


class SkipCounter:
    """Counts what is skipped, by reason, with the first names of each: nothing is dropped silently.

    Source:
        Ours.
    """

    def __init__(self, num_examples: int = 3):
        self.num_examples = num_examples
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one; `name` says which sample or frame."""
        self.counts[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < self.num_examples:
            named.append(name)

    @property
    def total(self) -> int:
        """How many were skipped."""
        return sum(self.counts.values())

    def summary(self) -> list[str]:
        """One line per reason, most frequent first."""
        return [
            f"{count} skipped: {reason} (first: {', '.join(self.examples[reason])})"
            for reason, count in self.counts.most_common()
        ]


def check_scene_id(scene_id: str) -> str:
    """A scene's name that is safe to put into a path.

    Args:
        scene_id (`str`): As an annotation file gives it.

    Returns:
        `str`: the same.

    Raises:
        VidLLMInputError: It is empty, or not the name of one file or folder.

    Source:
        Ours: annotation files come from elsewhere.
    """
    if not isinstance(scene_id, str) or not scene_id or scene_id in (".", "..") or Path(scene_id).name != scene_id:
        raise VidLLMInputError(f"scene id: wanted a name without folders; got {scene_id!r}")
    return scene_id
