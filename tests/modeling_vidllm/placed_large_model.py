"""A model of more than a billion parameters, plain, offloaded and in 4 bits: `python placed_large_model.py FOLDER KIND`.

`make` writes random weights; `plain`, `offload` and `4bit` load them, encode a scene, reconstruct and answer. Each in a process of its own; prints
one JSON line. Geometry, encoder and scene tokens are those of VGGT's shape, the language model has 0.4 billion parameters.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig
from vidllm.modeling_vidllm.modeling_vidllm import MODULES_NOT_TO_QUANTISE, VidLLMForConditionalGeneration
from vidllm.train.compose import fresh_tensors
from vidllm.train.shard_writer import ShardWriter


TEXT_CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
}
HEAD = "lm_head.weight"


def make(folder: Path) -> dict:
    """Random weights, written without a second copy of them in memory."""
    config = VidLLMConfig(
        text_config=TEXT_CONFIG, video_token_id=1000, coord_token_id=1001, loc_token_id=1002, num_scene_tokens=64
    )
    with torch.device("meta"):
        model = VidLLMForConditionalGeneration(config)
    names = [name for name in model.state_dict() if name != HEAD]
    values = fresh_tensors(model, set(names), seed=3)
    folder.mkdir()
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    with ShardWriter(folder, shapes, dict.fromkeys(shapes, torch.float32), 10**9) as writer:
        for name, value in values.items():
            writer.write(name, value)
    config.save_pretrained(folder)
    return {"parameters": sum(value.numel() for value in values.values())}


def load(folder: Path, kind: str) -> VidLLMForConditionalGeneration:
    """As a user would, with too little memory or with a quantised language model."""
    more: dict = {}
    if kind == "offload":
        children = ["adapter", "metric_depth", "scene_tokens", "point_embedding", "language_model", "grounding"]
        device_map = {f"model.{name}": "cpu" for name in children}
        # the 1.2 billion parameters of the geometry stay on the disk
        device_map |= {"model.encoder": "disk", "model.reconstruction": "disk", "lm_head": "cpu"}
        more = {"device_map": device_map, "offload_folder": str(folder / "offload")}
    elif kind == "4bit":
        from transformers import BitsAndBytesConfig

        four = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=MODULES_NOT_TO_QUANTISE)
        more = {"quantization_config": four, "device_map": "cpu"}
    return VidLLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **more).eval()


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(2)
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    start = time.time()
    if kind == "make":
        report = make(folder)
    else:
        model = load(folder, kind)
        pixels = torch.randn(1, 3, 3, 56, 84, generator=torch.Generator().manual_seed(1))
        scene = model.encode_scene(pixels)
        recon = model.reconstruct(pixels)
        config = model.config
        ids = torch.tensor([[5, *[config.video_token_id] * config.num_scene_tokens, 7, 8, 9]])
        answer = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), scene=scene, max_new_tokens=5, min_new_tokens=5, do_sample=False
        )  # fmt: skip
        torch.save(
            {"depth": recon.depth, "cam_from_world": recon.cam_from_world, "tokens": scene.tokens},
            folder / f"{kind}.pt",
        )
        report = {"answer": answer[0, ids.shape[1] :].tolist(), "finite": bool(scene.tokens.isfinite().all())}
    report["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report["seconds"] = time.time() - start
    json.dump(report, sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
