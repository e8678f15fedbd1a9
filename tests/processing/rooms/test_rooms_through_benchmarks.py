"""A root of rooms goes through the very loaders of ScanQA, SQA3D, ScanRefer and Scan2Cap and gives back the generator's truth."""

import json

import numpy as np
import pytest

from vidllm.processing.benchmarks import frames_of, load_benchmark
from vidllm.processing.rooms.formats import FRAME_LAYOUTS
from vidllm.processing.rooms.write import write_rooms
from vidllm.processing.samples import Sample


SPLITS = {"scanqa": "val", "sqa3d": "test", "scanrefer": "val", "scan2cap": "val"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms_root")
    write_rooms(folder, 2, seed=4, difficulty="easy", split="val", size_hw=(48, 64), layout=FRAME_LAYOUTS)
    return folder


@pytest.fixture(scope="module")
def truth(root):
    return json.loads((root / "rooms.json").read_text())["val"]["scenes"]


@pytest.fixture(scope="module")
def rows(root, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {
        name: [dict(row) for row in load_benchmark(name, root, split, cache_dir=cache)]
        for name, split in SPLITS.items()
    }


def written(root, name):
    return json.loads((root / "annotations" / name).read_text())


def test_texts_are_those_of_the_files(root, rows):
    asked = {row["question_id"]: row for row in written(root, "ScanQA_v1.0_val.json")}
    assert {row["official_id"] for row in rows["scanqa"]} == set(asked)
    for row in rows["scanqa"]:
        official = asked[row["official_id"]]
        assert (row["question"], row["answers"]) == (official["question"], official["answers"])
    questions = written(root, "v1_balanced_questions_test_scannetv2.json")["questions"]
    assert [row["question"] for row in rows["sqa3d"]] == [question["question"] for question in questions]
    assert [row["situation"] for row in rows["sqa3d"]] == [question["situation"] for question in questions]
    described = written(root, "ScanRefer_filtered_val.json")
    assert [row["question"] for row in rows["scanrefer"]] == [row["description"] for row in described]
    grouped = {}
    for row in described:
        grouped.setdefault((row["scene_id"], int(row["object_id"])), []).append(row["description"])
    assert {(row["scene_id"], row["object_ids"][0]): row["references"] for row in rows["scan2cap"]} == grouped


@pytest.mark.parametrize("name", ["scanqa", "scanrefer", "scan2cap"])
def test_boxes_are_the_generators(rows, truth, name):
    checked = 0
    for row in rows[name]:
        boxes = {thing["object_id"]: thing["box_annotation"] for thing in truth[row["scene_id"]]["objects"]}
        assert row["box_frame"] == "annotation"
        for object_id, box in zip(row["object_ids"], row["boxes_annotation"] or [], strict=False):
            if object_id in boxes:  # (a "no" to an existence question names the floor)
                np.testing.assert_allclose(box, boxes[object_id], atol=1e-5)
                checked += 1
    assert checked >= len(rows[name]) // 2


def test_situations_stand_where_the_generator_put_them(rows):
    for row in rows["sqa3d"]:
        assert np.isfinite(row["position_m"]).all()
        assert abs(np.linalg.norm(row["rotation_xyzw"]) - 1) < 1e-6


@pytest.mark.parametrize("layout", [name for name in FRAME_LAYOUTS if name != "images"])
def test_frames_poses_and_depth_through_each_layout(root, rows, truth, layout):
    sample = Sample.from_row(rows["scanrefer"][0])
    scene = truth[sample.scene_id]
    frames = frames_of(sample, root, num_frames=5, depth=True, layout=layout)
    cam_from_scene = np.linalg.inv(np.array(scene["scene_from_cam"]))
    chosen = np.linspace(0, len(cam_from_scene) - 1, 5, dtype=int)
    expected = cam_from_scene[chosen] @ np.linalg.inv(cam_from_scene[chosen[0]])
    np.testing.assert_allclose(frames.cam_from_world, expected, atol=2e-4)
    assert np.array_equal(frames.cam_from_world[0], np.eye(4))
    annotation_from_world = np.array(scene["annotation_from_scene"]) @ np.linalg.inv(cam_from_scene[chosen[0]])
    np.testing.assert_allclose(frames.annotation_from_world, annotation_from_world, atol=2e-4)
    # the box of the described object, seen from the frames: its surface points lie in it
    centre, size = np.split(np.array(sample.boxes_annotation[0]), 2)
    inside = 0
    for number, depth in enumerate(frames.depth_m):
        rows_px, columns_px = np.indices(depth.shape)
        matrix = np.array(scene["intrinsics_px"])
        rays = np.stack(
            [
                (columns_px - matrix[0, 2]) / matrix[0, 0],
                (rows_px - matrix[1, 2]) / matrix[1, 1],
                np.ones(depth.shape),
            ],
            -1,
        )
        points = (rays * depth[..., None]).reshape(-1, 3)
        world_from_cam = np.linalg.inv(frames.cam_from_world[number])
        points = points @ world_from_cam[:3, :3].T + world_from_cam[:3, 3]
        points = points @ annotation_from_world[:3, :3].T + annotation_from_world[:3, 3]
        inside += (np.abs(points - centre) <= size / 2 + 0.005).all(axis=1).sum()
    assert inside > 10
