"""The reconstruction in a report: curves of how much is how exact, and of the best and the worst scene a depth map and the way of the camera. Pillow, no tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vidllm.eval.reconstruction import POSE_PROTOCOL
from vidllm.eval.reconstruction_views import ANGLES_DEG, DEPTH_ERRORS, depth_of_text, mean_curves
from vidllm.eval.report_pictures import FOUND_COLOUR, TRUE_COLOUR, data_uri


# A curve's picture: inner width and height, and room for its labels, in units of the drawing.
_WIDTH, _HEIGHT, _LEFT, _TOP = 260, 160, 44, 10
# Dark to bright: near to far. What is not known is grey.
_COLOURS = np.array([(48, 18, 59), (65, 105, 225), (26, 190, 190), (120, 220, 80), (240, 200, 50), (180, 20, 20)], dtype=np.float64)  # fmt: skip
_UNKNOWN = (200, 200, 200)
_DEPTH_WIDTH_PX, _MAP_PX = 260, 260
_WHAT = {
    "pairs": ("Camera poses: share of pairs of frames by angle", "degrees", ANGLES_DEG, 5),
    "depth": ("Depth without alignment: share of pixels by error", "of the true depth", DEPTH_ERRORS, 4),
}


@dataclass(frozen=True)
class Curve:
    """Shares by how near is enough, of the model and of the constant reconstruction.

    Args:
        title (`str`): What is counted.
        unit (`str`): Of the limits.
        lines (`tuple[tuple[str, str, str], ...]`): Name, colour and points of each, as SVG takes them.
        ticks (`tuple[tuple[float, str], ...]`): Places and texts below.
        table (`tuple[tuple[str, ...], ...]`): Limit and one share per line, every few limits.

    Source:
        Ours.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str, str], ...]
    ticks: tuple[tuple[float, str], ...]
    table: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class SceneView:
    """A scene with its pictures.

    Args:
        title (`str`): Best or worst.
        scene (`str`): The scene.
        scores (`str`): Its scores.
        pictures (`tuple[tuple[str, str], ...]`): What each shows, and the picture as it stands in a page.

    Source:
        Ours.
    """

    title: str
    scene: str
    scores: str
    pictures: tuple[tuple[str, str], ...]


def curves_of(records: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Curves of a run, each the mean of its scenes'.

    Args:
        records (`Sequence[Mapping]`): One per scene.

    Returns:
        `list[Curve]`: none of records that were written without them.

    Source:
        Ours.
    """
    known = [record["curves"] for record in records if "curves" in record]
    means = {name: mean_curves([curves[name] for curves in known]) for name in ("model", "constant")}
    found = []
    for what, (title, unit, limits, step) in _WHAT.items():
        shares = {name: curves[what] for name, curves in means.items() if what in curves}
        if not shares:
            continue
        colours = {"model": _css(FOUND_COLOUR), "constant": "#889"}
        lines = tuple((name, colours[name], _points(limits, values)) for name, values in shares.items())
        chosen = range(step - 1, len(limits), step)
        ticks = tuple((_across(limits[n], limits), f"{limits[n]:g}") for n in chosen)
        table = tuple((f"{limits[n]:g}", *(f"{values[n]:.3f}" for values in shares.values())) for n in chosen)
        found.append(Curve(title, unit, lines, ticks, table))
    return found


def _across(limit: float, limits: Sequence[float]) -> float:
    return round(_LEFT + _WIDTH * limit / limits[-1], 1)


def _points(limits: Sequence[float], shares: Sequence[float]) -> str:
    """Points of a line, the share 1 above."""
    return " ".join(
        f"{_across(limit, limits):g},{_TOP + _HEIGHT * (1 - share):.1f}"
        for limit, share in zip(limits, shares, strict=True)
    )


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def views_of(records: Sequence[Mapping[str, Any]]) -> list[SceneView]:
    """The scene with the best poses and that with the worst.

    Args:
        records (`Sequence[Mapping]`): One per scene.

    Returns:
        `list[SceneView]`: one of a run of one scene; none of records that were written without what is drawn.

    Source:
        Ours: by `auc_30`; of equals the first.
    """
    known = [record for record in records if "view" in record]
    if not known:
        return []
    order = sorted(known, key=lambda record: -record["scores"][POSE_PROTOCOL].get("auc_30", 0.0))
    chosen = (
        [("best poses", order[0]), ("worst poses", order[-1])] if len(order) > 1 else [("the one scene", order[0])]
    )
    return [_view(title, record) for title, record in chosen]


def _view(title: str, record: Mapping[str, Any]) -> SceneView:
    """One scene's numbers and pictures."""
    poses, metric = record["scores"][POSE_PROTOCOL], record["scores"].get("metric", {})
    numbers = {"auc_30": poses.get("auc_30"), **{name: metric.get(name) for name in ("abs_rel", "fscore_5cm")}}
    scores = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items() if value is not None)
    view, pictures = record["view"], []
    if "depth_true" in view:
        true, predicted = depth_of_text(view["depth_true"]), depth_of_text(view["depth_predicted"])
        known = true[true > 0]
        # Both in the colours of the true depth, so that they can be compared.
        limits = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        shown = f"{limits[0]:.1f} to {limits[1]:.1f} m"
        pictures.append((f"true depth, {shown}", data_uri(depth_picture(true, limits))))
        pictures.append(("predicted depth, same colours", data_uri(depth_picture(predicted, limits))))
    paths = path_picture(view["path_true"], view["path_predicted"])
    pictures.append(("way of the camera from above", data_uri(paths)))
    return SceneView(title, str(record["id"]), scores, tuple(pictures))


