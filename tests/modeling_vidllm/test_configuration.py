"""The config: switches are checked, sub-configs are kept, nothing is lost on disk."""

import pytest
from tiny import tiny_config

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter_type": "brigde"}, r"adapter_type: wanted one of .* got 'brigde'; did you mean 'bridge'\?"),
        ({"bridge_scope": "scenes"}, r"did you mean 'scene'\?"),
        ({"box_output": "txt"}, r"did you mean 'text'\?"),
        ({"num_adapter_heads": 5}, r"num_adapter_heads: wanted a divisor of vision_config.hidden_size = 32; got 5"),
        ({"num_reconstruction_heads": 16}, "multiple of 4"),
        ({"reconstruction_tap_layers": [0, 0, 0, 1]}, r"rising layer numbers in 0\.\.0"),
        ({"num_reconstruction_layers": 2, "reconstruction_tap_layers": [0, 0, 0, 0]}, "must be the last pair 1"),
        ({"metric_depth_layers": [3, 2, 1, 0]}, "metric_depth_layers: wanted 4 rising"),
        ({"min_depth_m": 20.0}, "0 < min < max"),
        ({"num_scene_tokens": 0}, "num_scene_tokens: wanted a positive number; got 0"),
        ({"dense_head_channels": [8, 8]}, "wanted 4 numbers"),
        ({"vision_config": {"model_type": "bert"}}, "vision_config: wanted a model with .*patch_size"),
    ],
)
def test_impossible_configs_are_refused_with_one_clear_line(changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        tiny_config(**changes)
    assert "\n" not in str(caught.value)


def test_wrong_types_are_refused():
    from huggingface_hub.errors import StrictDataclassFieldValidationError

    with pytest.raises(StrictDataclassFieldValidationError, match="num_bridge_tokens"):
        tiny_config(num_bridge_tokens="many")


def test_config_survives_the_disk(tmp_path):
    config = tiny_config(adapter_type="none", is_metric=True)
    config.save_pretrained(tmp_path)
    assert (tmp_path / "configuration_vidllm.py").is_file()
    again = VidLLMConfig.from_pretrained(tmp_path)
    ignored = {"transformers_version", "auto_map"}
    a, b = ({key: value for key, value in c.to_dict().items() if key not in ignored} for c in (config, again))
    assert a == b
    assert again.vision_config.model_type == "dinov2_with_registers"
    assert again.text_config.model_type == "qwen3"


def test_defaults_are_the_papers_shape():
    config = VidLLMConfig()
    assert (config.vision_config.num_hidden_layers, config.vision_config.hidden_size) == (24, 1024)
    assert config.metric_depth_layers == config.reconstruction_tap_layers == [4, 11, 17, 23]
    assert (config.num_bridge_tokens, config.num_scale_frames) == (16, 16)


def test_a_tied_language_model_ties_the_whole():
    text = {**tiny_config().text_config.to_dict(), "tie_word_embeddings": True}
    assert tiny_config(text_config=text).tie_word_embeddings
    assert not tiny_config().tie_word_embeddings


def test_without_a_metric_head_there_is_nothing_to_align():
    assert not tiny_config(use_metric_depth=False).use_scale_alignment
