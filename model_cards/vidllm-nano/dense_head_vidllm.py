"""Dense head: relative depth and its confidence from four tapped layers.

Shapes: F frames (videos times frames, or a chunk of them), H W pixels, h w patch grid, C token width, D feature channels.
"""

import torch
from torch import nn

from .configuration_vidllm import VidLLMConfig


# Largest number of elements that one interpolation call may produce: above it the kernels index with too few bits.
MAX_INTERPOLATION_ELEMENTS = 1_610_612_736
UV_EMBEDDING_WEIGHT = 0.1
UV_EMBEDDING_BASE = 100.0


def uv_embedding(grid_hw: tuple[int, int], channels: int, aspect: float, device: torch.device) -> torch.Tensor:
    """Sine and cosine embedding of normalised image coordinates.

    Args:
        grid_hw (`tuple[int, int]`): Rows and columns of the feature map.
        channels (`int`): Channels, a multiple of 4: first half for x, second for y, in each sines then cosines.
        aspect (`float`): Width over height of the image; coordinates are divided by the image's half diagonal.
        device (`torch.device`): Where to make it.

    Returns:
        `torch.Tensor` of shape `(channels, rows, columns)`, float32.

    Source:
        Upstream: facebookresearch/vggt dense head (angles in float64). Ours: per axis, then broadcast.
    """
    rows, columns = grid_hw
    diagonal = (aspect**2 + 1.0) ** 0.5
    quarter = channels // 4
    # MPS has no float64; the last digits then differ from upstream.
    precision = torch.float32 if device.type == "mps" else torch.float64
    frequencies = UV_EMBEDDING_BASE ** (-torch.arange(quarter, device=device, dtype=precision) / quarter)
    halves = []
    for span, steps in ((aspect / diagonal, columns), (1.0 / diagonal, rows)):
        end = span * (steps - 1) / steps
        coordinates = torch.linspace(-end, end, steps, device=device, dtype=torch.float32)
        # (steps, 1) * (quarter,) -> (2 * quarter, steps)
        angles = coordinates.unsqueeze(-1) * frequencies
        halves.append(torch.cat([angles.sin(), angles.cos()], dim=-1).float().transpose(0, 1))
    x_half = halves[0].unsqueeze(1).expand(-1, rows, -1)
    y_half = halves[1].unsqueeze(2).expand(-1, -1, columns)
    return torch.cat([x_half, y_half])


