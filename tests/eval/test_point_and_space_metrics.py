"""Point clouds against frozen references and a slow version; VSI-Bench by worked examples."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidllm.eval.metrics.point_map.scores import normal_consistency, point_scores, voxel_means
from vidllm.eval.metrics.vsi_bench.scores import first_word, relative_accuracy, vsi_bench_scores


GOLDENS = Path(__file__).parents[1] / "goldens" / "geometry"
CASES = ("noisy", "partial", "offset", "outliers", "far")


@pytest.fixture(scope="module")
def clouds():
    with np.load(GOLDENS / "points.npz") as data:
        return {name: data[name] for name in data.files}


@pytest.fixture(scope="module")
def wanted():
    return json.loads((GOLDENS / "points.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("profile", "voxel"), [("voxel_2cm_threshold_5cm", 0.02), ("no_downsampling_threshold_5cm", None)]
)
def test_points_equal_the_reference(clouds, wanted, case, profile, voxel):
    scores = point_scores(clouds[f"pred_{case}"], clouds["gt"], 0.05, voxel)
    expected = wanted[case][profile]
    names = {"acc": "accuracy", "comp": "completeness", "overall": "chamfer", "precision": "precision", "recall": "recall", "fscore": "fscore"}  # fmt: skip
    for theirs, ours in names.items():
        assert scores[ours] == pytest.approx(expected[theirs], abs=1e-6), theirs
    assert scores["fscore_5cm"] == scores["fscore"]
    if voxel is None:
        assert scores["accuracy_median"] == pytest.approx(wanted[case]["accuracy_median"], abs=1e-6)
        assert scores["completeness_median"] == pytest.approx(wanted[case]["completeness_median"], abs=1e-6)
        assert scores["accuracy"] == pytest.approx(wanted[case]["accuracy_mean"], abs=1e-6)
        assert scores["completeness"] == pytest.approx(wanted[case]["completeness_mean"], abs=1e-6)
        assert scores["recall"] == pytest.approx(wanted[case]["completion_ratio_5cm"], abs=1e-6)
        assert len(clouds[f"pred_{case}"]) == wanted[case]["n_pred"]


@pytest.mark.parametrize("case", CASES)
def test_normals_equal_the_reference(clouds, wanted, case):
    scores = normal_consistency(
        clouds[f"pred_{case}"], clouds[f"pred_normals_{case}"], clouds["gt"], clouds["gt_normals"]
    )
    names = {"nc1_mean": "normals_accuracy", "nc1_median": "normals_accuracy_median", "nc2_mean": "normals_completeness", "nc2_median": "normals_completeness_median"}  # fmt: skip
    for theirs, ours in names.items():
        assert scores[ours] == pytest.approx(wanted[case][theirs], abs=1e-6), theirs


@pytest.mark.parametrize("case", CASES)
def test_cells_are_as_many_as_the_reference_s(clouds, wanted, case):
    counts = wanted[case]["points_after_voxel"]
    assert len(voxel_means(clouds[f"pred_{case}"], 0.02)) == counts["pred"]
    assert len(voxel_means(clouds["gt"], 0.02)) == counts["gt"]


def slow_scores(predicted, true, threshold):
    distances = np.linalg.norm(predicted[:, None] - true[None], axis=-1)
    to_true, to_predicted = distances.min(axis=1), distances.min(axis=0)
    precision, recall = (to_true < threshold).mean(), (to_predicted < threshold).mean()
    return to_true.mean(), to_predicted.mean(), precision, recall


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 30))
def test_points_equal_the_slow_version(seed, count, other):
    rng = np.random.default_rng(seed)
    predicted, true = rng.normal(size=(count, 3)), rng.normal(size=(other, 3))
    scores = point_scores(predicted, true, 0.4, None)
    accuracy, completeness, precision, recall = slow_scores(predicted, true, 0.4)
    assert scores["accuracy"] == pytest.approx(accuracy)
    assert scores["completeness"] == pytest.approx(completeness)
    assert (scores["precision"], scores["recall"]) == (pytest.approx(precision), pytest.approx(recall))
    # the other way round, the two change places
    back = point_scores(true, predicted, 0.4, None)
    assert (back["accuracy"], back["fscore"]) == (pytest.approx(completeness), pytest.approx(scores["fscore"]))


def test_a_cloud_equals_itself_and_wrong_clouds_are_refused():
    cloud = np.random.default_rng(1).normal(size=(50, 3))
    best = point_scores(cloud, cloud, voxel_size=None)
    assert (best["fscore"], best["chamfer"]) == (1.0, 0.0)
    for wrong in (np.zeros((0, 3)), np.zeros((4, 2)), np.full((2, 3), np.nan)):
        with pytest.raises(ValueError, match="predicted: wanted at least one finite point"):
            point_scores(wrong, cloud)
    with pytest.raises(ValueError, match="wanted one per point"):
        normal_consistency(cloud, cloud[:3], cloud, cloud)
    with pytest.raises(ValueError, match="wanted a positive threshold"):
        point_scores(cloud, cloud, 0.0)
    with pytest.raises(ValueError, match="wanted a positive size"):
        voxel_means(cloud, 0.0)


# ---------------------------------------------------------------------- VSI-Bench


def test_relative_accuracy_by_hand():
    """Of ten: 5 % off is near enough for all thresholds, 10 % for all but one, 50 % for the widest alone."""
    assert relative_accuracy("9.5", 10) == 1.0
    assert relative_accuracy("9.0", 10) == pytest.approx(0.9)
    assert relative_accuracy("15", 10) == pytest.approx(0.1)
    assert relative_accuracy("15.1", 10) == 0.0
    assert relative_accuracy("10. metres", 10) == 1.0
    for nonsense in ("ten", "", "nan", "inf", "-inf"):
        assert relative_accuracy(nonsense, 10) == 0.0
    with pytest.raises(ValueError, match="other than 0"):
        relative_accuracy("1", 0.0)


def test_first_words():
    assert [first_word(text) for text in ("B. left", "B", " B", "b.", "")] == ["B", "B", "", "b", ""]


def test_tasks_count_alike_and_directions_as_one():
    scores = vsi_bench_scores(
        ["A", "b.", "C", "C", "4", "2"],
        ["A", "B", "A", "C", "4", "4"],
        [
            "object_rel_direction_easy", "object_rel_direction_medium", "object_rel_direction_hard", "route_planning",
            "object_counting", "object_counting",
        ],
    )  # fmt: skip
    assert scores == {
        "route_planning": 1.0,
        "object_counting": pytest.approx((1 + 0.1) / 2),
        "object_rel_direction": pytest.approx(2 / 3),
        "overall": pytest.approx((1 + 0.55 + 2 / 3) / 3),
    }


def test_a_level_of_directions_without_questions_counts_nothing():
    """The benchmark's code divides by three whatever is there, and takes the task into the mean even where nothing is."""
    levels = ["object_rel_direction_easy", "object_rel_direction_hard"]
    scores = vsi_bench_scores(["A", "B"], ["A", "B"], levels)
    assert scores == pytest.approx({"object_rel_direction": 2 / 3, "overall": 2 / 3})
    scores = vsi_bench_scores(["A"], ["A"], ["route_planning"])
    assert scores == {"route_planning": 1.0, "object_rel_direction": 0.0, "overall": 0.5}


