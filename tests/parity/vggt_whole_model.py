"""Whole-model comparison with the VGGT fixture, as a program: `python -m parity.vggt_whole_model` with `tests/` on the path.

Prints one JSON line: per tensor the largest difference and the largest share of the tolerance, peak memory, seconds.
Runs in a process of its own because it holds 5 GB of weights.
"""

import json
import resource
import sys
import time

import torch
from parity.vggt_filler import GOLDENS, fill, normalise
from safetensors.torch import load_file

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.geometry_vidllm import cameras_from_pose_encoding, unproject_depth
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMModel
from vidllm.train.vggt_weights import vggt_key_map


TEXT_CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
}
AGGREGATOR_LAYERS = (0, 4, 11, 17, 23)


def build_model() -> VidLLMModel:
    """The model of the paper with a tiny language model and the fixture's weights; everything else is fresh."""
    config = VidLLMConfig(text_config=TEXT_CONFIG, video_token_id=61, coord_token_id=62, loc_token_id=63)
    model = VidLLMModel(config).eval()
    fill(model, vggt_key_map(config))
    return model


def record(store: dict, model: VidLLMModel) -> None:
    """Hooks that keep the corners of the intermediate tensors that the fixture holds (first video, all frames)."""

    def keep(name, cut):
        def hook(module, inputs, output):
            # The first call is the first chunk of frames, which holds the first frame.
            store.setdefault(name, cut(output).clone())

        return hook

    vision = model.encoder.model
    vision.embeddings.register_forward_hook(keep("check.vit_input_b0s0", lambda out: out[0, :16, :64]))
    vision.encoder.layer[0].register_forward_hook(keep("check.vit_block0_b0s0", lambda out: out[0, :16, :64]))
    model.encoder.register_forward_hook(keep("check.patch_tokens_b0s0", lambda out: out.patch_tokens[0, :32, :64]))
    for layer in AGGREGATOR_LAYERS:
        for blocks, half in (("frame_blocks", "frame_half"), ("global_blocks", "global_half")):
            block = getattr(model.reconstruction, blocks)[layer]
            block.register_forward_hook(keep(f"check.agg{layer}.{half}", lambda out: out))
    head = model.reconstruction.depth_head

    def thin(parts):
        def cut(out):
            step = max(1, out.shape[-2] // parts)
            return out[0, :8, ::step, ::step]

        return cut

    for level, conv in enumerate(head.level_convs):
        conv.register_forward_hook(keep(f"check.depth_head.layer{level + 1}_rn", thin(6)))
    head.neck_conv.register_forward_hook(keep("check.depth_head.output_conv1", thin(12)))


@torch.no_grad()
def run(model: VidLLMModel, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The model's own flow, all heads in place, on `images (B, S, 3, H, W)`; tensors under the fixture's names."""
    found: dict[str, torch.Tensor] = {}
    record(found, model)
    num_videos, num_frames, _, height, width = images.shape
    raw = model(pixel_values_videos=normalise(images)).raw_reconstruction
    for name in [name for name in found if name.startswith("check.agg")]:
        # (B * S, L, C) or (B, S * L, C) -> (B, S, 8, 64)
        found[name] = found[name].reshape(num_videos, num_frames, -1, found[name].shape[-1])[:, :, :8, :64]
    encodings = raw.pose_encodings
    cam_from_world, intrinsics_px = cameras_from_pose_encoding(encodings[:, -1], (height, width))
    found["pose_enc"] = encodings[:, -1]
    found["pose_enc_iters"] = encodings.transpose(0, 1)
    found["extrinsics"] = cam_from_world[..., :3, :]
    found["intrinsics"] = intrinsics_px
    found["depth"] = raw.depth_relative.unsqueeze(-1)
    found["depth_conf"] = raw.depth_confidence
    found["points_from_depth"] = unproject_depth(raw.depth_relative, intrinsics_px, cam_from_world)
    return found


def tolerance(name: str) -> tuple[float, float]:
    """Absolute and relative tolerance of a tensor, from the fixture's index."""
    rules = json.loads((GOLDENS / "index.json").read_text())["tolerance"]
    for patterns, rule in rules.items():
        for pattern in patterns.split(", "):
            stem = pattern.rstrip("*")
            if name == pattern or (pattern.endswith("*") and name.startswith(stem)):
                return rule.get("abs", 0.0), rule.get("rel", 0.0)
    raise KeyError(name)


def compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Per tensor: `max_abs_difference` and `share` of the tolerance (1 = just within)."""
    report = {}
    for name, expected in wanted.items():
        if name == "images" or name.startswith(("check.point_head", "world_points")):
            continue  # there is no point head
        assert found[name].shape == expected.shape, (name, found[name].shape, expected.shape)
        absolute, relative = tolerance(name)
        difference = (found[name].double() - expected.double()).abs()
        share = difference / (absolute + relative * expected.double().abs()).clamp_min(1e-30)
        # intrinsics have exact zeros and a purely relative tolerance
        share = torch.where(difference == 0, torch.zeros_like(share), share)
        report[name] = {"max_abs_difference": difference.max().item(), "share": share.max().item()}
    return report


def main() -> None:
    torch.set_num_threads(2)
    start = time.time()
    model = build_model()
    wanted = load_file(GOLDENS / "vggt_b1s3_56x84.safetensors")
    found = run(model, wanted["images"])
    # Unprojection has its own fixture; here the reference's cameras and depth must give the same points as ours.
    wanted_points = unproject_depth(
        wanted["depth"][..., 0],
        wanted["intrinsics"],
        torch.cat([wanted["extrinsics"], torch.tensor([0.0, 0, 0, 1]).expand(1, 3, 1, 4)], dim=-2),
    )
    report = {
        "tensors": compare(found, wanted),
        "points_from_depth": (found["points_from_depth"] - wanted_points).abs().max().item(),
        "seconds": time.time() - start,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    json.dump(report, sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
