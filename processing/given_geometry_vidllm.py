"""Poses, intrinsics and depth that the caller has, brought to the frames and pixels that the model sees.

Shapes: B videos, S sampled frames, F source frames, H W pixels of the model's input.
"""

import difflib
import json
import math
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


KEYS = ("cam_from_world", "intrinsics_px", "depth_m")
ROTATION_TOLERANCE = 1e-2
ASPECT_TOLERANCE = 0.02
NUM_COLMAP_PARAMETERS = {
    "SIMPLE_PINHOLE": 3,
    "PINHOLE": 4,
    "SIMPLE_RADIAL": 4,
    "RADIAL": 5,
    "OPENCV": 8,
    "FULL_OPENCV": 12,
}


def intrinsics_to_model(intrinsics_px: np.ndarray, from_hw: Sequence[int], metadata: dict[str, Any]) -> np.ndarray:
    """Pinhole intrinsics of the source picture as those of the model's input.

    Args:
        intrinsics_px (`numpy.ndarray` of shape `(..., 3, 3)`): Pixels of a picture of `from_hw`, upright, uncropped.
        from_hw (`tuple[int, int]`): Height and width that they refer to.
        metadata (`dict`): Of the video, see `VidLLMVideoProcessor`.

    Returns:
        `numpy.ndarray` of shape `(..., 3, 3)`: pixels of the model's input.

    Source:
        Upstream: facebookresearch/vggt (focal lengths and principal point scale by the ratio of sizes; a crop is subtracted).
    """
    (height, width), (top, left) = metadata["resized_hw"], metadata["crop_top_left"]
    scaled = np.array(intrinsics_px, dtype=np.float64)
    scaled[..., 0, :] *= width / from_hw[1]
    scaled[..., 1, :] *= height / from_hw[0]
    scaled[..., 0, 2] -= left
    scaled[..., 1, 2] -= top
    return scaled


def intrinsics_to_source(intrinsics_px: np.ndarray, metadata: dict[str, Any]) -> np.ndarray:
    """Inverse of `intrinsics_to_model`: what a file beside the video should say.

    Args:
        intrinsics_px (`numpy.ndarray` of shape `(..., 3, 3)`): Pixels of the model's input.
        metadata (`dict`): Of the video, see `VidLLMVideoProcessor`.

    Returns:
        `numpy.ndarray` of shape `(..., 3, 3)`: pixels of the upright source frame (`metadata["height"]`, `metadata["width"]`).

    Source:
        Ours: lets an export be read back.
    """
    (height, width), (top, left) = metadata["resized_hw"], metadata["crop_top_left"]
    scaled = np.array(intrinsics_px, dtype=np.float64)
    scaled[..., 0, 2] += left
    scaled[..., 1, 2] += top
    scaled[..., 0, :] *= metadata["width"] / width
    scaled[..., 1, :] *= metadata["height"] / height
    return scaled


