"""Every metric as a module of `evaluate`: loaded from its folder, offline, and equal to its functions."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest

from vidllm.eval.metrics.camera_pose.camera_pose import CameraPose
from vidllm.eval.metrics.camera_pose.scores import camera_pose_scores
from vidllm.eval.metrics.camera_pose.trajectory import trajectory_scores
from vidllm.eval.metrics.depth.scores import depth_errors
from vidllm.eval.metrics.scan2cap.captions import CaptionedObject, caption_scores
from vidllm.eval.metrics.scan2cap.toolbox import BOX_ORDER
from vidllm.eval.metrics.scanqa.scanqa import ScanQA
from vidllm.eval.metrics.text_scorers import java_obstacle


FOLDER = Path(__file__).parents[2] / "eval" / "metrics"
needs_java = pytest.mark.skipif(java_obstacle() is not None, reason=f"text scores: {java_obstacle()}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where copies of the modules and tables of examples go."""
    folder = tmp_path_factory.mktemp("evaluate")
    patch = pytest.MonkeyPatch()
    patch.setattr("evaluate.config.HF_MODULES_CACHE", str(folder / "modules"))
    yield folder
    patch.undo()


def load(name, cache, config=None):
    return evaluate.load(str(FOLDER / name), config, cache_dir=str(cache / name))


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
    # the scenes' mean, or all their pairs alike; a trajectory beside it; a scene of one frame does not count
    longer = np.concatenate([true, true @ true])
    wrong = longer[::-1]
    metric = load("camera_pose", cache, "pi3_j_inv_i")
    inputs = {"predictions": [true.tolist(), wrong.tolist(), true[:1].tolist()], "references": [true.tolist(), longer.tolist(), true[:1].tolist()]}  # fmt: skip
    of_wrong = camera_pose_scores(wrong, longer, "pi3_j_inv_i")
    assert metric.compute(**inputs)["auc_30"] == pytest.approx((1 + of_wrong["auc_30"]) / 2)
    pooled = metric.compute(**inputs, pooled=True, trajectory="sim3")
    assert pooled["auc_30"] == pytest.approx((3 * 1 + 15 * of_wrong["auc_30"]) / 18)
    step = trajectory_scores(wrong, longer, "sim3")["rpe_trans_m"]
    assert pooled["sim3/rpe_trans_m"] == pytest.approx(step / 2, abs=1e-9)
    assert metric.compute(predictions=[true[:1].tolist()], references=[true[:1].tolist()]) == {}


def test_depth_and_scale(cache):
    rng = np.random.default_rng(4)
    depth = rng.uniform(1, 4, (2, 3, 5)).astype(np.float32)
    scores = load("depth", cache).compute(predictions=[(2 * depth).tolist()], references=[depth.tolist()])
    assert scores == pytest.approx(depth_errors(2 * depth, depth))
    metric = load("depth", cache, "median")
    assert metric.compute(predictions=[(2 * depth).tolist()], references=[depth.tolist()])["abs_rel"] == pytest.approx(
        0
    )
    # two scenes of 30 and 15 pixels, and one without any; what is not a number counts as 0
    half = np.where(np.arange(2)[:, None, None] == 0, depth, 0)
    inputs = {
        "predictions": [(2 * depth).tolist(), np.full(half.shape, np.nan).tolist(), depth.tolist()],
        "references": [depth.tolist(), half.tolist(), np.zeros(half.shape).tolist()],
    }
    scores = load("depth", cache).compute(**inputs)
    assert (scores["abs_rel"], scores["valid_pixels"]) == (pytest.approx(1.0), 45.0)
    inputs["predictions"][0] = (4 * depth).tolist()
    assert load("depth", cache).compute(**inputs)["abs_rel"] == pytest.approx(2.0)
    weighted = load("depth", cache).compute(**inputs, weight_by_pixels=True)
    assert weighted["abs_rel"] == pytest.approx((3 * 30 + 1 * 15) / 45)
    nothing = {"predictions": inputs["predictions"][2:], "references": inputs["references"][2:]}
    assert load("depth", cache).compute(**nothing) == {}
    truth = {"points_world": [[0.0, 0, 2], [1, 1, 1]], "annotation_from_world": np.eye(4).tolist()}
    said = {"points_world": [[0.0, 0, 3], [1.5, 1.5, 1.5]], "room_from_world": np.eye(3).tolist()}
    scores = load("metric_scale", cache).compute(predictions=[said], references=[truth])
    assert scores == pytest.approx({"scale_error": 0.5, "up_error_deg": 0.0, "heading_error_deg": 0.0})
    # a scene without valid points, and one whose room frame nobody knows
    empty = {"points_world": [], "annotation_from_world": np.eye(4).tolist()}
    unknown = {"points_world": truth["points_world"], "annotation_from_world": []}
    spoken = {"points_world": [], "room_from_world": np.eye(3).tolist()}
    metric = load("metric_scale", cache)
    assert metric.compute(predictions=[spoken], references=[empty]) == pytest.approx(
        {"up_error_deg": 0, "heading_error_deg": 0}
    )
    assert metric.compute(predictions=[said, spoken], references=[unknown, empty])["scale_error"] == pytest.approx(0.5)


