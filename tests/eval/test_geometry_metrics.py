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
    pair_scores,
    relative_pose_errors,
    trajectory_error_m,
)
from vidllm.eval.metrics.camera_pose.trajectory import (
    error_statistics,
    paired_by_time,
    sampled_frames,
    trajectory_errors,
    trajectory_scores,
    tum_poses,
)
from vidllm.eval.metrics.depth.scores import depth_errors, depth_scores
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
    for limit in (3, 5, 10, 15, 30):
        assert accuracy_curve_area(larger, limit) == pytest.approx(wanted[f"AUC@{limit}"], abs=1e-9)
    assert accuracy_curve_area(larger, 30, "torch_histc") == pytest.approx(wanted["AUC@30_torch_histc"], abs=1e-9)
    for limit in (5, 10, 15, 30):
        scores = pair_scores(rotation, translation, limit)
        assert scores[f"rra_{limit}"] == pytest.approx(wanted[f"RRA@{limit}"], abs=1e-9)
        assert scores[f"rta_{limit}"] == pytest.approx(wanted[f"RTA@{limit}"], abs=1e-9)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pooled_pairs_are_the_reference_s(protocol):
    cases = [case for case in POSES["cases"] if case["case"] == "normal"]
    errors = [relative_pose_errors(square(c["extrinsics_pred_w2c"]), square(c["extrinsics_gt_w2c"]), protocol) for c in cases]  # fmt: skip
    rotation, translation = (np.concatenate(kind) for kind in zip(*errors, strict=True))
    for limit in (5, 15, 30):
        wanted = POSES["pooled_over_normal_cases"][protocol][f"AUC@{limit}"]
        assert pair_scores(rotation, translation, limit)[f"auc_{limit}"] == pytest.approx(wanted, abs=1e-9)


EDGES = golden("edges.json")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", EDGES["relative_pose"]["cases"], ids=lambda case: case["case"])
def test_unusual_cameras_are_the_reference_s(case, protocol):
    """Cameras at one place among them: their direction is rounding, which must be the reference's rounding."""
    wanted = case["expected"][protocol]
    rotation, translation = relative_pose_errors(
        square(case["extrinsics_pred_w2c"]), square(case["extrinsics_gt_w2c"]), protocol
    )
    np.testing.assert_allclose(rotation, wanted["rotation_error_deg"], atol=1e-5)
    np.testing.assert_allclose(translation, wanted["translation_error_deg"], atol=1e-5)
    assert pair_scores(rotation, translation)["auc_30"] == pytest.approx(wanted["AUC@30"], abs=1e-9)


def test_the_frames_of_the_pose_protocol_are_the_reference_s():
    sampling = POSES["frame_sampling"]
    assert [ids.tolist() for ids in sampled_frames(sampling["sequence_lengths"])] == sampling["ids"]
    with pytest.raises(ValueError, match="wanted sequences of at least 10 frames; got one of 9"):
        sampled_frames([50, 9])


def test_edges_of_the_curve_are_the_reference_s():
    edges = POSES["auc_edges"]
    errors = np.array(edges["max_errors_deg"])
    assert accuracy_curve_area(errors) == pytest.approx(edges["auc30_numpy"], abs=1e-12)
    assert accuracy_curve_area(errors, 30, "torch_histc") == pytest.approx(edges["auc30_torch_histc"], abs=1e-12)
    with pytest.raises(ValueError, match="at least one pair of frames"):
        accuracy_curve_area(np.zeros(0))
    with pytest.raises(ValueError, match="wanted one of numpy, torch_histc"):
        accuracy_curve_area(errors, 30, "histc")


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
    return tum_poses(np.array(rows))[1]


