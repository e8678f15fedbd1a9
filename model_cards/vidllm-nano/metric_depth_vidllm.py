"""Metric depth from the encoder's layers, and the scale that brings relative geometry to metres.

Shapes: B videos, S frames, H W pixels, h w patch grid, P = h * w, C encoder width, F frames of one chunk, K depth bins.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_vidllm import VidLLMConfig


# (encoder layer of the four, resolution relative to the patch grid), coarse to fine.
LEVELS = ((3, 0.5), (3, 1), (2, 2), (1, 4), (0, 8))
# Range of the temperature of the bin probabilities, reached at the ends of a sigmoid; their geometric mean is 1. At the low end
# 64 bins peak about one bin wide, and rounding errors of the logits grow no more than 20 times.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
# Lower bound of every bin centre, as a fraction of the nearest initial centre: depth 0 means "invalid" everywhere else.
FLOOR_FRACTION = 0.01


def _resize(maps: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Bilinear resize of `(F, channels, ...)` maps, pixel areas aligned (not corners)."""
    if tuple(maps.shape[-2:]) == tuple(size_hw):
        return maps
    return nn.functional.interpolate(maps, size=size_hw, mode="bilinear", align_corners=False)


@torch.no_grad()
def _init_fan_in(conv: nn.Module) -> None:
    """Draw a convolution so that it keeps the variance of its input; widths differ too much for one fixed deviation."""
    # A transposed convolution whose stride is its kernel reads one input pixel per output pixel.
    taps = 1 if isinstance(conv, nn.ConvTranspose2d) else conv.kernel_size[0] * conv.kernel_size[1]
    init.normal_(conv.weight, mean=0.0, std=(conv.in_channels * taps) ** -0.5)
    init.zeros_(conv.bias)


class VidLLMMetricBins(nn.Module):
    """Learned base centres of the depth bins, and their refinement by an additive offset.

    The centre of bin k is `floor + softplus(raw_k + offset_k)` metres. The offset is added before the map that keeps the centre
    positive: far centres (over about 3 m) move by the offset itself, in metres; near ones shrink towards the floor and
    never cross it. Without an offset the initial centres are log-spaced over `min_depth_m`..`max_depth_m`.

    Args:
        config (`VidLLMConfig`): Reads `num_depth_bins`, `min_depth_m`, `max_depth_m`.

    Source:
        Paper: section 3.2, `c_i(k) = c_k + r_k(F_i)`. Ours: number, range and spacing of the bins (the paper states none), and
        softplus around the sum, since a plain sum can turn negative.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        self.num_bins = config.num_depth_bins
        self.min_depth_m = config.min_depth_m
        self.max_depth_m = config.max_depth_m
        self.floor_m = FLOOR_FRACTION * config.min_depth_m
        self.raw_centres = nn.Parameter(torch.tensor(self._initial_raw(), dtype=torch.float32))

    def _initial_raw(self) -> list[float]:
        """Raw values whose centres are log-spaced: the inverse of `floor + softplus`, in double precision."""
        ratio = math.log(self.max_depth_m / self.min_depth_m) / max(self.num_bins - 1, 1)
        above_floor = [self.min_depth_m * math.exp(ratio * k) - self.floor_m for k in range(self.num_bins)]
        # softplus^-1(y) = log(exp(y) - 1), written so that it neither overflows nor cancels.
        return [y + math.log(-math.expm1(-y)) for y in above_floor]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the log-spaced centres."""
        raw = torch.tensor(self._initial_raw(), dtype=self.raw_centres.dtype, device=self.raw_centres.device)
        init.copy_(self.raw_centres, raw)

    def forward(self, offset: torch.Tensor | None = None) -> torch.Tensor:
        """Bin centres.

        Args:
            offset (`torch.Tensor` of shape `(F, K, rows, columns)`, *optional*): Refinement per pixel, metres for far bins.

        Returns:
            `torch.Tensor` of shape `(F, K, rows, columns)`, or `(K,)` without an offset: Centres in metres, above 0.

        Source:
            Paper: section 3.2. Ours: softplus, see the class.
        """
        raw = self.raw_centres.float()
        if offset is not None:
            raw = raw.view(1, -1, 1, 1) + offset
        return self.floor_m + nn.functional.softplus(raw)


