"""Poses, intrinsics and alignments as ScanNet's text files give them, and the rule that says which poses count.

Shapes: F frames.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vidllm.processing.scenes.base import invert_pose
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


RIGID_TOLERANCE = 1e-2
BOTTOM_ROW_TOLERANCE = 1e-4
SCAN_FOLDERS = ("scans", "scans_test")
ALIGNMENT_FILE = "axis_align_matrix.txt"


def checked_poses(scene_from_cam: np.ndarray, name: str, frame_ids: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    """Turn camera-to-scene matrices round; those that are no pose become NaN and are counted.

    No pose is: a matrix with an infinite or NaN entry (ScanNet writes -inf where tracking was lost; products of such matrices hold
    inf and NaN), one with a bottom row other than 0 0 0 1, one whose 3x3 part is no rotation. A zero in the first place, which
    ScanNet's own reader takes for "lost" too, counts as such unless the matrix is a rotation all the same.

    Args:
        scene_from_cam (`np.ndarray` of shape `(F, 4, 4)`): As in the files.
        name (`str`): File or folder, for messages.
        frame_ids (`Sequence[int]`): Numbers of the frames.

    Returns:
        `tuple`: cam_from_scene `np.ndarray` of shape `(F, 4, 4)`, float64, NaN where invalid; and messages with counts.

    Source:
        Upstream: ScanNet/ScanNet@0394e98:SensReader/src/sensorData.h (invalid = -inf or m[0] == 0). Ours: the other tests.
    """
    poses = np.asarray(scene_from_cam, dtype=np.float64).reshape(-1, 4, 4)
    finite = np.isfinite(poses).all(axis=(1, 2))
    safe = np.where(finite[:, None, None], poses, np.eye(4))
    bottom = np.abs(safe[:, 3] - (0, 0, 0, 1)).max(axis=-1, initial=0) <= BOTTOM_ROW_TOLERANCE
    turn = safe[:, :3, :3]
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(turn @ turn.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2), initial=0)
        rigid = (error <= RIGID_TOLERANCE) & (np.linalg.det(turn) > 0)
    reasons = {
        "not finite, tracking lost": ~finite,
        "a bottom row other than 0 0 0 1": finite & ~bottom,
        "zero in the first place": finite & bottom & ~rigid & (safe[:, 0, 0] == 0),
        "not a rotation": finite & bottom & ~rigid & (safe[:, 0, 0] != 0),
    }
    problems = []
    for reason, mask in reasons.items():
        if mask.any():
            first = frame_ids[int(np.argmax(mask))]
            problems.append(
                f"{name}: {int(mask.sum())} of {len(poses)} poses are invalid: {reason} (first: frame {first})"
            )
    valid = finite & bottom & rigid
    cam_from_scene = np.full(poses.shape, np.nan)
    cam_from_scene[valid] = invert_pose(poses[valid])
    return cam_from_scene, problems


def _text_lines(path: Path) -> list[str]:
    """Lines of a text file; a file that cannot be read is one clear error."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise VidLLMMissingFileError(f"{path}: no such file") from None
    except OSError as error:
        raise VidLLMInputError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_numbers(path: str | Path) -> list[list[float]]:
    """Numbers of a text file, line by line; empty lines are left out.

    Args:
        path (`str` or `Path`): Text with numbers separated by blanks, tabs or commas; `inf`, `-inf`, `nan` and what Windows writes for them
            (`-1.#INF`, taken for NaN) are numbers.

    Returns:
        `list[list[float]]`: one list per line.

    Raises:
        VidLLMInputError: A field is no number; names file, line and field.

    Source:
        Ours: `numpy.loadtxt` names no field.
    """
    path = Path(path)
    lines = _text_lines(path)
    rows = []
    for number, line in enumerate(lines, 1):
        row = []
        for field, word in enumerate(line.replace(",", " ").split(), 1):
            try:
                row.append(float("nan") if "#" in word else float(word))
            except ValueError:
                raise VidLLMInputError(
                    f"{path}, line {number}, field {field}: wanted a number; got {word[:40]!r}"
                ) from None
        if row:
            rows.append(row)
    return rows


