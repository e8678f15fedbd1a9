"""Maximum coverage: against a slow version, with ties, with holes."""

import numpy as np
import pytest

from vidllm.processing.scenes.base import Frame, SceneReader, invert_pose
from vidllm.processing.scenes.choose import choose_frames, greedy_cover
from vidllm.processing.video_reading_vidllm import VidLLMInputError


K = np.array([[20.0, 0, 8], [0, 20, 6], [0, 0, 1]])
HW = (12, 16)


class Walk(SceneReader):
    """A wall at z = 2 m; the camera steps along it by `steps[i]`."""

    def __init__(self, steps, invalid=(), depth=True, alignment=None, turns=None):
        poses = np.tile(np.eye(4), (len(steps), 1, 1))
        poses[:, 0, 3] = steps
        for index, angle in enumerate([] if turns is None else turns):
            poses[index, :3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        poses = invert_pose(poses)
        poses[list(invalid)] = np.nan
        super().__init__("walk", "walk", range(len(steps)), poses, alignment, has_depth=depth)

    def frame(self, index, depth=True):
        return Frame(np.zeros((*HW, 3), np.uint8), self.map_m(), self._pose(index), K, K, index, None)

    def map_m(self):
        return np.full(HW, 2.0, np.float32)


def slow_voxels(reader, index, size_m):
    """Point by point, pixel by pixel."""
    seen = set()
    scene_from_cam = np.linalg.inv(reader.poses()[index])
    if reader.annotation_from_scene is not None:
        scene_from_cam = reader.annotation_from_scene @ scene_from_cam
    for v in range(HW[0]):
        for u in range(HW[1]):
            point = np.array([(u - 8) / 20 * 2, (v - 6) / 20 * 2, 2, 1])
            seen.add(tuple(np.rint((scene_from_cam @ point)[:3] / size_m).astype(int)))
    return seen


def slow_greedy(sets, count):
    """Take the set that adds most, the first of equals."""
    rest, covered, taken = list(range(len(sets))), set(), []
    while rest and len(taken) < count:
        gains = [len(sets[i] - covered) for i in rest]
        best = rest[gains.index(max(gains))]
        covered |= sets[best]
        taken.append(best)
        rest.remove(best)
    return taken


@pytest.mark.parametrize("seed", range(8))
def test_greedy_equals_the_slow_version(seed):
    rng = np.random.default_rng(seed)
    sets = [np.unique(rng.integers(0, 40, rng.integers(0, 25))) for _ in range(15)]
    plain = [set(members.tolist()) for members in sets]
    for count in (1, 4, 15, 20):
        assert greedy_cover(sets, count) == slow_greedy(plain, count)


def test_coverage_equals_the_slow_version_on_a_scene():
    rng = np.random.default_rng(3)
    steps = np.cumsum(rng.uniform(0, 0.5, 21))
    turn = np.array([[0, -1.0, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]])
    reader = Walk(steps, invalid=(0, 7, 8), alignment=turn, turns=rng.uniform(-1.5, 1.5, 21))
    allowed = [index for index in range(21) if index not in (0, 7, 8)]
    for count, candidates in ((4, allowed[::2]), (9, allowed[::2]), (12, allowed)):
        sets = [slow_voxels(reader, index, 0.1) for index in candidates]
        expected = sorted(candidates[row] for row in slow_greedy(sets, count))
        if len(candidates) == count:
            expected = candidates
        assert choose_frames(reader, count, "max_coverage", pixel_step=1) == expected


def test_ties_go_to_the_earliest_frame_and_the_number_is_filled_up():
    reader = Walk([0.0] * 5 + [50.0] * 5)
    # The first frame covers all that frames 0..4 see, frame 5 the rest; then nothing adds anything.
    assert choose_frames(reader, 2, "max_coverage", candidate_step=1) == [0, 5]
    assert choose_frames(reader, 4, "max_coverage", candidate_step=1) == [0, 1, 2, 5]
    assert choose_frames(reader, 4, "max_coverage", candidate_step=1, stop_ratio=0.9) == [0, 5]
    assert choose_frames(reader, 4, "max_coverage", candidate_step=1, stop_ratio=0.4) == [0]


def test_only_voxels_of_given_points_count():
    reader = Walk([0.0, 5.0, 10.0, 15.0])
    wall = np.array([[x, y, 2.0] for x in np.arange(9.0, 11.0, 0.05) for y in np.arange(-1, 1, 0.05)])
    assert choose_frames(reader, 1, "max_coverage", candidate_step=1) == [0]
    assert choose_frames(reader, 1, "max_coverage", candidate_step=1, points_annotation=wall) == [2]


def test_what_is_missing_is_said():
    with pytest.raises(VidLLMInputError, match="wants depth maps"):
        choose_frames(Walk([0.0, 1.0], depth=False), 1, "max_coverage")
    with pytest.raises(VidLLMInputError, match="wanted uniform or max_coverage; got 'random'"):
        choose_frames(Walk([0.0]), 1, "random")
    with pytest.raises(VidLLMInputError, match="wanted 1 or more; got 0"):
        choose_frames(Walk([0.0]), 0)
    with pytest.raises(VidLLMInputError, match="none of the 2 frames"):
        choose_frames(Walk([0.0, 1.0], invalid=(0, 1)), 1, "max_coverage", require_pose=False)
