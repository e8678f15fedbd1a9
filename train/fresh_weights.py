"""First values for a small model that is trained from nothing.

transformers' own (normal, 0.02 everywhere) suit widths of about a thousand and long runs; at width 192 a signal shrinks by a factor of 4 per layer,
positions are invisible beside pixels, and the blocks of a short run never get to speak.
"""

import math

import torch
from torch import nn

from vidllm.modeling_vidllm.layers_vidllm import VidLLMMlp
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.modeling_vidllm.reconstruction_vidllm import VidLLMReconstructor
from vidllm.train.matching_directions import MatchingDirections, matching_directions


# Size of position embeddings beside patch embeddings of size 1.
POSITION_SIZE = 0.7
SPECIAL_TOKEN_STD = 0.02
# Last layers of residual branches, by the names that encoder, adapter and reconstruction give them.
BRANCH_ENDS = (".proj", ".fc2", ".o_proj")
LANGUAGE_BRANCH_ENDS, LANGUAGE_BRANCH_GAIN = (".o_proj", ".down_proj"), 0.1
# Layers whose first value means something: a fresh model has a level first camera.
KEPT_LAYERS = ("room_head.mlp.fc2",)
# How sharply likeness is told, and how strongly the first frame is preferred.
SHARPNESS, FIRST_QUERY, FIRST_KEY = 1.75, 2.4, 0.8
# How loudly the wired heads speak in the residual stream.
FIRST_GAIN, MATCH_GAIN, FRAME_GAIN = 4.0, 6.0, 8.0


@torch.no_grad()
def draw_for_training_from_nothing(model: VidLLMForConditionalGeneration) -> None:
    """Give encoder, adapter, reconstruction, projector and language model first values of unit gain, in place; uses torch's global generator.

    - Linear layers and the patch embedding: normal with variance 1 / inputs; the last layer of a residual branch smaller by the root of the number
      of branches of its part. Layers that start at zero stay there, so that a fresh adapter is still the identity.
    - Position embeddings of a square grid: sines and cosines of row and column, periods from 4 to 1/2 picture sides.
    - The last layer of the pose: zero, so that the first steps do not push all tokens the same way for the sake of a constant.
    - The projector of the scene tokens: hidden units in pairs of opposite sign, so that it starts as a linear map (gelu(x) - gelu(-x) = x). A
      language model of random weights learns to look things up in tokens that are sums of what they say, but hardly in mixtures of them.
    - The language model's linear layers: unit gain too; the last layers of its branches a tenth of it, so that words speak louder than layers
      which have learned nothing yet. Its embeddings stay small, because they are also its last layer.
    - Three heads of the reconstruction blocks look for the camera's motion from the start, see `_wire_matching`.

    Args:
        model (`VidLLMForConditionalGeneration`): With a vision model of the DINOv2 family.

    Raises:
        ValueError: The position embeddings are not those of a square grid, or there are fewer than two pairs of blocks.

    Source:
        Ours. Upstream: facebookresearch/vggt (which parts there are).
    """
    core, config = model.model, model.config
    encoder, reconstruction = core.encoder, core.reconstruction
    parts = (
        (encoder, config.vision_config.num_hidden_layers),
        (core.adapter, 1),
        (reconstruction, 2 * config.num_reconstruction_layers),
        (reconstruction.camera_head, config.num_camera_layers),
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
    reconstruction.camera_head.pose_branch.fc2.weight.zero_()
    for name, module in core.language_model.named_modules():
        if isinstance(module, nn.Linear):
            gain = LANGUAGE_BRANCH_GAIN if name.endswith(LANGUAGE_BRANCH_ENDS) else 1.0
            module.weight.normal_(0.0, gain * module.in_features**-0.5)
    _start_linear(core.scene_tokens.projector)
    _wire_matching(reconstruction, matching_directions(config))


def _start_linear(mlp: VidLLMMlp) -> None:
    """Unit gain, and each hidden unit beside its opposite; an odd one stays alone."""
    mlp.fc1.weight.normal_(0.0, mlp.fc1.in_features**-0.5)
    mlp.fc2.weight.normal_(0.0, mlp.fc2.in_features**-0.5)
    half = mlp.fc1.out_features // 2
    mlp.fc1.weight[half : 2 * half] = -mlp.fc1.weight[:half]
    mlp.fc2.weight[:, half : 2 * half] = -mlp.fc2.weight[:, :half]


def _wire_matching(reconstruction: VidLLMReconstructor, directions: MatchingDirections) -> None:
    """Let three heads find how the picture moved, once the encoder writes likeness and place into their directions.

    1. Frame block 0: special tokens, which differ between the first frame and the others, tell the patches of their frame which they are.
    2. Global block 0: a patch looks at the patches of the first frame that are like it, and notes their place.
    3. Frame block 1: every token notes the mean of these places over its frame; its change is what a turn of the camera looks like.

    Nothing keeps training from changing any of it.
    """
    if len(reconstruction.frame_blocks) < 2:
        raise ValueError(
            f"num_reconstruction_layers: wanted at least 2 to look for motion; got {len(reconstruction.frame_blocks)}"
        )
    for token in reconstruction.tokens.parameters():
        token.normal_(0.0, SPECIAL_TOKEN_STD)
        token[0, 0] += directions.first
        token[0, 1] -= directions.first
    head, places = reconstruction.head_dim, len(directions.place)
    tell, match, gather = (
        block.attn
        for block in (reconstruction.frame_blocks[0], reconstruction.global_blocks[0], reconstruction.frame_blocks[1])
    )
    width = tell.proj.in_features
    values = slice(2 * width, 3 * width)

    last = width - head
    tell.qkv.weight[values][last] = directions.first[0]
    tell.proj.weight[:, last] = FIRST_GAIN * directions.first[0]

    # Channels i and i + head / 4 turn together, row in the first half, column in the second; the later of each quarter turn slowly.
    quarter = head // 4
    slow = [start + channel for start in range(0, head, quarter) for channel in range(quarter // 2, quarter)]
    first, partner = slow[quarter - quarter // 2 - 1], slow[quarter - quarter // 2 - 1] + quarter
    alike = [channel for channel in slow if channel not in (first, partner)][: len(directions.likeness)]
    query, key, value = match.qkv.weight.chunk(3)
    for part in (query, key, value):
        part[:head] = 0.0
    query[alike] = directions.likeness
    key[alike] = directions.likeness
    match.qkv.bias[first] = FIRST_QUERY
    key[first] = FIRST_KEY * directions.first[0]
    match.q_norm.weight.fill_(SHARPNESS)
    match.k_norm.weight.fill_(SHARPNESS)
    value[:places] = directions.place
    match.proj.weight[:, :head] = 0.0
    match.proj.weight[:, :places] = MATCH_GAIN * directions.matched_place.T

    for part in gather.qkv.weight.chunk(3):
        part[:head] = 0.0
    gather.qkv.weight[values][:places] = directions.matched_place
    gather.proj.weight[:, :head] = 0.0
    gather.proj.weight[:, :places] = FRAME_GAIN * directions.frame_place.T


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
