"""A saved folder is a Hub repository: it loads and answers where `vidllm` is not installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from vidllm.processing.synthetic_clip import write_synthetic_clip
from vidllm.train.initialise import initialise


CLIENT = Path(__file__).with_name("remote_code_client.py")


@pytest.fixture(scope="module", params=["made by init", "shipped"])
def saved(request, repository, tmp_path_factory):
    """A folder far from the checkout, a clip, and what the installed package says of it."""
    from vidllm import VidLLMForConditionalGeneration, VidLLMProcessor

    root = tmp_path_factory.mktemp("remote")
    if request.param == "shipped":
        made = repository / "model_cards" / "vidllm-nano"
        if not made.is_dir():
            pytest.skip("no model_cards/vidllm-nano")
        clip = made / "demo.mp4"
    else:
        made, clip = root / "made", root / "clip.mp4"
        initialise("vidllm-tiny", made, seed=3)
        write_synthetic_clip(clip, seconds=1.0, size_hw=(48, 64), fps=6)
    folder = shutil.copytree(made, root / "elsewhere" / "model")
    torch.set_num_threads(1)
    model = VidLLMForConditionalGeneration.from_pretrained(folder).eval()
    processor = VidLLMProcessor.from_pretrained(folder)
    chat = [
        {
            "role": "user",
            "content": [{"type": "video", "path": str(clip)}, {"type": "text", "text": "How many chairs are there?"}],
        }
    ]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    sequences = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    reference = root / "reference.safetensors"
    tensors = {
        "input_ids": inputs["input_ids"],
        "pixel_values_videos": inputs["pixel_values_videos"],
        "logits": logits,
        "sequences": sequences,
    }
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, reference)
    return folder, clip, reference


def environment(tmp_path):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**clean, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}


def test_without_torchvision(saved, tmp_path, torchvision_absent):
    result = subprocess.run(
        [sys.executable, str(CLIENT), *map(str, saved), str(tmp_path)],
        capture_output=True, text=True, env=environment(tmp_path), cwd=tmp_path, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert "remote code works" in result.stdout


# The shipped model once in every run is enough.
@pytest.mark.parametrize("saved", ["made by init", pytest.param("shipped", marks=pytest.mark.slow)], indirect=True)
def test_with_torchvision(saved, tmp_path, run_with_torchvision):
    result = run_with_torchvision(CLIENT, *saved, tmp_path, "torchvision", cwd=tmp_path, env=environment(tmp_path))
    assert result.returncode == 0, result.stderr[-4000:]
    assert "remote code works" in result.stdout


def test_the_folder_is_complete(saved):
    folder, _, _ = saved
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "processor_config.json", "chat_template.jinja", "README.md"} <= names  # fmt: skip
    import json

    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoModelForCausalLM",
    }
    for target in config["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}" in (folder / f"{module}.py").read_text()
