"""`vidllm demo` as people run it: a process of its own, no network, the shipped model where it is there."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest


# Any use of a socket ends the run.
OFFLINE = """
import socket, sys

def refuse(*arguments, **more):
    raise SystemExit("network")

class NoSocket(socket.socket):
    __init__ = refuse

socket.socket, socket.create_connection, socket.getaddrinfo = NoSocket, refuse, refuse
sys.argv[0] = "vidllm"
from vidllm.cli import main
main()
"""


@pytest.fixture(scope="module")
def shipped(repository, tmp_path_factory):
    """Folder of the model and the options that choose it; a stand-in where the shipped one is missing."""
    folder = repository / "model_cards" / "vidllm-nano"
    if (folder / "model.safetensors").is_file():
        return folder, []
    from vidllm.train.demo_clip import demo_clip
    from vidllm.train.initialise import initialise
    from vidllm.train.ship import ship

    root = tmp_path_factory.mktemp("stand_in")
    initialise("vidllm-nano", root / "made")
    config = root / "made" / "config.json"
    # As if it had been trained in metres.
    config.write_text(config.read_text().replace('"is_metric": false', '"is_metric": true'))
    ship(root / "made", root / "shipped", demo_clip(5, 7000))
    return root / "shipped", ["--model", str(root / "shipped")]


@pytest.fixture(scope="module")
def done(shipped, tmp_path_factory):
    """The finished process, its folder, and what the clip's truth file says."""
    folder, options = shipped
    out = tmp_path_factory.mktemp("demo") / "new" / "out"
    # Nothing but the sockets keeps it from the network.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    process = subprocess.run(
        [sys.executable, "-c", OFFLINE, "demo", "--out", str(out), *options],
        capture_output=True, text=True, check=False, timeout=300, cwd=out.parents[1], env=environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    return process, out, json.loads((folder / "demo.json").read_text())


def test_every_result_has_the_truth_beside_it(done):
    process, out, _ = done
    document = json.loads((out / "answers.json").read_text())
    assert process.stderr == ""
    assert len(document["answers"]) >= 6
    assert len(document["groundings"]) >= 2
    assert document["captions"]
    lines = process.stdout.splitlines()
    for answer in document["answers"]:
        (line,) = [line for line in lines if f"  {answer['question']} " in line]
        assert line.endswith(f"truth: {' or '.join(answer['truth'])}")
        assert line.split()[0] == ("right" if answer["right"] else "wrong")
    for found in document["groundings"]:
        numbers = "  ".join(
            " ".join(f"{v:6.2f}" for v in found["truth_box_annotation"][part]) for part in (slice(3), slice(3, 6))
        )
        assert [line for line in lines if numbers in line and line.endswith(found["truth"])]
        assert [line for line in lines if f"IoU {found['iou']:.2f}" in line]
    for caption in document["captions"]:
        assert [line for line in lines if line.startswith(f"         truth: {caption['truth']}, such as: ")]
    (path,) = [line for line in lines if line.startswith("  camera path")]
    assert f"{document['reconstruction']['truth']['path_length_m']:.2f} m" in path
    (size,) = [line for line in lines if line.startswith("  room size")]
    assert " x ".join(f"{v:.2f}" for v in document["reconstruction"]["truth"]["room_size_m"]) in size
    right, of = document["right"]["all"]
    assert [line for line in lines if line.startswith(f"{right} of {of} right: ")]


def overlap(a, b):
    """IoU of two boxes (cx, cy, cz, dx, dy, dz)."""
    a, b = np.array(a), np.array(b)
    low = np.maximum(a[:3] - a[3:] / 2, b[:3] - b[3:] / 2)
    high = np.minimum(a[:3] + a[3:] / 2, b[:3] + b[3:] / 2)
    common = np.prod(np.maximum(high - low, 0))
    return common / (np.prod(a[3:]) + np.prod(b[3:]) - common)


