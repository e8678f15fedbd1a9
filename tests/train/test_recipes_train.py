"""Every recipe, on a tiny model: what it means to train moves within three steps, at its own learning rate; all else stays bit for bit."""

import re

import datasets
import pytest
import torch
from tiny import call_metric
from transformers import TrainerCallback

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.train.distill_recipes import DISTILL_RECIPES, chosen_distill_recipe
from vidllm.train.distillation import train_distill
from vidllm.train.image_text import IMAGE_TEXT_RECIPES, build_image_text, train_image_text
from vidllm.train.initialise import build_untrained, initialise, save_checkpoint
from vidllm.train.joint import train_joint
from vidllm.train.presets import preset
from vidllm.train.recipes import RECIPES, chosen_recipe, with_settings

from .own_clips import write_clips


pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*gradient_checkpointing")
STEPS = 3
GEOMETRY = {"reconstruction", "metric_depth"}
LANGUAGE = {"scene_tokens", "point_embedding", "language_model", "lm_head", "grounding"}
ALL = {"encoder", "adapter", *GEOMETRY, *LANGUAGE}
# What each recipe trains, as its docstring says; with adapters, of language model and head these alone.
TRAINED = {
    "debug": ALL,
    "nano_perception": {"encoder", "adapter", *GEOMETRY},
    "nano": LANGUAGE,
    "nano_lora": {"adapter", *LANGUAGE},
    "nano_stage2": ALL,
    "scannet": {"adapter", *GEOMETRY, *LANGUAGE},
    "single_gpu_lora": {"adapter", *LANGUAGE},
    "paper_stage2": ALL - {"encoder"},
    **{name: {"encoder", "adapter", "project_geometry", "project_language"} for name in DISTILL_RECIPES},
}
# Weight decay would move whatever no loss reaches. Everything else is the recipe's, but sizes.
TINY = [
    f"steps={STEPS}",
    "batch_size=3",
    "num_frames=3",
    "workers=0",
    "log_every=1",
    "save_every=100",
    "weight_decay=0",
]
TINY_ROOMS = [
    "rooms.num_rooms=4", "rooms.block_size=4", "rooms.first_blocks=1", "rooms.makers=0", "rooms.size_hw=28,42", "rooms.frames_kept=6",
    "rooms.levels=easy:1", "rooms.jpeg_share=0",
]  # fmt: skip


class Watch(TrainerCallback):
    """Parameters and buffers before and after a run, before adapters are melted in."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.before = self._state(model)
        self.trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.after = self._state(model)
        assert state.global_step == STEPS

    @staticmethod
    def _state(model):
        return {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def part_of(name):
    """Part of the model that a parameter is of, whatever is wrapped around it."""
    inner = name.replace("base_model.model.", "").removeprefix("model.").removeprefix("model.")
    return inner.split(".")[0]


def assert_trained(watch, chosen, parts):
    """What moves, and how far."""
    assert {part_of(name) for name in watch.trained} == parts
    adapters = getattr(chosen, "lora", None) is not None
    for name, before in watch.before.items():
        change = (watch.after[name].double() - before.double()).abs()
        if name not in watch.trained:
            # running statistics belong to what is trained
            if (
                name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
                and part_of(name) in parts
            ):
                continue
            assert torch.equal(watch.after[name], before), f"{name} is frozen and moved"
            continue
        assert before.dtype == torch.float32, name
        assert change.max() > 0, f"{name} is trained and did not move in {STEPS} steps"
        if adapters and part_of(name) in ("language_model", "lm_head"):
            assert "lora_" in name or "trainable_tokens" in name, name
        # a step of Adam is as long as the learning rate at most, but for what its averages remember
        factor = next((f for text, f in chosen.learning_rate_factors.items() if re.search(text, name)), 1.0)
        assert change.max() < 1.2 * STEPS * factor * chosen.learning_rate + 1e-6, f"{name} moved too far"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny checkpoint, two teachers, clips, and a cache of rooms."""
    root = tmp_path_factory.mktemp("recipes")
    for name, seed in (("geometry", 2), ("language", 3)):
        initialise("vidllm-tiny", root / name, seed=seed)
    # as wide as the labels of patches want it
    torch.manual_seed(11)
    wide = VidLLMForConditionalGeneration(preset("vidllm-tiny").config(vision_config={"hidden_size": 48}))
    save_checkpoint(wide, build_untrained("vidllm-tiny")[1], root / "base")
    call_metric(root / "base")
    datasets.disable_progress_bars()
    return {"root": root, "clips": write_clips(root / "clips", questions=[("How many?", "two"), ("What?", "a wall")])}


def settings_for(recipe, places, *more):
    """A recipe's settings on a tiny model."""
    rooms = [*TINY_ROOMS, f"rooms_cache={places['root'] / 'rooms'}"] if recipe.rooms is not None else []
    return [*TINY, f"model={places['root'] / 'base'}", *rooms, *more]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_stage_2(name, places, rooms_root, tmp_path):
    recipe = RECIPES[name]()
    files = {"data": str(places["clips"])} if name == "nano_lora" else {}
    if recipe.benchmarks:
        files = {"data_root": str(rooms_root)}
    accumulation = f"accumulation={min(recipe.accumulation, 2)}"
    chosen = chosen_recipe(name, settings_for(recipe, places, accumulation), **files)
    watch = Watch()
    train_joint(chosen, tmp_path / "run", use_cpu=True, callbacks=[watch])
    assert_trained(watch, chosen, TRAINED[name])


@pytest.mark.parametrize("name", DISTILL_RECIPES)
def test_recipes_of_stage_1(name, places, rooms_root, tmp_path):
    recipe = DISTILL_RECIPES[name]()
    teachers = [f"{kind}_teacher={places['root'] / kind}" for kind in ("geometry", "language")]
    clips = None if recipe.rooms is not None else str(rooms_root)
    chosen = chosen_distill_recipe(name, settings_for(recipe, places, *teachers), clips)
    watch = Watch()
    train_distill(chosen, tmp_path / "run", use_cpu=True, callbacks=[watch])
    assert_trained(watch, chosen, TRAINED[name])


@pytest.mark.parametrize("name", IMAGE_TEXT_RECIPES)
def test_recipes_of_image_text_models(name, places, tmp_path):
    small = ["width=24", "layers=1", "heads=2", "patch_size=14", f"rooms_cache={places['root'] / 'rooms'}"]
    chosen = with_settings(IMAGE_TEXT_RECIPES[name](), [*TINY[:2], *TINY[3:], *TINY_ROOMS, *small])
    before = build_image_text(chosen)[0].state_dict()
    trainer = train_image_text(chosen, tmp_path / "run", use_cpu=True)
    parameters = dict(trainer.model.named_parameters())
    assert all(parameter.requires_grad for parameter in parameters.values())
    for key, value in trainer.model.state_dict().items():
        moved = (value - before[key]).abs().max() > 0
        assert bool(moved) == (key in parameters), key


def test_no_recipe_is_forgotten():
    assert set(TRAINED) == {*RECIPES, *DISTILL_RECIPES}
