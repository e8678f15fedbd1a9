"""An image encoder of one's own in a starting checkpoint: its weights, and the pixels that it was trained on."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, CLIPImageProcessor, SiglipImageProcessor

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.synthetic_clip import write_synthetic_clip
from vidllm.train.initialise import initialise_from_sources
from vidllm.train.presets import IMAGENET_MEAN, IMAGENET_STD, preset
from vidllm.train.source_configs import preset_with_encoder

from .source_parts import Trap, nothing_left


TOWER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 16}
WORDS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 50,
}
CLIP = (list(CLIPImageProcessor.image_mean), list(CLIPImageProcessor.image_std))
SIGLIP = (list(SiglipImageProcessor.image_mean), list(SiglipImageProcessor.image_std))
# model type -> fields, mean and standard deviation
ENCODERS = {
    "dinov2": (TOWER, (list(IMAGENET_MEAN), list(IMAGENET_STD))),
    "clip_vision_model": ({**TOWER, "intermediate_size": 64}, CLIP),
    "siglip_vision_model": ({**TOWER, "intermediate_size": 64}, SIGLIP),
    "clip": (
        {
            "vision_config": {**TOWER, "intermediate_size": 64},
            "text_config": {**WORDS, "bos_token_id": 0, "eos_token_id": 1},
            "projection_dim": 16,
        },
        CLIP,
    ),
    "siglip": (
        {
            "vision_config": {**TOWER, "intermediate_size": 64},
            "text_config": {**WORDS, "bos_token_id": 0, "eos_token_id": 1},
        },
        SIGLIP,
    ),
}


def save_encoder(folder, kind="dinov2", **changes):
    """A vision model with random weights, as transformers saves it; of CLIP and SigLIP the whole or the tower."""
    config = AutoConfig.for_model(kind, **{**ENCODERS[kind][0], **changes})
    torch.manual_seed(2)
    model = AutoModel.from_config(config).eval()
    model.save_pretrained(folder)
    return getattr(model, "vision_model", model)


def start(folder, vggt=None):
    """A starting checkpoint with the encoder in `folder`."""
    geometry = None if vggt is None else str(vggt)
    return initialise_from_sources("vidllm-tiny", folder.parent / "out", geometry=geometry, vision=str(folder))


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_saved_processor_makes_the_encoders_pixels(tmp_path, vggt, kind):
    vision = save_encoder(tmp_path / "vision", kind)
    report = start(tmp_path / "vision", vggt)
    write_synthetic_clip(tmp_path / "room.mp4", seconds=1.0, size_hw=(64, 96), fps=4)
    model = VidLLMForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = VidLLMProcessor.from_pretrained(tmp_path / "out").video_processor
    assert (processor.image_mean, processor.image_std) == ENCODERS[kind][1]
    assert (processor.patch_size, processor.size) == (16, {"shortest_edge": 32})
    inputs = processor(str(tmp_path / "room.mp4"))
    with torch.no_grad():
        recon = model.reconstruct(inputs["pixel_values_videos"], inputs["video_size_shw"])
        assert recon.depth.shape == (1, 3, 32, 48)
        pixels = inputs["pixel_values_videos"][0]
        got = model.model.encoder(pixels, return_layers=False).patch_tokens
        options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
        wanted = vision(pixel_values=pixels, **options).last_hidden_state[:, -6:]
        # CLIP's own last state is taken before its norm
        wanted = vision.post_layernorm(wanted) if kind.startswith("clip") else wanted
    assert torch.equal(got, wanted)
    part = report["parts"]["vision"]
    path = tmp_path / "vision" / "model.safetensors"
    assert part["sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    assert sorted(part["keys_used"] + part["keys_left_out"]) == sorted(load_file(path))
    is_part = kind in ("clip", "siglip")
    assert {key.split(".")[0] == "vision_model" for key in part["keys_left_out"]} == ({False} if is_part else set())


def test_what_the_folder_says_of_its_pixels_counts(tmp_path):
    save_encoder(tmp_path / "vision")
    said = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "do_normalize": True,
        "rescale_factor": 1 / 255,
    }
    for name, document, wanted in (
        ("preprocessor_config.json", said, ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])),
        ("processor_config.json", {"image_processor": said}, ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])),
        ("preprocessor_config.json", {**said, "do_normalize": False}, ([0.0] * 3, [1.0] * 3)),
    ):
        (tmp_path / "vision" / name).write_text(json.dumps(document))
        start(tmp_path / "vision")
        processor = VidLLMProcessor.from_pretrained(tmp_path / "out").video_processor
        assert (processor.image_mean, processor.image_std) == wanted
        (tmp_path / "vision" / name).unlink()
        for path in (tmp_path / "out").iterdir():
            path.unlink()
    for text, message in (
        ("{", "wanted the config of an image processor in .*got none"),
        ("[]", "wanted the config of an image processor"),
        ('{"image_mean": [1, 2, 3], "image_std": [1, 0, 1]}', "wanted image_mean and image_std, three numbers each"),
        ('{"image_mean": [1, 2, 3]}', "wanted image_mean and image_std, three numbers each"),
        ('{"do_rescale": false}', "wanted pixels that are divided by 255"),
    ):
        (tmp_path / "vision" / "preprocessor_config.json").write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            start(tmp_path / "vision")
        assert "preprocessor_config.json" in str(error.value)
        assert "\n" not in str(error.value)


def test_pixels_of_which_nothing_is_known_are_refused(tmp_path):
    config = AutoConfig.for_model("vit_msn", **TOWER, intermediate_size=64)
    AutoModel.from_config(config).save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match=r"wanted image_mean and image_std in .*preprocessor_config.json; got none"):
        start(tmp_path / "vision")
    nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "patch_size", "edge"), [("vidllm-7b", 16, 512), ("vidllm-7b", 14, 518), ("vidllm-tiny", 64, 64)]
)
def test_the_short_side_is_a_multiple_of_the_patch(tmp_path, name, patch_size, edge):
    config = AutoConfig.for_model("dinov2", **{**TOWER, "patch_size": patch_size}).to_dict()
    changed = preset_with_encoder(preset(name), str(tmp_path), config)
    assert (changed.shortest_edge, changed.patch_size) == (edge, patch_size)
    with pytest.raises(ValueError, match="wanted square patches; got 16 x 8"):
        preset_with_encoder(preset(name), str(tmp_path), {**config, "patch_size": [16, 8]})


def test_an_encoder_of_another_width_than_the_geometrys(tmp_path, vggt):
    save_encoder(tmp_path / "vision", hidden_size=64)
    with pytest.raises(ValueError, match=r"vision: .*vision: wanted an encoder of width 32, .*; got one of width 64"):
        start(tmp_path / "vision", vggt)
    nothing_left(tmp_path / "out")


def changed_weights(folder, **changes):
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={"format": "pt"})


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-300])


def with_code(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, "trap": Trap()}, folder / "pytorch_model.bin")


def config_of(**changes):
    def write(folder):
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**document, **changes}))

    return write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "wanted a complete safetensors file; .*model.safetensors is none"),
        (with_code, "wanted plain tensors in .*pytorch_model.bin; .*posix.system, and code in a file is not run"),
        (lambda f: (f / "model.safetensors").unlink(), "wanted one file of weights in .*vision"),
        (lambda f: changed_weights(f, **{"layernorm.weight": torch.ones(31)}), r"layernorm.weight in .*vision: wanted shape \(32,\); got \(31,\)"),
        (lambda f: changed_weights(f, zzz=torch.ones(3)), "zzz in .*vision: wanted a tensor of Dinov2Model; got one that it has no place for"),
        (lambda f: changed_weights(f, **{"layernorm.weight": None}), r"layernorm.weight: wanted a tensor of shape \(32,\) in .*vision; got no such key"),
        (lambda f: changed_weights(f, **{"layernorm.weight": torch.ones(32, dtype=torch.complex64)}), "layernorm.weight in .*model.safetensors: wanted .* dtype; got torch.complex64"),
        (lambda f: changed_weights(f, **{"layernorm.weight": torch.ones(32, dtype=torch.uint16)}), "layernorm.weight in .*model.safetensors: wanted .* dtype; got torch.uint16"),
        (lambda f: changed_weights(f, **{"layernorm.weight": torch.ones(32, dtype=torch.int64)}), "layernorm.weight in .*model.safetensors: wanted .* dtype; got torch.int64"),
        (lambda f: (f / "config.json").write_text("{"), "wanted a config of transformers in .*config.json; got none"),
        (lambda f: (f / "config.json").write_text("[]"), "wanted a config of transformers in .*config.json; got"),
        (config_of(model_type="weird", auto_map={"AutoConfig": "code.X"}), "wanted a model_type that transformers has, since the code of a source is not run; got 'weird'"),
        (config_of(hidden_size="many"), "wanted a config of dinov2; got another .*hidden_size"),
        (config_of(hidden_act="nope"), "config: wanted one of which a model can be made; got KeyError"),
        (config_of(patch_size=0), "vision: .*: wanted square patches; got 0 x 0 pixels"),
    ],
)  # fmt: skip
def test_a_broken_encoder_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch, change, message):
    def asked(*_):
        raise AssertionError("somebody was asked whether to run code")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.chdir(tmp_path)
    save_encoder(tmp_path / "vision")
    change(tmp_path / "vision")
    with pytest.raises(ValueError, match=message) as error:
        start(tmp_path / "vision")
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    nothing_left(tmp_path / "out")
    assert not (tmp_path / "executed").exists()


def test_half_precision_stays_though_the_config_says_otherwise(tmp_path):
    save_encoder(tmp_path / "vision")
    path = tmp_path / "vision" / "model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    assert start(tmp_path / "vision")["parts"]["vision"]["dtypes"] == ["bfloat16"]
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.encoder.model.layernorm.weight"]
    assert torch.equal(stored, load_file(path)["layernorm.weight"])
    assert stored.dtype == torch.bfloat16
