"""What the demonstration counts as right, on a tiny shipped folder; the model's part is played by somebody who knows the truth."""

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vidllm import commands, demo, demo_truth
from vidllm.cli import app
from vidllm.modeling_vidllm.geometry_vidllm import boxes_room_from_annotation, room_headings
from vidllm.processing.rooms.layout import make_room
from vidllm.processing.rooms.render import RoomRenderer
from vidllm.train.demo_clip import demo_clip
from vidllm.train.initialise import initialise
from vidllm.train.ship import ship


SEED, NUMBER = 5, 7000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained tiny model as it would ship."""
    root = tmp_path_factory.mktemp("demo")
    initialise("vidllm-tiny", root / "made", seed=3)
    ship(root / "made", root / "shipped", demo_clip(SEED, NUMBER))
    return root / "shipped"


def run(*arguments):
    result = CliRunner().invoke(app, ["demo", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def let_the_model_know(monkeypatch, truth, turns):
    """Answers, boxes, captions and geometry as they should be, the room turned by quarter turns."""
    room = make_room(SEED, NUMBER, "easy")
    depth_m = RoomRenderer(room).render((96, 128), colour=False).depth_m.numpy()
    poses = np.array(truth["camera"]["annotation_from_cam"])
    pose = torch.from_numpy(poses[0])
    heading = room_headings(pose)[turns]
    encode, answers = commands.encode, {item["question"]: item["answers"][-1] for item in truth["questions"]}
    boxes = {item["description"]: item["box_annotation"] for item in truth["descriptions"]}

    def given(model, inputs):
        _, processor = commands.load(model.config.name_or_path)
        arrays = {
            "cam_from_world": np.linalg.inv(poses),
            "intrinsics_px": np.array(truth["camera"]["intrinsics_px"]),
            "depth_m": depth_m,
        }
        geometry = processor.prepare_geometry(arrays, inputs)
        return encode(model, inputs, {**geometry, "room_from_world": heading.float()[None]})

    def answer(model, processor, scene, chats, limit):
        texts = [block["text"] for chat in chats for block in chat[0]["content"] if block["type"] == "text"]
        assert all(text.endswith("\nReply with a word or a short phrase.") for text in texts)
        return [(answers[text.split("\n")[0]], (), []) for text in texts]

    def ground(model, processor, scene, description):
        box = torch.tensor(boxes[description], dtype=torch.float64).view(1, 1, 6)
        found = boxes_room_from_annotation(box, pose[None], scene.reconstruction.room_from_world.double())
        return commands.Grounding(description, True, (commands.FoundBox(tuple(found.view(6).tolist()), 0.9),), 0.01)

    def caption(model, processor, scene, point, frame_of):
        assert frame_of == "world"
        place = pose[:3, :3] @ torch.tensor(point, dtype=torch.float64) + pose[:3, 3]
        item = min(
            truth["places"], key=lambda item: np.linalg.norm(np.array(item["point_annotation"]) - place.numpy())
        )
        assert np.allclose(item["point_annotation"], place, atol=1e-6)
        text = f"this is a {item['colour']} {item['category']}. it is next to the white piano."
        return commands.Caption(text, (0.0, 0.0, 0.0), tuple(point))

    for name, function in (("encode", given), ("answer_batch", answer), ("ground", ground), ("caption", caption)):
        monkeypatch.setattr(commands, name, function)


@pytest.mark.parametrize("turns", [0, 3])
def test_who_knows_the_truth_has_everything_right(folder, tmp_path, monkeypatch, turns):
    truth = demo_truth.read_truth(folder)
    let_the_model_know(monkeypatch, truth, turns)
    lines = []
    document = demo.run_demo(tmp_path, lines.append, folder)
    num = sum(len(truth[part]) for part in ("questions", "descriptions", "places"))
    assert document["right"]["all"] == [num, num]
    assert any(line.startswith(f"{num} of {num} right: ") for line in lines)
    assert not [line for line in lines if line.startswith("  wrong")]
    assert document["unit"] == "m"
    for found, item in zip(document["groundings"], truth["descriptions"], strict=True):
        assert found["iou"] == pytest.approx(1, abs=1e-4)
        assert np.allclose(found["box_annotation"], item["box_annotation"], atol=1e-4)
        assert found["truth_box_annotation"] == item["box_annotation"]
    recon = document["reconstruction"]
    assert recon["path_length"] == pytest.approx(recon["truth"]["path_length_m"], rel=1e-3)
    order = [1, 0, 2] if turns % 2 else [0, 1, 2]
    assert recon["truth"]["room_size_m"] == [truth["room"]["size_m"][axis] for axis in order]
    # The surest four fifths of the pixels of some frames, against all pixels of all frames.
    assert np.allclose(recon["extent_room"], recon["truth"]["seen_size_m"], rtol=0.15)


def test_a_model_without_a_clue_has_nothing_right(folder, tmp_path):
    for _ in range(2):  # what an earlier run left is replaced
        result = run("--out", tmp_path / "out", "--model", folder, "--json")
        assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert json.loads((tmp_path / "out" / "answers.json").read_text()) == document
    assert document["untrained"] is True
    assert document["right"]["all"][0] == 0
    # Lengths of an untrained model are none, so nothing can be compared.
    assert document["unit"] == "relative"
    assert [found["iou"] for found in document["groundings"]] == [None] * len(document["groundings"])
    assert "untrained weights" in result.stderr
    assert "not in metres, not comparable" in result.stderr
    names = {"answers.json", "points.ply", "scene.glb", "depth.png", "map.png", "boxes.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert {part.rsplit("/", 1)[1] for part in document["files"].values()} == names - {"answers.json"}


def test_another_model_is_shown_the_shipped_clip(folder, tmp_path, monkeypatch):
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "demo.json").unlink()
    monkeypatch.setattr(demo_truth, "shipped_folder", lambda: folder)
    assert demo_truth.clip_folder(bare) == folder
    assert demo_truth.clip_folder("owner/name") == folder
    assert demo_truth.clip_folder(None) == folder
    assert demo_truth.clip_folder(folder) == folder


def test_an_installation_that_lacks_parts_of_the_model_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_truth, "files", lambda package: folder.parent)
    monkeypatch.setattr(demo_truth, "MODEL_NAME", "shipped")
    assert demo_truth.shipped_folder() == folder
    monkeypatch.setattr(demo_truth, "MODEL_NAME", "absent")
    assert not demo_truth.is_shipped()
    (tmp_path / "partial").mkdir()
    monkeypatch.setattr(demo_truth, "files", lambda package: tmp_path)
    monkeypatch.setattr(demo_truth, "MODEL_NAME", "partial")
    assert demo_truth.is_shipped()
    result = run("--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: the shipped model is missing in this installation: no config.json")

    def no_package(package):
        raise ModuleNotFoundError("none", name=package)

    monkeypatch.setattr(demo_truth, "files", no_package)
    assert not demo_truth.is_shipped()
    with pytest.raises(ValueError, match=r"missing in this installation: no package vidllm\.model_cards"):
        demo_truth.shipped_folder()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-9], "cannot be read as the truth of a clip"),
        (lambda text: "[]", "it lacks room"),
        (lambda text: text.replace('"places"', '"plazes"'), "it lacks places"),
        (
            lambda text: text.replace('"num_frames": 24', '"num_frames": 25'),
            r"wanted camera poses of shape \(25, 4, 4\)",
        ),
    ],
)
def test_a_damaged_truth_is_refused(folder, tmp_path, change, message):
    text = (folder / "demo.json").read_text()
    (tmp_path / "demo.json").write_text(change(text))
    assert change(text) != text
    with pytest.raises(ValueError, match=message):
        demo_truth.read_truth(tmp_path)


def test_frames_that_the_truth_does_not_know(folder):
    truth = demo_truth.read_truth(folder)
    assert demo_truth.poses_of(truth, [0, 23]).shape == (2, 4, 4)
    with pytest.raises(ValueError, match="frame 24 of the clip; it has 24"):
        demo_truth.poses_of(truth, [0, 24])


def test_no_box_has_no_overlap():
    pose = np.eye(4)
    assert demo.score_box((), [0, 0, 0, 1, 1, 1], torch.eye(3), pose) == (None, 0.0)
    # One cube moved by half its side out of another: 1/2 in common, 3/2 together.
    box, iou = demo.score_box(
        (commands.FoundBox((0.5, 0, 0, 1, 1, 1)), commands.FoundBox((0, 0, 0, 1, 1, 1))),
        [0, 0, 0, 1, 1, 1],
        torch.eye(3),
        pose,
    )
    assert np.allclose(box, [0.5, 0, 0, 1, 1, 1])
    assert iou == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("caption", "category", "colour", "right"),
    [
        ("this is a red chair. it is next to the blue table.", "chair", "red", True),
        ("this is a red chair. it is next to the blue table.", "table", "blue", False),
        ("a chair.", "chair", "red", False),
        ("there is a plant in the room.", "plant", None, True),
        ("", "plant", None, False),
    ],
)
def test_a_caption_is_right_if_it_names_its_object(caption, category, colour, right):
    assert demo_truth.names_object(caption, category, colour) is right