def prepare_geometry(
    source: Any, metadata: Sequence[dict[str, Any]], max_time_difference_s: float = 0.02
) -> dict[str, torch.Tensor]:
    """Given geometry of the sampled frames, resized and cropped as the frames were.

    Args:
        source: One of, or a list with one per video:
            - path of a `cameras.json` as `vidllm reconstruct` writes it (frames are matched by `index`);
            - path of a TUM trajectory: lines `timestamp tx ty tz qx qy qz qw`, camera to world, matched by the nearest time (frames
              without times count as at their index in seconds);
            - path of a folder with COLMAP's `cameras.txt` and `images.txt`, matched by file name, else by the last number in it (the
              frame's index, from 0);
            - dict of arrays, any of `cam_from_world` `(F or S, 4, 4)`, `intrinsics_px` `(3, 3)` or `(F or S, 3, 3)` in pixels of the
              upright source frame, `depth_m` `(F or S, height, width)` at any resolution of the same aspect, not finite or
              not positive = invalid.
        metadata (`list[dict]`): Per video, see `VidLLMVideoProcessor`.
        max_time_difference_s (`float`): Farthest that a pose's time may be from its frame's, seconds.

    Returns:
        `dict[str, torch.Tensor]`: any of, float32, padded at the end like `pixel_values_videos`,
        - cam_from_world of shape `(videos, frames, 4, 4)`: OpenCV axes, metres, in the world of the source (the model re-expresses
          it to the first frame); padding is the identity.
        - intrinsics_px of shape `(videos, frames, 3, 3)`: pixels of the model's input; padding is the identity.
        - depth_m of shape `(videos, frames, height, width)`: metres along the optical axis, 0 = invalid.

    Raises:
        VidLLMInputError: A pose is invalid or missing, a trajectory is not in order (names the frame); a file says that it is not in
            metres, as the exports of a reconstruction without a unit do.

    Source:
        Ours: design of `geometry=`. TUM and COLMAP formats as their authors document them.
    """
    if len(metadata) == 1 and not isinstance(source, (list, tuple)):
        source = [source]
    if isinstance(source, dict):
        source = _split_batch(source, metadata)
    if not isinstance(source, (list, tuple)) or len(source) != len(metadata):
        raise VidLLMInputError(f"geometry: wanted one source per video ({len(metadata)} videos); got {source!r:.80}")
    rows = [_read_source(item, info, max_time_difference_s) for item, info in zip(source, metadata, strict=True)]
    keys = {key: [row[key] for row in rows if key in row] for key in KEYS}
    if any(len(values) not in (0, len(rows)) for values in keys.values()):
        raise VidLLMInputError(f"geometry: wanted the same parts for all videos; got {[sorted(row) for row in rows]}")
    num_frames = max(len(info["frames_indices"]) for info in metadata)
    geometry = {}
    for key, values in keys.items():
        if not values:
            continue
        shape = [max(value.shape[axis] for value in values) for axis in (1, 2)]
        packed = torch.zeros(len(values), num_frames, *shape)
        if key != "depth_m":
            packed += torch.eye(shape[0])
        for row, value in enumerate(values):
            packed[row, : value.shape[0], : value.shape[1], : value.shape[2]] = torch.as_tensor(
                value, dtype=torch.float32
            )
        geometry[key] = packed
    return geometry


def _split_batch(source: dict, metadata: Sequence[dict]) -> list[dict]:
    """A dict of arrays with a leading axis of videos, one dict per video."""
    ranks = {"cam_from_world": 4, "intrinsics_px": 4, "depth_m": 4}
    for key, array in source.items():
        if np.ndim(array) != ranks.get(key, 4) or len(array) != len(metadata):
            raise VidLLMInputError(
                f"geometry: wanted {key} with {len(metadata)} videos on the first axis; got {np.shape(array)}"
            )
    return [{key: array[row] for key, array in source.items()} for row in range(len(metadata))]


def _read_source(source: Any, metadata: dict, max_time_difference_s: float) -> dict[str, np.ndarray]:
    """One video's geometry: cam_from_world (S,4,4), intrinsics_px (S,3,3), depth_m (S,H,W), as far as given."""
    if isinstance(source, dict):
        given = _from_arrays(source, metadata)
    elif isinstance(source, (str, os.PathLike)):
        path = os.path.expanduser(os.fspath(source))
        if not os.path.exists(path):
            raise VidLLMMissingFileError(f"{path}: no such file or folder")
        if os.path.isdir(path):
            given = _from_colmap(path, metadata)
        elif path.lower().endswith(".json"):
            given = _from_cameras_json(path, metadata)
        else:
            given = _from_tum(path, metadata, max_time_difference_s)
    else:
        raise VidLLMInputError(
            f"geometry: wanted a cameras.json, a TUM trajectory, a COLMAP folder or a dict of arrays; got {type(source).__name__}"
        )
    for key, check in (("cam_from_world", _check_pose), ("intrinsics_px", _check_intrinsics)):
        for position, matrix in enumerate(given.get(key, ())):
            check(matrix, _frame_name(metadata, position))
    return given


