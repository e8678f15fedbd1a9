"""Fast comparison with VGGT: image encoder, first five pairs of blocks, and the single functions."""

import hashlib
import json
import re
import zlib

import numpy as np
import pytest
import torch
from parity.vggt_filler import GOLDENS, expected_tensors, fill, images, normalise, tensor_values
from safetensors.torch import load_file
from torch import nn

from vidllm.modeling_vidllm.camera_head_vidllm import activate_pose
from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.dense_head_vidllm import activate_depth, uv_embedding
from vidllm.modeling_vidllm.encoder_vidllm import VidLLMEncoder
from vidllm.modeling_vidllm.geometry_vidllm import (
    cameras_from_pose_encoding,
    pose_encoding_from_cameras,
    rotation_from_quat_xyzw,
    unproject_depth,
)
from vidllm.modeling_vidllm.reconstruction_blocks_vidllm import apply_rope_2d, rope_2d
from vidllm.modeling_vidllm.reconstruction_vidllm import VidLLMReconstructor
from vidllm.train.vggt_weights import FRESH_PREFIXES, convert_vggt_state_dict, convert_vggt_tensor, vggt_key_map


AGGREGATOR_TOLERANCE = 1.2e-5
POSE_TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def units():
    with np.load(GOLDENS / "units.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data.files}


@pytest.fixture(scope="module")
def vggt_keys():
    return json.loads((GOLDENS / "vggt_1b_keys.json").read_text())


@pytest.fixture(scope="module")
def key_map():
    return vggt_key_map()


def homogeneous(matrices):
    bottom = torch.tensor([0.0, 0, 0, 1]).expand(*matrices.shape[:-2], 1, 4)
    return torch.cat([matrices, bottom], dim=-2)


# ---------------------------------------------------------------- goldens and filler


def test_goldens_are_the_files_that_the_manifest_names():
    manifest = json.loads((GOLDENS / "MANIFEST.json").read_text())
    assert {path.name for path in GOLDENS.iterdir()} == set(manifest) | {"MANIFEST.json"}
    for name, entry in manifest.items():
        assert hashlib.sha256((GOLDENS / name).read_bytes()).hexdigest() == entry["sha256"], name
        assert entry["source"]


def test_filler_reproduces_the_recorded_values():
    recorded = json.loads((GOLDENS / "weights.json").read_text())
    for key, sample in recorded["samples"].items():
        shape, crc = recorded["tensors"][key]
        values = tensor_values(key, tuple(shape))
        assert zlib.crc32(values.data) == crc, key
        np.testing.assert_array_equal(values.reshape(-1)[:4], np.array(sample["first_values"], dtype=np.float32))


def test_filler_makes_the_fixture_images():
    sample = json.loads((GOLDENS / "weights.json").read_text())["image_samples"]["B1_S2_28x42"]
    made = images(1, 2, 28, 42)
    for place, value in sample.items():
        index = tuple(int(number) for number in re.findall(r"\d+", place))
        assert made[index].item() == pytest.approx(value, abs=1e-7)
    wanted = load_file(GOLDENS / "vggt_b1s3_56x84.safetensors")["images"]
    torch.testing.assert_close(images(1, 3, 56, 84), wanted, rtol=0, atol=1e-7)


# ---------------------------------------------------------------- network


@torch.no_grad()
def test_encoder_and_first_five_pairs_equal_vggt():
    wanted = load_file(GOLDENS / "vggt_b1s3_56x84.safetensors")
    config = VidLLMConfig(num_reconstruction_layers=5)
    with torch.device("meta"):
        parts = nn.ModuleDict({"encoder": VidLLMEncoder(config), "reconstruction": VidLLMReconstructor(config)})
    parts.eval()
    network = ("encoder.", "reconstruction.tokens.", "reconstruction.frame_blocks.", "reconstruction.global_blocks.")
    fill(parts, vggt_key_map(config), network)
    pixels = normalise(wanted["images"])[0]
    patch_tokens = parts["encoder"](pixels, return_layers=False).patch_tokens
    torch.testing.assert_close(
        patch_tokens[0, :32, :64], wanted["check.patch_tokens_b0s0"], rtol=0, atol=AGGREGATOR_TOLERANCE
    )

    halves = {}
    reconstruction = parts["reconstruction"]
    for layer in (0, 4):
        for blocks, half in (
            (reconstruction.frame_blocks, "frame_half"),
            (reconstruction.global_blocks, "global_half"),
        ):
            name = f"check.agg{layer}.{half}"
            blocks[layer].register_forward_hook(
                lambda module, inputs, output, name=name: halves.update({name: output})
            )
    # two equal videos: the batch must not change anything, and the second one needs its own first-frame tokens
    taps = reconstruction.tapped_layers(patch_tokens.expand(2, -1, -1, -1), (4, 6))
    for name, output in halves.items():
        # (B * S, L, C) or (B, S * L, C) -> (B, S, L, C)
        output = output.reshape(2, 3, 29, 1024)
        for video in output:
            torch.testing.assert_close(
                video[None, :, :8, :64], wanted[name], rtol=0, atol=AGGREGATOR_TOLERANCE, msg=name
            )
    torch.testing.assert_close(
        taps[-1][:1, :, :8, :64], wanted["check.agg4.frame_half"], rtol=0, atol=AGGREGATOR_TOLERANCE
    )
    global_half = taps[-1][:1, :, :8, 1024:1088]
    torch.testing.assert_close(global_half, wanted["check.agg4.global_half"], rtol=0, atol=AGGREGATOR_TOLERANCE)


# ---------------------------------------------------------------- single functions


def test_pose_encoding_to_cameras(units):
    cam_from_world, intrinsics = cameras_from_pose_encoding(
        units["pose.encoding"], tuple(units["pose.image_hw"].tolist())
    )
    torch.testing.assert_close(cam_from_world[..., :3, :], units["pose.extrinsics"], rtol=0, atol=POSE_TOLERANCE)
    torch.testing.assert_close(intrinsics, units["pose.intrinsics"], rtol=1e-5, atol=0)


def test_cameras_to_pose_encoding(units):
    made = pose_encoding_from_cameras(
        homogeneous(units["encode.extrinsics"]), units["encode.intrinsics"], tuple(units["encode.image_hw"].tolist())
    )
    expected = units["encode.expected"]
    torch.testing.assert_close(made[..., :3], expected[..., :3], rtol=0, atol=POSE_TOLERANCE)
    torch.testing.assert_close(made[..., 7:], expected[..., 7:], rtol=0, atol=POSE_TOLERANCE)
    # q and -q are one rotation; where the scalar part is 0 either sign is right
    rotations = [rotation_from_quat_xyzw(encoding[..., 3:7]) for encoding in (made, expected)]
    torch.testing.assert_close(*rotations, rtol=0, atol=5e-6)
    signed = (made[..., 3:7] * expected[..., 3:7]).sum(-1).sign().unsqueeze(-1)
    torch.testing.assert_close(made[..., 3:7], signed * expected[..., 3:7], rtol=0, atol=POSE_TOLERANCE)
    clear = expected[..., 6].abs() > 1e-3
    assert clear.any()
    assert (signed[..., 0][clear] > 0).all()


def test_unprojection(units):
    made = unproject_depth(
        units["unproject.depth"], units["unproject.intrinsics"], homogeneous(units["unproject.extrinsics"])
    )
    torch.testing.assert_close(made, units["unproject.expected"], rtol=1e-5, atol=1e-5)


def test_activations(units):
    depth, confidence = activate_depth(units["activation.raw"])
    torch.testing.assert_close(depth.unsqueeze(-1), units["activation.exp"], rtol=1e-6, atol=0)
    torch.testing.assert_close(confidence, units["activation.exp_conf"], rtol=1e-6, atol=0)
    assert torch.equal(activate_pose(units["activation.pose_raw"]), units["activation.pose"])


@pytest.mark.parametrize(("columns", "rows", "channels"), [(6, 4, 64), (5, 9, 32), (37, 28, 16)])
def test_uv_embedding(units, columns, rows, channels):
    name = f"uv.{columns}x{rows}x{channels}"
    made = uv_embedding((rows, columns), channels, units[f"{name}.aspect"].item(), torch.device("cpu"))
    torch.testing.assert_close(made.permute(1, 2, 0), units[name], rtol=0, atol=1e-6)


def test_rotary_embedding(units):
    cos, sin = rope_2d(units["rope.positions_yx"][0], 64, 100.0)
    torch.testing.assert_close(apply_rope_2d(units["rope.input"], cos, sin), units["rope.expected"], rtol=0, atol=2e-6)


# ---------------------------------------------------------------- weight mapping


def test_every_vggt_key_is_used_or_left_out_and_every_tensor_of_ours_is_reached(vggt_keys, key_map):
    assert len(vggt_keys) == 1797
    state_dict = {key: torch.empty(shape, device="meta") for key, shape in vggt_keys.items()}
    ours, left_out = convert_vggt_state_dict(state_dict)
    assert left_out == sorted(key for key in vggt_keys if key.startswith(("point_head.", "track_head.")))
    assert len(left_out) + len(key_map) == 1797
    config = VidLLMConfig()
    with torch.device("meta"):
        parts = nn.ModuleDict({"encoder": VidLLMEncoder(config), "reconstruction": VidLLMReconstructor(config)})
    model_shapes = {name: tensor.shape for name, tensor in parts.state_dict().items()}
    fresh = {name for name in model_shapes if name.startswith(FRESH_PREFIXES)}
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: shape for name, shape in model_shapes.items() if name not in fresh
    }
    assert (
        sum(tensor.numel() for tensor in ours.values())
        + sum(np.prod(vggt_keys[key], dtype=np.int64) for key in left_out)
        == 1_256_537_516
    )
    # hard anchors: a rule that swaps two equal shapes would pass the shape test
    anchors = {
        "aggregator.patch_embed.blocks.7.norm2.bias": "encoder.model.encoder.layer.7.norm2.bias",
        "aggregator.patch_embed.blocks.23.ls1.gamma": "encoder.model.encoder.layer.23.layer_scale1.lambda1",
        "aggregator.global_blocks.3.attn.k_norm.weight": "reconstruction.global_blocks.3.attn.k_norm.weight",
        "camera_head.poseLN_modulation.1.bias": "reconstruction.camera_head.modulation.1.bias",
        "depth_head.scratch.refinenet4.resConfUnit2.conv1.weight": "reconstruction.depth_head.fusions.3.output_unit.conv1.weight",
        "depth_head.scratch.refinenet1.resConfUnit1.conv2.bias": "reconstruction.depth_head.fusions.0.lateral_unit.conv2.bias",
        "depth_head.scratch.layer2_rn.weight": "reconstruction.depth_head.level_convs.1.weight",
    }
    for source, target in anchors.items():
        assert key_map[source].targets == ((target, None),)


