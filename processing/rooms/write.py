"""A data root of rooms, in the files of ScanNet, ScanQA, SQA3D, ScanRefer and Scan2Cap.

Scene numbers 1000 to 6999 are the train split, 7000 to 9999 the val split; ScanNet's own end at 0806, so that both can share a data
root. Two runs with the same arguments and the same versions of the libraries write the same bytes.
"""

import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .descriptions import Description, tokens
from .formats import FRAME_LAYOUTS, LABEL_FILE, FrameWriter, label_table, write_json, write_scan, write_video
from .furniture import CATEGORIES
from .language import Language, SceneLanguage, compose_split, speak_about
from .layout import SPLIT_NUMBERS, make_room
from .materials import COLOURS, NAMED_PATTERNS
from .mesh import boxes_annotation, build_mesh
from .placing import LEVELS
from .questions import NUMBERS
from .render import RoomRenderer, visibility
from .scene_graph import PLACES, SceneGraph, raw_name
from .situations import sqa3d_pose


# The part of a benchmark that is evaluated has another name in SQA3D.
_SQA3D_SPLITS = {"train": "train", "val": "test"}
_ANSWERS = sorted(
    {*COLOURS, *NAMED_PATTERNS, *NUMBERS, *PLACES, *CATEGORIES, "yes", "no", "left", "right", "front", "behind"}
)


@dataclass(frozen=True)
class _Job:
    """One scene to make."""

    out: Path
    seed: int
    number: int
    difficulty: str
    size_hw: tuple[int, int]
    layouts: tuple[str, ...]
    video: bool
    antialias: bool
    device: str


def _rounded(values: np.ndarray) -> list:
    """Numbers for a JSON file, nine decimals."""
    return np.round(np.asarray(values, np.float64), 9).tolist()


def _make_scene(job: _Job) -> tuple[SceneLanguage, dict, list[tuple[dict, dict]]]:
    """Write one scene's files; returns what can be said about it, its truth, and SQA3D's poses of its situations."""
    threads = torch.get_num_threads()
    if job.device == "cpu":
        # The arrays are small: one thread per process is faster than two that wait for each other.
        torch.set_num_threads(1)
    try:
        room = make_room(job.seed, job.number, job.difficulty)
        scene, frames = room.scene_id, RoomRenderer(room, job.device).render(job.size_hw, antialias=job.antialias)
        rgb, depth_m, instance = (tensor.cpu().numpy() for tensor in (frames.rgb, frames.depth_m, frames.instance))
        seen = visibility(room, instance, job.device)
    finally:
        torch.set_num_threads(threads)
    mesh = build_mesh(room)
    annotation_from_scene = np.round(np.linalg.inv(room.scene_from_annotation), 6)
    intrinsics = room.intrinsics_px(job.size_hw)
    scene_from_cam = room.scene_from_annotation @ room.track.annotation_from_cam
    # Frames of an earlier run, perhaps more of them, must not stay among the new ones.
    for place in (f"posed_images/{scene}", f"scans/{scene}", f"frames_square/{scene}", f"images/{scene}", scene):
        shutil.rmtree(job.out / place, ignore_errors=True)
    write_scan(job.out / "scans" / scene, scene, mesh, annotation_from_scene, intrinsics, job.size_hw, len(rgb))
    writer = FrameWriter(job.out, scene, rgb, depth_m, scene_from_cam, intrinsics, annotation_from_scene)
    for layout in job.layouts:
        writer.write(layout)
    if job.video:
        write_video(job.out / "videos" / f"{scene}.mp4", rgb)
    graph = SceneGraph(room, seen)
    language = speak_about(graph)
    boxes = boxes_annotation(room, mesh)
    truth = {
        "scene_id": scene,
        "number": room.number,
        "difficulty": room.difficulty,
        "room_low_annotation": _rounded(room.low),
        "room_high_annotation": _rounded(room.high),
        "floor": room.floor_name,
        "annotation_from_scene": _rounded(annotation_from_scene),
        "scene_from_cam": _rounded(scene_from_cam),
        "intrinsics_px": _rounded(intrinsics),
        "sweep_deg": round(room.track.sweep_deg, 6),
        "objects": [
            {
                "object_id": thing.object_id,
                "category": thing.category,
                "colour": thing.colour,
                "pattern": thing.pattern,
                "kind": thing.kind,
                "on": thing.on,
                "under": thing.under,
                "box_annotation": _rounded(boxes[thing.object_id]),
                "pixels": int(seen.spread[thing.object_id]),
                "seen": graph.is_seen(thing),
            }
            for thing in room.objects
        ],
    }
    return (
        language,
        truth,
        [sqa3d_pose(situation, mesh, room.scene_from_annotation) for situation in language.situations],
    )


def _all_scenes(jobs: Sequence[_Job], num_workers: int) -> Iterator[tuple]:
    """Scenes in the order of their numbers, made here or by other processes."""
    if num_workers <= 1:
        yield from map(_make_scene, jobs)
        return
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_make_scene, jobs)


