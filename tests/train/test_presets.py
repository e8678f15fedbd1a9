"""Presets: complete configs of the advertised sizes."""

import dataclasses

import pytest
import torch
from tiny import tiny_config

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.train.initialise import count_parameters
from vidllm.train.presets import PRESETS, preset


def on_meta(name):
    with torch.device("meta"):
        return VidLLMForConditionalGeneration(preset(name).config())


def test_names():
    assert list(PRESETS) == ["vidllm-7b", "vidllm-4b", "vidllm-nano", "vidllm-tiny"]
    assert all(preset(name).name == name for name in PRESETS)
    with pytest.raises(ValueError, match=r"got 'vidlm-nano'; did you mean 'vidllm-nano'\?"):
        preset("vidlm-nano")
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("vidllm-7b").num_frames = 3
    with pytest.raises(TypeError):
        PRESETS["mine"] = preset("vidllm-7b")


def test_changes_are_merged_and_the_recipe_stays():
    recipe = preset("vidllm-nano")
    config = recipe.config(adapter_type="none", text_config={"vocab_size": 999})
    assert (config.adapter_type, config.text_config.vocab_size, config.text_config.hidden_size) == ("none", 999, 192)
    again = recipe.config()
    assert (again.adapter_type, again.text_config.vocab_size) == ("bridge", 776)
    again.grounding_neighbors.append(1)
    assert recipe.config().grounding_neighbors != again.grounding_neighbors


def test_tiny_is_the_tiny_of_the_tests():
    """Equal but for the vocabulary, which the byte-level tokenizer sets."""
    ours, tests = preset("vidllm-tiny").config().to_dict(), tiny_config().to_dict()
    for tokens in ("video_token_id", "coord_token_id", "loc_token_id"):
        ours.pop(tokens), tests.pop(tokens)
    ours["text_config"].pop("vocab_size"), tests["text_config"].pop("vocab_size")
    assert ours == tests


def test_shapes_of_the_public_parts():
    """Numbers of the checkpoints that the big presets start from."""
    large = preset("vidllm-7b").config()
    vision = large.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads, vision.patch_size) == (
        1024,
        24,
        16,
        14,
    )
    assert (vision.image_size, vision.num_register_tokens, vision.layer_norm_eps) == (518, 4, 1e-6)
    assert large.metric_depth_layers == large.reconstruction_tap_layers == [4, 11, 17, 23]
    assert large.num_scene_tokens == 3072
    text = large.text_config
    assert (text.model_type, text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (
        "qwen2",
        3584,
        18944,
        28,
    )
    assert (text.num_attention_heads, text.num_key_value_heads, text.vocab_size) == (28, 4, 152064)
    assert text.rope_parameters["rope_theta"] == 1e6
    assert (text.rms_norm_eps, large.tie_word_embeddings) == (1e-6, False)
    middle = preset("vidllm-4b").config()
    text = middle.text_config
    assert (text.model_type, text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (
        "qwen3",
        2560,
        9728,
        36,
    )
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim, text.vocab_size) == (32, 8, 128, 151936)
    assert (text.rope_parameters["rope_theta"], text.max_position_embeddings) == (1e6, 40960)
    assert (middle.tie_word_embeddings, middle.num_scene_tokens) == (True, 2048)
    assert (preset("vidllm-4b").shortest_edge, preset("vidllm-7b").shortest_edge) == (392, 518)


@pytest.mark.parametrize("name", list(PRESETS))
def test_frames_and_tokens_fit(name):
    recipe, config = preset(name), preset(name).config()
    tokens = {config.video_token_id, config.coord_token_id, config.loc_token_id}
    assert len(tokens) == 3
    assert max(tokens) < config.text_config.vocab_size
    # A prompt of scene tokens leaves room for a conversation.
    assert config.num_scene_tokens + 400 < config.text_config.max_position_embeddings
    assert recipe.shortest_edge % recipe.patch_size == 0
    assert config.vision_config.patch_size == recipe.patch_size


def test_big_presets_build_on_meta_with_the_known_sizes():
    """Language models and encoder as their authors count them; both big presets share the geometry half."""
    counts = {name: count_parameters(on_meta(name)) for name in ("vidllm-7b", "vidllm-4b")}
    seven, four = counts["vidllm-7b"], counts["vidllm-4b"]
    assert seven["language_model"] + seven["lm_head"] == 7_615_616_512  # Qwen2-7B
    assert four["language_model"] == 4_022_468_096  # Qwen3-4B
    assert four["lm_head"] == 0  # tied
    assert seven["encoder"] == 304_372_736  # DINOv2-L/14 with registers and the mask token
    for part in ("encoder", "adapter", "reconstruction", "metric_depth"):
        assert seven[part] == four[part]


def test_small_presets_are_small():
    # Its weights, 16 bits each, have to fit into a repository.
    assert 2 * sum(count_parameters(on_meta("vidllm-nano")).values()) < 25e6
    assert sum(count_parameters(on_meta("vidllm-tiny")).values()) < 0.5e6


def test_counting_covers_every_parameter_once():
    for name in ("vidllm-nano", "vidllm-tiny"):
        model = on_meta(name)
        model.tie_weights()
        assert sum(count_parameters(model).values()) == sum(value.numel() for value in model.parameters())
