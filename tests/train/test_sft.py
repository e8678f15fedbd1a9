"""trl's trainer with our losses: same loss as the joint trainer, boxes are learned, YAML and command line are read."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny import call_metric
from transformers import TrainerCallback, TrainingArguments
from trl import SFTConfig

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.benchmarks.load import load_benchmark
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.train.collator import VidLLMCollator
from vidllm.train.initialise import initialise
from vidllm.train.joint_trainer import VidLLMJointTrainer
from vidllm.train.losses import TERMS
from vidllm.train.sft import VidLLMSFTTrainer, main, sft_arguments


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A checkpoint, and two clips with three questions and a box."""
    root = tmp_path_factory.mktemp("sft")
    initialise("vidllm-tiny", root / "model", seed=11)
    call_metric(root / "model")
    rng = np.random.default_rng(0)
    lines = []
    for clip in range(2):
        (root / f"clip{clip}").mkdir()
        for number in range(3):
            Image.fromarray(rng.integers(0, 255, (28, 42, 3), dtype=np.uint8)).save(
                root / f"clip{clip}" / f"{number}.png"
            )
        turns = [{"role": "user", "content": "How many chairs?"}, {"role": "assistant", "content": f"two {clip}"}]
        lines.append({"video": f"clip{clip}", "messages": turns})
    lines.append(
        {
            "video": "clip0", "task": "ground", "box_frame": "room", "room_from_world": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
            "messages": [{"role": "user", "content": "Where is the lamp?"}, {"role": "assistant", "content": [{"type": "box"}]}],
            "boxes": [[0, 1, 0, 1, 1, 1]],
        }
    )  # fmt: skip
    (root / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture
def parts(places):
    model = VidLLMForConditionalGeneration.from_pretrained(places / "model", dtype=torch.float32)
    processor = VidLLMProcessor.from_pretrained(places / "model")
    return model, processor, load_benchmark("jsonl", str(places / "mine.jsonl"), "train")


SETTINGS = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False, "max_steps": 2, "seed": 3, "per_device_train_batch_size": 3, "activation_checkpointing": False, "dataloader_pin_memory": False}  # fmt: skip


def test_the_loss_is_that_of_the_joint_trainer(parts, tmp_path):
    model, processor, rows = parts
    batch = VidLLMCollator(processor, num_frames=3, seed=3)([rows[number] for number in range(3)])
    # two rows are about one video
    assert len(batch["pixel_values_videos"]) == 2
    losses = []
    for kind in (VidLLMSFTTrainer, VidLLMJointTrainer):
        if kind is VidLLMSFTTrainer:
            args = sft_arguments(SFTConfig(output_dir=str(tmp_path / "a"), **SETTINGS))
            more = {"train_dataset": rows, "data_collator": VidLLMCollator(processor, num_frames=3)}
        else:
            args, more = TrainingArguments(output_dir=str(tmp_path / "b"), remove_unused_columns=False, **SETTINGS), {}
        fresh = VidLLMForConditionalGeneration(model.config).train()
        fresh.load_state_dict(model.state_dict())
        trainer = kind(model=fresh, args=args, processing_class=processor, freeze_geometry=True, **more)
        (completed,), counts = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        losses.append(trainer.training_step(trainer.model, completed, counts).item())
        boxes = [p.grad for name, p in fresh.named_parameters() if "grounding" in name and p.grad is not None]
        assert any(grad.abs().sum() > 0 for grad in boxes), kind
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_rows_that_trl_would_prepare_are_refused(parts, tmp_path):
    model, processor, rows = parts
    args = SFTConfig(output_dir=str(tmp_path), remove_unused_columns=False, **SETTINGS)
    with pytest.raises(ValueError, match="sft: wanted dataset_kwargs"):
        VidLLMSFTTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)