def test_what_is_right_is_right(done):
    _, out, truth = done
    document = json.loads((out / "answers.json").read_text())
    asked = {item["question"]: item["answers"] for item in truth["questions"]}
    for answer in document["answers"]:
        assert answer["right"] == (answer["answer"] in asked.pop(answer["question"]))
    assert not asked
    poses = np.array(truth["camera"]["annotation_from_cam"])[document["frames"]]
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    assert document["reconstruction"]["truth"]["path_length_m"] == pytest.approx(steps.sum(), abs=1e-6)
    for found, item in zip(document["groundings"], truth["descriptions"], strict=True):
        assert found["truth_box_annotation"] == item["box_annotation"]
        assert found["iou"] == pytest.approx(overlap(found["box_annotation"], item["box_annotation"]), abs=1e-4)
        assert found["right"] == (found["iou"] >= 0.25)
    for caption, item in zip(document["captions"], truth["places"], strict=True):
        world = np.array([*caption["point_world"], 1.0])
        assert np.allclose((poses[0] @ world)[:3], item["point_annotation"], atol=1e-5)
    parts = {"questions": "answers", "boxes": "groundings", "places": "captions"}
    for part, key in parts.items():
        assert document["right"][part] == [sum(item["right"] for item in document[key]), len(document[key])]
    assert document["right"]["all"] == np.sum([document["right"][part] for part in parts], axis=0).tolist()


def test_every_file_opens(done):
    import trimesh
    from PIL import Image

    _, out, _ = done
    names = {"points.ply", "scene.glb", "depth.png", "map.png", "answers.json"}
    assert names <= {path.name for path in out.iterdir()}
    assert len(trimesh.load(out / "points.ply").vertices) > 1000
    scene = trimesh.load(out / "scene.glb")
    assert scene.geometry
    assert np.isfinite(scene.bounds).all()
    for name in ("depth.png", "map.png"):
        with Image.open(out / name) as picture:
            picture.load()
            assert min(picture.size) > 200


def test_without_a_shipped_model_it_makes_one_and_says_so(repository, tmp_path):
    if (repository / "model_cards" / "vidllm-nano").is_dir():
        pytest.skip("a model ships")
    process = subprocess.run(
        [sys.executable, "-c", OFFLINE, "demo", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    first, second, *_ = process.stdout.splitlines()
    assert first.startswith("no trained model comes with vidllm yet")
    assert second.startswith("untrained weights: ")
    document = json.loads((tmp_path / "answers.json").read_text())
    assert document["untrained"] is True
    assert document["unit"] == "relative"
    assert {found["iou"] for found in document["groundings"]} == {None}
    assert len(document["answers"]) >= 6
    assert (tmp_path / "scene.glb").is_file()


def test_it_is_quick(done):
    _, out, _ = done
    assert json.loads((out / "answers.json").read_text())["seconds"] < 60


def test_the_shipped_model_has_learned_something(shipped, done):
    folder, options = shipped
    if options:
        pytest.skip("model_cards/vidllm-nano holds no weights")
    document = json.loads((done[1] / "answers.json").read_text())
    assert document["untrained"] is False
    assert document["unit"] == "m"
    assert document["video"] == str(folder / "demo.mp4")
    lengths = document["reconstruction"]
    assert np.allclose(lengths["extent_room"], lengths["truth"]["seen_size_m"], rtol=0.5)


def test_the_shipped_model_knows_more_than_who_does_not_look(shipped):
    """By the results beside it: one clip of ten questions says little, a hundred rooms do."""
    folder, options = shipped
    if options:
        pytest.skip("model_cards/vidllm-nano holds no weights")
    run = json.loads((folder / "results" / "easy" / "results.json").read_text(encoding="utf-8"))["runs"]["easy"]
    for benchmark, metric, kinds in (
        ("scanqa", "exact_match", ("blind", "majority")),
        ("sqa3d", "exact_match", ("blind", "majority")),
        ("scanrefer", "acc_0.25", ("constant",)),
    ):
        others = [run["baselines"][kind][benchmark]["official"][metric] for kind in kinds]
        assert run["results"][benchmark]["official"][metric] > max(others) + 0.05
