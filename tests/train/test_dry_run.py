"""A dry run against a real step: parameters exactly, what autograd keeps and FLOPs within a tenth."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, TrainingArguments
from typer.testing import CliRunner

from vidllm.cli import app
from vidllm.modeling_vidllm import prefix_attention_vidllm
from vidllm.modeling_vidllm.shared_prefix_vidllm import shared_prefix
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.train.distill_recipes import debug_stage1
from vidllm.train.distillation import VidLLMDistillationTrainer, train_distill
from vidllm.train.dry_run import cost_of, dry_run, run_shape
from vidllm.train.dry_run_distill import dry_run_distill
from vidllm.train.initialise import build_untrained, initialise
from vidllm.train.joint import joint_data
from vidllm.train.joint_trainer import VidLLMJointTrainer
from vidllm.train.lora import add_lora
from vidllm.train.presets import preset
from vidllm.train.recipes import RECIPES, LoraSettings, debug, single_gpu_lora


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
    config = model.config
    # rooms have boxes, in metres
    config.is_metric = True
    if chosen.lora is not None:
        model = add_lora(model, chosen.lora, train_only=chosen.train_only)
    with joint_data(chosen, config, processor, 4, tmp_path) as data:
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
    coord = config.coord_token_id
    plan = shared_prefix(batch["input_ids"], batch["attention_mask"], output.scene, batch["scene_index"], coord)
    rest = plan.prompt.shape[1] - config.num_scene_tokens
    prompts = len(batch["input_ids"]) // 2
    sizes = [sum(p.nbytes for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)]
    return sum(kept.values()), forward, counter.get_total_flops() - forward, rest / prompts, prompts, sizes


@pytest.mark.parametrize(
    ("size_hw", "changes"),
    [
        (SIZE_HW, {}),
        (OTHER_HW, {}),
        (SIZE_HW, {"train_only": r"language_model|grounding|scene_tokens"}),
        (SIZE_HW, {"lora": LoraSettings(rank=4), "freeze_encoder": True}),
        (SIZE_HW, {"lora": LoraSettings(rank=4), "freeze_encoder": True, "train_only": single_gpu_lora().train_only}),
    ],
)
def test_what_a_step_keeps_and_computes_is_foretold(tmp_path, monkeypatch, size_hw, changes):
    """Also with adapters: what is frozen around them still hands gradients on to them. Prompts go in rows, as on a GPU."""
    monkeypatch.setattr(prefix_attention_vidllm, "attends_by_blocks", lambda *_: False)
    chosen = recipe_of(size_hw, **changes)
    kept, forward, backward, rest, prompts, sizes = real_step(chosen, tmp_path)
    chosen = dataclasses.replace(chosen, prompts_per_scene=prompts)
    told = dry_run(
        chosen, preset("vidllm-tiny").config(), size_hw, num_devices=1, prompt_tokens=round(rest), learned_tokens=12
    )
    assert told.activation_bytes == pytest.approx(kept, rel=0.1)
    assert sum(cost.forward_flops for cost in told.parts.values()) == pytest.approx(forward, rel=0.1)
    assert sum(cost.backward_flops for cost in told.parts.values()) == pytest.approx(backward, rel=0.1)
    assert [told.weight_bytes, sum(told.trained.values())] == sizes
    assert told.optimizer_bytes == 8 * sizes[1]


def test_weights_in_4_bits_take_less():
    chosen = recipe_of(lora=LoraSettings(rank=4), freeze_encoder=True)
    held = dataclasses.replace(chosen, lora=LoraSettings(rank=4, four_bits=True))
    config = preset("vidllm-tiny").config()
    plain, quantised = (dry_run(recipe, config, SIZE_HW, 1) for recipe in (chosen, held))
    layers = build_untrained("vidllm-tiny")[0].model.language_model.layers
    linear = sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear))
    assert plain.weight_bytes - quantised.weight_bytes == pytest.approx(linear * (4 - 0.5625), abs=1)
    assert plain.trained == quantised.trained


class StageOneMeasured(TrainerCallback):
    """What the forward of a step of stage 1 keeps, and what all of it computes."""

    def watch(self, monkeypatch):
        training_step, compute_loss = VidLLMDistillationTrainer.training_step, VidLLMDistillationTrainer.compute_loss

        def counted_step(trainer, model, inputs, num_items_in_batch=None):
            with FlopCounterMode(display=False) as counter:
                loss = training_step(trainer, model, inputs, num_items_in_batch)
            self.flops = counter.get_total_flops()
            self.trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            self.weights = sum(p.nbytes for p in trainer.model.parameters())
            teachers = (trainer.geometry_teacher, trainer.language_teacher)
            self.teachers = sum(p.nbytes for teacher in teachers for p in teacher.parameters())
            return loss

        def counted_loss(trainer, model, inputs, return_outputs=False, num_items_in_batch=None):
            own = {p.untyped_storage()._cdata for p in trainer.model.parameters()}
            kept, alive = {}, []

            def note(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = storage.nbytes()
                    alive.append(storage)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = compute_loss(trainer, model, inputs, return_outputs, num_items_in_batch)
            self.kept = sum(kept.values())
            return loss

        monkeypatch.setattr(VidLLMDistillationTrainer, "training_step", counted_step)
        monkeypatch.setattr(VidLLMDistillationTrainer, "compute_loss", counted_loss)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("freeze", [False, True])
def test_a_step_of_stage_1_is_foretold(tmp_path, monkeypatch, freeze):
    for name, seed in (("student", 1), ("geometry", 2), ("language", 3)):
        initialise("vidllm-tiny", tmp_path / name, seed=seed)
    base = debug_stage1()
    chosen = dataclasses.replace(
        base, model=str(tmp_path / "student"), rooms=dataclasses.replace(base.rooms, size_hw=SIZE_HW), steps=1, freeze_encoder=freeze,
        geometry_teacher=str(tmp_path / "geometry"), language_teacher=str(tmp_path / "language"), language_stream="language",
    )  # fmt: skip
    processor = VidLLMProcessor.from_pretrained(tmp_path / "student")
    processor.video_processor.size = {"shortest_edge": SIZE_HW[0]}
    processor.save_pretrained(tmp_path / "student")
    measured = StageOneMeasured()
    measured.watch(monkeypatch)
    train_distill(chosen, tmp_path / "run", use_cpu=True)
    shape = run_shape(chosen.model, chosen.rooms)
    assert shape.size_hw == SIZE_HW
    told = dry_run_distill(chosen, shape.config, shape.size_hw, 1)
    assert sum(told.trained.values()) == measured.trained
    assert told.weight_bytes == measured.weights
    assert told.teacher_bytes == measured.teachers
    assert told.activation_bytes == pytest.approx(measured.kept, rel=0.1)
    assert told.flops_per_step == pytest.approx(measured.flops, rel=0.1)


def test_frames_are_those_of_the_recipe_or_of_the_checkpoint(tmp_path):
    """Rooms of 96x128 stay so in the small model; without rooms a 4:3 video as the checkpoint's processor makes it."""
    nano = Path(__file__).parents[2] / "model_cards" / "vidllm-nano"
    rooms = RECIPES["nano_stage2"]().rooms
    for model in ("vidllm-nano", str(nano)):
        assert run_shape(model, rooms).size_hw == rooms.size_hw == (96, 128)
        assert run_shape(model, dataclasses.replace(rooms, size_hw=(120, 240))).size_hw == (96, 192)
        assert (run_shape(model, None).size_hw, run_shape(model, None).num_frames) == ((96, 128), 12)
    assert run_shape("vidllm-7b", None).size_hw == (518, 686)
    processor = build_untrained("vidllm-nano")[1]
    processor.video_processor.size = {"shortest_edge": 208}
    processor.video_processor.num_frames = 7
    preset("vidllm-nano").config().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    shape = run_shape(str(tmp_path), None)
    assert (shape.size_hw, shape.num_frames) == ((208, 272), 7)
    with pytest.raises(ValueError, match=r"model: wanted a preset .* a checkpoint folder or a Hub id; got '/no/such'"):
        run_shape("/no/such", None)


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
    # DDP holds every gradient twice
    assert (none.bucket_bytes, zero2.bucket_bytes, full.bucket_bytes) == (none.gradient_bytes, 0, 0)
    assert (
        none.bytes_per_device
        == none.weight_bytes + 2 * none.gradient_bytes + none.optimizer_bytes + none.activation_bytes
    )
    assert dry_run(chosen, config, SIZE_HW, 1).bucket_bytes == 0
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
    with pytest.raises(ValueError, match="wanted num_frames"):
        dry_run(recipe_of(num_frames=None), config, SIZE_HW)


def test_the_command_says_it_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [
        "train",
        "joint",
        "debug",
        "--dry-run",
        "--size",
        "28x42",
        "--devices",
        "2",
    ]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "debug: 2 devices, sharding none, frames of 28x42" in done.output
    assert "assumed: 3 prompts per video, 64 tokens each with their reply, 16 of them learned" in done.output
    assert "DDP sends gradients from a second copy of them" in done.output
    assert "2 steps; in each 4 videos, 12 frames" in done.output
    given = ["train", "distill", "paper_stage1", "--dry-run", "--set", "model=vidllm-tiny", "--devices", "1", "--set", "num_frames=2"]  # fmt: skip
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "paper_stage1: 1 devices, sharding none, frames of 28x28" in done.output
    assert "language_teacher: not named, so not counted" in done.output
    assert "buckets" not in done.output
    assert not list(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["train", "joint", "paper_stage2", "--dry-run"])
    assert done.exit_code == 2
    assert "wanted a model, if only its shape: --set model=vidllm-7b" in done.output
    for command in ("joint", "distill"):
        done = CliRunner().invoke(app, ["train", command, "debug"])
        assert done.exit_code == 2
        assert "wanted --out DIR, the folder of the run; only --dry-run does without" in done.output
