"""Where things stand in a room: in corners, against walls, free, on and under one another, on the walls; nothing in anything.

Frame: `annotation` (z up, walls along x and y, floor at z = 0), metres.
"""

from dataclasses import dataclass

import numpy as np

from .furniture import BOX, ELLIPSOID, FLOOR_CATEGORIES, SMALL_CATEGORIES, Part, Piece
from .materials import COLOURS, NAMED_PATTERNS


@dataclass(frozen=True)
class Level:
    """How hard a room is.

    Args:
        num_floor (`tuple` of `int`): Least and most objects that stand on the floor.
        num_on_top (`tuple` of `int`): Least and most small objects wished for on them.
        side_m (`tuple` of `float`): Side of the room.
        sweep_deg (`tuple` of `float`): Heading that the camera covers.
        num_frames (`int`): Frames written.
        walk_m (`tuple` of `float`): Length of the camera's path.
        corners (`int`): Straight legs of the path.

    Source:
        Ours.
    """

    num_floor: tuple[int, int]
    num_on_top: tuple[int, int]
    side_m: tuple[float, float]
    sweep_deg: tuple[float, float]
    num_frames: int
    walk_m: tuple[float, float]
    corners: int


LEVELS = {
    "easy": Level((3, 5), (1, 2), (3.0, 6.0), (20, 60), 24, (0.4, 1.0), 1),
    "standard": Level((4, 8), (1, 3), (3.0, 8.0), (40, 140), 32, (0.5, 1.8), 1),
    "hard": Level((8, 14), (2, 4), (4.0, 10.0), (120, 360), 48, (1.5, 5.0), 2),
}


@dataclass(frozen=True)
class RoomObject:
    """One object.

    Args:
        object_id (`int`): As in the aggregation file, from 0.
        category (`str`): ScanNet's raw name.
        colour (`str`, *optional*): Named colour.
        pattern (`str`): Named pattern of the main surfaces.
        position (`np.ndarray` of shape `(3,)`): Where the piece's own origin stands, metres, annotation frame.
        yaw_rad (`float`): Turn about z of the piece's frame; its front is (sin, -cos) of it.
        low (`np.ndarray` of shape `(3,)`): Bounds, metres, annotation frame.
        high (`np.ndarray` of shape `(3,)`): Bounds, metres, annotation frame.
        on (`int`, *optional*): Object id that it stands on, or below.
        under (`int`, *optional*): Object id that it stands on, or below.
        kind (`str`): `floor`, `small` or `wall`.

    Source:
        Ours.
    """

    object_id: int
    category: str
    colour: str | None
    pattern: str
    position: np.ndarray
    yaw_rad: float
    low: np.ndarray
    high: np.ndarray
    on: int | None = None
    under: int | None = None
    kind: str = "floor"

    @property
    def centre(self) -> np.ndarray:
        """Centre of the bounds, shape (3,), metres, annotation frame."""
        return (self.low + self.high) / 2

    @property
    def front(self) -> np.ndarray:
        """Unit vector that the object faces, shape (2,), annotation frame."""
        return np.array([np.sin(self.yaw_rad), -np.cos(self.yaw_rad)])


