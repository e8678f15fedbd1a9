"""The shipped model on the shipped clip: answers, boxes, captions and geometry, each beside the truth; no network.

Shapes: S sampled frames.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vidllm import commands
from vidllm.demo_lines import box_lines, length_lines, place_lines, question_lines
from vidllm.demo_truth import (
    CLIP_NAME,
    MODEL_NAME,
    clip_folder,
    is_shipped,
    names_object,
    path_length,
    poses_of,
    read_truth,
    shipped_folder,
)
from vidllm.exporting import labelled_boxes, plain_scene, summarise, write_json_file
from vidllm.loading import check_model, load_model, load_processor, no_progress_bars
from vidllm.modeling_vidllm.geometry_vidllm import box_iou, boxes_annotation_from_room, nearest_heading
from vidllm.processing.benchmarks.prompts import DEFAULT_STYLE, user_turn
from vidllm.train.initialise import is_untrained, untrained_notice


if TYPE_CHECKING:
    from vidllm import VidLLMForConditionalGeneration, VidLLMProcessor, VidLLMScene
    from vidllm.commands import FoundBox
    from vidllm.processing.export_scene import ExportScene

NOT_SHIPPED = "no trained model comes with vidllm yet: this one is made here, from random weights"
# Enough for "in the middle of the room" even where every letter is a token.
MAX_ANSWER_TOKENS = 32
# The looser of the two usual thresholds.
RIGHT_IOU = 0.25
# Seed and number of the room that is filmed where no clip ships.
STAND_IN_ROOM = (5, 7002)


def ask_all(
    model: "VidLLMForConditionalGeneration", processor: "VidLLMProcessor", scene: "VidLLMScene", truth: dict
) -> list[dict[str, Any]]:
    """Ask the questions of the clip, in the words of the training prompts.

    Args:
        model (`VidLLMForConditionalGeneration`): The model.
        processor (`VidLLMProcessor`): Of the model.
        scene (`VidLLMScene`): The encoded clip.
        truth (`dict`): From `read_truth`.

    Returns:
        `list[dict]`: `kind`, `question`, `answer`, `truth` (accepted answers), `right`.

    Source:
        Ours: right is what ScanQA's exact match counts, letter by letter.
    """
    asked, size = truth["questions"], commands.QUESTIONS_PER_BATCH
    results = []
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        chats = [[user_turn(DEFAULT_STYLE, "qa", question=item["question"])] for item in batch]
        replies = commands.answer_batch(model, processor, scene, chats, MAX_ANSWER_TOKENS)
        for item, (answer, _, _) in zip(batch, replies, strict=True):
            asked_what = {"kind": item["kind"], "question": item["question"]}
            results.append(
                {**asked_what, "answer": answer, "truth": item["answers"], "right": answer in item["answers"]}
            )
    return results


def score_box(
    found: Sequence["FoundBox"], true_box: Sequence[float], room_from_world: torch.Tensor, pose: np.ndarray
) -> tuple[list[float] | None, float]:
    """Compare the best box with the true one.

    Args:
        found (`Sequence` of `FoundBox`): Best first; room frame, metres.
        true_box (`Sequence[float]` of length 6): Annotation frame, metres.
        room_from_world (`torch.Tensor` of shape `(3, 3)`): Of the reconstruction.
        pose (`np.ndarray` of shape `(4, 4)`): True `annotation_from_world`.

    Returns:
        `tuple`: the box in the annotation frame (None without any), IoU (0 without any).

    Source:
        Ours: centre carried exactly by the true pose of the first sampled frame, sizes by the nearest quarter turn; nothing is
        corrected.
    """
    if not found:
        return None, 0.0
    box = torch.tensor(found[0].box, dtype=torch.float64).view(1, 1, 6)
    carried = boxes_annotation_from_room(box, torch.from_numpy(pose)[None], room_from_world.double().cpu()[None])
    true = torch.tensor(true_box, dtype=torch.float64).view(1, 1, 6)
    return carried[0, 0].tolist(), float(box_iou(carried, true))


def ground_all(
    model: "VidLLMForConditionalGeneration",
    processor: "VidLLMProcessor",
    scene: "VidLLMScene",
    truth: dict,
    pose: np.ndarray,
) -> tuple[list[commands.Grounding], list[dict[str, Any]]]:
    """Look for what the descriptions of the clip mean.

    Args:
        model (`VidLLMForConditionalGeneration`): The model.
        processor (`VidLLMProcessor`): Of the model.
        scene (`VidLLMScene`): The encoded clip.
        truth (`dict`): From `read_truth`.
        pose (`np.ndarray` of shape `(4, 4)`): True `annotation_from_world`.

    Returns:
        `tuple`: what was found, and for each the document: `Grounding` with `truth`, `truth_box_annotation`, `box_annotation` and
        `iou` (None where the reconstruction is not in metres), `right`.

    Source:
        Ours: each description fits exactly one object, so the best candidate counts even if it does not beat "no target".
    """
    recon = scene.reconstruction
    groundings, results = [], []
    for item in truth["descriptions"]:
        found = commands.ground(model, processor, scene, item["description"])
        box, iou = None, None
        if recon.is_metric:
            box, iou = score_box(found.boxes, item["box_annotation"], recon.room_from_world[0], pose)
        groundings.append(found)
        results.append(
            {
                **asdict(found),
                "truth": _name(item),
                "truth_box_annotation": item["box_annotation"],
                "box_annotation": box,
                "iou": iou,
                "right": iou is not None and iou >= RIGHT_IOU,
            }
        )
    return groundings, results


def caption_all(
    model: "VidLLMForConditionalGeneration",
    processor: "VidLLMProcessor",
    scene: "VidLLMScene",
    truth: dict,
    pose: np.ndarray,
) -> list[dict[str, Any]]:
    """Ask what is at the places of the clip.

    Args:
        model (`VidLLMForConditionalGeneration`): The model.
        processor (`VidLLMProcessor`): Of the model.
        scene (`VidLLMScene`): The encoded clip.
        truth (`dict`): From `read_truth`.
        pose (`np.ndarray` of shape `(4, 4)`): True `annotation_from_world`.

    Returns:
        `list[dict]`: `Caption` with `point_annotation`, `truth`, `references`, `right` (names category and colour of the object).

    Source:
        Ours: the place goes to the model in the world frame, as everything does that is given to it.
    """
    world_from_annotation = np.linalg.inv(pose)
    results = []
    for item in truth["places"]:
        point = world_from_annotation[:3, :3] @ np.array(item["point_annotation"]) + world_from_annotation[:3, 3]
        said = commands.caption(model, processor, scene, point.tolist(), "world")
        results.append(
            {
                **asdict(said),
                "point_annotation": item["point_annotation"],
                "truth": _name(item),
                "references": item["references"],
                "right": names_object(said.caption, item["category"], item["colour"]),
            }
        )
    return results


def _name(item: dict[str, Any]) -> str:
    """An object in words: `red chair`."""
    return f"{item['colour']} {item['category']}" if item["colour"] else item["category"]


def true_geometry(truth: dict, poses: np.ndarray, room_from_world: torch.Tensor) -> dict[str, Any]:
    """The lengths that a reconstruction of the clip should have.

    Args:
        truth (`dict`): From `read_truth`.
        poses (`np.ndarray` of shape `(S, 4, 4)`): True `annotation_from_cam` of the sampled frames.
        room_from_world (`torch.Tensor` of shape `(3, 3)`): Of the reconstruction, whose axes the sizes are given in.

    Returns:
        `dict`: `path_length_m` over the sampled frames; `seen_size_m` (what all frames of the clip saw, 2nd to 98th percentile of its
        points) and `room_size_m` (wall to wall, floor to ceiling) along x, y, z.

    Source:
        Ours: which wall is x no picture tells, so x and y are swapped where the nearest heading is an odd number of quarter turns.
    """
    turns = int(nearest_heading(room_from_world.double().cpu(), torch.from_numpy(poses[0])))
    order = [1, 0, 2] if turns % 2 else [0, 1, 2]
    return {
        "path_length_m": path_length(poses[:, :3, 3]),
        "seen_size_m": [truth["room"]["seen_size_m"][axis] for axis in order],
        "room_size_m": [truth["room"]["size_m"][axis] for axis in order],
    }


def write_files(out_dir: Path, plain: "ExportScene") -> dict[str, Path]:
    """Write the reconstruction for other programs and for the eye.

    Args:
        out_dir (`Path`): Folder, which exists.
        plain (`ExportScene`): With the boxes that were found.

    Returns:
        `dict[str, Path]`: `points`, `scene`, `depth_picture`, `map_picture`, and `boxes_picture` where there are boxes.

    Raises:
        ImportError: A library of the extra `export` is missing.
        ValueError: A file cannot be written.

    Source:
        Ours.
    """
    from vidllm.processing import export

    paths = {
        "points": export.write_points_ply(out_dir / "points.ply", plain),
        "scene": export.write_scene_glb(out_dir / "scene.glb", plain),
        "depth_picture": export.write_depth_png(out_dir / "depth.png", plain),
        "map_picture": export.write_map_png(out_dir / "map.png", plain),
    }
    if plain.boxes:
        paths["boxes_picture"] = export.draw_boxes_on_frames(out_dir / "boxes.png", plain)
    return paths


def make_stand_in(out_dir: Path) -> Path:
    """An untrained model with a clip, in place of the shipped one.

    Args:
        out_dir (`Path`): Of the demonstration; its folder `model` is made anew.

    Returns:
        `Path`: a complete Hub folder.

    Raises:
        ValueError: The folder cannot be written.

    Source:
        Ours.
    """
    from vidllm.train.demo_clip import demo_clip
    from vidllm.train.initialise import initialise
    from vidllm.train.ship import ship

    folder = out_dir / "model"
    if folder.is_dir() and is_untrained(folder):
        shutil.rmtree(folder)
    with no_progress_bars(), tempfile.TemporaryDirectory() as made:
        initialise(MODEL_NAME, Path(made) / "model")
        ship(Path(made) / "model", folder, demo_clip(*STAND_IN_ROOM))
    return folder


def run_demo(
    out_dir: str | Path,
    show: Callable[[str], None] = lambda line: None,
    model: str | Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Ask, ground, caption and reconstruct the shipped clip, and say what is right.

    Args:
        out_dir (`str` or `Path`): Gets `points.ply`, `scene.glb`, `depth.png`, `map.png`, `boxes.png` and `answers.json`.
        show (callable): Is given each line of text as soon as it is known.
        model (`str` or `Path`, *optional*): Checkpoint folder or Hub id; if not given the shipped model, or where none ships an untrained one.
        device (`str`, *optional*): As torch names them; by default the first CUDA device if there is one, else the CPU.

    Returns:
        `dict`: what `answers.json` holds.

    Raises:
        ImportError: A library of the extra `export` is missing.
        ValueError: Parts of the shipped model are missing in this installation, the checkpoint cannot be loaded, or the folder cannot be written.

    Source:
        Ours.
    """
    from vidllm.processing.export import check_export

    start = time.perf_counter()
    if model is None and not is_shipped():
        out_dir = check_export(out_dir)
        show(NOT_SHIPPED)
        model = make_stand_in(out_dir)
    name = str(shipped_folder()) if model is None else check_model(model)
    source = clip_folder(model)
    truth = read_truth(source)
    out_dir = check_export(out_dir)
    notice = untrained_notice(name)
    if notice is not None:
        show(notice)
    loaded, processor = load_model(name, device), load_processor(name)
    inputs = commands.read_video(processor, str(source / CLIP_NAME))
    frames = list(inputs.video_metadata[0]["frames_indices"])
    poses = poses_of(truth, frames)
    room = truth["room"]
    # Of another model's training nothing is known here.
    who, what = (MODEL_NAME, "a room that training did not see") if model is None else (name, "a room")
    show(
        f"{who} on {CLIP_NAME}: {what} ({room['difficulty']}, seed {room['seed']}, number {room['number']}); "
        f"{len(frames)} of {truth['clip']['num_frames']} frames"
    )
    scene = commands.encode(loaded, inputs)
    recon = scene.reconstruction

    def show_part(title: str, lines: Sequence[str]) -> None:
        for line in ("", title, *lines):
            show(line)

    answers = ask_all(loaded, processor, scene, truth)
    show_part("Questions", question_lines(answers))
    groundings, grounded = ground_all(loaded, processor, scene, truth, poses[0])
    show_part(
        f"Boxes (centre, size; metres, z up, walls along x and y; right from IoU {RIGHT_IOU})", box_lines(grounded)
    )
    captions = caption_all(loaded, processor, scene, truth, poses[0])
    show_part("Places (right if category and colour are named)", place_lines(captions))
    plain = plain_scene(processor, inputs, recon, labelled_boxes(groundings))
    summary = summarise(plain, inputs, float(recon.scale[0]))
    lengths = true_geometry(truth, poses, recon.room_from_world[0])
    show_part("Reconstruction (x, y, z)", length_lines(summary, lengths))
    files = write_files(out_dir, plain)
    parts = {"questions": answers, "boxes": grounded, "places": captions}
    right = {part: [sum(item["right"] for item in items), len(items)] for part, items in parts.items()}
    right["all"] = [sum(pair[place] for pair in right.values()) for place in (0, 1)]
    document = {
        "model": name,
        "untrained": notice is not None,
        "video": str(source / CLIP_NAME),
        "frames": frames,
        "geometry": "predicted",
        "unit": recon.unit,
        "answers": answers,
        "groundings": grounded,
        "captions": captions,
        "reconstruction": {**summary, "truth": lengths},
        "right": right,
        "files": {part: str(path) for part, path in files.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }
    files["answers"] = write_json_file(out_dir / "answers.json", document)
    show_part(
        f"{right['all'][0]} of {right['all'][1]} right: "
        + ", ".join(f"{right[part][0]} of {right[part][1]} {part}" for part in parts)
        + f"; {document['seconds']} s",
        [f"wrote {', '.join(path.name for path in files.values())} into {out_dir}", f"clip  {source / CLIP_NAME}"],
    )
    return document


__all__ = ["run_demo"]