class VidLLMMetricLevel(nn.Module):
    """One level of the top-down decoder: an encoder layer at one resolution, fused with the coarser level.

    Args:
        in_channels (`int`): C, encoder width.
        channels (`int`): Width of this level.
        coarser_channels (`int`, *optional*): Width of the coarser level; `None` for the coarsest.
        num_bins (`int`): K, number of offsets per pixel.
        scale (`float`): Resolution relative to the patch grid: 0.5, 1, 2, 4 or 8.

    Source:
        Paper: section 3.2 (DPT-style decoder, five scales). Ours: everything inside a level.
    """

    def __init__(self, in_channels: int, channels: int, coarser_channels: int | None, num_bins: int, scale: float):
        super().__init__()
        self.project = nn.Conv2d(in_channels, channels, 1)
        if scale < 1:
            self.resample = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        elif scale > 1:
            self.resample = nn.ConvTranspose2d(channels, channels, int(scale), stride=int(scale))
        else:
            self.resample = nn.Identity()
        self.from_coarser = nn.Conv2d(coarser_channels, channels, 1) if coarser_channels else None
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.offset_hidden = nn.Conv2d(channels, channels, 1)
        self.offset_out = nn.Conv2d(channels, num_bins, 1)
        self.act = nn.GELU()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Variance-keeping convolutions; no offset, so that a fresh decoder has exactly the base centres."""
        for conv in (self.project, self.resample, self.from_coarser, self.conv1, self.conv2, self.offset_hidden):
            if conv is not None and not isinstance(conv, nn.Identity):
                _init_fan_in(conv)
        init.zeros_(self.offset_out.weight)
        init.zeros_(self.offset_out.bias)

    def forward(self, layer_map: torch.Tensor, coarser: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Fuse one level.

        Args:
            layer_map (`torch.Tensor` of shape `(F, C, h, w)`): Encoder layer on the patch grid.
            coarser (`torch.Tensor` of shape `(F, coarser_channels, ...)`, *optional*): Features of the coarser level.

        Returns:
            `tuple`: features `(F, channels, rows, columns)` and bin offsets `(F, K, rows, columns)` at this resolution.

        Source:
            Ours: see the class.
        """
        features = self.resample(self.project(layer_map))
        if self.from_coarser is not None:
            features = features + _resize(self.from_coarser(coarser), features.shape[-2:])
        features = features + self.conv2(self.act(self.conv1(self.act(features))))
        return features, self.offset_out(self.act(self.offset_hidden(features)))