def _names(truths: dict[str, dict], scene: str, object_ids: Sequence[int]) -> list[str]:
    """ScanQA's `object_names`; ids past the objects are the room's shell, of which only the floor is ever meant."""
    objects = truths[scene]["objects"]
    return [raw_name(objects[i]["category"]) if i < len(objects) else "floor" for i in object_ids]


def _write_scanqa(folder: Path, split: str, language: Language, truths: dict[str, dict]) -> None:
    """`ScanQA_v1.0_{split}.json`."""
    rows, numbers = [], Counter()
    for question in language.questions:
        rows.append(
            {
                "scene_id": question.scene,
                "question_id": f"{split}-{question.scene.removesuffix('_00')}-{numbers[question.scene]}",
                "question": question.text,
                "answers": list(question.answers),
                "object_ids": list(question.object_ids),
                "object_names": _names(truths, question.scene, question.object_ids),
            }
        )
        numbers[question.scene] += 1
    write_json(folder / f"ScanQA_v1.0_{split}.json", rows)


def _write_sqa3d(folder: Path, split: str, language: Language, poses: dict[str, list[tuple[dict, dict]]]) -> None:
    """`v1_balanced_questions_*` and `v1_balanced_sqa_annotations_*`, and the table of answers."""
    head = {
        "info": {"description": "Procedural rooms in the format of SQA3D v1.0.", "version": "1.0"},
        "license": {"name": "Apache-2.0"},
        "data_type": "scannet",
        "data_subtype": "v2",
    }
    questions, annotations, numbers = [], [], Counter()
    for question in language.situated:
        scene, index = question.scene, question.details["situation"]
        # Unique over all scenes: the scene's number, then the question's.
        question_id = 230_000_000_000 + int(scene[5:9]) * 1000 + numbers[scene]
        numbers[scene] += 1
        situation = language.situations[scene][index]
        position, rotation = poses[scene][index]
        questions.append(
            {
                "scene_id": scene,
                "situation": situation.texts[0],
                "alternative_situation": list(situation.texts[1:]),
                "question": question.text,
                "question_id": question_id,
            }
        )
        annotations.append(
            {
                "scene_id": scene,
                "question_type": "N/A",
                "answer_type": "other",
                "question_id": question_id,
                "answers": [{"answer": question.answers[0], "answer_confidence": "yes", "answer_id": 1}],
                "rotation": rotation,
                "position": position,
            }
        )
    name = _SQA3D_SPLITS[split]
    body = {**head, "task_type": "Situated question answering", "questions": questions}
    write_json(folder / f"v1_balanced_questions_{name}_scannetv2.json", body)
    write_json(folder / f"v1_balanced_sqa_annotations_{name}_scannetv2.json", {**head, "annotations": annotations})
    classes = {answer: index for index, answer in enumerate(_ANSWERS)}
    write_json(folder / "answer_dict.json", [classes, {str(index): answer for answer, index in classes.items()}])


def _write_scanrefer(folder: Path, split: str, descriptions: Sequence[Description], scenes: Sequence[str]) -> None:
    """`ScanRefer_filtered_{split}.json`, its list of scenes, and both splits together."""
    rows = [
        {
            "scene_id": row.scene,
            "object_id": str(row.object_id),
            "object_name": raw_name(row.category),
            "ann_id": str(row.number),
            "description": row.text,
            "token": tokens(row.text),
        }
        for row in descriptions
    ]
    write_json(folder / f"ScanRefer_filtered_{split}.json", rows)
    (folder / f"ScanRefer_filtered_{split}.txt").write_bytes(("\n".join(scenes) + "\n").encode())
    both = [folder / f"ScanRefer_filtered_{name}.json" for name in SPLIT_NUMBERS]
    content = [row for path in both if path.is_file() for row in json.loads(path.read_text(encoding="utf-8"))]
    write_json(folder / "ScanRefer_filtered.json", content)