def part_bounds(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Exact bounds of a turned solid.

    Args:
        part (`Part`): The solid.

    Returns:
        `tuple` of `np.ndarray` of shape `(3,)`: lower and upper corner in the frame that `part.piece_from_part` leads to.

    Source:
        Ours.
    """
    axes = part.piece_from_part * part.half
    if part.shape == BOX:
        reach = np.abs(axes).sum(axis=1)
        return part.centre - reach, part.centre + reach
    if part.shape == ELLIPSOID:
        reach = np.linalg.norm(axes, axis=1)
        return part.centre - reach, part.centre + reach
    rim = np.hypot(axes[:, 0], axes[:, 1])
    bottom, top = part.centre - axes[:, 2], part.centre + axes[:, 2]
    return np.minimum(bottom - rim, top - part.taper * rim), np.maximum(bottom + rim, top + part.taper * rim)


def place_part(part: Part, position: np.ndarray, yaw_rad: float) -> Part:
    """A part of a piece that stands somewhere, turned about z.

    Args:
        part (`Part`): In the piece's frame.
        position (`np.ndarray` of shape `(3,)`): Metres.
        yaw_rad (`float`): Counter-clockwise.

    Returns:
        `Part`: in the annotation frame.

    Source:
        Ours.
    """
    cos, sin = np.cos(yaw_rad), np.sin(yaw_rad)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]])
    rotation = turn @ part.piece_from_part
    return Part(
        part.shape,
        turn @ part.centre + position,
        part.half,
        part.role,
        part.taper,
        rotation,
        part.pattern,
        part.emission,
    )


def piece_bounds(piece: Piece, position: np.ndarray, yaw_rad: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of a placed piece.

    Args:
        piece (`Piece`): In its own frame.
        position (`np.ndarray` of shape `(3,)`): Metres.
        yaw_rad (`float`): Counter-clockwise.

    Returns:
        `tuple` of `np.ndarray` of shape `(3,)`: lower and upper corner.

    Source:
        Ours.
    """
    bounds = [part_bounds(place_part(part, position, yaw_rad)) for part in piece.parts]
    return np.min([low for low, _ in bounds], axis=0), np.max([high for _, high in bounds], axis=0)


class Furnisher:
    """Puts things into one room; a try that fails is thrown away whole.

    Args:
        rng (`np.random.Generator`): Source of all choices.
        level (`Level`): How many things, how large a room.
        attempt (`int`): Tries so far; later ones draw larger rooms.

    Source:
        Ours.
    """

    def __init__(self, rng: np.random.Generator, level: Level, attempt: int):
        self.rng, self.level = rng, level
        side_low, side_high = level.side_m
        self.wanted = int(rng.integers(level.num_floor[0], level.num_floor[1] + 1))
        # Few things stand in a small room: a clip of bare walls teaches nothing.
        fullness = (self.wanted - level.num_floor[0] + 1) / (level.num_floor[1] - level.num_floor[0] + 2)
        share = np.clip(rng.uniform(0.0, 0.35, 2) + 0.5 * fullness * rng.uniform(0.3, 1.0) + 0.04 * attempt, 0, 1)
        sides = side_low + share * (side_high - side_low)
        offset = rng.uniform(-0.4, 0.4, 2)
        self.low = np.array([*(offset - sides / 2), 0.0])
        self.high = np.array([*(offset + sides / 2), rng.uniform(2.4, 3.0)])
        self.things: list[tuple[RoomObject, Piece]] = []
        self.reserved: list[tuple[np.ndarray, np.ndarray]] = []

    def free(self, low: np.ndarray, high: np.ndarray, gap: float) -> bool:
        """Whether a box of corners (3,), (3,) keeps its distance from walls and from what stands already."""
        if (
            (low[:2] < self.low[:2] + 0.04).any()
            or (high[:2] > self.high[:2] - 0.04).any()
            or high[2] > self.high[2] - 0.05
        ):
            return False
        others = [(thing.low, thing.high) for thing, _ in self.things if thing.kind != "wall"] + self.reserved
        return all((low[:2] - gap >= b[:2]).any() or (high[:2] + gap <= a[:2]).any() for a, b in others)

    def add(self, category: str, piece: Piece, position: np.ndarray, yaw: float, kind: str, **more) -> RoomObject:
        """Take a piece placed at (3,) into the room, in a colour that its like do not have if there is one."""
        taken = {thing.colour for thing, _ in self.things if thing.category == category}
        names = [name for name in COLOURS if name not in taken or len(taken) >= len(COLOURS)]
        colour, pattern = str(self.rng.choice(names)), str(self.rng.choice(NAMED_PATTERNS))
        named = {**FLOOR_CATEGORIES, **SMALL_CATEGORIES}.get(category)
        if named is None or not named.colour_named:
            colour, pattern = None, "plain"
        elif kind == "small":
            pattern = "plain"
        low, high = piece_bounds(piece, position, yaw)
        thing = RoomObject(len(self.things), category, colour, pattern, position, yaw, low, high, kind=kind, **more)
        self.things.append((thing, piece))
        return thing

    def wall_frame(self, wall: int) -> tuple[float, int, float, float]:
        """Turn that puts a piece's back to a wall, axis across the wall, the wall's coordinate, sign towards it."""
        axis, upper = wall // 2, wall % 2
        yaw = {0: np.pi / 2, 1: -np.pi / 2, 2: np.pi, 3: 0.0}[wall]
        return yaw, axis, (self.high if upper else self.low)[axis], 1.0 if upper else -1.0

    def hang(self, category: str, parts: list[Part], width: float, bottom: float, top: float) -> bool:
        """Put a flat thing on some wall where nothing hangs and nothing tall stands before it."""
        rng = self.rng
        for _ in range(12):
            yaw, axis, coordinate, sign = self.wall_frame(int(rng.integers(4)))
            along = 1 - axis
            if self.high[along] - self.low[along] < width + 0.4 or top > self.high[2] - 0.1:
                continue
            place = rng.uniform(self.low[along] + width / 2 + 0.15, self.high[along] - width / 2 - 0.15)
            position = np.zeros(3)
            position[axis], position[along] = coordinate, place
            low, high = piece_bounds(Piece(tuple(parts)), position, yaw)
            zone_low, zone_high = low.copy(), high.copy()
            zone_low[axis] -= 0.9 if sign > 0 else 0.0
            zone_high[axis] += 0.9 if sign < 0 else 0.0
            blocked = any(
                (zone_low < thing.high).all()
                and (zone_high > thing.low).all()
                and (thing.kind == "wall" or thing.high[2] > bottom + 0.1)
                for thing, _ in self.things
            )
            if not blocked:
                self.add(category, Piece(tuple(parts)), position, yaw, "wall")
                return True
        return False

    def hang_door(self) -> None:
        """A door, and free floor before it."""
        width, height = self.rng.uniform(0.8, 0.95), self.rng.uniform(1.95, 2.1)
        w = width / 2
        parts = [
            Part(BOX, np.array([0, -0.02, height / 2]), np.array([w + 0.07, 0.02, height / 2]), "white"),
            Part(BOX, np.array([0, -0.025, height / 2 - 0.03]), np.array([w, 0.025, height / 2 - 0.04]), "art"),
            Part(BOX, np.array([w * 0.8, -0.07, height * 0.48]), np.array([0.05, 0.02, 0.015]), "metal"),
        ]
        if self.hang("door", parts, width + 0.14, 0.0, height):
            door = self.things[-1][0]
            self.reserved.append((np.append(door.centre[:2] - 0.5, 0), np.append(door.centre[:2] + 0.5, 2)))

    def hang_picture_or_window(self, window: bool) -> None:
        """A window of two panes, or a framed picture."""
        rng = self.rng
        if window:
            w, bottom, height = rng.uniform(0.45, 0.8), rng.uniform(0.85, 1.05), rng.uniform(0.9, 1.2)
        else:
            w, bottom, height = rng.uniform(0.25, 0.5), rng.uniform(1.2, 1.5), rng.uniform(0.4, 0.75)
        middle = bottom + height / 2
        border = 0.06 if window else 0.04
        parts = [
            Part(
                BOX,
                np.array([0, -0.015, middle]),
                np.array([w, 0.015, height / 2]),
                "white" if window else "dark_wood",
            )
        ]
        if window:
            for side in (-1, 1):
                half = np.array([w / 2 - border * 0.75, 0.01, height / 2 - border])
                parts.append(Part(BOX, np.array([side * w / 2, -0.024, middle]), half, "sky", emission=0.85))
            parts.append(Part(BOX, np.array([0, -0.05, bottom]), np.array([w + 0.05, 0.05, 0.015]), "white"))
        else:
            half = np.array([w - border, 0.01, height / 2 - border])
            parts.append(
                Part(
                    BOX,
                    np.array([0, -0.024, middle]),
                    half,
                    "art",
                    pattern=str(rng.choice(["art_a", "art_b", "art_c"])),
                )
            )
        self.hang("window" if window else "picture", parts, 2 * w + 0.1, bottom, bottom + height)

    def stand(self, category: str) -> bool:
        """Put a piece on the floor: in a corner, against a wall, free, or a chair before a table."""
        rng, kind = self.rng, FLOOR_CATEGORIES[category]
        piece = kind.build(rng)
        for _ in range(30):
            mode = rng.choice(["corner", "wall"] if kind.hugs_wall else ["corner", "wall", "middle"])
            tables = [thing for thing, _ in self.things if thing.category in ("table", "desk")]
            if category == "chair" and tables and rng.random() < 0.4:
                table = tables[int(rng.integers(len(tables)))]
                # The chair's front looks at the table's front.
                yaw = table.yaw_rad + np.pi
                reach = np.abs(table.front) @ (table.high - table.low)[:2] / 2 + rng.uniform(0.33, 0.45)
                position = np.append(table.centre[:2] + table.front * reach, 0.0)
            elif mode == "middle":
                yaw = rng.integers(4) * np.pi / 2 + np.radians(rng.uniform(-12, 12))
                margin = 0.65 + np.array([0.3, 0.3])
                if (self.high[:2] - self.low[:2] <= 2 * margin).any():
                    continue
                position = np.append(rng.uniform(self.low[:2] + margin, self.high[:2] - margin), 0.0)
            else:
                yaw, axis, coordinate, sign = self.wall_frame(int(rng.integers(4)))
                low, high = piece_bounds(piece, np.zeros(3), yaw)
                position = np.zeros(3)
                gap = rng.uniform(0.05, 0.12)
                position[axis] = coordinate - sign * gap - (high[axis] if sign > 0 else low[axis])
                along = 1 - axis
                first, last = self.low[along] + 0.08 - low[along], self.high[along] - 0.08 - high[along]
                if mode == "wall":
                    first, last = first + 0.55, last - 0.55
                if last < first:
                    continue
                position[along] = rng.choice([first, last]) if mode == "corner" else rng.uniform(first, last)
            low, high = piece_bounds(piece, position, yaw)
            if self.free(low, high, 0.06):
                self.add(category, piece, position, float(yaw), "floor")
                return True
        return False

    def put_on(self) -> bool:
        """A small thing on something that carries nothing yet."""
        rng = self.rng
        carrying = {thing.on for thing, _ in self.things}
        hosts = [
            (t, p) for t, p in self.things if p.top is not None and t.kind == "floor" and t.object_id not in carrying
        ]
        if not hosts:
            return False
        host, host_piece = hosts[int(rng.integers(len(hosts)))]
        category = str(rng.choice(list(SMALL_CATEGORIES)))
        piece = SMALL_CATEGORIES[category].build(rng)
        z, half_x, half_y = host_piece.top
        low, high = piece_bounds(piece, np.zeros(3), 0.0)
        slack = np.maximum(np.array([half_x, half_y]) - np.maximum(-low, high)[:2] + 0.05, 0.0) * 0.9
        shift = rng.uniform(-slack, slack)
        cos, sin = np.cos(host.yaw_rad), np.sin(host.yaw_rad)
        place = host.position + np.array([cos * shift[0] - sin * shift[1], sin * shift[0] + cos * shift[1], z])
        yaw = host.yaw_rad + np.radians(rng.uniform(-15, 15))
        low, high = piece_bounds(piece, place, yaw)
        walls = (low[:2] > self.low[:2] + 0.02).all() and (high[:2] < self.high[:2] - 0.02).all()
        wide = np.maximum(host.low[:2] - low[:2], high[:2] - host.high[:2]).max()
        tall = any(
            thing.high[2] > z
            and thing is not host
            and (low[:2] < thing.high[:2]).all()
            and (high[:2] > thing.low[:2]).all()
            for thing, _ in self.things
        )
        inside = any(  # the back of a couch, the head of a bed, the raised lid of a piano
            (low + 1e-6 < b).all() and (high - 1e-6 > a).all()
            for a, b in (part_bounds(place_part(part, host.position, host.yaw_rad)) for part in host_piece.parts)
            if b[2] > z + 0.1
        )
        if not walls or wide > 0.1 or tall or inside:
            return False
        self.add(category, piece, place, float(yaw), "small", on=host.object_id)
        return True

    def put_under(self) -> bool:
        """A box or backpack below a table."""
        rng = self.rng
        used = {thing.under for thing, _ in self.things}
        hosts = [
            (t, p) for t, p in self.things if p.under is not None and p.under[1] > 0.3 and t.object_id not in used
        ]
        if not hosts:
            return False
        host, host_piece = hosts[int(rng.integers(len(hosts)))]
        category = str(rng.choice(["box", "backpack"]))
        piece = SMALL_CATEGORIES[category].build(rng)
        clear, half_x, half_y = host_piece.under
        low, high = piece_bounds(piece, np.zeros(3), 0.0)
        if high[2] > clear or np.maximum(-low, high)[0] > half_x or np.maximum(-low, high)[1] > half_y:
            return False
        self.add(category, piece, np.append(host.position[:2], 0.0), host.yaw_rad, "small", under=host.object_id)
        return True

    def furnish(self) -> bool:
        """Everything; False if too little found a place."""
        rng, level = self.rng, self.level
        self.hang_door()
        wanted = self.wanted
        names, standing = list(rng.permutation(list(FLOOR_CATEGORIES))), 0
        while names and standing < wanted:
            name = str(names.pop())
            several = int(rng.choice([1, 2, 3], p=[0.45, 0.3, 0.25]))
            for _ in range(min(several, wanted - standing)):
                standing += self.stand(name)
        if standing < level.num_floor[0]:
            return False
        for _ in range(int(rng.integers(level.num_on_top[0], level.num_on_top[1] + 1))):
            any(self.put_on() for _ in range(16))
        if rng.random() < 0.3:
            self.put_under()
        for _ in range(int(rng.integers(1, 3))):
            self.hang_picture_or_window(window=True)
        for _ in range(int(rng.integers(1, 4))):
            self.hang_picture_or_window(window=False)
        return True