def activate_depth(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth and confidence from the two output channels.

    Args:
        raw (`torch.Tensor` of shape `(frames, 2, height, width)`): Output of the last convolution.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(frames, height, width)`: relative depth (> 0), confidence (> 1).

    Source:
        Upstream: facebookresearch/vggt dense head (exp, 1 + exp).
    """
    return raw[:, 0].exp(), 1 + raw[:, 1].exp()


class VidLLMResidualConvUnit(nn.Module):
    """Two convolutions and a skip path.

    Args:
        channels (`int`): Channels.

    Source:
        Upstream: facebookresearch/vggt dense head. Its first ReLU works in place, so what the skip path adds is relu(x), not x;
        trained weights expect that.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(frames, channels, h, w)` -> the same shape."""
        rectified = nn.functional.relu(features)
        return self.conv2(nn.functional.relu(self.conv1(rectified))) + rectified


class VidLLMFusionBlock(nn.Module):
    """Joins a coarse map with the next finer one and resizes the sum.

    Args:
        channels (`int`): Channels.
        has_lateral (`bool`): False for the coarsest level, which has nothing to join.

    Source:
        Upstream: facebookresearch/vggt dense head (bilinear with aligned corners).
    """

    def __init__(self, channels: int, has_lateral: bool):
        super().__init__()
        self.lateral_unit = VidLLMResidualConvUnit(channels) if has_lateral else None
        self.output_unit = VidLLMResidualConvUnit(channels)
        self.out_conv = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, features: torch.Tensor, lateral: torch.Tensor | None, size_hw: tuple[int, int]) -> torch.Tensor:
        """`(frames, channels, h, w)`, the same or None -> `(frames, channels, *size_hw)`."""
        if self.lateral_unit is not None:
            features = features + self.lateral_unit(lateral)
        features = self.output_unit(features)
        features = nn.functional.interpolate(features, size=size_hw, mode="bilinear", align_corners=True)
        return self.out_conv(features)


class VidLLMDenseHead(nn.Module):
    """DPT head with coordinate embeddings, in float32.

    Args:
        config (`VidLLMConfig`): Reads `vision_config.hidden_size`, `dense_head_channels`, `dense_head_features`,
            `dense_frame_chunk`.

    Raises:
        ValueError: A channel number does not fit the coordinate embedding.

    Source:
        Upstream: facebookresearch/vggt dense head.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        dim = 2 * config.vision_config.hidden_size
        channels, features = config.dense_head_channels, config.dense_head_features
        if any(number % 4 for number in channels) or features % 8:
            raise ValueError(
                "dense_head_channels, dense_head_features: the coordinate embedding wants multiples of 4 and of 8; "
                f"got {channels}, {features}"
            )
        self.frame_chunk = config.dense_frame_chunk
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.projects = nn.ModuleList(nn.Conv2d(dim, number, kernel_size=1) for number in channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], kernel_size=4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], kernel_size=3, stride=2, padding=1),
            ]
        )
        self.level_convs = nn.ModuleList(
            nn.Conv2d(number, features, kernel_size=3, padding=1, bias=False) for number in channels
        )
        self.fusions = nn.ModuleList(VidLLMFusionBlock(features, has_lateral=level < 3) for level in range(4))
        self.neck_conv = nn.Conv2d(features, features // 2, kernel_size=3, padding=1)
        self.output_convs = nn.Sequential(
            nn.Conv2d(features // 2, 32, kernel_size=3, padding=1), nn.ReLU(), nn.Conv2d(32, 2, kernel_size=1)
        )

    def forward(
        self, tapped_tokens: tuple[torch.Tensor, ...], grid_hw: tuple[int, int], size_hw: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Depth maps of all frames, `dense_frame_chunk` frames at a time.

        Args:
            tapped_tokens (`tuple` of 4 `torch.Tensor` of shape `(batch, frames, patches, channels)`): Patch tokens, shallow to
                deep.
            grid_hw (`tuple[int, int]`): Rows and columns of patches.
            size_hw (`tuple[int, int]`): Height and width of the frames, pixels.

        Returns:
            `tuple` of two `torch.Tensor` of shape `(batch, frames, height, width)`, float32: depth along the optical axis in the
            network's own unit, confidence (> 1).

        Source:
            Upstream: facebookresearch/vggt dense head. Ours: very large frames shrink the chunk instead of splitting each
            interpolation.
        """
        num_videos, num_frames = tapped_tokens[0].shape[:2]
        # (batch, frames, patches, channels) -> (batch * frames, patches, channels)
        taps = [tokens.flatten(0, 1) for tokens in tapped_tokens]
        largest_map = self.neck_conv.out_channels * size_hw[0] * size_hw[1]
        largest_map = max(largest_map, self.neck_conv.in_channels * 64 * grid_hw[0] * grid_hw[1])
        chunk = max(1, min(self.frame_chunk, MAX_INTERPOLATION_ELEMENTS // largest_map))
        with torch.autocast(device_type=taps[0].device.type, enabled=False):
            maps = [
                self._decode_chunk([tokens[start : start + chunk].float() for tokens in taps], grid_hw, size_hw)
                for start in range(0, num_videos * num_frames, chunk)
            ]
        # (batch * frames, height, width) -> (batch, frames, height, width)
        depth, confidence = (
            torch.cat(parts).unflatten(0, (num_videos, num_frames)) for parts in zip(*maps, strict=True)
        )
        return depth, confidence

    def _decode_chunk(
        self, taps: list[torch.Tensor], grid_hw: tuple[int, int], size_hw: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Four `(frames, patches, channels)` -> two `(frames, height, width)`."""
        aspect = size_hw[1] / size_hw[0]
        levels = []
        for tokens, project, resize, level_conv in zip(
            taps, self.projects, self.resize_layers, self.level_convs, strict=True
        ):
            # (frames, patches, channels) -> (frames, channels, h, w)
            features = self.norm(tokens).transpose(1, 2).unflatten(2, grid_hw)
            levels.append(level_conv(resize(self._add_uv(project(features), aspect))))
        fused = self.fusions[3](levels[3], None, tuple(levels[2].shape[-2:]))
        fused = self.fusions[2](fused, levels[2], tuple(levels[1].shape[-2:]))
        fused = self.fusions[1](fused, levels[1], tuple(levels[0].shape[-2:]))
        fused = self.fusions[0](fused, levels[0], (2 * levels[0].shape[-2], 2 * levels[0].shape[-1]))
        fused = nn.functional.interpolate(self.neck_conv(fused), size=size_hw, mode="bilinear", align_corners=True)
        return activate_depth(self.output_convs(self._add_uv(fused, aspect)))

    @staticmethod
    def _add_uv(features: torch.Tensor, aspect: float) -> torch.Tensor:
        """Add the weighted coordinate embedding to `(frames, channels, h, w)`."""
        embedding = uv_embedding(tuple(features.shape[-2:]), features.shape[1], aspect, features.device)
        return features + UV_EMBEDDING_WEIGHT * embedding


__all__ = ["VidLLMDenseHead", "VidLLMFusionBlock", "VidLLMResidualConvUnit", "activate_depth", "uv_embedding"]
