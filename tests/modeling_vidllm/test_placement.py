"""Large-model loading on a small model: device maps, offload, quantised language models."""

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from tiny import RAGGED_SIZES, tiny_model, tiny_prompts, tiny_videos

from vidllm.modeling_vidllm.modeling_vidllm import MODULES_NOT_TO_QUANTISE, VidLLMForConditionalGeneration


TAILS = [[7, 8, 9], [10, 11], [12, 13, 14, 15]]


def ask(model):
    pixels, sizes = tiny_videos(RAGGED_SIZES)
    ids, mask = tiny_prompts(
        model.config, [[*tail, model.config.coord_token_id, 4, model.config.loc_token_id] for tail in TAILS]
    )
    points = torch.linspace(-1, 1, 9).view(3, 1, 3)
    with torch.no_grad():
        return model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values_videos=pixels,
            video_size_shw=sizes,
            coord_points_world=points,
        )


def assert_same_answers(a, b, atol=0.0):
    for name, value in a.scene._tensors().items():
        torch.testing.assert_close(b.scene._tensors()[name], value, rtol=0, atol=atol)
    torch.testing.assert_close(b.logits, a.logits, rtol=0, atol=atol)
    torch.testing.assert_close(b.grounding.boxes, a.grounding.boxes, rtol=0, atol=atol)


def test_auto_device_map_places_every_parameter_and_splits_no_block():
    model = tiny_model()
    total = sum(p.numel() * 4 for p in model.parameters())
    device_map = infer_auto_device_map(
        model,
        max_memory={0: int(total * 0.4), "cpu": int(total * 0.4), "disk": total},
        no_split_module_classes=list(model._no_split_modules),
    )
    for name, _ in model.named_parameters():
        owners = [key for key in device_map if name == key or name.startswith(f"{key}.")]
        assert len(owners) == 1, f"{name}: {owners}"
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    for name, kind in classes.items():
        if kind in model._no_split_modules:
            assert not any(key.startswith(f"{name}.") for key in device_map), name
    assert len(set(device_map.values())) == 3


def test_bare_parameters_live_in_modules_of_their_own():
    """A module with parameters of its own and children would be split by a device map and lose its parameters."""
    model = tiny_model()
    no_split = set(model._no_split_modules)
    inside = [name for name, module in model.named_modules() if type(module).__name__ in no_split]
    for name, module in model.named_modules():
        bare = [key for key, _ in module.named_parameters(recurse=False)]
        if bare and list(module.children()):
            assert type(module).__name__ in no_split or any(name.startswith(f"{owner}.") for owner in inside), (
                f"{name}: {bare}"
            )


def test_cpu_and_disk_offload_equals_the_plain_model(tmp_path):
    plain, offloaded = tiny_model(), tiny_model()
    children = [f"model.{name}" for name, child in plain.model.named_children() if child is not None] + ["lm_head"]
    device_map = {name: ("disk" if number % 2 else "cpu") for number, name in enumerate(children)}
    dispatch_model(offloaded, device_map=device_map, main_device="cpu", offload_dir=str(tmp_path))
    assert any(p.is_meta for p in offloaded.parameters())
    assert_same_answers(ask(plain), ask(offloaded))
    pixels, sizes = tiny_videos(RAGGED_SIZES)
    ids, mask = tiny_prompts(plain.config, TAILS)
    scene = offloaded.encode_scene(pixels, sizes)
    assert torch.equal(
        offloaded.generate(input_ids=ids, attention_mask=mask, scene=scene, max_new_tokens=4, do_sample=False),
        plain.generate(
            input_ids=ids,
            attention_mask=mask,
            scene=plain.encode_scene(pixels, sizes),
            max_new_tokens=4,
            do_sample=False,
        ),
    )


def test_from_pretrained_with_a_device_map_onto_disk_equals_the_plain_model(tmp_path):
    plain = tiny_model()
    plain.save_pretrained(tmp_path / "model")
    device_map = {f"model.{name}": "cpu" for name, child in plain.model.named_children() if child is not None}
    device_map |= {"lm_head": "cpu", "model.reconstruction": "disk", "model.language_model": "disk"}
    offloaded = VidLLMForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload")
    ).eval()
    # weights that are read from disk for each call are not aligned in memory: products may differ in the last bits
    assert_same_answers(ask(plain), ask(offloaded), atol=2e-5)


@pytest.mark.parametrize("kind", ["bitsandbytes", "torchao"])
def test_quantised_language_model_leaves_geometry_alone(tmp_path, kind):
    # widths that both libraries accept
    text = {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 512, "tie_word_embeddings": False}  # fmt: skip
    plain = tiny_model(text_config=text)
    plain.save_pretrained(tmp_path)
    if kind == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=MODULES_NOT_TO_QUANTISE)
    else:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=MODULES_NOT_TO_QUANTISE)
    quantised = VidLLMForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu"
    ).eval()
    linear = quantised.model.language_model.layers[0].mlp.down_proj
    assert type(linear) is not torch.nn.Linear or type(linear.weight.data) is not torch.Tensor, "nothing was quantised"
    pixels, sizes = tiny_videos(RAGGED_SIZES)
    a, b = plain.encode_scene(pixels, sizes), quantised.encode_scene(pixels, sizes)
    for name, value in a._tensors().items():
        assert torch.equal(b._tensors()[name], value), name
    ours, theirs = ask(plain).logits, ask(quantised).logits.float()
    assert torch.isfinite(theirs).all()
    assert not torch.equal(ours, theirs)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.98