def _frame_name(metadata: dict, position: int) -> str:
    """How messages call a sampled frame."""
    index = metadata["frames_indices"][position]
    names, times_s = metadata.get("frame_names"), metadata.get("timestamps_s")
    extra = names[position] if names else (f"{times_s[position]:.3f} s" if times_s else "")
    return f"geometry of frame {index}" + (f" ({extra})" if extra else "")


def _check_pose(cam_from_world: np.ndarray, name: str) -> None:
    """A rigid transform or an error."""
    if not np.isfinite(cam_from_world).all():
        raise VidLLMInputError(f"{name}: the pose is not finite (a lost camera?)")
    rotation = cam_from_world[:3, :3]
    error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if (
        error > ROTATION_TOLERANCE
        or np.linalg.det(rotation) < 0
        or np.abs(cam_from_world[3] - [0, 0, 0, 1]).max() > 1e-6
    ):
        raise VidLLMInputError(f"{name}: the pose is not a rigid transform: {np.round(cam_from_world, 4).tolist()}")


def _check_intrinsics(intrinsics_px: np.ndarray, name: str) -> None:
    """A pinhole camera or an error."""
    if not np.isfinite(intrinsics_px).all() or min(intrinsics_px[0, 0], intrinsics_px[1, 1]) <= 0:
        raise VidLLMInputError(
            f"{name}: the intrinsics are not a pinhole camera: {np.round(intrinsics_px, 4).tolist()}"
        )


def _from_arrays(source: dict, metadata: dict) -> dict[str, np.ndarray]:
    """Pick the sampled frames out of arrays per source frame, or take arrays per sampled frame."""
    indices, total = metadata["frames_indices"], metadata["total_num_frames"]
    shapes = {"cam_from_world": (4, 4), "intrinsics_px": (3, 3), "depth_m": (None, None)}
    given = {}
    for key, value in source.items():
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.0)[0]
            raise VidLLMInputError(f"geometry: wanted any of {', '.join(KEYS)}; got {key!r} (did you mean {close!r}?)")
        if value is None:
            continue
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        array = array.astype(np.float64)
        if key == "intrinsics_px" and array.ndim == 2:
            array = np.repeat(array[None], len(indices), axis=0)
        if array.ndim == 4 and len(array) == 1:
            # (1, frames, ..) -> (frames, ..): a batch of one video
            array = array[0]
        wanted = shapes[key]
        if array.ndim != 3 or any(
            want not in (None, have) for want, have in zip(wanted, array.shape[1:], strict=True)
        ):
            shape = "frames, " + ", ".join(
                str(side) if side else name for side, name in zip(wanted, ("height", "width"), strict=True)
            )
            raise VidLLMInputError(f"geometry: wanted {key} of shape ({shape}); got {array.shape}")
        if len(array) == total:
            array = array[indices]
        elif len(array) != len(indices):
            missing = next((p for p, index in enumerate(indices) if index >= len(array)), None)
            name = _frame_name(metadata, missing) if missing is not None else "geometry"
            raise VidLLMInputError(
                f"{name}: none given; {key} has {len(array)} entries, wanted {total} (one per source frame) or {len(indices)} (one per "
                "sampled frame)"
            )
        given[key] = array
    if "intrinsics_px" in given:
        given["intrinsics_px"] = intrinsics_to_model(
            given["intrinsics_px"], (metadata["height"], metadata["width"]), metadata
        )
    if "depth_m" in given:
        given["depth_m"] = _resize_depth(given["depth_m"], metadata)
    return given


