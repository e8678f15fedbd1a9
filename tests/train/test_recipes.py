"""Recipes: complete, checked, changed by texts that are parsed by type, written as JSON."""

import dataclasses
import json
import re

import pytest
from typer.testing import CliRunner

from vidllm.cli import app
from vidllm.train.distill_recipes import DISTILL_RECIPES
from vidllm.train.recipes import (
    RECIPES,
    JointRecipe,
    LoraSettings,
    MixingSchedule,
    chosen_recipe,
    debug,
    nano_lora,
    plain,
    recipe,
    with_settings,
)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete_and_frozen(name):
    made = recipe(name)
    assert made.name == name
    assert made == RECIPES[name]()
    json.dumps(plain(made), allow_nan=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.steps = 3


def test_a_typo_gets_the_closest_name():
    with pytest.raises(ValueError, match="got 'nanoo'; did you mean 'nano'"):
        recipe("nanoo")
    for setting, wanted in (
        ("learning_rat=1", "did you mean 'learning_rate'"),
        ("rooms.num_room=1", "did you mean 'num_rooms'"),
        ("lora.ranks=1", "did you mean 'rank'"),
        ("given_geometry.stop=1", "wanted one of start, end, until, shape"),
    ):
        with pytest.raises(ValueError, match=wanted):
            with_settings(debug(), [setting])


def test_values_are_parsed_by_type():
    made = with_settings(
        debug(),
        [
            "steps=7", "learning_rate=2e-3", "freeze_encoder=True", "model=/some/where", "num_frames=none", "betas=0.8, 0.95",
            "rooms.size_hw=42,56", "rooms.tasks=qa:2,ground:1", "lora=default", "lora.rank=3", "given_geometry.shape=linear",
            r"learning_rate_factors.language_model\.layers=0.5", "losses.weights.token=0.25", "rooms.tasks.qa=0.5",
        ],
    )  # fmt: skip
    assert (made.steps, made.learning_rate, made.freeze_encoder, made.model) == (7, 2e-3, True, "/some/where")
    assert made.num_frames is None
    assert made.betas == (0.8, 0.95)
    assert made.rooms.size_hw == (42, 56)
    assert made.rooms.tasks == {"qa": 0.5, "ground": 1.0}
    assert made.lora == LoraSettings(rank=3)
    assert made.given_geometry.shape == "linear"
    assert made.learning_rate_factors == {r"language_model\.layers": 0.5}
    assert made.losses.weights["token"] == 0.25
    assert made.losses.weights["box_l1"] == debug().losses.weights["box_l1"]
    # the recipe that it came from is as it was
    assert debug().steps == 2
    assert debug().losses.weights["token"] != 0.25
    assert with_settings(made, ["rooms=none", "lora=none"]).rooms is None
    assert with_settings(made, ["benchmarks=scanqa:1,sqa3d:0.5"]).benchmarks == {"scanqa": 1.0, "sqa3d": 0.5}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps", "--set steps: wanted field=value"),
        ("steps=2.5", "--set steps: wanted a whole number; got '2.5'"),
        ("steps=none", "--set steps: wanted a whole number; got 'none'"),
        ("steps=0", "steps: wanted at least 1; got 0"),
        ("steps.more=1", "--set steps.more: wanted steps without further parts"),
        ("learning_rate=nan", "--set learning_rate: wanted a number; got 'nan'"),
        ("learning_rate=__import__('os')", "--set learning_rate: wanted a number"),
        ("learning_rate=-1", "learning_rate: wanted a positive number; got -1.0"),
        ("freeze_encoder=1", "--set freeze_encoder: wanted true or false; got '1'"),
        ("betas=0.9", "--set betas: wanted 2 values separated by commas; got '0.9'"),
        ("betas=0.9,1.0", "betas: wanted two numbers in 0..1"),
        ("rooms.tasks=qa", "--set rooms.tasks: wanted name:value, several separated by commas; got 'qa'"),
        ("lora=yes", "--set lora: wanted none or default, or one of its parts by a dot; got 'yes'"),
        ("lora.targets=(", "lora.targets: wanted a regular expression; got '\\('"),
        ("train_only=(", r"train_only: wanted a regular expression; got '\('"),
        ("learning_rate_factors.(=1", "learning_rate_factors: wanted a regular expression; got '\\('"),
        ("precision=half", "precision: wanted one of float32, bfloat16; got 'half'"),
        ("variants.scanqa=per_answer", "variants: wanted names among the benchmarks"),
        ("given_geometry.start=2", "mixing.start: wanted a number in 0..1; got 2.0"),
    ],
)
def test_wrong_values(setting, message):
    with pytest.raises(ValueError, match=message):
        with_settings(debug(), [setting])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nano_lora", [], "nano_lora: wanted a model to start from"),
        ("nano_lora", ["model=some/where"], "nano_lora: wanted data: --data-root DIR, --data FILE.jsonl"),
        (
            "nano_lora",
            ["model=vidllm-nano", "data=x.jsonl"],
            "wanted a checkpoint for lora; got the preset vidllm-nano",
        ),
        ("debug", ["data_root=/data"], "debug: wanted rooms or files to read; got both"),
        ("debug", ["rooms=none", "data_root=/data"], "wanted a data root and benchmarks of it, or neither"),
        ("debug", ["rooms=none", "data=x.jsonl", "dense_labels=1"], "wanted rooms for dense_labels"),
        ("debug", ["rooms=none", "data=x.jsonl", "dense_matching=1"], "wanted rooms for dense_matching"),
        ("debug", ["rooms=none", "data=x.jsonl", "loc_labels=1"], "wanted rooms for loc_labels"),
        ("debug", ["proposals=true"], "debug: wanted a data root for proposals"),
        ("debug", ["rooms=none", "data=x.jsonl", "proposals=true"], "debug: wanted a data root for proposals"),
        ("nano", [], "nano: wanted a model to start from"),
        ("debug", ["model=some/where", "lora=default"], "wanted freeze_encoder with lora"),
        ("debug", ["weights_dtype=bfloat16"], "wanted precision bfloat16, as the weights; got float32"),
    ],
)
def test_fields_that_do_not_fit_together(name, settings, message):
    with pytest.raises(ValueError, match=message):
        chosen_recipe(name, settings)


