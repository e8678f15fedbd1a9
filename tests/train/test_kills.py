"""A run that is killed again and again, whatever it is doing, ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file


STEPS = 10
SETTINGS = [f"steps={STEPS}", "save_every=1", "rooms.num_rooms=4", "dense_labels=0", "keep_checkpoints=2"]


def command(out, cache, resume):
    words = [sys.executable, "-m", "vidllm.train.joint", "debug", "--out", str(out), "--cpu"]
    for setting in [*SETTINGS, f"rooms_cache={cache}"]:
        words += ["--set", setting]
    return [*words, "--resume"] if resume else words


def has_checkpoint(out):
    return any((path / "trainer_state.json").is_file() for path in out.glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_change_nothing(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    cache, whole, killed = tmp_path / "rooms", tmp_path / "whole", tmp_path / "killed"
    begun = time.monotonic()
    subprocess.run(command(whole, cache, resume=False), env=environment, check=True, capture_output=True)
    duration = time.monotonic() - begun
    rng = random.Random(7)
    kills, finished = 0, False
    while kills < 10 and not finished:
        # a kill before the first checkpoint leaves nothing to go on from: the run starts anew in the same folder, once it is empty
        resume = has_checkpoint(killed)
        if not resume and killed.exists():
            for path in sorted(killed.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        child = subprocess.Popen(
            command(killed, cache, resume), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            # most of a run's time is the start of the program
            _, errors = child.communicate(timeout=rng.uniform(0.3, 1.0) * duration)
            assert child.returncode == 0, errors.decode()[-2000:]
            finished = True
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
    if not finished:
        done = subprocess.run(
            command(killed, cache, has_checkpoint(killed)), env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert kills >= 3
    wanted, got = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert set(got) == set(wanted)
    assert all((got[name] == value).all() for name, value in wanted.items())
    last = [json.loads((out / "log.jsonl").read_text().splitlines()[-1]) for out in (whole, killed)]
    assert last[0]["step"] == last[1]["step"] == STEPS
    assert last[0]["loss"] == last[1]["loss"]