class VidLLMMetricProbabilities(nn.Module):
    """Ordinal bin probabilities per pixel: a binomial over the bins with a temperature.

    With success probability p and K bins, `log P(k) = (log C(K-1, k) + k log p + (K-1-k) log(1-p)) / temperature`, normalised
    over k. It has one peak, and neighbouring bins get neighbouring probabilities.

    Args:
        config (`VidLLMConfig`): Reads `num_depth_bins`.
        channels (`int`): Width of the features.

    Source:
        Upstream: isl-org/ZoeDepth (log-binomial with temperature). Ours: this choice for the paper's "ordinal-aware
        normalisation", whose formula it does not give; exact binomial coefficients instead of Stirling's formula, log-sigmoids
        instead of clamped probabilities, and a temperature that is log-interpolated between its bounds.
    """

    def __init__(self, config: VidLLMConfig, channels: int):
        super().__init__()
        self.num_bins = config.num_depth_bins
        self.hidden = nn.Conv2d(channels, channels, 1)
        self.act = nn.GELU()
        self.out = nn.Conv2d(channels, 2, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Probabilities of the bins.

        Args:
            features (`torch.Tensor` of shape `(F, channels, rows, columns)`): Finest decoder features.

        Returns:
            `torch.Tensor` of shape `(F, K, rows, columns)`: Probabilities, sum 1 over the bins.

        Source:
            Upstream: isl-org/ZoeDepth. Ours: see the class.
        """
        logit, raw_temperature = self.out(self.act(self.hidden(features))).chunk(2, dim=1)
        num_trials = self.num_bins - 1
        # (K,) -> (1, K, 1, 1); arange and lgamma stay on the device, so nothing waits for the host
        k = torch.arange(self.num_bins, dtype=features.dtype, device=features.device).view(1, -1, 1, 1)
        log_choose = math.lgamma(num_trials + 1) - torch.lgamma(k + 1) - torch.lgamma(num_trials - k + 1)
        log_prob = nn.functional.logsigmoid(logit) * k + nn.functional.logsigmoid(-logit) * (num_trials - k)
        log_range = math.log(MAX_TEMPERATURE / MIN_TEMPERATURE)
        temperature = MIN_TEMPERATURE * torch.exp(log_range * torch.sigmoid(raw_temperature))
        return ((log_choose + log_prob) / temperature).softmax(dim=1)


class VidLLMMetricDepthDecoder(GradientCheckpointingLayer):
    """Metric depth of one chunk of frames: five levels top-down, bin centres refined at each, expected depth.

    With 14-pixel patches the levels lie at 28, 14, 7, 3.5 and 1.75 pixels and stand for the paper's 1/32 to 1/2. The width halves
    where the resolution doubles, so the fine levels cost no more than the coarse ones.

    Args:
        config (`VidLLMConfig`): Reads `vision_config.hidden_size`, `metric_decoder_features` and the bin fields.

    Source:
        Paper: section 3.2. Ours: resolutions relative to the patch grid, widths, which layer feeds which level.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        widths = [max(8, int(config.metric_decoder_features / max(scale, 1))) for _, scale in LEVELS]
        self.levels = nn.ModuleList(
            VidLLMMetricLevel(config.vision_config.hidden_size, width, coarser, config.num_depth_bins, scale)
            for (_, scale), width, coarser in zip(LEVELS, widths, [None, *widths[:-1]], strict=True)
        )
        self.bins = VidLLMMetricBins(config)
        self.probabilities = VidLLMMetricProbabilities(config, widths[-1])

    def forward(
        self,
        layer0: torch.Tensor,
        layer1: torch.Tensor,
        layer2: torch.Tensor,
        layer3: torch.Tensor,
        grid_hw: tuple[int, int],
        size_hw: tuple[int, int],
    ) -> torch.Tensor:
        """Metric depth of some frames.

        Args:
            layer0 (`torch.Tensor` of shape `(F, P, C)`): Shallowest of the four encoder layers.
            layer1 (`torch.Tensor` of shape `(F, P, C)`): Second layer.
            layer2 (`torch.Tensor` of shape `(F, P, C)`): Third layer.
            layer3 (`torch.Tensor` of shape `(F, P, C)`): Deepest layer.
            grid_hw (`tuple[int, int]`): h and w.
            size_hw (`tuple[int, int]`): H and W, pixels.

        Returns:
            `torch.Tensor` of shape `(F, H, W)`, float32: Depth along the optical axis, metres, above 0.

        Source:
            Paper: section 3.2, `d(i) = sum_k p_i(k) c_i(k)`. Ours: offsets of the five levels are summed.
        """
        with torch.autocast(device_type=layer0.device.type, enabled=False):
            # (F, P, C) -> (F, C, h, w)
            maps = [x.float().transpose(1, 2).unflatten(2, grid_hw) for x in (layer0, layer1, layer2, layer3)]
            features, offset = None, None
            for (layer, _), level in zip(LEVELS, self.levels, strict=True):
                features, level_offset = level(maps[layer], features)
                offset = level_offset if offset is None else level_offset + _resize(offset, level_offset.shape[-2:])
            depth_m = (self.probabilities(features) * self.bins(offset)).sum(dim=1, keepdim=True)
            # (F, 1, rows, columns) -> (F, H, W)
            return _resize(depth_m, size_hw).squeeze(1)


class VidLLMMetricDepth(nn.Module):
    """Metric depth model: depth in metres from four layers of the image encoder, frame by frame.

    Args:
        config (`VidLLMConfig`): Reads `dense_frame_chunk`, and all that `VidLLMMetricDepthDecoder` reads.

    Source:
        Paper: section 3.2 (metric depth model on the encoder's features). Ours: chunks of frames, which bound memory only.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        self.frame_chunk = config.dense_frame_chunk
        self.decoder = VidLLMMetricDepthDecoder(config)

    def forward(
        self, layer_tokens: tuple[torch.Tensor, ...], grid_hw: tuple[int, int], size_hw: tuple[int, int]
    ) -> torch.Tensor:
        """Metric depth of all frames.

        Args:
            layer_tokens (`tuple` of 4 `torch.Tensor` of shape `(B, S, P, C)`): Layer-normed encoder layers, shallow to deep.
            grid_hw (`tuple[int, int]`): h and w.
            size_hw (`tuple[int, int]`): H and W, pixels.

        Returns:
            `torch.Tensor` of shape `(B, S, H, W)`, float32: Depth along the optical axis, metres, above 0.

        Raises:
            ValueError: Not four layers, or tokens that do not fill the grid.

        Source:
            Paper: section 3.2.
        """
        num_patches = grid_hw[0] * grid_hw[1]
        if len(layer_tokens) != 4 or any(x.dim() != 4 or x.shape[2] != num_patches for x in layer_tokens):
            raise ValueError(
                f"layer_tokens: wanted 4 tensors of shape (batch, frames, {grid_hw[0]} * {grid_hw[1]}, channels); got "
                f"{[tuple(x.shape) for x in layer_tokens]}"
            )
        batch, frames = layer_tokens[0].shape[:2]
        # (B, S, P, C) -> (B * S, P, C) -> chunks of (F, P, C)
        chunks = zip(*(x.flatten(0, 1).split(self.frame_chunk) for x in layer_tokens), strict=True)
        depth_m = torch.cat([self.decoder(*chunk, tuple(grid_hw), tuple(size_hw)) for chunk in chunks])
        # (B * S, H, W) -> (B, S, H, W)
        return depth_m.unflatten(0, (batch, frames))


def spread_frames(num_frames: int, count: int) -> list[int]:
    """Frame numbers spread evenly over a video, first and last included.

    Args:
        num_frames (`int`): Frames that there are, at least 1.
        count (`int`): Frames wanted, at least 1.

    Returns:
        `list[int]`: `min(num_frames, count)` rising numbers without repeats; the first frame only if `count` is 1.

    Raises:
        ValueError: A number below 1.

    Source:
        Ours: the paper samples at random; at inference the same video must give the same scale.
    """
    if num_frames < 1 or count < 1:
        raise ValueError(f"num_frames, count: wanted at least 1 each; got {num_frames}, {count}")
    if count >= num_frames:
        return list(range(num_frames))
    steps = max(count - 1, 1)
    # Integer rounding of k * (num_frames - 1) / steps; steps of at least 1 cannot repeat.
    return [(2 * k * (num_frames - 1) + steps) // (2 * steps) for k in range(count)]


@torch.no_grad()
def align_scale(
    depth_relative: torch.Tensor,
    depth_metric_m: torch.Tensor,
    confidence: torch.Tensor,
    frame_index: torch.Tensor,
    pixel_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale that brings relative geometry to metres, one per video.

    For each chosen frame the weighted least-squares scale `s = sum(w r m) / sum(w r^2)` over its usable pixels, then the median
    over the chosen frames that have one; for an even number of frames the lower of the two middle values. A pixel is usable
    where both depths and the confidence are finite and positive, and where `pixel_mask` says so. No gradient.

    Args:
        depth_relative (`torch.Tensor` of shape `(B, S, H, W)`): Depth of the dense head, relative.
        depth_metric_m (`torch.Tensor` of shape `(B, S, H, W)`): Depth of the metric head, metres.
        confidence (`torch.Tensor` of shape `(B, S, H, W)`): Weight of a pixel; only ratios within a frame matter.
        frame_index (`torch.Tensor` of shape `(B, K)`, int64): Frames that vote, -1 = unused; a repeated frame votes twice.
        pixel_mask (`torch.Tensor` of shape `(B, S, H, W)`, bool, *optional*): True = use.

    Returns:
        `tuple`: `scale` `(B,)`, float32, metres per relative unit, finite and positive; `valid` `(B,)`, bool, False where no
        chosen frame has a usable pixel: the scale is 1 there.

    Raises:
        ValueError: Shapes that do not fit.

    Source:
        Paper: section 3.2 (least squares per image, median over 16 images). Ours: the weights, the usable pixels, the lower
        middle as the median (a scale that one of the frames has), and what happens without any pixel.
    """
    maps = {"depth_metric_m": depth_metric_m, "confidence": confidence, "pixel_mask": pixel_mask}
    for name, value in maps.items():
        if value is not None and value.shape != depth_relative.shape:
            raise ValueError(
                f"{name}: wanted the shape of depth_relative {tuple(depth_relative.shape)}; got {tuple(value.shape)}"
            )
    if frame_index.dim() != 2 or frame_index.shape[0] != depth_relative.shape[0] or frame_index.shape[1] < 1:
        raise ValueError(
            f"frame_index: wanted shape ({depth_relative.shape[0]}, K >= 1), one row per video; "
            f"got {tuple(frame_index.shape)}"
        )
    with torch.autocast(device_type=depth_relative.device.type, enabled=False):
        rows = torch.arange(frame_index.shape[0], device=frame_index.device).unsqueeze(-1)
        frames = frame_index.clamp_min(0)

        # (B, S, H, W) -> (B, K, H * W), chosen frames only
        def chosen(maps: torch.Tensor) -> torch.Tensor:
            return maps[rows, frames].flatten(2)

        relative, metric_m, weight = (chosen(x).float() for x in (depth_relative, depth_metric_m, confidence))
        usable = (relative > 0) & (metric_m > 0) & (weight > 0)
        usable = usable & relative.isfinite() & metric_m.isfinite() & weight.isfinite()
        usable = usable & (frame_index >= 0).unsqueeze(-1)
        if pixel_mask is not None:
            usable = usable & chosen(pixel_mask)

        def normalised(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Usable values over their largest, and the largest: keeps every product below in range."""
            values = torch.where(usable, values, torch.zeros_like(values))
            largest = values.amax(dim=-1, keepdim=True)
            largest = torch.where(largest > 0, largest, torch.ones_like(largest))
            return values / largest, largest

        root = normalised(weight)[0].sqrt()
        relative, relative_unit = normalised(relative)
        metric_m, metric_unit = normalised(metric_m)
        # Normalised once more with the weight, so that the largest term of the denominator is 1.
        relative, weighted_relative_unit = normalised(root * relative)
        metric_m, weighted_metric_unit = normalised(root * metric_m)
        ratio = (relative * metric_m).sum(-1) / relative.square().sum(-1).clamp_min(1.0)
        # Quotients of like by like first: each product of two units can leave float32 where the scale itself does not.
        units = (metric_unit / relative_unit) * (weighted_metric_unit / weighted_relative_unit)
        scales = ratio * units.squeeze(-1)

        # (B, K): frames without a vote sort to the end
        has_vote = scales.isfinite() & (scales > 0)
        scales = torch.where(has_vote, scales, torch.full_like(scales, torch.inf)).sort(dim=-1).values
        num_votes = has_vote.sum(dim=-1)
        valid = num_votes > 0
        middle = (num_votes - 1).clamp_min(0) // 2
        scale = torch.gather(scales, 1, middle.unsqueeze(-1)).squeeze(-1)
        return torch.where(valid, scale, torch.ones_like(scale)), valid


__all__ = ["VidLLMMetricBins", "VidLLMMetricDepth", "VidLLMMetricDepthDecoder", "align_scale", "spread_frames"]