def read_pose(path: str | Path) -> np.ndarray:
    """A 4x4 matrix from text: four lines of four numbers, or sixteen numbers in one line.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `np.ndarray` of shape `(4, 4)`, float64: not checked; entries may be infinite.

    Raises:
        VidLLMInputError: Other numbers of rows or columns; names the file.

    Source:
        Ours.
    """
    rows = read_numbers(path)
    counts = [len(row) for row in rows]
    if counts not in ([4] * 4, [16]):
        raise VidLLMInputError(f"{path}: wanted a pose of 4 lines with 4 numbers; got lines of {counts} numbers")
    # (4 rows of 4 or 1 row of 16) -> (4, 4)
    return np.array(rows, dtype=np.float64).reshape(4, 4)


def read_intrinsics(path: str | Path) -> np.ndarray:
    """Pinhole intrinsics from text: a 3x3, 3x4 or 4x4 matrix.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `np.ndarray` of shape `(3, 3)`, float64: pixels.

    Raises:
        VidLLMInputError: Another shape, or focal lengths that are not positive; names the file.

    Source:
        Ours.
    """
    rows = read_numbers(path)
    counts = [len(row) for row in rows]
    if counts not in ([3] * 3, [4] * 3, [4] * 4):
        raise VidLLMInputError(f"{path}: wanted intrinsics of 4 lines with 4 numbers; got lines of {counts} numbers")
    matrix = np.array([row[:3] for row in rows[:3]], dtype=np.float64)
    if not np.isfinite(matrix).all() or matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
        raise VidLLMInputError(f"{path}: wanted finite intrinsics with positive focal lengths; got {matrix.tolist()}")
    return matrix


def write_matrix(path: str | Path, matrix: np.ndarray) -> None:
    """Write a matrix as text, one row per line.

    Args:
        path (`str` or `Path`): The file.
        matrix (`np.ndarray` of shape `(rows, columns)`): Anything, infinite entries too (`-inf`).

    Source:
        Upstream: ScanNet/ScanNet@488e5ba:SensReader/python/SensorData.py (plain decimals). Ours: nine decimals instead of six.
    """
    lines = (" ".join(f"{value:.9f}" for value in row) for row in np.atleast_2d(matrix))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_scan_info(path: str | Path) -> dict[str, str]:
    """The `key = value` lines of a ScanNet `<scene>.txt`.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `dict[str, str]`: values by key; of a repeated key the last.

    Raises:
        VidLLMInputError: It cannot be read, or a line has no `=`; names the line.

    Source:
        Ours.
    """
    path = Path(path)
    lines = _text_lines(path)
    info = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        key, equals, value = line.partition("=")
        if not equals:
            raise VidLLMInputError(f"{path}, line {number}: wanted `key = value`; got {line.strip()[:60]!r}")
        info[key.strip()] = value.strip()
    return info


def axis_alignment(path: str | Path) -> np.ndarray:
    """`axisAlignment` of a ScanNet `<scene>.txt`.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `np.ndarray` of shape `(4, 4)`, float64: annotation_from_scene; the identity if the file has no such line, as in test scans.

    Raises:
        VidLLMInputError: The line does not hold a rigid transform; names the field.

    Source:
        Upstream: daveredrum/ScanRefer@694f7c1:data/scannet/load_scannet_data.py.
    """
    text = read_scan_info(path).get("axisAlignment")
    if text is None:
        return np.eye(4)
    values = []
    for field, word in enumerate(text.split(), 1):
        try:
            values.append(float(word))
        except ValueError:
            raise VidLLMInputError(
                f"{path}, axisAlignment, field {field}: wanted a number; got {word[:40]!r}"
            ) from None
    if len(values) != 16:
        raise VidLLMInputError(f"{path}, axisAlignment: wanted 16 numbers; got {len(values)}")
    # (16,) -> (4, 4), row after row
    return _checked_alignment(np.array(values).reshape(4, 4), f"{path}, axisAlignment")


