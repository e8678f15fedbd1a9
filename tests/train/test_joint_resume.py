"""Runs that were killed at a bad moment, torn files, other numbers of processes; what a run says of itself, and where."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from vidllm.train import joint
from vidllm.train.initialise import build_untrained
from vidllm.train.joint import main, train_joint, training_arguments
from vidllm.train.joint_trainer import freeze_for_joint
from vidllm.train.line_log import drop_lines_after
from vidllm.train.parameter_table import parameter_table
from vidllm.train.recipes import chosen_recipe
from vidllm.train.run_folder import check_processes, checkpoint_to_resume

from .stop_at import StopAt


pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")
SETTINGS = ["steps=3", "save_every=1", "keep_checkpoints=3", "dense_labels=0", "prompts_per_scene=2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("rooms_of_debug")


@pytest.fixture(scope="module")
def recipe(cache):
    return chosen_recipe("debug", [*SETTINGS, f"rooms_cache={cache}", "held_out.every=2", "held_out.scenes=1"])


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_joint(recipe, out, use_cpu=True)
    return out


class Killed(TrainerCallback):
    """Killed at a moment, with whatever has been written by then."""

    def __init__(self, moment):
        self.moment = moment

    def on_train_begin(self, args, state, control, **kwargs):
        if self.moment == "begin":
            raise KeyboardInterrupt

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.moment == "log" and "loss" in logs:
            raise KeyboardInterrupt


def lines_of(path):
    dropped = ("seconds_per_step", "seconds")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in dropped} for line in lines]


def assert_same(out, whole):
    wanted, got = load_file(whole / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(wanted) == set(got)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    for name in ("log.jsonl", "held_out.jsonl"):
        assert lines_of(out / name) == lines_of(whole / name)


@pytest.mark.parametrize("torn", ["empty", "cut", "absent"])
def test_a_torn_checkpoint_and_a_cut_log_are_gone_on_from_all_the_same(recipe, whole, tmp_path, torn):
    out = tmp_path / "run"
    train_joint(recipe, out, use_cpu=True, callbacks=[StopAt(2)])
    state = out / "checkpoint-2" / "trainer_state.json"
    text = state.read_text()
    state.unlink() if torn == "absent" else state.write_text("" if torn == "empty" else text[: len(text) // 2])
    log = out / "log.jsonl"
    log.write_text(log.read_text()[:-40])
    train_joint(recipe, out, use_cpu=True, resume=True)
    assert_same(out, whole)
    (entry,) = json.loads((out / "recipe.json").read_text())["resumed"]
    assert entry["from"] == "checkpoint-1"


def test_lines_of_a_log(tmp_path):
    path = tmp_path / "log.jsonl"
    drop_lines_after(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    drop_lines_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 1}\nnothing\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log.jsonl:2: wanted a JSON object with `step`; got 'nothing'"):
        drop_lines_after(path, 2)
    assert [each.name for each in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("moment", ["begin", "log", "save"])
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(recipe, whole, tmp_path, caplog, moment):
    out = tmp_path / "run"
    if moment == "save":
        train_joint(recipe, out, use_cpu=True, callbacks=[StopAt(1)])
        (out / "checkpoint-1" / "trainer_state.json").unlink()
        for path in out.iterdir():
            # the rest is what the end of a run writes
            if path.name not in ("checkpoint-1", "recipe.json", "log.jsonl", "held_out.jsonl"):
                path.unlink()
        (out / "checkpoint-7").mkdir()
    else:
        with pytest.raises(KeyboardInterrupt):
            train_joint(recipe, out, use_cpu=True, callbacks=[Killed(moment)])
    with pytest.raises(ValueError, match="holds something already; it has no checkpoint yet: --resume starts it anew"):
        train_joint(recipe, out, use_cpu=True)
    train_joint(recipe, out, use_cpu=True, resume=True)
    assert_same(out, whole)
    assert f"--resume: {out} has no checkpoint yet; the run starts anew" in caplog.text
    assert "resumed" not in json.loads((out / "recipe.json").read_text())
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_folder_of_something_else_is_not_started_in(tmp_path):
    with pytest.raises(ValueError, match="wanted a run with a checkpoint"):
        checkpoint_to_resume(tmp_path / "absent", True)
    (tmp_path / "rooms").mkdir()
    (tmp_path / "log.jsonl").write_text("")
    assert checkpoint_to_resume(tmp_path, True) is None
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match="wanted a run with a checkpoint"):
        checkpoint_to_resume(tmp_path, True)
    with pytest.raises(ValueError, match=r"holds something already$"):
        checkpoint_to_resume(tmp_path, False)


def test_another_number_of_processes_is_refused_unless_the_steps_stay_what_they_are(recipe, tmp_path):
    out = tmp_path / "run"
    train_joint(recipe, out, use_cpu=True, callbacks=[StopAt(1)])
    path = out / "recipe.json"
    document = json.loads(path.read_text())
    assert document["processes"] == 1
    # as two processes of two scenes each had made it
    path.write_text(json.dumps({**document, "processes": 2, "versions": {"torch": "0"}}))
    with pytest.raises(
        ValueError, match=r"--resume: wanted 2 processes, as the run had, or 4 scenes per step .* got 1 and 2 scenes"
    ):
        train_joint(recipe, out, use_cpu=True, resume=True)
    assert json.loads(path.read_text())["processes"] == 2
    assert not (out / "checkpoint-2").exists()
    checkpoint = str(out / "checkpoint-1")
    check_processes(checkpoint, 1, 4, 1)
    check_processes(checkpoint, 1, 2, 2)
    check_processes(checkpoint, 2, 2, 1)
    more = chosen_recipe(
        "debug",
        [*SETTINGS, f"rooms_cache={recipe.rooms_cache}", "held_out.every=2", "held_out.scenes=1", "accumulation=2"],
    )
    train_joint(more, out, use_cpu=True, resume=True)
    after = json.loads(path.read_text())
    # what the run began with stays; the resume has its own
    assert (after["processes"], after["versions"]) == (2, {"torch": "0"})
    (entry,) = after["resumed"]
    assert (entry["from"], entry["processes"], entry["changed"]) == ("checkpoint-1", 1, ["accumulation: 1 -> 2"])
    assert entry["versions"]["torch"] == torch.__version__
    assert after["recipe"]["accumulation"] == 2
    assert set(entry) >= {"git", "versions"}
    with pytest.raises(ValueError, match="wanted 1 processes, as the run had, or 4 scenes per step"):
        check_processes(str(out / "checkpoint-3"), 2, 2, 2)


class Reporter(TrainerCallback):
    """What a log is reported to."""

    seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_the_log_goes_where_the_recipe_says(recipe, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"report_to: wanted one of .*tensorboard.* got 'tensorbord'; did you mean 'tensorboard'"
    ):
        training_arguments(chosen_recipe("debug", ["report_to=tensorbord"]), tmp_path, use_cpu=True)
    monkeypatch.setattr(joint, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="report_to: wanted what is installed; got 'wandb'"):
        training_arguments(chosen_recipe("debug", ["report_to=tensorboard,wandb"]), tmp_path, use_cpu=True)
    assert training_arguments(recipe, tmp_path, use_cpu=True).report_to == []
    monkeypatch.setitem(joint.INTEGRATION_TO_CALLBACK, "tensorboard", Reporter)
    settings = [
        *SETTINGS,
        f"rooms_cache={recipe.rooms_cache}",
        "report_to=tensorboard",
        "held_out.every=3",
        "held_out.scenes=1",
    ]
    train_joint(chosen_recipe("debug", settings), tmp_path / "run", use_cpu=True)
    assert [line["loss"] for line in Reporter.seen if "loss" in line] == [
        line["loss"] for line in lines_of(tmp_path / "run" / "log.jsonl")
    ]
    assert any("eval_token" in line for line in Reporter.seen)


def test_time_that_is_left_is_printed_but_not_in_the_log(cache, tmp_path, capsys):
    assert (
        main(
            [
                "debug",
                "--out",
                str(tmp_path / "run"),
                "--cpu",
                *(word for each in [*SETTINGS, f"rooms_cache={cache}"] for word in ("--set", each)),
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    printed = [line for line in said.out.splitlines() if "'loss'" in line]
    assert len(printed) == 3
    assert all("'eta_s'" in line for line in printed)
    assert "'eta_s': 0" in printed[-1]
    assert all("eta_s" not in line for line in lines_of(tmp_path / "run" / "log.jsonl"))


def test_what_is_trained_is_said_before_the_run(cache, tmp_path, caplog):
    settings = [*SETTINGS, f"rooms_cache={cache}", "steps=1", "train_only=metric_depth|lm_head"]
    with caplog.at_level(logging.INFO, "vidllm.train"):
        trainer = train_joint(chosen_recipe("debug", settings), tmp_path / "run", use_cpu=True)
    (table,) = [record.message for record in caplog.records if "what is trained" in record.message]
    rows = {
        line.split()[0]: [int(word.replace(",", "")) for word in line.split()[1:]] for line in table.splitlines()[2:-1]
    }
    model = trainer.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert rows["together"] == [trained, sum(p.numel() for p in model.parameters()) - trained]
    assert [name for name, (learned, _) in rows.items() if learned] == ["metric_depth", "lm_head", "together"]
    assert rows["encoder"][1] == sum(p.numel() for p in model.model.encoder.parameters())
    assert table.splitlines()[-1].startswith("frozen because no output depends on them: model.encoder.")


def test_a_tied_head_is_counted_once():
    model = build_untrained("vidllm-tiny")[0]
    unreachable = freeze_for_joint(model, freeze_encoder=True)
    before = parameter_table(model, unreachable)
    model.lm_head.weight = model.get_input_embeddings().weight
    after = parameter_table(model)
    assert "no output" in before
    assert "no output" not in after
    head = next(line for line in after.splitlines() if line.startswith("lm_head"))
    assert head.split()[1:] == ["0", "0"]
    assert isinstance(model.lm_head, nn.Linear)
