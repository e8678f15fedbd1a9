"""LoRA and DoRA, tied and untied language models, a base in 4 bits: what is learned is in the adapter, and comes out of it anywhere."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import call_metric
from transformers import TrainerCallback
from transformers.utils import is_bitsandbytes_available

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.train.initialise import build_untrained, save_checkpoint
from vidllm.train.joint import train_joint
from vidllm.train.lora import four_bit_settings
from vidllm.train.presets import preset
from vidllm.train.recipes import chosen_recipe

from . import adapter_process
from .own_clips import write_clips


pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*gradient_checkpointing")
# What bitsandbytes quantises by blocks of 64.
TEXT = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("adapters") / "clips", questions=[("How many chairs?", "two")])


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """Checkpoints with a tied or an untied language model, made once."""
    folders = {}

    def get(tied):
        if tied not in folders:
            folder = tmp_path_factory.mktemp("base") / "model"
            torch.manual_seed(11)
            config = preset("vidllm-tiny").config(text_config={**TEXT, "tie_word_embeddings": tied})
            model = VidLLMForConditionalGeneration(config)
            assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
            small, processor = build_untrained("vidllm-tiny")
            model.generation_config = small.generation_config
            save_checkpoint(model, processor, folder)
            folders[tied] = call_metric(folder)
        return folders[tied]

    return get


def recipe_of(base, clips, *settings):
    usual = [f"model={base}", "batch_size=3", "prompts_per_scene=3", "lora.rank=4", "log_every=1", "save_every=100"]
    return chosen_recipe("nano_lora", [*usual, *settings], data=str(clips))


def frames_of(clips):
    return str(clips.parent / "clip0")


def assert_same_answer(mine, wanted, tolerance):
    assert mine["text"] == wanted["text"]
    assert len(mine["boxes"]) == len(wanted["boxes"])
    for name in ("boxes", "scores"):
        torch.testing.assert_close(
            torch.tensor(mine[name]), torch.tensor(wanted[name]), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize(
    ("tied", "dora"),
    [
        pytest.param(False, False, id="untied-lora"),
        pytest.param(True, True, id="tied-dora"),
        pytest.param(True, False, id="tied-lora", marks=pytest.mark.slow),
        pytest.param(False, True, id="untied-dora", marks=pytest.mark.slow),
    ],
)
def test_a_fresh_process_grounds_with_folder_and_adapter(base_of, clips, tmp_path, tied, dora):
    base, out = base_of(tied), tmp_path / "run"
    train_joint(recipe_of(base, clips, "steps=30", "learning_rate=1e-2", f"lora.dora={dora}"), out, use_cpu=True)
    adapter = out / "adapter"
    assert sorted(path.name for path in adapter.glob("*.safetensors")) == ["adapter_model.safetensors"]
    assert json.loads((adapter / "adapter_config.json").read_text())["use_dora"] is dora
    # checkpoints of the run hold the adapter alone too
    assert not list((out / "checkpoint-30").glob("model*.safetensors"))

    processor = VidLLMProcessor.from_pretrained(base)
    start = VidLLMForConditionalGeneration.from_pretrained(base).eval()
    untrained = adapter_process.answer_of(start, processor, frames_of(clips))
    assert "<loc>" not in untrained["text"]
    adapted = PeftModel.from_pretrained(start, str(adapter)).eval()
    unmerged = adapter_process.answer_of(adapted, processor, frames_of(clips))
    assert unmerged["text"].startswith("<loc>")
    assert len(unmerged["boxes"]) >= 1
    merged = VidLLMForConditionalGeneration.from_pretrained(out).eval()
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied
    assert_same_answer(adapter_process.answer_of(merged, processor, frames_of(clips)), unmerged, 1e-4)

    words = [sys.executable, "-I", adapter_process.__file__, str(base), str(adapter), frames_of(clips)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    fresh = json.loads(done.stdout.splitlines()[-1])
    assert not fresh["package"]
    assert fresh["class"] == "transformers_modules"
    assert_same_answer(fresh, unmerged, 1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_only_rows_of_special_tokens_change_in_embedding_and_head(base_of, clips, tmp_path, tied):
    out = tmp_path / "run"
    train_joint(recipe_of(base_of(tied), clips, "steps=3"), out, use_cpu=True)
    before, after = (VidLLMForConditionalGeneration.from_pretrained(place) for place in (base_of(tied), out))
    special = {before.config.loc_token_id, before.config.coord_token_id}
    for old, new in ((before.get_input_embeddings(), after.get_input_embeddings()), (before.lm_head, after.lm_head)):
        assert set((old.weight != new.weight).any(1).nonzero().flatten().tolist()) == special
    for name, moved in (("grounding", True), ("adapter", True), ("scene_tokens", True), ("encoder", False), ("reconstruction", False)):  # fmt: skip
        pairs = zip(getattr(before.model, name).parameters(), getattr(after.model, name).parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs) == moved, name


class Watch(TrainerCallback):
    """Layers of the language model, and what of them moved."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("q_proj.base_layer")}
        self.others = {type(m).__name__ for n, m in model.named_modules() if n.endswith(("fc1", "lm_head.base_layer"))}
        self.before = {name: value.detach().clone() for name, value in model.named_parameters()}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.moved = {name for name, value in model.named_parameters() if not torch.equal(value, self.before[name])}
        self.kept = set(self.before) - self.moved


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is an optional dependency")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_base_in_4_bits_is_trained_on_the_cpu_and_melted_into_its_own_weights(base_of, clips, tmp_path, dora):
    watch, out, base = Watch(), tmp_path / "run", base_of(False)
    settings = ["steps=2", "lora.four_bits=true", f"lora.dora={dora}"]
    train_joint(recipe_of(base, clips, *settings), out, use_cpu=True, callbacks=[watch])
    assert watch.kinds == {"Linear4bit"}
    assert "Linear4bit" not in watch.others
    assert {name for name in watch.moved if ".language_model.layers." in name and "lora_" not in name} == set()
    assert [name for name in watch.kept if "lora_B" in name] == []
    assert any("q_proj.base_layer.weight" in name for name in watch.kept)
    assert any("grounding" in name for name in watch.moved)
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    # what is written is in full precision: the checkpoint's weights and the adapter
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    written = VidLLMForConditionalGeneration.from_pretrained(out).state_dict()
    whole = VidLLMForConditionalGeneration.from_pretrained(base)
    wanted = PeftModel.from_pretrained(whole, str(out / "adapter")).merge_and_unload().state_dict()
    assert set(written) == set(wanted)
    for name, value in wanted.items():
        assert written[name].dtype == value.dtype == torch.float32, name
        torch.testing.assert_close(written[name], value, rtol=0, atol=0)


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is an optional dependency")
def test_a_resumed_run_in_4_bits_is_the_uninterrupted_one(base_of, clips, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 1

    recipe = recipe_of(base_of(True), clips, "steps=3", "save_every=1", "lora.four_bits=true")
    train_joint(recipe, tmp_path / "whole", use_cpu=True)
    train_joint(recipe, tmp_path / "parts", use_cpu=True, callbacks=[Stop()])
    train_joint(recipe, tmp_path / "parts", use_cpu=True, resume=True)
    whole, parts = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "parts")
    )
    assert set(whole) == set(parts)
    assert [name for name, value in whole.items() if not torch.equal(parts[name], value)] == []


def test_4_bits_without_bitsandbytes_are_refused(monkeypatch):
    monkeypatch.setattr("vidllm.train.lora.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match=r"lora.four_bits: wanted bitsandbytes: pip install 'vidllm\[quant\]'"):
        four_bit_settings(torch.float32)
