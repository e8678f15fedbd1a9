"""Furniture from a few solids each: what a chair, a desk, a toilet is made of.

A piece stands in its own frame: floor at z = 0, footprint centred on the origin, front towards -y, metres.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


BOX, ELLIPSOID, CONE = 0, 1, 2
_X_UP = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # turns a solid's own z to x
_Y_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # turns a solid's own z to y


@dataclass(frozen=True)
class Part:
    """One solid of a piece of furniture.

    Args:
        shape (`int`): `BOX`, `ELLIPSOID` or `CONE` (a cylinder is a cone of taper 1).
        centre (`np.ndarray` of shape `(3,)`): Metres, piece frame.
        half (`np.ndarray` of shape `(3,)`): Half extents along the solid's own axes, metres; of a cone the bottom radii and half height.
        role (`str`): `main` (the piece's named colour), `second`, or a name of `PLAIN_COLOURS`.
        taper (`float`): Top radius over bottom radius of a cone.
        piece_from_part (`np.ndarray` of shape `(3, 3)`): Rotation.
        pattern (`str`, *optional*): Texture that replaces the role's own.
        emission (`float`): Light of its own, 0..1.

    Source:
        Ours.
    """

    shape: int
    centre: np.ndarray
    half: np.ndarray
    role: str = "main"
    taper: float = 1.0
    piece_from_part: np.ndarray = field(default_factory=lambda: np.eye(3))
    pattern: str | None = None
    emission: float = 0.0


@dataclass(frozen=True)
class Piece:
    """A piece of furniture in its own frame.

    Args:
        parts (`tuple` of `Part`): Its solids.
        top (`tuple`, *optional*): `(z, half_x, half_y)`, metres: where something may stand on it.
        under (`tuple`, *optional*): `(clearance, half_x, half_y)`, metres: free space below it.

    Source:
        Ours.
    """

    parts: tuple[Part, ...]
    top: tuple[float, float, float] | None = None
    under: tuple[float, float, float] | None = None


def _box(x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, role: str = "main", **more: Any) -> Part:
    """Cuboid between limits."""
    low, high = np.array([x0, y0, z0], float), np.array([x1, y1, z1], float)
    return Part(BOX, (low + high) / 2, (high - low) / 2, role, **more)


def _pole(
    x: float, y: float, z0: float, z1: float, radius: float, role: str = "metal", taper: float = 1.0, **more: Any
) -> Part:
    """Upright cylinder or cone."""
    return Part(CONE, np.array([x, y, (z0 + z1) / 2]), np.array([radius, radius, (z1 - z0) / 2]), role, taper, **more)


def _bar(
    axis: str, centre: tuple[float, float, float], radius: float, half_length: float, role: str = "metal", **more: Any
) -> Part:
    """Cylinder lying along x or y."""
    turn = _X_UP if axis == "x" else _Y_UP
    return Part(CONE, np.array(centre, float), np.array([radius, radius, half_length]), role, 1.0, turn, **more)


def _ball(x: float, y: float, z: float, rx: float, ry: float, rz: float, role: str = "main", **more: Any) -> Part:
    """Ellipsoid."""
    return Part(ELLIPSOID, np.array([x, y, z], float), np.array([rx, ry, rz], float), role, **more)


def _four(hx: float, hy: float, make: Callable[[float, float], Part]) -> list[Part]:
    """The same part at four corners."""
    return [make(sx * hx, sy * hy) for sx in (-1, 1) for sy in (-1, 1)]


def _chair(rng: np.random.Generator) -> Piece:
    w, d, seat = rng.uniform(0.21, 0.27), rng.uniform(0.21, 0.27), rng.uniform(0.42, 0.5)
    back = seat + rng.uniform(0.4, 0.6)
    leg = rng.choice(["metal", "dark_wood", "second"])
    parts = [_box(-w, w, -d, d, seat - 0.06, seat), _box(-w, w, d - 0.05, d, seat, back)]
    if rng.random() < 0.35:  # an office chair: one post, a star of feet
        parts += [_pole(0, 0, 0.08, seat - 0.06, 0.035, "dark"), _box(-w, w, -0.03, 0.03, 0.02, 0.08, "dark")]
        parts += [_box(-0.03, 0.03, -d, d, 0.02, 0.08, "dark")]
    else:
        parts += _four(
            w - 0.03, d - 0.03, lambda x, y: _box(x - 0.022, x + 0.022, y - 0.022, y + 0.022, 0, seat - 0.06, leg)
        )
    if rng.random() < 0.3:
        for side in (-1, 1):
            parts.append(_box(side * w - 0.025, side * w + 0.025, -d, d, seat + 0.17, seat + 0.21, leg))
            parts.append(_box(side * w - 0.02, side * w + 0.02, -d, -d + 0.04, seat, seat + 0.17, leg))
    return Piece(tuple(parts))


def _table(rng: np.random.Generator) -> Piece:
    height = rng.uniform(0.66, 0.8)
    if rng.random() < 0.45:
        radius = rng.uniform(0.42, 0.65)
        parts = [_pole(0, 0, height - 0.05, height, radius, "main"), _pole(0, 0, 0.05, height - 0.05, 0.05, "second")]
        parts.append(_pole(0, 0, 0, 0.05, radius * 0.55, "second"))
        return Piece(tuple(parts), (height, radius * 0.6, radius * 0.6))
    w, d = rng.uniform(0.5, 0.9), rng.uniform(0.36, 0.5)
    parts = [_box(-w, w, -d, d, height - 0.05, height)]
    parts += _four(
        w - 0.06, d - 0.06, lambda x, y: _box(x - 0.035, x + 0.035, y - 0.035, y + 0.035, 0, height - 0.05, "second")
    )
    return Piece(tuple(parts), (height, w - 0.08, d - 0.08), (height - 0.08, w - 0.14, d - 0.12))


def _desk(rng: np.random.Generator) -> Piece:
    w, d, height = rng.uniform(0.55, 0.8), rng.uniform(0.3, 0.38), rng.uniform(0.7, 0.78)
    parts = [_box(-w, w, -d, d, height - 0.04, height), _box(-w, -w + 0.04, -d, d, 0, height - 0.04)]
    parts.append(_box(w - 0.42, w, -d, d, 0.0, height - 0.04))
    for row in range(3):  # drawers on the right
        z = 0.06 + row * (height - 0.12) / 3
        parts.append(_box(w - 0.39, w - 0.03, -d - 0.012, -d, z, z + (height - 0.12) / 3 - 0.03, "second"))
        parts.append(_ball(w - 0.21, -d - 0.02, z + 0.1, 0.025, 0.015, 0.02, "dark"))
    parts.append(_box(-w + 0.04, w - 0.42, d - 0.03, d, 0.25, height - 0.04))
    return Piece(tuple(parts), (height, w - 0.08, d - 0.05), (height - 0.08, 0.0, 0.0))


def _bed(rng: np.random.Generator) -> Piece:
    w, d, height = rng.uniform(0.48, 0.8), rng.uniform(0.95, 1.05), rng.uniform(0.4, 0.55)
    head = height + rng.uniform(0.35, 0.6)
    parts = [
        _box(-w, w, -d, d - 0.06, 0.12, height - 0.16, "second"),
        _box(-w - 0.03, w + 0.03, d - 0.06, d, 0, head, "second"),
    ]
    parts += _four(w - 0.06, d - 0.1, lambda x, y: _box(x - 0.04, x + 0.04, y - 0.04, y + 0.04, 0, 0.12, "second"))
    parts.append(_box(-w + 0.01, w - 0.01, -d + 0.01, d - 0.07, height - 0.16, height - 0.02, "white"))
    parts.append(_box(-w - 0.01, w + 0.01, -d - 0.01, d - 0.55, height - 0.2, height, "main"))
    for x in (-w / 2, w / 2) if w > 0.62 else (0.0,):
        parts.append(_ball(x, d - 0.3, height + 0.03, min(w * 0.45, 0.34), 0.19, 0.09, "white"))
    return Piece(tuple(parts), (height, w - 0.12, d - 0.6))


def _couch(rng: np.random.Generator) -> Piece:
    w, d, seat = rng.uniform(0.75, 1.1), rng.uniform(0.4, 0.48), rng.uniform(0.38, 0.46)
    arm, back = seat + 0.2, seat + rng.uniform(0.35, 0.45)
    parts = [_box(-w, w, -d, d, 0.06, seat - 0.12), _box(-w, w, d - 0.22, d, seat - 0.12, back)]
    for side in (-1, 1):
        parts.append(
            _box(
                side * w - (0.2 if side > 0 else 0),
                side * w + (0.2 if side < 0 else 0),
                -d,
                d - 0.22,
                seat - 0.12,
                arm,
            )
        )
        parts.append(_bar("y", (side * (w - 0.1), -0.11, arm), 0.1, d - 0.11, "main"))
    count = 3 if w > 0.95 else 2
    step = (2 * w - 0.4) / count
    for i in range(count):
        x = -w + 0.2 + i * step
        parts.append(_box(x + 0.01, x + step - 0.01, -d - 0.02, d - 0.22, seat - 0.12, seat, "main"))
    parts += _four(w - 0.08, d - 0.08, lambda x, y: _pole(x, y, 0, 0.06, 0.03, "dark_wood"))
    return Piece(tuple(parts), (seat, w - 0.3, d - 0.25))


def _bookshelf(rng: np.random.Generator) -> Piece:
    w, d, height = rng.uniform(0.35, 0.6), rng.uniform(0.14, 0.18), rng.uniform(1.5, 2.1)
    parts = [_box(-w, -w + 0.04, -d, d, 0, height), _box(w - 0.04, w, -d, d, 0, height)]
    parts.append(_box(-w + 0.04, w - 0.04, d - 0.02, d, 0, height))
    shelves = int(rng.integers(4, 6))
    for i in range(shelves + 1):
        z = min(0.04 + i * (height - 0.08) / shelves, height - 0.04)
        parts.append(_box(-w + 0.04, w - 0.04, -d, d - 0.02, z, z + 0.04))
        if i < shelves:  # books, some standing in two groups
            left = -w + 0.06
            for role in rng.choice(["paper", "dark", "second", "skin", "screen"], size=2):
                wide = rng.uniform(0.3, 0.75) * (w - 0.08)
                tall = rng.uniform(0.5, 0.75) * (height - 0.08) / shelves
                parts.append(
                    _box(left, left + wide, -d + 0.05, d - 0.03, z + 0.04, z + 0.04 + tall, role, pattern="striped")
                )
                left += wide + rng.uniform(0.02, 0.1)
    return Piece(tuple(parts))


def _cabinet(rng: np.random.Generator) -> Piece:
    w, d, height = rng.uniform(0.35, 0.6), rng.uniform(0.2, 0.28), rng.uniform(0.7, 1.1)
    parts = [_box(-w, w, -d, d, 0.1, height)]
    parts += _four(w - 0.05, d - 0.05, lambda x, y: _pole(x, y, 0, 0.1, 0.03, "dark_wood"))
    for side in (-1, 1):
        x = side * w / 2
        parts.append(_box(x - w / 2 + 0.02, x + w / 2 - 0.02, -d - 0.015, -d, 0.14, height - 0.05, "second"))
        parts.append(_pole(side * 0.06, -d - 0.03, height * 0.5, height * 0.5 + 0.14, 0.014, "dark"))
    return Piece(tuple(parts), (height, w - 0.08, d - 0.05))


def _stool(rng: np.random.Generator) -> Piece:
    radius, height = rng.uniform(0.17, 0.22), rng.uniform(0.45, 0.7)
    parts = [_pole(0, 0, height - 0.07, height, radius, "main")]
    for angle in np.arange(3) * 2 * np.pi / 3 + 0.4:
        parts.append(
            _pole(0.75 * radius * np.cos(angle), 0.75 * radius * np.sin(angle), 0, height - 0.07, 0.02, "second")
        )
    parts.append(_pole(0, 0, height * 0.3, height * 0.3 + 0.02, radius * 0.75, "second"))
    return Piece(tuple(parts), (height, radius * 0.5, radius * 0.5))


def _lamp(rng: np.random.Generator) -> Piece:
    height, radius = rng.uniform(1.35, 1.75), rng.uniform(0.2, 0.27)
    shade = rng.uniform(0.26, 0.36)
    parts = [_pole(0, 0, 0, 0.04, 0.16, "dark"), _pole(0, 0, 0.04, height - shade, 0.018, "metal")]
    parts.append(_pole(0, 0, height - shade, height, radius, "main", taper=rng.uniform(0.45, 0.65), emission=0.35))
    return Piece(tuple(parts))


def _trash_can(rng: np.random.Generator) -> Piece:
    radius, height = rng.uniform(0.13, 0.18), rng.uniform(0.3, 0.48)
    flare = rng.uniform(1.2, 1.4)
    parts = [_pole(0, 0, 0, height, radius, "main", taper=flare)]
    parts.append(_pole(0, 0, height, height + 0.025, radius * flare + 0.012, "main"))
    parts.append(_pole(0, 0, height + 0.025, height + 0.03, radius * flare - 0.03, "dark"))
    return Piece(tuple(parts))


def _toilet(rng: np.random.Generator) -> Piece:
    w, seat = rng.uniform(0.18, 0.21), rng.uniform(0.38, 0.43)
    parts = [_pole(0, -0.1, 0, seat - 0.12, 0.12, "main", taper=1.2), _ball(0, -0.1, seat - 0.1, w, 0.26, 0.14)]
    parts.append(Part(CONE, np.array([0, -0.1, seat]), np.array([w + 0.01, 0.27, 0.02]), "main"))
    parts.append(Part(CONE, np.array([0, -0.12, seat + 0.022]), np.array([w - 0.06, 0.18, 0.003]), "dark"))
    parts.append(_box(-w - 0.02, w + 0.02, 0.14, 0.34, seat - 0.06, seat + 0.36))
    parts.append(_box(-w - 0.035, w + 0.035, 0.125, 0.345, seat + 0.36, seat + 0.39))
    parts.append(_box(w - 0.08, w - 0.02, 0.11, 0.14, seat + 0.26, seat + 0.3, "metal"))
    parts.append(_box(-0.1, 0.1, 0.0, 0.3, 0, seat - 0.06))
    return Piece(tuple(parts))


def _plant(rng: np.random.Generator) -> Piece:
    pot, radius = rng.uniform(0.22, 0.32), rng.uniform(0.13, 0.17)
    height = rng.uniform(0.6, 1.1)
    parts = [_pole(0, 0, 0, pot, radius, "second", taper=1.3), _pole(0, 0, pot, pot + 0.004, radius * 1.2, "soil")]
    parts.append(_pole(0, 0, pot, pot + 0.85 * height, 0.02, "dark_wood"))
    for _ in range(6):
        angle, up, out = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.9), rng.uniform(0.3, 0.9)
        size = rng.uniform(0.1, 0.17)
        out *= size  # every tuft touches the stem
        parts.append(
            _ball(
                out * np.cos(angle),
                out * np.sin(angle),
                pot + up * height,
                size,
                size,
                1.3 * size,
                "leaf",
                pattern="noise",
            )
        )
    return Piece(tuple(parts))


def _refrigerator(rng: np.random.Generator) -> Piece:
    w, d, height = rng.uniform(0.3, 0.38), rng.uniform(0.3, 0.34), rng.uniform(1.55, 1.85)
    split = height * rng.uniform(0.58, 0.66)
    parts = [_box(-w, w, -d + 0.05, d, 0.03, height), _box(-w, w, -d, -d + 0.04, 0.06, split - 0.012)]
    parts.append(_box(-w, w, -d, -d + 0.04, split + 0.012, height))
    parts.append(_box(-w + 0.04, w - 0.04, -d + 0.06, d - 0.02, 0, 0.03, "dark"))
    for z0, z1 in ((split - 0.55, split - 0.06), (split + 0.06, split + 0.35)):
        parts.append(_pole(-w + 0.07, -d - 0.035, z0, z1, 0.016, "metal"))
        parts.append(_box(-w + 0.06, -w + 0.08, -d - 0.035, -d, z0, z0 + 0.03, "metal"))
    return Piece(tuple(parts))


def _bathtub(rng: np.random.Generator) -> Piece:
    w, d, height = rng.uniform(0.72, 0.85), rng.uniform(0.34, 0.4), rng.uniform(0.5, 0.58)
    wall = height - 0.04
    parts = [_box(-w, w, -d, -d + 0.08, 0, wall), _box(-w, w, d - 0.08, d, 0, wall)]
    parts += [_box(-w, -w + 0.1, -d + 0.08, d - 0.08, 0, wall), _box(w - 0.1, w, -d + 0.08, d - 0.08, 0, wall)]
    for side in (-1, 1):  # a pale lip all around
        y, x = side * (d - 0.035), side * (w - 0.045)
        parts.append(_box(-w - 0.025, w + 0.025, y - 0.06, y + 0.06, wall, height, "white"))
        parts.append(_box(x - 0.07, x + 0.07, -d + 0.095, d - 0.095, wall, height, "white"))
    parts.append(_box(-w + 0.1, w - 0.1, -d + 0.08, d - 0.08, 0, 0.1))
    # Nearly full, or the water would show from above only.
    parts.append(_box(-w + 0.1, w - 0.1, -d + 0.08, d - 0.08, 0.1, height - 0.09, "sky"))
    parts.append(_pole(-w + 0.045, 0, height, height + 0.22, 0.026, "metal"))
    parts.append(_bar("x", (-w + 0.14, 0, height + 0.2), 0.024, 0.11, "metal"))
    return Piece(tuple(parts))


def _piano(rng: np.random.Generator) -> Piece:
    w, d, height = rng.uniform(0.65, 0.75), rng.uniform(0.26, 0.3), rng.uniform(1.0, 1.15)
    parts = [_box(-w, w, -0.02, d, 0, height), _box(-w, w, -d, -0.02, 0.58, 0.66)]
    parts.append(_box(-w + 0.06, w - 0.06, -d + 0.015, -0.06, 0.66, 0.685, "white"))
    parts.append(_box(-w + 0.06, w - 0.06, -0.14, -0.05, 0.685, 0.705, "dark", pattern="plain"))
    for side in (-1, 1):
        parts.append(
            _box(side * w - (0.06 if side > 0 else 0), side * w + (0.06 if side < 0 else 0), -d, -0.02, 0.66, 0.74)
        )
        x = side * (w - 0.06)
        parts.append(_box(x - 0.04, x + 0.04, -d + 0.02, -d + 0.1, 0, 0.58))
    parts.append(_box(-0.3, 0.3, -0.045, -0.02, 0.8, 0.98, "paper"))
    parts.append(_box(-w - 0.015, w + 0.015, -0.03, d, height, height + 0.025))
    return Piece(tuple(parts), (height + 0.025, w - 0.1, 0.1))


def _washing_machine(rng: np.random.Generator) -> Piece:
    w, d, height = rng.uniform(0.29, 0.32), rng.uniform(0.27, 0.31), rng.uniform(0.82, 0.9)
    radius = rng.uniform(0.17, 0.2)
    parts = [_box(-w, w, -d, d, 0, height)]
    parts.append(_bar("y", (0, -d - 0.02, height * 0.44), radius, 0.02, "metal"))
    parts.append(_bar("y", (0, -d - 0.03, height * 0.44), radius - 0.04, 0.025, "screen"))
    parts.append(_box(-w + 0.02, w - 0.02, -d - 0.012, -d, height - 0.15, height - 0.03, "grey"))
    parts.append(_bar("y", (w - 0.12, -d - 0.02, height - 0.09), 0.04, 0.02, "dark"))
    return Piece(tuple(parts), (height, w - 0.08, d - 0.08))


def _monitor(rng: np.random.Generator) -> Piece:
    w, height = rng.uniform(0.24, 0.32), rng.uniform(0.28, 0.36)
    parts = [_box(-0.12, 0.12, -0.08, 0.08, 0, 0.02, "dark"), _box(-0.025, 0.025, 0.0, 0.03, 0.02, 0.12, "dark")]
    parts.append(_box(-w, w, -0.02, 0.02, 0.09, 0.09 + height, "dark"))
    parts.append(
        _box(-w + 0.02, w - 0.02, -0.024, -0.02, 0.11, 0.07 + height, "screen", pattern="art_b", emission=0.4)
    )
    return Piece(tuple(parts))


def _carton(rng: np.random.Generator) -> Piece:
    w, d, height = rng.uniform(0.13, 0.2), rng.uniform(0.12, 0.18), rng.uniform(0.18, 0.3)
    parts = [
        _box(-w, w, -d, d, 0, height),
        _box(-w - 0.002, w + 0.002, -0.03, 0.03, -0.0 + 0.002, height + 0.003, "paper"),
    ]
    return Piece(tuple(parts))


def _backpack(rng: np.random.Generator) -> Piece:
    w, d, height = rng.uniform(0.15, 0.19), rng.uniform(0.09, 0.12), rng.uniform(0.38, 0.46)
    parts = [_box(-w, w, -d, d, 0, height - w * 0.8)]
    parts.append(Part(CONE, np.array([0, 0, height - w * 0.8]), np.array([w, w * 0.8, d]), "main", 1.0, _Y_UP))
    parts.append(_box(-w * 0.75, w * 0.75, -d - 0.06, -d, 0.03, height * 0.45, "second"))
    for side in (-1, 1):
        parts.append(_box(side * w * 0.5 - 0.025, side * w * 0.5 + 0.025, d, d + 0.03, 0.05, height * 0.8, "dark"))
    parts.append(_ball(0, 0, height + 0.005, 0.05, 0.02, 0.035, "dark"))
    return Piece(tuple(parts))


def _book(rng: np.random.Generator) -> Piece:
    w, d, height = rng.uniform(0.13, 0.17), rng.uniform(0.1, 0.12), rng.uniform(0.06, 0.1)
    parts = []
    for sheet, (z0, z1, role) in enumerate(
        ((0, 0.015, "main"), (0.015, height - 0.015, "paper"), (height - 0.015, height, "main"))
    ):
        inset = 0.012 if sheet == 1 else 0.0
        parts.append(_box(-w + inset, w - inset, -d + inset, d, z0, z1, role))
    parts.append(_box(-w, w, d, d + 0.012, 0, height))
    return Piece(tuple(parts))


def _bottle(rng: np.random.Generator) -> Piece:
    radius, height = rng.uniform(0.055, 0.07), rng.uniform(0.32, 0.4)
    parts = [
        _pole(0, 0, 0, height * 0.6, radius, "main"),
        _pole(0, 0, height * 0.6, height * 0.78, radius, "main", taper=0.35),
    ]
    parts += [
        _pole(0, 0, height * 0.78, height * 0.93, radius * 0.35, "main"),
        _pole(0, 0, height * 0.93, height, radius * 0.42, "white"),
    ]
    return Piece(tuple(parts))


def _bowl(rng: np.random.Generator) -> Piece:
    radius, height = rng.uniform(0.13, 0.18), rng.uniform(0.1, 0.13)
    parts = [_pole(0, 0, 0, 0.02, radius * 0.4, "main"), _pole(0, 0, 0.02, height, radius * 0.45, "main", taper=2.2)]
    for angle in np.arange(4) * np.pi / 2 + 0.3:  # fruit
        parts.append(
            _ball(
                0.4 * radius * np.cos(angle), 0.4 * radius * np.sin(angle), height + 0.015, 0.042, 0.042, 0.042, "skin"
            )
        )
    return Piece(tuple(parts))


def _stuffed_animal(rng: np.random.Generator) -> Piece:
    size = rng.uniform(0.9, 1.15)
    body = [_ball(0, 0, 0.12, 0.11, 0.1, 0.12), _ball(0, -0.01, 0.29, 0.09, 0.085, 0.085)]
    body += [_ball(sx * 0.075, 0, 0.365, 0.035, 0.025, 0.035) for sx in (-1, 1)]
    body += [_ball(sx * 0.09, -0.09, 0.045, 0.045, 0.075, 0.045) for sx in (-1, 1)]
    body += [_ball(sx * 0.12, -0.04, 0.17, 0.035, 0.06, 0.035) for sx in (-1, 1)]
    body += [_ball(0, -0.085, 0.27, 0.04, 0.03, 0.03, "paper")]
    return Piece(tuple(Part(p.shape, p.centre * size, p.half * size, p.role) for p in body))


@dataclass(frozen=True)
class Category:
    """A kind of object: how it is named, built and placed.

    Args:
        name (`str`): ScanNet's raw category.
        nyu40 (`tuple`): NYU40 id and class of the name.
        build (`Callable`): Makes a piece from a random generator.
        colour_named (`bool`): Whether one colour describes it.
        hugs_wall (`bool`): Never stands in the middle of a room.

    Source:
        Ours: names and NYU40 classes as in ScanNet's label table.
    """

    name: str
    nyu40: tuple[int, str]
    build: Callable[[np.random.Generator], Piece] | None = None
    colour_named: bool = True
    hugs_wall: bool = False


_PROP = (40, "otherprop")
_FURNITURE = (39, "otherfurniture")
FLOOR_CATEGORIES = {
    category.name: category
    for category in (
        Category("chair", (5, "chair"), _chair),
        Category("table", (7, "table"), _table),
        Category("desk", (14, "desk"), _desk),
        Category("bed", (4, "bed"), _bed),
        Category("couch", (6, "sofa"), _couch),
        Category("bookshelf", (10, "bookshelf"), _bookshelf, hugs_wall=True),
        Category("cabinet", (3, "cabinet"), _cabinet),
        Category("stool", _PROP, _stool),
        Category("lamp", (35, "lamp"), _lamp),
        Category("trash can", _FURNITURE, _trash_can),
        Category("toilet", (33, "toilet"), _toilet, hugs_wall=True),
        Category("plant", _PROP, _plant, colour_named=False),
        Category("refrigerator", (24, "refridgerator"), _refrigerator, hugs_wall=True),
        Category("bathtub", (36, "bathtub"), _bathtub, hugs_wall=True),
        Category("piano", _PROP, _piano, hugs_wall=True),
        Category("washing machine", _PROP, _washing_machine, hugs_wall=True),
    )
}
SMALL_CATEGORIES = {
    category.name: category
    for category in (
        Category("monitor", _PROP, _monitor, colour_named=False),
        Category("box", (29, "box"), _carton),
        Category("backpack", _PROP, _backpack),
        Category("book", (23, "books"), _book),
        Category("bottle", _PROP, _bottle),
        Category("bowl", _PROP, _bowl),
        Category("stuffed animal", _PROP, _stuffed_animal),
    )
}
WALL_CATEGORIES = {
    category.name: category
    for category in (
        Category("picture", (11, "picture"), colour_named=False),
        Category("window", (9, "window"), colour_named=False),
        Category("door", (8, "door"), colour_named=False),
    )
}
STRUCTURE = {"wall": (1, "wall"), "floor": (2, "floor"), "ceiling": (22, "ceiling")}
CATEGORIES = {**FLOOR_CATEGORIES, **SMALL_CATEGORIES, **WALL_CATEGORIES}
