"""Scenes for training: which prompts, in which order, with which draws, and what is left out."""

import json
import logging
from collections import Counter

import datasets
import numpy as np
import pytest
import torch

from vidllm.processing.benchmarks import load_benchmark
from vidllm.processing.benchmarks.proposals import SceneProposals
from vidllm.processing.samples import Sample
from vidllm.train.collator import VidLLMCollator
from vidllm.train.initialise import build_untrained
from vidllm.train.joint import train_joint
from vidllm.train.recipes import chosen_recipe
from vidllm.train.scene_data import SceneCollator, SceneDataset, SceneVisit, SceneVisits

from .own_clips import write_clips


FRAMES = 4


@pytest.fixture(scope="module")
def processor():
    return build_untrained("vidllm-tiny")[1]


@pytest.fixture(scope="module")
def scenes(rooms_rows):
    return SceneDataset(rooms_rows, prompts_per_scene=5, seed=7, num_frames=FRAMES)


def ids(samples):
    return [sample.sample_id for sample in samples]


def test_an_item_is_one_scene_with_some_of_its_prompts(scenes, rooms_rows):
    assert len(scenes) == 3
    for number in range(3):
        samples = scenes[number]
        assert len({sample.scene_id for sample in samples}) == 1
        assert 4 <= len(set(ids(samples))) == len(samples) <= 5
    assert scenes.has_depth
    whole = SceneDataset(rooms_rows, prompts_per_scene=0, num_frames=FRAMES)
    assert sum(len(whole[number]) for number in range(3)) == sum(map(len, rooms_rows.values()))


def test_the_reconstruction_is_held_by_cameras_and_depth_of_one_scene(rooms_rows, tmp_path):
    path = write_clips(tmp_path / "clips", with_box=False)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    # one with poses, which teach nothing without depth
    lines[1]["poses"] = "clip1.tum"
    (path.parent / "clip1.tum").write_text("".join(f"{i} {0.1 * i} 0 0 0 0 0 1\n" for i in range(3)))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    clips = SceneDataset(
        {"jsonl": load_benchmark("jsonl", path, "train", cache_dir=tmp_path / "cache")}, 2, num_frames=3
    )
    assert (clips.has_poses, clips.has_depth, clips.has_geometry, clips.num_placed) == (True, False, False, 0)
    rooms = SceneDataset(rooms_rows, 2, num_frames=FRAMES)
    assert (rooms.has_poses, rooms.has_depth, rooms.has_geometry) == (True, True, True)
    assert rooms.num_placed == len(rooms_rows["scanrefer"]) + len(rooms_rows["scan2cap"])


def test_poses_without_depth_move_no_part_that_they_do_not_teach(tmp_path, caplog):
    """Weight decay would wear it down; see `freeze_for_joint`."""
    path = write_clips(tmp_path / "clips", with_box=False)
    lines = [{**json.loads(line), "poses": "all.tum"} for line in path.read_text().splitlines()]
    (path.parent / "all.tum").write_text("".join(f"{i} {0.1 * i} 0 0 0 0 0 1\n" for i in range(3)))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = build_untrained("vidllm-tiny")[0].state_dict()
    settings = ["steps=2", "dense_labels=0", "weight_decay=0.5", "learning_rate=1e-2", "model=vidllm-tiny", "seed=0"]
    trainer = train_joint(chosen_recipe("debug", settings, data=str(path)), tmp_path / "run", use_cpu=True)
    after = trainer.model.state_dict()
    moved = {name.split(".")[1] for name, value in before.items() if not torch.equal(value, after[name])}
    assert "language_model" in moved
    assert not moved & {"reconstruction", "metric_depth"}
    assert "debug: cameras teach nothing without depth, and no scene has both" in caplog.text


def test_every_prompt_comes_once_before_one_comes_twice(scenes, rooms_rows):
    scene = scenes[1][0].scene_id
    total = {name: sum(row["scene_id"] == scene for row in rows) for name, rows in rooms_rows.items()}
    seen = Counter()
    for epoch in range(200):
        names = ids(scenes.prompts(1, epoch))
        for name, count in total.items():
            mine = [n for n in names if n.startswith(name)]
            done = sum(seen[n] for n in seen if n.startswith(name))
            # As long as the first cycle lasts, nothing returns.
            if done + len(mine) <= count:
                assert not any(seen[n] for n in mine)
        seen.update(names)
        if len(seen) == sum(total.values()):
            break
    assert len(seen) == sum(total.values())


