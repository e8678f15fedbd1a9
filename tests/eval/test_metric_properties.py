"""What must hold of every metric whatever the numbers: overlaps, alignments, areas under curves, matchings, texts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidllm.eval.metrics.answers import clean_answer, means_by_kind, refined_match
from vidllm.eval.metrics.camera_pose.scores import (
    PROTOCOLS,
    accuracy_curve_area,
    align_points,
    pair_scores,
    relative_pose_errors,
    trajectory_error_m,
)
from vidllm.eval.metrics.camera_pose.trajectory import trajectory_errors
from vidllm.eval.metrics.depth.scores import align_depth, depth_errors
from vidllm.eval.metrics.metric_scale.scores import heading_error_deg, scale_error, up_error_deg
from vidllm.eval.metrics.point_map.scores import point_scores, voxel_means
from vidllm.eval.metrics.scan2cap.captions import best_proposals
from vidllm.eval.metrics.scan2cap.toolbox import BOX_ORDER, assignment_score, matched_overlap
from vidllm.eval.metrics.scanqa.scores import member_match, scanqa_scores
from vidllm.eval.metrics.scanrefer.scores import scanrefer_counts, scanrefer_iou, scanrefer_scores
from vidllm.eval.metrics.text_scorers import one_line
from vidllm.eval.metrics.vsi_bench.scores import relative_accuracy


few = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
numbers = st.floats(-10, 10, allow_nan=False)
edges = st.floats(0, 4, allow_nan=False)
boxes = st.tuples(numbers, numbers, numbers, edges, edges, edges).map(np.array)
texts = st.text(st.characters(codec="utf-8"), max_size=12)


def corners(box):
    return np.array(BOX_ORDER) / 2 * box[3:] + box[:3]


def rotation(rng):
    matrix, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return matrix * np.sign(np.linalg.det(matrix))


def cameras(rng, count):
    poses = np.tile(np.eye(4), (count, 1, 1))
    for pose in poses:
        pose[:3, :3], pose[:3, 3] = rotation(rng), rng.normal(size=3)
    return poses


def moved(rng, scale=1.0):
    """A change of world: `poses @ moved` are the same cameras seen from another world."""
    change = np.eye(4)
    change[:3, :3], change[:3, 3] = rotation(rng), scale * rng.normal(size=3)
    return change


# ---------------------------------------------------------------------- overlap


def slow_iou(a, b):
    """Axis by axis, number by number."""
    shared, volume_a, volume_b = 1.0, 1.0, 1.0
    for axis in range(3):
        low = max(a[axis] - a[3 + axis] / 2, b[axis] - b[3 + axis] / 2)
        high = min(a[axis] + a[3 + axis] / 2, b[axis] + b[3 + axis] / 2)
        shared *= max(high - low, 0.0)
        volume_a, volume_b = volume_a * a[3 + axis], volume_b * b[3 + axis]
    return shared / (volume_a + volume_b - shared + 1e-8)


@few
@given(boxes, boxes)
def test_overlap_is_the_slow_one_symmetric_and_bounded(a, b):
    overlap = float(scanrefer_iou(a, b))
    assert overlap == pytest.approx(slow_iou(a, b), abs=1e-9)
    assert overlap == float(scanrefer_iou(b, a))
    assert 0 <= overlap <= 1
    apart = b.copy()
    apart[0] = a[0] + (a[3] + b[3]) / 2 + 1
    assert scanrefer_iou(a, apart) == 0


@few
@given(boxes, seeds)
def test_overlap_with_itself_and_of_corners_in_any_order(box, seed):
    volume = float(box[3:].prod())
    assert float(scanrefer_iou(box, box)) == pytest.approx(volume / (volume + 1e-8), abs=1e-6)
    shuffled = np.random.default_rng(seed).permutation(corners(box))
    other = box + np.array([0.3, -0.2, 0.1, 0.5, 0.5, 0.5])
    assert float(scanrefer_iou(shuffled, other)) == pytest.approx(float(scanrefer_iou(box, other)), abs=1e-9)
    mirrored = np.concatenate([box[:3], -box[3:]])
    assert float(scanrefer_iou(mirrored, other)) == float(scanrefer_iou(box, other))


@few
@given(boxes, boxes, numbers)
def test_overlap_does_not_depend_on_the_place(a, b, shift):
    there = np.array([shift, -shift, 2 * shift, 0, 0, 0])
    assert float(scanrefer_iou(a + there, b + there)) == pytest.approx(float(scanrefer_iou(a, b)), abs=1e-4)


@few
@given(boxes, boxes)
def test_the_toolbox_s_overlap_is_the_same_but_for_rounding(a, b):
    wide_a, wide_b = a + np.array([0, 0, 0, 0.1, 0.1, 0.1]), b + np.array([0, 0, 0, 0.1, 0.1, 0.1])
    found = matched_overlap(corners(wide_a)[None], corners(wide_b)[None])[0]
    assert found == pytest.approx(float(scanrefer_iou(wide_a, wide_b)), abs=1e-3)
    score = assignment_score(corners(wide_a)[None], corners(wide_b)[None])[0, 0]
    low = np.minimum(wide_a[:3] - wide_a[3:] / 2, wide_b[:3] - wide_b[3:] / 2)
    high = np.maximum(wide_a[:3] + wide_a[3:] / 2, wide_b[:3] + wide_b[3:] / 2)
    assert score == pytest.approx((wide_a[3:].prod() + wide_b[3:].prod()) / (high - low).prod() - 1, abs=1e-9)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", range(6))
def test_a_box_that_is_not_finite_is_a_miss(broken, place):
    true = np.array([0, 0, 0, 1.0, 1, 1])
    wrong = true.copy()
    wrong[place] = broken
    assert scanrefer_scores([wrong, true], [true, true]) == {"acc_0.25": 0.5, "acc_0.5": 0.5}
    with pytest.raises(ValueError, match="references, row 1: wanted a finite box"):
        scanrefer_scores([true, true], [true, wrong])


@few
@given(st.lists(st.tuples(boxes, boxes, st.booleans(), st.booleans()), min_size=1, max_size=12), seeds)
def test_parts_of_scanrefer_make_the_whole_in_any_order(rows, seed):
    def score(rows):
        said, true, multiple, others = (list(column) for column in zip(*rows, strict=True))
        kinds = ["multiple" if mark else "unique" for mark in multiple]
        return scanrefer_scores(said, true, kinds, in_others=others), scanrefer_counts(kinds, others)

    scores, counts = score(rows)
    assert counts["all"] == len(rows) == counts["unique"] + counts["multiple"]
    assert set(scores) == {f"{'' if part == 'all' else part + '/'}acc_{t}" for part in counts for t in (0.25, 0.5)}
    for metric in ("acc_0.25", "acc_0.5"):
        for parts in (("unique", "multiple"), ("in_others", "not_in_others")):
            total = sum(counts[part] * scores[f"{part}/{metric}"] for part in parts)
            assert total / len(rows) == pytest.approx(scores[metric])
    again, _ = score([rows[number] for number in np.random.default_rng(seed).permutation(len(rows))])
    assert again == pytest.approx(scores)
    assert scores["acc_0.5"] <= scores["acc_0.25"]


# ---------------------------------------------------------------------- alignment


@few
@given(seeds, st.integers(3, 12), st.floats(0.01, 100))
def test_alignment_undoes_a_similarity(seed, count, factor):
    rng = np.random.default_rng(seed)
    points, turn, shift = rng.normal(size=(count, 3)), rotation(rng), rng.normal(size=3)
    target = factor * points @ turn.T + shift
    found_turn, found_shift, found_factor = align_points(points, target, with_scale=True)
    np.testing.assert_allclose(found_factor * points @ found_turn.T + found_shift, target, atol=1e-8 * max(factor, 1))
    assert found_factor == pytest.approx(factor)
    np.testing.assert_allclose(found_turn, turn, atol=1e-6)


@few
@given(seeds, st.integers(2, 12))
def test_alignment_is_a_rotation_and_the_more_is_free_the_less_is_left(seed, count):
    rng = np.random.default_rng(seed)
    predicted, true = cameras(rng, count), cameras(rng, count)
    for with_scale in (False, True):
        turn, _, scale = align_points(predicted[:, :3, 3], true[:, :3, 3], with_scale)
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(turn) == pytest.approx(1)
        assert scale > 0 or with_scale
    none, rigid, similar = (trajectory_error_m(predicted, true, name) for name in ("none", "se3", "sim3"))
    assert similar <= rigid + 1e-9 <= none + 2e-9
    # nothing nearby is better
    best, centres = rigid**2, np.linalg.inv(predicted)[:, :3, 3]
    turn, shift, _ = align_points(centres, np.linalg.inv(true)[:, :3, 3], with_scale=False)
    nearby = centres @ turn.T + shift + 0.01 * rng.normal(size=3)
    assert ((nearby - np.linalg.inv(true)[:, :3, 3]) ** 2).sum(axis=1).mean() >= best - 1e-12


@few
@given(seeds, st.integers(3, 8), st.floats(0.01, 100))
def test_worlds_and_scales_do_not_matter_where_they_should_not(seed, count, factor):
    rng = np.random.default_rng(seed)
    predicted, true = cameras(rng, count), cameras(rng, count)
    elsewhere = predicted @ moved(rng)
    elsewhere[:, :3, 3] *= factor
    for protocol in ("vggt_i_inv_j", "pi3_j_inv_i"):
        for one, other in zip(
            relative_pose_errors(predicted, true, protocol),
            relative_pose_errors(elsewhere, true, protocol),
            strict=True,
        ):
            np.testing.assert_allclose(one, other, atol=1e-4)
    before, after = (trajectory_errors(poses, true, "sim3") for poses in (predicted, elsewhere))
    for name, values in before.items():
        np.testing.assert_allclose(values, after[name], atol=1e-5)


@few
@given(seeds, st.sampled_from(PROTOCOLS))
def test_relative_errors_of_swapped_sides_are_equal(seed, protocol):
    rng = np.random.default_rng(seed)
    predicted, true = cameras(rng, 5), cameras(rng, 5)
    for one, other in zip(
        relative_pose_errors(predicted, true, protocol), relative_pose_errors(true, predicted, protocol), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)
        assert ((one >= 0) & (one <= 180)).all()


@few
@given(seeds, st.floats(0.05, 20), st.floats(-1, 1))
def test_depth_alignments_do_not_see_what_they_undo(seed, factor, offset):
    rng = np.random.default_rng(seed)
    true = rng.uniform(0.5, 8, (2, 5, 6))
    predicted = true * rng.uniform(0.8, 1.25, true.shape)
    for protocol in ("median", "scale"):
        one, other = depth_errors(predicted, true, protocol), depth_errors(factor * predicted, true, protocol)
        assert other["abs_rel"] == pytest.approx(one["abs_rel"], rel=1e-6)
        assert other["rmse_m"] == pytest.approx(one["rmse_m"], rel=1e-6)
    one, other = (depth_errors(values, true, "scale_shift") for values in (predicted, factor * predicted + offset))
    assert other["abs_rel"] == pytest.approx(one["abs_rel"], rel=1e-5)
    # least squares: nothing that a factor and an offset can do has a smaller error
    assert one["rmse_m"] <= depth_errors(factor * predicted + offset, true)["rmse_m"] + 1e-9
    # both in another unit
    metric, feet = (
        depth_errors(predicted, true, max_depth_m=None),
        depth_errors(3 * predicted, 3 * true, max_depth_m=None),
    )
    assert feet["abs_rel"] == pytest.approx(metric["abs_rel"])
    assert feet["rmse_m"] == pytest.approx(3 * metric["rmse_m"])
    assert metric["delta_1"] <= metric["delta_2"] <= metric["delta_3"]


@few
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9))
def test_median_depth_is_the_lower_middle(values):
    depth = np.array(values)
    aligned = align_depth(depth, np.ones_like(depth), "median")
    assert np.isclose(aligned, 1).any()
    assert sorted(aligned)[(len(values) - 1) // 2] == pytest.approx(1)


@few
@given(seeds, st.floats(0.1, 10))
def test_scale_and_room_errors(seed, factor):
    rng = np.random.default_rng(seed)
    points, mask = rng.normal(size=(4, 3)), np.ones(4, dtype=bool)
    assert scale_error(factor * points, points, mask) == pytest.approx(abs(factor - 1))
    assert scale_error(points @ rotation(rng).T, points, mask) == pytest.approx(0, abs=1e-9)
    room, annotation = rotation(rng), rotation(rng)
    assert 0 <= heading_error_deg(room, annotation) <= 45
    assert up_error_deg(room, annotation) == pytest.approx(up_error_deg(annotation, room))
    assert up_error_deg(room, room) == pytest.approx(0, abs=1e-5)


# ---------------------------------------------------------------------- area under the curve


def slow_area(errors, limit):
    """Share below 1, 2, ... degrees, at most the limit at the end."""
    shares = [sum(error < degree for error in errors) for degree in range(1, limit)]
    return (sum(shares) + sum(error <= limit for error in errors)) / limit / len(errors)


@few
@given(st.lists(st.floats(0, 60) | st.integers(0, 31).map(float), min_size=1, max_size=20), st.integers(1, 30))
def test_area_is_the_slow_one_and_falls_with_the_errors(errors, limit):
    area = accuracy_curve_area(np.array(errors), limit)
    assert area == pytest.approx(slow_area(errors, limit))
    worse = np.array(errors) + np.linspace(0, 3, len(errors))
    assert accuracy_curve_area(worse, limit) <= area + 1e-12
    assert accuracy_curve_area(np.array(errors[::-1]), limit) == pytest.approx(area)
    scores = pair_scores(np.array(errors), np.zeros(len(errors)), limit)
    assert scores[f"rta_{limit}"] == 1
    assert scores[f"auc_{limit}"] == area <= np.mean(np.array(errors) <= limit) + 1e-12
    finer = accuracy_curve_area(np.array(errors), limit, "torch_histc")
    assert 0 <= finer <= 1


# ---------------------------------------------------------------------- matching


@few
@given(st.lists(boxes, min_size=1, max_size=4), st.lists(boxes, min_size=1, max_size=4))
def test_the_toolbox_s_assignment_is_the_best_of_all(proposals, objects):
    from scipy.optimize import linear_sum_assignment

    score = assignment_score(np.stack(list(map(corners, proposals))), np.stack(list(map(corners, objects))))
    rows, columns = linear_sum_assignment(-score)
    small = min(score.shape)
    wide = score if score.shape[0] == small else score.T
    best = max(
        sum(wide[number, column] for number, column in enumerate(chosen))
        for chosen in itertools.permutations(range(wide.shape[1]), small)
    )
    assert score[rows, columns].sum() == pytest.approx(best)
    assert len(set(columns)) == len(set(rows)) == small


@few
@given(st.lists(boxes, max_size=6), st.lists(boxes, min_size=1, max_size=5), st.floats(0, 0.6))
def test_best_proposals_are_the_slow_ones(proposals, objects, threshold):
    chosen, overlap = best_proposals(np.array(proposals).reshape(-1, 6), np.array(objects), threshold)
    speaking = {}
    for number, proposal in enumerate(proposals):
        found = [float(scanrefer_iou(proposal, true)) for true in objects]
        target = found.index(max(found))
        if found[target] > threshold and found[target] > speaking.get(target, (-1, 0.0))[1]:
            speaking[target] = (number, found[target])
    assert chosen.tolist() == [speaking.get(target, (-1, 0.0))[0] for target in range(len(objects))]
    assert overlap.tolist() == [speaking.get(target, (-1, 0.0))[1] for target in range(len(objects))]
    used = [number for number in chosen if number >= 0]
    assert len(set(used)) == len(used)


@few
@given(seeds, st.integers(1, 20), st.integers(1, 20))
def test_clouds_keep_their_scores_when_moved_together(seed, count, other):
    rng = np.random.default_rng(seed)
    predicted, true, change = rng.normal(size=(count, 3)), rng.normal(size=(other, 3)), moved(rng)
    scores = point_scores(predicted, true, 0.5, None)
    there = [points @ change[:3, :3].T + change[:3, 3] for points in (predicted, true)]
    again = point_scores(*there, 0.5, None)
    assert again["accuracy"] == pytest.approx(scores["accuracy"])
    assert again["chamfer"] == pytest.approx(scores["chamfer"])
    assert min(scores["precision"], scores["recall"]) - 1e-12 <= scores["fscore"] <= max(scores["precision"], scores["recall"]) + 1e-12  # fmt: skip
    cells = voxel_means(predicted, 0.3)
    assert 1 <= len(cells) <= count
    assert (cells >= predicted.min(axis=0) - 1e-9).all()
    assert (cells <= predicted.max(axis=0) + 1e-9).all()


# ---------------------------------------------------------------------- texts


@few
@given(texts)
def test_cleaned_and_joined_texts_are_clean(text):
    cleaned = clean_answer(text)
    assert all(sign.isspace() or (sign.isascii() and (sign.isalnum() or sign in ",'-:")) for sign in cleaned)
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert len(line) <= len(text)


@few
@given(texts, st.lists(texts, min_size=1, max_size=4))
def test_marks_of_answers_are_ordered(answer, references):
    exact, refined = refined_match(answer, references)
    member, contained = member_match(answer, references)
    # LEO stops early: what it takes for equal is equal, and leniently both say the same
    assert exact <= member
    assert member == (answer in references)
    assert exact <= refined
    assert refined == contained
    assert scanqa_scores([answer], [references])["exact_match"] == float(member)
    assert refined_match(references[0], references) == (True, True)


@few
@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), min_size=1, max_size=30))
def test_means_by_kind_make_the_whole(rows):
    marks, kinds = zip(*rows, strict=True)
    scores = means_by_kind({"m": marks}, kinds)
    by_kind = [scores[f"{kind}/m"] for kind in sorted(set(kinds))]
    assert scores["m"] == pytest.approx(sum(marks) / len(marks))
    assert scores["m_macro"] == pytest.approx(np.mean(by_kind))
    assert min(by_kind) - 1e-12 <= scores["m"] <= max(by_kind) + 1e-12


@few
@given(st.floats(0.1, 100), st.floats(0, 2))
def test_relative_accuracy_falls_with_the_error(true, error):
    above, further = (relative_accuracy(repr(true * (1 + off)), true) for off in (error, error + 0.05))
    assert 0 <= further <= above <= 1
    assert relative_accuracy(repr(true), true) == 1