def test_data_on_the_command_line_takes_the_place_of_the_recipes():
    made = chosen_recipe("debug", data="mine.jsonl")
    assert (made.rooms, made.data, made.data_root, made.benchmarks) == (None, "mine.jsonl", None, {})
    made = chosen_recipe("scannet", ["model=some/where"], data_root="/data")
    assert (made.data_root, made.data) == ("/data", None)
    assert set(made.benchmarks) == {"scanqa", "sqa3d", "scanrefer", "scan2cap"}
    both = chosen_recipe("scannet", ["model=some/where"], data="mine.jsonl", data_root="/data")
    assert both.benchmarks == made.benchmarks
    assert isinstance(both, JointRecipe)


@pytest.mark.parametrize("name", RECIPES)
def test_adapters_learn_at_the_full_rate(name):
    """They start from nothing; a factor that spares a pretrained language model would hold them back."""
    made = recipe(name)
    if made.lora is None:
        return
    trained = (
        "language_model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "lm_head.token_adapter.trainable_tokens_delta.default",
    )
    assert not [text for text in made.learning_rate_factors for parameter in trained if re.search(text, parameter)]


def test_true_geometry_decays():
    mixing = MixingSchedule(start=1.0, end=0.2, until=0.5, shape="linear")
    assert [mixing.share(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    mixing = MixingSchedule(start=1.0, end=0.0, until=0.8, shape="cosine")
    assert [mixing.share(p) for p in (0.0, 0.4, 0.8, 0.9)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert mixing.share(0.1) > 0.9
    assert MixingSchedule(start=0.3, end=0.3, until=0.0).share(0.0) == pytest.approx(0.3)
    assert nano_lora().given_geometry.start == 1.0


def test_the_help_names_every_recipe():
    for command, known in (("joint", RECIPES), ("distill", DISTILL_RECIPES)):
        shown = CliRunner().invoke(app, ["train", command, "--help"], env={"COLUMNS": "300"}).output
        assert not [name for name in known if name not in shown]