def _resize_depth(depth_m: np.ndarray, metadata: dict) -> np.ndarray:
    """`(S, h, w)` of any resolution to the model's pixels, by the nearest value (a mean of depths is no surface)."""
    _check_aspect(depth_m.shape[1:], metadata, "depth_m")
    depth_m = np.where(np.isfinite(depth_m) & (depth_m > 0), depth_m, 0.0)
    resized = nn.functional.interpolate(
        torch.from_numpy(depth_m)[:, None], size=tuple(metadata["resized_hw"]), mode="nearest-exact"
    )[:, 0]
    (top, left), (height, width) = metadata["crop_top_left"], metadata["out_hw"]
    return resized[:, top : top + height, left : left + width].numpy()


def _check_aspect(from_hw: Sequence[int], metadata: dict, name: str) -> None:
    """The picture that something refers to must have the video's aspect, else it was cropped or turned."""
    wanted = metadata["width"] / metadata["height"]
    if abs(from_hw[1] / from_hw[0] / wanted - 1) > ASPECT_TOLERANCE:
        raise VidLLMInputError(
            f"geometry: wanted {name} for pictures like the upright source frame, {metadata['width']}x{metadata['height']}; got "
            f"{from_hw[1]}x{from_hw[0]}"
        )


def _from_cameras_json(path: str, metadata: dict) -> dict[str, np.ndarray]:
    """Our own export: frames by index, intrinsics at the stated picture size."""
    try:
        with open(path, encoding="utf-8") as file:
            cameras = json.load(file)
        frames = cameras["frames"]
        indices = [int(frame["index"]) for frame in frames]
        if not str(cameras["convention"]).startswith("cam_from_world"):
            raise VidLLMInputError(f"{path}: wanted the convention cam_from_world; got {cameras['convention']!r}")
    except VidLLMInputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VidLLMInputError(f"{path}: not a cameras.json ({type(error).__name__}: {error})") from None
    if cameras.get("unit", "m") != "m":
        raise VidLLMInputError(f"{path}: wanted metres; its unit is {cameras['unit']!r}")
    _check_rising(indices, path, "index")
    times_s = [frame.get("timestamp_s") for frame in frames]
    if None not in times_s:
        _check_rising(times_s, path, "timestamp_s", indices)
    row_of = {index: row for row, index in enumerate(indices)}
    given = {}
    for key, side in (("cam_from_world", 4), ("intrinsics_px", 3)):
        if all(frame.get(key) is None for frame in frames):
            continue
        matrices = []
        for position, index in enumerate(metadata["frames_indices"]):
            name = _frame_name(metadata, position)
            if index not in row_of:
                raise VidLLMInputError(
                    f"{name}: {path} has no such frame; it holds {len(indices)} frames, up to {max(indices)}"
                )
            matrices.append(_matrix(frames[row_of[index]].get(key), side, name))
        given[key] = np.stack(matrices)
    if not given:
        raise VidLLMInputError(f"{path}: neither cam_from_world nor intrinsics_px in its frames")
    if "intrinsics_px" in given:
        if not cameras.get("width") or not cameras.get("height"):
            raise VidLLMInputError(f"{path}: wanted width and height of the pictures that intrinsics_px refers to")
        from_hw = (cameras["height"], cameras["width"])
        if tuple(from_hw) != tuple(metadata["out_hw"]):
            # Else they are in the model's pixels already.
            _check_aspect(from_hw, metadata, "intrinsics_px")
            given["intrinsics_px"] = intrinsics_to_model(given["intrinsics_px"], from_hw, metadata)
    return given


def _check_comment(line: str, path: str) -> None:
    """Our own exports say in a comment if they are not in metres."""
    if line.lstrip().startswith("#") and re.search(r"\bunit:? relative\b", line):
        raise VidLLMInputError(f"{path}: wanted metres; a comment says that its unit is 'relative'")


def _matrix(values: Any, side: int, name: str) -> np.ndarray:
    """A square matrix out of JSON."""
    try:
        matrix = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    if matrix.shape != (side, side):
        raise VidLLMInputError(f"{name}: wanted a {side}x{side} matrix; got {values!r:.80}")
    return matrix


