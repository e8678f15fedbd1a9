"""Batched ray casting of rooms in torch: colour, exact depth, instances; the same code on CPU and GPU.

Every solid is a unit solid in a frame of its own, so that a ray keeps its parameter there: with rays whose camera z is 1 that
parameter is the depth along the optical axis. Per frame a solid meets only the tiles of pixels that its screen rectangle touches;
all (frame, solid, tile) triples of a kind of solid are one batch. The nearest hit of a pixel is an integer minimum over
(depth bits, solid), which no order of execution changes.

Shapes: F frames, K solids, H W pixels, n triples.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .furniture import BOX, CONE, ELLIPSOID
from .layout import Room
from .materials import ATLAS_SIZE, texture_atlas


TILE = 8
NEAR_M = 0.02
_SHADOW_CELLS = 96
# Triples at a time: their rays should stay in the processor's cache. A GPU has room for more.
_TRIPLES_CPU, _TRIPLES_GPU = 2048, 262144
_FAR_KEY = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class RenderedFrames:
    """What the camera saw.

    Args:
        rgb (`torch.Tensor` of shape `(F, H, W, 3)`, uint8): sRGB; empty, shape `(0, H, W, 3)`, if colour was not wanted.
        depth_m (`torch.Tensor` of shape `(F, H, W)`): Along the optical axis, metres, positive everywhere.
        instance (`torch.Tensor` of shape `(F, H, W)`, int64): Object id; -1 to -6 the room's faces -x, +x, -y, +y, floor, ceiling.

    Source:
        Ours.
    """

    rgb: torch.Tensor
    depth_m: torch.Tensor
    instance: torch.Tensor


def _turn(matrix: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Matrices (..., 3, 3) times vectors (..., 3), term by term: a matrix product rounds differently in batches of another size."""
    return matrix[..., 0] * vectors[..., :1] + matrix[..., 1] * vectors[..., 1:2] + matrix[..., 2] * vectors[..., 2:]


