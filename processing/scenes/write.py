"""Writing scenes in the layouts that the readers know, in one step: a folder appears when it is complete.

Shapes: H W pixels of a colour picture, h w pixels of a depth map.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from vidllm.processing.export_scene import replaced_file
from vidllm.processing.scenes.base import Frame, check_scene_id, invert_pose
from vidllm.processing.scenes.cameras import ALIGNMENT_FILE, write_matrix
from vidllm.processing.video_reading_vidllm import VidLLMInputError


JPEG_QUALITY = 95
VIDEO_RATE = 10
MAX_RAW_DEPTH = 65535
PARTIAL = ".partial-"
StoredJpeg = Callable[[Frame], bytes | None]


def write_layout(
    layout: str,
    data_root: str | Path,
    scene_id: str,
    frames: Iterable[Frame],
    annotation_from_scene: np.ndarray | None = None,
    stored_jpeg: StoredJpeg | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a scene where `open_scene` finds it.

    Args:
        layout (`str`): One of `WRITERS`. Layouts hold what they hold: `video` and `images` pictures only.
        data_root (`str` or `Path`): The root; folders are made.
        scene_id (`str`): The scene.
        frames (`Iterable[Frame]`): Read one after the other, so that a generator needs memory for one frame only.
        annotation_from_scene (`np.ndarray` of shape `(4, 4)`, *optional*): The axis alignment; written by the layouts that are folders of
            frames.
        stored_jpeg (callable, *optional*): `frame -> bytes of its JPEG file or None`: copied where the layout has JPEG pictures.
        overwrite (`bool`): Whether to replace what is there.

    Returns:
        `Path`: the folder or file written.

    Raises:
        VidLLMInputError: Unknown layout, no frame, or something is there already.

    Source:
        Ours: formats as the readers of this folder state them.
    """
    check_scene_id(scene_id)
    if layout not in WRITERS:
        raise VidLLMInputError(f"layout: wanted one of {', '.join(WRITERS)}; got {layout!r}")
    place, write = WRITERS[layout]
    path = Path(data_root).expanduser() / place.format(scene_id)
    if path.exists() and not overwrite:
        raise VidLLMInputError(f"{path}: it exists already; it is not overwritten unless asked for")
    replaced = replaced_file(path) if layout == "video" else replaced_folder(path, overwrite)
    with replaced as partial:
        write(partial, frames, annotation_from_scene, stored_jpeg)
    return path


@contextmanager
def replaced_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name once it is complete; a failed or killed write leaves nothing there.

    Args:
        path (`str` or `Path`): Folder to write; parent folders are made.
        overwrite (`bool`): Whether to replace a folder of that name.

    Yields:
        `Path`: where to write.

    Raises:
        VidLLMInputError: It exists already, or the place cannot be written.

    Source:
        Ours.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise VidLLMInputError(f"{path}: it exists already; it is not overwritten unless asked for")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}{PARTIAL}", dir=path.parent))
        # mkdtemp makes the folder private; give it what a plain mkdir() would have.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)
    except OSError as error:
        raise VidLLMInputError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        yield partial
        if path.exists():
            stale = Path(tempfile.mkdtemp(prefix=f".{path.name}{PARTIAL}", dir=path.parent))
            path.rename(stale / "replaced")
            partial.rename(path)
            shutil.rmtree(stale)
        else:
            partial.rename(path)
    except OSError as error:
        raise VidLLMInputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(path: str | Path) -> int:
    """Remove what killed writes of `path` have left beside it.

    Args:
        path (`str` or `Path`): The folder that `replaced_folder` was to write.

    Returns:
        `int`: how many folders were removed.

    Source:
        Ours: one run writes into a data root at a time.
    """
    path = Path(path)
    found = list(path.parent.glob(f".{path.name}{PARTIAL}*")) if path.parent.is_dir() else []
    for folder in found:
        shutil.rmtree(folder, ignore_errors=True)
    return len(found)


