"""Every metric as a module of `evaluate`: loaded from its folder, offline, and equal to its functions."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

from vidllm.eval.metrics.camera_pose.camera_pose import CameraPose
from vidllm.eval.metrics.camera_pose.scores import camera_pose_scores
from vidllm.eval.metrics.depth.scores import depth_scores
from vidllm.eval.metrics.scanqa.scanqa import ScanQA


FOLDER = Path(__file__).parents[2] / "eval" / "metrics"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where copies of the modules and tables of examples go."""
    folder = tmp_path_factory.mktemp("evaluate")
    patch = pytest.MonkeyPatch()
    patch.setattr("evaluate.config.HF_MODULES_CACHE", str(folder / "modules"))
    yield folder
    patch.undo()


def load(name, cache):
    return evaluate.load(str(FOLDER / name), cache_dir=str(cache / name))


def test_every_folder_is_a_module(cache):
    names = sorted(path.name for path in FOLDER.iterdir() if (path / "scores.py").is_file())
    assert names == [
        "camera_pose",
        "depth",
        "metric_scale",
        "point_map",
        "scan2cap",
        "scanqa",
        "scanrefer",
        "sqa3d",
        "vsi_bench",
    ]
    for name in names:
        module = load(name, cache)
        assert module.description
        assert module.citation


def test_answers(cache):
    said, accepted, kinds = ["red", "2"], [["red", "dark red"], ["two"]], ["colour", "count"]
    wanted = {"exact_match": 0.5, "exact_match_macro": 0.5, "colour/exact_match": 1.0, "count/exact_match": 0.0}
    assert load("scanqa", cache).compute(predictions=said, references=accepted, kinds=kinds) == wanted
    assert ScanQA(cache_dir=str(cache / "direct")).compute(predictions=said, references=accepted) == {
        "exact_match": 0.5
    }
    sqa3d = load("sqa3d", cache)
    scores = sqa3d.compute(predictions=["2", "the door"], references=["two", "a brown door"], protocol="leo")
    assert scores == {"exact_match": 0.5, "exact_match_refined": 1.0}


def test_examples_may_be_added_one_by_one(cache):
    metric = load("sqa3d", cache)
    metric.add(prediction="left", reference="left")
    metric.add_batch(predictions=["right", "left"], references=["left", "left"])
    assert metric.compute() == {"exact_match": pytest.approx(2 / 3)}


def test_boxes_and_captions(cache):
    box = [0.0, 1, 2, 1, 1, 1]
    scores = load("scanrefer", cache).compute(predictions=[box, []], references=[box, box])
    assert scores == {"acc_0.25": 0.5, "acc_0.5": 0.5}
    objects = [{"category": "chair", "colour": "red"}, {"category": "door", "colour": ""}]
    scores = load("scan2cap", cache).compute(predictions=["a red chair", "a chair"], references=objects)
    assert scores == {"category_and_colour": 0.5}


def test_geometry(cache):
    rng = np.random.default_rng(3)
    true = np.tile(np.eye(4), (3, 1, 1))
    true[:, :3, 3] = rng.normal(size=(3, 3))
    predicted = true.copy()
    predicted[:, :3, 3] += 0.1 * rng.normal(size=(3, 3))
    wanted = camera_pose_scores(predicted, true)
    for metric in (load("camera_pose", cache), CameraPose(cache_dir=str(cache / "poses"))):
        scores = metric.compute(predictions=[predicted.tolist(), true.tolist()], references=[true.tolist()] * 2)
        assert scores["auc_30"] == pytest.approx((wanted["auc_30"] + 1) / 2)
    depth = rng.uniform(1, 4, (2, 3, 5))
    scores = load("depth", cache).compute(predictions=[(2 * depth).tolist()], references=[depth.tolist()])
    assert scores == pytest.approx(depth_scores(2 * depth, depth))
    truth = {"points_world": [[0.0, 0, 2], [1, 1, 1]], "annotation_from_world": np.eye(4).tolist()}
    said = {"points_world": [[0.0, 0, 3], [1.5, 1.5, 1.5]], "room_from_world": np.eye(3).tolist()}
    scores = load("metric_scale", cache).compute(predictions=[said], references=[truth])
    assert scores == pytest.approx({"scale_error": 0.5, "up_error_deg": 0.0, "heading_error_deg": 0.0})


def test_clouds_and_spaces(cache):
    cloud = [[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]
    moved = [[x + 0.2, y, z] for x, y, z in cloud]
    scores = load("point_map", cache).compute(predictions=[cloud, moved], references=[cloud, cloud])
    assert scores["fscore_5cm"] == 0.5
    assert scores["accuracy"] == pytest.approx(0.1)
    scores = load("vsi_bench", cache).compute(
        predictions=["A", "4"], references=["A", "4"], question_types=["route_planning", "object_counting"]
    )
    assert scores == {"route_planning": 1.0, "object_counting": 1.0, "overall": 1.0}
