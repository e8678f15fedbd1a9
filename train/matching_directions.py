"""Fixed directions of the geometry stream with a meaning, which a small model that is trained from nothing gets to begin with.

The same directions are used twice: a loss teaches the encoder to write into them what a patch looks like and where it is (`dense_matching.py`), and
fresh blocks read them from the first step on (`fresh_weights.py`).
"""

from dataclasses import dataclass

import torch

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig


_SEED = 21


@dataclass(frozen=True)
class MatchingDirections:
    """Orthonormal rows, all of them orthogonal to the direction that LayerNorm takes away.

    Args:
        likeness (`torch.Tensor` of shape `(N, C)`): What a patch looks like: patches that see the same place are alike.
        place (`torch.Tensor` of shape `(2, C)`): Where a patch is in its picture: column, row.
        first (`torch.Tensor` of shape `(1, C)`): Whether a token is of the first frame.
        matched_place (`torch.Tensor` of shape `(2, C)`): Where in the first frame the same place is seen.
        frame_place (`torch.Tensor` of shape `(2, C)`): Mean of that over a frame.

    Source:
        Ours.
    """

    likeness: torch.Tensor
    place: torch.Tensor
    first: torch.Tensor
    matched_place: torch.Tensor
    frame_place: torch.Tensor


def num_likeness(config: VidLLMConfig) -> int:
    """Directions of likeness: the half of a head's channels that the rotary embedding turns least, but for one pair.

    Args:
        config (`VidLLMConfig`): Reads `vision_config.hidden_size`, `num_reconstruction_heads`.

    Returns:
        `int`

    Source:
        Ours: channels that turn fast with a patch's place would make it unlike itself elsewhere.
    """
    return 4 * (config.vision_config.hidden_size // config.num_reconstruction_heads // 8) - 2


def matching_directions(config: VidLLMConfig) -> MatchingDirections:
    """The directions of a model; they depend on its shape alone.

    Args:
        config (`VidLLMConfig`): Reads `vision_config.hidden_size`, `num_reconstruction_heads`.

    Returns:
        [`MatchingDirections`], float32.

    Raises:
        ValueError: The stream is too narrow.

    Source:
        Ours.
    """
    width, likeness = config.vision_config.hidden_size, num_likeness(config)
    sizes = [likeness, 2, 1, 2, 2]
    if sum(sizes) + 1 > width or likeness < 1:
        raise ValueError(f"matching directions: wanted an encoder width of at least {sum(sizes) + 1}; got {width}")
    drawn = torch.randn(width, sum(sizes), generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    constant = torch.ones(width, 1, dtype=torch.float64)
    rows = torch.linalg.qr(torch.cat([constant, drawn], dim=1))[0].T[1:].float()
    return MatchingDirections(*rows.split(sizes))


__all__ = ["MatchingDirections", "matching_directions", "num_likeness"]
