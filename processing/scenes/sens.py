"""ScanNet's `.sens` files (version 4): an index in memory, frames read and decoded when asked for.

Layout, little-endian: u32 version | u64 length, sensor name | four f32 4x4 matrices (colour intrinsics, colour extrinsics, depth
intrinsics, depth extrinsics) | i32 colour compression, i32 depth compression | u32 colour width, height, depth width, height | f32 depth
shift | u64 number of frames; per frame f32 4x4 camera to world | u64 colour time, depth time, colour bytes, depth bytes | colour blob |
depth blob; then u64 number of inertial samples, 128 bytes each.

Shapes: F frames, H W pixels of a colour picture, h w pixels of a depth map.
"""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from vidllm.processing.scenes.base import Frame, SceneReader
from vidllm.processing.scenes.cameras import SCAN_FOLDERS, checked_poses, find_annotation_from_scene
from vidllm.processing.video_reading_vidllm import VidLLMInputError, VidLLMMissingFileError


VERSION = 4
MAX_NAME_BYTES = 1 << 16
HEADER = struct.Struct("<64f2i4IfQ")
FRAME_HEADER = struct.Struct("<16f4Q")
COUNT = struct.Struct("<Q")
IMU_BYTES = 15 * 8 + 8
RAW, PNG, JPEG = 0, 1, 2
COLOUR_COMPRESSION = {-1: "unknown", RAW: "raw", PNG: "png", JPEG: "jpeg"}
RAW_DEPTH, ZLIB_DEPTH = 0, 1
DEPTH_COMPRESSION = {-1: "unknown", RAW_DEPTH: "raw_ushort", ZLIB_DEPTH: "zlib_ushort", 2: "occi_ushort"}
MICROSECONDS = 1e6
MAX_PIXELS = 1 << 28


