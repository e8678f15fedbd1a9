"""`vidllm train joint`: what is launched, what is refused before anything is."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

from vidllm import cli_train
from vidllm.cli import app
from vidllm.cli_train import launch_command, run_launcher


def test_several_processes_are_asked_for_as_several_devices():
    words = launch_command("vidllm.train.joint", 2, None, cpu=True)
    assert words[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    # with accelerate's own --cpu it would be one process
    assert "--cpu" not in words
    assert words[words.index("--num_processes") + 1] == "2"
    assert "--multi_gpu" in words
    assert words[-2:] == ["-m", "vidllm.train.joint"]
    words = launch_command("vidllm.train.joint", None, None, cpu=True)
    assert words[words.index("--num_processes") + 1] == "1"
    assert "--multi_gpu" not in words


def test_a_config_file_says_the_rest(tmp_path):
    words = launch_command("vidllm.train.joint", None, tmp_path / "fsdp.yaml", cpu=False)
    assert words[3:] == ["--config_file", str(tmp_path / "fsdp.yaml"), "-m", "vidllm.train.joint"]
    words = launch_command("vidllm.train.joint", 4, tmp_path / "fsdp.yaml", cpu=False)
    assert words[5:7] == ["--num_processes", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["debgu"], "did you mean 'debug'"),
        (["debug", "--set", "step=3"], "did you mean 'steps'"),
        (["nano_lora", "--set", "data=mine.jsonl"], "wanted a model to start from"),
        (["nano_lora", "--data", "absent.jsonl"], "'absent.jsonl' does not exist"),
        (["debug", "--resume"], "wanted a run with a checkpoint"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_launched(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("launched"))
    result = CliRunner().invoke(app, ["train", "joint", *arguments, "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (tmp_path / "run").exists()


def test_arguments_are_handed_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli_train, "run_launcher", lambda words: seen.append(words) or 0)
    out = str(tmp_path / "run")
    wanted = ["debug", "--out", out, "--set", "steps=3", "--set", "seed=4", "--cpu"]
    result = CliRunner().invoke(app, ["train", "joint", *wanted, "--num-processes", "2"])
    assert result.exit_code == 0, result.output
    assert seen[0][-len(wanted) :] == wanted


@pytest.mark.slow
def test_two_real_processes(tmp_path):
    command = [sys.executable, "-c", "from vidllm.cli import main; main()", "train", "joint", "debug", "--cpu"]
    command += ["--out", str(tmp_path / "run"), "--num-processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["processes"] == 2
    assert (tmp_path / "run" / "model.safetensors").is_file()


# A launcher that ends only when it is asked to, and says so.
_LAUNCHER = """
import pathlib, signal, sys, time
said = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (said.write_text("asked to stop"), sys.exit(7)))
said.write_text("started")
time.sleep(60)
"""


def test_a_request_to_stop_reaches_the_processes_that_train(tmp_path):
    said = tmp_path / "said"

    def ask_to_stop():
        while not (said.exists() and said.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=ask_to_stop, daemon=True).start()
    assert run_launcher([sys.executable, "-c", _LAUNCHER, str(said)]) == 7
    assert said.read_text() == "asked to stop"
    assert signal.getsignal(signal.SIGTERM) == before
