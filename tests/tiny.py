"""A complete tiny Vid-LLM: random weights, milliseconds, odd sizes."""

import json
from pathlib import Path

import torch

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig


FRAME_HW = (28, 42)
NUM_FRAMES = 3


def tiny_config(**changes) -> VidLLMConfig:
    """Config of `vidllm-tiny`: 32 wide, 2 encoder layers, 1 reconstruction pair; any field can be changed."""
    fields = {
        "vision_config": {
            "model_type": "dinov2_with_registers",
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "image_size": 28,
            "patch_size": 14,
            "num_register_tokens": 2,
        },
        "text_config": {
            "model_type": "qwen3",
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "vocab_size": 300,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        },
        "video_token_id": 290,
        "coord_token_id": 291,
        "loc_token_id": 292,
        "num_adapter_heads": 4,
        "num_bridge_tokens": 5,
        "num_reconstruction_layers": 1,
        "num_reconstruction_heads": 2,
        "reconstruction_tap_layers": [0, 0, 0, 0],
        "num_reconstruction_registers": 2,
        "num_camera_layers": 2,
        "num_camera_heads": 4,
        "num_camera_iterations": 4,
        "dense_head_channels": [8, 12, 16, 16],
        "dense_head_features": 16,
        "metric_decoder_features": 16,
        "num_depth_bins": 12,
        "num_scene_tokens": 16,
        "position_hidden_size": 24,
        "grounding_hidden_size": 32,
        "num_grounding_heads": 4,
        "num_grounding_queries": 7,
        "grounding_neighbors": [3, 5],
        "max_boxes_per_loc": 3,
        # near unit gain at this width: with the usual 0.02 gradients would drown in rounding
        "initializer_range": 0.08,
    }
    fields.update(changes)
    return VidLLMConfig(**fields)


def tiny_model(seed: int = 0, random_everything: bool = True, **changes):
    """A tiny model in eval mode.

    `random_everything` draws every parameter at random, for zero gates and unit norms hide paths; False leaves it fresh.
    """
    from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration

    torch.manual_seed(seed)
    model = VidLLMForConditionalGeneration(tiny_config(**changes)).eval()
    if random_everything:
        randomise(model, seed)
    return model


def randomise(model, seed: int = 0) -> None:
    """Draw all parameters: weights with a gain near 1, everything else around its usual value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and not name.endswith("tokens"):
                fan_in = parameter[0].numel()
                parameter.copy_(noise * 0.7 * fan_in**-0.5)
            elif name.endswith("weight") or name.endswith("gamma") or name.endswith("lambda1"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.add_(0.2 * noise)


# (frames, height, width) of the videos of a ragged batch, in pixels
RAGGED_SIZES = [(3, 28, 42), (2, 42, 28), (3, 28, 42)]


def tiny_videos(sizes=None, seed: int = 0):
    """Normalised random videos padded for transport: `(B, S, 3, H, W)` and sizes `(B, 3)`."""
    sizes = sizes or [(NUM_FRAMES, *FRAME_HW)] * 2
    generator = torch.Generator().manual_seed(seed)
    most = [max(size) for size in zip(*sizes)]
    pixels = torch.zeros(len(sizes), most[0], 3, most[1], most[2])
    for row, (frames, height, width) in enumerate(sizes):
        pixels[row, :frames, :, :height, :width] = torch.randn(frames, 3, height, width, generator=generator)
    return pixels, torch.tensor(sizes)


def tiny_prompts(config, tails, heads=None, pad_id: int = 0, side: str = "left"):
    """Prompts padded on one side, [head | N placeholders | tail]: ids `(Q, L)` and mask; a tail or head is a list of ids; head None = no video."""
    heads = heads or [[5, 6]] * len(tails)
    rows = []
    for head, tail in zip(heads, tails, strict=True):
        video = [] if head is None else [*head, *[config.video_token_id] * config.num_scene_tokens]
        rows.append([*video, *tail])
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        start = length - len(tokens) if side == "left" else 0
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)
        mask[row, start : start + len(tokens)] = 1
    return ids, mask


def call_metric(folder):
    """Let a checkpoint say that it gives metres, as one does that has learned them: boxes and places are taught to no other."""
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "is_metric": True}))
    return folder
