"""The bootstrap over scenes: covers as often as it says, and knows that rows of a scene belong together."""

import numpy as np
import pytest

from vidllm.eval.intervals import Marks, bootstrap_interval


def marks_of(values, scenes):
    return Marks(np.asarray(values, float), tuple(map(str, scenes)), tuple(map(str, range(len(values)))))


def test_it_covers_the_truth_about_as_often_as_it_says():
    """Scenes with a mean of their own and ten rows each; 300 worlds."""
    rng = np.random.default_rng(4)
    hits = 0
    for world in range(300):
        of_scene = np.clip(rng.normal(0.5, 0.2, 30), 0, 1)
        values = rng.random((30, 10)) < of_scene[:, None]
        low, high = bootstrap_interval(
            marks_of(values.reshape(-1), np.repeat(np.arange(30), 10)), draws=400, seed=world
        )
        hits += low <= 0.5 <= high
    assert 0.88 < hits / 300 < 0.98


def test_rows_of_a_scene_do_not_count_as_independent():
    values = np.repeat(np.arange(20) % 2, 50)
    together = bootstrap_interval(marks_of(values, np.repeat(np.arange(20), 50)))
    apart = bootstrap_interval(marks_of(values, np.arange(1000)))
    assert together[1] - together[0] > 4 * (apart[1] - apart[0])


def test_scenes_weigh_by_their_rows():
    """The mean over rows is what is bootstrapped, not the mean of scenes."""
    values, scenes = [1.0] * 99 + [0.0], ["many"] * 99 + ["one"]
    low, high = bootstrap_interval(marks_of(values, scenes))
    assert (low, high) == (0.0, 1.0)
    assert bootstrap_interval(marks_of([0.3, 0.5], ["a", "a"])) == (pytest.approx(0.4), pytest.approx(0.4))


def test_a_mean_over_groups_is_drawn_as_one():
    """A rare group counts as much as a frequent one; a draw without it is the mean of the others."""
    values, scenes = [1.0] * 98 + [0.0, 0.0], ["many"] * 98 + ["rare", "rare"]
    marks = Marks(np.array(values), tuple(scenes), tuple(map(str, range(100))), groups=("a",) * 98 + ("b",) * 2)
    assert marks.metric == 0.5
    assert bootstrap_interval(marks) == (0.0, 1.0)
    mixed = Marks(np.array(values), tuple(map(str, range(100))), marks.ids, groups=marks.groups)
    low, high = bootstrap_interval(mixed)
    # one draw in seven has neither of the two rare rows
    assert (low, high) == (0.5, 1.0)


def test_a_number_that_is_near_the_mean_has_the_mean_s_interval_moved():
    plain = marks_of(np.random.default_rng(0).random(40), np.arange(40) // 4)
    moved = Marks(plain.values, plain.scenes, plain.ids, whole=plain.metric + 0.1)
    assert moved.metric == plain.metric + 0.1
    assert bootstrap_interval(moved) == pytest.approx([limit + 0.1 for limit in bootstrap_interval(plain)])


def test_the_seed_decides_and_wrong_numbers_are_refused():
    marks = marks_of(np.random.default_rng(0).random(40), np.arange(40) // 4)
    assert bootstrap_interval(marks) == bootstrap_interval(marks)
    assert bootstrap_interval(marks) != bootstrap_interval(marks, seed=1)
    narrow, wide = bootstrap_interval(marks, 0.5), bootstrap_interval(marks, 0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    for wrong in ({"level": 1.0}, {"draws": 0}):
        with pytest.raises(ValueError, match="bootstrap: wanted rows"):
            bootstrap_interval(marks, **wrong)
    with pytest.raises(ValueError, match="bootstrap: wanted rows"):
        bootstrap_interval(marks_of([], []))
