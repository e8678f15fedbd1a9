"""Untrained folders: complete, repeatable, all or nothing."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import GenerationConfig

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.synthetic_clip import write_synthetic_clip
from vidllm.train import initialise as module
from vidllm.train.initialise import build_untrained, initialise, is_untrained, save_checkpoint


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init") / "new" / "tiny"
    return folder, initialise("vidllm-tiny", folder, seed=3)


def weights(folder):
    return VidLLMForConditionalGeneration.from_pretrained(folder).state_dict()


def test_folder_is_a_complete_hub_repository(tiny_folder, repository):
    folder, _ = tiny_folder
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "processor_config.json",
        "generation_config.json",
    } <= names
    assert {"chat_template.jinja", "README.md", "initialisation.json"} <= names
    config = json.loads((folder / "config.json").read_text())
    model_class = "modeling_vidllm.VidLLMForConditionalGeneration"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_vidllm.VidLLMConfig",
        "AutoModel": model_class,
        "AutoModelForImageTextToText": model_class,
        "AutoModelForMultimodalLM": model_class,
        "AutoModelForCausalLM": model_class,
    }
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["auto_map"]["AutoProcessor"] == "processing_vidllm.VidLLMProcessor"
    shipped = {
        path.name for part in ("modeling_vidllm", "processing") for path in (repository / part).glob("*_vidllm.py")
    }
    assert names & shipped == {name for name in names if name.endswith(".py")}
    assert {
        "layers_vidllm.py",
        "geometry_vidllm.py",
        "video_reading_vidllm.py",
    } <= names  # found through imports of imports
    assert "untrained" in (folder / "README.md").read_text()


def test_token_ids_and_generation_defaults(tiny_folder):
    folder, _ = tiny_folder
    processor = VidLLMProcessor.from_pretrained(folder)
    config = VidLLMForConditionalGeneration.from_pretrained(folder).config
    for name in ("video_token_id", "coord_token_id", "loc_token_id"):
        assert getattr(config, name) == getattr(processor, name)
    assert config.text_config.vocab_size == 264
    assert len(processor.tokenizer) == 262
    assert processor.tokenizer.convert_ids_to_tokens(config.loc_token_id) == "<loc>"
    assert config.num_scene_tokens == processor.num_scene_tokens
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.max_new_tokens == 64
    assert processor.tokenizer.convert_ids_to_tokens([generation.eos_token_id, generation.pad_token_id]) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]


def test_a_video_goes_in_and_text_comes_out(tiny_folder, tmp_path):
    folder, _ = tiny_folder
    write_synthetic_clip(tmp_path / "room.mp4", seconds=1.0, size_hw=(56, 84), fps=4)
    model, processor = VidLLMForConditionalGeneration.from_pretrained(folder), VidLLMProcessor.from_pretrained(folder)
    chat = [
        {
            "role": "user",
            "content": [{"type": "video", "path": str(tmp_path / "room.mp4")}, {"type": "text", "text": "How many?"}],
        }
    ]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["pixel_values_videos"].shape == (1, 3, 3, 28, 42)
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert isinstance(processor.decode(generated[0, inputs["input_ids"].shape[1] :]), str)


def test_same_seed_same_weights_and_the_callers_random_state_stays(tiny_folder, tmp_path):
    folder, _ = tiny_folder
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    initialise("vidllm-tiny", tmp_path / "same", seed=3)
    assert torch.equal(torch.rand(3), expected)
    initialise("vidllm-tiny", tmp_path / "other", seed=4)
    first, same, other = weights(folder), weights(tmp_path / "same"), weights(tmp_path / "other")
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_report(tiny_folder):
    folder, report = tiny_folder
    assert json.loads((folder / "initialisation.json").read_text()) == report
    assert (report["preset"], report["seed"], report["untrained"]) == ("vidllm-tiny", 3, True)
    model = VidLLMForConditionalGeneration.from_pretrained(folder)
    assert report["total_parameters"] == sum(value.numel() for value in model.parameters())
    assert {part["source"] for part in report["parts"].values()} == {"random"}
    assert sum(part["fresh_parameters"] for part in report["parts"].values()) == report["total_parameters"]
    assert {"encoder", "adapter", "reconstruction", "language_model", "grounding", "lm_head"} <= set(report["parts"])


def test_marker(tiny_folder, tmp_path):
    folder, _ = tiny_folder
    assert is_untrained(folder)
    assert not is_untrained(tmp_path)
    assert not is_untrained("someone/some-model")
    (tmp_path / "initialisation.json").write_text('{"untrained": false}')
    assert not is_untrained(tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "initialisation.json").write_text(text)
        with pytest.raises(ValueError, match=r"initialisation\.json"):
            is_untrained(tmp_path)


def test_half_precision_leaves_what_must_stay_in_float32(tiny_folder, tmp_path):
    """The folder's dtypes are those that loading the float32 folder in bfloat16 gives, and values are cast once."""
    folder, _ = tiny_folder
    report = initialise("vidllm-tiny", tmp_path / "half", seed=3, dtype="bfloat16")
    assert report["parts"]["language_model"]["dtypes"] == ["bfloat16"]
    assert report["parts"]["metric_depth"]["dtypes"] == ["float32"]
    cast = VidLLMForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    half = VidLLMForConditionalGeneration.from_pretrained(tmp_path / "half", dtype="auto").state_dict()
    assert {value.dtype for value in half.values()} == {torch.bfloat16, torch.float32}
    for name, value in cast.items():
        assert half[name].dtype == value.dtype, name
        assert torch.equal(half[name], value), name
    with pytest.raises(ValueError, match=r"dtype: wanted one of float32, bfloat16, float16; got int8"):
        initialise("vidllm-tiny", tmp_path / "x", dtype="int8")
    assert not (tmp_path / "x").exists()


