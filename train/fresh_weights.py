"""First values for a small model that is trained from nothing.

transformers' own (normal, 0.02 everywhere) suit widths of about a thousand and long runs; at width 192 a signal shrinks by a factor of 4 per layer,
positions are invisible beside pixels, and the blocks of a short run never get to speak.
"""

import math

import torch
from torch import nn

from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.train.dense_matching import match_codes


# Size of position embeddings beside patch embeddings of size 1.
POSITION_SIZE = 0.7
SPECIAL_TOKEN_STD = 0.05
# Factor of normed queries and keys of the blocks over all frames: how sharply they tell what is alike.
SHARPNESS = 1.3
# Last layers of residual branches, by the names that encoder, adapter and reconstruction give them.
BRANCH_ENDS = (".proj", ".fc2", ".o_proj")
# Layers whose first value means something: a fresh model says no turn, one radian of view, a level first camera.
KEPT_LAYERS = ("room_head.mlp.fc2",)


@torch.no_grad()
def draw_for_training_from_nothing(model: VidLLMForConditionalGeneration) -> None:
    """Give encoder, adapter and reconstruction first values of unit gain, in place; uses torch's global generator.

    - Linear layers and the patch embedding: normal with variance 1 / inputs; the last layer of a residual branch smaller by the root of the number
      of branches of its part. Layers that start at zero stay there, so that a fresh adapter is still the identity.
    - Position embeddings of a square grid: sines and cosines of row and column, periods from 4 to 1/2 picture sides.
    - Blocks over all frames: keys start as queries, the first head in the directions of `match_codes`, so that tokens look at what is like them and
      bring back where it is.
    - Camera and register tokens: small, so that after the first block a camera token is made of what its frame shows.
    - The last layer of the pose: zero, so that the first steps do not push all tokens the same way for the sake of a constant.

    Args:
        model (`VidLLMForConditionalGeneration`): With a vision model of the DINOv2 family.

    Raises:
        ValueError: The position embeddings are not those of a square grid.

    Source:
        Ours. Upstream: facebookresearch/vggt (which parts there are). Measured: `README.md`.
    """
    core = model.model
    encoder, reconstruction = core.encoder, core.reconstruction
    parts = (
        (encoder, model.config.vision_config.num_hidden_layers),
        (core.adapter, 1),
        (reconstruction, 2 * model.config.num_reconstruction_layers),
    )
    for part, num_blocks in parts:
        for name, module in part.named_modules():
            if isinstance(module, nn.Linear) and module.weight.any() and not name.endswith(KEPT_LAYERS):
                shrink = (2 * num_blocks) ** -0.5 if f".{name}".endswith(BRANCH_ENDS) else 1.0
                module.weight.normal_(0.0, shrink * module.in_features**-0.5)
    embeddings = encoder.model.embeddings
    projection = embeddings.patch_embeddings.projection.weight
    projection.normal_(0.0, projection[0].numel() ** -0.5)
    embeddings.position_embeddings[0, 1:] = _grid_positions(*embeddings.position_embeddings.shape[1:])
    codes = match_codes(model.config)
    for block in reconstruction.global_blocks:
        query, key, _ = block.attn.qkv.weight.chunk(3)
        query[: len(codes)] = codes
        key.copy_(query)
        block.attn.q_norm.weight.fill_(SHARPNESS)
        block.attn.k_norm.weight.fill_(SHARPNESS)
    reconstruction.camera_head.pose_branch.fc2.weight.zero_()
    for token in reconstruction.tokens.parameters():
        token.normal_(0.0, SPECIAL_TOKEN_STD)


def _grid_positions(num_positions: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column: `(num_positions - 1, width)`, the class token's position left out."""
    side = math.isqrt(num_positions - 1)
    if side * side != num_positions - 1:
        raise ValueError(f"position embeddings: wanted a square grid and a class token; got {num_positions} positions")
    quarter = width // 4
    frequencies = math.pi * 2.0 ** (torch.arange(quarter) / quarter * 3 - 1)
    places = (torch.arange(side) + 0.5) / side
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=-1)
    return POSITION_SIZE * nn.functional.pad(waves, (0, width - waves.shape[1]))


__all__ = ["draw_for_training_from_nothing"]
