"""Exported ScanNet scenes: one picture, depth map and pose file per frame, in the folder layouts that people use.

Shapes: F frames, H W pixels of a colour picture, h w pixels of a depth map.
"""

import io
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from vidllm.processing.scenes.base import Frame, SceneReader
from vidllm.processing.scenes.cameras import (
    ALIGNMENT_FILE,
    checked_poses,
    find_annotation_from_scene,
    find_scan_info,
    read_intrinsics,
    read_numbers,
    read_pose,
    scan_info_intrinsics,
)
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


COLOUR_SUFFIXES = (".jpg", ".jpeg", ".png")
JPEG_SUFFIXES = (".jpg", ".jpeg")
DEPTH_PER_METRE = np.float32(1000)
READ_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
# How far the principal point may be from the middle, as a share of the side, before the intrinsics look like another size's.
CENTRE_TOLERANCE = 0.15


class ExportedReader(SceneReader):
    """What the exported layouts share; each says where its pictures, depth maps, poses and intrinsics lie.

    Files of a frame belong together by number, so that padded and unpadded names sort alike. A picture without pose or depth file
    keeps its place and is counted in `problems`; a malformed file is an error.

    Args:
        folder (`str` or `Path`): The scene's folder.
        scene_id (`str`, *optional*): The folder's name if not given.
        data_root (`str` or `Path`, *optional*): Where to look for `<scene>.txt` (alignment, intrinsics).

    Raises:
        VidLLMInputError: No picture, two of one number, or a pose file that holds no 4x4 matrix.

    Source:
        Ours: one reader, several layouts.
    """

    colour_suffixes: ClassVar[tuple[str, ...]] = COLOUR_SUFFIXES
    places: ClassVar[tuple[str, ...]] = ("{}", "scans/{}", "scans_test/{}", "frames_square/{}")

    def __init__(self, folder: str | Path, scene_id: str | None = None, data_root: str | Path | None = None):
        self.folder = Path(folder)
        scene_id = scene_id or self.folder.name
        self._data_root = data_root
        problems: list[str] = []
        colour_folder, depth_folder, pose_folder = self._folders()
        self._colour = numbered_files(colour_folder, self.colour_suffixes, problems)
        if not self._colour:
            raise VidLLMInputError(f"{colour_folder}: no picture named by a number in this folder")
        numbers = list(self._colour)
        self._depth = {} if depth_folder is None else numbered_files(depth_folder, (".png",), problems)
        self._count_partners(self._depth, "depth map", problems)
        cam_from_scene = self._read_poses(pose_folder, numbers, problems)
        self._intrinsics_px, self._depth_intrinsics_px = self._read_intrinsics(scene_id, problems)
        super().__init__(
            scene_id,
            str(self.folder),
            numbers,
            cam_from_scene,
            find_annotation_from_scene(data_root, scene_id, self.folder),
            has_depth=any(number in self._depth for number in numbers),
            problems=problems,
        )

    @classmethod
    def find(cls, data_root: Path, scene_id: str) -> Path | None:
        """Folder of a scene in this layout below a data root, or None."""
        folders = (data_root / place.format(scene_id) for place in cls.places)
        return next((folder for folder in folders if cls.accepts(folder)), None)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a folder looks like this layout."""
        return (path / "color").is_dir()

    def frame(self, index: int, depth: bool = True) -> Frame:
        """Read and decode one frame."""
        self._check_index(index)
        number = self.frame_ids[index]
        depth_m, depth_intrinsics_px = self.depth(index) if depth else (None, None)
        return Frame(
            rgb=read_rgb(self._colour[number]),
            depth_m=depth_m,
            cam_from_scene=self._pose(index),
            intrinsics_px=self._intrinsics_px,
            depth_intrinsics_px=depth_intrinsics_px if depth else self._depth_intrinsics_px,
            frame_id=number,
            timestamp_s=None,
        )

    def depth(self, index: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Depth `(h, w)` in metres and its intrinsics `(3, 3)`; the picture is not read."""
        self._check_index(index)
        path = self._depth.get(self.frame_ids[index])
        return (None if path is None else read_depth(path)), self._depth_intrinsics_px

    def stored_jpeg(self, index: int) -> bytes | None:
        """The JPEG file of a frame, None for other formats."""
        self._check_index(index)
        path = self._colour[self.frame_ids[index]]
        return path.read_bytes() if path.suffix.lower() in JPEG_SUFFIXES else None

    def _folders(self) -> tuple[Path, Path | None, Path | None]:
        """Folders of pictures, depth maps, pose files."""
        return self.folder / "color", self.folder / "depth", self.folder / "pose"

    def _count_partners(self, files: dict[int, Path], what: str, problems: list[str]) -> None:
        """Count pictures without a partner file, and partner files without a picture."""
        missing = [number for number in self._colour if number not in files]
        if files and missing:
            problems.append(
                f"{self.folder}: {len(missing)} of {len(self._colour)} frames have no {what} (first: frame {missing[0]})"
            )
        extra = [number for number in files if number not in self._colour]
        if extra:
            problems.append(
                f"{self.folder}: {len(extra)} of {len(files)} {what} files have no picture (first: frame {extra[0]})"
            )

    def _read_poses(self, folder: Path | None, numbers: list[int], problems: list[str]) -> np.ndarray | None:
        """Poses of all frames, NaN where there is none; None if the scene has no pose file."""
        files = numbered_files(folder, (".txt",), problems) if folder is not None and folder.is_dir() else {}
        if not files:
            problems.append(f"{self.folder}: no pose files")
            return None
        self._count_partners(files, "pose", problems)
        known = [number for number in numbers if number in files]
        poses = np.full((len(numbers), 4, 4), np.nan)
        if known:
            valid, invalid = checked_poses(
                np.stack([read_pose(files[number]) for number in known]), str(self.folder), known
            )
            poses[[row for row, number in enumerate(numbers) if number in files]] = valid
            problems += invalid
        return poses

    def _intrinsics_files(self) -> tuple[Path | None, Path | None]:
        """Files of the colour and the depth camera's intrinsics, if they exist."""
        places = (self.folder / "intrinsic", self.folder)
        return tuple(
            next((place / name for place in places if (place / name).is_file()), None)
            for name in ("intrinsic_color.txt", "intrinsic_depth.txt")
        )

    def _read_intrinsics(self, scene_id: str, problems: list[str]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Intrinsics of the two cameras: from their files, else from `<scene>.txt`, else None and a message."""
        colour_file, depth_file = self._intrinsics_files()
        colour_hw = picture_hw(next(iter(self._colour.values())))
        depth_hw = picture_hw(next(iter(self._depth.values()))) if self._depth else None
        info = find_scan_info(self._data_root, scene_id, self.folder)
        colour = None if colour_file is None else read_intrinsics(colour_file)
        depth = None if depth_file is None else read_intrinsics(depth_file)
        if colour is None and depth is not None and depth_hw == colour_hw:
            # The pictures were resampled into the depth camera.
            colour = depth
        if colour is None and info is not None:
            colour = scan_info_intrinsics(info, "color", colour_hw)
            if colour is not None:
                problems.append(
                    f"{self.folder}: no colour intrinsics; those of {info} are taken, scaled to {colour_hw[1]}x{colour_hw[0]}"
                )
        if depth is None and depth_hw is not None and info is not None:
            depth = scan_info_intrinsics(info, "depth", depth_hw)
        if colour is None:
            problems.append(f"{self.folder}: no colour intrinsics")
        if depth is None and depth_hw is not None:
            problems.append(f"{self.folder}: no depth intrinsics")
        for matrix, size_hw, what in ((colour, colour_hw, "colour"), (depth, depth_hw, "depth")):
            if matrix is None or size_hw is None:
                continue
            sides = np.array([size_hw[1], size_hw[0]])
            if (np.abs(matrix[:2, 2] / sides - 0.5) > CENTRE_TOLERANCE).any():
                problems.append(
                    f"{self.folder}: the principal point {matrix[:2, 2].tolist()} is far from the middle of {what} pictures of "
                    f"{sides[0]}x{sides[1]}; are these intrinsics of another size?"
                )
        return colour, depth


class PosedImagesReader(ExportedReader):
    """The layout of EmbodiedScan, mmdetection3d and Video-3D-LLM.

    `posed_images/<scene>/00010.jpg`, `.png` (16 bits, millimetres), `.txt` (camera to scene), `intrinsic.txt`, `depth_intrinsic.txt`.
    The number is that of the original frame.

    Source:
        Upstream: OpenRobotLab/EmbodiedScan (the layout), as LaVi-Lab/Video-3D-LLM@3ff70e8 reads it.
    """

    colour_suffixes = JPEG_SUFFIXES
    places = ("posed_images/{}",)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a folder looks like this layout."""
        return _has_numbered(path, JPEG_SUFFIXES) and (
            (path / "intrinsic.txt").is_file() or _has_numbered(path, (".txt",))
        )

    @classmethod
    def find(cls, data_root: Path, scene_id: str) -> Path | None:
        """Folder of a scene in this layout below a data root, or None; its place says what it is."""
        folder = data_root / cls.places[0].format(scene_id)
        return folder if _has_numbered(folder, JPEG_SUFFIXES) else None

    def _folders(self) -> tuple[Path, Path | None, Path | None]:
        return self.folder, self.folder, self.folder

    def _intrinsics_files(self) -> tuple[Path | None, Path | None]:
        files = (self.folder / "intrinsic.txt", self.folder / "depth_intrinsic.txt")
        return tuple(file if file.is_file() else None for file in files)


class SensExportReader(ExportedReader):
    """ScanNet's SensReader export: `color/0.jpg`, `depth/0.png`, `pose/0.txt`, `intrinsic/intrinsic_{color,depth}.txt`.

    Source:
        Upstream: ScanNet/ScanNet@488e5ba:SensReader/python/SensorData.py.
    """

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a folder looks like this layout."""
        return (path / "color").is_dir() and (path / "intrinsic" / "intrinsic_color.txt").is_file()


class Llava3dReader(ExportedReader):
    """LLaVA-3D's alternative: `color/*.png`, `depth`, `pose`, `intrinsic/intrinsic_depth.txt`, `axis_align_matrix.txt`.

    Source:
        Upstream: ZCMax/LLaVA-3D@91d979d.
    """

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a folder looks like this layout."""
        return (path / "color").is_dir() and (path / ALIGNMENT_FILE).is_file()


class FramesSquareReader(ExportedReader):
    """3DSIS' and ScanRefer's `frames_square/<scene>/{color/20.jpg,depth,pose}`: every 20th frame, without intrinsics.

    Intrinsics are those of `scans/<scene>/<scene>.txt`, scaled to the pictures, if that file is there.

    Source:
        Upstream: daveredrum/ScanRefer@9d74830 (the layout). Ours: the intrinsics.
    """

    places = ("frames_square/{}", "{}", "scans/{}", "scans_test/{}")


class PoseEvalReader(ExportedReader):
    """CUT3R's and Pi3's pose evaluation: `color_90/frame_0000.jpg`, `depth_90`, `pose_90.txt` with sixteen numbers per line.

    The pictures are numbered anew there (by the published script they are every third frame), so that frame numbers are those.

    Source:
        Upstream: CUT3R/CUT3R@8bc15dc (the layout).
    """

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a folder looks like this layout."""
        return _frame_count(path) is not None

    def _folders(self) -> tuple[Path, Path | None, Path | None]:
        count = _frame_count(self.folder)
        if count is None:
            raise VidLLMMissingFileError(f"{self.folder}: wanted color_90 and pose_90.txt in this folder")
        depth = self.folder / f"depth_{count}"
        return self.folder / f"color_{count}", depth if depth.is_dir() else None, self.folder / f"pose_{count}.txt"

    def _read_poses(self, folder: Path | None, numbers: list[int], problems: list[str]) -> np.ndarray | None:
        rows = read_numbers(folder)
        for number, row in enumerate(rows, 1):
            if len(row) != 16:
                raise VidLLMInputError(f"{folder}, line {number}: wanted 16 numbers; got {len(row)}")
        if len(rows) != len(numbers):
            raise VidLLMInputError(f"{folder}: wanted one line per picture ({len(numbers)}); got {len(rows)}")
        # (F, 16) -> (F, 4, 4), row after row
        poses, invalid = checked_poses(np.array(rows).reshape(-1, 4, 4), str(folder), numbers)
        problems += invalid
        return poses


def numbered_files(folder: Path, suffixes: tuple[str, ...], problems: list[str]) -> dict[int, Path]:
    """Files of a folder by the number in their names, rising.

    Args:
        folder (`Path`): The folder; if it does not exist there are none.
        suffixes (`tuple[str, ...]`): Lower-case suffixes that count.
        problems (`list[str]`): Receives how many files are not named by a number.

    Returns:
        `dict[int, Path]`: the whole name as a number, else the last number in it.

    Raises:
        VidLLMInputError: Two files have one number.

    Source:
        Ours: `9` comes before `10` whether padded or not.
    """
    if not folder.is_dir():
        return {}
    names = ("intrinsic", "depth_intrinsic", ALIGNMENT_FILE.split(".")[0], folder.name)
    paths = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.stem not in names
    ]
    # `00010.txt` and `frame_0010.jpg` are frames; beside the first kind, `scene0000_00_info.txt` is something else.
    plain = any(path.stem.isdecimal() for path in paths)
    found: dict[int, Path] = {}
    unnumbered = []
    for path in paths:
        numbers = re.findall(r"[0-9]+", path.stem)
        if not numbers or (plain and not path.stem.isdecimal()):
            unnumbered.append(path.name)
            continue
        number = int(numbers[-1])
        if number in found:
            raise VidLLMInputError(f"{folder}: wanted one file per frame; got {found[number].name} and {path.name}")
        found[number] = path
    if unnumbered:
        problems.append(f"{folder}: {len(unnumbered)} files are not named by a frame number (first: {unnumbered[0]})")
    return dict(sorted(found.items()))


def picture_hw(path: Path) -> tuple[int, int]:
    """Height and width of a picture by its header.

    Args:
        path (`Path`): The file.

    Returns:
        `tuple[int, int]`: height, width.

    Raises:
        VidLLMInputError: Not a picture.

    Source:
        Ours.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except READ_ERRORS as error:
        raise VidLLMInputError(f"{path}: not a picture that can be read ({str(error)[:80]})") from None


def read_rgb(path: Path) -> np.ndarray:
    """A colour picture.

    Args:
        path (`Path`): The file.

    Returns:
        `np.ndarray` of shape `(H, W, 3)`, uint8.

    Raises:
        VidLLMInputError: It cannot be decoded.

    Source:
        Ours.
    """
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return np.asarray(image.convert("RGB"))
    except READ_ERRORS as error:
        raise VidLLMInputError(f"{path}: this picture cannot be decoded ({str(error)[:80]})") from None


def read_depth(path: Path) -> np.ndarray:
    """A depth map of 16-bit millimetres.

    Args:
        path (`Path`): The file.

    Returns:
        `np.ndarray` of shape `(h, w)`, float32: metres, 0 = invalid.

    Raises:
        VidLLMInputError: It cannot be decoded, or has not one channel of 16 bits.

    Source:
        Ours: ScanNet's exports, millimetres.
    """
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except READ_ERRORS as error:
        raise VidLLMInputError(f"{path}: this depth map cannot be decoded ({str(error)[:80]})") from None
    # PIL reads some 16-bit greys as 32-bit integers.
    if not mode.startswith("I") or values.ndim != 2 or values.min() < 0 or values.max() > 65535:
        raise VidLLMInputError(f"{path}: wanted one channel of 16 bits (millimetres); got a picture of mode {mode}")
    return values.astype(np.float32) / DEPTH_PER_METRE


def _has_numbered(folder: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a folder holds a file of this kind named by a number."""
    return folder.is_dir() and any(
        file.suffix.lower() in suffixes and file.stem.isdecimal() for file in folder.iterdir()
    )


def _frame_count(folder: Path) -> int | None:
    """The N of `color_N` and `pose_N.txt` in a folder; 90 if there are several, else the smallest."""
    if not folder.is_dir():
        return None
    counts = sorted(
        int(path.name.split("_")[1])
        for path in folder.iterdir()
        if re.fullmatch(r"color_[0-9]+", path.name) and (folder / f"pose_{path.name.split('_')[1]}.txt").is_file()
    )
    return (90 if 90 in counts else counts[0]) if counts else None