def _check_rising(values: Sequence[float], path: str, what: str, names: Sequence[Any] | None = None) -> None:
    """Strictly rising and finite, or an error that names the first entry that is not."""
    if not len(values):
        raise VidLLMInputError(f"{path}: it holds no frame")
    for row, value in enumerate(values):
        if not math.isfinite(value) or (row and value <= values[row - 1]):
            name = names[row] if names is not None else row
            raise VidLLMInputError(
                f"{path}: wanted frames in order of {what}; frame {name} has {value} after {values[row - 1] if row else 'nothing'}"
            )


def _rotation_from_quat(quat_xyzw: Sequence[float], name: str) -> np.ndarray:
    """Rotation matrix of a unit quaternion, scalar last."""
    norm = float(np.linalg.norm(quat_xyzw))
    if not abs(norm - 1) < ROTATION_TOLERANCE:
        raise VidLLMInputError(f"{name}: wanted a unit quaternion; got {list(quat_xyzw)} of length {norm:.4g}")
    x, y, z, w = np.asarray(quat_xyzw, dtype=np.float64) / norm
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _from_tum(path: str, metadata: dict, max_time_difference_s: float) -> dict[str, np.ndarray]:
    """TUM trajectory (world_from_cam, quaternion scalar last), nearest time."""
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                _check_comment(line, path)
                continue
            try:
                row = [float(word) for word in line.replace(",", " ").split()]
            except ValueError:
                row = []
            if len(row) != 8:
                raise VidLLMInputError(
                    f"{path}, line {number}: wanted `timestamp tx ty tz qx qy qz qw`; got {line.strip()!r:.80}"
                )
            rows.append(row)
    poses = np.array(rows, dtype=np.float64).reshape(-1, 8)
    times_s = poses[:, 0]
    _check_rising(times_s.tolist(), path, "time")
    frame_times_s = metadata.get("timestamps_s") or [float(index) for index in metadata["frames_indices"]]
    cameras = []
    for position, time_s in enumerate(frame_times_s):
        name = _frame_name(metadata, position)
        row = int(np.abs(times_s - time_s).argmin())
        if abs(times_s[row] - time_s) > max_time_difference_s:
            raise VidLLMInputError(
                f"{name}: no pose in {path} within {max_time_difference_s} s of {time_s:.3f} s; the nearest is at {times_s[row]:.3f} s, "
                f"and the trajectory spans {times_s[0]:.3f} to {times_s[-1]:.3f} s"
            )
        if not np.isfinite(poses[row]).all():
            raise VidLLMInputError(f"{name}: the pose is not finite (a lost camera?)")
        rotation = _rotation_from_quat(poses[row, 4:], name)
        cam_from_world = np.eye(4)
        cam_from_world[:3, :3] = rotation.T
        cam_from_world[:3, 3] = -rotation.T @ poses[row, 1:4]
        cameras.append(cam_from_world)
    return {"cam_from_world": np.stack(cameras)}


def _from_colmap(folder: str, metadata: dict) -> dict[str, np.ndarray]:
    """COLMAP's text model (cam_from_world, quaternion scalar first); lens distortion is ignored with a warning."""
    cameras, images = _read_colmap_cameras(folder), _read_colmap_images(folder)
    by_number: dict[int, tuple] = {}
    for name, image in images.items():
        numbers = re.findall(r"\d+", os.path.splitext(os.path.basename(name))[0])
        if numbers:
            by_number.setdefault(int(numbers[-1]), image)
    poses, intrinsics_px = [], []
    for position, index in enumerate(metadata["frames_indices"]):
        name = _frame_name(metadata, position)
        frame_names = metadata.get("frame_names")
        image = images.get(frame_names[position]) if frame_names else by_number.get(index)
        if image is None and frame_names:
            image = by_number.get(index) if not set(metadata["frame_names"]) & set(images) else None
        if image is None:
            raise VidLLMInputError(f"{name}: {folder} has no image of this frame among its {len(images)}")
        quat_wxyz, translation, camera_id = image
        if camera_id not in cameras:
            raise VidLLMInputError(f"{name}: cameras.txt has no camera {camera_id}")
        if not np.isfinite([*quat_wxyz, *translation]).all():
            raise VidLLMInputError(f"{name}: the pose is not finite (a lost camera?)")
        cam_from_world = np.eye(4)
        cam_from_world[:3, :3] = _rotation_from_quat([*quat_wxyz[1:], quat_wxyz[0]], name)
        cam_from_world[:3, 3] = translation
        poses.append(cam_from_world)
        matrix, from_hw = cameras[camera_id]
        if tuple(from_hw) != tuple(metadata["out_hw"]):
            _check_aspect(from_hw, metadata, "cameras.txt")
            matrix = intrinsics_to_model(matrix, from_hw, metadata)
        intrinsics_px.append(matrix)
    return {"cam_from_world": np.stack(poses), "intrinsics_px": np.stack(intrinsics_px)}


