"""A scene's geometry as files, pictures and a few numbers.

Shapes: S frames, H W pixels.
"""

import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidllm.commands import Grounding, frames_rgb


if TYPE_CHECKING:
    from transformers.feature_extraction_utils import BatchFeature

    from vidllm import VidLLMProcessor, VidLLMReconstruction
    from vidllm.processing.export_scene import ExportScene, LabelledBox


def labelled_boxes(groundings: Sequence[Grounding]) -> list["LabelledBox"]:
    """Boxes with their descriptions, as exports and pictures take them.

    Args:
        groundings (`Sequence[Grounding]`): What was found; what did not match gets a question mark.

    Returns:
        `list[LabelledBox]`: room frame.

    Source:
        Ours.
    """
    from vidllm.processing.export_scene import LabelledBox

    return [
        LabelledBox(found.description if found.matched else f"? {found.description}", box.box, box.score)
        for found in groundings
        for box in found.boxes
    ]


def plain_scene(
    processor: "VidLLMProcessor",
    inputs: "BatchFeature",
    reconstruction: "VidLLMReconstruction",
    boxes: Sequence["LabelledBox"] = (),
) -> "ExportScene":
    """A reconstruction with its frames as numpy arrays.

    Args:
        processor (`VidLLMProcessor`): That made the inputs.
        inputs (`BatchFeature`): From `read_video`.
        reconstruction (`VidLLMReconstruction`): Of this video.
        boxes (`Sequence[LabelledBox]`): Room frame.

    Returns:
        `ExportScene`.

    Source:
        Ours.
    """
    from vidllm.processing.export import export_scene

    metadata = inputs.video_metadata[0]
    pictures = frames_rgb(processor, inputs).numpy()
    return export_scene(reconstruction, pictures, metadata["frames_indices"], metadata["timestamps_s"], boxes)


def export(
    out_dir: str | Path,
    processor: "VidLLMProcessor",
    inputs: "BatchFeature",
    reconstruction: "VidLLMReconstruction",
    boxes: Sequence["LabelledBox"] = (),
) -> dict[str, Path]:
    """Write every export of one video.

    Args:
        out_dir (`str` or `Path`): Folder.
        processor (`VidLLMProcessor`): That made the inputs.
        inputs (`BatchFeature`): From `read_video`.
        reconstruction (`VidLLMReconstruction`): Of this video.
        boxes (`Sequence[LabelledBox]`): Room frame; drawn into scene and map.

    Returns:
        `dict[str, Path]`: see `export_reconstruction`.

    Raises:
        ImportError: A library of the extra `export` is missing.
        ValueError: A file cannot be written.

    Source:
        Ours.
    """
    from vidllm.processing.export import export_reconstruction

    metadata = inputs.video_metadata[0]
    pictures = frames_rgb(processor, inputs).numpy()
    return export_reconstruction(
        out_dir, reconstruction, pictures, metadata["frames_indices"], metadata["timestamps_s"], boxes
    )


def drawing_paths(target: str | Path) -> tuple[Path, Path]:
    """Where `--draw` writes, checked before a model runs.

    Args:
        target (`str` or `Path`): A `.png` file, or a folder.

    Returns:
        `tuple`: picture of the frames, picture of the map.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The target has another suffix.

    Source:
        Ours.
    """
    if find_spec("matplotlib") is None:
        raise ImportError("drawing needs matplotlib: pip install 'vidllm[export]'")
    target = Path(target).expanduser()
    if target.is_dir() or not target.suffix:
        return target / "boxes.png", target / "map.png"
    if target.suffix.lower() != ".png":
        raise ValueError(f"--draw: wanted a .png file or a folder; got {target}")
    return target, target.with_name(f"{target.stem}_map{target.suffix}")


def draw(paths: tuple[Path, Path], scene: "ExportScene") -> tuple[Path, Path]:
    """Draw the boxes of a scene on its frames and on its map.

    Args:
        paths (`tuple`): From `drawing_paths`.
        scene (`ExportScene`): With its boxes.

    Returns:
        `tuple`: the two files.

    Raises:
        ValueError: A file cannot be written.

    Source:
        Ours.
    """
    from vidllm.processing.export import draw_boxes_on_frames, write_map_png

    return draw_boxes_on_frames(paths[0], scene), write_map_png(paths[1], scene)


def summarise(scene: "ExportScene", inputs: "BatchFeature", scale: float) -> dict[str, Any]:
    """A reconstruction in a few numbers.

    Args:
        scene (`ExportScene`): From `plain_scene`.
        inputs (`BatchFeature`): From `read_video`.
        scale (`float`): Factor by which the relative geometry was multiplied.

    Returns:
        `dict`: `frames` (numbers in the source), `num_source_frames`, `size_hw` (pixels the model saw), `unit`, `scale`, `path_length` (along
        the camera centres), `extent_room` (x, y, z; 2nd to 98th percentile of the points, None without any), `median_depth` (None
        without any), `horizontal_fov_deg` (first frame), `points` (valid pixels).

    Source:
        Ours: percentiles, because single wild points would set the extremes.
    """
    import numpy as np

    centres = scene.world_from_cam[:, :3, 3]
    points, _ = scene.points_and_colours(scene.select_points(max_points=200_000))
    depth = scene.depth[scene.valid_mask]
    extent = np.ptp(np.percentile(points, [2, 98], axis=0), axis=0).tolist() if len(points) else None
    return {
        "frames": scene.frame_indices.tolist(),
        "num_source_frames": inputs.video_metadata[0]["total_num_frames"],
        "size_hw": list(scene.size_hw),
        "unit": scene.unit,
        "scale": scale,
        "path_length": float(np.linalg.norm(np.diff(centres, axis=0), axis=1).sum()),
        "extent_room": extent,
        "median_depth": float(np.median(depth)) if depth.size else None,
        "horizontal_fov_deg": math.degrees(2 * math.atan(scene.size_hw[1] / 2 / float(scene.intrinsics_px[0, 0, 0]))),
        "points": int(scene.valid_mask.sum()),
    }


def write_json_file(path: Path, document: Any) -> Path:
    """Write one JSON document, whole or not at all.

    Args:
        path (`Path`): File to write.
        document: Numbers, texts, lists and dicts; no NaN.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: The file cannot be written, or a number is not finite.

    Source:
        Ours.
    """
    from vidllm.processing.export_scene import replaced_file

    with replaced_file(path) as partial:
        partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="ascii")
    return path


__all__ = ["draw", "drawing_paths", "export", "labelled_boxes", "plain_scene", "summarise", "write_json_file"]
