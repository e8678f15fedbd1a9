"""Point clouds and 3D scenes as files: PLY and GLB.

Shapes: S frames, M boxes, N points, E line segments.
"""

from pathlib import Path
from types import ModuleType

import numpy as np

from vidllm.processing.export_scene import ExportScene, LabelledBox, replaced_file


# glTF is y-up and looks along -z: (x, y, z) of the room becomes (x, z, -y).
GLTF_FROM_ROOM = np.array([[1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, -1.0, 0, 0], [0, 0, 0, 1.0]])
BOX_COLOURS = np.array(
    [
        (228, 26, 28),
        (55, 126, 184),
        (77, 175, 74),
        (152, 78, 163),
        (255, 127, 0),
        (0, 170, 170),
        (166, 86, 40),
        (231, 41, 138),
    ],
    np.uint8,
)
# corners of a box are numbered by the bits x = 1, y = 2, z = 4; an edge joins two that differ in one bit
BOX_EDGES = np.array([(a, a | bit) for a in range(8) for bit in (1, 2, 4) if not a & bit])


def import_trimesh() -> ModuleType:
    """The trimesh module.

    Returns:
        The module.

    Raises:
        ImportError: trimesh is not installed; names the extra that brings it.

    Source:
        Ours.
    """
    try:
        import trimesh
    except ImportError as error:
        raise ImportError("writing GLB files needs trimesh: pip install 'vidllm[export]'") from error
    return trimesh


def box_colours(boxes: tuple[LabelledBox, ...]) -> np.ndarray:
    """One colour per label, the same in every file.

    Args:
        boxes (`tuple` of `LabelledBox`): The boxes.

    Returns:
        `np.ndarray` of shape `(M, 3)`, uint8: sRGB.

    Source:
        Ours: a fixed palette in order of first appearance.
    """
    order = {label: number for number, label in enumerate(dict.fromkeys(box.label for box in boxes))}
    rows = [order[box.label] % len(BOX_COLOURS) for box in boxes]
    return BOX_COLOURS[rows].reshape(-1, 3)


def corners_of_box(box_room: tuple) -> np.ndarray:
    """Corners numbered by bits x = 1, y = 2, z = 4.

    Args:
        box_room (`Sequence[float]` of length 6): `(cx, cy, cz, dx, dy, dz)`, room frame.

    Returns:
        `np.ndarray` of shape `(8, 3)`: room frame.

    Source:
        Ours.
    """
    box = np.asarray(box_room, np.float64)
    bits = (np.arange(8)[:, None] >> np.arange(3)) & 1
    return box[:3] + (bits - 0.5) * box[3:]


def frustum_segments(scene: ExportScene, frame: int, length: float) -> np.ndarray:
    """The pyramid of view of one camera as lines, with a tick above its upper edge.

    Args:
        scene (`ExportScene`): The reconstruction.
        frame (`int`): Which camera.
        length (`float`): Distance of the image plane from the centre, scene unit.

    Returns:
        `np.ndarray` of shape `(E, 2, 3)`: start and end of each line, room frame.

    Source:
        Ours.
    """
    height, width = scene.size_hw
    # Pixel centres are integers, so the picture reaches from -0.5 to size - 0.5.
    u, v = np.array([-0.5, width - 0.5]), np.array([-0.5, height - 0.5])
    middle = u.mean()
    tick = v[0] - 0.18 * height
    pixels = [(u[0], v[0]), (u[1], v[0]), (u[1], v[1]), (u[0], v[1]), (middle, tick)]
    rays = np.array([(*pixel, 1.0) for pixel in pixels]) @ np.linalg.inv(scene.intrinsics_px[frame].astype(float)).T
    pose = scene.room_from_cam[frame]
    plane = (length * rays) @ pose[:3, :3].T + pose[:3, 3]
    apex = pose[:3, 3]
    ends = [(apex, corner) for corner in plane[:4]]
    ends += [(plane[i], plane[(i + 1) % 4]) for i in range(4)]
    ends += [(plane[0], plane[4]), (plane[4], plane[1])]
    return np.array(ends)