def find_annotation_from_scene(data_root: str | Path | None, scene_id: str, *folders: str | Path) -> np.ndarray | None:
    """Axis alignment of a scene, wherever a data root keeps it.

    Args:
        data_root (`str` or `Path`, *optional*): Its `scans/<scene>/<scene>.txt`, then `scans_test/...`, is asked after `folders`.
        scene_id (`str`): The scene.
        *folders (`str` or `Path`): The reader's own folders: `axis_align_matrix.txt` or `<scene>.txt` in them.

    Returns:
        `np.ndarray` of shape `(4, 4)`, float64, or None: annotation_from_scene; the identity if a `<scene>.txt` lacks the line, None if there is
        no file at all.

    Raises:
        VidLLMInputError: A file is malformed.

    Source:
        Ours.
    """
    for folder in folders:
        if (Path(folder) / ALIGNMENT_FILE).is_file():
            path = Path(folder) / ALIGNMENT_FILE
            return _checked_alignment(read_pose(path), str(path))
    path = find_scan_info(data_root, scene_id, *folders)
    return None if path is None else axis_alignment(path)


def find_scan_info(data_root: str | Path | None, scene_id: str, *folders: str | Path) -> Path | None:
    """The `<scene>.txt` of a scene.

    Args:
        data_root (`str` or `Path`, *optional*): Looked into after `folders`.
        scene_id (`str`): The scene.
        *folders (`str` or `Path`): Folders that may hold it.

    Returns:
        `Path` or None.

    Source:
        Ours.
    """
    places = [Path(folder) for folder in folders]
    if data_root is not None:
        places += [Path(data_root) / name / scene_id for name in SCAN_FOLDERS]
    return next((place / f"{scene_id}.txt" for place in places if (place / f"{scene_id}.txt").is_file()), None)


def scan_info_intrinsics(path: str | Path, camera: str, size_hw: tuple[int, int]) -> np.ndarray | None:
    """Intrinsics that a `<scene>.txt` states, for a picture of another size.

    Args:
        path (`str` or `Path`): The file.
        camera (`str`): `color` or `depth`.
        size_hw (`tuple[int, int]`): Height and width of the picture that they are wanted for.

    Returns:
        `np.ndarray` of shape `(3, 3)`, float64, or None: pixels; None if the file states none.

    Raises:
        VidLLMInputError: A value is not a positive number.

    Source:
        Ours: x goes to x * to / from, as everywhere in the package.
    """
    info = read_scan_info(path)
    keys = [f"{part}_{camera}" for part in ("fx", "fy", "mx", "my")] + [f"{camera}Width", f"{camera}Height"]
    if not all(key in info for key in keys):
        return None
    values = []
    for key in keys:
        try:
            value = float(info[key])
        except ValueError:
            value = float("nan")
        if not value > 0:
            raise VidLLMInputError(f"{path}, {key}: wanted a positive number; got {info[key][:40]!r}")
        values.append(value)
    fx, fy, cx, cy, width, height = values
    across, down = size_hw[1] / width, size_hw[0] / height
    return np.array([[fx * across, 0, cx * across], [0, fy * down, cy * down], [0, 0, 1]])


def _checked_alignment(matrix: np.ndarray, name: str) -> np.ndarray:
    """A rigid alignment, or an error that names the file."""
    valid, problems = checked_poses(matrix[None], name, [0])
    if not np.isfinite(valid).all():
        raise VidLLMInputError(
            f"{name}: wanted a rigid transform; got {matrix.tolist()} ({problems[0].split(': ')[-1]})"
        )
    return matrix