class SensReader(SceneReader):
    """A `.sens` file. Only frame headers are read at first; blobs are skipped.

    A file that ends early serves its whole frames; `problems` says how many are lost. Times are None unless they rise through the
    whole file (ScanNet's may be zero or random).

    Args:
        path (`str` or `Path`): The file.
        scene_id (`str`, *optional*): The file's name without suffix if not given.
        data_root (`str` or `Path`, *optional*): Where else to look for `<scene>.txt` with the axis alignment.

    Raises:
        VidLLMInputError: No `.sens` of version 4, or not one frame is whole.

    Source:
        Upstream: ScanNet/ScanNet@0394e98:SensReader/src/sensorData.h (the layout). Ours: streaming, and what is done about damage.
    """

    def __init__(self, path: str | Path, scene_id: str | None = None, data_root: str | Path | None = None):
        self.path = Path(path)
        scene_id = scene_id or self.path.stem
        self.num_imu_samples: int | None = None
        problems: list[str] = []
        scene_from_cam, times = self._read_index(problems)
        frame_ids = range(len(scene_from_cam))
        cam_from_scene, invalid = checked_poses(scene_from_cam, str(self.path), frame_ids)
        rising = len(times) > 1 and bool((np.diff(times.astype(np.float64)) > 0).all())
        self._times_s = times.astype(np.float64) / MICROSECONDS if rising else None
        super().__init__(
            scene_id,
            str(self.path),
            frame_ids,
            cam_from_scene,
            find_annotation_from_scene(data_root, scene_id, self.path.parent),
            has_depth=bool(self._depth_hw[0] * self._depth_hw[1] and self._depth_bytes.any()),
            problems=problems + invalid,
        )

    @classmethod
    def find(cls, data_root: Path, scene_id: str) -> Path | None:
        """Path of a scene's `.sens` below a data root, or None."""
        places = [data_root / name / scene_id for name in SCAN_FOLDERS] + [data_root / scene_id, data_root / "sens"]
        return next((place / f"{scene_id}.sens" for place in places if (place / f"{scene_id}.sens").is_file()), None)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a path looks like this layout."""
        return path.is_file() and path.suffix.lower() == ".sens"

    @classmethod
    def announced_frames(cls, path: str | Path) -> int:
        """Number of frames that a file's header states; nothing else is read.

        Raises:
            VidLLMInputError: No `.sens` file of version 4.
        """
        reader = cls.__new__(cls)
        reader.path = Path(path)
        with reader._open() as file:
            return reader._read_header(file, os.fstat(file.fileno()).st_size)

    def frame(self, index: int, depth: bool = True) -> Frame:
        """Read and decode one frame."""
        self._check_index(index)
        blobs = self._read_blobs(index, colour=True, depth=depth)
        depth_m = self._decode_depth(index, blobs[1]) if depth else None
        return Frame(
            rgb=self._decode_colour(index, blobs[0]),
            depth_m=depth_m,
            cam_from_scene=self._pose(index),
            intrinsics_px=self._intrinsics_px,
            depth_intrinsics_px=self._depth_intrinsics_px if self.has_depth else None,
            frame_id=self.frame_ids[index],
            timestamp_s=None if self._times_s is None else float(self._times_s[index]),
        )

    def depth(self, index: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Depth `(h, w)` in metres and its intrinsics `(3, 3)`; the picture is not read."""
        self._check_index(index)
        if not self.has_depth:
            return None, None
        return self._decode_depth(
            index, self._read_blobs(index, colour=False, depth=True)[1]
        ), self._depth_intrinsics_px

    def stored_jpeg(self, index: int) -> bytes | None:
        """The JPEG blob of a frame, None for other compressions."""
        self._check_index(index)
        return self._read_blobs(index, colour=True, depth=False)[0] if self._colour_compression == JPEG else None

    def _open(self) -> io.FileIO:
        """The file, without a buffer."""
        try:
            return self.path.open("rb", buffering=0)
        except FileNotFoundError:
            raise VidLLMMissingFileError(f"{self.path}: no such file") from None
        except OSError as error:
            raise VidLLMInputError(f"{self.path}: cannot be read ({error.strerror or error})") from None

    def _read_index(self, problems: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Header and frame headers: scene_from_cam (F, 4, 4) and colour times (F,); offsets and sizes are kept."""
        with self._open() as file:
            if hasattr(os, "posix_fadvise"):
                # Headers lie megabytes apart: reading ahead would load the blobs between them.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            size = os.fstat(file.fileno()).st_size
            num_frames = self._read_header(file, size)
            poses, numbers, offsets = [], [], []
            place = file.tell()
            for index in range(num_frames):
                file.seek(place)
                header = file.read(FRAME_HEADER.size)
                end = place + FRAME_HEADER.size
                if len(header) == FRAME_HEADER.size:
                    *pose, colour_time, depth_time, colour_bytes, depth_bytes = FRAME_HEADER.unpack(header)
                    end += colour_bytes + depth_bytes
                if len(header) < FRAME_HEADER.size or end > size:
                    problems.append(
                        f"{self.path}: the file is cut: {index} of {num_frames} frames are whole, {num_frames - index} are lost "
                        f"(frame {index} wants bytes {place} to {end}; the file ends at {size})"
                    )
                    break
                poses.append(pose)
                numbers.append((colour_time, depth_time, colour_bytes, depth_bytes))
                offsets.append(place + FRAME_HEADER.size)
                place = end
            else:
                self._read_imu(file, place, size, problems)
        if not poses:
            lost = problems[0].split(": ", 1)[1] if problems else "it announces 0 frames"
            raise VidLLMInputError(f"{self.path}: no whole frame in this file: {lost}")
        for camera, matrix in self._extrinsics.items():
            # ScanNet's are the identity; nothing at all (zeros) says as little.
            if matrix.any() and not np.allclose(matrix, np.eye(4), atol=1e-5):
                problems.append(
                    f"{self.path}: extrinsics of the {camera} camera are not the identity; they are not applied"
                )
        table = np.array(numbers, dtype=np.uint64)
        self._offsets = np.array(offsets, dtype=np.int64)
        self._colour_bytes, self._depth_bytes = table[:, 2].astype(np.int64), table[:, 3].astype(np.int64)
        without = int((self._depth_bytes == 0).sum())
        if without and self._depth_bytes.any():
            problems.append(f"{self.path}: {without} of {len(poses)} frames have no depth")
        # (F, 16) -> (F, 4, 4), row after row
        return np.array(poses, dtype=np.float64).reshape(-1, 4, 4), table[:, 0]

    def _read_header(self, file: io.RawIOBase, size: int) -> int:
        """Everything before the first frame; returns the announced number of frames."""
        start = file.read(12)
        version = struct.unpack("<I", start[:4])[0] if len(start) >= 4 else None
        if version is not None and version != VERSION:
            raise VidLLMInputError(f"{self.path}: wanted a .sens file of version {VERSION}; got version {version}")
        if len(start) < 12:
            raise VidLLMInputError(
                f"{self.path}: no whole frame in this file: it is cut in its header, at {size} bytes"
            )
        num_name_bytes = struct.unpack("<Q", start[4:])[0]
        if num_name_bytes > MAX_NAME_BYTES:
            raise VidLLMInputError(
                f"{self.path}: wanted a .sens file; got a sensor name of {num_name_bytes} bytes (damaged, or another format)"
            )
        name = file.read(num_name_bytes)
        header = file.read(HEADER.size)
        if len(name) < num_name_bytes or len(header) < HEADER.size:
            raise VidLLMInputError(
                f"{self.path}: no whole frame in this file: it is cut in its header, at {size} bytes"
            )
        self.sensor_name = name.decode("utf-8", errors="replace")
        *matrices, colour, depth, width, height, depth_width, depth_height, shift, num_frames = HEADER.unpack(header)
        # (64,) -> (colour intrinsics, colour extrinsics, depth intrinsics, depth extrinsics) of 4x4
        matrices = np.array(matrices, dtype=np.float64).reshape(4, 4, 4)
        self._intrinsics_px = self._checked_intrinsics(matrices[0], "colour")
        self._depth_intrinsics_px = (
            self._checked_intrinsics(matrices[2], "depth") if depth_width * depth_height else None
        )
        self._extrinsics = {"colour": matrices[1], "depth": matrices[3]}
        self._colour_compression, self._depth_compression = colour, depth
        self._colour_hw, self._depth_hw = (height, width), (depth_height, depth_width)
        self._depth_shift = shift
        if colour not in (RAW, PNG, JPEG):
            raise VidLLMInputError(
                f"{self.path}: wanted colour compression raw, png or jpeg; got {colour} ({COLOUR_COMPRESSION.get(colour, 'undefined')})"
            )
        if not 0 < width * height <= MAX_PIXELS or depth_width * depth_height > MAX_PIXELS:
            raise VidLLMInputError(
                f"{self.path}: wanted pictures of a possible size; got colour {width}x{height}, depth {depth_width}x{depth_height}"
            )
        if depth_width * depth_height and not 0 < shift < float("inf"):
            raise VidLLMInputError(f"{self.path}: wanted a positive depth shift; got {shift}")
        return num_frames

    def _checked_intrinsics(self, matrix: np.ndarray, camera: str) -> np.ndarray:
        """The 3x3 part of stored intrinsics."""
        part = matrix[:3, :3]
        if not np.isfinite(part).all() or part[0, 0] <= 0 or part[1, 1] <= 0:
            raise VidLLMInputError(
                f"{self.path}: wanted positive focal lengths of the {camera} camera; got {part.tolist()}"
            )
        return part

    def _read_imu(self, file: io.RawIOBase, place: int, size: int, problems: list[str]) -> None:
        """Count the inertial samples behind the frames; older writers leave them out altogether."""
        file.seek(place)
        count = file.read(COUNT.size)
        if not count:
            return
        if len(count) < COUNT.size:
            problems.append(f"{self.path}: the file is cut after its last frame; all frames are whole")
            return
        announced = COUNT.unpack(count)[0]
        rest = size - place - COUNT.size
        self.num_imu_samples = min(announced, rest // IMU_BYTES)
        if self.num_imu_samples < announced:
            problems.append(
                f"{self.path}: the file is cut: {self.num_imu_samples} of {announced} inertial samples are whole; all frames are whole"
            )
        elif rest > announced * IMU_BYTES:
            problems.append(f"{self.path}: {rest - announced * IMU_BYTES} bytes after the end are not read")

    def _read_blobs(self, index: int, colour: bool, depth: bool) -> tuple[bytes, bytes]:
        """The stored bytes of one frame, those asked for. The file is opened each time: safe across processes."""
        num_colour = int(self._colour_bytes[index])
        num_depth = int(self._depth_bytes[index]) if depth else 0
        start = int(self._offsets[index]) + (0 if colour else num_colour)
        wanted = (num_colour if colour else 0) + num_depth
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                data = bytearray()
                while len(data) < wanted and (part := file.read(wanted - len(data))):
                    data += part
        except OSError as error:
            raise VidLLMInputError(f"{self.path}: cannot be read any more ({error.strerror or error})") from None
        if len(data) < wanted:
            raise VidLLMInputError(f"{self.path}: frame {index} has become shorter since the file was opened")
        split = num_colour if colour else 0
        return bytes(data[:split]), bytes(data[split:])

    def _decode_colour(self, index: int, blob: bytes) -> np.ndarray:
        """Stored bytes to `(H, W, 3)`, uint8."""
        height, width = self._colour_hw
        name = f"{self.path}, frame {index}, colour"
        if self._colour_compression == RAW:
            if len(blob) != height * width * 3:
                raise VidLLMInputError(f"{name}: wanted {height * width * 3} raw bytes; got {len(blob)}")
            # (H * W * 3,) -> (H, W, 3)
            return np.frombuffer(blob, dtype=np.uint8).reshape(height, width, 3)
        try:
            with Image.open(io.BytesIO(blob), formats=("JPEG", "PNG")) as image:
                rgb = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise VidLLMInputError(f"{name}: this picture cannot be decoded ({str(error)[:80]})") from None
        if rgb.shape[:2] != (height, width):
            raise VidLLMInputError(
                f"{name}: wanted {width}x{height} pixels as the header says; got {rgb.shape[1]}x{rgb.shape[0]}"
            )
        return rgb

    def _decode_depth(self, index: int, blob: bytes) -> np.ndarray | None:
        """Stored bytes to `(h, w)`, float32 metres."""
        if not blob:
            return None
        height, width = self._depth_hw
        name = f"{self.path}, frame {index}, depth"
        if self._depth_compression not in (RAW_DEPTH, ZLIB_DEPTH):
            kind = DEPTH_COMPRESSION.get(self._depth_compression, "undefined")
            raise VidLLMInputError(
                f"{name}: wanted depth compression raw_ushort or zlib_ushort; got {self._depth_compression} ({kind}); "
                "colour can be read with depth=False"
            )
        wanted = height * width * 2
        if self._depth_compression == ZLIB_DEPTH:
            try:
                # Never more than one byte too much, whatever the blob unpacks to.
                blob = zlib.decompressobj().decompress(blob, wanted + 1)
            except zlib.error as error:
                raise VidLLMInputError(f"{name}: this map cannot be unpacked ({str(error)[:80]})") from None
        if len(blob) != wanted:
            raise VidLLMInputError(
                f"{name}: wanted {wanted} bytes ({width}x{height}, 16 bits); got {'more' if len(blob) > wanted else len(blob)}"
            )
        # (h * w,) -> (h, w)
        raw = np.frombuffer(blob, dtype="<u2").reshape(height, width)
        return raw.astype(np.float32) / np.float32(self._depth_shift)
