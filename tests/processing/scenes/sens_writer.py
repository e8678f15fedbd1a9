"""A `.sens` file from the byte layout alone: knows nothing of the reader.

u32 version | u64 n, n bytes sensor name | 4 x f32[16] intrinsics and extrinsics of colour and depth | i32 colour, i32 depth compression |
u32 colour w, h, depth w, h | f32 depth shift | u64 frames; per frame f32[16] camera to world | u64 times, sizes | blobs; u64 samples; samples.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image


RAW, PNG, JPEG = 0, 1, 2
RAW_USHORT, ZLIB_USHORT, OCCI_USHORT = 0, 1, 2


def colour_blob(rgb, compression):
    """A picture as the file stores it."""
    if compression == RAW:
        return rgb.tobytes()
    buffer = io.BytesIO()
    if compression == PNG:
        Image.fromarray(rgb).save(buffer, "PNG")
    else:
        Image.fromarray(rgb).save(buffer, "JPEG", quality=98, subsampling=0)
    return buffer.getvalue()


def depth_blob(depth_raw, compression):
    """A depth map of 16-bit numbers as the file stores it."""
    data = depth_raw.astype("<u2").tobytes()
    return zlib.compress(data) if compression == ZLIB_USHORT else data


def write_sens(
    path,
    pictures,
    depths_raw,
    scene_from_cam,
    intrinsics_px,
    depth_intrinsics_px,
    colour=JPEG,
    depth=ZLIB_USHORT,
    version=4,
    depth_shift=1000.0,
    num_imu=0,
    times=None,
    name=b"StructureSensor",
    write_imu_count=True,
    colour_extrinsics=None,
):
    """Write a file; returns the offsets at which its parts end, by name, for cutting it."""

    def matrix(values):
        full = np.eye(4, dtype="<f4")
        values = np.asarray(values, dtype="<f4")
        full[: values.shape[0], : values.shape[1]] = values
        return full.astype("<f4").tobytes()

    ends = {}
    height, width = pictures[0].shape[:2]
    depth_height, depth_width = depths_raw[0].shape if depths_raw is not None else (0, 0)
    with open(path, "wb") as file:
        file.write(struct.pack("<I", version))
        ends["version"] = file.tell()
        file.write(struct.pack("<Q", len(name)) + name)
        ends["name"] = file.tell()
        for values in (
            intrinsics_px,
            np.eye(4) if colour_extrinsics is None else colour_extrinsics,
            depth_intrinsics_px,
            np.eye(4),
        ):
            file.write(matrix(values))
        ends["matrices"] = file.tell()
        file.write(struct.pack("<iiIIIIf", colour, depth, width, height, depth_width, depth_height, depth_shift))
        file.write(struct.pack("<Q", len(pictures)))
        ends["header"] = file.tell()
        for index, rgb in enumerate(pictures):
            blob = colour_blob(rgb, colour)
            map_blob = depth_blob(depths_raw[index], depth) if depths_raw is not None else b""
            file.write(np.asarray(scene_from_cam[index], dtype="<f4").tobytes())
            ends[f"pose {index}"] = file.tell()
            time = times[index] if times is not None else 1_000_000 + 33_333 * index
            file.write(struct.pack("<QQQQ", time, time + 5, len(blob), len(map_blob)))
            ends[f"sizes {index}"] = file.tell()
            file.write(blob)
            ends[f"colour {index}"] = file.tell()
            file.write(map_blob)
            ends[f"frame {index}"] = file.tell()
        if write_imu_count:
            file.write(struct.pack("<Q", num_imu))
            ends["imu count"] = file.tell()
            for index in range(num_imu):
                file.write(struct.pack("<15dQ", *(float(value + index) for value in range(15)), index))
                ends[f"imu {index}"] = file.tell()
    return ends
