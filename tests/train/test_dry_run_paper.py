"""`--dry-run` of `paper_stage2` for 8 devices against what a real run of it does, at a size for two cores: bfloat16, checkpointing, frozen encoder."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from vidllm.modeling_vidllm.shared_prefix_vidllm import shared_prefix
from vidllm.train.dry_run import dry_run
from vidllm.train.initialise import initialise
from vidllm.train.joint import train_joint
from vidllm.train.joint_trainer import VidLLMJointTrainer, first_logit
from vidllm.train.presets import preset
from vidllm.train.recipes import debug, paper_stage2


DEVICES = 8
SIZE_HW = (96, 128)
FRAMES = 8
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


class Measured(TrainerCallback):
    """What one process of a run holds and computes."""

    def __init__(self):
        self.kept, self.forward, self.whole, self.shapes = [], [], [], []

    def watch(self, monkeypatch):
        """Count in every forward and backward of the joint trainer."""
        training_step, compute_loss = VidLLMJointTrainer.training_step, VidLLMJointTrainer.compute_loss

        def counted_step(trainer, model, inputs, num_items_in_batch=None):
            with FlopCounterMode(display=False) as self.counter:
                loss = training_step(trainer, model, inputs, num_items_in_batch)
            self.whole.append(self.counter.get_total_flops())
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
                loss, output = compute_loss(trainer, model, inputs, True, num_items_in_batch)
            self.kept.append(sum(kept.values()))
            self.forward.append(self.counter.get_total_flops())
            self._note_shapes(trainer, inputs, output)
            return loss

        monkeypatch.setattr(VidLLMJointTrainer, "training_step", counted_step)
        monkeypatch.setattr(VidLLMJointTrainer, "compute_loss", counted_loss)

    def _note_shapes(self, trainer, inputs, output):
        config, ids, mask = trainer.model_config, inputs["input_ids"], inputs["attention_mask"]
        plan = shared_prefix(ids, mask, output.scene, inputs["scene_index"], config.coord_token_id)
        self.shapes.append(
            {
                "pixels": tuple(inputs["pixel_values_videos"].shape),
                "prompts": len(ids),
                "row": plan.prompt.shape[1] - config.num_scene_tokens,
                "learned": inputs["labels"].shape[1] - first_logit(inputs["labels"]),
                "locs": 0 if output.loc_index is None else len(output.loc_index),
            }
        )

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient_bytes = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weight_bytes = sum(p.nbytes for p in model.parameters())
        self.parameters = sum(p.numel() for p in model.parameters())
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        states = getattr(optimizer, "optimizer", optimizer).state.values()
        self.optimizer_bytes = sum(v.nbytes for of in states for v in of.values() if torch.is_tensor(v) and v.ndim)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`paper_stage2` on rooms, one step: the recipe, what was measured, and what was told of its last forward."""
    root = tmp_path_factory.mktemp("paper")
    initialise("vidllm-nano", root / "model", seed=1)
    rooms = dataclasses.replace(debug().rooms, size_hw=SIZE_HW, frames_kept=FRAMES)
    chosen = dataclasses.replace(
        paper_stage2(), model=str(root / "model"), rooms=rooms, benchmarks={}, variants={}, num_frames=FRAMES, steps=1, workers=0
    )  # fmt: skip
    measured = Measured()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        measured.watch(monkeypatch)
        train_joint(chosen, root / "run", use_cpu=True, callbacks=[measured])
    return chosen, measured, told_of(chosen, measured.shapes[-1])


def told_of(chosen, shape, sharding="none"):
    chosen = dataclasses.replace(chosen, prompts_per_scene=shape["prompts"])
    return dry_run(
        chosen, preset("vidllm-nano").config(), SIZE_HW, DEVICES, sharding,
        prompt_tokens=round(shape["row"] / shape["prompts"]), learned_tokens=shape["learned"],
    )  # fmt: skip


def test_a_step_of_the_paper_is_foretold(run):
    chosen, measured, told = run
    assert (chosen.precision, chosen.weights_dtype, chosen.activation_checkpointing) == ("bfloat16", "bfloat16", True)
    assert len(measured.kept) == chosen.accumulation == 2
    assert measured.shapes[-1]["pixels"] == (1, FRAMES, 3, *SIZE_HW)
    assert measured.shapes[-1]["prompts"] > 4
    assert told.activation_bytes == pytest.approx(measured.kept[-1], rel=0.1)
    forward = sum(cost.forward_flops for cost in told.parts.values())
    assert forward == pytest.approx(measured.forward[-1], rel=0.1)
    # of all devices and forwards of a step
    assert told.flops_per_step == pytest.approx(measured.whole[-1] * DEVICES * chosen.accumulation, rel=0.1)
    assert told.videos_per_step == DEVICES * chosen.accumulation
    # checkpointing computes the forward a second time
    assert measured.whole[-1] > 2.5 * measured.forward[-1]


def test_parameters_and_the_memory_that_hangs_on_them_are_those_of_the_run(run):
    """The language model's head is its embedding, and counted once."""
    chosen, measured, told = run
    assert sum(told.parameters.values()) == measured.parameters
    assert sum(told.trained.values()) == measured.trained < measured.parameters
    assert told.parameters["lm_head"] == 0
    assert told.weight_bytes == pytest.approx(measured.weight_bytes, rel=0.01)
    assert told.gradient_bytes == pytest.approx(measured.gradient_bytes, rel=0.01)
    assert told.optimizer_bytes == pytest.approx(measured.optimizer_bytes, rel=0.01)
    sharded = told_of(chosen, measured.shapes[-1], "full")
    per_device = (measured.weight_bytes + measured.gradient_bytes + measured.optimizer_bytes) / DEVICES
    assert sharded.bytes_per_device - sharded.activation_bytes == pytest.approx(per_device, rel=0.01)
