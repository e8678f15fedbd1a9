"""`import vidllm` costs next to nothing and leaves the heavy libraries alone."""

import subprocess
import sys

import pytest


LIMIT_S = 0.3
PROBE = """
import sys, time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
print(*sorted(sys.modules))
"""


def probe(module: str, cwd) -> tuple[float, set[str]]:
    """Seconds of one import in a fresh process, and everything that it loaded."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module)], capture_output=True, text=True, check=True, cwd=cwd
    )
    seconds, modules = run.stdout.strip().splitlines()
    return float(seconds), set(modules.split())


def test_import_is_quick_and_light(tmp_path):
    runs = [probe("vidllm", tmp_path) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < LIMIT_S
    heavy = {"torch", "numpy", "transformers", "PIL", "av", "huggingface_hub", "rich", "typer"}
    assert not heavy & runs[0][1]


def test_the_probe_sees_what_an_import_loads(tmp_path):
    _, modules = probe("numpy", tmp_path)
    assert "numpy" in modules


def test_public_names_resolve():
    import vidllm

    assert set(vidllm.__all__) <= set(dir(vidllm))
    for name in vidllm.__all__:
        assert getattr(vidllm, name) is not None
    with pytest.raises(AttributeError, match="VidLLMModle"):
        vidllm.VidLLMModle
