"""Files in the formats of ScanNet: `.sens`, mesh, segments, aggregation, label table, exported frame layouts, video.

Everything is written so that the same content gives the same bytes.
"""

import io
import json
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .furniture import CATEGORIES, STRUCTURE
from .mesh import RoomMesh


VIDEO_FPS = 8
LABEL_FILE = "scannetv2-labels.combined.tsv"
_LABEL_COLUMNS = [
    "id",
    "raw_category",
    "category",
    "count",
    "nyu40id",
    "eigen13id",
    "nyuClass",
    "nyu40class",
    "eigen13class",
    "ModelNet40",
    "ModelNet10",
    "ShapeNetCore55",
    "synsetoffset",
    "wnsynsetid",
    "wnsynsetkey",
    "mpcat40",
    "mpcat40index",
]


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write JSON with a fixed order and a line end.

    Args:
        path (`Path`): File; parent folders are made.
        content (`Any`): What `json` takes.
        indent (`int`, *optional*): Spaces per level.

    Source:
        Ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=indent, allow_nan=False) + "\n", encoding="utf-8", newline="\n")


def jpeg_bytes(rgb: np.ndarray) -> bytes:
    """A picture as JPEG, quality 95, colour at full resolution.

    Args:
        rgb (`np.ndarray` of shape `(H, W, 3)`, uint8): The picture.

    Returns:
        `bytes`

    Source:
        Ours.
    """
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def depth_in_millimetres(depth_m: np.ndarray) -> np.ndarray:
    """Depth as ScanNet's files hold it.

    Args:
        depth_m (`np.ndarray` of shape `(H, W)`): Metres; what does not fit into 16 bits becomes invalid.

    Returns:
        `np.ndarray` of shape `(H, W)`, uint16: millimetres, 0 invalid.

    Source:
        Upstream: ScanNet's depth shift of 1000.
    """
    millimetres = np.round(depth_m.astype(np.float64) * 1000)
    return np.where(np.isfinite(millimetres) & (millimetres < 65536), millimetres, 0).astype(np.uint16)


def _png_bytes(picture: np.ndarray) -> bytes:
    """A picture or a depth map as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def _matrix_text(matrix: np.ndarray) -> str:
    """A matrix as ScanNet's exporters print it, six decimals."""
    return "".join(" ".join(f"{value:.6f}" for value in row) + "\n" for row in matrix)