def write_rooms(
    out: str | Path,
    scenes: int,
    seed: int = 0,
    difficulty: str = "standard",
    split: str = "train",
    size_hw: tuple[int, int] = (96, 128),
    layout: str | Sequence[str] = "posed_images",
    video: bool = True,
    antialias: bool = False,
    num_workers: int = 1,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a split of rooms as a data root.

    `rooms.json` holds the whole truth of the splits written there; a split written again replaces itself, the other one stays.

    Args:
        out (`str` or `Path`): The data root; made if it does not exist.
        scenes (`int`): Rooms to write.
        seed (`int`): Of the data set, at least 0.
        difficulty (`str`): `easy`, `standard` or `hard`.
        split (`str`): `train`, or `val`: what each benchmark evaluates (of SQA3D the test files).
        size_hw (`tuple` of `int`): Height and width of the pictures; even where videos are written.
        layout (`str` or `Sequence` of `str`): One or more of `posed_images`, `sens`, `sens_export`, `frames_square`, `llava3d`,
            `pose_eval`, `images`.
        video (`bool`): Whether to write `videos/<scene>.mp4`.
        antialias (`bool`): Colour from 2 x 2 rays per pixel; about four times slower.
        num_workers (`int`): Processes; the files do not depend on it.
        device (`str`): Where to render.
        progress (`Callable`, *optional*): Called with the scenes done and all scenes.

    Returns:
        `dict`: counts of `scenes`, `frames`, `questions`, `situated_questions` (by kind), `descriptions`, `objects`; `data_root`.

    Raises:
        ValueError: A value is out of range; nothing has been written then.

    Source:
        Ours: ScanNet and what is built on it may not be redistributed; rooms in its formats may.
    """
    layouts = (layout,) if isinstance(layout, str) else tuple(layout)
    if split not in SPLIT_NUMBERS or difficulty not in LEVELS:
        wanted = f"split in {sorted(SPLIT_NUMBERS)} and difficulty in {sorted(LEVELS)}"
        raise ValueError(f"write_rooms: wanted {wanted}; got {split!r} and {difficulty!r}")
    if not 1 <= scenes <= len(SPLIT_NUMBERS[split]) or seed < 0:
        wanted = f"1 to {len(SPLIT_NUMBERS[split])} scenes of {split} and a seed of at least 0"
        raise ValueError(f"write_rooms: wanted {wanted}; got {scenes} and {seed}")
    if not set(layouts) <= set(FRAME_LAYOUTS):
        raise ValueError(f"write_rooms: layout must be among {FRAME_LAYOUTS}; got {layouts}")
    if min(size_hw) < 16 or (video and (size_hw[0] % 2 or size_hw[1] % 2)):
        raise ValueError(
            f"write_rooms: wanted sides of at least 16 pixels, even ones for videos; got {tuple(size_hw)}"
        )
    out = Path(out)
    numbers = SPLIT_NUMBERS[split][:scenes]
    jobs = [
        _Job(out, seed, number, difficulty, tuple(size_hw), layouts, video, antialias, device) for number in numbers
    ]
    spoken, truths, poses = [], {}, {}
    for done, (language, truth, situations) in enumerate(_all_scenes(jobs, num_workers), 1):
        spoken.append(language)
        truths[language.scene], poses[language.scene] = truth, situations
        if progress is not None:
            progress(done, len(jobs))
    language = compose_split(spoken, seed)
    folder = out / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    _write_scanqa(folder, split, language, truths)
    _write_sqa3d(folder, split, language, poses)
    _write_scanrefer(folder, split, language.descriptions, list(truths))
    (out / LABEL_FILE).write_bytes(label_table().encode())
    truth_file = out / "rooms.json"
    known = json.loads(truth_file.read_text(encoding="utf-8")) if truth_file.is_file() else {}
    known[split] = {
        "seed": seed,
        "difficulty": difficulty,
        "size_hw": list(size_hw),
        "scenes": truths,
        # In the order of the annotation files.
        "question_kinds": [question.kind for question in language.questions],
        "situated_kinds": [question.kind for question in language.situated],
        "situated_object_ids": [list(question.object_ids) for question in language.situated],
        "situations": {
            scene: [
                {
                    "position_annotation": _rounded(s.position),
                    "heading_rad": round(s.heading_rad, 9),
                    "object_ids": list(s.anchors),
                }
                for s in situations
            ]
            for scene, situations in language.situations.items()
        },
    }
    write_json(truth_file, {name: known[name] for name in SPLIT_NUMBERS if name in known})
    return {
        "data_root": str(out),
        "scenes": scenes,
        "frames": scenes * LEVELS[difficulty].num_frames,
        "objects": sum(len(truth["objects"]) for truth in truths.values()),
        "questions": dict(Counter(question.kind for question in language.questions)),
        "situated_questions": dict(Counter(question.kind for question in language.situated)),
        "descriptions": len(language.descriptions),
    }


def rooms_command(
    out: str | Path,
    scenes: int,
    seed: int = 0,
    difficulty: str = "standard",
    split: str = "train",
    height: int = 96,
    width: int = 128,
    layout: str = "posed_images",
    antialias: bool = False,
    num_workers: int = 1,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """What the command `vidllm rooms` does.

    Args:
        out (`str` or `Path`): The data root.
        scenes (`int`): Rooms to write.
        seed (`int`): Of the data set.
        difficulty (`str`): `easy`, `standard` or `hard`.
        split (`str`): `train` or `val`.
        height (`int`): Of the pictures, pixels.
        width (`int`): Of the pictures, pixels.
        layout (`str`): Layouts of the frames, separated by commas; `all` for every one.
        antialias (`bool`): Smooth edges.
        num_workers (`int`): Processes.
        device (`str`): Where to render.
        progress (`Callable`, *optional*): Called with the scenes done and all scenes.

    Returns:
        `dict`: as `write_rooms` returns it.

    Raises:
        ValueError: A value is out of range.

    Source:
        Ours.
    """
    layouts = FRAME_LAYOUTS if layout == "all" else tuple(name.strip() for name in layout.split(","))
    return write_rooms(
        out,
        scenes,
        seed,
        difficulty,
        split,
        (height, width),
        layouts,
        antialias=antialias,
        num_workers=num_workers,
        device=device,
        progress=progress,
    )
