"""The surface of a room as a triangle mesh with instances and segments, and boxes by ScanNet's rule.

Curved solids are drawn with vertices at their exact extremes along the axes of the annotation frame, so that the box around an
object's vertices is the box around its true surface.
"""

from dataclasses import dataclass

import numpy as np

from .furniture import BOX, ELLIPSOID
from .layout import Room


_FACE_STEP_M = 0.2
_ROUND = 16


@dataclass(frozen=True)
class RoomMesh:
    """A mesh with V vertices and T triangles.

    Args:
        vertices_scene (`np.ndarray` of shape `(V, 3)`), float32: Metres, the frame of the files.
        colours (`np.ndarray` of shape `(V, 3)`, uint8): sRGB.
        triangles (`np.ndarray` of shape `(T, 3)`, int32): Vertex indices.
        segments (`np.ndarray` of shape `(V,)`, int64): Over-segmentation, one number per solid or wall.
        groups (`tuple`): `(object_id, label, segment numbers)` per instance; walls, floor and ceiling come last.

    Source:
        Ours: what ScanNet's `_vh_clean_2.ply`, `segs.json` and `aggregation.json` hold.
    """

    vertices_scene: np.ndarray
    colours: np.ndarray
    triangles: np.ndarray
    segments: np.ndarray
    groups: tuple[tuple[int, str, tuple[int, ...]], ...]

    def vertices_of(self, object_id: int) -> np.ndarray:
        """Indices of an instance's vertices, shape (n,)."""
        numbers = next(segments for group_id, _, segments in self.groups if group_id == object_id)
        return np.flatnonzero(np.isin(self.segments, numbers))


def _grid(num_u: int, num_v: int, closed_u: bool = False) -> np.ndarray:
    """Triangles (T, 3) over a grid of num_v rows of num_u vertices."""
    u, v = np.meshgrid(np.arange(num_u if closed_u else num_u - 1), np.arange(num_v - 1), indexing="ij")
    a, b = (u + v * num_u).ravel(), ((u + 1) % num_u + v * num_u).ravel()
    return np.concatenate([np.stack([a, b, b + num_u], 1), np.stack([a, b + num_u, a + num_u], 1)])


