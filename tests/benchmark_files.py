"""A small data root in the official formats: two scans with meshes, frames and poses, a third scene that is named only. All texts are invented."""

import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image


SCENES = ("scene0900_00", "scene0901_00")
ABSENT = "scene0950_00"
# objectId -> label and box corners in the raw scan frame (before alignment)
OBJECTS = {
    0: ("bed", (0.0, 0.0, 0.0), (2.0, 1.0, 0.5)),
    1: ("coffee table", (3.0, 1.0, 0.0), (3.5, 2.0, 0.4)),
    2: ("office chair", (1.0, 3.0, 0.0), (1.5, 3.5, 1.0)),
    3: ("office chair", (2.0, 3.0, 0.0), (2.5, 3.5, 1.0)),
}
# a quarter turn about z and a shift
ANNOTATION_FROM_SCENE = np.array([[0.0, -1, 0, 1], [1, 0, 0, -2], [0, 0, 1, 0.5], [0, 0, 0, 1]])
NUM_FRAMES = 6
HW, DEPTH_HW = (48, 64), (24, 32)
FOCAL_PX = 50.0


def expected_box(object_id: int) -> list[float]:
    """Box of an object in the annotation frame, worked out from its corners."""
    _, low, high = OBJECTS[object_id]
    corners = np.array([low, high]) @ ANNOTATION_FROM_SCENE[:3, :3].T + ANNOTATION_FROM_SCENE[:3, 3]
    low, high = corners.min(axis=0), corners.max(axis=0)
    return [*((low + high) / 2), *(high - low)]


