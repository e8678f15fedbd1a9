"""Pictures of a reconstruction: depth montage, map from above, boxes drawn on the frames.

Shapes: S frames, H W pixels, M boxes, E line segments.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidllm.processing.export_meshes import BOX_EDGES, box_colours, corners_of_box, time_colours
from vidllm.processing.export_scene import ExportScene, LabelledBox, check_boxes, replaced_file


TEXT_PT = 9
PAPER = "#fbfaf7"
INK = "#222222"


def new_figure(width_in: float, height_in: float) -> Any:
    """A matplotlib figure on the Agg canvas; pyplot's global state and the user's backend stay untouched.

    Args:
        width_in (`float`): Inches.
        height_in (`float`): Inches.

    Returns:
        `matplotlib.figure.Figure`: empty.

    Raises:
        ImportError: matplotlib is missing.

    Source:
        Ours.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing pictures needs matplotlib: pip install 'vidllm[export]'") from error
    figure = Figure(figsize=(width_in, height_in), dpi=120, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure as PNG in one step.

    Args:
        figure (`matplotlib.figure.Figure`): The figure.
        path (`str` or `Path`): File to write.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: The file cannot be written.

    Source:
        Ours.
    """
    with replaced_file(path) as partial:
        figure.savefig(partial, format="png", facecolor=PAPER)
    return Path(path)


def spread(count: int, most: int) -> list[int]:
    """Evenly spread numbers, first and last included.

    Args:
        count (`int`): How many there are, at least 1.
        most (`int`): How many to take at most, at least 1.

    Returns:
        `list[int]`: rising, without repeats.

    Source:
        Ours.
    """
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def place_labels(
    anchors: np.ndarray, sizes: np.ndarray, bounds: tuple[float, float, float, float], gap: float = 4.0
) -> np.ndarray:
    """Put labels near their anchors so that they cover each other as little as possible.

    Args:
        anchors (`np.ndarray` of shape `(n, 2)`): Points that the labels name, pixels.
        sizes (`np.ndarray` of shape `(n, 2)`): Width and height of each label, pixels.
        bounds (`tuple` of `float`): x0, y0, x1, y1 that the labels must not leave.
        gap (`float`): Least distance between two labels, pixels.

    Returns:
        `np.ndarray` of shape `(n, 2)`: centres of the labels, pixels.

    Source:
        Ours: greedy, nearest free place on rings of growing radius; same input, same places.
    """
    low, high = np.array(bounds[:2], float), np.array(bounds[2:], float)
    centres = np.zeros((len(anchors), 2))
    steps = [(0.0, 0.0)]
    for ring in range(1, 9):
        turn = 2 * np.pi * (np.arange(12) + 3) / 12
        steps += [(ring * np.cos(a), ring * np.sin(a)) for a in turn]
    for n, (anchor, size) in enumerate(zip(anchors, sizes, strict=True)):
        half = size / 2
        reach = np.array([0.45 * size[0] + 0.6 * size[1], 1.15 * size[1]])
        options = np.clip(anchor + np.array(steps) * reach, low + half, np.maximum(high - half, low + half))
        cost = np.linalg.norm((options - anchor) / reach, axis=1)
        for other in range(n):
            apart = np.abs(options - centres[other]) - (half + sizes[other] / 2 + gap)
            cost += np.where((apart < 0).all(axis=1), 100 + 10 * (apart[:, 0] * apart[:, 1]) / size.prod(), 0.0)
        centres[n] = options[cost.argmin()]
    return centres


def _draw_labels(axes: Any, anchors: np.ndarray, texts: list[str], colours: np.ndarray) -> None:
    """Text on white plates beside points in data coordinates, with a thin line where a label had to move away."""
    if not texts:
        return
    renderer = axes.figure.canvas.get_renderer()
    plate = {"boxstyle": "round,pad=0.25", "facecolor": "white", "alpha": 0.88, "linewidth": 1.0}
    drawn = [
        axes.text(
            0,
            0,
            text,
            fontsize=TEXT_PT,
            color=INK,
            ha="center",
            va="center",
            zorder=30,
            parse_math=False,
            bbox=plate | {"edgecolor": colour / 255},
        )
        for text, colour in zip(texts, colours, strict=True)
    ]
    pad = 0.5 * TEXT_PT * axes.figure.dpi / 72
    sizes = np.array([item.get_window_extent(renderer).size for item in drawn]) + pad
    pixels = axes.transData.transform(anchors)
    centres = place_labels(pixels, sizes, tuple(axes.get_window_extent(renderer).extents))
    back = axes.transData.inverted()
    for item, pixel, centre, size, anchor, colour in zip(drawn, pixels, centres, sizes, anchors, colours, strict=True):
        place = back.transform(centre)
        item.set_position(place)
        if (np.abs(centre - pixel) > size / 2).any():
            axes.plot(
                *zip(anchor, place, strict=True),
                color=colour / 255,
                linewidth=0.8,
                zorder=29,
                scalex=False,
                scaley=False,
            )


def box_text(box: LabelledBox) -> str:
    """What a picture writes beside a box.

    Args:
        box (`LabelledBox`): The box.

    Returns:
        `str`: label, cut at 28 letters, and score where there is one.

    Source:
        Ours.
    """
    label = box.label if len(box.label) <= 28 else box.label[:27] + "..."
    return label if box.score is None else f"{label} {box.score:.2f}"


def _frame_title(scene: ExportScene, frame: int) -> str:
    """Source frame number, and seconds since the first sampled frame (file names may hold the time of day)."""
    number = f"frame {scene.frame_indices[frame]}"
    if scene.timestamps_s is None:
        return number
    return f"{number}, {scene.timestamps_s[frame] - scene.timestamps_s[0]:.1f} s"


def _panel_grid(count: int, size_hw: tuple[int, int], most_columns: int) -> tuple[int, int, float, float]:
    """Columns, rows, width and height of one panel in inches; small frames are shown enlarged."""
    columns = min(count, most_columns)
    height, width = size_hw
    panel_width = 3.4 if width >= height else 2.4
    return columns, -(-count // columns), panel_width, panel_width * height / width


def write_depth_png(path: str | Path, scene: ExportScene, max_frames: int = 8) -> Path:
    """Frames over their coloured depth, with one colour bar.

    Args:
        path (`str` or `Path`): File to write.
        scene (`ExportScene`): The reconstruction.
        max_frames (`int`): Most frames, evenly spread.

    Returns:
        `Path`: the file.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The file cannot be written.

    Source:
        Ours: the colours reach from the 2nd to the 98th percentile of all shown depths; invalid pixels are grey.
    """
    frames = spread(scene.num_frames, max_frames)
    columns, banks, width, height = _panel_grid(len(frames), scene.size_hw, 4)
    side, top, bar, gap, title = 0.15, 0.15, 1.05, 0.06, 0.26
    total_width = 2 * side + columns * (width + gap) + bar
    total_height = 2 * top + banks * (2 * height + gap + title + 0.1)
    figure = new_figure(total_width, total_height)
    valid = np.concatenate([scene.depth[i][scene.valid_mask[i]] for i in frames])
    low, high = np.percentile(valid, [2, 98]) if valid.size else (0.0, 1.0)
    if high - low < 0.05 * high:
        # Flat depth, as of untrained weights: without a wider range the picture would be amplified rounding noise.
        low, high = 0.95 * low, 1.05 * high

    def panel(column: int, top_in: float) -> Any:
        left = (side + column * (width + gap)) / total_width
        axes = figure.add_axes(
            (left, 1 - (top_in + height) / total_height, width / total_width, height / total_height)
        )
        axes.set_axis_off()
        return axes

    shown = None
    for number, frame in enumerate(frames):
        bank, column = divmod(number, columns)
        upper = top + bank * (2 * height + gap + title + 0.1) + title
        axes = panel(column, upper)
        axes.imshow(scene.frames_rgb[frame])
        axes.set_title(_frame_title(scene, frame), fontsize=TEXT_PT, color=INK, pad=4)
        axes = panel(column, upper + height + gap)
        masked = np.ma.masked_where(~scene.valid_mask[frame], scene.depth[frame])
        axes.imshow(np.full((*scene.size_hw, 3), 190, np.uint8))
        shown = axes.imshow(masked, cmap="turbo_r", vmin=low, vmax=high, interpolation="nearest")
    bar_axes = figure.add_axes(
        (1 - (bar - 0.12) / total_width, 0.12 if banks == 1 else 0.2, 0.17 / total_width, 0.72 if banks == 1 else 0.6)
    )
    colour_bar = figure.colorbar(shown, cax=bar_axes)
    colour_bar.formatter.set_useOffset(False)
    colour_bar.set_label(f"depth ({scene.unit})", fontsize=TEXT_PT + 1, color=INK)
    colour_bar.ax.tick_params(labelsize=TEXT_PT, colors=INK)
    colour_bar.outline.set_visible(False)
    return save_figure(figure, path)


def _top_view(points: np.ndarray, colours: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Picture (rows, columns, 4) uint8 of the highest point in each cell, first row at the smallest y; empty cells clear."""
    inside = ((points[:, :2] >= low) & (points[:, :2] <= high)).all(axis=1)
    points, colours = points[inside], colours[inside]
    # About one point per cell: sparse clouds get coarse cells, not dust.
    cells = int(np.clip(np.sqrt(len(points)), 60, 700))
    edge = (high - low).max() / cells
    columns, rows = np.maximum(np.ceil((high - low) / edge), 1).astype(int)
    picture = np.zeros((rows, columns, 4), np.uint8)
    order = np.argsort(points[:, 2], kind="stable")
    column, row = np.minimum(((points[order, :2] - low) / edge).astype(int), (columns - 1, rows - 1)).T
    picture[row, column, :3], picture[row, column, 3] = colours[order], 255
    # Single holes between points take the colour of a neighbour.
    for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
        moved = np.roll(picture, shift, axis=axis)
        empty = picture[..., 3] == 0
        picture[empty] = moved[empty]
    return picture


def _below_ceiling(points: np.ndarray, cameras_z: np.ndarray) -> np.ndarray:
    """Mask (n,) of points that a view from above should show: a ceiling would hide the room."""
    if not len(points):
        return np.zeros(0, bool)
    floor_z = np.percentile(points[:, 2], 2)
    head_room = 0.35 * max(np.median(cameras_z) - floor_z, 0.0)
    below = points[:, 2] <= cameras_z.max() + head_room
    # Reconstructions that lie mostly above the camera (untrained weights, a tilted room) are shown whole.
    return below if below.mean() > 0.3 else np.ones(len(points), bool)


def _round_length(length: float) -> float:
    """Largest of 1, 2, 5 times a power of ten that is not above `length`."""
    power = 10.0 ** np.floor(np.log10(length))
    return float(power * max(step for step in (1, 2, 5) if step * power <= length * (1 + 1e-9)))


def _scale_bar(axes: Any, low: np.ndarray, high: np.ndarray, unit: str) -> None:
    """A bar of round length in the lower left corner, on a plate of its own."""
    extent = (high - low).max()
    length = _round_length(0.25 * extent)
    start = low + 0.035 * extent
    tick = 0.008 * extent
    x, y = [start[0], start[0] + length], [start[1], start[1]]
    for colour, thick, order in (("white", 5.5, 40), (INK, 2.5, 41)):
        axes.plot(x, y, color=colour, linewidth=thick, zorder=order, solid_capstyle="butt")
        for end in x:
            axes.plot([end, end], [y[0] - tick, y[0] + tick], color=colour, linewidth=thick - 1, zorder=order)
    text = f"{length:g} m" if unit == "m" else f"{length:g} (relative)"
    plate = {"boxstyle": "round,pad=0.2", "facecolor": "white", "alpha": 0.85, "linewidth": 0}
    axes.text(
        np.mean(x),
        y[0] + 2.2 * tick,
        text,
        ha="center",
        va="bottom",
        fontsize=TEXT_PT + 1,
        color=INK,
        zorder=42,
        bbox=plate,
    )


def _map_extent(points: np.ndarray, scene: ExportScene) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner (2,) of what the map shows: most points, every camera, every box, a margin."""
    parts = [scene.room_from_cam[:, :2, 3]]
    if len(points):
        parts.append(np.percentile(points[:, :2], [1, 99], axis=0))
    parts += [corners_of_box(box.box_room)[:, :2] for box in scene.boxes]
    every = np.concatenate(parts)
    low, high = every.min(axis=0), every.max(axis=0)
    span = (high - low).max() or 1.0
    # A narrow strip would make an unreadable picture.
    missing = np.maximum(0.45 * span - (high - low), 0) / 2
    # The lower margin holds the scale bar.
    return low - missing - np.array([0.08, 0.14]) * span, high + missing + 0.08 * span


def _draw_cameras(axes: Any, scene: ExportScene, extent: float) -> None:
    """Path from first to last frame, wedges of view, start marker."""
    from matplotlib.patches import Polygon

    poses = scene.room_from_cam
    centres, colours = poses[:, :2, 3], time_colours(scene.num_frames) / 255
    for number in range(scene.num_frames - 1):
        ends = centres[number : number + 2].T
        axes.plot(*ends, color="white", linewidth=4.0, zorder=9, solid_capstyle="round")
        axes.plot(*ends, color=colours[number], linewidth=2.2, zorder=10, solid_capstyle="round")
    width = scene.size_hw[1]
    for frame in spread(scene.num_frames, 12):
        focal, middle = scene.intrinsics_px[frame, 0, 0], scene.intrinsics_px[frame, 0, 2]
        sides = np.array([[(-0.5 - middle) / focal, 0, 1.0], [(width - 0.5 - middle) / focal, 0, 1.0]])
        # Seen from above; a camera that looks straight down has no heading and gets a short wedge.
        flat = (sides @ poses[frame, :3, :3].T)[:, :2]
        tips = centres[frame] + 0.065 * extent * flat / max(np.linalg.norm(flat.mean(axis=0)), 0.3)
        wedge = Polygon(
            [centres[frame], *tips], facecolor=colours[frame], edgecolor=colours[frame], alpha=0.42, zorder=11
        )
        axes.add_patch(wedge)
    axes.plot(*centres[0], "o", markersize=10, color="white", markeredgecolor=INK, markeredgewidth=1.8, zorder=12)


def write_map_png(path: str | Path, scene: ExportScene, keep_fraction: float = 0.8) -> Path:
    """The room from above: points, camera path with start and viewing wedges, labelled boxes, scale bar.

    Args:
        path (`str` or `Path`): File to write.
        scene (`ExportScene`): The reconstruction with its boxes.
        keep_fraction (`float`): Share of valid pixels to show, surest first.

    Returns:
        `Path`: the file.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The file cannot be written.

    Source:
        Ours: room frame, x to the right, y up the page; what hangs well above the cameras (a ceiling) is left out.
    """
    from matplotlib.patches import Rectangle

    points, colours = scene.points_and_colours(scene.select_points(keep_fraction, 1_000_000))
    shown = _below_ceiling(points, scene.room_from_cam[:, 2, 3])
    points, colours = points[shown], colours[shown]
    low, high = _map_extent(points, scene)
    extent = float((high - low).max())
    inches = 8.0 * (high - low) / extent
    figure = new_figure(inches[0] + 0.3, inches[1] + 0.55)
    total = figure.get_size_inches()
    axes = figure.add_axes((0.15 / total[0], 0.15 / total[1], inches[0] / total[0], inches[1] / total[1]))
    axes.set(
        xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[], facecolor="#e9e7e1", autoscale_on=False
    )
    for spine in axes.spines.values():
        spine.set_color("#c9c5bb")
    picture = _top_view(points, colours, low, high)
    reach = low + (high - low).max() / max(picture.shape[:2]) * np.array(picture.shape[1::-1])
    axes.imshow(
        picture, origin="lower", extent=(low[0], reach[0], low[1], reach[1]), aspect="auto", interpolation="nearest"
    )
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    _draw_cameras(axes, scene, extent)
    tints = box_colours(scene.boxes)
    for box, tint in zip(scene.boxes, tints, strict=True):
        x, y, _, dx, dy, _ = box.box_room
        for colour, thick, order in (("white", 4.0, 19), (tint / 255, 2.0, 20)):
            axes.add_patch(
                Rectangle(
                    (x - dx / 2, y - dy / 2), dx, dy, fill=False, edgecolor=colour, linewidth=thick, zorder=order
                )
            )
    anchors = [box.box_room[:2] for box in scene.boxes] + [scene.room_from_cam[0, :2, 3] - (0, 0.03 * extent)]
    texts = [box_text(box) for box in scene.boxes] + ["start"]
    _draw_labels(axes, np.array(anchors), texts, np.concatenate([tints, [[40, 40, 40]]]))
    _scale_bar(axes, low, high, scene.unit)
    words = "metres" if scene.unit == "m" else "relative units, not metres"
    axes.set_title(f"top view, room frame (z up), {words}", fontsize=TEXT_PT + 1, color=INK, pad=6)
    return save_figure(figure, path)


def clip_segments_near(segments_cam: np.ndarray, near: float) -> np.ndarray:
    """Cut line segments at a plane before the camera.

    Args:
        segments_cam (`np.ndarray` of shape `(E, 2, 3)`): Ends in a camera's frame, z forward.
        near (`float`): Depth of the plane, positive.

    Returns:
        `np.ndarray` of shape `(K, 2, 3)`: the parts with z >= near; segments wholly behind are dropped.

    Source:
        Ours: a point behind the camera projects to the wrong side of the picture.
    """
    start, end = segments_cam[:, 0], segments_cam[:, 1]
    keep = (start[:, 2] >= near) | (end[:, 2] >= near)
    start, end = start[keep], end[keep]
    step = end[:, 2] - start[:, 2]
    place = np.clip((near - start[:, 2]) / np.where(step == 0, 1.0, step), 0.0, 1.0)[:, None]
    cut = start + place * (end - start)
    return np.stack(
        [np.where(start[:, 2:] >= near, start, cut), np.where(end[:, 2:] >= near, end, cut)],
        axis=1,
    )


def clip_segments_rectangle(segments_px: np.ndarray, low: Sequence[float], high: Sequence[float]) -> np.ndarray:
    """Cut 2D line segments at a rectangle.

    Args:
        segments_px (`np.ndarray` of shape `(E, 2, 2)`): Ends.
        low (`Sequence[float]`): x0, y0.
        high (`Sequence[float]`): x1, y1.

    Returns:
        `np.ndarray` of shape `(K, 2, 2)`: the parts inside; what lies outside is dropped.

    Source:
        Ours: slab clipping.
    """
    start, step = segments_px[:, 0], segments_px[:, 1] - segments_px[:, 0]
    # A direction of 0 gives infinities of the right sign where the start lies outside, and is nudged off 0/0 where inside.
    safe = np.where(np.abs(step) < 1e-12, 1e-12, step)
    first, second = (np.asarray(low) - start) / safe, (np.asarray(high) - start) / safe
    enter = np.clip(np.minimum(first, second).max(axis=1), 0, 1)
    leave = np.clip(np.maximum(first, second).min(axis=1), 0, 1)
    hit = (np.minimum(first, second).max(axis=1) <= 1) & (np.maximum(first, second).min(axis=1) >= 0) & (enter < leave)
    ends = np.stack([start + enter[:, None] * step, start + leave[:, None] * step], axis=1)
    return ends[hit]


def box_segments_px(scene: ExportScene, frame: int, box_room: Sequence[float]) -> np.ndarray:
    """The visible edges of a box in one frame.

    Args:
        scene (`ExportScene`): The reconstruction.
        frame (`int`): Which frame.
        box_room (`Sequence[float]` of length 6): Room frame.

    Returns:
        `np.ndarray` of shape `(K, 2, 2)`: ends in pixels, inside the picture; empty where the box is out of sight.

    Source:
        Ours: wireframe, hidden edges included.
    """
    height, width = scene.size_hw
    cam_from_room = np.linalg.inv(scene.room_from_cam[frame])
    corners = corners_of_box(box_room) @ cam_from_room[:3, :3].T + cam_from_room[:3, 3]
    edges = clip_segments_near(corners[BOX_EDGES], near=0.005 * scene.diagonal())
    pixels = edges @ scene.intrinsics_px[frame].astype(float).T
    return clip_segments_rectangle(pixels[..., :2] / pixels[..., 2:], (-0.5, -0.5), (width - 0.5, height - 0.5))


def choose_frames(scene: ExportScene, boxes: tuple[LabelledBox, ...], max_frames: int) -> list[int]:
    """Frames that show the boxes best.

    Args:
        scene (`ExportScene`): The reconstruction.
        boxes (`tuple` of `LabelledBox`): Boxes to see.
        max_frames (`int`): Most frames, at least 1.

    Returns:
        `list[int]`: rising; for each box in turn the frame with the longest visible edges, then evenly spread ones.

    Source:
        Ours.
    """
    chosen: list[int] = []
    for box in boxes:
        segments = [box_segments_px(scene, frame, box.box_room) for frame in range(scene.num_frames)]
        length = [np.linalg.norm(part[:, 1] - part[:, 0], axis=1).sum() for part in segments]
        if max(length) > 0 and int(np.argmax(length)) not in chosen:
            chosen.append(int(np.argmax(length)))
    chosen = chosen[:max_frames]
    for frame in spread(scene.num_frames, max_frames):
        if len(chosen) < max_frames and frame not in chosen:
            chosen.append(frame)
    return sorted(chosen)


def draw_boxes_on_frames(
    path: str | Path, scene: ExportScene, boxes: Sequence | None = None, max_frames: int = 6
) -> Path:
    """Wireframe boxes with labels on the frames that show them best.

    Args:
        path (`str` or `Path`): File to write.
        scene (`ExportScene`): The reconstruction.
        boxes (`Sequence` of `LabelledBox`, *optional*): Boxes in the room frame; those of the scene if not given.
        max_frames (`int`): Most frames.

    Returns:
        `Path`: the file.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: A box is malformed, or the file cannot be written.

    Source:
        Ours.
    """
    boxes = scene.boxes if boxes is None else check_boxes(boxes)
    frames = choose_frames(scene, boxes, max_frames)
    columns, rows, width, height = _panel_grid(len(frames), scene.size_hw, 3 if len(frames) != 4 else 2)
    # Labels need room: frames are drawn larger than in the depth montage.
    width, height, gap, title = 1.4 * width, 1.4 * height, 0.1, 0.28
    total = (columns * (width + gap) + gap, rows * (height + gap + title) + gap)
    figure = new_figure(*total)
    tints = box_colours(boxes)
    for number, frame in enumerate(frames):
        row, column = divmod(number, columns)
        left, upper = gap + column * (width + gap), gap + title + row * (height + gap + title)
        axes = figure.add_axes((left / total[0], 1 - (upper + height) / total[1], width / total[0], height / total[1]))
        axes.imshow(scene.frames_rgb[frame], interpolation="bilinear")
        axes.set_axis_off()
        axes.set(autoscale_on=False)
        axes.set_title(_frame_title(scene, frame), fontsize=TEXT_PT, color=INK, pad=4)
        anchors, texts, colours = [], [], []
        for box, tint in zip(boxes, tints, strict=True):
            segments = box_segments_px(scene, frame, box.box_room)
            if not len(segments):
                continue
            for colour, thick, order in (("white", 3.6, 5), (tint / 255, 1.9, 6)):
                for segment in segments:
                    axes.plot(*segment.T, color=colour, linewidth=thick, zorder=order, solid_capstyle="round")
            ends = segments.reshape(-1, 2)
            anchors.append((ends[:, 0].mean(), ends[:, 1].min()))
            texts.append(box_text(box))
            colours.append(tint)
        _draw_labels(axes, np.array(anchors), texts, np.array(colours))
    return save_figure(figure, path)
