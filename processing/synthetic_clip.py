"""A small furnished room, ray-cast by numpy and filmed by a moving camera, with its ground truth.

For tests and trials where no video is at hand. Everything is axis-aligned cuboids; the same arguments give the same
pixels and the same bytes.

Shapes: T frames, H W pixels, M labelled objects, K cuboids.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np


ROOM_SIZE_M = (5.2, 4.4, 2.6)
HORIZONTAL_FOV_DEG = 70.0
# label, colour (sRGB), cuboids as (x0, y0, z0, x1, y1, z1) in metres; the floor is z = 0, a corner of the room the origin
FURNITURE = (
    ("sofa", (176, 58, 60), ((0.10, 1.30, 0.0, 0.95, 3.20, 0.42), (0.10, 1.30, 0.42, 0.35, 3.20, 0.85))),
    (
        "table",
        (196, 140, 74),
        (
            (1.75, 1.75, 0.66, 2.95, 2.55, 0.72),
            (1.80, 1.80, 0.0, 1.88, 1.88, 0.66),
            (2.82, 1.80, 0.0, 2.90, 1.88, 0.66),
            (1.80, 2.42, 0.0, 1.88, 2.50, 0.66),
            (2.82, 2.42, 0.0, 2.90, 2.50, 0.66),
        ),
    ),
    ("cabinet", (62, 104, 170), ((1.10, 3.92, 0.0, 2.10, 4.38, 1.75),)),
    ("bed", (226, 214, 190), ((3.15, 2.60, 0.0, 4.95, 4.10, 0.48), (4.95, 2.60, 0.0, 5.10, 4.10, 1.0))),
    ("bin", (64, 140, 84), ((2.55, 3.85, 0.0, 2.87, 4.17, 0.50),)),
    ("stool", (120, 78, 150), ((3.25, 1.55, 0.0, 3.61, 1.91, 0.46),)),
)
# Pictures and a window: axis across which the wall lies, along-wall range, height range (metres), linear colour
WALL_HANGINGS = (
    (1, 2.6, 3.5, 1.25, 1.85, (0.75, 0.35, 0.12)),
    (1, 4.0, 4.7, 1.15, 2.0, (0.10, 0.35, 0.45)),
    (0, 1.7, 2.9, 1.1, 2.1, (0.72, 0.86, 1.0)),
)


@dataclass(frozen=True)
class SyntheticClip:
    """What was filmed, and the truth behind it.

    Args:
        frames_rgb (`np.ndarray` of shape `(frames, height, width, 3)`, uint8): The pictures.
        depth_m (`np.ndarray` of shape `(frames, height, width)`, float32): Depth along the optical axis, metres.
        cam_from_world (`np.ndarray` of shape `(frames, 4, 4)`): Poses, OpenCV axes, world = first camera, metres.
        intrinsics_px (`np.ndarray` of shape `(frames, 3, 3)`): Pinhole, pixels, integer coordinates at pixel centres.
        room_from_world (`np.ndarray` of shape `(3, 3)`): Rotation to z up and x, y along the walls; origin = first camera.
        boxes_room (`np.ndarray` of shape `(objects, 6)`): `(cx, cy, cz, dx, dy, dz)`, room frame, metres.
        labels (`tuple` of `str`): What each box holds.
        timestamps_s (`np.ndarray` of shape `(frames,)`): Seconds.
        fps (`int`): Frames per second.

    Source:
        Ours: conventions of the package (CONVENTIONS.md).
    """

    frames_rgb: np.ndarray
    depth_m: np.ndarray
    cam_from_world: np.ndarray
    intrinsics_px: np.ndarray
    room_from_world: np.ndarray
    boxes_room: np.ndarray
    labels: tuple[str, ...]
    timestamps_s: np.ndarray
    fps: int


def _camera_path(num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Camera centres (T, 3) and rotations floor_from_cam (T, 3, 3): an arc along the near wall that looks into the room."""
    phase = np.linspace(0.0, 1.0, num_frames) if num_frames > 1 else np.zeros(1)
    centres = np.stack(
        [4.3 - 3.1 * phase, 0.55 + 0.45 * np.sin(np.pi * phase), 1.45 + 0.06 * np.sin(4 * np.pi * phase)], axis=1
    )
    targets = np.stack([1.5 + 2.2 * phase, 3.0 + 0.2 * np.cos(np.pi * phase), np.full(num_frames, 0.75)], axis=1)
    forward = targets - centres
    forward /= np.linalg.norm(forward, axis=1, keepdims=True)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    # OpenCV axes of the camera (x right, y down, z forward) are the columns.
    return centres, np.stack([right, np.cross(forward, right), forward], axis=2)