def _patch(corner: np.ndarray, edge_u: np.ndarray, edge_v: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """A flat parallelogram cut into cells of about a step."""
    num_u = max(1, int(np.ceil(np.linalg.norm(edge_u) / step))) + 1
    num_v = max(1, int(np.ceil(np.linalg.norm(edge_v) / step))) + 1
    v, u = np.meshgrid(np.linspace(0, 1, num_v), np.linspace(0, 1, num_u), indexing="ij")
    return corner + u.reshape(-1, 1) * edge_u + v.reshape(-1, 1) * edge_v, _grid(num_u, num_v)


def _join(pieces: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Several meshes as one."""
    offsets = np.cumsum([0] + [len(vertices) for vertices, _ in pieces[:-1]])
    return np.concatenate([v for v, _ in pieces]), np.concatenate(
        [t + o for (_, t), o in zip(pieces, offsets, strict=True)]
    )


def _solid_mesh(shape: int, centre: np.ndarray, axes: np.ndarray, taper: float) -> tuple[np.ndarray, np.ndarray]:
    """Surface of one solid; columns of `axes` (3, 3) are its half axes."""
    if shape == BOX:
        faces = []
        for axis in range(3):
            u, v = axes[:, (axis + 1) % 3], axes[:, (axis + 2) % 3]
            for sign in (-1, 1):
                faces.append(_patch(centre + sign * axes[:, axis] - u - v, 2 * u, 2 * v, _FACE_STEP_M))
        return _join(faces)
    # Where the surface reaches farthest along x, y and z the circles of longitude and latitude get vertices of their own.
    longitude = np.arange(_ROUND) * 2 * np.pi / _ROUND
    extreme = np.arctan2(axes[:, 1], axes[:, 0])
    longitude = np.unique(np.concatenate([longitude, extreme % (2 * np.pi), (extreme + np.pi) % (2 * np.pi)]))
    ring = np.stack([np.cos(longitude), np.sin(longitude)], axis=1)
    if shape == ELLIPSOID:
        tilt = np.arctan2(axes[:, 2], np.hypot(axes[:, 0], axes[:, 1]))
        latitude = np.unique(np.concatenate([np.linspace(-np.pi / 2, np.pi / 2, _ROUND // 2 + 1), tilt, -tilt]))
        unit = np.concatenate(
            [np.concatenate([ring * np.cos(b), np.full((len(ring), 1), np.sin(b))], 1) for b in latitude]
        )
        return centre + unit @ axes.T, _grid(len(ring), len(latitude), closed_u=True)
    ends = [
        (0.0, -1.0),
        (1.0, -1.0),
        (taper, 1.0),
        (0.0, 1.0),
    ]  # centre of the cap, its rim, the other rim, its centre
    unit = np.concatenate([np.concatenate([ring * radius, np.full((len(ring), 1), z)], 1) for radius, z in ends])
    return centre + unit @ axes.T, _grid(len(ring), len(ends), closed_u=True)


def build_mesh(room: Room) -> RoomMesh:
    """Mesh of a room: furniture, walls, floor, ceiling.

    Args:
        room (`Room`): The room.

    Returns:
        `RoomMesh`: in the frame of the files.

    Source:
        Ours.
    """
    solids = room.solids
    meshes, colours, groups = [], [], []
    members: dict[int, list[int]] = {thing.object_id: [] for thing in room.objects}
    for k in range(len(solids.shape)):
        axes = solids.rotation[k] * solids.half[k]
        meshes.append(_solid_mesh(int(solids.shape[k]), solids.centre[k], axes, float(solids.taper[k])))
        colours.append(0.75 * solids.colour_a[k] + 0.25 * solids.colour_b[k])
        members[int(solids.owner[k])].append(k)
    span, low = np.diag(room.high - room.low), room.low
    high_of = [low, low + span[0], low, low + span[1], low, low + span[2]]
    for face in range(6):
        axis = face // 2
        meshes.append(_patch(high_of[face], span[(axis + 1) % 3], span[(axis + 2) % 3], 0.5))
        colours.append(room.shell_colour_a[face])
    # ScanNet's segment numbers are vertex indices: not consecutive, not in order of the objects.
    lengths = np.array([len(vertices) for vertices, _ in meshes])
    numbers = np.cumsum(np.concatenate([[0], lengths[:-1]])) + lengths // 2
    for thing in room.objects:
        groups.append((thing.object_id, thing.category, tuple(int(numbers[k]) for k in members[thing.object_id])))
    first = len(solids.shape)
    for offset, label in enumerate(("wall", "wall", "wall", "wall", "floor", "ceiling")):
        groups.append((len(room.objects) + offset, label, (int(numbers[first + offset]),)))
    vertices, triangles = _join(meshes)
    to_scene = room.scene_from_annotation
    srgb = np.round(255 * np.clip(np.array(colours), 0, 1) ** (1 / 2.2)).astype(np.uint8)
    return RoomMesh(
        vertices_scene=(vertices @ to_scene[:3, :3].T + to_scene[:3, 3]).astype(np.float32),
        colours=np.repeat(srgb, lengths, axis=0),
        triangles=triangles.astype(np.int32),
        segments=np.repeat(numbers, lengths),
        groups=tuple(groups),
    )


def boxes_annotation(room: Room, mesh: RoomMesh) -> np.ndarray:
    """Boxes of all objects by ScanNet's rule: limits of an instance's mesh vertices in the annotation frame.

    Args:
        room (`Room`): The room.
        mesh (`RoomMesh`): Its mesh.

    Returns:
        `np.ndarray` of shape `(objects, 6)`: `(cx, cy, cz, dx, dy, dz)`, metres, annotation frame.

    Source:
        Ours: the rule of ScanNet's box files.
    """
    to_annotation = np.linalg.inv(room.scene_from_annotation)
    aligned = mesh.vertices_scene.astype(np.float64) @ to_annotation[:3, :3].T + to_annotation[:3, 3]
    boxes = []
    for thing in room.objects:
        points = aligned[mesh.vertices_of(thing.object_id)]
        low, high = points.min(axis=0), points.max(axis=0)
        boxes.append(np.concatenate([(low + high) / 2, high - low]))
    return np.array(boxes)
