"""Untrained folders: complete, repeatable, all or nothing."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import GenerationConfig
from typer.testing import CliRunner

from vidllm import cli
from vidllm.cli import app
from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.synthetic_clip import write_synthetic_clip
from vidllm.train import initialise as module
from vidllm.train.initialise import (
    build_untrained,
    initialise,
    initialise_from_sources,
    is_untrained,
    save_checkpoint,
    untrained_notice,
)
from vidllm.train.shard_writer import HIDDEN, ShardWriter, reveal_weights


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
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        VidLLMForConditionalGeneration.from_pretrained(next(tmp_path.glob(".killed.*.partial")))


@pytest.mark.parametrize("composed", [False, True])
def test_nothing_loads_before_everything_is_there(tmp_path, monkeypatch, vggt, composed):
    """Asked whenever a file of the folder has been finished by one of those who write it: a kill there leaves nothing that loads."""
    seen = []

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(self, folder, *args, **kwargs):
            result = real(self, folder, *args, **kwargs)
            partial = next(tmp_path.glob(".out.*.partial"))
            if not (partial / "README.md").is_file():
                seen.append(owner.__name__)
                # without a config transformers would make a default model, of billions of parameters
                with pytest.raises(OSError, match=r"no file named model\.safetensors"):
                    VidLLMForConditionalGeneration.from_pretrained(partial)
            return result

        monkeypatch.setattr(owner, name, watched)

    for owner in (VidLLMForConditionalGeneration, GenerationConfig, VidLLMProcessor, VidLLMConfig):
        watch(owner, "save_pretrained")
    if composed:
        initialise_from_sources("vidllm-tiny", tmp_path / "out", geometry=str(vggt))
    else:
        initialise("vidllm-tiny", tmp_path / "out")
    assert {"GenerationConfig", "VidLLMProcessor"} <= set(seen)
    VidLLMForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_weights_in_several_files_get_their_names(tmp_path):
    model, own = build_untrained("vidllm-tiny")[0], tmp_path / "own"
    model.save_pretrained(tmp_path, variant=HIDDEN, max_shard_size="300KB")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        VidLLMForConditionalGeneration.from_pretrained(tmp_path)
    reveal_weights(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors*"))
    assert len(names) > 3
    assert not [name for name in names if HIDDEN in name]
    listed = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(listed.values()) == {name for name in names if name.endswith(".safetensors")}
    loaded = VidLLMForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    state = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    # a writer of single tensors names its files alike
    own.mkdir()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    with ShardWriter(own, shapes, dict.fromkeys(shapes, torch.float32), 300_000, hidden=True) as writer:
        for name, value in state.items():
            writer.write(name, value)
    model.config.save_pretrained(own)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        VidLLMForConditionalGeneration.from_pretrained(own)
    reveal_weights(own)
    loaded = VidLLMForConditionalGeneration.from_pretrained(own).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_what_is_said_of_an_untrained_checkpoint(tiny_folder, tmp_path, vggt):
    """A start from VGGT reconstructs as VGGT does; nobody shall call that noise."""
    assert untrained_notice(tiny_folder[0]) == "untrained weights: answers are random, boxes and shapes too"
    assert untrained_notice(tmp_path) is None
    initialise_from_sources("vidllm-tiny", tmp_path / "start", geometry=str(vggt))
    said = "starting checkpoint, untrained: answers and boxes are random; reconstruction: VGGT's, in relative units"
    assert untrained_notice(tmp_path / "start") == said
    assert is_untrained(tmp_path / "start")
    write_synthetic_clip(tmp_path / "room.mp4", seconds=1.0, size_hw=(56, 84), fps=4)
    command = [
        "reconstruct",
        str(tmp_path / "room.mp4"),
        "--model",
        str(tmp_path / "start"),
        "--out",
        str(tmp_path / "r"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert f"notice: {said}" in result.stderr
    assert "untrained weights" not in result.stderr


def test_init_says_what_it_is_doing(tmp_path, monkeypatch, vggt):
    told = []

    @contextlib.contextmanager
    def spinner(text):
        told.append(text)
        yield told.append

    monkeypatch.setattr(cli, "progress", spinner)
    result = CliRunner().invoke(app, ["init", "vidllm-tiny", "--out", str(tmp_path / "out"), "--geometry", str(vggt)])
    assert result.exit_code == 0, result.stderr
    assert told == ["opening sources", "writing geometry", "writing fresh parts", "checksums of the sources"]
    assert "reconstruction: VGGT's, in relative units" in result.stderr


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
