"""Two real processes that see unlike things: boxes and depth on one, text alone and no depth on the other; and what they do about a NaN."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.train.losses import TERMS

from . import mixed_process
from .own_clips import write_clips
from .two_processes import run_two_processes


STEPS = 5
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


@pytest.fixture(scope="module")
def places(rooms_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return rooms_root, write_clips(folder / "clips", with_box=False)


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def facts_of(folder, rank):
    return json.loads((folder / f"process-{rank}.json").read_text())


@pytest.mark.parametrize("checkpointing", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_boxes_on_one_process_and_text_without_depth_on_the_other_are_one_process_with_both(
    places, tmp_path, checkpointing
):
    """With checkpointing too, which DDP could trip over; the one process computes without."""
    said, codes = run_two_processes(mixed_process.__file__, *places, tmp_path / "two", STEPS, 1, 0, checkpointing)
    assert codes == [0, 0], said
    facts = [facts_of(tmp_path / "two", rank) for rank in range(2)]
    assert [(f["world_size"], f["wrapped"]) for f in facts] == [(2, "DistributedDataParallel")] * 2
    rich, poor = (f["seen"] for f in facts)
    assert len(rich) == len(poor) == STEPS
    assert all(step["boxes"] > 0 and step["depth"] and step["cameras"] and step["finite"] for step in rich)
    assert all(step["boxes"] == 0 and step["finite"] for step in poor)
    # clips without depth and cameras, and questions about a room, in turn
    assert (
        [bool(step["depth"]) for step in poor]
        == [bool(step["cameras"]) for step in poor]
        == [False, True] * 2 + [False]
    )

    torch.set_num_threads(1)
    mixed_process.run(*places, tmp_path / "one", STEPS, 2)
    alone = facts_of(tmp_path / "one", 0)
    assert alone["world_size"] == 1
    assert [step["ids"] for step in alone["seen"]] == [a["ids"] + b["ids"] for a, b in zip(rich, poor, strict=True)]
    mine, wanted = log_of(tmp_path / "two"), log_of(tmp_path / "one")
    assert len(mine) == len(wanted) == STEPS
    for a, b in zip(mine, wanted, strict=True):
        assert set(a) == set(b) >= {*TERMS, "loss", "grad_norm"}
        for name in set(a) - {"seconds_per_step"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (name, a["step"])
    start = mixed_process.build_untrained("vidllm-tiny", seed=4)[0].state_dict()
    mine, wanted = (
        VidLLMForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("two", "one")
    )
    moved = 0
    for name, value in wanted.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)
        # ten times nearer to each other than to where they started
        moved += (value - start[name]).abs().sum() > 10 * (value - mine[name]).abs().sum()
    assert moved > 0.9 * len(wanted)


def test_a_nan_on_one_process_stops_both_which_write_down_what_they_saw(places, tmp_path):
    out = tmp_path / "run"
    said, codes = run_two_processes(mixed_process.__file__, *places, out, STEPS, 1, 4)
    assert codes == [0, 0], said
    for rank, what in ((0, "token = nan"), (1, "gradient = nan")):
        facts = facts_of(out, rank)
        assert f"step 4: wanted finite losses; got {what} for the samples" in facts["error"]
        written = json.loads((out / f"not-finite-4-{rank}.json").read_text())
        assert written == {"step": 4, "not_finite": [what], "sample_ids": facts["seen"][3]["ids"]}
    # step 4 would have been saved, and step 2 deleted
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    saved = load_file(out / "checkpoint-2" / "model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
