"""The environment of the tests is without torchvision, and a process with it can be made; see torchvision_present.py."""

import importlib.metadata
import importlib.util
import json

import pytest


SEEN = """
import importlib.metadata, json
import torch, torchvision, transformers, vidllm
from transformers.utils import is_torchvision_available
from torchvision.transforms.v2 import functional
# What a broken torchvision takes down: every lazy import that touches processing.
from transformers import AutoProcessor, AutoVideoProcessor, pipeline
from transformers.video_processing_utils import BaseVideoProcessor
frames = torch.rand(3, 3, 28, 42)
print(json.dumps({
    "available": is_torchvision_available(),
    "version": importlib.metadata.version("torchvision"),
    "place": torchvision.__file__,
    "resized": list(functional.resize(frames, [14, 21], antialias=True).shape),
    "package": vidllm.VidLLMConfig.model_type,
    "arguments": __import__("sys").argv[1:],
}))
"""


def test_torchvision_is_absent(torchvision_absent):
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    assert importlib.util.find_spec("torchvision") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("torchvision")
    assert not is_torchvision_available()
    assert AutoProcessor is not None


def test_transformers_sees_an_importable_torchvision(run_with_torchvision, tmp_path):
    script = tmp_path / "seen.py"
    script.write_text(SEEN)
    run = run_with_torchvision(script, "one", "two")
    assert run.returncode == 0, run.stderr[-2000:]
    seen = json.loads(run.stdout.strip().splitlines()[-1])
    assert seen["available"] is True
    assert seen["version"].split("+")[0] == "0.28.0"
    assert "torchvision_present" in seen["place"]
    assert seen["resized"] == [3, 3, 14, 21]
    assert seen["package"] == "vidllm"
    assert seen["arguments"] == ["one", "two"]


def test_a_failing_script_fails_the_run(run_with_torchvision, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(3)\n")
    assert run_with_torchvision(script).returncode == 3