def _screen_tiles(
    unit_corners: torch.Tensor,
    centre: torch.Tensor,
    cam_from_annotation: torch.Tensor,
    intrinsics: torch.Tensor,
    size_hw: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last tile row and column (F, K, 4) that a solid may touch; an empty range where it is out of sight.

    The twelve edges of the solid's bounding box are clipped at the near plane; the rectangle of what is left holds the solid.
    """
    height, width = size_hw
    corners = centre[:, None] + unit_corners  # (K, 8, 3)
    cam = _turn(cam_from_annotation[:, None, None, :3, :3], corners) + cam_from_annotation[:, None, None, :3, 3]
    pairs = torch.tensor(
        [(a, b) for a in range(8) for b in range(8) if a < b and bin(a ^ b).count("1") == 1], device=cam.device
    )
    first, second = cam[:, :, pairs[:, 0]], cam[:, :, pairs[:, 1]]
    z0, z1 = first[..., 2:], second[..., 2:]
    step = torch.where((z1 - z0).abs() < 1e-12, torch.ones_like(z0), z1 - z0)
    part = ((NEAR_M - z0) / step).clamp(0, 1)
    cut = first + part * (second - first)
    first, second = torch.where(z0 < NEAR_M, cut, first), torch.where(z1 < NEAR_M, cut, second)
    points = torch.cat([first, second], dim=2)
    alive = (torch.maximum(z0, z1) > NEAR_M).expand(-1, -1, -1, 3).repeat(1, 1, 2, 1)[..., 0]
    depth = points[..., 2].clamp_min(NEAR_M)
    u = points[..., 0] / depth * intrinsics[0, 0] + intrinsics[0, 2]
    v = points[..., 1] / depth * intrinsics[1, 1] + intrinsics[1, 2]
    big = 1e9
    # Half a pixel of margin for the sub-pixel rays, a little more for rounding.
    u0, v0 = torch.where(alive, u, big).amin(2) - 0.6, torch.where(alive, v, big).amin(2) - 0.6
    u1, v1 = torch.where(alive, u, -big).amax(2) + 0.6, torch.where(alive, v, -big).amax(2) + 0.6
    seen = alive.any(2) & (u1 >= 0) & (v1 >= 0) & (u0 <= width - 1) & (v0 <= height - 1)
    rows, columns = -(-height // TILE), -(-width // TILE)
    limits = [
        (v0 / TILE).floor().clamp(0, rows - 1),
        (v1 / TILE).floor().clamp(0, rows - 1),
        (u0 / TILE).floor().clamp(0, columns - 1),
        (u1 / TILE).floor().clamp(0, columns - 1),
    ]
    return torch.stack(limits, dim=-1).long(), seen


def _hit_box(origin: list[torch.Tensor], rays: list[torch.Tensor]) -> torch.Tensor:
    """Entry of rays into the cube -1..1; origin 3 x (n, 1), rays 3 x (n, T). Infinite where missed."""
    near = far = None
    for o, d in zip(origin, rays, strict=True):
        inverse = d.reciprocal()
        middle, reach = -o * inverse, inverse.abs()
        low, high = middle - reach, middle + reach
        near, far = (low, high) if near is None else (torch.maximum(near, low), torch.minimum(far, high))
    return torch.where((near <= far) & (near > NEAR_M), near, torch.inf)


def _hit_ellipsoid(origin: list[torch.Tensor], rays: list[torch.Tensor]) -> torch.Tensor:
    """Entry into the unit ball."""
    (ox, oy, oz), (dx, dy, dz) = origin, rays
    a = dx * dx + dy * dy + dz * dz
    closest = -(ox * dx + oy * dy + oz * dz) / a
    # From the point of the ray that is closest to the centre: no difference of large numbers.
    px, py, pz = ox + closest * dx, oy + closest * dy, oz + closest * dz
    free = (1 - (px * px + py * py + pz * pz)) / a
    near = closest - free.clamp_min(0).sqrt()
    return torch.where((free >= 0) & (near > NEAR_M), near, torch.inf)


def _hit_cone(origin: list[torch.Tensor], rays: list[torch.Tensor], taper: torch.Tensor) -> torch.Tensor:
    """First of the valid hits with the side and the two caps of a cone of bottom radius 1 and top radius `taper`."""
    (ox, oy, oz), (dx, dy, dz) = origin, rays
    slope, middle = (taper - 1) / 2, (taper + 1) / 2
    dr = slope * dz
    a = dx * dx + dy * dy - dr * dr
    a = torch.where(a.abs() < 1e-12, 1e-12, a)
    closest = -(ox * dx + oy * dy - (middle + slope * oz) * dr) / a
    px, py, pz = ox + closest * dx, oy + closest * dy, oz + closest * dz
    radius = middle + slope * pz
    free = -(px * px + py * py - radius * radius) / a
    root = free.clamp_min(0).sqrt()
    best = None
    for near in (closest - root, closest + root):
        z = oz + near * dz
        good = (free >= 0) & (z.abs() <= 1) & (near > NEAR_M)
        hit = torch.where(good, near, torch.inf)
        best = hit if best is None else torch.minimum(best, hit)
    inverse = dz.reciprocal()
    for end, radius in ((-1.0, 1.0), (1.0, taper)):
        near = (end - oz) * inverse
        x, y = ox + near * dx, oy + near * dy
        good = (x * x + y * y <= radius * radius) & (near > NEAR_M)
        best = torch.minimum(best, torch.where(good, near, torch.inf))
    return best


class RoomRenderer:
    """Casts the rays of one room.

    Args:
        room (`Room`): The room.
        device (`str` or `torch.device`): Where to compute.

    Source:
        Ours: one code for data made ahead on a CPU and on the fly on a GPU.
    """

    def __init__(self, room: Room, device: str | torch.device = "cpu"):
        self.room, self.device = room, torch.device(device)
        solids = room.solids

        def exact(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(array, dtype=torch.float64, device=self.device)

        def single(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(array, dtype=torch.float32, device=self.device)

        self.shape = torch.tensor(solids.shape, device=self.device)
        self.owner = torch.tensor(solids.owner, device=self.device)
        self.centre, self.taper = exact(solids.centre), exact(solids.taper)
        # unit_from_annotation without its translation: the solid becomes the unit solid.
        self.unit_from_annotation = exact(solids.rotation.transpose(0, 2, 1) / solids.half[:, :, None])
        signs = exact([[2.0 * (i & 1) - 1, (i & 2) - 1.0, (i & 4) / 2 - 1.0] for i in range(8)])
        wide = torch.ones_like(self.centre)
        wide[:, :2] = self.taper.clamp_min(1.0)[:, None]
        axes = exact(solids.rotation * solids.half[:, None, :])
        self.unit_corners = torch.einsum("kij,kcj->kci", axes, signs[None] * wide[:, None])
        self.low, self.high = exact(room.low), exact(room.high)
        # Per solid, then per face of the room: colours, texture.
        self.colour_a = single(np.concatenate([solids.colour_a, room.shell_colour_a]))
        self.colour_b = single(np.concatenate([solids.colour_b, room.shell_colour_b]))
        self.pattern = torch.tensor(np.concatenate([solids.pattern, room.shell_pattern]), device=self.device)
        self.tiles_per_m = single(1.0 / np.concatenate([solids.tile_m, room.shell_tile_m]))
        self.emission = single(np.concatenate([solids.emission, np.zeros(6)]))
        table = torch.cat([self.unit_from_annotation.flatten(1), self.centre, exact(solids.half)], dim=1)
        self.solid_table = torch.cat([table, self.taper[:, None], self.shape[:, None]], dim=1).float()
        self.atlas = single(texture_atlas()).flatten()
        self.shadow = self._floor_shadow()

    def _floor_shadow(self) -> torch.Tensor:
        """Brightness of the floor by closeness to what stands on it: a soft shadow, (cells * cells,)."""
        room = self.room
        step = (np.arange(_SHADOW_CELLS) + 0.5) / _SHADOW_CELLS
        x = room.low[0] + step * (room.high - room.low)[0]
        y = room.low[1] + step * (room.high - room.low)[1]
        points = np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1)
        light = np.ones(points.shape[:2])
        for thing in room.objects:
            if thing.kind == "wall" or thing.on is not None:
                continue
            gap = np.maximum(np.maximum(thing.low[:2] - points, points - thing.high[:2]), 0)
            light *= 1 - 0.5 * np.exp(-np.linalg.norm(gap, axis=-1) / 0.16)
        walls = np.minimum(points - room.low[:2], room.high[:2] - points).min(-1)
        light *= 1 - 0.25 * np.exp(-walls / 0.2)
        return torch.tensor(light.reshape(-1), dtype=torch.float32, device=self.device)

    def _triples(
        self, cam_from_annotation: torch.Tensor, intrinsics: torch.Tensor, size_hw: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """All (frame, solid, tile row, tile column) that may meet, each (n,)."""
        limits, seen = _screen_tiles(self.unit_corners, self.centre, cam_from_annotation, intrinsics, size_hw)
        rows = (limits[..., 1] - limits[..., 0] + 1) * seen
        columns = limits[..., 3] - limits[..., 2] + 1
        count = (rows * columns).flatten()
        pair = torch.repeat_interleave(torch.arange(len(count), device=self.device), count)
        inside = torch.arange(len(pair), device=self.device) - (count.cumsum(0) - count)[pair]
        columns, limits = columns.flatten()[pair], limits.flatten(0, 1)[pair]
        row, column = limits[:, 0] + inside // columns, limits[:, 2] + inside % columns
        num_solids = len(self.shape)
        return pair // num_solids, pair % num_solids, row, column

    def _shell_exit(self, centres: torch.Tensor, rays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where rays (..., 3) from centres leave the room: depth and face 0..5."""
        inverse = rays.reciprocal()
        to_low, to_high = (self.low - centres).float() * inverse, (self.high - centres).float() * inverse
        exits = torch.maximum(to_low, to_high)
        depth, axis = exits.min(dim=-1)
        upper = torch.gather(to_high, -1, axis[..., None])[..., 0] >= torch.gather(to_low, -1, axis[..., None])[..., 0]
        face = axis * 2 + upper
        return depth, face

    def _cast(
        self,
        annotation_from_cam: torch.Tensor,
        intrinsics: torch.Tensor,
        size_hw: tuple[int, int],
        offset_px: tuple[float, float],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Nearest hit of every pixel in tiles: depth (F, R*C, 64), solid or K + face (F, R*C, 64), rays (F, R*C, 64, 3)."""
        height, width = size_hw
        rows, columns = -(-height // TILE), -(-width // TILE)
        device, num_solids = self.device, len(self.shape)
        rotation, centres = annotation_from_cam[:, :3, :3], annotation_from_cam[:, :3, 3]
        cam_from_annotation = torch.linalg.inv(annotation_from_cam)
        in_row = torch.arange(TILE * TILE, device=device) // TILE
        in_column = torch.arange(TILE * TILE, device=device) % TILE
        step_x, step_y = 1 / intrinsics[0, 0], 1 / intrinsics[1, 1]
        frame, solid, row, column = self._triples(cam_from_annotation, intrinsics, size_hw)
        # Camera coordinates of a tile's first ray; its other rays are steps to the right and down.
        x0 = (column * TILE + offset_px[0] - intrinsics[0, 2]) * step_x
        y0 = (row * TILE + offset_px[1] - intrinsics[1, 2]) * step_y
        columns_of = [_turn(self.unit_from_annotation, rotation[:, None, :, axis]) for axis in range(3)]
        unit_from_cam = torch.stack(columns_of, dim=-1)
        origin = _turn(self.unit_from_annotation, centres[:, None] - self.centre)
        keys = torch.full((len(centres) * rows * columns, TILE * TILE), _FAR_KEY, dtype=torch.int64, device=device)
        in_x, in_y = in_column.float(), in_row.float()
        limit = _TRIPLES_CPU if device.type == "cpu" else _TRIPLES_GPU
        for kind in (BOX, ELLIPSOID, CONE):
            of_kind = torch.nonzero(self.shape[solid] == kind)[:, 0]
            for chosen in of_kind.split(limit):
                f, k = frame[chosen], solid[chosen]
                matrix = unit_from_cam[f, k]
                start = matrix[..., 0] * x0[chosen, None] + matrix[..., 1] * y0[chosen, None] + matrix[..., 2]
                right, down = (matrix[..., 0] * step_x).float(), (matrix[..., 1] * step_y).float()
                start, source = start.float(), origin[f, k].float()
                rays = [
                    torch.addcmul(
                        torch.addcmul(start[:, i : i + 1], right[:, i : i + 1], in_x), down[:, i : i + 1], in_y
                    )
                    for i in range(3)
                ]
                sources = [source[:, i : i + 1] for i in range(3)]
                if kind == BOX:
                    depth = _hit_box(sources, rays)
                elif kind == ELLIPSOID:
                    depth = _hit_ellipsoid(sources, rays)
                else:
                    depth = _hit_cone(sources, rays, self.taper[k].float()[:, None])
                # Bits of a positive float sort as integers; below them the solid breaks ties.
                key = (depth.view(torch.int32).long() << 32) | k[:, None]
                target = f * (rows * columns) + row[chosen] * columns + column[chosen]
                keys.scatter_reduce_(0, target[:, None].expand_as(key), key, "amin")
        tile_row = torch.arange(rows * columns, device=device) // columns
        tile_column = torch.arange(rows * columns, device=device) % columns
        x = ((tile_column[:, None] * TILE + in_column) + offset_px[0] - intrinsics[0, 2]) * step_x
        y = ((tile_row[:, None] * TILE + in_row) + offset_px[1] - intrinsics[1, 2]) * step_y
        rays = torch.stack([x, y, torch.ones_like(x)], dim=-1).float()
        rays = _turn(rotation.float()[:, None, None], rays)
        shell_depth, face = self._shell_exit(centres[:, None, None], rays)
        shell_key = (shell_depth.view(torch.int32).long() << 32) | (num_solids + face)
        keys = torch.minimum(keys.view(len(centres), rows * columns, -1), shell_key)
        depth = (keys >> 32).int().view(torch.float32)
        return depth, keys & 0xFFFFFFFF, rays

    def _shade(
        self, centres: torch.Tensor, depth: torch.Tensor, hit: torch.Tensor, rays: torch.Tensor
    ) -> torch.Tensor:
        """Linear colour (..., 3) of hits of the first dimension's camera centres."""
        num_solids = len(self.shape)
        points = centres.float()[:, None, None] + depth[..., None] * rays
        flat_points, flat_hit = points.flatten(0, -2), hit.flatten()
        normal = torch.zeros_like(flat_points)
        uv = torch.zeros_like(flat_points[:, :2])
        light = torch.ones_like(flat_points[:, 0])
        on_shell = flat_hit >= num_solids
        where = torch.nonzero(on_shell)[:, 0]
        face, spots = flat_hit[where] - num_solids, flat_points[where]
        axis = face // 2
        normal[where, axis] = 1.0 - 2.0 * (face % 2)
        # Walls across x show (y, z), across y (x, z), floor and ceiling (x, y).
        uv[where] = torch.stack(
            [torch.where(axis == 0, spots[:, 1], spots[:, 0]), torch.where(axis == 2, spots[:, 1], spots[:, 2])], 1
        )
        low, high = self.low.float(), self.high.float()
        cell = ((spots - low) / (high - low) * _SHADOW_CELLS).long().clamp(0, _SHADOW_CELLS - 1)
        shade = self.shadow[cell[:, 0] * _SHADOW_CELLS + cell[:, 1]]
        skirting = (axis < 2) & (spots[:, 2] < 0.08)
        edge = (
            1
            - 0.2 * torch.exp(-(spots[:, 2] - low[2]).clamp_min(0) / 0.25)
            - 0.12 * torch.exp(-(high[2] - spots[:, 2]).clamp_min(0) / 0.3)
        )
        light[where] = torch.where(face == 4, shade, torch.where(axis < 2, edge, 1.0)) * torch.where(
            skirting, 1.25, 1.0
        )
        where = torch.nonzero(~on_shell)[:, 0]
        rows = self.solid_table[flat_hit[where]]
        matrix = rows[:, :9].view(-1, 3, 3)
        unit = _turn(matrix, flat_points[where] - rows[:, 9:12])
        half, taper, shape = rows[:, 12:15], rows[:, 15], rows[:, 16]
        side = torch.argmax(unit.abs(), dim=1, keepdim=True)
        box = torch.zeros_like(unit).scatter_(1, side, torch.gather(unit, 1, side).sign())
        slope = (taper - 1) / 2
        radius = (taper + 1) / 2 + slope * unit[:, 2]
        cap = unit[:, 2].abs() > 1 - 1e-4
        round_side = torch.stack([unit[:, 0], unit[:, 1], -slope * radius], dim=1)
        flat_cap = torch.stack([torch.zeros_like(slope), torch.zeros_like(slope), unit[:, 2].sign()], dim=1)
        cone = torch.where(cap[:, None], flat_cap, round_side)
        gradient = torch.where((shape == BOX)[:, None], box, torch.where((shape == CONE)[:, None], cone, unit))
        normal[where] = torch.nn.functional.normalize(_turn(matrix.transpose(1, 2), gradient), dim=1)
        local = unit * half
        main = (gradient.abs() / half).argmax(dim=1)
        uv[where] = torch.stack(
            [torch.where(main == 0, local[:, 1], local[:, 0]), torch.where(main == 2, local[:, 1], local[:, 2])], 1
        )
        # Things stand darker near the floor and under one another: a stand-in for occluded light.
        light[where] = 0.8 + 0.2 * ((flat_points[where, 2] - low[2]) / 0.5).clamp(0, 1)
        texel = (uv * self.tiles_per_m[flat_hit][:, None] * ATLAS_SIZE).floor().long() % ATLAS_SIZE
        index = self.pattern[flat_hit] * ATLAS_SIZE * ATLAS_SIZE + texel[:, 1] * ATLAS_SIZE + texel[:, 0]
        weight = self.atlas[index][:, None]
        albedo = self.colour_a[flat_hit] * (1 - weight) + self.colour_b[flat_hit] * weight
        brightness = 0.42 + 0.14 * normal[:, 2] + 0.05 * normal[:, 0]
        for x, y, z, strength in self.room.lights.tolist():
            to_light = flat_points.new_tensor([x, y, z]) - flat_points
            distance = to_light.norm(dim=1).clamp_min(0.2)
            facing = ((normal * to_light).sum(1) / distance).clamp_min(0)
            brightness = brightness + strength * facing / (1 + 0.12 * distance * distance)
        brightness = brightness * light * self.room.exposure
        glow = self.emission[flat_hit]
        brightness = torch.maximum(brightness, glow * 1.1) + 0.3 * glow
        return (albedo * brightness[:, None]).clamp(0, 1).view(points.shape)

    def _untile(self, tiled: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
        """(F, tiles, 64, ...) -> (F, H, W, ...), the surplus of the last tiles cut off."""
        height, width = size_hw
        rows, columns = -(-height // TILE), -(-width // TILE)
        rest = tiled.shape[3:]
        grid = tiled.view(tiled.shape[0], rows, columns, TILE, TILE, *rest).transpose(2, 3)
        return grid.reshape(tiled.shape[0], rows * TILE, columns * TILE, *rest)[:, :height, :width].contiguous()

    @torch.no_grad()
    def render(
        self,
        size_hw: tuple[int, int] = (96, 128),
        frames: list[int] | None = None,
        antialias: bool = False,
        colour: bool = True,
        frames_at_once: int | None = None,
    ) -> RenderedFrames:
        """Render frames of the room's own camera track.

        Args:
            size_hw (`tuple` of `int`): Height and width, pixels.
            frames (`list` of `int`, *optional*): Which; all by default.
            antialias (`bool`): Colour from 2 x 2 rays per pixel; depth and instance stay those of the pixel's centre.
            colour (`bool`): Whether to shade at all.
            frames_at_once (`int`, *optional*): Bounds memory; 4 on a CPU and 64 on a GPU by default.

        Returns:
            `RenderedFrames`: on the renderer's device.

        Raises:
            ValueError: A side under one pixel, or a frame that the track does not have.

        Source:
            Ours: pixel coordinates are integers at pixel centres, principal point at half the size.
        """
        track = self.room.track.annotation_from_cam
        frames = list(range(len(track))) if frames is None else list(frames)
        if min(size_hw) < 1 or not frames or not all(0 <= f < len(track) for f in frames):
            raise ValueError(
                f"render: wanted sides of at least 1 pixel and frames in 0..{len(track) - 1}; got {tuple(size_hw)} and {frames}"
            )
        poses = torch.tensor(track[frames], dtype=torch.float64, device=self.device)
        intrinsics = torch.tensor(self.room.intrinsics_px(size_hw), dtype=torch.float64)
        step = frames_at_once or (4 if self.device.type == "cpu" else 64)
        owner = torch.cat([self.owner, torch.arange(-1, -7, -1, device=self.device)])
        results = []
        for chunk in poses.split(step):
            depth, hit, rays = self._cast(chunk, intrinsics, size_hw, (0.0, 0.0))
            rgb = None
            if colour and antialias:
                corners = [(-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25)]
                linear = (
                    sum(self._shade(chunk[:, :3, 3], *self._cast(chunk, intrinsics, size_hw, o)) for o in corners) / 4
                )
            elif colour:
                linear = self._shade(chunk[:, :3, 3], depth, hit, rays)
            if colour:
                rgb = self._untile((255 * linear ** (1 / 2.2) + 0.5).to(torch.uint8), size_hw)
            results.append((rgb, self._untile(depth, size_hw), owner[self._untile(hit, size_hw)]))
        rgb = torch.cat([r[0] for r in results]) if colour else poses.new_zeros((0, *size_hw, 3), dtype=torch.uint8)
        return RenderedFrames(rgb, torch.cat([r[1] for r in results]), torch.cat([r[2] for r in results]))


@dataclass(frozen=True)
class Visibility:
    """How large each object appears at 96 x 128.

    Args:
        spread (`np.ndarray` of shape `(objects,)`, int64): Most pixels in one of eight evenly spread frames.
        anywhere (`np.ndarray` of shape `(objects,)`, int64): Most pixels in any frame.
        first, last (`np.ndarray` of shape `(objects,)`, int64): Pixels in the first and in the last frame.

    Source:
        Ours: what has fewer than 50 pixels in each of eight frames is not asked about.
    """

    spread: np.ndarray
    anywhere: np.ndarray
    first: np.ndarray
    last: np.ndarray


VISIBILITY_HW = (96, 128)


def visibility(room: Room, instance: np.ndarray | None = None, device: str | torch.device = "cpu") -> Visibility:
    """Count the pixels of every object.

    Args:
        room (`Room`): The room.
        instance (`np.ndarray` of shape `(F, 96, 128)`, int64, *optional*): All frames' instances where they are known already.
        device (`str` or `torch.device`): Where to compute them otherwise.

    Returns:
        `Visibility`

    Source:
        Ours.
    """
    if instance is None or instance.shape[1:] != VISIBILITY_HW:
        instance = RoomRenderer(room, device).render(VISIBILITY_HW, colour=False).instance.cpu().numpy()
    counts = np.stack([np.bincount(i[i >= 0].ravel(), minlength=len(room.objects)) for i in instance])
    spread = np.linspace(0, len(counts) - 1, 8).round().astype(int)
    return Visibility(counts[spread].max(axis=0), counts.max(axis=0), counts[0], counts[-1])