def scene_from_cam(frame: int) -> np.ndarray:
    """Camera at 1.5 m, level, looking along the scan's +y, walking along +x."""
    pose = np.eye(4)
    pose[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    pose[:3, 3] = [0.5 + 0.2 * frame, -2.0, 1.5]
    return pose


def write_scan(root: Path, scene_id: str, invalid_frames=()) -> None:
    """Mesh, segments, aggregation, alignment, and posed images of one scene."""
    folder = root / "scans" / scene_id
    folder.mkdir(parents=True)
    vertices, segments, groups = [], [], []
    for object_id, (label, low, high) in OBJECTS.items():
        corners = [[(low, high)[bit >> axis & 1][axis] for axis in range(3)] for bit in range(8)]
        vertices += corners
        segments += [2 * object_id] * 4 + [2 * object_id + 1] * 4
        groups.append(
            {"id": object_id, "objectId": object_id, "segments": [2 * object_id, 2 * object_id + 1], "label": label}
        )
    vertices.append([9.0, 9.0, 9.0])
    segments.append(99)
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        "property uchar red\nproperty uchar green\nproperty uchar blue\nproperty uchar alpha\nelement face 0\n"
        "property list uchar int vertex_indices\nend_header\n"
    )
    body = b"".join(struct.pack("<fff4B", *vertex, 9, 9, 9, 255) for vertex in vertices)
    (folder / f"{scene_id}_vh_clean_2.ply").write_bytes(header.encode() + body)
    (folder / f"{scene_id}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": segments}))
    (folder / f"{scene_id}.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    numbers = " ".join(str(value) for value in ANNOTATION_FROM_SCENE.ravel())
    (folder / f"{scene_id}.txt").write_text(f"axisAlignment = {numbers}\ncolorWidth = {HW[1]}\n")
    images = root / "posed_images" / scene_id
    images.mkdir(parents=True)
    rng = np.random.default_rng(sum(scene_id.encode()))
    for frame in range(NUM_FRAMES):
        Image.fromarray(rng.integers(0, 255, (*HW, 3), dtype=np.uint8)).save(images / f"{10 * frame:05d}.jpg")
        depth = np.full(DEPTH_HW, 1000 + 100 * frame, dtype=np.uint16)
        depth[0] = 0
        Image.fromarray(depth).save(images / f"{10 * frame:05d}.png")
        pose = np.full((4, 4), -np.inf) if frame in invalid_frames else scene_from_cam(frame)
        np.savetxt(images / f"{10 * frame:05d}.txt", pose, fmt="%f")
    for name, size in (("intrinsic", HW), ("depth_intrinsic", DEPTH_HW)):
        matrix = np.eye(4)
        matrix[0, 0], matrix[1, 1] = FOCAL_PX * size[1] / HW[1], FOCAL_PX * size[0] / HW[0]
        matrix[0, 2], matrix[1, 2] = size[1] / 2, size[0] / 2
        np.savetxt(images / f"{name}.txt", matrix, fmt="%f")


def scanqa_rows() -> list[dict]:
    return [
        {"scene_id": SCENES[0], "question_id": "val-scene0900-0", "question": "What is left of the window?",
         "answers": ["bed", "a wide bed"], "object_ids": [0], "object_names": ["bed"]},
        {"scene_id": SCENES[0], "question_id": "val-scene0900-1", "question": "How many office chairs are there?",
         "answers": ["2"], "object_ids": [2, 3], "object_names": ["office chair", "office chair"]},
        {"scene_id": SCENES[1], "question_id": "val-scene0901-0", "question": "What color is the\tlow table?",
         "answers": ["brown"], "object_ids": [1], "object_names": ["coffee_table"]},
        {"scene_id": ABSENT, "question_id": "val-scene0950-0", "question": "Where is the lamp?",
         "answers": ["in the corner"], "object_ids": [17], "object_names": ["lamp"]},
    ]  # fmt: skip


def sqa3d_files() -> tuple[dict, dict]:
    questions = [
        {"scene_id": SCENES[0], "situation": "I am sitting on the bed.", "alternative_situation": ["The bed is under me.", "I rest on a bed."],
         "question": "What is behind me?", "question_id": 220602000001},
        {"scene_id": SCENES[1], "situation": "I face the table.", "alternative_situation": [],
         "question": "Isn't there a chair to my left?", "question_id": 220602000002},
    ]  # fmt: skip
    annotations = [
        {"scene_id": SCENES[1], "question_type": "N/A", "answer_type": "other", "question_id": 220602000002,
         "answers": [{"answer": "yes", "answer_confidence": "yes", "answer_id": 1}],
         "rotation": {"_w": 0.8, "_z": 0.6, "_x": 0, "_y": 0}, "position": {"z": 0, "x": -0.9, "y": 1.25}},
        {"scene_id": SCENES[0], "question_type": "N/A", "answer_type": "other", "question_id": 220602000001,
         "answers": [{"answer": "wall", "answer_confidence": "yes", "answer_id": 1}],
         "rotation": {"_x": 0, "_y": 0, "_z": -1.0, "_w": 0}, "position": {"x": 1, "y": 2.5, "z": 0.5}},
    ]  # fmt: skip
    head = {"info": {}, "license": {}, "data_type": "scannet", "data_subtype": "v2"}
    return {**head, "task_type": "invented", "questions": questions}, {**head, "annotations": annotations}


def scanrefer_rows() -> list[dict]:
    def row(scene_id, object_id, name, ann_id, description):
        tokens = description.replace(".", " .").split()
        return {"scene_id": scene_id, "object_id": str(object_id), "object_name": name, "ann_id": str(ann_id),
                "description": description, "token": tokens}  # fmt: skip

    return [
        row(SCENES[0], 1, "coffee_table", 0, "this is a low table. it is right of the bed."),
        row(SCENES[0], 2, "office_chair", 0, "the chair that is nearer to the wall."),
        row(SCENES[0], 1, "coffee_table", 1, "a small square table."),
        {**row(SCENES[0], 3, "office_chair", 0, "the other chair."), "eval_type": "multiple"},
        row(SCENES[1], 0, "bed", 4, "a bed with a grey cover."),
        row(ABSENT, 8, "lamp", 0, "a tall lamp."),
    ]


def write_root(root: Path, labels: bool = True, **scan_options) -> Path:
    """All files of all benchmarks."""
    for scene_id in SCENES:
        write_scan(root, scene_id, **scan_options)
    folder = root / "annotations"
    folder.mkdir()
    dump = lambda name, content: (folder / name).write_text(json.dumps(content))  # noqa: E731
    dump("ScanQA_v1.0_val.json", scanqa_rows())
    hidden = [{k: v for k, v in row.items() if k in ("scene_id", "question_id", "question")} for row in scanqa_rows()]
    dump("ScanQA_v1.0_test_wo_obj.json", hidden)
    questions, annotations = sqa3d_files()
    for split in ("train", "test"):
        dump(f"v1_balanced_questions_{split}_scannetv2.json", questions)
        dump(f"v1_balanced_sqa_annotations_{split}_scannetv2.json", annotations)
    dump("ScanRefer_filtered_val.json", scanrefer_rows())
    if labels:
        header = "id\traw_category\tcategory\tcount\tnyu40id\teigen13id\tnyuClass\tnyu40class\n"
        rows = [("bed", 4, "bed"), ("coffee table", 7, "table"), ("office chair", 5, "chair"), ("lamp", 35, "lamp")]
        lines = [
            f"{n}\t{name}\t{name}\t1\t{number}\t0\t{kind}\t{kind}\r\n" for n, (name, number, kind) in enumerate(rows)
        ]
        (folder / "scannetv2-labels.combined.tsv").write_text(header + "".join(lines), newline="")
    return root