@pytest.mark.parametrize("rank", [4, 0])
def test_a_yaml_file_and_the_command_line_train_a_folder(places, tmp_path, rank):
    config = {**SETTINGS, "model_path": str(places / "model"), "data": str(places / "mine.jsonl"), "lora_rank": rank, "learning_rate": 1e-2, "logging_steps": 1}  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items()))
    out = tmp_path / "out"
    # the command line goes before the file
    assert main(["--config", str(path), "--output_dir", str(out), "--max_steps", "3"]) == 0
    state = json.loads(next(iter(sorted(out.glob("checkpoint-*/trainer_state.json")))).read_text())
    assert state["global_step"] == 3
    logged = state["log_history"][0]
    assert {"token", "match", "box_l1"} <= set(logged) & set(TERMS)
    before = load_file(places / "model" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model.layers" in name for name in changed)
    assert any("grounding" in name for name in changed)
    assert not any("reconstruction" in name or "encoder" in name for name in changed)


class StopAt(TrainerCallback):
    """As if the run had been killed after a step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("named", [True, False], ids=["a folder", "the last one"])
def test_a_run_goes_on_where_it_stopped(places, tmp_path, capsys, monkeypatch, named):
    words = [
        "--model_path",
        str(places / "model"),
        "--data",
        str(places / "mine.jsonl"),
        "--lora_rank",
        "4",
        "--learning_rate",
        "1e-2",
    ]
    words += ["--logging_steps", "1", "--save_steps", "2", "--max_steps", "4"]
    words += [
        word for name, value in SETTINGS.items() if name != "max_steps" for word in (f"--{name}", str(value).lower())
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*words, "--output_dir", str(whole)]) == 0
    with monkeypatch.context() as patch:
        train = VidLLMSFTTrainer.train
        patch.setattr(
            VidLLMSFTTrainer, "train", lambda self, **more: (self.add_callback(StopAt()), train(self, **more))
        )
        assert main([*words, "--output_dir", str(parts)]) == 0
    # what it had learned by then is not what it learns in the end
    before = load_file(parts / "adapter" / "adapter_model.safetensors")
    again = str(parts / "checkpoint-2") if named else "true"
    assert main([*words, "--output_dir", str(parts), "--resume_from_checkpoint", again]) == 0
    logged = json.loads((parts / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4]
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        wanted, got = load_file(whole / name), load_file(parts / name)
        assert set(wanted) == set(got)
        assert all(torch.equal(got[key], value) for key, value in wanted.items()), name
    assert any(not torch.equal(got[key], value) for key, value in before.items())

    record = json.loads((parts / "recipe.json").read_text())
    assert {"sft", str(places / "model"), str(places / "mine.jsonl")} <= set(map(str, record["recipe"].values()))
    assert (record["recipe"]["lora"]["rank"], record["recipe"]["max_steps"], record["processes"]) == (4, 4, 1)
    assert "torch" in record["versions"]
    (entry,) = record["resumed"]
    assert (entry["from"], entry["changed"]) == ("checkpoint-2", [])
    capsys.readouterr()
    assert main([*words, "--output_dir", str(parts), "--resume_from_checkpoint", str(places)]) == 2
    assert "wanted a folder checkpoint-N of a run" in capsys.readouterr().err


def test_adapter_and_base_are_the_merged_model(places, tmp_path):
    words = [
        "--model_path",
        str(places / "model"),
        "--data",
        str(places / "mine.jsonl"),
        "--output_dir",
        str(tmp_path / "out"),
        "--learning_rate",
        "1e-2",
    ]
    words += [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value).lower())]
    assert main(words) == 0
    base = VidLLMForConditionalGeneration.from_pretrained(places / "model")
    wanted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).merge_and_unload().state_dict()
    got = VidLLMForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert set(got) == set(wanted)
    assert all(torch.equal(wanted[name], value) for name, value in got.items())


def test_bad_input_is_one_line(places, tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "o"), "--use_cpu", "--bf16", "false"]
    assert main(["--model_path", str(places / "model"), "--data", str(tmp_path / "nothing.jsonl"), *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "nothing.jsonl" in error
    assert len(error.splitlines()) == 1