class FrameWriter:
    """Writes one scene's frames in any of the layouts.

    Args:
        out (`Path`): The data root.
        scene (`str`): Scene id.
        rgb (`np.ndarray` of shape `(F, H, W, 3)`, uint8): Pictures.
        depth_m (`np.ndarray` of shape `(F, H, W)`): Metres.
        scene_from_cam (`np.ndarray` of shape `(F, 4, 4)`): Poses, metres.
        intrinsics_px (`np.ndarray` of shape `(3, 3)`): Of pictures and depth maps alike.
        annotation_from_scene (`np.ndarray` of shape `(4, 4)`): ScanNet's axis alignment.

    Source:
        Ours: the layouts are those that the field exports ScanNet to.
    """

    def __init__(
        self,
        out: Path,
        scene: str,
        rgb: np.ndarray,
        depth_m: np.ndarray,
        scene_from_cam: np.ndarray,
        intrinsics_px: np.ndarray,
        annotation_from_scene: np.ndarray,
    ):
        self.out, self.scene, self.rgb, self.scene_from_cam = out, scene, rgb, scene_from_cam
        self.intrinsics = np.eye(4)
        self.intrinsics[:3, :3] = intrinsics_px
        self.annotation_from_scene = annotation_from_scene
        self.depth = [depth_in_millimetres(depth) for depth in depth_m]
        self.jpegs = [jpeg_bytes(picture) for picture in rgb]

    def write(self, layout: str) -> None:
        """Write one of `FRAME_LAYOUTS`."""
        getattr(self, f"_{layout}")()

    def _put(self, path: Path, content: bytes | str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def _per_frame(self, picture: str, depth: str, pose: str, folder: Path, png: bool = False) -> None:
        """Files of every frame by patterns of the frame's number."""
        for number, (jpeg, millimetres, matrix) in enumerate(
            zip(self.jpegs, self.depth, self.scene_from_cam, strict=True)
        ):
            self._put(folder / picture.format(number), _png_bytes(self.rgb[number]) if png else jpeg)
            self._put(folder / depth.format(number), _png_bytes(millimetres))
            if pose:
                self._put(folder / pose.format(number), _matrix_text(matrix))

    def _posed_images(self) -> None:
        folder = self.out / "posed_images" / self.scene
        self._per_frame("{:05d}.jpg", "{:05d}.png", "{:05d}.txt", folder)
        self._put(folder / "intrinsic.txt", _matrix_text(self.intrinsics))
        self._put(folder / "depth_intrinsic.txt", _matrix_text(self.intrinsics))

    def _sens_export(self) -> None:
        folder = self.out / "scans" / self.scene
        self._per_frame("color/{}.jpg", "depth/{}.png", "pose/{}.txt", folder)
        for name, matrix in (("intrinsic", self.intrinsics), ("extrinsic", np.eye(4))):
            for camera in ("color", "depth"):
                self._put(folder / "intrinsic" / f"{name}_{camera}.txt", _matrix_text(matrix))

    def _frames_square(self) -> None:
        self._per_frame("color/{}.jpg", "depth/{}.png", "pose/{}.txt", self.out / "frames_square" / self.scene)

    def _llava3d(self) -> None:
        folder = self.out / self.scene
        self._per_frame("color/{}.png", "depth/{}.png", "pose/{}.txt", folder, png=True)
        self._put(folder / "intrinsic" / "intrinsic_depth.txt", _matrix_text(self.intrinsics))
        self._put(folder / "axis_align_matrix.txt", _matrix_text(self.annotation_from_scene))

    def _pose_eval(self) -> None:
        folder, count = self.out / self.scene, len(self.jpegs)
        self._per_frame(f"color_{count}/frame_{{:04d}}.jpg", f"depth_{count}/frame_{{:04d}}.png", "", folder)
        rows = "".join(" ".join(f"{value:.6f}" for value in pose.ravel()) + "\n" for pose in self.scene_from_cam)
        self._put(folder / f"pose_{count}.txt", rows)

    def _images(self) -> None:
        for number, jpeg in enumerate(self.jpegs):
            self._put(self.out / "images" / self.scene / f"{number:05d}.jpg", jpeg)

    def _sens(self) -> None:
        write_sens(
            self.out / "scans" / self.scene / f"{self.scene}.sens",
            self.jpegs,
            self.depth,
            self.scene_from_cam,
            self.intrinsics,
            self.rgb.shape[1:3],
        )


FRAME_LAYOUTS = ("posed_images", "sens", "sens_export", "frames_square", "llava3d", "pose_eval", "images")


def write_sens(
    path: Path,
    jpegs: Sequence[bytes],
    depth_mm: Sequence[np.ndarray],
    scene_from_cam: np.ndarray,
    intrinsics: np.ndarray,
    size_hw: tuple[int, int],
) -> None:
    """Write a recording in ScanNet's `.sens`, version 4: JPEG pictures, zlib depth, no IMU.

    Args:
        path (`Path`): File; parent folders are made.
        jpegs (`Sequence` of `bytes`): Pictures.
        depth_mm (`Sequence` of `np.ndarray` of shape `(H, W)`, uint16): Millimetres.
        scene_from_cam (`np.ndarray` of shape `(F, 4, 4)`): Poses, metres.
        intrinsics (`np.ndarray` of shape `(4, 4)`): Of pictures and depth maps alike.
        size_hw (`tuple` of `int`): Height and width.

    Source:
        Upstream: ScanNet's sensorData.h (the byte layout).
    """
    name = b"vidllm rooms"
    matrix, unit = intrinsics.astype("<f4").tobytes(), np.eye(4, dtype="<f4").tobytes()
    head = struct.pack("<IQ", 4, len(name)) + name + matrix + unit + matrix + unit
    head += struct.pack("<ii", 2, 1) + struct.pack("<4I", size_hw[1], size_hw[0], size_hw[1], size_hw[0])
    head += struct.pack("<fQ", 1000.0, len(jpegs))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head)
        for number, (jpeg, depth, pose) in enumerate(zip(jpegs, depth_mm, scene_from_cam, strict=True)):
            packed = zlib.compress(depth.astype("<u2").tobytes(), 6)
            microseconds = number * 1_000_000 // VIDEO_FPS
            file.write(pose.astype("<f4").tobytes())
            file.write(struct.pack("<4Q", microseconds, microseconds, len(jpeg), len(packed)))
            file.write(jpeg)
            file.write(packed)
        file.write(struct.pack("<Q", 0))


