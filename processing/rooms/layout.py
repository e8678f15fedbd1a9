"""A furnished room per (seed, scene number, difficulty): what stands where, in which colour, and how it is filmed.

Everything is in the `annotation` frame (z up, walls along x and y, floor at z = 0, metres); `scene_from_annotation` leads to
the turned and shifted frame in which the files are written. The same arguments give the same room.
"""

from dataclasses import dataclass

import numpy as np

from .camera import CameraTrack, film_room
from .furniture import Piece
from .materials import COLOURS, FLOORS, PATTERNS, PLAIN_COLOURS, linear_from_srgb
from .placing import LEVELS, Furnisher, RoomObject, place_part


# Scene numbers of the splits; ScanNet ends at 0806.
SPLIT_NUMBERS = {"train": range(1000, 7000), "val": range(7000, 10000)}


@dataclass(frozen=True)
class Solids:
    """All solids of a room as arrays, K of them.

    Args:
        shape (`np.ndarray` of shape `(K,)`, int64): `BOX`, `ELLIPSOID`, `CONE`.
        owner (`np.ndarray` of shape `(K,)`, int64): Object id.
        centre (`np.ndarray` of shape `(K, 3)`): Metres, annotation frame.
        rotation (`np.ndarray` of shape `(K, 3, 3)`): `annotation_from_part`.
        half (`np.ndarray` of shape `(K, 3)`): Half extents, metres.
        taper (`np.ndarray` of shape `(K,)`): Top over bottom radius.
        colour_a (`np.ndarray` of shape `(K, 3)`): Linear light, 0..1.
        colour_b (`np.ndarray` of shape `(K, 3)`): Linear light, 0..1.
        pattern (`np.ndarray` of shape `(K,)`, int64): Index into `PATTERNS`.
        tile_m (`np.ndarray` of shape `(K,)`): Metres per repeat of the texture.
        emission (`np.ndarray` of shape `(K,)`): Light of its own, 0..1.

    Source:
        Ours.
    """

    shape: np.ndarray
    owner: np.ndarray
    centre: np.ndarray
    rotation: np.ndarray
    half: np.ndarray
    taper: np.ndarray
    colour_a: np.ndarray
    colour_b: np.ndarray
    pattern: np.ndarray
    tile_m: np.ndarray
    emission: np.ndarray


@dataclass(frozen=True)
class Room:
    """A room with its furniture, light and camera.

    Args:
        seed (`int`): What it was drawn from.
        number (`int`): What it was drawn from.
        difficulty (`str`): A key of `LEVELS`.
        low (`np.ndarray` of shape `(3,)`): Corners, metres, annotation frame; `low[2]` is the floor, 0.
        high (`np.ndarray` of shape `(3,)`): Corners, metres, annotation frame; `low[2]` is the floor, 0.
        objects (`tuple` of `RoomObject`): By object id.
        solids (`Solids`): What the objects are made of.
        shell_colour_a (`np.ndarray` of shape `(6, 3)`): Linear light of the faces -x, +x, -y, +y, floor, ceiling.
        shell_colour_b (`np.ndarray` of shape `(6, 3)`): Linear light of the faces -x, +x, -y, +y, floor, ceiling.
        shell_pattern (`np.ndarray` of shape `(6,)`, int64): Index into `PATTERNS`.
        shell_tile_m (`np.ndarray` of shape `(6,)`): Metres per repeat.
        floor_name (`str`): A key of `FLOORS`.
        lights (`np.ndarray` of shape `(lights, 4)`): Place in metres and strength.
        exposure (`float`): Factor of all light.
        track (`CameraTrack`): The camera.
        scene_from_annotation (`np.ndarray` of shape `(4, 4)`): To the frame of the files.

    Source:
        Ours.
    """

    seed: int
    number: int
    difficulty: str
    low: np.ndarray
    high: np.ndarray
    objects: tuple[RoomObject, ...]
    solids: Solids
    shell_colour_a: np.ndarray
    shell_colour_b: np.ndarray
    shell_pattern: np.ndarray
    shell_tile_m: np.ndarray
    floor_name: str
    lights: np.ndarray
    exposure: float
    track: CameraTrack
    scene_from_annotation: np.ndarray

    @property
    def scene_id(self) -> str:
        """Name in the style of ScanNet, `scene` + number + `_00`."""
        return f"scene{self.number:04d}_00"

    def intrinsics_px(self, size_hw: tuple[int, int]) -> np.ndarray:
        """Pinhole of shape (3, 3) for an image size: square pixels, principal point at half the size."""
        height, width = size_hw
        focal = width / 2 / np.tan(np.radians(self.track.horizontal_fov_deg) / 2)
        return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])


def _contrast(colour: np.ndarray) -> np.ndarray:
    """Second colour of a pattern: the same hue, pale where the first is dark and dark where it is pale.

    Black stays dark and white stays pale, or nobody could tell a black thing with white dots from a white one with black.
    """
    bright = colour @ np.array([0.25, 0.65, 0.1])
    if bright > 0.7 or bright < 0.03:
        return colour * 0.45 if bright > 0.5 else colour + 0.09
    return colour * 0.22 if bright > 0.45 else 0.28 * colour + 0.62