def _colmap_lines(folder: str, name: str, keep_empty: bool = False) -> list[tuple[int, str]]:
    """Numbered lines of a COLMAP text file without comments."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise VidLLMMissingFileError(f"{folder}: no {name} in this folder; wanted COLMAP's text model")
    with open(path, encoding="utf-8") as file:
        lines = [(number, line.strip()) for number, line in enumerate(file, 1)]
    for _, line in lines:
        _check_comment(line, path)
    return [(number, line) for number, line in lines if not line.startswith("#") and (line or keep_empty)]


def _read_colmap_cameras(folder: str) -> dict[int, tuple[np.ndarray, tuple[int, int]]]:
    """Camera id -> intrinsics (3, 3) and (height, width)."""
    cameras, distorted = {}, False
    for number, line in _colmap_lines(folder, "cameras.txt"):
        words = line.split()
        try:
            camera_id, model, width, height = int(words[0]), words[1], int(words[2]), int(words[3])
            values = [float(word) for word in words[4:]]
        except (IndexError, ValueError):
            raise VidLLMInputError(f"{folder}/cameras.txt, line {number}: not a camera: {line!r:.80}") from None
        if NUM_COLMAP_PARAMETERS.get(model) != len(values):
            raise VidLLMInputError(
                f"{folder}/cameras.txt, line {number}: wanted one of {', '.join(NUM_COLMAP_PARAMETERS)} with its parameters; got "
                f"{model} with {len(values)}"
            )
        has_one_focal = model.startswith("SIMPLE") or model == "RADIAL"
        focal, rest = ([values[0]] * 2, values[1:]) if has_one_focal else (values[:2], values[2:])
        distorted = distorted or any(rest[2:])
        # COLMAP counts pixels from their corner, we from their centre.
        cameras[camera_id] = (
            np.array([[focal[0], 0, rest[0] - 0.5], [0, focal[1], rest[1] - 0.5], [0, 0, 1.0]]),
            (height, width),
        )
    if distorted:
        warnings.warn(
            f"{folder}: the model is a pinhole camera; lens distortion in cameras.txt is ignored", stacklevel=5
        )
    return cameras


def _read_colmap_images(folder: str) -> dict[str, tuple[list[float], list[float], int]]:
    """Image name -> quaternion (w, x, y, z), translation, camera id."""
    images, is_points_line = {}, False
    for number, line in _colmap_lines(folder, "images.txt", keep_empty=True):
        words = line.split(maxsplit=9)
        if is_points_line or not words:
            # The line after an image lists its points, and may be empty.
            is_points_line = False
            continue
        is_points_line = True
        try:
            values, camera_id, name = [float(word) for word in words[1:8]], int(words[8]), words[9]
        except (IndexError, ValueError):
            raise VidLLMInputError(f"{folder}/images.txt, line {number}: not an image: {line!r:.80}") from None
        images[name] = (values[:4], values[4:], camera_id)
    if not images:
        raise VidLLMInputError(f"{folder}/images.txt: it holds no image")
    return images