def test_clouds_and_spaces(cache):
    cloud = [[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]
    moved = [[x + 0.2, y, z] for x, y, z in cloud]
    scores = load("point_map", cache).compute(predictions=[cloud, moved], references=[cloud, cloud])
    assert scores["fscore_5cm"] == 0.5
    assert scores["accuracy"] == pytest.approx(0.1)
    scores = load("vsi_bench", cache).compute(
        predictions=["A", "4"], references=["A", "4"], question_types=["route_planning", "object_counting"]
    )
    assert scores == {
        "route_planning": 1.0,
        "object_counting": 1.0,
        "object_rel_direction": 0.0,
        "overall": pytest.approx(2 / 3),
    }


# ---------------------------------------------------------------------- protocols, Scan2Cap's inputs


def test_the_name_that_a_module_is_loaded_with_is_its_protocol(cache):
    said, accepted = ["The door.", ""], [["door"], ["x"]]
    wanted = {
        "official": {"exact_match": 0.0}, "leo": {"exact_match": 0.5, "exact_match_refined": 1.0},
        "chat_scene": {"exact_match": 0.5, "exact_match_refined": 0.5},
    }  # fmt: skip
    for protocol, scores in wanted.items():
        assert load("scanqa", cache, protocol).compute(predictions=said, references=accepted) == scores
        assert load("scanqa", cache).compute(predictions=said, references=accepted, protocol=protocol) == scores
    with pytest.raises(ValueError, match=r"scanqa, protocol: wanted one of official.*; got 'cider'"):
        load("scanqa", cache, "cider").compute(predictions=said, references=accepted)
    with pytest.raises(ValueError, match="vsi_bench, protocol: wanted one of official; got 'leo'"):
        load("vsi_bench", cache, "leo").compute(predictions=["A"], references=["A"], question_types=["route_planning"])
    with pytest.raises(ValueError, match="metric_scale, protocol: wanted one of metric"):
        load("metric_scale", cache, "median").compute(
            predictions=[{"points_world": [], "room_from_world": np.eye(3).tolist()}],
            references=[{"points_world": [], "annotation_from_world": []}],
        )


def test_parts_of_scanrefer(cache):
    box = [0.0, 1, 2, 1, 1, 1]
    scores = load("scanrefer", cache).compute(
        predictions=[box, [], box], references=[box] * 3, kinds=["unique", "multiple", "multiple"], in_others=[0, 1, 0]
    )
    assert (scores["multiple/acc_0.5"], scores["multiple/in_others/acc_0.5"]) == (0.5, 0.0)
    assert (scores["not_in_others/acc_0.5"], scores["unique/in_others/acc_0.5"]) == (1.0, 0.0)


@needs_java
def test_captions_of_objects(cache):
    reference = {"key": "s|1|chair", "descriptions": ["A red chair."], "tokens": [], "iou": 0.9}
    other = {"key": "s|2|desk", "descriptions": ["a desk"], "tokens": [["a", "desk"]], "iou": 0.0}
    objects = [
        CaptionedObject("s|1|chair", ("A red chair.",), (("a", "red", "chair", "."),), "A red chair.", iou=0.9),
        CaptionedObject("s|2|desk", ("a desk",), (("a", "desk"),)),
    ]
    for protocol in ("scan2cap", "leo", "video3dllm", "ll3da"):
        metric = load("scan2cap", cache, protocol)
        scores = metric.compute(predictions=["A red chair.", None], references=[reference, other])
        assert scores == pytest.approx(caption_scores(objects, protocol)), protocol
        assert scores["objects_with_caption"] == 1.0
        strict = metric.compute(predictions=["A red chair.", None], references=[reference, other], iou_threshold=0.95)
        assert strict["objects_with_caption"] == 0.0
    with pytest.raises(ValueError, match="loaded for 'leo'; got 'rooms': load the module with that name"):
        load("scan2cap", cache, "leo").compute(predictions=["a"], references=[reference], protocol="rooms")
    with pytest.raises(ValueError, match="scan2cap, protocol: wanted one of rooms, scan2cap, leo"):
        load("scan2cap", cache, "coco")


@needs_java
def test_dense_captions(cache):
    corners = (np.array(BOX_ORDER) / 2).tolist()
    said = {"captions": ["sos a red chair eos"], "corners": [corners]}
    true = {"captions": [["sos a red chair eos", "sos a chair eos"]], "corners": [corners]}
    scores = load("scan2cap", cache, "benchmark_toolbox").compute(predictions=[said, said], references=[true, true])
    assert scores["rouge_l_f1@0.5"] == pytest.approx(1.0)
    # two scenes with the same references: their words tell nothing, so that CIDEr is 0, and its F1 0 / 0
    assert scores["cider_recall@0"] == 0.0
    assert math.isnan(scores["cider_f1@0"])


# ---------------------------------------------------------------------- fresh process, batches, combinations

# Every module from its folder, with no cache and no network; examples in batches; modules combined. Anything that reaches for the network
# is written down, because libraries may catch the error.
FRESH = """
import json, socket, sys
reached = []
def refuse(*address):
    reached.append(repr(address))
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = lambda self, address: refuse(address)
socket.getaddrinfo = refuse
import evaluate
import numpy as np
eye, cloud, box = np.eye(4).tolist(), [[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], [0.0, 1, 2, 1, 1, 1]
moved = np.eye(4); moved[0, 3] = 1.0
depth = [[[1.0, 2.0], [3.0, 4.0]]]
frame = {"points_world": cloud, "annotation_from_world": eye}
inputs = {
    "scanqa": (["red", "2"], [["red"], ["two"]], {}),
    "sqa3d": (["red", "2"], ["red", "two"], {}),
    "scanrefer": ([box, []], [box, box], {}),
    "scan2cap": (["a red chair", "a desk"], [{"category": "chair", "colour": "red"}, {"category": "door", "colour": ""}], {}),
    "vsi_bench": (["A", "4"], ["A", "4"], {"question_types": ["route_planning", "object_counting"]}),
    "camera_pose": ([[eye, moved.tolist()]] * 2, [[eye, moved.tolist()]] * 2, {}),
    "depth": ([depth] * 2, [depth] * 2, {}),
    "point_map": ([cloud] * 2, [cloud] * 2, {}),
    "metric_scale": ([{"points_world": cloud, "room_from_world": np.eye(3).tolist()}] * 2, [frame] * 2, {}),
}
found = {}
for name, (predictions, references, more) in inputs.items():
    once = evaluate.load(f"eval/metrics/{name}").compute(predictions=predictions, references=references, **more)
    module = evaluate.load(f"eval/metrics/{name}")
    module.add(prediction=predictions[0], reference=references[0])
    module.add_batch(predictions=predictions[1:], references=references[1:])
    assert module.compute(**more) == once, name
    found[name] = once
protocols = {name: evaluate.load("eval/metrics/scanqa", name) for name in ("official", "leo")}
combined = evaluate.combine(protocols, force_prefix=True)
combined.add_batch(predictions=["red"], references=[["red"]])
combined.add_batch(predictions=["2", "blue"], references=[["two"], ["green"]])
found["combined"] = combined.compute()
found["by path"] = evaluate.combine(["eval/metrics/sqa3d"]).compute(predictions=["a"], references=["a"])
found["kinds"] = evaluate.combine(protocols, force_prefix=True).compute(
    predictions=["red", "2"], references=[["red"], ["two"]], kinds=["colour", "count"]
)
print(json.dumps({"found": found, "reached": reached}))
"""


def test_every_module_in_a_fresh_process_without_network(tmp_path):
    """Also without the switches that tell the libraries to stay offline."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH], capture_output=True, text=True, env=env, cwd=FOLDER.parents[1], check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["reached"] == []
    found = answer["found"]
    assert found["scanqa"] == found["sqa3d"] == {"exact_match": 0.5}
    assert found["scanrefer"] == {"acc_0.25": 0.5, "acc_0.5": 0.5}
    assert found["scan2cap"] == {"category_and_colour": 0.5}
    assert found["vsi_bench"]["overall"] == pytest.approx(2 / 3)
    assert (found["camera_pose"]["auc_30"], found["camera_pose"]["ate_m"]) == (1.0, 0.0)
    assert (found["depth"]["abs_rel"], found["depth"]["valid_pixels"]) == (0.0, 8.0)
    assert found["point_map"]["fscore_5cm"] == 1.0
    assert found["metric_scale"] == {"scale_error": 0.0, "up_error_deg": 0.0, "heading_error_deg": 0.0}
    assert found["combined"] == pytest.approx(
        {"official_exact_match": 1 / 3, "leo_exact_match": 2 / 3, "leo_exact_match_refined": 2 / 3}
    )
    assert found["by path"] == {"exact_match": 1.0}
    assert found["kinds"]["official_exact_match_macro"] == 0.5
    assert found["kinds"]["leo_count/exact_match"] == 1.0
