"""A reconstruction as files that other programs open.

`export_reconstruction` writes `cameras.json`, `depth.npz`, `points.ply`, `scene.glb`, `trajectory.tum`, `colmap/`, `depth.png`,
`map.png`, and `boxes.png` where there are boxes. Each file appears complete or not at all.

Shapes: S frames, H W pixels, N points.
"""

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vidllm.processing.export_meshes import write_points_ply, write_scene_glb
from vidllm.processing.export_scene import ExportScene, LabelledBox, export_scene, replaced_file
from vidllm.processing.pictures import draw_boxes_on_frames, write_depth_png, write_map_png


CAMERA_CONVENTION = "cam_from_world, OpenCV axes (x right, y down, z forward)"
PIXEL_CONVENTION = "integer coordinates at pixel centres"
# COLMAP puts the corner of the first pixel at (0, 0), so its pixel centres are at +0.5; ours are integers.
COLMAP_PIXEL_SHIFT = 0.5


def quat_xyzw_from_rotations(rotations: np.ndarray) -> np.ndarray:
    """Unit quaternions of rotations.

    Args:
        rotations (`np.ndarray` of shape `(S, 3, 3)`): Rotations; small errors of float32 are evened out.

    Returns:
        `np.ndarray` of shape `(S, 4)`, float64: order x, y, z, w; w is not negative.

    Source:
        Ours: eigenvector of the largest eigenvalue of Bar-Itzhack's matrix, which has no special case near a half turn.
    """
    r = np.asarray(rotations, np.float64)
    matrix = np.empty((len(r), 4, 4))
    for i in range(3):
        for j in range(3):
            matrix[:, i, j] = r[:, i, j] + r[:, j, i]
        matrix[:, i, i] -= np.trace(r, axis1=1, axis2=2)
    matrix[:, 0, 3] = matrix[:, 3, 0] = r[:, 2, 1] - r[:, 1, 2]
    matrix[:, 1, 3] = matrix[:, 3, 1] = r[:, 0, 2] - r[:, 2, 0]
    matrix[:, 2, 3] = matrix[:, 3, 2] = r[:, 1, 0] - r[:, 0, 1]
    matrix[:, 3, 3] = np.trace(r, axis1=1, axis2=2)
    quat = np.linalg.eigh(matrix)[1][:, :, -1]
    return np.where(quat[:, 3:] < 0, -quat, quat)


def _numbers(values: Sequence[float]) -> str:
    """Numbers in the shortest form that reads back to the same double."""
    return " ".join(repr(float(value)) for value in values)


def _write_text(path: str | Path, lines: list[str]) -> Path:
    """Lines as an ASCII file, in one step."""
    with replaced_file(path) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="ascii")
    return Path(path)


def write_cameras_json(path: str | Path, scene: ExportScene) -> Path:
    """Write poses, intrinsics, room rotation and times; numbers read back to the same float32.

    Args:
        path (`str` or `Path`): File to write.
        scene (`ExportScene`): The reconstruction.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: The file cannot be written.

    Source:
        Ours: the keys are part of the public contract; `processor.prepare_geometry` reads this file back.
    """
    height, width = scene.size_hw
    document = {
        "convention": CAMERA_CONVENTION,
        "pixels": PIXEL_CONVENTION,
        "unit": scene.unit,
        "width": width,
        "height": height,
        "room_from_world": scene.room_from_world.tolist(),
        "frames": [
            {
                "index": int(scene.frame_indices[frame]),
                "timestamp_s": None if scene.timestamps_s is None else float(scene.timestamps_s[frame]),
                "cam_from_world": scene.cam_from_world[frame].tolist(),
                "intrinsics_px": scene.intrinsics_px[frame].tolist(),
            }
            for frame in range(scene.num_frames)
        ],
    }
    return _write_text(path, [json.dumps(document, indent=1, allow_nan=False)])


