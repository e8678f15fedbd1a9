"""The data root: bytes that repeat, formats read by independent code, and the truth coming back."""

import io
import json
import struct
import zlib

import av
import numpy as np
import pytest
import trimesh
from PIL import Image

from vidllm.processing.rooms.contact import contact_sheet
from vidllm.processing.rooms.formats import FRAME_LAYOUTS, depth_in_millimetres
from vidllm.processing.rooms.furniture import CATEGORIES
from vidllm.processing.rooms.layout import make_room
from vidllm.processing.rooms.render import RoomRenderer
from vidllm.processing.rooms.write import rooms_command, write_rooms


SIZE = (48, 64)
SCENE = "scene1001_00"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms") / "root"
    done = []
    write_rooms(
        folder,
        3,
        seed=4,
        difficulty="easy",
        size_hw=SIZE,
        layout=FRAME_LAYOUTS,
        progress=lambda n, of: done.append((n, of)),
    )
    assert done == [(1, 3), (2, 3), (3, 3)]
    return folder


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_runs_write_the_same_bytes(root, tmp_path):
    again = rooms_command(tmp_path / "again", 3, 4, "easy", height=48, width=64, layout="all", num_workers=2)
    first, second = content(root), content(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert any(name.endswith(".mp4") for name in first)
    assert again["scenes"] == 3
    assert again["frames"] == 72
    other = tmp_path / "other"
    write_rooms(other, 1, seed=5, difficulty="easy", size_hw=SIZE)
    assert (
        content(other)[f"scans/{SCENE[:7]}00_00/{SCENE[:7]}00_00.txt"]
        != first[f"scans/{SCENE[:7]}00_00/{SCENE[:7]}00_00.txt"]
    )


def test_a_split_written_again_replaces_itself_and_keeps_the_other(tmp_path):
    write_rooms(tmp_path, 2, seed=1, difficulty="standard", size_hw=(32, 48), video=False)
    write_rooms(tmp_path, 1, seed=1, difficulty="easy", split="val", size_hw=(32, 48), video=False)
    write_rooms(tmp_path, 2, seed=1, difficulty="easy", size_hw=(32, 48), video=False)
    truth = json.loads((tmp_path / "rooms.json").read_text())
    assert truth["train"]["difficulty"] == "easy"
    assert list(truth["val"]["scenes"]) == ["scene7000_00"]
    assert len(list((tmp_path / "posed_images" / "scene1000_00").glob("*.jpg"))) == 24
    annotations = tmp_path / "annotations"
    names = {path.name for path in annotations.iterdir()}
    assert {
        "ScanQA_v1.0_train.json",
        "ScanQA_v1.0_val.json",
        "v1_balanced_questions_train_scannetv2.json",
        "v1_balanced_questions_test_scannetv2.json",
        "v1_balanced_sqa_annotations_train_scannetv2.json",
        "v1_balanced_sqa_annotations_test_scannetv2.json",
        "ScanRefer_filtered_train.json",
        "ScanRefer_filtered_val.json",
        "ScanRefer_filtered_train.txt",
        "ScanRefer_filtered_val.txt",
        "ScanRefer_filtered.json",
    } <= names
    rows = {
        name: json.loads((annotations / f"ScanRefer_filtered{name}.json").read_text())
        for name in ("", "_train", "_val")
    }
    assert rows[""] == rows["_train"] + rows["_val"]


def test_frames_are_those_of_the_room(root):
    room = make_room(4, 1001, "easy")
    frames = RoomRenderer(room).render(SIZE)
    truth = json.loads((root / "rooms.json").read_text())["train"]["scenes"][SCENE]
    folder = root / "posed_images" / SCENE
    for number in (0, 5, 23):
        depth = np.asarray(Image.open(folder / f"{number:05d}.png"))
        np.testing.assert_array_equal(depth, np.round(frames.depth_m[number].numpy().astype(float) * 1000))
        picture = np.asarray(Image.open(folder / f"{number:05d}.jpg")).astype(int)
        assert np.abs(picture - frames.rgb[number].numpy()).mean() < 3
        pose = np.loadtxt(folder / f"{number:05d}.txt")
        np.testing.assert_allclose(
            pose, room.scene_from_annotation @ room.track.annotation_from_cam[number], atol=1e-6
        )
        np.testing.assert_allclose(pose, truth["scene_from_cam"][number], atol=1e-6)
    intrinsic = np.loadtxt(folder / "intrinsic.txt")
    np.testing.assert_allclose(intrinsic[:3, :3], room.intrinsics_px(SIZE), atol=1e-6)
    assert intrinsic[0, 2] == SIZE[1] / 2
    with av.open(str(root / "videos" / f"{SCENE}.mp4")) as video:
        pictures = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(pictures) == 24
    assert np.abs(pictures[7].astype(int) - frames.rgb[7].numpy()).mean() < 8


def test_boxes_by_scannets_rule(root):
    """Mesh, segments, aggregation and alignment, read by other code, give the true boxes."""
    truth = json.loads((root / "rooms.json").read_text())["train"]["scenes"][SCENE]
    folder = root / "scans" / SCENE
    mesh = trimesh.load(folder / f"{SCENE}_vh_clean_2.ply", process=False)
    segments = np.array(json.loads((folder / f"{SCENE}_vh_clean_2.0.010000.segs.json").read_text())["segIndices"])
    groups = json.loads((folder / f"{SCENE}.aggregation.json").read_text())["segGroups"]
    lines = dict(line.split(" = ") for line in (folder / f"{SCENE}.txt").read_text().splitlines())
    alignment = np.array(lines["axisAlignment"].split(), float).reshape(4, 4)
    assert not np.allclose(alignment, np.eye(4), atol=0.1)
    np.testing.assert_allclose(alignment, truth["annotation_from_scene"], atol=1e-12)
    assert len(segments) == len(mesh.vertices)
    assert mesh.visual.kind == "vertex"
    aligned = np.asarray(mesh.vertices) @ alignment[:3, :3].T + alignment[:3, 3]
    for group, thing in zip(groups, truth["objects"], strict=False):
        assert (group["objectId"], group["label"]) == (thing["object_id"], thing["category"])
        points = aligned[np.isin(segments, group["segments"])]
        box = np.concatenate([(points.min(0) + points.max(0)) / 2, points.max(0) - points.min(0)])
        np.testing.assert_allclose(box, thing["box_annotation"], atol=1e-5)
    assert [group["label"] for group in groups[-6:]] == ["wall"] * 4 + ["floor", "ceiling"]


def test_sens_by_its_byte_layout(root):
    data = io.BytesIO((root / "scans" / SCENE / f"{SCENE}.sens").read_bytes())

    def take(form):
        return struct.unpack("<" + form, data.read(struct.calcsize("<" + form)))

    version, length = take("IQ")
    assert version == 4
    data.read(length)
    matrices = [np.array(take("16f")).reshape(4, 4) for _ in range(4)]
    assert matrices[0][0, 2] == SIZE[1] / 2
    np.testing.assert_array_equal(matrices[1], np.eye(4))
    assert take("ii") == (2, 1)
    assert take("4I") == (SIZE[1], SIZE[0], SIZE[1], SIZE[0])
    shift, count = take("fQ")
    assert (shift, count) == (1000, 24)
    folder = root / "posed_images" / SCENE
    for number in range(count):
        pose = np.array(take("16f")).reshape(4, 4)
        np.testing.assert_allclose(pose, np.loadtxt(folder / f"{number:05d}.txt"), atol=2e-6)
        _, _, colour_bytes, depth_bytes = take("4Q")
        assert data.read(colour_bytes) == (folder / f"{number:05d}.jpg").read_bytes()
        depth = np.frombuffer(zlib.decompress(data.read(depth_bytes)), "<u2").reshape(SIZE)
        np.testing.assert_array_equal(depth, np.asarray(Image.open(folder / f"{number:05d}.png")))
    assert take("Q") == (0,)
    assert data.read() == b""


def test_depth_that_does_not_fit_is_invalid():
    depth = np.array([[0.0014, 65.535], [65.536, np.inf]])
    np.testing.assert_array_equal(depth_in_millimetres(depth), [[1, 65535], [0, 0]])


def test_annotation_files(root):
    truth = json.loads((root / "rooms.json").read_text())["train"]
    objects = {scene: {o["object_id"]: o for o in t["objects"]} for scene, t in truth["scenes"].items()}
    folder = root / "annotations"
    rows = json.loads((folder / "ScanQA_v1.0_train.json").read_text())
    assert len(rows) == len(truth["question_kinds"]) > 0
    assert len({row["question_id"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"scene_id", "question_id", "question", "answers", "object_ids", "object_names"}
        assert row["question_id"].startswith(f"train-{row['scene_id'][:9]}-")
        assert len(row["object_ids"]) == len(row["object_names"]) >= 1
        for number, name in zip(row["object_ids"], row["object_names"], strict=True):
            known = objects[row["scene_id"]].get(number)
            assert name == (known["category"].replace(" ", "_") if known else "floor")
    questions = json.loads((folder / "v1_balanced_questions_train_scannetv2.json").read_text())["questions"]
    annotations = json.loads((folder / "v1_balanced_sqa_annotations_train_scannetv2.json").read_text())["annotations"]
    answers = json.loads((folder / "answer_dict.json").read_text())
    assert [q["question_id"] for q in questions] == [a["question_id"] for a in annotations]
    assert len({q["question_id"] for q in questions}) == len(questions) == len(truth["situated_kinds"]) > 0
    for question, annotation in zip(questions, annotations, strict=True):
        assert isinstance(question["question_id"], int)
        assert len(question["alternative_situation"]) == 2
        assert answers[1][str(answers[0][annotation["answers"][0]["answer"]])] == annotation["answers"][0]["answer"]
        rotation = annotation["rotation"]
        assert sum(rotation[key] ** 2 for key in ("_x", "_y", "_z", "_w")) == pytest.approx(1)
    rows = json.loads((folder / "ScanRefer_filtered_train.json").read_text())
    assert len({(row["scene_id"], row["object_id"], row["ann_id"]) for row in rows}) == len(rows) > 0
    for row in rows:
        assert all(isinstance(row[key], str) for key in ("object_id", "ann_id", "object_name", "description"))
        assert objects[row["scene_id"]][int(row["object_id"])]["category"].replace(" ", "_") == row["object_name"]
        assert "".join(row["token"]) == row["description"].replace(" ", "")
    assert (folder / "ScanRefer_filtered_train.txt").read_text().split() == list(truth["scenes"])
    table = [line.split("\t") for line in (root / "scannetv2-labels.combined.tsv").read_text().splitlines()]
    assert (table[0][1], table[0][4], table[0][7]) == ("raw_category", "nyu40id", "nyu40class")
    assert {row[1]: (int(row[4]), row[7]) for row in table[1:] if row[1] in CATEGORIES} == {
        n: c.nyu40 for n, c in CATEGORIES.items()
    }
    assert all(len(row) == len(table[0]) for row in table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scenes": 0}, "1 to 6000 scenes of train"),
        ({"split": "val", "scenes": 3001}, "1 to 3000 scenes of val"),
        ({"split": "test"}, "split in"),
        ({"difficulty": "hardest"}, "difficulty in"),
        ({"layout": "posed"}, "layout must be among"),
        ({"size_hw": (47, 64)}, "even ones for videos"),
        ({"seed": -1}, "seed of at least 0"),
    ],
)
def test_errors_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_rooms(tmp_path / "out", **{"scenes": 1, **change})
    assert not (tmp_path / "out").exists()


def test_contact_sheet(tmp_path):
    sheet = contact_sheet(tmp_path / "sheet.png", "easy", 1, [1000, 1001], frames_per_room=3, size_hw=(24, 32))
    assert sheet.shape == (2 * 28, 3 * 36, 3)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), sheet)
    with pytest.raises(ValueError, match="at least one room"):
        contact_sheet(tmp_path / "none.png", "easy", 1, [])
