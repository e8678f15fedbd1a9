"""Baselines: what they are fitted on, and what they say."""

import json

import numpy as np
import pytest

from vidllm.eval import train_facts as facts_module
from vidllm.eval.baselines import answer_baselines, constant_box, constant_caption, constant_proposal, thinned
from vidllm.eval.reconstruction import constant_reconstruction, mean_over_scenes, score_reconstruction
from vidllm.eval.train_facts import TrainFacts, facts_of_files, facts_of_rooms, train_facts
from vidllm.eval.truth import SceneTruth
from vidllm.modeling_vidllm.geometry_vidllm import START_ROOM_FROM_CAM
from vidllm.processing.rooms.blind import BlindItem
from vidllm.processing.rooms.write import write_rooms
from vidllm.processing.video_reading_vidllm import VidLLMInputError


def test_rooms_in_memory_say_what_their_files_say(tmp_path):
    write_rooms(tmp_path, 3, seed=5, difficulty="easy", size_hw=(48, 64), video=False)
    made, read = facts_of_rooms("easy", 5, 3), facts_of_files(str(tmp_path))
    assert made.questions == read.questions
    assert all(len(items) > 5 for items in made.questions.values())
    assert sorted(made.objects, key=str) == sorted(read.objects, key=str)
    np.testing.assert_allclose(
        np.sort(made.boxes_annotation, axis=0), np.sort(read.boxes_annotation, axis=0), atol=1e-4
    )
    assert made.mean_log_depth == pytest.approx(read.mean_log_depth, abs=0.1)
    with pytest.raises(ValueError, match="wanted 1 to 6000; got 0"):
        facts_of_rooms("easy", 5, 0)


def test_made_rooms_are_kept(rooms_root, tmp_path, monkeypatch):
    cache = tmp_path / "deep" / "facts.json"
    first = train_facts(str(rooms_root), num_train_rooms=2, cache=cache)
    assert first.source == "2 easy train rooms made in memory, seed 5"
    made = []
    real = facts_of_rooms
    monkeypatch.setattr(facts_module, "facts_of_rooms", lambda *a, **k: made.append(k) or real(*a, **k))
    again = train_facts(str(rooms_root), num_train_rooms=2, cache=cache)
    assert not made
    assert (again.questions, again.objects, again.mean_log_depth) == (
        first.questions,
        first.objects,
        first.mean_log_depth,
    )
    np.testing.assert_array_equal(again.boxes_annotation, first.boxes_annotation)
    assert train_facts(str(rooms_root), num_train_rooms=1, cache=cache).source.startswith("1 easy")
    assert made == [{"difficulty": "easy", "seed": 5, "num_rooms": 1, "progress": None}]


def test_another_root_may_be_fitted_on(rooms_root, tmp_path):
    write_rooms(tmp_path, 2, seed=9, difficulty="standard", size_hw=(48, 64), video=False)
    facts = train_facts(str(rooms_root), blind_root=str(tmp_path))
    assert facts.source == f"train split of {tmp_path}"
    assert set(facts.questions) == {"scanqa", "sqa3d"}
    with pytest.raises(VidLLMInputError, match="wanted the train split of a benchmark"):
        train_facts(str(tmp_path), blind_root=str(rooms_root))


def test_without_rooms_and_train_split_there_is_nothing_to_fit_on(tmp_path):
    (tmp_path / "annotations").mkdir()
    assert train_facts(str(tmp_path)) is None


def test_a_blind_answer_is_the_one_that_the_words_tell():
    train = [BlindItem("colour", f"What color is the {n}?", c) for n, c in (("sink", "white"), ("couch", "red")) * 9]
    asked = [BlindItem("colour", "What color is the couch?", "blue"), BlindItem("colour", "What color is it?", "")]
    said = answer_baselines(train + train[:2] * 4, asked)
    assert said["blind"][0] == said["majority"][0] == "red"
    assert all(answer in ("red", "white") for answers in said.values() for answer in answers)
    # Both are equally frequent; the alphabet decides.
    assert said["constant"] == ["red"] * 2
    assert answer_baselines([*train, train[0]], asked)["constant"] == ["white"] * 2