def test_prompts_depend_on_seed_epoch_and_scene_alone(scenes, rooms_rows):
    again = SceneDataset(rooms_rows, prompts_per_scene=5, seed=7, num_frames=FRAMES)
    assert [ids(again.prompts(2, epoch)) for epoch in (6, 0, 3)] == [ids(scenes.prompts(2, e)) for e in (6, 0, 3)]
    assert ids(scenes.prompts(2, 0)) != ids(scenes.prompts(2, 1))
    other = SceneDataset(rooms_rows, prompts_per_scene=5, seed=8, num_frames=FRAMES)
    assert [ids(other.prompts(n, 0)) for n in range(3)] != [ids(scenes.prompts(n, 0)) for n in range(3)]
    again.set_epoch(3)
    assert ids(again[2]) == ids(scenes.prompts(2, 3))


def test_benchmarks_keep_their_shares(rooms_rows):
    weights = {"scanqa": 3.0, "scanrefer": 1.0, "sqa3d": 0.0, "scan2cap": 0.0}
    scenes = SceneDataset(rooms_rows, 2, weights=weights, num_frames=FRAMES)
    names = Counter(
        n.split("/")[0] for epoch in range(6) for scene in range(3) for n in ids(scenes.prompts(scene, epoch))
    )
    assert set(names) == {"scanqa", "scanrefer"}
    assert 0.6 < names["scanqa"] / names.total() < 0.9