def depth_picture(depth_m: np.ndarray, limits_m: tuple[float, float]) -> Image.Image:
    """A depth map in colours.

    Args:
        depth_m (`np.ndarray` of shape `(h, w)`): Metres, 0 = invalid, which is grey.
        limits_m (`tuple[float, float]`): Distances of the first and of the last colour; beyond them their colours.

    Returns:
        `PIL.Image.Image`

    Source:
        Ours.
    """
    low, high = limits_m
    share = np.clip((depth_m - low) / max(high - low, 1e-6), 0, 1) * (len(_COLOURS) - 1)
    steps = np.arange(len(_COLOURS))
    rgb = np.stack([np.interp(share, steps, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
    rgb[depth_m <= 0] = _UNKNOWN
    picture = Image.fromarray(rgb.round().astype(np.uint8))
    height = max(1, round(depth_m.shape[0] * _DEPTH_WIDTH_PX / depth_m.shape[1]))
    return picture.resize((_DEPTH_WIDTH_PX, height), Image.Resampling.NEAREST)


def path_picture(true: Sequence[Sequence[float]], predicted: Sequence[Sequence[float]]) -> Image.Image:
    """Ways of the camera from above.

    Args:
        true (`Sequence`): `[x, y]` of each frame, metres; drawn green.
        predicted (`Sequence`): The same; drawn red.

    Returns:
        `PIL.Image.Image`: a dot where each begins.

    Source:
        Ours.
    """
    ways = [np.asarray(way, dtype=np.float64) for way in (true, predicted)]
    places = np.concatenate(ways)
    low, high = places.min(axis=0), places.max(axis=0)
    extent = max(float((high - low).max()), 0.5) * 1.2
    corner = (low + high) / 2 - extent / 2
    picture = Image.new("RGB", (_MAP_PX, _MAP_PX), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for way, colour in zip(ways, (TRUE_COLOUR, FOUND_COLOUR), strict=True):
        pixels = (way - corner) / extent * _MAP_PX
        line = [(float(x), float(_MAP_PX - y)) for x, y in pixels]
        draw.line(line, fill=colour, width=2)
        for number, (x, y) in enumerate(line):
            radius = 4 if number == 0 else 2
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    # A bar that fits: a metre, or a tenth of one on a small map, or ten on a large one.
    length = next(length for length in (10.0, 1.0, 0.1) if length <= extent / 2)
    draw.line([(8, _MAP_PX - 8), (8 + length / extent * _MAP_PX, _MAP_PX - 8)], fill=(0, 0, 0), width=2)
    draw.text((8, _MAP_PX - 24), f"{length:g} m", fill=(0, 0, 0))
    return picture


__all__ = ["Curve", "SceneView", "curves_of", "depth_picture", "path_picture", "views_of"]
