"""Rooms go through the same readers as ScanNet and give back the generator's truth."""

import json

import numpy as np
import pytest

from vidllm.processing.rooms.formats import FRAME_LAYOUTS
from vidllm.processing.rooms.layout import make_room
from vidllm.processing.rooms.render import RoomRenderer
from vidllm.processing.rooms.write import write_rooms
from vidllm.processing.scenes.annotations import load_scene_objects
from vidllm.processing.scenes.open import open_scene


SCENE = "scene7000_00"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("read_back")
    write_rooms(folder, 1, seed=2, difficulty="standard", split="val", size_hw=(48, 64), layout=FRAME_LAYOUTS)
    return folder


@pytest.fixture(scope="module")
def truth(root):
    return json.loads((root / "rooms.json").read_text())["val"]["scenes"][SCENE]


@pytest.mark.parametrize("layout", [*FRAME_LAYOUTS, "video"])
def test_every_layout(root, truth, layout):
    room = make_room(2, 7000, "standard")
    frames = RoomRenderer(room).render((48, 64))
    with open_scene(root, SCENE, layout) as reader:
        assert len(reader) == 32
        frame = reader.frame(9)
        limit = 3 if layout != "video" else 8
        assert np.abs(frame.rgb.astype(int) - frames.rgb[9].numpy()).mean() < limit
        np.testing.assert_allclose(reader.annotation_from_scene, truth["annotation_from_scene"], atol=1e-6)
        if layout in ("video", "images"):
            return
        poses = np.linalg.inv(np.array(truth["scene_from_cam"]))
        np.testing.assert_allclose(reader.poses(), poses, atol=2e-5)
        np.testing.assert_allclose(frame.cam_from_scene, poses[9], atol=2e-5)
        np.testing.assert_allclose(frame.depth_m, frames.depth_m[9].numpy(), atol=6e-4)
        np.testing.assert_allclose(frame.depth_intrinsics_px, truth["intrinsics_px"], atol=1e-4)
        np.testing.assert_allclose(frame.intrinsics_px, truth["intrinsics_px"], atol=1e-4)


def test_boxes_and_labels(root, truth):
    found = load_scene_objects(root / "scans" / SCENE, root / "scannetv2-labels.combined.tsv")
    by_id = {int(i): row for row, i in enumerate(found.object_ids)}
    for thing in truth["objects"]:
        row = by_id[thing["object_id"]]
        assert found.labels[row] == thing["category"]
        np.testing.assert_allclose(found.boxes_annotation[row], thing["box_annotation"], atol=1e-5)
