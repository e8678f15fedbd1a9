"""A loss or gradient that is not finite: the run stops, the samples are written down, the last good checkpoint stays and is gone on from."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.train.distill_recipes import chosen_distill_recipe
from vidllm.train.distillation import train_distill
from vidllm.train.image_text import ImageTextTrainer, debug_image_text, train_image_text
from vidllm.train.initialise import initialise
from vidllm.train.joint import train_joint
from vidllm.train.recipes import chosen_recipe, with_settings
from vidllm.train.teachers import VisionTeacher

from .own_clips import write_clips


pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


class Poison:
    """A further loss of 0, but not at one step."""

    name = "poison"
    forward_kwargs = {}

    def __init__(self, step, value):
        self.step, self.value, self.seen = step, value, []

    def weight(self, progress):
        return 1.0

    def terms(self, output, batch, config):
        self.seen.append(batch["sample_ids"])
        value = self.value if len(self.seen) == self.step else 0.0
        return {"poison": (torch.tensor(value) + 0 * output.logits.sum(), torch.tensor(1.0))}

    def counts(self, batch, config):
        return {"poison": torch.tensor(1.0)}


class PoisonedGradient(TrainerCallback):
    """A gradient that overflows at one step, of losses that are finite."""

    def __init__(self, step):
        self.step = step

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.lm_head.weight.register_hook(
            lambda grad: grad * math.inf if state.global_step + 1 == self.step else grad
        )


def left_in(out):
    """Names of the checkpoints, and the notes on what was not finite."""
    notes = [json.loads(path.read_text()) for path in sorted(out.glob("not-finite-*.json"))]
    return sorted(path.name for path in out.glob("checkpoint-*")), notes


# Nothing is logged at step 4: a look at the log would notice before anything is saved.
SETTINGS = ["log_every=5", "steps=6", "save_every=2", "keep_checkpoints=1", "prompts_per_scene=2", "dense_labels=0"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("rooms_of_debug")


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """Weights of the run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train_joint(chosen_recipe("debug", [*SETTINGS, f"rooms_cache={cache}"]), out, use_cpu=True)
    return load_file(out / "model.safetensors")


# Step 4 is one after which is saved, and the checkpoint before it deleted.
@pytest.mark.parametrize(("step", "kind"), [(4, "nan"), (3, "inf"), (4, "gradient")])
def test_a_joint_run_stops_keeps_its_checkpoint_and_goes_on(whole, cache, tmp_path, step, kind):
    out = tmp_path / "run"
    recipe = chosen_recipe("debug", [*SETTINGS, f"rooms_cache={cache}"])
    poison = Poison(step if kind != "gradient" else 0, float(kind) if kind != "gradient" else 0.0)
    callbacks = [PoisonedGradient(step)] if kind == "gradient" else []
    said = "gradient = (inf|nan)" if kind == "gradient" else f"poison = {kind}"
    with pytest.raises(FloatingPointError, match=f"step {step}: wanted finite losses; got {said}"):
        train_joint(recipe, out, use_cpu=True, plugins=[poison], callbacks=callbacks)
    checkpoints, (note,) = left_in(out)
    assert checkpoints == ["checkpoint-2"]
    assert note["step"] == step
    assert note["sample_ids"] == poison.seen[step - 1]
    assert len(poison.seen) == step
    assert (out / f"not-finite-{step}-0.json").is_file()
    # nothing was published, and what is kept is whole
    assert not (out / "model.safetensors").exists()
    kept = VidLLMForConditionalGeneration.from_pretrained(out / "checkpoint-2")
    assert all(parameter.isfinite().all() for parameter in kept.parameters())
    train_joint(recipe, out, use_cpu=True, resume=True)
    finished = load_file(out / "model.safetensors")
    assert all(torch.equal(finished[name], value) for name, value in whole.items())


def test_a_gradient_that_is_not_finite_is_noticed_where_nothing_is_clipped(cache, tmp_path):
    out = tmp_path / "run"
    settings = [*SETTINGS, "save_every=1", "clip=0", f"rooms_cache={cache}"]
    with pytest.raises(FloatingPointError, match=r"step 2: wanted finite losses; got gradient = (inf|nan)"):
        train_joint(chosen_recipe("debug", settings), out, use_cpu=True, callbacks=[PoisonedGradient(2)])
    checkpoints, (note,) = left_in(out)
    assert checkpoints == ["checkpoint-1"]
    assert note["step"] == 2
    assert all(value.isfinite().all() for value in load_file(out / "checkpoint-1" / "model.safetensors").values())


def test_a_run_of_stage_1_stops_and_names_the_clips(tmp_path, monkeypatch):
    for name, seed in (("student", 1), ("geometry", 2), ("language", 3)):
        initialise("vidllm-tiny", tmp_path / name, seed=seed)
    clips = write_clips(tmp_path / "clips", with_box=False).parent
    settings = [f"model={tmp_path / 'student'}", f"geometry_teacher={tmp_path / 'geometry'}", f"language_teacher={tmp_path / 'language'}"]  # fmt: skip
    chosen = chosen_distill_recipe("debug_stage1", [*settings, "steps=4", "num_frames=2"], str(clips))
    features, seen = VisionTeacher.features, []

    def poisoned(teacher, frames, keys):
        """The second teacher of the third step."""
        seen.append(list(dict.fromkeys(key.clip for key in keys)))
        tokens, grid = features(teacher, frames, keys)
        return (tokens * float("nan") if len(seen) == 6 else tokens), grid

    monkeypatch.setattr(VisionTeacher, "features", poisoned)
    with pytest.raises(FloatingPointError, match="step 3: wanted finite losses; got language_feature = nan"):
        train_distill(chosen, tmp_path / "run", use_cpu=True)
    checkpoints, (note,) = left_in(tmp_path / "run")
    assert checkpoints == ["checkpoint-2"]
    assert note["step"] == 3
    assert len(note["sample_ids"]) == len(seen[5]) == 2
    assert all(clip in sample_id for clip, sample_id in zip(seen[5], note["sample_ids"], strict=True))
    kept = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert all(value.isfinite().all() for value in kept.values())


def test_an_image_text_run_stops_and_names_the_pictures(tmp_path, monkeypatch):
    weighted_terms, seen = ImageTextTrainer.weighted_terms, []

    def poisoned(trainer, model, inputs):
        terms, weights, output = weighted_terms(trainer, model, inputs)
        seen.append(inputs["sample_ids"])
        value, count = terms["pairs"]
        return {"pairs": (value * (float("inf") if len(seen) == 4 else 1), count)}, weights, output

    monkeypatch.setattr(ImageTextTrainer, "weighted_terms", poisoned)
    chosen = with_settings(debug_image_text(), ["steps=4", "save_every=2", "log_every=3"])
    with pytest.raises(FloatingPointError, match="step 4: wanted finite losses; got pairs = inf"):
        train_image_text(chosen, tmp_path / "run", use_cpu=True)
    checkpoints, (note,) = left_in(tmp_path / "run")
    assert checkpoints == ["checkpoint-2"]
    assert (note["step"], note["sample_ids"]) == (4, seen[3])
    assert len(set(seen[3])) == 4
    assert not (tmp_path / "run" / "model.safetensors").exists()