def _paint(rng: np.random.Generator, things: list[tuple[RoomObject, Piece]]) -> Solids:
    """Solids of all objects with their colours."""
    columns: dict[str, list] = {name: [] for name in Solids.__dataclass_fields__}
    plain = {name: linear_from_srgb(rgb) for name, rgb in PLAIN_COLOURS.items()}
    for thing, piece in things:
        shade = rng.uniform(0.85, 1.12)
        main = np.clip(linear_from_srgb(COLOURS[thing.colour]) * shade, 0, 0.95) if thing.colour else plain["white"]
        second = plain[str(rng.choice(["wood", "dark_wood", "metal", "grey", "white"]))] * rng.uniform(0.8, 1.15)
        art = [linear_from_srgb(COLOURS[str(name)]) for name in rng.choice(list(COLOURS), 2, replace=False)]
        tile = rng.uniform(0.24, 0.36)
        for part in piece.parts:
            placed = place_part(part, thing.position, thing.yaw_rad)
            if part.role == "main":
                colour, pattern = main, part.pattern or thing.pattern
                other = main * 0.75 if pattern == "plain" else _contrast(main)
            elif part.role == "art":
                colour, other, pattern = art[0] * 0.8 + 0.05, art[1] * 0.8 + 0.05, part.pattern or "grain"
            else:
                colour = second if part.role == "second" else plain[part.role]
                other, pattern = colour * 0.6, part.pattern or ("grain" if "wood" in part.role else "plain")
            row = (
                part.shape,
                thing.object_id,
                placed.centre,
                placed.piece_from_part,
                placed.half,
                part.taper,
                colour,
                other,
            )
            row += (PATTERNS.index(pattern), 1.0 if pattern.startswith("art") else tile, part.emission)
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value)
    integers = {"shape", "owner", "pattern"}
    return Solids(
        **{name: np.array(value, np.int64 if name in integers else np.float64) for name, value in columns.items()}
    )


def make_room(seed: int, number: int, difficulty: str = "standard") -> Room:
    """Draw a room.

    Args:
        seed (`int`): Of the data set.
        number (`int`): Of the scene, 0..9999; the splits' ranges are `SPLIT_NUMBERS`.
        difficulty (`str`): `easy`, `standard` or `hard`.

    Returns:
        `Room`: the same for the same arguments.

    Raises:
        ValueError: Unknown difficulty, or a number outside of 0..9999.

    Source:
        Ours.
    """
    if difficulty not in LEVELS:
        raise ValueError(f"make_room: difficulty must be one of {sorted(LEVELS)}; got {difficulty!r}")
    if not 0 <= number <= 9999 or seed < 0:
        raise ValueError(
            f"make_room: wanted a scene number in 0..9999 and a seed of at least 0; got {number} and {seed}"
        )
    level = LEVELS[difficulty]
    rng = np.random.default_rng([seed, number, list(LEVELS).index(difficulty)])
    for attempt in range(400):
        furnisher = Furnisher(rng, level, attempt)
        if not furnisher.furnish():
            continue
        things = furnisher.things
        standing = [thing for thing, _ in things if thing.kind == "floor"]
        low, high = np.array([thing.low for thing in standing]), np.array([thing.high for thing in standing])
        track = film_room(
            rng,
            furnisher.low,
            furnisher.high,
            low,
            high,
            level.num_frames,
            level.sweep_deg,
            level.walk_m,
            level.corners,
        )
        if track is not None:
            break
    else:
        raise RuntimeError(f"make_room: no room found for seed {seed}, number {number}, {difficulty}")
    floor_name = str(rng.choice(list(FLOORS)))
    wall = rng.uniform(0.42, 0.8) * (0.75 + 0.25 * rng.random(3))
    floor = linear_from_srgb(PLAIN_COLOURS[str(rng.choice(["wood", "dark_wood", "grey", "paper"]))]) * rng.uniform(
        0.8, 1.1
    )
    colour_a = np.stack([wall, wall, wall * 0.96, wall * 0.96, floor, np.full(3, 0.8)])
    colour_b = np.stack([wall * 0.72] * 4 + [floor * (2.2 if floor_name == "checkered" else 0.45), np.full(3, 0.72)])
    wall_pattern = PATTERNS.index(str(rng.choice(["plain", "noise", "striped", "brick", "plain"])))
    shell_pattern = np.array(
        [wall_pattern] * 4 + [PATTERNS.index(FLOORS[floor_name]), PATTERNS.index("noise")], np.int64
    )
    tile = rng.uniform(0.6, 1.1)
    centre = (furnisher.low + furnisher.high) / 2
    num_lights = int(rng.integers(1, 3))
    lights = np.zeros((num_lights, 4))
    lights[:, :2] = centre[:2] + rng.uniform(-0.3, 0.3, (num_lights, 2)) * (furnisher.high - furnisher.low)[:2]
    lights[:, 2], lights[:, 3] = furnisher.high[2] - 0.15, rng.uniform(0.9, 1.3, num_lights) / num_lights
    angle, shift = rng.uniform(-np.pi, np.pi), rng.uniform(1.0, 5.0, 3) * np.array([1, 1, 0.02])
    # As the file states it: six decimals, so that reading it back gives this very matrix.
    annotation_from_scene = np.eye(4)
    annotation_from_scene[:2, :2] = np.round([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], 6)
    annotation_from_scene[:3, 3] = np.round(-annotation_from_scene[:3, :3] @ shift, 6)
    return Room(
        seed=seed,
        number=number,
        difficulty=difficulty,
        low=furnisher.low,
        high=furnisher.high,
        objects=tuple(thing for thing, _ in things),
        solids=_paint(rng, things),
        shell_colour_a=colour_a,
        shell_colour_b=np.clip(colour_b, 0, 0.9),
        shell_pattern=shell_pattern,
        shell_tile_m=np.array([rng.uniform(0.4, 0.8)] * 4 + [tile, 1.3]),
        floor_name=floor_name,
        lights=lights,
        exposure=float(rng.uniform(0.85, 1.15)),
        track=track,
        scene_from_annotation=np.linalg.inv(annotation_from_scene),
    )