def test_occupied_or_impossible_folders_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="full, which holds something already"):
        initialise("vidllm-tiny", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ValueError, match="holds something already"):
        initialise("vidllm-tiny", tmp_path / "full" / "thesis.txt")
    with pytest.raises(ValueError, match="cannot be made"):
        initialise("vidllm-tiny", tmp_path / "full" / "thesis.txt" / "below")
    with pytest.raises(ValueError, match="did you mean 'vidllm-tiny'"):
        initialise("vidllm-tinny", tmp_path / "typo")
    (tmp_path / "empty").mkdir()
    initialise("vidllm-tiny", tmp_path / "empty")
    assert is_untrained(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(module.VidLLMProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        initialise("vidllm-tiny", tmp_path / "broken")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from vidllm.train import initialise as module
def die(self, *args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
module.VidLLMProcessor.save_pretrained = die
module.initialise("vidllm-tiny", sys.argv[1])
"""


def test_a_killed_run_leaves_nothing_that_loads(tmp_path):
    target = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(target)], cwd=tmp_path, env=dict(os.environ), capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not target.exists()
    left = list(tmp_path.rglob("*"))
    assert any(path.name.endswith(".safetensors") for path in left)  # it was killed in the middle, weights written
    assert not [path for path in left if path.name == "config.json"]


def test_model_and_processor_must_agree(tmp_path):
    model, processor = build_untrained("vidllm-tiny")
    model.config.loc_token_id = 17
    with pytest.raises(ValueError, match="loc_token_id: the model's config says 17, the processor 261"):
        save_checkpoint(model, processor, tmp_path / "x")
    model.config.loc_token_id = 261
    processor.num_scene_tokens = 5
    with pytest.raises(ValueError, match="num_scene_tokens"):
        save_checkpoint(model, processor, tmp_path / "x")
    processor.num_scene_tokens = 16
    save_checkpoint(model, processor, tmp_path / "x", extra_files={"NOTES.txt": "hello"})
    assert (tmp_path / "x" / "NOTES.txt").read_text() == "hello"
    assert not is_untrained(tmp_path / "x")