def write_depth_npz(path: str | Path, scene: ExportScene) -> Path:
    """Write depth `(S, H, W)` and confidence `(S, H, W)`, float32, `unit` and `frame_indices` `(S,)` as compressed npz.

    Args:
        path (`str` or `Path`): File to write.
        scene (`ExportScene`): The reconstruction; depth 0 marks invalid pixels.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: The file cannot be written.

    Source:
        Ours.
    """
    with replaced_file(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(
            file,
            depth=scene.depth,
            confidence=scene.depth_confidence,
            unit=np.array(scene.unit),
            frame_indices=scene.frame_indices,
        )
    return Path(path)


def write_trajectory_tum(path: str | Path, scene: ExportScene) -> Path:
    """Write `timestamp tx ty tz qx qy qz qw` of world_from_cam, one line per frame.

    Args:
        path (`str` or `Path`): File to write.
        scene (`ExportScene`): The reconstruction; where it has no timestamps the source frame number stands for them.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: The file cannot be written.

    Source:
        Ours: TUM RGB-D trajectory format.
    """
    poses = scene.world_from_cam
    quats = quat_xyzw_from_rotations(poses[:, :3, :3])
    clock = "timestamp in s" if scene.timestamps_s is not None else "source frame number"
    lines = [f"# {clock}, tx ty tz qx qy qz qw of world_from_cam, unit {scene.unit}"]
    lines += [
        _numbers([time, *pose[:3, 3], *quat]) for time, pose, quat in zip(scene.times, poses, quats, strict=True)
    ]
    return _write_text(path, lines)


def write_colmap_text(
    folder: str | Path, scene: ExportScene, keep_fraction: float = 0.8, max_points: int = 100_000
) -> Path:
    """Write a COLMAP text model: `cameras.txt`, `images.txt`, `points3D.txt`, and the pictures it names in `images/`.

    Args:
        folder (`str` or `Path`): Folder to write into; made if missing.
        scene (`ExportScene`): The reconstruction, written in the world frame.
        keep_fraction (`float`): Share of valid pixels that may become points, surest first.
        max_points (`int`): Most points; they carry no tracks, since nothing was matched.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: A file cannot be written.

    Source:
        Ours: PINHOLE; principal points are moved by half a pixel to COLMAP's pixel rule. One camera is shared where the intrinsics
        of all frames are equal.
    """
    from PIL import Image

    folder = Path(folder)
    height, width = scene.size_hw
    shared = bool((scene.intrinsics_px == scene.intrinsics_px[0]).all())
    cameras = ["# Camera list with one line of data per camera:", "#   CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]"]
    for frame in range(1 if shared else scene.num_frames):
        k = scene.intrinsics_px[frame].astype(np.float64)
        centre = k[:2, 2] + COLMAP_PIXEL_SHIFT
        cameras.append(f"{frame + 1} PINHOLE {width} {height} {_numbers([k[0, 0], k[1, 1], *centre])}")
    images = [
        "# Image list with two lines of data per image:",
        "#   IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME",
        "#   POINTS2D[] as (X, Y, POINT3D_ID), empty here",
        f"# cam_from_world, unit {scene.unit}",
    ]
    quats = quat_xyzw_from_rotations(scene.cam_from_world[:, :3, :3])
    for frame in range(scene.num_frames):
        x, y, z, w = quats[frame]
        name = f"frame_{scene.frame_indices[frame]:06d}.png"
        with replaced_file(folder / "images" / name) as partial:
            Image.fromarray(scene.frames_rgb[frame]).save(partial, format="PNG")
        numbers = _numbers([w, x, y, z, *scene.cam_from_world[frame, :3, 3]])
        images += [f"{frame + 1} {numbers} {1 if shared else frame + 1} {name}", ""]
    points, colours = scene.points_and_colours(scene.select_points(keep_fraction, max_points), "world")
    rows = ["# 3D point list with one line of data per point:", "#   POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[]"]
    rows += [
        f"{number} {x!r} {y!r} {z!r} {r} {g} {b} 0"
        for number, ((x, y, z), (r, g, b)) in enumerate(zip(points.tolist(), colours.tolist(), strict=True), start=1)
    ]
    _write_text(folder / "cameras.txt", cameras)
    _write_text(folder / "images.txt", images)
    _write_text(folder / "points3D.txt", rows)
    return folder


def check_export(out_dir: str | Path) -> Path:
    """Fail early, before the model has run for minutes: are the libraries there, can the folder be written?

    Args:
        out_dir (`str` or `Path`): Folder to write into; it and its parents are made.

    Returns:
        `Path`: the folder.

    Raises:
        ImportError: trimesh or matplotlib is missing.
        ValueError: The folder cannot be made or written.

    Source:
        Ours.
    """
    missing = [name for name in ("trimesh", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f"exporting needs {' and '.join(missing)}: pip install 'vidllm[export]'")
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"output folder: wanted a folder; got the file {out_dir}") from error
    except OSError as error:
        raise ValueError(f"output folder {out_dir}: cannot be made: {error.strerror or error}") from error
    if not os.access(out_dir, os.W_OK | os.X_OK):
        raise ValueError(f"output folder {out_dir}: cannot be written")
    return out_dir


def export_reconstruction(
    out_dir: str | Path,
    reconstruction: Any,
    frames_rgb: Any,
    frame_indices: Sequence[int] | None = None,
    timestamps_s: Sequence[float] | None = None,
    boxes: Sequence | None = None,
    row: int = 0,
    keep_fraction: float = 0.8,
    max_points: int | None = 1_000_000,
) -> dict[str, Path]:
    """Write every export of one video.

    Args:
        out_dir (`str` or `Path`): Folder; made with its parents, existing files of the same names are replaced.
        reconstruction (`VidLLMReconstruction`): What `model.reconstruct` returns.
        frames_rgb (`np.ndarray` or `torch.Tensor` of shape `(frames, height, width, 3)`, uint8): Sampled frames as the model saw them.
        frame_indices (`Sequence[int]`, *optional*): Frame numbers in the source video.
        timestamps_s (`Sequence[float]`, *optional*): Seconds in the source video.
        boxes (`Sequence` of `LabelledBox` or `(label, (6,), score)`, *optional*): Room frame, unit of the reconstruction.
        row (`int`): Row of the batch.
        keep_fraction (`float`): Share of valid pixels that become points, surest first.
        max_points (`int`, *optional*): Most points of `points.ply`; the GLB holds at most 300 000, COLMAP 100 000 of them.

    Returns:
        `dict[str, Path]`: `cameras`, `depth`, `points`, `scene`, `trajectory`, `colmap`, `depth_picture`, `map_picture`, and
        `boxes_picture` where there are boxes.

    Raises:
        ImportError: trimesh or matplotlib is missing.
        ValueError: Sizes disagree, a box is malformed, or a file cannot be written.

    Source:
        Ours.
    """
    out_dir = check_export(out_dir)
    scene = export_scene(reconstruction, frames_rgb, frame_indices, timestamps_s, boxes, row)
    few = 300_000 if max_points is None else min(max_points, 300_000)
    paths = {
        "cameras": write_cameras_json(out_dir / "cameras.json", scene),
        "depth": write_depth_npz(out_dir / "depth.npz", scene),
        "points": write_points_ply(out_dir / "points.ply", scene, keep_fraction, max_points),
        "scene": write_scene_glb(out_dir / "scene.glb", scene, keep_fraction, few),
        "trajectory": write_trajectory_tum(out_dir / "trajectory.tum", scene),
        "colmap": write_colmap_text(out_dir / "colmap", scene, keep_fraction, min(few, 100_000)),
        "depth_picture": write_depth_png(out_dir / "depth.png", scene),
        "map_picture": write_map_png(out_dir / "map.png", scene, keep_fraction),
    }
    if scene.boxes:
        paths["boxes_picture"] = draw_boxes_on_frames(out_dir / "boxes.png", scene)
    return paths


__all__ = [
    "ExportScene",
    "LabelledBox",
    "check_export",
    "draw_boxes_on_frames",
    "export_reconstruction",
    "export_scene",
    "write_cameras_json",
    "write_colmap_text",
    "write_depth_npz",
    "write_depth_png",
    "write_map_png",
    "write_points_ply",
    "write_scene_glb",
    "write_trajectory_tum",
]
