"""Turned boxes: their overlap by hand, by counting points, and against upright boxes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidllm.eval.metrics.scanrefer.scores import scanrefer_iou
from vidllm.eval.oriented import angles_of, oriented_corners, oriented_iou, oriented_scores, rotation_of


def box(centre=(0, 0, 0), edges=(1, 1, 1), angles=(0, 0, 0)):
    return np.array([*centre, *edges, *angles], dtype=float)


finite = st.floats(-2, 2)
edges = st.floats(0.2, 2)
boxes = st.tuples(*[finite] * 3, *[edges] * 3, *[st.floats(-3.1, 3.1)] * 3).map(np.array)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        (box(), box(), 1),
        (box(), box((0.5, 0, 0)), 1 / 3),
        (box(), box((1, 0, 0)), 0),
        (box(), box((9, 0, 0)), 0),
        # One inside the other.
        (box(edges=(2, 2, 2)), box((0.2, 0.1, 0), (1, 1, 1), (0.3, 0.2, 0.1)), 1 / 8),
        # A quarter turn of a long box: the middle is shared.
        (box(edges=(3, 1, 1)), box(edges=(3, 1, 1), angles=(np.pi / 2, 0, 0)), 1 / 5),
        # A square turned by an eighth: a regular octagon is shared.
        (box(), box(angles=(np.pi / 4, 0, 0)), (2 * np.sqrt(2) - 2) / (4 - 2 * np.sqrt(2))),
        # The same about the other axes.
        (box(), box(angles=(0, np.pi / 4, 0)), (2 * np.sqrt(2) - 2) / (4 - 2 * np.sqrt(2))),
        (box(), box(angles=(0, 0, np.pi / 4)), (2 * np.sqrt(2) - 2) / (4 - 2 * np.sqrt(2))),
        (box(), box(edges=(0, 1, 1)), 0),
    ],
)
def test_overlap_by_hand(a, b, wanted):
    assert oriented_iou(a, b) == pytest.approx(wanted, abs=1e-9)
    assert oriented_iou(b, a) == pytest.approx(wanted, abs=1e-9)


@given(boxes, boxes)
@settings(max_examples=60, deadline=None)
def test_overlap_by_counting_points(a, b):
    rng = np.random.default_rng(0)
    unit = rng.uniform(-0.5, 0.5, (20000, 3))
    points = a[:3] + (unit * a[3:6]) @ rotation_of(a[6:]).T
    inside = (np.abs((points - b[:3]) @ rotation_of(b[6:])) <= b[3:6] / 2).all(axis=1).mean()
    shared = inside * a[3:6].prod()
    counted = shared / (a[3:6].prod() + b[3:6].prod() - shared)
    assert oriented_iou(a, b) == pytest.approx(counted, abs=0.02)
    assert oriented_iou(a, b) == pytest.approx(oriented_iou(b, a), abs=1e-7)


@given(boxes, boxes)
@settings(max_examples=60, deadline=None)
def test_without_turns_it_is_the_overlap_of_upright_boxes(a, b):
    a[6:], b[6:] = 0, 0
    assert oriented_iou(a, b) == pytest.approx(float(scanrefer_iou(a[:6], b[:6])), abs=3e-6)


@given(boxes)
@settings(max_examples=60, deadline=None)
def test_angles_are_read_back(a):
    turn = rotation_of(a[6:])
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(rotation_of(angles_of(turn)), turn, atol=1e-7)
    assert np.linalg.det(turn) == pytest.approx(1)


def test_angles_where_two_axes_meet():
    turn = rotation_of(np.array([0.4, np.pi / 2, 0.3]))
    np.testing.assert_allclose(rotation_of(angles_of(turn)), turn, atol=1e-7)


def test_the_order_of_the_turns():
    corner = oriented_corners(box(edges=(2, 0, 0), angles=(np.pi / 2, 0, 0)))
    np.testing.assert_allclose(np.abs(corner).max(axis=0), [0, 1, 0], atol=1e-12)
    # About y first, then x, then z: x goes to -z, stays -z turned about x to y, and is turned about z to -x.
    way = rotation_of(np.array([np.pi / 2, np.pi / 2, np.pi / 2])) @ [1, 0, 0]
    np.testing.assert_allclose(way, [-1, 0, 0], atol=1e-12)


def test_scores_by_kind():
    true = [[0, 0, 0, 1, 1, 1.0]] * 4
    said = [[*true[0], 0, 0, 0], [0.5, 0, 0, 1, 1, 1, 0, 0, 0], None, [9, 0, 0, 1, 1, 1, 0, 0, 0]]
    scores = oriented_scores(said, true, ["unique", "unique", "multiple", "multiple"])
    assert scores == {
        "acc_0.25": 0.5, "acc_0.5": 0.25, "unique/acc_0.25": 1.0, "unique/acc_0.5": 0.5, "multiple/acc_0.25": 0.0,
        "multiple/acc_0.5": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="columns of one length"):
        oriented_scores(said, true[:1])