def _noise(u: np.ndarray, v: np.ndarray, seed: int) -> np.ndarray:
    """Smooth value noise in 0..1 over a plane, period 64 cells; u, v (n,) not negative."""
    lattice = np.random.default_rng(seed).random((65, 65), np.float32)
    lattice[64], lattice[:, 64] = lattice[0], lattice[:, 0]
    iu, iv = u.astype(np.int32), v.astype(np.int32)
    fu, fv = u - iu, v - iv
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    iu, iv = iu & 63, iv & 63
    near, far = lattice[iu, iv], lattice[iu + 1, iv]
    near = near + (lattice[iu, iv + 1] - near) * fv
    far = far + (lattice[iu + 1, iv + 1] - far) * fv
    return near + (far - near) * fu


def _floor_colour(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Planks; linear colour (n, 3)."""
    plank = np.floor(y / 0.16)
    seam = (np.mod(y, 0.16) < 0.012) | (np.mod(x + 0.37 * plank, 1.2) < 0.012)
    grain = 0.75 + 0.2 * _noise(x * 3, y * 24, 1) + 0.15 * np.mod(plank * 0.618, 1.0)
    return np.array([0.46, 0.27, 0.13]) * (grain * np.where(seam, 0.45, 1.0))[:, None]


def _wall_colour(axis: int, along: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Striped paper with a skirting board, pictures and a window on the walls across `axis`; linear colour (n, 3)."""
    stripe = np.where(np.mod(along, 0.5) < 0.25, 1.0, 0.84) * (0.94 + 0.12 * _noise(along * 9, z * 9, 2))
    colour = np.float32([(0.62, 0.66, 0.58), (0.70, 0.63, 0.50)][axis]) * stripe[:, None]
    colour[z < 0.1] = (0.8, 0.8, 0.78)
    for wall_axis, low, high, bottom, top, tint in WALL_HANGINGS:
        inside = (along > low) & (along < high) & (z > bottom) & (z < top) & (axis == wall_axis)
        swirl = 0.55 + 0.9 * _noise(along[inside] * 7, z[inside] * 7, 3)
        colour[inside] = np.array(tint) * swirl[:, None]
        border = np.minimum(np.minimum(along - low, high - along), np.minimum(z - bottom, top - z)) < 0.05
        colour[inside & border] = (0.06, 0.05, 0.05)
    return colour


def _trace(origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First hit of rays (3, n) from one origin (3,): distance in ray lengths, axis across the face, furniture (-1 = room)."""
    inverse = 1.0 / np.where(np.abs(rays) < 1e-6, np.float32(1e-6), rays)
    origin = origin[:, None]
    # The room is left through the nearest of the three far planes.
    exits = np.where(rays > 0, np.float32(ROOM_SIZE_M)[:, None] - origin, -origin) * inverse
    axis, distance = exits.argmin(axis=0), exits.min(axis=0)
    owner = np.full(len(distance), -1)
    for index, (_, _, cuboids) in enumerate(FURNITURE):
        for cuboid in np.float32(cuboids).reshape(-1, 2, 3, 1):
            first, second = (cuboid - origin) * inverse
            near = np.minimum(first, second)
            entry = near.max(axis=0)
            hit = np.flatnonzero((entry < np.maximum(first, second).min(axis=0)) & (entry > 1e-6) & (entry < distance))
            distance[hit], owner[hit], axis[hit] = entry[hit], index, near[:, hit].argmax(axis=0)
    return distance, axis, owner


def _shade(origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Linear colour (n, 3) in 0..1 that rays (3, n) from one origin (3,) meet."""
    distance, axis, owner = _trace(origin, rays)
    points = np.maximum(origin[:, None] + distance * rays, 0.0)
    colour = np.full((len(distance), 3), 0.82, np.float32)
    for index in range(-1, len(FURNITURE)):
        for face_axis in range(3):
            rows = np.flatnonzero((owner == index) & (axis == face_axis))
            # The two coordinates that span the face.
            u, v = (points[i, rows] for i in range(3) if i != face_axis)
            if index >= 0:
                linear = (np.array(FURNITURE[index][1]) / 255.0) ** 2.2
                colour[rows] = linear * (0.8 + 0.35 * _noise(u * 14, v * 14, 10 + index))[:, None]
            elif face_axis < 2:
                colour[rows] = _wall_colour(face_axis, u, v)
            else:
                floor = rays[2, rows] < 0
                colour[rows[floor]] = _floor_colour(u[floor], v[floor])
    # The face that was hit looks against the ray.
    facing = -np.sign(np.take_along_axis(rays, axis[None], axis=0)[0])
    light = np.float32([2.7, 1.9, 2.4])[:, None] - points
    light_distance = np.linalg.norm(light, axis=0)
    lambert = facing * np.take_along_axis(light, axis[None], axis=0)[0] / np.maximum(light_distance, 1e-6)
    upward = np.where(axis == 2, facing, 0.0)
    brightness = 0.55 + 0.1 * upward + 1.1 * np.clip(lambert, 0.0, 1.0) / (1.0 + 0.12 * light_distance**2)
    return np.clip(colour * brightness[:, None], 0.0, 1.0)


def synthetic_clip(num_frames: int = 32, size_hw: tuple[int, int] = (240, 320), fps: int = 12) -> SyntheticClip:
    """Render the room.

    Args:
        num_frames (`int`): Frames T, at least 1.
        size_hw (`tuple` of `int`): Height and width, pixels.
        fps (`int`): Frames per second, for the timestamps.

    Returns:
        `SyntheticClip`: pictures, depth, poses, intrinsics, boxes and labels.

    Raises:
        ValueError: Fewer than one frame, or a side under two pixels.

    Source:
        Ours: stands in for a phone video where none may be shipped.
    """
    height, width = size_hw
    if num_frames < 1 or fps < 1 or min(size_hw) < 2:
        raise ValueError(
            f"synthetic_clip: wanted at least 1 frame, 1 fps and sides of 2 pixels; got num_frames={num_frames}, fps={fps}, "
            f"size_hw={tuple(size_hw)}"
        )
    focal = width / 2 / np.tan(np.radians(HORIZONTAL_FOV_DEG) / 2)
    intrinsics = np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])
    v, u = np.meshgrid(np.arange(height, dtype=float), np.arange(width, dtype=float), indexing="ij")
    centres, floor_from_cam = _camera_path(num_frames)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    depth = np.empty((num_frames, height, width), np.float32)
    # Four rays per pixel smooth the edges; depth is that of the pixel's centre, which a fifth ray measures.
    corners_px = [(-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)]
    for frame in range(num_frames):
        origin = centres[frame].astype(np.float32)

        def rays_at(du: float, dv: float, rotation: np.ndarray = floor_from_cam[frame]) -> np.ndarray:
            cam = np.stack([(u + du - width / 2) / focal, (v + dv - height / 2) / focal, np.ones_like(u)])
            # (3, height, width) -> (3, height * width); the third camera coordinate of a ray is 1, so its distance is depth
            return (rotation @ cam.reshape(3, -1)).astype(np.float32)

        depth[frame] = _trace(origin, rays_at(0.0, 0.0))[0].reshape(height, width)
        linear = sum(_shade(origin, rays_at(du, dv)) for du, dv in corners_px) / len(corners_px)
        frames[frame] = np.round(255 * linear ** (1 / 2.2)).astype(np.uint8).reshape(height, width, 3)
    cam_from_world = np.tile(np.eye(4), (num_frames, 1, 1))
    for frame in range(1, num_frames):
        rotation = floor_from_cam[frame].T
        cam_from_world[frame, :3, :3] = rotation @ floor_from_cam[0]
        cam_from_world[frame, :3, 3] = rotation @ (centres[0] - centres[frame])
    corners = [np.array(cuboids).reshape(-1, 2, 3) for _, _, cuboids in FURNITURE]
    low = np.stack([corner[:, 0].min(axis=0) for corner in corners])
    high = np.stack([corner[:, 1].max(axis=0) for corner in corners])
    return SyntheticClip(
        frames_rgb=frames,
        depth_m=depth,
        cam_from_world=cam_from_world,
        intrinsics_px=np.tile(intrinsics, (num_frames, 1, 1)),
        room_from_world=floor_from_cam[0],
        boxes_room=np.concatenate([(low + high) / 2 - centres[0], high - low], axis=1),
        labels=tuple(label for label, _, _ in FURNITURE),
        timestamps_s=np.arange(num_frames) / fps,
        fps=fps,
    )


def write_synthetic_clip(
    path: str | Path, seconds: float = 4.0, size_hw: tuple[int, int] = (240, 320), fps: int = 12
) -> SyntheticClip:
    """Render the room and write it as an mp4 (H.264, one thread: the same arguments give the same bytes).

    Args:
        path (`str` or `Path`): File to write; parent folders are made.
        seconds (`float`): Length, at least one frame.
        size_hw (`tuple` of `int`): Even height and width, pixels.
        fps (`int`): Frames per second.

    Returns:
        `SyntheticClip`: the ground truth of the file.

    Raises:
        ValueError: A side is odd (H.264 stores colour at half resolution) or the clip is shorter than a frame.

    Source:
        Ours.
    """
    import av

    height, width = size_hw
    if height % 2 or width % 2:
        raise ValueError(f"write_synthetic_clip: wanted even height and width; got {height}x{width}")
    clip = synthetic_clip(round(seconds * fps), size_hw, fps)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    with av.open(str(path), mode="w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "16", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in clip.frames_rgb:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return clip