def write_video(path: Path, rgb: np.ndarray) -> None:
    """Write an mp4 (H.264, one thread, no time of writing: the same pictures give the same bytes).

    Args:
        path (`Path`): File; parent folders are made.
        rgb (`np.ndarray` of shape `(F, H, W, 3)`, uint8): Pictures of even height and width.

    Raises:
        ValueError: A side is odd.

    Source:
        Ours.
    """
    import av

    height, width = rgb.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"write_video: wanted even height and width; got {height}x{width}")
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    # Left to itself x264 takes short cuts of the processor at hand, and gave other bytes for the same pictures from run to run.
    codec = {"crf": "16", "threads": "1", "x264-params": "cpu-independent=1"}
    with av.open(str(path), mode="w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(VIDEO_FPS), options=codec)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in rgb:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_scan(
    folder: Path,
    scene: str,
    mesh: RoomMesh,
    annotation_from_scene: np.ndarray,
    intrinsics_px: np.ndarray,
    size_hw: tuple[int, int],
    num_frames: int,
) -> None:
    """Write mesh, segments, aggregation and `<scene>.txt`.

    Args:
        folder (`Path`): `scans/<scene>`.
        scene (`str`): Scene id.
        mesh (`RoomMesh`): In the frame of the files.
        annotation_from_scene (`np.ndarray` of shape `(4, 4)`): Axis alignment.
        intrinsics_px (`np.ndarray` of shape `(3, 3)`): Of both cameras.
        size_hw (`tuple` of `int`): Of both cameras' pictures.
        num_frames (`int`): Frames recorded.

    Source:
        Upstream: ScanNet's files (the formats).
    """
    folder.mkdir(parents=True, exist_ok=True)
    vertices = np.empty(
        len(mesh.vertices_scene), [(c, "<f4") for c in "xyz"] + [(c, "u1") for c in ("r", "g", "b", "a")]
    )
    for axis, name in enumerate("xyz"):
        vertices[name] = mesh.vertices_scene[:, axis]
    for channel, name in enumerate("rgb"):
        vertices[name] = mesh.colours[:, channel]
    vertices["a"] = 255
    faces = np.empty(len(mesh.triangles), [("count", "u1"), ("vertices", "<i4", 3)])
    faces["count"], faces["vertices"] = 3, mesh.triangles
    head = "ply\nformat binary_little_endian 1.0\n" + f"element vertex {len(vertices)}\n"
    head += "".join(f"property float {axis}\n" for axis in "xyz")
    head += "".join(f"property uchar {channel}\n" for channel in ("red", "green", "blue", "alpha"))
    head += f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    (folder / f"{scene}_vh_clean_2.ply").write_bytes(head.encode() + vertices.tobytes() + faces.tobytes())
    parameters = {"kThresh": "0.0100", "segMinVerts": "20", "minPoints": "750", "maxPoints": "30000"}
    segments = {"params": parameters, "sceneId": scene, "segIndices": mesh.segments.tolist()}
    write_json(folder / f"{scene}_vh_clean_2.0.010000.segs.json", segments)
    groups = [
        {"id": object_id, "objectId": object_id, "segments": list(numbers), "label": label}
        for object_id, label, numbers in mesh.groups
    ]
    aggregation = {"sceneId": f"scannet.{scene}", "appId": "Aggregator.v2", "segGroups": groups}
    aggregation["segmentsFile"] = f"scannet.{scene}_vh_clean_2.0.010000.segs.json"
    write_json(folder / f"{scene}.aggregation.json", aggregation)
    (fx, _, cx), (_, fy, cy), _ = intrinsics_px
    lines = ["axisAlignment = " + " ".join(f"{value:.6f}" for value in annotation_from_scene.ravel())]
    for camera in ("color", "depth"):
        lines += [f"{camera}Height = {size_hw[0]}", f"{camera}Width = {size_hw[1]}"]
        lines += [f"f{axis}_{camera} = {value:.6f}" for axis, value in (("x", fx), ("y", fy))]
        lines += [f"m{axis}_{camera} = {value:.6f}" for axis, value in (("x", cx), ("y", cy))]
    lines += [f"numColorFrames = {num_frames}", f"numDepthFrames = {num_frames}", "numIMUmeasurements = 0"]
    (folder / f"{scene}.txt").write_bytes(("\n".join([*lines, "sceneType = procedural room"]) + "\n").encode())


def label_table() -> str:
    """Text of `scannetv2-labels.combined.tsv` with our categories, walls, floor and ceiling.

    Returns:
        `str`

    Source:
        Upstream: ScanNet's table (its columns; raw category, NYU40 id and class are filled, the rest is empty where it does not apply).
    """
    classes = {**STRUCTURE, **{name: category.nyu40 for name, category in CATEGORIES.items()}}
    lines = ["\t".join(_LABEL_COLUMNS)]
    for number, (name, (nyu40_id, nyu40_class)) in enumerate(classes.items(), 1):
        row = dict.fromkeys(_LABEL_COLUMNS, "")
        row.update(id=str(number), raw_category=name, category=name, count="1", nyu40id=str(nyu40_id), nyuClass=name)
        row.update(nyu40class=nyu40_class)
        lines.append("\t".join(row[column] for column in _LABEL_COLUMNS))
    return "\n".join(lines) + "\n"
