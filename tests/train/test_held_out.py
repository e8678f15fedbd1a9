"""Losses on scenes that a run does not learn from: right whatever the batches, and nothing that the run notices."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from vidllm.processing.rooms.write import write_rooms
from vidllm.train.held_out import HELD_OUT_NAME, HeldOutLog, HeldOutSettings, held_out_rooms, held_out_terms
from vidllm.train.joint import train_joint
from vidllm.train.recipes import chosen_recipe, recipe
from vidllm.train.room_source import RoomScenes, RoomSource, RoomsSettings

from . import held_out_process
from .two_processes import run_two_processes


COMMON = ["steps=4", "save_every=2", "keep_checkpoints=9", "dense_matching=1"]
LOOKS = ["held_out.every=2", "held_out.scenes=5"]


def looks_of(folder):
    lines = [json.loads(line) for line in (Path(folder) / HELD_OUT_NAME).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def log_of(folder):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("rooms_held_out")


@pytest.fixture(scope="module")
def looked(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("held_out") / "run"
    torch.set_num_threads(1)
    return out, train_joint(chosen_recipe("debug", [*COMMON, *LOOKS, f"rooms_cache={cache}"]), out, use_cpu=True)


def test_a_run_looks_before_the_first_step_and_every_so_many(looked):
    out, _ = looked
    looks = looks_of(out)
    assert [line["step"] for line in looks] == [0, 2, 4]
    assert {"token", "depth_regression", "dense_match", "loss"} <= set(looks[0])
    assert looks[0]["loss"] != looks[-1]["loss"]
    # its own log says nothing of them
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4]
    assert not any(name.startswith("eval") for line in log_of(out) for name in line)


def test_looking_changes_nothing(looked, cache, tmp_path):
    out, _ = looked
    train_joint(chosen_recipe("debug", [*COMMON, f"rooms_cache={cache}"]), tmp_path / "run", use_cpu=True)
    assert not (tmp_path / "run" / HELD_OUT_NAME).exists()
    assert log_of(tmp_path / "run") == log_of(out)
    blind, seeing = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", out))
    assert all(torch.equal(blind[name], value) for name, value in seeing.items())


def test_a_resumed_run_has_each_look_once(looked, cache, tmp_path):
    out, _ = looked
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "model.safetensors").unlink()
    chosen = chosen_recipe("debug", [*COMMON, *LOOKS, f"rooms_cache={cache}"])
    train_joint(chosen, tmp_path / "run", use_cpu=True, resume=True)
    assert looks_of(tmp_path / "run") == looks_of(out)


def test_a_last_line_that_was_cut_is_dropped_and_a_strange_one_is_named(tmp_path):
    path = tmp_path / HELD_OUT_NAME
    whole = [json.dumps({"step": step, "loss": 1.5}) for step in (0, 2, 4)]
    state = SimpleNamespace(is_world_process_zero=True, global_step=4)
    for left in ("", whole[2][:9], whole[2]):
        path.write_text("\n".join([*whole[:2], left]))
        HeldOutLog(tmp_path).on_train_begin(None, state, None)
        assert path.read_text() == "".join(f"{line}\n" for line in whole[:2])
    state.global_step = 0
    HeldOutLog(tmp_path).on_train_begin(None, state, None)
    assert path.read_text() == f"{whole[0]}\n"
    assert [file.name for file in tmp_path.iterdir()] == [HELD_OUT_NAME]
    path.write_text(f"{whole[0]}\nnonsense\n{whole[1]}\n")
    with pytest.raises(ValueError, match=r"held_out.jsonl:2: wanted a JSON object with `step`; got 'nonsense'"):
        HeldOutLog(tmp_path).on_train_begin(None, state, None)


def test_a_look_is_the_mean_over_everything_whatever_the_batches(looked):
    """Against one scene at a time, added up by hand; in evaluation mode, from the video alone."""
    _, trainer = looked
    scenes, collator = trainer.eval_dataset, trainer.held_out_collator
    # every video would be given its geometry by now, were this training
    trainer.state.global_step = 0
    assert trainer.given_geometry.share(trainer.progress) == 1
    got = [held_out_terms(trainer, scenes, collator, size) for size in (1, 2, 5)]
    sums, counts = {}, {}
    trainer.model.eval()
    for number in range(len(scenes)):
        inputs = trainer._prepare_inputs(collator([scenes[number]]))
        assert "geometry" not in trainer.forward_inputs(inputs)[0]
        with torch.no_grad():
            terms, weights, _ = trainer.weighted_terms(trainer.model, inputs)
        for name, (value, count) in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value)
            counts[name] = counts.get(name, 0.0) + float(count)
    wanted = {name: sums[name] / counts[name] for name in sums if counts[name] > 0}
    wanted["loss"] = sum(weights[name] * value for name, value in wanted.items())
    assert len(scenes) == 5
    for look in got:
        assert set(look) == set(wanted)
        for name, value in wanted.items():
            assert look[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    # the model goes on as it was
    for mode in (True, False):
        trainer.model.train(mode)
        held_out_terms(trainer, scenes, collator, 2)
        assert trainer.model.training is mode


def test_two_processes_see_what_one_sees(cache, tmp_path):
    said, codes = run_two_processes(held_out_process.__file__, tmp_path / "two", cache)
    assert codes == [0, 0], said
    settings = ["steps=1", "batch_size=4", "held_out.scenes=3", "held_out.every=1", f"rooms_cache={cache}"]
    train_joint(chosen_recipe("debug", settings), tmp_path / "one", use_cpu=True)
    two, one = looks_of(tmp_path / "two"), looks_of(tmp_path / "one")
    assert [line["step"] for line in two] == [line["step"] for line in one] == [0, 1]
    for name, value in one[0].items():
        assert two[0][name] == pytest.approx(value, rel=2e-4, abs=1e-6), name


def test_rooms_that_are_held_out_are_others(cache):
    settings = recipe("debug").rooms
    others = held_out_rooms(settings, HeldOutSettings(scenes=4))
    learned = RoomSource(settings, cache)
    held = RoomSource(others, cache / "elsewhere")
    names = [{source.room(number).scene_id for number in range(4)} for source in (learned, held)]
    assert len(names[0]) == len(names[1]) == 4
    assert not names[0] & names[1]
    visits = RoomScenes(held, 3, num_frames=3, prompts_per_scene=1, each_once=True)
    assert [visits[n].frames.scene_id for n in range(3)] == [held.room(n).scene_id for n in range(3)]
    assert visits[1].frames.indices[0] == 0
    assert visits[1].frames.indices[-1] == held.room(1).num_frames - 1
    with pytest.raises(ValueError, match="wanted 5 to see once; got 4"):
        RoomScenes(held, 5, num_frames=3, prompts_per_scene=1, each_once=True)


def test_files_of_another_split_are_held_out(tmp_path):
    for split, number in (("train", 1), ("val", 2)):
        write_rooms(tmp_path / "root", number, seed=3, difficulty="easy", size_hw=(28, 42), split=split)
    settings = [
        "steps=1", "num_frames=2", "batch_size=1", "benchmarks=scanqa:1", "held_out.scenes=9", "held_out.every=1", "dense_labels=0",
    ]  # fmt: skip
    chosen = chosen_recipe("debug", settings, data_root=str(tmp_path / "root"))
    train_joint(chosen, tmp_path / "run", use_cpu=True)
    looks = looks_of(tmp_path / "run")
    assert [line["step"] for line in looks] == [0, 1]
    assert looks[0]["token"] > 0
    facts = json.loads((tmp_path / "run" / "recipe.json").read_text())["data"]
    assert (facts["scenes"], facts["held_out_scenes"]) == (1, 2)


@pytest.mark.parametrize(
    ("settings", "data", "data_root", "message"),
    [
        (["held_out.every=0"], None, None, "held_out.every: wanted at least 1; got 0"),
        (["held_out.scenes=0"], None, None, "held_out.scenes: wanted at least 1; got 0"),
        (["held_out=default"], "mine.jsonl", None, "wanted held_out.data=FILE.jsonl"),
        (["held_out.data=a.jsonl", "benchmarks=scanqa:1"], None, "root", "the data root's split 'val' otherwise"),
        (["held_out.split=train", "benchmarks=scanqa:1"], None, "root", "wanted another split for held_out"),
        (["held_out.data=./a.jsonl"], "a.jsonl", None, "wanted another file for held_out than is learned from"),
        (["held_out.clips=clips"], None, None, r"no setting of held-out data.*got held_out.clips=clips"),
        (["held_out.data=a.jsonl"], None, None, r"no setting of held-out data.*got held_out.data=a.jsonl"),
        (["held_out.split=test"], None, None, r"no setting of held-out data.*got held_out.split=test"),
        (["held_out.data=b.jsonl", "held_out.split=test"], "a.jsonl", None, "wanted held_out.data alone"),
        (["held_out.clips=c", "benchmarks=scanqa:1"], None, "root", "wanted held_out.split alone"),
    ],
)
def test_wrong_settings(settings, data, data_root, message):
    with pytest.raises(ValueError, match=message):
        chosen_recipe("debug", settings, data, data_root)


def test_a_trainer_without_held_out_scenes_says_so(looked):
    _, trainer = looked
    with pytest.raises(ValueError, match="wanted held-out scenes"):
        trainer.evaluate([])


def test_what_is_not_finite_is_named(looked):
    _, trainer = looked
    weight = next(p for p in trainer.model.lm_head.parameters())
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match=r"held-out scenes, step .*token = nan for the samples"):
            trainer.evaluate()
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_settings_of_rooms_are_those_of_training_but_for_what_changes():
    settings = RoomsSettings(levels={"standard": 1.0}, size_hw=(28, 42), jpeg_share=0.5, makers=2)
    others = held_out_rooms(settings, HeldOutSettings(scenes=7))
    assert (others.levels, others.size_hw, others.num_rooms) == ({"standard": 1.0}, (28, 42), 7)
    assert (others.makers, others.jpeg_share, others.even_share) == (0, 0.0, 1.0)
    assert others.seed != settings.seed
