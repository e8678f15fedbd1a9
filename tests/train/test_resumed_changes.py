"""What a resumed run takes from its checkpoint, what from the recipe of today, and what it does not go on without."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR, StepLR

from vidllm.train.joint import train_joint
from vidllm.train.muon import MuonWithAdamW
from vidllm.train.recipes import chosen_recipe
from vidllm.train.resumed_optimizer import keeping_settings
from vidllm.train.run_folder import checkpoint_to_resume

from .own_clips import write_clips
from .stop_at import StopAt
from .two_processes import run_two_processes


pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")
PROCESS = Path(__file__).with_name("resumed_process.py")


def log_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


# ---------------------------------------------------------------------- optimizer


def halved_after_two(step):
    return 1.0 if step < 2 else 0.5


def parts_of(kind, rate, decay, betas):
    """Two parameters, their optimizer, and a schedule that halves rates after two steps."""
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))
    groups = [{"params": [matrix], "lr": rate, "weight_decay": decay}, {"params": [vector], "lr": 0.1 * rate, "weight_decay": 0.0}]  # fmt: skip
    if kind == "muon":
        groups = [{**group, "muon": group["params"][0].ndim == 2} for group in groups]
    optimizer = (MuonWithAdamW if kind == "muon" else torch.optim.AdamW)(groups, lr=rate, betas=betas)
    return [matrix, vector], optimizer, LambdaLR(optimizer, halved_after_two)


def stepped(parameters, optimizer, schedule, steps):
    for number in steps:
        for parameter in parameters:
            generator = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("changed", [False, True])
def test_moments_are_loaded_and_settings_stay(kind, changed):
    first, then = (1e-2, 0.05, (0.9, 0.99)), (3e-2, 0.4, (0.5, 0.7)) if changed else (1e-2, 0.05, (0.9, 0.99))
    old, optimizer, schedule = parts_of(kind, *first)
    stepped(old, optimizer, schedule, range(3))
    states = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    new, resumed, its_schedule = parts_of(kind, *then)
    with torch.no_grad():
        for parameter, value in zip(new, old, strict=True):
            parameter.copy_(value)
    with keeping_settings(resumed, its_schedule):
        resumed.load_state_dict(states[0])
        its_schedule.load_state_dict(states[1])
    matrix, vector = resumed.param_groups
    assert (matrix["lr"], vector["lr"]) == pytest.approx((0.5 * then[0], 0.05 * then[0]))
    assert (matrix["weight_decay"], vector["weight_decay"], vector["betas"]) == (then[1], 0.0, then[2])
    assert its_schedule.get_last_lr() == [matrix["lr"], vector["lr"]]
    # the slow way: the old run's own optimizer, its groups rewritten by hand
    for group, rate, decay in zip(optimizer.param_groups, (1.0, 0.1), (then[1], 0.0), strict=True):
        group.update(lr=0.5 * rate * then[0], weight_decay=decay, betas=then[2])
    schedule.base_lrs = [then[0], 0.1 * then[0]]
    stepped(old, optimizer, schedule, range(3, 6))
    stepped(new, resumed, its_schedule, range(3, 6))
    for mine, wanted in zip(new, old, strict=True):
        # bit for bit where nothing was changed
        torch.testing.assert_close(mine, wanted, rtol=0 if not changed else 1e-6, atol=0 if not changed else 1e-7)


def test_a_schedule_that_goes_on_from_its_last_rate_takes_no_other():
    for rate, refused in ((1e-2, False), (2e-2, True)):
        parameters, optimizer, _ = parts_of("adamw", 1e-2, 0.0, (0.9, 0.99))
        schedule = StepLR(optimizer, 1)
        stepped(parameters, optimizer, schedule, range(2))
        _, resumed, _ = parts_of("adamw", rate, 0.0, (0.9, 0.99))
        other = StepLR(resumed, 1)

        def load(resumed=resumed, other=other, optimizer=optimizer, schedule=schedule):
            with keeping_settings(resumed, other):
                resumed.load_state_dict(optimizer.state_dict())
                other.load_state_dict(schedule.state_dict())

        if refused:
            with pytest.raises(ValueError, match=r"wanted the learning rates \[0.01, 0.001.*StepLR .* got \[0.02, "):
                load()
        else:
            load()
            assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_a_resumed_run_learns_at_the_rate_that_its_recipe_says(tmp_path):
    settings = [
        "steps=4", "save_every=2", "dense_labels=0", "prompts_per_scene=1", f"rooms_cache={tmp_path / 'rooms'}", "schedule=constant_with_warmup",
        "learning_rate_factors=grounding:0.5",
    ]  # fmt: skip
    start = chosen_recipe("debug", settings)
    train_joint(start, tmp_path / "run", use_cpu=True, callbacks=[StopAt(2)])
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    train_joint(start, tmp_path / "run", use_cpu=True, resume=True)
    changed = ["learning_rate=1e-5", "weight_decay=0.5", "betas=0.5,0.6", "learning_rate_factors=grounding:2"]
    trainer = train_joint(chosen_recipe("debug", [*settings, *changed]), tmp_path / "other", use_cpu=True, resume=True)
    groups = trainer.optimizer.param_groups
    assert {group["lr"] for group in groups} == {1e-5, 2e-5}
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    assert {tuple(group["betas"]) for group in groups} == {(0.5, 0.6)}
    mine, wanted = log_of(tmp_path / "other"), log_of(tmp_path / "run")
    assert [line["learning_rate"] for line in mine] == [start.learning_rate] * 2 + [1e-5] * 2
    assert mine[:3] == [*wanted[:2], {**wanted[2], "learning_rate": 1e-5}]
    assert mine[3]["loss"] != wanted[3]["loss"]
    (entry,) = json.loads((tmp_path / "other" / "recipe.json").read_text())["resumed"]
    assert [line.split(":")[0] for line in entry["changed"]] == [
        "learning_rate", "learning_rate_factors", "weight_decay", "betas",
    ]  # fmt: skip


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("gone", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_something_was_taken_out_of_is_not_gone_on_from(tmp_path, gone):
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (folder / name).write_bytes(b"x")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    last = tmp_path / "checkpoint-4"
    assert checkpoint_to_resume(tmp_path, True) == str(last)
    (last / gone).unlink()
    for resume in (True, str(last)):
        with pytest.raises(ValueError, match=f"--resume: wanted {gone[:5]}.* in .*checkpoint-4"):
            checkpoint_to_resume(tmp_path, resume)
    assert checkpoint_to_resume(tmp_path, str(tmp_path / "checkpoint-2")) == str(tmp_path / "checkpoint-2")
    # FSDP and DeepSpeed have folders of their own
    (
        last
        / {"optimizer.pt": "optimizer_0", "scheduler.pt": "global_step4", "rng_state.pth": "rng_state_1.pth"}[gone]
    ).mkdir()
    assert checkpoint_to_resume(tmp_path, True) == str(last)


def test_rows_that_are_others_when_a_run_goes_on_are_told(tmp_path, caplog):
    clips = write_clips(tmp_path / "clips", with_box=False)

    def recipe():
        settings = ["steps=3", "save_every=1", "keep_checkpoints=9", "dense_labels=0", "num_frames=2"]
        return chosen_recipe("debug", settings, data=str(clips))

    out = tmp_path / "run"
    train_joint(recipe(), out, use_cpu=True, callbacks=[StopAt(1)])
    # the same rows in another folder are the same
    clips = shutil.move(clips.parent, tmp_path / "moved") / clips.name
    train_joint(recipe(), out, use_cpu=True, resume=True, callbacks=[StopAt(2)])
    assert "other rows" not in caplog.text
    rows = clips.read_text().splitlines()
    clips.write_text("\n".join([*rows[1:], rows[0]]) + "\n")
    train_joint(recipe(), out, use_cpu=True, resume=True)
    same, other = json.loads((out / "recipe.json").read_text())["resumed"]
    assert same["changed"] == []
    assert other["changed"] == ["data: other rows, or in another order: {'jsonl': 3} -> {'jsonl': 3}"]
    assert "resumed with another recipe: data: other rows" in caplog.text


# ---------------------------------------------------------------------- as nano runs


@pytest.mark.slow
def test_two_processes_that_step_with_muon_in_half_precision_go_on_bit_for_bit(tmp_path):
    """With a worker for the data, every loss of `nano`, and looks at held-out rooms in between."""
    for name, stop, resume in (("whole", 9, 0), ("parts", 3, 0), ("parts", 9, 1)):
        said, codes = run_two_processes(PROCESS, tmp_path / name, tmp_path / "rooms", stop, resume)
        assert codes == [0, 0], said
    wanted, got = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert set(wanted) == set(got)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    logs = [log_of(tmp_path / name) for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5]
    assert {"loc_category", "dense_match", "dense_category", "token"} <= set(logs[0][-1])
    held = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (tmp_path / name / "held_out.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]  # fmt: skip
    assert held[0] == held[1]
    assert [line["step"] for line in held[0]] == [0, 2, 4, 5]