def write_depth(path: str | Path, depth_m: np.ndarray) -> None:
    """Write a depth map as 16-bit millimetres.

    Args:
        path (`str` or `Path`): A `.png` file.
        depth_m (`np.ndarray` of shape `(h, w)`): Metres; what is not finite, not positive, or over 65.535 m becomes 0 = invalid.

    Source:
        Upstream: ScanNet/ScanNet@488e5ba:SensReader/python/SensorData.py.
    """
    with np.errstate(invalid="ignore"):
        raw = np.rint(np.asarray(depth_m, dtype=np.float64) * 1000)
        raw = np.where(np.isfinite(raw) & (raw > 0) & (raw <= MAX_RAW_DEPTH), raw, 0).astype(np.uint16)
    Image.fromarray(raw).save(path)


def _write_rgb(path: Path, frame: Frame, stored_jpeg: StoredJpeg | None) -> None:
    """A colour picture; a stored JPEG is copied."""
    stored = stored_jpeg(frame) if stored_jpeg is not None and path.suffix == ".jpg" else None
    if stored is not None:
        path.write_bytes(stored)
    elif path.suffix == ".jpg":
        Image.fromarray(frame.rgb).save(path, quality=JPEG_QUALITY, subsampling=0)
    else:
        Image.fromarray(frame.rgb).save(path)


def _pose_rows(frame: Frame) -> np.ndarray:
    """scene_from_cam (4, 4); -inf where there is none, as ScanNet writes lost tracking."""
    return np.full((4, 4), -np.inf) if frame.cam_from_scene is None else invert_pose(frame.cam_from_scene)


def _write_intrinsics(path: Path, intrinsics_px: np.ndarray | None) -> None:
    """Intrinsics as a 4x4 matrix, if known."""
    if intrinsics_px is not None:
        matrix = np.eye(4)
        matrix[:3, :3] = intrinsics_px
        write_matrix(path, matrix)


def _write_frames(
    frames: Iterable[Frame],
    colour: Callable[[Frame, int], Path],
    depth: Callable[[Frame, int], Path],
    stored_jpeg: StoredJpeg | None,
) -> tuple[Frame, list[int], np.ndarray]:
    """Write pictures and depth maps to the paths that the layout gives; the first frame, all numbers, all poses (F, 4, 4)."""
    first, numbers, poses = None, [], []
    for number, frame in enumerate(frames):
        first = frame if first is None else first
        _write_rgb(colour(frame, number), frame, stored_jpeg)
        if frame.depth_m is not None:
            write_depth(depth(frame, number), frame.depth_m)
        numbers.append(frame.frame_id)
        poses.append(_pose_rows(frame))
    if first is None:
        raise VidLLMInputError("wanted at least one frame to write; got none")
    return first, numbers, np.array(poses)


def _write_poses(paths: Iterable[Path], poses: np.ndarray) -> None:
    """One pose file per frame; none at all for a scene without any pose."""
    if np.isfinite(poses).all(axis=(1, 2)).any():
        for path, pose in zip(paths, poses, strict=True):
            write_matrix(path, pose)


def write_posed_images(
    folder: Path,
    frames: Iterable[Frame],
    annotation_from_scene: np.ndarray | None = None,
    stored_jpeg: StoredJpeg | None = None,
) -> None:
    """Write EmbodiedScan's layout into an empty folder.

    Args:
        folder (`Path`): It exists.
        frames (`Iterable[Frame]`): In order; read one after the other.
        annotation_from_scene (`np.ndarray` of shape `(4, 4)`, *optional*): The axis alignment, written as `axis_align_matrix.txt`.
        stored_jpeg (callable, *optional*): `frame -> bytes of its JPEG file or None`; copied instead of encoding anew.

    Raises:
        VidLLMInputError: No frame.

    Source:
        Upstream: OpenRobotLab/EmbodiedScan (the layout). Ours: the alignment beside it.
    """
    first, numbers, poses = _write_frames(
        frames,
        lambda frame, _: folder / f"{frame.frame_id:05d}.jpg",
        lambda frame, _: folder / f"{frame.frame_id:05d}.png",
        stored_jpeg,
    )
    _write_poses((folder / f"{number:05d}.txt" for number in numbers), poses)
    _write_intrinsics(folder / "intrinsic.txt", first.intrinsics_px)
    _write_intrinsics(folder / "depth_intrinsic.txt", first.depth_intrinsics_px)
    if annotation_from_scene is not None:
        write_matrix(folder / ALIGNMENT_FILE, annotation_from_scene)


