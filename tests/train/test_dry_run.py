"""A dry run against a real step: parameters exactly, what autograd keeps and FLOPs within a tenth."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments
from typer.testing import CliRunner

from vidllm.cli import app
from vidllm.modeling_vidllm.shared_prefix_vidllm import shared_prefix
from vidllm.train.dry_run import cost_of, dry_run
from vidllm.train.initialise import build_untrained
from vidllm.train.joint import joint_data
from vidllm.train.joint_trainer import VidLLMJointTrainer
from vidllm.train.presets import preset
from vidllm.train.recipes import RECIPES, debug


# Large enough that what the losses keep, and small tensors, do not count.
SIZE_HW = (84, 112)
OTHER_HW = (56, 140)


def recipe_of(size_hw=SIZE_HW, **changes):
    base = debug()
    rooms = dataclasses.replace(base.rooms, size_hw=size_hw)
    return dataclasses.replace(base, rooms=rooms, prompts_per_scene=3, batch_size=2, **changes)


def real_step(chosen, tmp_path):
    """Bytes kept, FLOPs forward and backward, and tokens per prompt, of a real forward of the trainer."""
    model, processor = build_untrained("vidllm-tiny", seed=1)
    size_hw = chosen.rooms.size_hw
    processor.video_processor.size = {"shortest_edge": size_hw[0]}
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, remove_unused_columns=False, report_to="none", dataloader_pin_memory=False)  # fmt: skip
    with joint_data(chosen, model.config, processor, 4, tmp_path) as data:
        trainer = VidLLMJointTrainer(
            model=model.train(), args=args, freeze_encoder=chosen.freeze_encoder, train_only=chosen.train_only
        )
        trainer.state.max_steps = 1
        batch = data.collator([data.visits[0], data.visits[1]])
    (batch,), counts = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert batch["pixel_values_videos"].shape[-2:] == size_hw
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept, alive = {}, []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss, output = trainer.compute_loss(trainer.model, batch, return_outputs=True, num_items_in_batch=counts)
        forward = counter.get_total_flops()
        loss.backward()
    coord = model.config.coord_token_id
    plan = shared_prefix(batch["input_ids"], batch["attention_mask"], output.scene, batch["scene_index"], coord)
    rest = plan.prompt.shape[1] - model.config.num_scene_tokens
    prompts = len(batch["input_ids"]) // 2
    return sum(kept.values()), forward, counter.get_total_flops() - forward, rest / prompts, prompts


@pytest.mark.parametrize(
    ("size_hw", "train_only"),
    [(SIZE_HW, None), (OTHER_HW, None), (SIZE_HW, r"language_model|grounding|scene_tokens")],
)
def test_what_a_step_keeps_and_computes_is_foretold(tmp_path, size_hw, train_only):
    chosen = recipe_of(size_hw, train_only=train_only)
    kept, forward, backward, rest, prompts = real_step(chosen, tmp_path)
    chosen = dataclasses.replace(chosen, prompts_per_scene=prompts)
    told = dry_run(
        chosen, preset("vidllm-tiny").config(), size_hw, num_devices=1, prompt_tokens=round(rest), learned_tokens=12
    )
    assert told.activation_bytes == pytest.approx(kept, rel=0.1)
    assert sum(cost.forward_flops for cost in told.parts.values()) == pytest.approx(forward, rel=0.1)
    assert sum(cost.backward_flops for cost in told.parts.values()) == pytest.approx(backward, rel=0.1)


def test_parameters_are_those_of_the_model():
    model = build_untrained("vidllm-tiny")[0]
    told = dry_run(recipe_of(freeze_encoder=True), preset("vidllm-tiny").config(), SIZE_HW)
    assert sum(told.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert told.trained["encoder"] == 0
    assert told.trained["language_model"] == told.parameters["language_model"]
    learned = sum(told.trained.values())
    assert told.gradient_bytes == 4 * learned
    assert told.optimizer_bytes == 8 * learned


def test_sharding_divides_what_it_shards():
    chosen, config = recipe_of(), preset("vidllm-tiny").config()
    none, zero2, full = (dry_run(chosen, config, SIZE_HW, 8, kind) for kind in ("none", "zero2", "full"))
    assert zero2.optimizer_bytes == none.optimizer_bytes // 8
    assert zero2.gradient_bytes == none.gradient_bytes // 8
    assert zero2.weight_bytes == none.weight_bytes
    assert full.weight_bytes == none.weight_bytes // 8
    assert none.videos_per_step == 8 * chosen.batch_size
    assert none.activation_bytes == full.activation_bytes
    assert none.flops_per_step == 8 * sum(c.forward_flops + c.backward_flops for c in none.parts.values())


def test_checkpointing_keeps_less_and_computes_more():
    config = preset("vidllm-tiny").config()
    plain, checkpointed = (
        dry_run(recipe_of(activation_checkpointing=flag), config, SIZE_HW, 1) for flag in (False, True)
    )
    assert checkpointed.activation_bytes < 0.8 * plain.activation_bytes
    assert checkpointed.flops_per_step > 1.05 * plain.flops_per_step


def test_costs_of_a_linear_layer_are_known():
    layer = torch.nn.Linear(10, 20)
    inputs = torch.ones(6, 10, requires_grad=True)
    cost = cost_of(lambda: layer(inputs), layer.parameters())
    assert cost.activation_bytes == 4 * 60
    assert cost.forward_flops == 2 * 6 * 10 * 20
    assert cost.backward_flops == 2 * cost.forward_flops


def test_wrong_requests():
    config = preset("vidllm-tiny").config()
    with pytest.raises(ValueError, match="wanted one of none, zero2, full; got 'some'"):
        dry_run(recipe_of(), config, SIZE_HW, 8, "some")
    with pytest.raises(ValueError, match="wanted a recipe without lora"):
        dry_run(RECIPES["scannet"](), config, SIZE_HW)


def test_the_command_says_it_and_writes_nothing(tmp_path):
    given = [
        "train",
        "joint",
        "debug",
        "--out",
        str(tmp_path / "out"),
        "--dry-run",
        "--size",
        "28x42",
        "--devices",
        "2",
    ]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "debug: 2 devices, sharding none, frames of 28x42" in done.output
    assert "2 steps; in each 4 videos, 12 frames" in done.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["train", "joint", "paper_stage2", "--out", "x", "--dry-run"])
    assert done.exit_code == 2
    assert "wanted a model, if only its shape: --set model=vidllm-7b" in done.output