def test_fixture_fills_every_mapped_tensor(key_map):
    shapes = {key: tuple(shape) for key, (shape, _) in expected_tensors().items()}
    assert {key: rule.shape for key, rule in key_map.items()} == {
        key: shape for key, shape in shapes.items() if not key.startswith("point_head.")
    }


def test_fused_rows_go_to_query_key_value_in_this_order(key_map):
    tensor = torch.arange(3072.0)
    parts = convert_vggt_tensor("aggregator.patch_embed.blocks.2.attn.qkv.bias", tensor, key_map)
    for name, start in (("q", 0), ("k", 1024), ("v", 2048)):
        part = parts[f"encoder.model.encoder.layer.2.attention.{name}_proj.bias"]
        assert torch.equal(part, tensor[start : start + 1024])
        assert part.untyped_storage().nbytes() == part.nbytes  # a copy of its own, which safetensors can save
    assert len(parts) == 3


def test_wrong_vggt_state_dicts_are_refused(vggt_keys, key_map):
    good = {key: torch.empty(shape, device="meta") for key, shape in vggt_keys.items()}
    with pytest.raises(ValueError, match=r"aggregator\.sky_token.*unknown"):
        convert_vggt_state_dict({**good, "aggregator.sky_token": torch.empty(1, device="meta")})
    lacking = {key: tensor for key, tensor in good.items() if key != "depth_head.norm.weight"}
    with pytest.raises(ValueError, match=r"depth_head\.norm\.weight.*\(2048,\).*no such key"):
        convert_vggt_state_dict(lacking)
    wrong = {**good, "camera_head.embed_pose.weight": torch.empty(2048, 8, device="meta")}
    with pytest.raises(
        ValueError, match=r"camera_head\.embed_pose\.weight: wanted shape \(2048, 9\); got \(2048, 8\)"
    ):
        convert_vggt_state_dict(wrong)
    with pytest.raises(ValueError, match=r"nonsense.*unknown"):
        convert_vggt_tensor("nonsense", torch.zeros(1), key_map)
    assert convert_vggt_tensor("track_head.tracker.any", torch.zeros(1), key_map) == {}
    with pytest.raises(ValueError, match=r"dinov2_with_registers.*siglip_vision_model"):
        vggt_key_map(VidLLMConfig(vision_config={"model_type": "siglip_vision_model", "hidden_size": 768}))
