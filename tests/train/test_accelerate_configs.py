"""Configs of `accelerate`: each is read as what it says, and the model can be cut as FSDP2 cuts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file


CONFIGS = Path(__file__).resolve().parents[2] / "train" / "accelerate"
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_a_config(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type.value == KINDS[name]
    assert config.num_processes == 8
    assert config.num_machines == 1
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(KINDS)


def test_a_model_sharded_over_two_processes_takes_the_same_step_and_is_published_whole(tmp_path):
    program = Path(__file__).with_name("sharded_process.py")
    tests = program.parents[1]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(program),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["world"] == 2
    assert report["blocks"] > 8
    assert report["kinds"] == ["DTensor"]
    assert report["sharded"] == pytest.approx(report["plain"], rel=1e-5)
    assert report["plain"][1] != report["plain"][0]
    assert report["published"] == {"joint": True, "distillation": True, "lora": True, "adapter": True}
