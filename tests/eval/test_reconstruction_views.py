"""Points, curves and pictures of a reconstruction, by hand."""

import numpy as np
import pytest

from vidllm.eval import reconstruction
from vidllm.eval.metrics.camera_pose.scores import camera_pose_scores
from vidllm.eval.metrics.point_map.scores import point_scores
from vidllm.eval.reconstruction import (
    PlainReconstruction,
    constant_reconstruction,
    point_map_scores,
    score_reconstruction,
)
from vidllm.eval.reconstruction_views import (
    ANGLES_DEG,
    DEPTH_ERRORS,
    accuracy_curves,
    depth_of_text,
    depth_text,
    mean_curves,
    scene_view,
)
from vidllm.eval.report_reconstruction import depth_picture, path_picture, views_of
from vidllm.eval.truth import SceneTruth


def turned(degrees, place):
    """cam_from_world of a camera at a place, turned about y."""
    a = np.radians(degrees)
    world_from_cam = np.eye(4)
    world_from_cam[:3, :3] = [[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]]
    world_from_cam[:3, 3] = place
    return np.linalg.inv(world_from_cam)


def truth_of(depth=None):
    poses = np.stack([turned(0, (0, 0, 0)), turned(10, (1, 0, 0)), turned(20, (1, 0, 2))]).astype(np.float32)
    intrinsics = np.tile(np.array([[8.0, 0, 4], [0, 8.0, 3], [0, 0, 1]], dtype=np.float32), (3, 1, 1))
    # x right, y down, z ahead becomes x right, y ahead, z up
    annotation = np.eye(4)
    annotation[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    depth = np.linspace(1, 4, 3 * 6 * 8, dtype=np.float32).reshape(3, 6, 8) if depth is None else depth
    return SceneTruth(poses, intrinsics, depth, annotation)


def perfect(truth, depth_factor=1.0):
    depth = truth.depth_m * np.float32(depth_factor)
    points = reconstruction._unproject(depth, truth.intrinsics_px, truth.cam_from_world)
    return PlainReconstruction(truth.cam_from_world, depth, points, np.eye(3))


def test_points_are_compared_where_the_truth_is_known_and_nothing_is_aligned():
    truth = truth_of()
    scores = score_reconstruction(perfect(truth), truth)["metric"]
    assert (scores["fscore_5cm"], scores["accuracy_m"], scores["completeness_m"]) == (1.0, 0.0, 0.0)
    points = perfect(truth).points_world.astype(np.float64)
    mask = np.ones(points.shape[:-1], dtype=bool)
    near, far = (point_map_scores(points + [0, shift, 0], points, mask) for shift in (0.001, 3.0))
    assert near["fscore_5cm"] > 0.99
    assert near["accuracy_m"] == pytest.approx(0.001, abs=1e-9)
    assert far["fscore_5cm"] == 0
    # what is predicted where nothing is known costs nothing; what is predicted nowhere finds nothing
    mask[0] = False
    wild = points.copy()
    wild[0] += 100
    assert point_map_scores(wild, points, mask)["fscore_5cm"] == 1
    wild[1:] = np.nan
    assert point_map_scores(wild, points, mask) == {"fscore_5cm": 0.0}
    wild[1:2] = points[1:2]
    half = point_map_scores(wild, points, mask)
    by_hand = point_scores(points[1].reshape(-1, 3), points[1:].reshape(-1, 3))
    assert half["fscore_5cm"] == by_hand["fscore_5cm"] < 1
    no_depth = SceneTruth(truth.cam_from_world, truth.intrinsics_px, None, None)
    assert "fscore_5cm" not in score_reconstruction(perfect(truth), no_depth).get("metric", {})
    unknown = truth_of(np.zeros_like(truth.depth_m))
    assert "fscore_5cm" not in score_reconstruction(perfect(truth), unknown)["metric"]


def test_of_many_points_every_nth_is_compared(monkeypatch):
    rng = np.random.default_rng(0)
    true = rng.uniform(0, 3, (1, 40, 50, 3))
    found = true + rng.normal(size=true.shape) * 0.03
    mask = rng.random(true.shape[:-1]) < 0.8
    monkeypatch.setattr(reconstruction, "MOST_POINTS", 300)
    some = point_map_scores(found, true, mask)
    assert some == point_map_scores(found, true, mask)
    kept = np.flatnonzero(mask)[np.linspace(0, mask.sum() - 1, 300).astype(int)]
    by_hand = point_scores(found.reshape(-1, 3)[kept], true.reshape(-1, 3)[kept])
    assert some["accuracy_m"] == by_hand["accuracy"]
    # the same pixels of both: where both are right all are found
    assert point_map_scores(true, true, mask)["fscore_5cm"] == 1


def test_curves_by_hand():
    truth = truth_of()
    curves = accuracy_curves(perfect(truth, 1.1), truth)
    assert curves["pairs"] == [1.0] * len(ANGLES_DEG)
    # all depth is off by a tenth, which rounding may put on either side of the fourth limit
    assert (curves["depth"][:3], curves["depth"][4:]) == ([0.0] * 3, [1.0] * 16)
    # the last camera turned 7 degrees more: two of three pairs are off by that, in angle or way
    wrong = perfect(truth)
    poses = wrong.cam_from_world.copy()
    poses[2] = turned(27, (1, 0, 2))
    curves = accuracy_curves(PlainReconstruction(poses, wrong.depth, wrong.points_world, np.eye(3)), truth)
    assert curves["pairs"][5] == pytest.approx(1 / 3, abs=1e-6)
    assert curves["pairs"][7] == 1.0
    assert curves["depth"] == [1.0] * len(DEPTH_ERRORS)


def test_the_curve_of_pairs_is_what_the_area_is_under():
    truth = truth_of()
    constant = constant_reconstruction(truth, 2.0)
    curves = accuracy_curves(constant, truth)
    area = camera_pose_scores(constant.cam_from_world, truth.cam_from_world)["auc_30"]
    # no error is a whole degree
    assert np.mean(curves["pairs"]) == pytest.approx(area, abs=1e-6)
    nothing = PlainReconstruction(
        truth.cam_from_world, np.full_like(truth.depth_m, np.nan), constant.points_world, np.eye(3)
    )
    assert accuracy_curves(nothing, truth)["depth"] == [0.0] * len(DEPTH_ERRORS)
    one = SceneTruth(truth.cam_from_world[:1], truth.intrinsics_px[:1], None, None)
    assert accuracy_curves(perfect(truth), one) == {}
    assert mean_curves([{"pairs": [0.0, 1.0]}, {"pairs": [1.0, 1.0], "depth": [0.5]}, {}]) == {
        "pairs": [0.5, 1.0],
        "depth": [0.5],
    }


def test_depth_survives_being_written_down():
    depth = np.array([[0.0, 0.0014, 1.2345], [65.535, 100.0, np.nan]])
    assert depth_of_text(depth_text(depth)).tolist() == [[0.0, 0.001, 1.234], [65.535, 65.535, 0.0]]
    assert depth_of_text(depth_text(np.ones((100, 300)))).shape == (34, 100)


def test_the_way_from_above_and_its_picture():
    truth = truth_of()
    view = scene_view(perfect(truth), truth)
    assert view["path_true"] == view["path_predicted"] == [[0, 0], [1, 0], [1, 2]]
    assert depth_of_text(view["depth_true"]) == pytest.approx(truth.depth_m[1], abs=6e-4)
    picture = np.asarray(path_picture([[0, 0], [2, 0]], [[0, 0], [0, 2]]))
    green, red = (np.argwhere((picture == colour).all(-1)) for colour in ((20, 160, 60), (210, 60, 30)))
    # x to the right, y up
    assert np.ptp(green[:, 1]) > 5 * np.ptp(green[:, 0])
    assert np.ptp(red[:, 0]) > 5 * np.ptp(red[:, 1])
    assert red[:, 0].min() < green[:, 0].min()
    still = path_picture([[0, 0]], [[0, 0]])
    assert still.size == picture.shape[1::-1]


def test_near_is_dark_and_the_unknown_grey():
    picture = np.asarray(depth_picture(np.array([[0.0, 1.0], [5.0, 9.0]]), (1.0, 5.0)))
    left_above, right_above = picture[0, 0].tolist(), picture[0, -1].tolist()
    left_below, right_below = picture[-1, 0].tolist(), picture[-1, -1].tolist()
    assert (left_above, right_above, left_below) == ([200] * 3, [48, 18, 59], [180, 20, 20])
    assert right_below == left_below


def test_best_and_worst_are_shown():
    truth = truth_of()
    view = scene_view(perfect(truth), truth)
    records = [{"id": name, "scores": {"vggt_i_inv_j": {"auc_30": auc}}, "view": view} for name, auc in (("a", 0.2), ("b", 0.9), ("c", 0.1))]  # fmt: skip
    assert [(found.title, found.scene) for found in views_of(records)] == [("best poses", "b"), ("worst poses", "c")]
    assert [found.scene for found in views_of(records[:1])] == ["a"]
    assert [len(found.pictures) for found in views_of(records)] == [3, 3]
    assert views_of([{"id": "old", "scores": {}}]) == []
