"""A run that is killed ten times, whatever it is doing, ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file


KILLS, STEPS = 10, 60
SETTINGS = [f"steps={STEPS}", "save_every=1", "rooms.num_rooms=4", "dense_labels=0", "keep_checkpoints=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(out, cache, resume):
    words = [sys.executable, "-m", "vidllm.train.joint", "debug", "--out", str(out), "--cpu"]
    for setting in [*SETTINGS, f"rooms_cache={cache}"]:
        words += ["--set", setting]
    return [*words, "--resume"] if resume else words


def steps_logged(out):
    """Of this run and of those before it."""
    log = out / "log.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


def killed(words, out, rng):
    """Start a run and kill it: while the program starts, or some steps after that; says at which step it was."""
    child = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    begun = steps_logged(out)
    moment = rng.choice(("start", "first step", "steps"))
    # most of a run's time is the start of the program, and a checkpoint takes part of a step
    delay = rng.uniform(0, 12) if moment == "start" else rng.uniform(0, 1)
    if moment != "start":
        enough = begun + (1 if moment == "first step" else rng.randint(2, 4))
        while steps_logged(out) < enough and child.poll() is None:
            time.sleep(0.02)
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    errors = child.communicate()[1].decode()
    # it was killed, and had not ended by itself
    assert child.returncode == -signal.SIGKILL, errors[-2000:]
    return steps_logged(out)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_kills_change_nothing(tmp_path):
    cache, whole, parts = tmp_path / "rooms", tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, cache, resume=False), env=ENVIRONMENT, check=True, capture_output=True)
    rng = random.Random(7)
    # a run that was killed before it made its folder has not begun
    reached = [killed(command(parts, cache, parts.exists()), parts, rng) for _ in range(KILLS)]
    assert 0 < max(reached) < STEPS
    done = subprocess.run(command(parts, cache, resume=True), env=ENVIRONMENT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    wanted, got = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert set(got) == set(wanted)
    assert all((got[name] == value).all() for name, value in wanted.items())
    lines = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (whole, parts)]
    assert [line["step"] for line in lines[1]] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    sys.stdout.write(f"killed at steps {reached}; last loss {lines[1][-1]['loss']}\n")
