"""Fine-tuning on own videos with LoRA: what is trained, what is written, how a run goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny import call_metric
from transformers import TrainerCallback

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.train.initialise import build_untrained, initialise
from vidllm.train.joint import train_joint
from vidllm.train.lora import add_lora
from vidllm.train.recipes import LoraSettings, chosen_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint to start from."""
    folder = tmp_path_factory.mktemp("base") / "model"
    initialise("vidllm-tiny", folder, seed=11)
    return folder


@pytest.fixture(scope="module")
def metric_base(base, tmp_path_factory):
    """The same checkpoint, but it gives metres."""
    return call_metric(shutil.copytree(base, tmp_path_factory.mktemp("metric_base") / "model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three clips without poses, with questions, and one object with a box."""
    folder = tmp_path_factory.mktemp("mine")
    rng = np.random.default_rng(0)
    lines = []
    for clip in range(3):
        (folder / f"clip{clip}").mkdir()
        for number in range(3):
            picture = rng.integers(0, 255, (28, 42, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"clip{clip}" / f"{number}.png")
        for question, answer in (("How many chairs?", "two"), ("What colour is the wall?", "white")):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{answer} {clip}"}]
            lines.append({"video": f"clip{clip}", "messages": turns})
    lines.append(
        {
            "video": "clip0", "task": "ground", "box_frame": "room", "room_from_world": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
            "messages": [{"role": "user", "content": "Where is the lamp?"}, {"role": "assistant", "content": [{"type": "box"}]}],
            "boxes": [[0, 1, 0, 1, 1, 1]],
        }
    )  # fmt: skip
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe_of(base, data, *settings):
    usual = [
        f"model={base}",
        "steps=4",
        "batch_size=3",
        "prompts_per_scene=2",
        "lora.rank=4",
        "log_every=1",
        "save_every=2",
    ]
    return chosen_recipe("nano_lora", [*usual, *settings], data=str(data))


@pytest.fixture(scope="module")
def run(metric_base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "run"
    trainer = train_joint(recipe_of(metric_base, data, "lora.dropout=0.1"), out, use_cpu=True)
    return out, trainer


def logits(model, processor):
    """Of a prompt with a video that ends in `<loc>`, the boxes there, and the depth, in the unit that the model says."""
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Where is the lamp?"}]},
            {"role": "assistant", "content": [{"type": "box"}]}]  # fmt: skip
    pixels = torch.randn(1, 3, 3, 28, 42, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        scene = model.encode_scene(pixels)
        inputs = processor.apply_chat_template(chat, scene=scene, tokenize=True, return_dict=True, return_tensors="pt")
        output = model(**inputs, scene=scene)
    return output.logits, output.grounding.boxes, scene.reconstruction.depth


def test_adapter_on_the_base_equals_the_merged_folder(metric_base, run):
    out, _ = run
    processor = VidLLMProcessor.from_pretrained(out)
    merged = logits(VidLLMForConditionalGeneration.from_pretrained(out), processor)
    model = VidLLMForConditionalGeneration.from_pretrained(metric_base)
    untrained = logits(model, processor)
    adapted = PeftModel.from_pretrained(model, str(out / "adapter")).eval()
    for with_adapter, whole in zip(logits(adapted.get_base_model(), processor), merged, strict=True):
        torch.testing.assert_close(with_adapter, whole, rtol=1e-5, atol=1e-5)
    for whole, before in zip(merged[:2], untrained[:2], strict=True):
        assert (whole - before).abs().max() > 1e-3
    assert not list((out / "adapter").glob("model*.safetensors"))
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_size > 1000


def test_what_is_trained(base, run):
    out, _ = run
    before = VidLLMForConditionalGeneration.from_pretrained(base).state_dict()
    after = VidLLMForConditionalGeneration.from_pretrained(out).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(before) == set(after)
    assert not any(name.startswith("model.encoder.") for name in changed)
    language = {
        name for name in before if name.startswith("model.language_model.layers.") and name.endswith("proj.weight")
    }
    assert language <= changed
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        rows = (before[name] != after[name]).any(dim=1).nonzero().flatten().tolist()
        assert rows, name
        config = VidLLMForConditionalGeneration.from_pretrained(base).config
        assert set(rows) <= {config.loc_token_id, config.coord_token_id}, name
    for name in sorted(changed - language - {"model.language_model.embed_tokens.weight", "lm_head.weight"}):
        assert name.split(".")[1] in {"adapter", "scene_tokens", "point_embedding", "grounding"}


def test_a_resumed_run_is_the_uninterrupted_one(metric_base, data, run, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    recipe = recipe_of(metric_base, data, "lora.dropout=0.1")
    train_joint(recipe, tmp_path / "run", use_cpu=True, callbacks=[Stop()])
    train_joint(recipe, tmp_path / "run", use_cpu=True, resume=True)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        wanted, got = load_file(Path(run[0]) / name), load_file(tmp_path / "run" / name)
        assert set(wanted) == set(got)
        assert all(torch.equal(wanted[key], got[key]) for key in wanted), name


ROOMS = ["freeze_encoder=true", "lora.rank=4", "steps=3", "learning_rate=1e-2", "save_every=9", "dense_labels=0"]
# as single_gpu_lora has it
WITHOUT_GEOMETRY = r"train_only=lora_|trainable_tokens|\.(adapter|scene_tokens|point_embedding|grounding)\."


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("rooms_of_debug")


def assert_adapter_is_merged(base, out):
    merged = VidLLMForConditionalGeneration.from_pretrained(out).eval()
    adapted = PeftModel.from_pretrained(VidLLMForConditionalGeneration.from_pretrained(base), str(out / "adapter"))
    adapted = adapted.eval().get_base_model()
    processor = VidLLMProcessor.from_pretrained(out)
    for mine, wanted in zip(logits(adapted, processor), logits(merged, processor), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    assert adapted.config.is_metric == merged.config.is_metric


@pytest.mark.parametrize("settings", [[], [WITHOUT_GEOMETRY]], ids=["with-geometry", "without-geometry"])
def test_on_rooms_adapter_and_base_that_gives_metres_are_the_merged_model(metric_base, cache, tmp_path, settings):
    out = tmp_path / "run"
    train_joint(
        chosen_recipe("debug", [*ROOMS, f"model={metric_base}", f"rooms_cache={cache}", *settings]), out, use_cpu=True
    )
    assert_adapter_is_merged(metric_base, out)
    assert json.loads((out / "config.json").read_text())["is_metric"]
    kept = load_file(out / "adapter" / "adapter_model.safetensors")
    geometry = [name for name in kept if "reconstruction" in name or "metric_depth" in name]
    assert bool(geometry) != bool(settings)
    assert any("grounding" in name for name in kept)


def test_boxes_in_metres_are_refused_where_nothing_gives_metres(base, data, cache, tmp_path):
    rooms = chosen_recipe("debug", [*ROOMS, f"model={base}", f"rooms_cache={cache}", WITHOUT_GEOMETRY])
    for recipe, number in ((recipe_of(base, data), 1), (rooms, 6)):
        with pytest.raises(
            ValueError, match=f"wanted a model that gives metres .*; got a relative one and {number} such"
        ):
            train_joint(recipe, tmp_path / "run", use_cpu=True)
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_clips_that_are_only_talked_about_need_no_metres_and_teach_none(base, data, tmp_path):
    spoken = data.with_name("spoken.jsonl")
    spoken.write_text("".join(line + "\n" for line in data.read_text().splitlines() if '"boxes"' not in line))
    train_joint(recipe_of(base, spoken, "steps=1"), tmp_path / "run", use_cpu=True)
    assert not json.loads((tmp_path / "run" / "config.json").read_text())["is_metric"]
    assert_adapter_is_merged(base, tmp_path / "run")


def test_metres_that_a_run_teaches_are_in_the_merged_model_and_no_adapter_is_left_without_them(
    base, cache, tmp_path, caplog
):
    out = tmp_path / "run"
    recipe = chosen_recipe("debug", [*ROOMS, f"model={base}", f"rooms_cache={cache}"])
    train_joint(recipe, out, use_cpu=True)
    assert json.loads((out / "config.json").read_text())["is_metric"]
    assert not (out / "adapter").exists()
    assert "metres, which an adapter alone cannot say" in caplog.text
    # and so it does not matter that the published model was merged: its weights are those of the last checkpoint on the base
    adapted = PeftModel.from_pretrained(
        VidLLMForConditionalGeneration.from_pretrained(base), str(out / "checkpoint-3")
    )
    wanted = adapted.merge_and_unload().state_dict()
    got = VidLLMForConditionalGeneration.from_pretrained(out).state_dict()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_adapters_outside_the_language_model_are_refused():
    model = build_untrained("vidllm-tiny")[0]
    with pytest.raises(ValueError, match=r"lora.targets: wanted layers of the language model alone; got .*encoder"):
        add_lora(model, LoraSettings(targets=r".*(query|q_proj|fc1)"))