def test_tum_rows_and_pairs_by_time():
    """Shuffled rows, of which one trajectory lacks some, pair up to the same errors."""
    case = golden("trajectory.json")["cases"][0]
    estimate, reference = np.array(case["estimate"]), np.array(case["reference"])
    rng = np.random.default_rng(0)
    fewer = rng.permutation(estimate)[:50]
    times, poses = tum_poses(
        fewer * np.array([1, 1, 1, 1, -3, -3, -3, -3])
    )  # a quaternion's length and sign mean nothing
    true_times, true = tum_poses(rng.permutation(reference))
    own, other = paired_by_time(times, true_times)
    assert len(own) == 50
    rows = np.isin(estimate[:, 0], fewer[:, 0])
    wanted = trajectory_scores(cam_from_world_of_tum(estimate[rows]), cam_from_world_of_tum(reference[rows]), "sim3")
    assert trajectory_scores(poses[own], true[other], "sim3") == pytest.approx(wanted)
    # half a turn about z, one metre to the left
    _, (pose,) = tum_poses(np.array([[0, 1, 2, 3, 0, 0, 2, 0]]))
    np.testing.assert_allclose(
        np.linalg.inv(pose), [[-1, 0, 0, 1], [0, -1, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]], atol=1e-12
    )
    with pytest.raises(ValueError, match=r"wanted shape \(frames, 8\); got \(2, 7\)"):
        tum_poses(np.zeros((2, 7)))
    with pytest.raises(ValueError, match="row 1: wanted a quaternion"):
        tum_poses(np.array([[0, 0, 0, 0, 0, 0, 0, 1.0], [1, 0, 0, 0, 0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="each time stamp once"):
        paired_by_time(np.array([1.0, 1.0]), np.array([1.0]))
    with pytest.raises(ValueError, match="both trajectories have; got none"):
        paired_by_time(np.array([1.0]), np.array([2.0]))


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(("alignment", "name"), [("none", "no_alignment"), ("se3", "se3"), ("sim3", "sim3")])
def test_every_statistic_of_trajectories_is_evo_s(number, alignment, name):
    case = golden("trajectory.json")["cases"][number]
    predicted, true = cam_from_world_of_tum(case["estimate"]), cam_from_world_of_tum(case["reference"])
    errors, scores = trajectory_errors(predicted, true, alignment), trajectory_scores(predicted, true, alignment)
    for theirs, ours in (("ATE_m", "ate_m"), ("APE_rot_deg", "ape_rot_deg"), ("RPE_trans_m", "rpe_trans_m"), ("RPE_rot_deg", "rpe_rot_deg")):  # fmt: skip
        wanted, found = case["expected"][name][theirs], error_statistics(errors[ours])
        assert set(found) == set(wanted)
        for statistic, value in wanted.items():
            assert found[statistic] == pytest.approx(value, rel=1e-6, abs=1e-6), (theirs, statistic)
        assert scores[ours] == found["rmse"]
    if name == "se3":
        rotation, translation, scale = align_points(*(np.linalg.inv(p)[:, :3, 3] for p in (predicted, true)), False)
        assert scale == case["expected"]["se3"]["scale"] == 1.0
        np.testing.assert_allclose(rotation, case["expected"]["se3"]["rotation"], atol=1e-6)
        np.testing.assert_allclose(translation, case["expected"]["se3"]["translation"], atol=1e-5)


def test_trajectories_without_steps_or_with_gaps():
    one = np.eye(4)[None]
    assert trajectory_scores(one, one) == {}
    assert {name: len(values) for name, values in trajectory_errors(one, one).items()} == {
        "ate_m": 1, "ape_rot_deg": 1, "rpe_trans_m": 0, "rpe_rot_deg": 0,
    }  # fmt: skip
    broken = np.tile(np.eye(4), (3, 1, 1))
    broken[1, 0, 3] = np.nan
    scores = trajectory_scores(broken, np.tile(np.eye(4), (3, 1, 1)), "sim3")
    assert set(scores.values()) == {np.inf}
    assert error_statistics(np.array([np.inf, np.inf]))["std"] == np.inf
    with pytest.raises(ValueError, match="at least one error"):
        error_statistics(np.zeros(0))
    with pytest.raises(ValueError, match="got 1 and 3"):
        trajectory_errors(one, broken)
    with pytest.raises(ValueError, match="alignment: wanted one of none, se3, sim3; got 'horn'"):
        trajectory_errors(one, one, "horn")


@pytest.mark.parametrize("spread", [(1, 0, 0), (0, 0, 0)])
def test_centres_on_a_line_or_at_a_point_are_aligned(spread):
    """evo refuses these; the rotation about the line is free, the distances are not."""
    true = np.tile(np.eye(4), (5, 1, 1))
    true[:, :3, 3] = np.arange(5)[:, None] * np.array(spread) + 0.5
    predicted = true.copy()
    predicted[:, :3, 3] = 2 * true[:, :3, 3] + 1
    assert trajectory_scores(predicted, true, "sim3")["ate_m"] == pytest.approx(0, abs=1e-9)


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


DEPTH_NAMES = {
    "abs_rel": "abs_rel", "sq_rel": "sq_rel_m", "rmse": "rmse_m", "log_rmse": "log_rmse", "delta1": "delta_1", "delta2": "delta_2",
    "delta3": "delta_3", "valid_pixels": "valid_pixels",
}  # fmt: skip


def check_depth(predicted, true, expected, tolerance, least=1e-9):
    for setting, wanted in expected.items():
        alignment, limit = setting.replace("_lstsq", "").split("|max_")
        limit_m = None if limit == "None" else float(limit)
        errors = depth_errors(predicted, true, alignment, limit_m)
        assert set(wanted) == set(DEPTH_NAMES)
        for name, value in wanted.items():
            assert errors[DEPTH_NAMES[name]] == pytest.approx(value, rel=tolerance, abs=least), (setting, name)
        two = depth_scores(predicted, true, alignment, limit_m)
        assert two == {"abs_rel": errors["abs_rel"], "delta_1": errors["delta_1"]}


@pytest.mark.parametrize("name", sorted(DEPTH["expected"]))
def test_depth_errors_are_the_reference_s(name):
    """`scale_and_shift` with far pixels under `scale` too: the steps are rounded as the reference's are."""
    with np.load(GOLDENS / "depth.npz") as maps:
        check_depth(maps[f"pred_{name}"], maps["gt"], DEPTH["expected"][name], DEPTH["tolerance_rel"])


@pytest.mark.parametrize("case", EDGES["depth"]["cases"], ids=lambda case: case["case"])
def test_unusual_depth_is_the_reference_s(case):
    predicted, true = (np.array(case[name], dtype=np.float32)[None] for name in ("pred", "gt"))
    check_depth(predicted, true, case["expected"], 1e-5, least=1e-6)


def test_depth_is_scored_in_the_precision_it_comes_in():
    """A ratio of 1.25 that float32 cannot tell from 1.25 is a miss in float32, and not where more digits are known."""
    true = np.linspace(3, 4, 1000, dtype=np.float32)
    predicted = np.float32(1.25) * true
    chosen = (predicted / true == np.float32(1.25)) & (predicted.astype(np.float64) < 1.25 * true.astype(np.float64))
    predicted, true = predicted[chosen].reshape(1, 1, -1), true[chosen].reshape(1, 1, -1)
    assert true.size > 100
    assert depth_errors(predicted, true)["delta_1"] == 0.0
    assert depth_errors(predicted.astype(np.float64), true)["delta_1"] == 1.0
    assert depth_errors(predicted.astype(np.float16), true)["valid_pixels"] == true.size


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


def test_a_negative_median_is_a_factor_and_none_leaves_depth_as_it_is():
    """As the reference: there a negative median turns depth around, and a negative factor of `scale` becomes 1e-3."""
    true = np.linspace(1, 5, 25).reshape(1, 5, 5)
    assert depth_scores(-2 * true, true, "median") == pytest.approx({"abs_rel": 0, "delta_1": 1}, abs=1e-12)
    shrunk = depth_errors(-2 * true, true, "scale")
    assert shrunk["abs_rel"] == pytest.approx(1 + 2e-3)
    # more than half of it 0: no median to divide by
    mostly = np.where(np.arange(25).reshape(true.shape) < 13, 0.0, true)
    assert depth_scores(mostly, true, "median") == depth_scores(mostly, true, "metric")
    assert depth_scores(0 * true, true, "scale") == depth_scores(0 * true, true, "metric")


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