def test_visits_go_through_all_scenes_again_and_again(scenes):
    visits = SceneVisits(scenes, 10, seed=1)
    assert len(visits) == 10
    seen = [visits.scene_of(visit) for visit in range(10)]
    for epoch in range(3):
        assert sorted(scene for scene, e in seen if e == epoch) == [0, 1, 2]
    assert seen[9][1] == 3
    orders = {tuple(scene for scene, e in seen if e == epoch) for epoch in range(3)}
    assert len(orders) > 1
    other = SceneVisits(scenes, 10, seed=1)
    for visit in (9, 2, 7):
        assert ids(other[visit].samples) == ids(visits[visit].samples)
        assert other[visit].epoch == visits[visit].epoch == visit // 3
    with pytest.raises(IndexError):
        visits[10]


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Seven clips of one to seven pictures, each with as many questions as fit."""
    folder = tmp_path_factory.mktemp("ragged")
    lines = []
    for clip, frames in enumerate((3, 1, 7, 5, 2, 6, 4)):
        write_clips(folder / f"part{clip}", clips=1, frames=frames, with_box=False)
        for question in range(frames):
            turns = [{"role": "user", "content": f"How many chairs{'?' * frames} {question}"}, {"role": "assistant", "content": "two"}]  # fmt: skip
            lines.append({"video": f"part{clip}/clip0", "messages": turns})
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    datasets.disable_progress_bars()
    rows = {"jsonl": load_benchmark("jsonl", path, "train", cache_dir=folder / "cache")}
    return SceneDataset(rows, prompts_per_scene=0, seed=7, num_frames=5)


def test_a_window_puts_visits_of_about_one_length_together_and_loses_none(ragged):
    """Windows of six visits (a step of three forwards of two); the last one is not whole, and windows lie across epochs."""
    plain, grouped = SceneVisits(ragged, 20, seed=1), SceneVisits(ragged, 20, seed=1, window=6)
    before, after = ([visits.scene_of(visit) for visit in range(20)] for visits in (plain, grouped))
    assert before != after
    for start in range(0, 20, 6):
        step = after[start : start + 6]
        # a step has the very visits that it has without
        assert sorted(step) == sorted(before[start : start + 6])
        lengths = [ragged.length(*visit) for visit in step]
        assert lengths == sorted(lengths, reverse=True)
    assert {ragged.length(scene, 0)[0] for scene in range(7)} == {1, 2, 3, 4, 5}
    # of equally many frames the longer prompts come first
    assert len({ragged.length(scene, 0) for scene in range(7)}) == 7
    # whoever starts anywhere sees the same
    other = SceneVisits(ragged, 20, seed=1, window=6)
    for visit in (19, 7, 2, 13):
        assert other.scene_of(visit) == after[visit]
        assert ids(other[visit].samples) == ids(ragged.prompts(*after[visit]))
    with pytest.raises(ValueError, match="wanted a window of at least 1 visit; got 0"):
        SceneVisits(ragged, 20, window=0)


def test_what_a_scene_contributes_does_not_depend_on_its_batch(processor, scenes):
    collator = SceneCollator(processor, num_frames=FRAMES, frame_choice="random", reply_choice="random", seed=5)
    first, second, third = (SceneVisits(scenes, 9)[visit] for visit in (0, 4, 8))
    together, alone = collator([first, second, third]), collator([second])
    prompts = slice(len(first.samples), len(first.samples) + len(second.samples))
    torch.testing.assert_close(together["pixel_values_videos"][1:2], alone["pixel_values_videos"], rtol=0, atol=0)
    assert together["scale_frames"][1].tolist() == alone["scale_frames"][0].tolist()
    assert together["sample_ids"][prompts] == alone["sample_ids"]
    width = alone["input_ids"].shape[1]
    learned = together["labels"][prompts, :width]
    assert torch.equal(learned, alone["labels"])


def test_draws_are_those_of_the_plain_collator_in_that_epoch(processor, scenes):
    settings = {"num_frames": 3, "frame_choice": "random", "reply_choice": "random", "seed": 5}
    plain = VidLLMCollator(processor, **settings)
    plain.set_epoch(2)
    samples = scenes.prompts(0, 2)
    wanted = plain(samples)
    for item in (SceneVisit(samples, 2), samples):
        mine = SceneCollator(processor, **settings)
        mine.set_epoch(2)
        got = mine([item])
        assert got["sample_ids"] == [f"{name}@2" for name in wanted["sample_ids"]]
        assert torch.equal(got["pixel_values_videos"], wanted["pixel_values_videos"])
        assert torch.equal(got["labels"], wanted["labels"])
        assert torch.equal(got["scale_frames"], wanted["scale_frames"])


def test_two_visits_of_a_scene_stay_two_videos(processor, scenes):
    collator = SceneCollator(processor, num_frames=FRAMES)
    batch = collator([SceneVisit(scenes.prompts(0, epoch), epoch) for epoch in (0, 1)])
    assert batch["pixel_values_videos"].shape[0] == 2
    # Lists of one scene in one epoch are packed behind one video.
    samples = scenes.prompts(0, 0)
    packed = collator([samples[:2], samples[2:]])
    assert packed["pixel_values_videos"].shape[0] == 1
    assert packed["scene_index"].tolist() == [0] * len(samples)


def test_rows_that_cannot_be_learned_are_counted(rooms_rows, caplog):
    rows = [dict(rooms_rows["scanqa"][number]) for number in range(6)]
    rows[2]["messages"] = rows[2]["messages"][:-1]
    rows[4]["scene_id"] = "scene1999_00"
    rows.append({**rooms_rows["scanrefer"][0], "boxes_annotation": [], "box_block": []})
    with caplog.at_level(logging.WARNING, logger="vidllm.train.scene_data"):
        scenes = SceneDataset({"mine": rows}, 0, num_frames=FRAMES)
    assert scenes.skipped["mine"].total == 3
    kept = {sample.sample_id for number in range(len(scenes)) for sample in scenes[number]}
    assert kept == {Sample.from_row(rows[number]).sample_id for number in (0, 1, 3, 5)}
    assert "mine: of 7 rows 1 skipped: it has no reply to learn" in caplog.text
    with pytest.raises(ValueError, match=r"wanted at least one usable row; got none .1 skipped: it has no reply"):
        SceneDataset({"mine": [rows[2]]}, 1, num_frames=FRAMES)


@pytest.mark.parametrize(
    ("prompts", "weights"), [(-1, None), (2, {"scanqb": 1.0}), (2, {"scanqa": -1.0}), (2, {"scanqa": np.nan})]
)
def test_wrong_settings(rooms_rows, prompts, weights):
    with pytest.raises(ValueError, match="scenes: wanted prompts_per_scene"):
        SceneDataset({"scanqa": rooms_rows["scanqa"]}, prompts, weights=weights)


def test_proposals_are_found_under_the_scenes_real_name(processor, scenes):
    scene_id = scenes.prompts(0, 0)[0].scene_id
    known = {scene_id: np.full((3, 6), 0.25), f"{scene_id}@0": np.full((1, 6), 0.5)}
    collator = SceneCollator(processor, num_frames=FRAMES, proposals=SceneProposals(known))
    batch = collator([SceneVisit(scenes.prompts(0, epoch), epoch) for epoch in (0, 1)])
    assert batch["proposal_boxes"].tolist() == [[[0.25] * 6] * 3] * 2
    assert batch["proposal_mask"].all()
