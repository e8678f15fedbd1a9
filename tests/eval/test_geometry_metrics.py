"""Scores of poses, depth, scale and room frame against frozen references and cases worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from vidllm.eval.metrics.camera_pose.scores import (
    PROTOCOLS,
    accuracy_curve_area,
    align_points,
    camera_pose_scores,
    relative_pose_errors,
    trajectory_error_m,
)
from vidllm.eval.metrics.depth.scores import depth_scores
from vidllm.eval.metrics.metric_scale.scores import (
    heading_error_deg,
    metric_scale_scores,
    scale_error,
    up_error_deg,
)


GOLDENS = Path(__file__).parents[1] / "goldens" / "geometry"


def golden(name):
    return json.loads((GOLDENS / name).read_text(encoding="utf-8"))


def square(matrices):
    matrices = np.array(matrices)
    return np.concatenate([matrices, np.tile([[[0, 0, 0, 1.0]]], (len(matrices), 1, 1))], axis=1)


def turn_z(degrees):
    angle = np.radians(degrees)
    return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])


POSES = golden("relative_pose.json")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("number", range(len(POSES["cases"])))
def test_relative_poses_are_the_reference_s(number, protocol):
    case = POSES["cases"][number]
    predicted, true = square(case["extrinsics_pred_w2c"]), square(case["extrinsics_gt_w2c"])
    wanted = case["expected"][protocol]
    rotation, translation = relative_pose_errors(predicted, true, protocol)
    tolerance = 1e-4 if case["case"] == "perfect" else POSES["tolerance_deg"]
    np.testing.assert_allclose(rotation, wanted["rotation_error_deg"], atol=tolerance)
    np.testing.assert_allclose(translation, wanted["translation_error_deg"], atol=tolerance)
    scores = camera_pose_scores(predicted, true, protocol)
    for name in ("auc_30", "rra_30", "rta_30"):
        assert scores[name] == pytest.approx(wanted[name.upper().replace("_", "@")], abs=POSES["tolerance_scores"])
    larger = np.maximum(rotation, translation)
    for limit in (3, 5, 10, 15):
        assert accuracy_curve_area(larger, limit) == pytest.approx(wanted[f"AUC@{limit}"], abs=1e-9)


def test_edges_of_the_curve_are_the_reference_s():
    edges = POSES["auc_edges"]
    assert accuracy_curve_area(np.array(edges["max_errors_deg"])) == pytest.approx(edges["auc30_numpy"], abs=1e-12)


def test_a_translation_without_length_is_90_degrees_off():
    still, moving = np.tile(np.eye(4), (3, 1, 1)), np.tile(np.eye(4), (3, 1, 1))
    moving[:, 0, 3] = [0, 1, 3]
    rotation, translation = relative_pose_errors(still, moving)
    assert rotation.tolist() == [0, 0, 0]
    assert translation.tolist() == [90, 90, 90]
    scores = camera_pose_scores(still, moving)
    assert (scores["auc_30"], scores["rra_30"], scores["rta_30"]) == (0, 1, 0)


def test_what_is_not_finite_is_as_wrong_as_can_be():
    broken = np.tile(np.eye(4), (2, 1, 1))
    broken[1, 0, 3] = np.nan
    rotation, translation = relative_pose_errors(broken, np.tile(np.eye(4), (2, 1, 1)))
    assert translation.tolist() == [1e6]
    assert rotation.tolist() == [0.0]


def test_a_single_frame_has_no_pairs():
    assert camera_pose_scores(np.eye(4)[None], np.eye(4)[None]) == {}
    with pytest.raises(ValueError, match="got 1 and 2"):
        camera_pose_scores(np.eye(4)[None], np.tile(np.eye(4), (2, 1, 1)))
    with pytest.raises(ValueError, match=r"wanted shape \(frames, 4, 4\)"):
        camera_pose_scores(np.eye(3)[None], np.eye(3)[None])


def cam_from_world_of_tum(rows):
    """Poses of rows `time x y z qx qy qz qw`, which are camera to world."""
    poses = []
    for _, *centre, x, y, z, w in rows:
        q = np.array([x, y, z, w]) / np.linalg.norm([x, y, z, w])
        skew = np.array([[0, -q[2], q[1]], [q[2], 0, -q[0]], [-q[1], q[0], 0]])
        turn = np.eye(3) + 2 * q[3] * skew + 2 * skew @ skew
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = turn.T, -turn.T @ np.array(centre)
        poses.append(pose)
    return np.stack(poses)


@pytest.mark.parametrize("number", range(3))
def test_trajectory_errors_are_evo_s(number):
    case = golden("trajectory.json")["cases"][number]
    predicted, true = cam_from_world_of_tum(case["estimate"]), cam_from_world_of_tum(case["reference"])
    for alignment, name in (("none", "no_alignment"), ("se3", "se3"), ("sim3", "sim3")):
        wanted = case["expected"][name]["ATE_m"]["rmse"]
        assert trajectory_error_m(predicted, true, alignment) == pytest.approx(wanted, abs=1e-6)
    centres = [np.linalg.inv(poses)[:, :3, 3] for poses in (predicted, true)]
    rotation, translation, scale = align_points(*centres, with_scale=True)
    assert scale == pytest.approx(case["expected"]["sim3"]["scale"], abs=1e-6)
    np.testing.assert_allclose(rotation, case["expected"]["sim3"]["rotation"], atol=1e-6)
    np.testing.assert_allclose(translation, case["expected"]["sim3"]["translation"], atol=1e-5)
    assert camera_pose_scores(predicted, true)["ate_m"] == trajectory_error_m(predicted, true, "se3")


def test_a_camera_that_stands_still_has_the_spread_of_the_true_one_as_error():
    true = np.tile(np.eye(4), (4, 1, 1))
    true[:, 0, 3] = [0, 1, 2, 3]
    still = np.tile(np.eye(4), (4, 1, 1))
    assert trajectory_error_m(still, true) == pytest.approx(np.std([0, 1, 2, 3]))
    still[0, 0, 3] = np.inf
    assert trajectory_error_m(still, true) == np.inf


DEPTH = golden("depth.json")


@pytest.mark.parametrize("name", sorted(DEPTH["expected"]))
def test_depth_scores_are_the_reference_s(name):
    maps = np.load(GOLDENS / "depth.npz")
    for setting, wanted in DEPTH["expected"][name].items():
        alignment, limit = setting.split("|max_")
        scores = depth_scores(
            maps[f"pred_{name}"],
            maps["gt"],
            alignment.replace("_lstsq", ""),
            None if limit == "None" else float(limit),
        )
        tolerance = DEPTH["tolerance_rel"]
        if (name, setting) == ("scale_and_shift", "scale|max_None"):
            # Points hundreds of metres away are met almost exactly by the first step, and then weigh by the rounding of float32.
            tolerance = 6e-3
        assert scores["abs_rel"] == pytest.approx(wanted["abs_rel"], rel=tolerance), setting
        assert scores["delta_1"] == pytest.approx(wanted["delta1"], rel=tolerance), setting


def test_depth_by_hand():
    true = np.array([[[1.0, 2.0, 0.0], [4.0, 100.0, np.nan]]])
    predicted = np.array([[[1.2, 2.0, 9.0], [5.0, 1.0, 1.0]]])
    scores = depth_scores(predicted, true)
    assert scores["abs_rel"] == pytest.approx((0.2 + 0 + 0.25) / 3)
    # 5 / 4 is not below 1.25.
    assert scores["delta_1"] == pytest.approx(2 / 3)
    assert depth_scores(3 * predicted, true, "median")["abs_rel"] == pytest.approx((0.2 + 0 + 0.25) / 3)
    assert depth_scores(predicted, np.zeros_like(true)) == {}


@pytest.mark.parametrize("protocol", ["metric", "median", "scale", "scale_shift"])
def test_depth_that_says_nothing_is_a_number_and_wrong(protocol):
    true = np.linspace(1, 5, 24).reshape(1, 4, 6)
    for nothing in (np.zeros_like(true), np.full_like(true, np.nan), np.full_like(true, -1.0)):
        scores = depth_scores(nothing, true, protocol)
        assert np.isfinite(list(scores.values())).all()
        assert scores["delta_1"] < 0.5


@pytest.mark.parametrize(
    ("protocol", "factor", "offset"), [("metric", 1, 0), ("median", 7, 0), ("scale", 7, 0), ("scale_shift", 7, 2)]
)
def test_an_alignment_undoes_what_it_is_for(protocol, factor, offset):
    true = np.linspace(1, 5, 24).reshape(1, 4, 6)
    scores = depth_scores(factor * true + offset, true, protocol)
    assert scores["abs_rel"] == pytest.approx(0, abs=1e-9)
    assert scores["delta_1"] == 1


def test_scale_error_by_hand():
    points = np.array([[0, 0, 2.0], [0, 3, 4], [9, 9, 9]])
    mask = np.array([True, True, False])
    assert scale_error(1.5 * points, points, mask) == pytest.approx(0.5)
    assert scale_error(np.full_like(points, np.nan), points, mask) == 1.0
    assert scale_error(points, points, ~mask & mask) is None
    with pytest.raises(ValueError, match="wanted points of one shape"):
        scale_error(points[:2], points, mask)


def test_room_frame_errors_by_hand():
    annotation_from_world = np.eye(4)
    annotation_from_world[:3, :3] = turn_z(20) @ np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    room = annotation_from_world[:3, :3]
    for quarter in range(4):
        turned = turn_z(90 * quarter + 7) @ room
        assert up_error_deg(turned, annotation_from_world) == pytest.approx(0, abs=1e-6)
        assert heading_error_deg(turned, annotation_from_world) == pytest.approx(7, abs=1e-9)
    tilt = np.array([[1, 0, 0], [0, np.cos(0.1), -np.sin(0.1)], [0, np.sin(0.1), np.cos(0.1)]])
    assert up_error_deg(tilt @ room, annotation_from_world) == pytest.approx(np.degrees(0.1))
    assert heading_error_deg(tilt @ room, annotation_from_world) == pytest.approx(0, abs=1e-9)
    points, mask = np.ones((2, 3, 5, 3)), np.ones((2, 3, 5), dtype=bool)
    assert set(metric_scale_scores(points, points, mask, room, None)) == {"scale_error"}
    full = metric_scale_scores(points, points, mask, room, annotation_from_world)
    assert list(full) == ["scale_error", "up_error_deg", "heading_error_deg"]
