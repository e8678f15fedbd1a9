"""Continuous integration does not pass where the scores that need Java cannot run: their tests would only skip themselves."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / ".ci" / "run"


def program(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


@pytest.mark.skipif(shutil.which("bash") is None or not SCRIPT.is_file(), reason="needs bash and a checkout")
@pytest.mark.parametrize(
    ("python", "code", "said", "made"),
    [
        ("echo", 0, "run (openjdk 17)", ["install", "types", "test"]),
        ("echo no table", 1, "NOT RUN, and they must: no table", ["install"]),
        ("exit 3", 1, "NOT RUN, and they must: the check itself failed", ["install"]),
    ],
)
def test_the_check_decides(tmp_path, python, code, said, made):
    """The script as it is, with stand-ins for `make`, `java` and the environment's Python, which prints the obstacle."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci" / "run")
    program(tmp_path / "bin" / "make", f'echo "$@" >> {tmp_path}/made')
    program(tmp_path / "bin" / "java", "echo 'openjdk 17' >&2")
    program(tmp_path / ".venv" / "bin" / "python", python)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", tmp_path / ".ci" / "run"], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout
    assert (tmp_path / "made").read_text().split() == made