def _folders_writer(suffix: str, intrinsics: tuple[str, ...], aligned: bool) -> Callable:
    """A writer of `color`, `depth`, `pose` folders."""

    def write(
        folder: Path, frames: Iterable[Frame], alignment: np.ndarray | None, stored_jpeg: StoredJpeg | None
    ) -> None:
        for name in ("color", "depth", "pose"):
            (folder / name).mkdir()
        first, numbers, poses = _write_frames(
            frames,
            lambda frame, _: folder / "color" / f"{frame.frame_id}{suffix}",
            lambda frame, _: folder / "depth" / f"{frame.frame_id}.png",
            stored_jpeg,
        )
        _write_poses((folder / "pose" / f"{number}.txt" for number in numbers), poses)
        if intrinsics:
            (folder / "intrinsic").mkdir()
        matrices = {"color": first.intrinsics_px, "depth": first.depth_intrinsics_px}
        for camera in intrinsics:
            _write_intrinsics(folder / "intrinsic" / f"intrinsic_{camera}.txt", matrices[camera])
            write_matrix(folder / "intrinsic" / f"extrinsic_{camera}.txt", np.eye(4))
        if aligned and alignment is not None:
            write_matrix(folder / ALIGNMENT_FILE, alignment)

    return write


def _pose_eval(
    folder: Path, frames: Iterable[Frame], alignment: np.ndarray | None, stored_jpeg: StoredJpeg | None
) -> None:
    """CUT3R's layout; frames are numbered anew."""
    (folder / "color_90").mkdir()
    (folder / "depth_90").mkdir()
    _, _, poses = _write_frames(
        frames,
        lambda _, number: folder / "color_90" / f"frame_{number:04d}.jpg",
        lambda _, number: folder / "depth_90" / f"frame_{number:04d}.png",
        stored_jpeg,
    )
    # (F, 4, 4) -> (F, 16), row after row
    write_matrix(folder / "pose_90.txt", poses.reshape(-1, 16))


def _images(
    folder: Path, frames: Iterable[Frame], alignment: np.ndarray | None, stored_jpeg: StoredJpeg | None
) -> None:
    """Plain pictures."""
    for frame in frames:
        _write_rgb(folder / f"{frame.frame_id:06d}.jpg", frame, stored_jpeg)
    if not any(folder.iterdir()):
        raise VidLLMInputError("wanted at least one frame to write; got none")


def _video(path: Path, frames: Iterable[Frame], alignment: np.ndarray | None, stored_jpeg: StoredJpeg | None) -> None:
    """An H.264 file of ten frames per second; sides are cut to even numbers, which the codec wants."""
    try:
        import av
    except ImportError as error:
        raise ImportError("writing a video file needs PyAV: pip install av") from error
    stream = None
    with av.open(str(path), "w") as container:
        for frame in frames:
            rgb = frame.rgb[: frame.rgb.shape[0] // 2 * 2, : frame.rgb.shape[1] // 2 * 2]
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(VIDEO_RATE), options={"crf": "16"})
                stream.height, stream.width = rgb.shape[:2]
                stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")))
        if stream is None:
            raise VidLLMInputError("wanted at least one frame to write; got none")
        container.mux(stream.encode())


# Where a layout lies below a data root, and who writes it.
WRITERS: dict[str, tuple[str, Callable]] = {
    "posed_images": ("posed_images/{}", write_posed_images),
    "sens_export": ("{}", _folders_writer(".jpg", ("color", "depth"), aligned=False)),
    "llava3d": ("{}", _folders_writer(".png", ("depth",), aligned=True)),
    "pose_eval": ("{}", _pose_eval),
    "frames_square": ("frames_square/{}", _folders_writer(".jpg", (), aligned=False)),
    "video": ("videos/{}.mp4", _video),
    "images": ("images/{}", _images),
}
