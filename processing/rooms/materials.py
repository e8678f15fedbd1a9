"""Colours with names, and the textures that cover walls and furniture.

A texture is a map of mixing weights in 0..1 between two colours, tileable, baked once. All of them stand in one atlas, so that
a pixel's colour costs one look-up whatever covers it.
"""

import functools

import numpy as np


# Names that a person would use, as sRGB bytes; chosen to stay apart under coloured and weak light.
COLOURS = {
    "red": (196, 30, 34),
    "orange": (240, 128, 20),
    "yellow": (244, 214, 40),
    "green": (34, 140, 54),
    "blue": (34, 74, 190),
    "purple": (120, 44, 156),
    "pink": (246, 136, 180),
    "brown": (104, 62, 30),
    "black": (28, 28, 32),
    "white": (240, 240, 236),
}
# Parts that carry no name: legs, metal, paper.
PLAIN_COLOURS = {
    "wood": (150, 104, 62),
    "dark_wood": (86, 54, 34),
    "metal": (150, 154, 160),
    "dark": (36, 36, 42),
    "white": (236, 236, 230),
    "grey": (120, 122, 126),
    "leaf": (40, 120, 44),
    "soil": (60, 42, 30),
    "screen": (30, 52, 86),
    "sky": (176, 212, 250),
    "paper": (226, 222, 206),
    "skin": (214, 170, 130),
}
ATLAS_SIZE = 128
PATTERNS = (
    "plain",
    "checkered",
    "striped",
    "dotted",
    "planks",
    "tiles",
    "grain",
    "noise",
    "brick",
    "art_a",
    "art_b",
    "art_c",
)
# What an object's surface may be called; the rest covers the room and unnamed parts.
NAMED_PATTERNS = ("plain", "checkered", "striped", "dotted")
FLOORS = {"wooden": "planks", "tiled": "tiles", "checkered": "checkered", "carpeted": "noise"}


def linear_from_srgb(rgb: tuple[int, int, int]) -> np.ndarray:
    """Linear light of sRGB bytes.

    Args:
        rgb (`tuple` of `int`): Red, green, blue, 0..255.

    Returns:
        `np.ndarray` of shape `(3,)`: linear light, 0..1.

    Source:
        Ours: the plain 2.2 power law serves both ways.
    """
    return (np.array(rgb, np.float64) / 255.0) ** 2.2


def _value_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth tileable noise (ATLAS_SIZE, ATLAS_SIZE) in 0..1 with `cells` periods of random values a side."""
    lattice = rng.random((cells, cells))
    position = np.arange(ATLAS_SIZE) * cells / ATLAS_SIZE
    low = position.astype(int)
    part = position - low
    part = part * part * (3 - 2 * part)
    high = (low + 1) % cells
    rows = lattice[low] * (1 - part)[:, None] + lattice[high] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, high] * part


@functools.cache
def texture_atlas() -> np.ndarray:
    """All textures, one after the other.

    Returns:
        `np.ndarray` of shape `(patterns, ATLAS_SIZE, ATLAS_SIZE)`, float32: weight of the second colour, 0..1, in the order of
        `PATTERNS`; every texture repeats without a seam.

    Source:
        Ours: a look-up costs the same for every pattern.
    """
    rng = np.random.default_rng(20240607)
    v, u = np.meshgrid(np.arange(ATLAS_SIZE) / ATLAS_SIZE, np.arange(ATLAS_SIZE) / ATLAS_SIZE, indexing="ij")
    fine, coarse, broad = _value_noise(rng, 32), _value_noise(rng, 10), _value_noise(rng, 5)
    row = np.floor(v * 4)
    shift = row * 0.37
    seam = (np.mod(v * 4, 1) < 0.09) | (np.mod(u + shift, 1) < 0.025)
    plank_tone = np.mod(row * 0.618, 1.0)
    streak = _value_noise(rng, 32)[:, :1] * 0.6 + 0.4 * coarse
    joint = (np.mod(u * 2, 1) < 0.06) | (np.mod(v * 2, 1) < 0.06)
    course = np.floor(v * 4)
    mortar = (np.mod(v * 4, 1) < 0.12) | (np.mod(u * 2 + 0.5 * np.mod(course, 2), 1) < 0.06)
    spots = np.hypot(np.mod(u * 2, 1) - 0.5, np.mod(v * 2, 1) - 0.5) < 0.3
    maps = {
        "plain": 0.12 * fine,
        "checkered": ((np.floor(u * 2) + np.floor(v * 2)) % 2) * 0.92 + 0.08 * fine,
        "striped": (np.mod(u * 2, 1) < 0.5) * 0.92 + 0.08 * fine,
        "dotted": spots * 0.95 + 0.05 * fine,
        "planks": np.where(seam, 1.0, 0.15 + 0.3 * plank_tone + 0.25 * streak),
        "tiles": np.where(joint, 1.0, 0.15 * coarse),
        "grain": 0.5 * streak + 0.1 * fine,
        "noise": 0.55 * fine + 0.35 * coarse,
        "brick": np.where(mortar, 1.0, 0.3 * coarse),
        "art_a": (broad > 0.5) * 0.8 + 0.2 * coarse,
        "art_b": np.clip(np.hypot(u - 0.5, v - 0.45) * 2.4 + 0.3 * broad - 0.2, 0, 1),
        "art_c": np.clip(1.3 * np.abs(np.sin(7 * u + 4 * broad)) - 0.2, 0, 1),
    }
    return np.stack([np.clip(maps[name], 0, 1) for name in PATTERNS]).astype(np.float32)