def tube_mesh(segments: np.ndarray, radius: float, sides: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Closed prisms around line segments.

    Args:
        segments (`np.ndarray` of shape `(E, 2, 3)`): Start and end points; segments of no length are left out.
        radius (`float`): Half the thickness.
        sides (`int`): Corners of the cross-section.

    Returns:
        `tuple`: vertices `(V, 3)`, faces `(F, 3)` int64.

    Source:
        Ours: many viewers draw glTF lines one pixel wide, so lines are made solid.
    """
    direction = segments[:, 1] - segments[:, 0]
    length = np.linalg.norm(direction, axis=1)
    segments, direction = segments[length > 1e-9], direction[length > 1e-9] / length[length > 1e-9, None]
    # Any axis that is not along the segment gives two directions across it.
    helper = np.eye(3)[np.abs(direction).argmin(axis=1)]
    across = np.cross(direction, helper)
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    other = np.cross(direction, across)
    angle = 2 * np.pi * np.arange(sides) / sides
    ring = radius * (np.cos(angle)[None, :, None] * across[:, None] + np.sin(angle)[None, :, None] * other[:, None])
    # (E, 2, sides, 3) -> (E * 2 * sides, 3)
    vertices = (segments[:, :, None] + ring[:, None]).reshape(-1, 3)
    here, there = np.arange(sides), (np.arange(sides) + 1) % sides
    walls = np.concatenate(
        [np.stack([here, there, here + sides], 1), np.stack([there, there + sides, here + sides], 1)]
    )
    fan = np.stack([np.zeros(sides - 2, int), np.arange(1, sides - 1), np.arange(2, sides)], 1)
    pattern = np.concatenate([walls, fan[:, ::-1], fan + sides])
    # (E, faces, 3) -> (E * faces, 3)
    faces = (pattern + 2 * sides * np.arange(len(segments))[:, None, None]).reshape(-1, 3)
    return vertices, faces


def write_points_ply(
    path: str | Path,
    scene: ExportScene,
    keep_fraction: float = 0.8,
    max_points: int | None = 1_000_000,
    frame: str = "room",
) -> Path:
    """Write the coloured point cloud as binary little-endian PLY; the header's comments say frame and unit.

    Args:
        path (`str` or `Path`): File to write.
        scene (`ExportScene`): The reconstruction.
        keep_fraction (`float`): Share of valid pixels to keep, surest first.
        max_points (`int`, *optional*): Most points; None writes all.
        frame (`str`): `room` (z up) or `world` (first camera).

    Returns:
        `Path`: the file.

    Raises:
        ValueError: An argument is out of range, or the file cannot be written.

    Source:
        Ours: an own writer, because the confidence belongs beside each point.
    """
    index = scene.select_points(keep_fraction, max_points)
    points, colours = scene.points_and_colours(index, frame)
    kinds = [(name, "<f4") for name in ("x", "y", "z", "confidence")] + [
        (name, "u1") for name in ("red", "green", "blue")
    ]
    rows = np.empty(len(points), dtype=kinds)
    for axis, name in enumerate("xyz"):
        rows[name] = points[:, axis]
    rows["confidence"] = scene.depth_confidence.reshape(-1)[index]
    for channel, name in enumerate(("red", "green", "blue")):
        rows[name] = colours[:, channel]
    axes = "z up, origin at the first camera" if frame == "room" else "OpenCV axes of the first camera"
    header = [
        "ply",
        "format binary_little_endian 1.0",
        "comment vidllm point cloud",
        f"comment frame: {frame} ({axes})",
        f"comment unit: {scene.unit}",
        f"element vertex {len(rows)}",
        *(f"property {'float' if kind == '<f4' else 'uchar'} {name}" for name, kind in kinds),
        "end_header",
    ]
    with replaced_file(path) as partial:
        partial.write_bytes(("\n".join(header) + "\n").encode("ascii") + rows.tobytes())
    return Path(path)


def _linear(colours: np.ndarray) -> np.ndarray:
    """Colours from sRGB 0..255 to linear 0..1, which is what glTF stores."""
    value = np.asarray(colours) / 255.0
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def time_colours(count: int) -> np.ndarray:
    """Colours from first to last frame, the same in the GLB and on the map.

    Args:
        count (`int`): Frames.

    Returns:
        `np.ndarray` of shape `(count, 3)`, uint8: sRGB, violet to yellow.

    Source:
        Ours.
    """
    # Stops along a perceptual ramp from dark violet over magenta and orange to yellow.
    stops = np.array([(70, 3, 159), (156, 23, 158), (216, 87, 107), (253, 150, 60), (240, 220, 50)], float)
    place = np.linspace(0, len(stops) - 1, count) if count > 1 else np.zeros(1)
    return (
        np.stack([np.interp(place, np.arange(len(stops)), stops[:, c]) for c in range(3)], axis=1)
        .round()
        .astype(np.uint8)
    )


def write_scene_glb(
    path: str | Path, scene: ExportScene, keep_fraction: float = 0.8, max_points: int | None = 300_000
) -> Path:
    """Write points, cameras, camera path and labelled boxes as one binary glTF.

    Node `room` carries the turn from z up to glTF's y up; below it lie `points`, `camera_path`, `camera_<source frame>` and one node
    per box, named by its label (`chair`, `chair_2`, ...).

    Args:
        path (`str` or `Path`): File to write.
        scene (`ExportScene`): The reconstruction with its boxes.
        keep_fraction (`float`): Share of valid pixels to keep, surest first.
        max_points (`int`, *optional*): Most points; None writes all.

    Returns:
        `Path`: the file.

    Raises:
        ImportError: trimesh is missing.
        ValueError: An argument is out of range, or the file cannot be written.

    Source:
        Ours: colours are stored linear, as glTF asks; the unit is in the scene's extras.
    """
    trimesh = import_trimesh()
    glb = trimesh.Scene(base_frame="world")
    glb.metadata.update(unit=scene.unit, room_axes="z up, origin at the first camera", generator="vidllm")
    glb.graph.update(frame_from="world", frame_to="room", matrix=GLTF_FROM_ROOM)
    taken = {"world", "room"}

    def add(geometry: object, name: str) -> None:
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique)
        glb.add_geometry(geometry, node_name=unique, geom_name=unique, parent_node_name="room")

    def add_tubes(segments: np.ndarray, radius: float, colour: np.ndarray, name: str) -> None:
        vertices, faces = tube_mesh(segments, radius)
        if not len(faces):
            return
        linear = _linear(colour)
        # A material of its own, glowing a little: the default one is metal, which is black without surroundings to mirror.
        material = trimesh.visual.material.PBRMaterial(
            baseColorFactor=[*np.round(255 * linear).astype(int).tolist(), 255],
            emissiveFactor=(0.5 * linear).tolist(),
            metallicFactor=0.0,
            roughnessFactor=1.0,
        )
        visual = trimesh.visual.TextureVisuals(material=material)
        add(trimesh.Trimesh(vertices, faces, visual=visual, process=False), name)

    points, colours = scene.points_and_colours(scene.select_points(keep_fraction, max_points))
    if len(points):
        rgba = np.concatenate([np.round(255 * _linear(colours)), np.full((len(colours), 1), 255)], 1).astype(np.uint8)
        add(trimesh.PointCloud(points, colors=rgba), "points")
    diagonal = scene.diagonal()
    centres = scene.room_from_cam[:, :3, 3]
    add_tubes(np.stack([centres[:-1], centres[1:]], axis=1), 0.0015 * diagonal, np.array([60, 60, 60]), "camera_path")
    for frame, colour in enumerate(time_colours(scene.num_frames)):
        segments = frustum_segments(scene, frame, 0.035 * diagonal)
        add_tubes(segments, 0.0008 * diagonal, colour, f"camera_{scene.frame_indices[frame]:06d}")
    for box, colour in zip(scene.boxes, box_colours(scene.boxes), strict=True):
        add_tubes(corners_of_box(box.box_room)[BOX_EDGES], 0.002 * diagonal, colour, box.label or "box")
    with replaced_file(path) as partial:
        partial.write_bytes(glb.export(file_type="glb"))
    return Path(path)