def test_letters_are_compared_as_the_benchmark_compares_them():
    """Only the first word is read; a line break is part of it, and the truth is taken as it is."""
    said = ["a", "B. left", "(A)", "A\n", "A,", "", " A"]
    scores = [vsi_bench_scores([text], ["A"], ["route_planning"])["route_planning"] for text in said]
    assert scores == [1, 0, 0, 1, 0, 0, 0]
    assert vsi_bench_scores(["A"], [" A"], ["route_planning"])["route_planning"] == 0


def test_numbers_are_compared_as_the_benchmark_compares_them():
    said = ["10", "10 m", "10m", "1e1", "-10", "1_0", "10."]
    assert [relative_accuracy(text, 10.0) for text in said] == [1, 1, 0, 1, 0, 1, 1]
    # the error of a negative truth is negative, and so never too large
    assert relative_accuracy("5", -1.0) == 1.0


def test_wrong_columns():
    with pytest.raises(ValueError, match="one length"):
        vsi_bench_scores(["A"], ["A", "B"], ["route_planning"])
    with pytest.raises(ValueError, match=r"wanted a question type of .*; got 'walking'"):
        vsi_bench_scores(["A"], ["A"], ["walking"])
    with pytest.raises(ValueError, match="predictions, row 0: wanted a text; got None"):
        vsi_bench_scores([None], ["A"], ["route_planning"])
    with pytest.raises(ValueError, match="object_counting: wanted a number as ground truth; got None"):
        vsi_bench_scores(["4"], [None], ["object_counting"])
    with pytest.raises(ValueError, match="object_counting: wanted a number as ground truth; got 'four'"):
        vsi_bench_scores(["4"], ["four"], ["object_counting"])