def test_dense_regression_is_kept_small():
    many = [BlindItem("what", f"q{number}", f"a{number % 400}") for number in range(9000)]
    kept = thinned(many + [BlindItem("how", "q", "two")] * 3)
    assert len({item.answer for item in kept if item.kind == "what"}) <= 150
    assert 1500 <= sum(item.kind == "what" for item in kept) <= 3000
    assert sum(item.kind == "how" for item in kept) == 3


def test_one_box_for_all():
    facts = TrainFacts("there", boxes_annotation=np.array([[0, 0, 0, 1, 1, 1.0], [2, 4, 6, 3, 3, 3]]))
    box, how = constant_box(facts, np.zeros((1, 6)))
    assert box.tolist() == [1, 2, 3, 2, 2, 2]
    assert "there" in how
    true = np.array([[1, 1, 1, 9, 9, 9.0], [2, 2, 2, 9, 9, 9], [9, 9, 9, 9, 9, 9]])
    box, how = constant_box(None, true)
    assert box.tolist() == [2, 2, 2, 1, 1, 1]
    assert how.startswith("a cube of 1 m")


def test_one_proposal_for_all():
    box, known = (
        np.array([1, 1, 1, 2, 2, 2.0]),
        np.array([[5, 5, 5, 1, 1, 1.0], [1, 1, 2, 9, 9, 9], [1, 3, 1, 2, 2, 2]]),
    )
    assert constant_proposal(box, known).tolist() == known[1].tolist()
    assert constant_proposal(box, known[:0]) is None


def test_one_caption_for_all():
    facts = TrainFacts("there", objects=[("chair", "red"), ("chair", "red"), ("door", None)])
    assert constant_caption(facts, [])[0] == "this is a red chair."
    assert constant_caption(None, [("door", None), ("door", None), ("chair", "red")])[0] == "this is a door."


def test_the_constant_reconstruction_by_hand():
    angle = np.radians(10)
    cam_from_world = np.tile(np.eye(4, dtype=np.float32), (3, 1, 1))
    cam_from_world[1, :3, :3] = [[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]]
    cam_from_world[2, 0, 3] = 1
    intrinsics = np.tile(np.array([[20, 0, 4], [0, 20, 3], [0, 0, 1]], dtype=np.float32), (3, 1, 1))
    annotation = np.eye(4)
    annotation[:3, :3] = START_ROOM_FROM_CAM
    truth = SceneTruth(cam_from_world, intrinsics, np.full((3, 6, 8), 2.0, dtype=np.float32), annotation)
    scores = score_reconstruction(constant_reconstruction(truth, 3.0), truth)
    assert scores["metric"]["abs_rel"] == pytest.approx(0.5)
    assert scores["metric"]["up_error_deg"] == pytest.approx(0, abs=1e-6)
    assert scores["median"]["abs_rel"] == pytest.approx(0, abs=1e-6)
    # Rotations are 10, 0 and 10 degrees off. Of the ways, the first has no length, the second is right, the third is 10 degrees off.
    poses = scores["vggt_i_inv_j"]
    assert poses["rra_30"] == 1
    assert poses["rta_30"] == pytest.approx(2 / 3)
    # Below 10 degrees one pair of three is right, from there on two.
    assert poses["auc_30"] == pytest.approx((1 / 3 * 30 + 1 / 3 * 20) / 30, abs=0.02)
    no_depth = SceneTruth(cam_from_world, intrinsics, None, None)
    assert list(score_reconstruction(constant_reconstruction(no_depth, 1.0), no_depth)) == ["vggt_i_inv_j"]
    means = mean_over_scenes([scores, {"metric": {"abs_rel": 0.1}}])
    assert means["metric"]["abs_rel"] == pytest.approx(0.3)
    assert means["vggt_i_inv_j"]["rra_30"] == 1
    json.dumps(means, allow_nan=False)
