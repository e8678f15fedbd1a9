"""Scene tokens: patch tokens get a place in the room, are pooled by voxel, and are projected for the language model.

Shapes: B videos, S frames, H W pixels, h w patch grid, P = h * w, C encoder width, M patches of a scene with a
position, N scene-token slots, D language-model width. Everything about places is float32; no gradient enters the
geometry.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_vidllm import VidLLMConfig
from .layers_vidllm import VidLLMMlp


# Ours: a usual distance from the first camera, metres; relative geometry is scaled to it, position MLPs are divided
# by it.
TYPICAL_DISTANCE = 2.0
# Ours: position MLPs saturate here, so that one stray point cannot overflow a language model in half precision.
MAX_POSITION_INPUT = 100.0
# Cell numbers fit 21 bits per axis, three axes fit one int64 key.
MAX_CELL = 2**20
# Voxel edges that are tried per device synchronisation.
EDGES_PER_STEP = 8


@dataclass
class VidLLMSceneTokensOutput(ModelOutput):
    """What the language model and the grounding decoder read of a scene.

    Args:
        tokens (`torch.FloatTensor` of shape `(batch, num_scene_tokens, text_hidden_size)`): Projected tokens in
            order of first sight; zero in empty slots.
        positions_room (`torch.FloatTensor` of shape `(batch, num_scene_tokens, 3)`): Mean position per slot, room
            frame, float32, unit of the points that came in; zero in empty slots.
        mask (`torch.BoolTensor` of shape `(batch, num_scene_tokens)`): True for filled slots; they come first.

    Source:
        Ours: the paper names neither the pooling nor the number of tokens.
    """

    tokens: torch.FloatTensor | None = None
    positions_room: torch.FloatTensor | None = None
    mask: torch.BoolTensor | None = None


def relative_point_scale(points: torch.Tensor, valid_mask: torch.Tensor) -> torch.Tensor:
    """Factor per scene that brings the median distance from the origin to `TYPICAL_DISTANCE`.

    Args:
        points (`torch.Tensor` of shape `(batch, frames, height, width, 3)`): Relative points; origin = first camera.
        valid_mask (`torch.BoolTensor` of shape `(batch, frames, height, width)`): Pixels that count, if finite too.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32, positive and finite; 1 where no pixel counts or the median is 0.

    Source:
        Ours: untrained or relative checkpoints still need voxels of a sensible size.
    """
    with torch.no_grad():
        scales = []
        for scene_points, scene_valid in zip(points, valid_mask, strict=True):
            distance = torch.linalg.vector_norm(scene_points[scene_valid].float(), dim=-1)
            distance = distance[distance.isfinite()]
            median = distance.median() if distance.numel() else distance.new_zeros(())
            scale = TYPICAL_DISTANCE / median
            scales.append(torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale)))
        return torch.stack(scales) if scales else points.new_zeros(0, dtype=torch.float32)


def patch_positions(
    points: torch.Tensor, confidence: torch.Tensor, valid_mask: torch.Tensor, grid_hw: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence-weighted mean point of each patch of one scene.

    Args:
        points (`torch.Tensor` of shape `(frames, height, width, 3)`): Points, any frame and unit.
        confidence (`torch.Tensor` of shape `(frames, height, width)`): Weights; a pixel counts only if its own is
            positive.
        valid_mask (`torch.BoolTensor` of shape `(frames, height, width)`): Pixels that count, if point and weight
            are finite.
        grid_hw (`tuple[int, int]`): Patch grid (rows, columns); divides the image size.

    Returns:
        `tuple`: positions `(frames * rows * columns, 3)` float32, zero where nothing counts, and `(frames * rows *
        columns,)` bool, True where at least one pixel counts.

    Source:
        Paper: eq. 3 gives a point per pixel. Ours: the mean per patch.
    """
    frames, height, width, _ = points.shape
    rows, columns = grid_hw
    points, confidence = points.float(), confidence.float()
    counts = valid_mask & points.isfinite().all(-1) & confidence.isfinite() & (confidence > 0)
    # (frames, height, width, ...) -> (frames * rows * columns, pixels of a patch, ...)
    split = (frames, rows, height // rows, columns, width // columns)
    patches = frames * rows * columns
    weight = torch.where(counts, confidence, 0.0).view(split).transpose(2, 3).reshape(patches, -1)
    points = torch.where(counts.unsqueeze(-1), points, 0.0).view(*split, 3).transpose(2, 3).reshape(patches, -1, 3)
    # Divided by the largest first: confidences grow exponentially, their sum could overflow.
    largest = weight.amax(-1, keepdim=True)
    keep_mask = largest.squeeze(-1) > 0
    weight = torch.where(largest > 0, weight / largest, 0.0)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1.0)
    return (weight.unsqueeze(-1) * points).sum(1), keep_mask


def voxel_keys(positions: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
    """Number of the voxel of each position; voxels are cubes, one of them centred on the origin.

    Args:
        positions (`torch.Tensor` of shape `(points, 3)`): Positions, float32, finite.
        edge (`torch.Tensor` of shape `(edges,)`): Voxel edges, same unit, float32.

    Returns:
        `torch.Tensor` of shape `(edges, points)`, int64. Positions beyond 2**20 cells share the outermost cell.

    Source:
        Upstream: LLaVA-3D's rule (round(xyz / edge), as read). Ours: an exact key instead of a hash. A cube
        *centred* on the origin means that a large enough edge puts all points into one voxel, so the search below
        always ends.
    """
    # (points, 3) / (edges) -> (edges, points, 3)
    cells = torch.floor(positions / edge[:, None, None] + 0.5).clamp(-MAX_CELL, MAX_CELL - 1).long() + MAX_CELL
    return (cells[..., 0] * (2 * MAX_CELL) + cells[..., 1]) * (2 * MAX_CELL) + cells[..., 2]


def fitting_voxel_keys(positions: torch.Tensor, voxel_size: float, num_slots: int) -> tuple[torch.Tensor, int]:
    """Voxel keys for the smallest edge `voxel_size * 2**(k / 4)`, `k >= 0`, that occupies at most `num_slots` voxels.

    Args:
        positions (`torch.Tensor` of shape `(points, 3)`): Positions, float32, finite.
        voxel_size (`float`): Smallest edge, same unit.
        num_slots (`int`): Most voxels, at least 1.

    Returns:
        `tuple`: keys `(points,)` int64 and `k`. `k` is bounded by the extent: once the edge exceeds twice the largest
        coordinate there is one voxel, about 530 for the largest float32.

    Source:
        Ours: deterministic where LLaVA-3D drops a random subset.
    """
    first = 0
    while True:
        edges = [voxel_size * 2.0 ** (k / 4) for k in range(first, first + EDGES_PER_STEP)]
        keys = voxel_keys(positions, torch.tensor(edges, dtype=torch.float32, device=positions.device))
        ordered = keys.sort(dim=1).values
        num_voxels = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + min(1, positions.shape[0])
        fits = (num_voxels <= num_slots).tolist()
        if any(fits):
            step = fits.index(True)
            return keys[step], first + step
        first += EDGES_PER_STEP


def group_by_voxel(keys: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort patches by slot; a voxel's slot is its rank by first sight.

    Args:
        keys (`torch.Tensor` of shape `(patches,)`): Voxel key of each patch, int64, patches in order of sight.
        num_slots (`int`): Slots, at least the number of different keys.

    Returns:
        `tuple`: `order (patches,)` int64, patch numbers slot by slot and in order of sight within a slot, and
        `lengths (num_slots,)` int64, patches per slot, 0 for empty slots, which come last.

    Source:
        Ours: sorting instead of atomics, so that the same input gives the same bits.
    """
    by_key = torch.argsort(keys, stable=True)
    ordered = keys[by_key]
    is_start = torch.ones_like(ordered, dtype=torch.bool)
    is_start[1:] = ordered[1:] != ordered[:-1]
    starts = is_start.nonzero().squeeze(1)
    # The sort is stable: the first patch of a run is the one seen first.
    by_sight = torch.argsort(by_key[starts])
    slot_of_voxel = torch.argsort(by_sight)
    slot = torch.empty_like(by_key)
    slot[by_key] = slot_of_voxel[is_start.cumsum(0) - 1]
    order = torch.argsort(slot, stable=True)

    ends = torch.cat([starts[1:], starts.new_full((1,), keys.shape[0])])[: starts.shape[0]]
    lengths = keys.new_zeros(num_slots)
    lengths[: starts.shape[0]] = (ends - starts)[by_sight]
    return order, lengths


def segment_means(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean of consecutive runs of rows, each summed in order.

    Args:
        values (`torch.Tensor` of shape `(rows, channels)`): Rows, run after run.
        lengths (`torch.Tensor` of shape `(runs,)`): Rows per run, int64; their sum is `rows`.

    Returns:
        `torch.Tensor` of shape `(runs, channels)`, float32; zero for empty runs.

    Source:
        Ours: no atomics, forward and backward.
    """
    # Divided before the sum, which then cannot overflow however far the points are.
    share = lengths.clamp(min=1).float().reciprocal().repeat_interleave(lengths, output_size=values.shape[0])
    return torch.segment_reduce(values.float() * share.unsqueeze(-1), "sum", lengths=lengths, axis=0, unsafe=True)


class VidLLMPositionMlp(nn.Module):
    """Embeds 3D positions: division by a usual length, clamp, then two linear layers with GELU.

    The first layer is drawn with unit weights and biases: its kinks then lie all over the room. With the usual small
    weights and zero biases the hidden units would be nearly linear and know a direction, but not a place.

    Args:
        hidden_size (`int`): Width between the layers.
        out_features (`int`): Width of the embedding.
        scale (`float`): Length that becomes 1, unit of the positions.

    Source:
        Paper: eq. 4 (an MLP on positions). Ours: hidden width, scale, clamp, initial values.
    """

    def __init__(self, hidden_size: int, out_features: int, scale: float = TYPICAL_DISTANCE):
        super().__init__()
        self.scale = scale
        self.mlp = VidLLMMlp(3, hidden_size, out_features)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the first layer wide enough to tell places apart."""
        init.normal_(self.mlp.fc1.weight, mean=0.0, std=1.0)
        init.normal_(self.mlp.fc1.bias, mean=0.0, std=1.0)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Embed positions; no gradient flows into them.

        Args:
            positions (`torch.Tensor` of shape `(..., 3)`): Positions or offsets; beyond 100 usual lengths they
                saturate.
            dtype (`torch.dtype`): Compute dtype, that of the tokens beside which the embedding is used.

        Returns:
            `torch.Tensor` of shape `(..., out_features)`.
        """
        scaled = (positions.detach().float() / self.scale).clamp(-MAX_POSITION_INPUT, MAX_POSITION_INPUT)
        return self.mlp(scaled.to(dtype))


class VidLLMEmbeddingNorm(nn.Module):
    """Brings what takes the place of word embeddings to their size: RMS norm, a learned factor per channel, a fixed scale.

    A language model looks up what it read before by the direction of the residual stream. An embedding that is many times as large as
    those of words drowns whatever its own layers add to it, and a language model of random weights then does not learn to look anything up.

    Args:
        config (`VidLLMConfig`): Reads `scene_token_scale` and the language model's width.

    Source:
        Ours. Upstream: Gemma 3 (huggingface/transformers) norms its image features too.
    """

    EPS = 1e-6

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        self.scale = config.scene_token_scale
        self.weight = nn.Parameter(torch.ones(config.text_config.hidden_size))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the factors to 1 again: a checkpoint may lack them."""
        init.ones_(self.weight)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Norm embeddings.

        Args:
            embeddings (`torch.Tensor` of shape `(..., text_hidden_size)`): Of any size.

        Returns:
            `torch.Tensor` of the same shape and dtype: root mean square `scene_token_scale` where the factors are 1; computed in float32.
        """
        full = embeddings.float()
        full = full * (full.square().mean(-1, keepdim=True) + self.EPS).rsqrt()
        return (full * (self.scale * self.weight.float())).to(embeddings.dtype)


class VidLLMPointEmbedding(nn.Module):
    """Turns a given 3D point into the embedding that replaces a `<coord>` token.

    Args:
        config (`VidLLMConfig`): Reads `position_hidden_size`, `scene_token_scale` and the language model's width.

    Source:
        Upstream: LLaVA-3D's coordinate prompt (a separate two-layer MLP on the centre). Ours: see `VidLLMPositionMlp` and
        `VidLLMEmbeddingNorm`.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        self.position_mlp = VidLLMPositionMlp(config.position_hidden_size, config.text_config.hidden_size)
        self.norm = VidLLMEmbeddingNorm(config)

    def forward(self, points_room: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Embed points.

        Args:
            points_room (`torch.Tensor` of shape `(..., 3)`): Points, room frame, unit of the scene tokens' points;
                give float32.
            dtype (`torch.dtype`, *optional*): Compute dtype (that of the input embeddings); the dtype of the points
                if not given.

        Returns:
            `torch.Tensor` of shape `(..., text_hidden_size)`.
        """
        return self.norm(self.position_mlp(points_room, dtype or points_room.dtype))


class VidLLMSceneTokens(nn.Module):
    """Places patch tokens in the room, pools them by voxel and projects them to the language model's width.

    Args:
        config (`VidLLMConfig`): Reads `position_embedding`, `position_hidden_size`, `num_scene_tokens`,
            `voxel_size_m`, `projector_hidden_size`, `scene_token_scale` and the widths of the two sub-models.

    Source:
        Paper: eq. 3-4. Ours: pooling, number of tokens, projector (the paper's figure says only "Pooling"), both norms: the language
        stream is brought to unit variance per patch before its place is added, the tokens to the size of word embeddings.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        width, text_width = config.vision_config.hidden_size, config.text_config.hidden_size
        self.num_scene_tokens = config.num_scene_tokens
        self.voxel_size_m = config.voxel_size_m
        if config.position_embedding:
            self.position_mlp = VidLLMPositionMlp(config.position_hidden_size, width)
        else:
            self.position_mlp = None
        self.projector = VidLLMMlp(width, config.projector_hidden_size or text_width, text_width)
        self.norm = VidLLMEmbeddingNorm(config)

    def forward(
        self,
        lang_tokens: torch.Tensor,
        points_room: torch.Tensor,
        confidence: torch.Tensor,
        valid_mask: torch.Tensor,
        grid_hw: tuple[int, int],
    ) -> VidLLMSceneTokensOutput:
        """Build the scene tokens of each video.

        A scene's result depends on nothing else in the batch, bit for bit; frames that only pad are all False in
        `valid_mask`.

        Args:
            lang_tokens (`torch.Tensor` of shape `(batch, frames, patches, encoder_width)`): Language stream of the
                adapter.
            points_room (`torch.Tensor` of shape `(batch, frames, height, width, 3)`): Points, room frame, metres (or
                relative, scaled by `relative_point_scale`). Non-finite points are left out. Detached here.
            confidence (`torch.Tensor` of shape `(batch, frames, height, width)`): Positive weights within a patch.
            valid_mask (`torch.BoolTensor` of shape `(batch, frames, height, width)`): True for pixels that count.
            grid_hw (`tuple[int, int]`): Patch grid (rows, columns).

        Returns:
            `VidLLMSceneTokensOutput`.

        Raises:
            ValueError: The shapes do not belong together.

        Source:
            Paper: eq. 3-4. Ours: the rest.
        """
        batch, frames, patches, _ = lang_tokens.shape
        rows, columns = grid_hw
        height, width = points_room.shape[2:4]
        if patches != rows * columns or height % rows or width % columns:
            raise ValueError(
                f"scene tokens: wanted {rows} x {columns} patches, and both image sides multiples of that; "
                f"got {patches} patches and {height} x {width} pixels"
            )
        for name, tensor, wanted in (
            ("points_room", points_room, (batch, frames, height, width, 3)),
            ("confidence", confidence, (batch, frames, height, width)),
            ("valid_mask", valid_mask, (batch, frames, height, width)),
        ):
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"scene tokens: wanted {name} of shape {wanted}; got {tuple(tensor.shape)}")
        # One scene at a time: the number of patches with a position differs, and no bit may depend on the neighbours.
        scenes = [
            self._pool_scene(lang_tokens[b].flatten(0, 1), points_room[b], confidence[b], valid_mask[b], grid_hw)
            for b in range(batch)
        ]
        tokens, positions, masks = (torch.stack(parts) for parts in zip(*scenes, strict=True))
        return VidLLMSceneTokensOutput(tokens=tokens, positions_room=positions, mask=masks)

    def _pool_scene(
        self,
        lang_tokens: torch.Tensor,
        points: torch.Tensor,
        confidence: torch.Tensor,
        valid_mask: torch.Tensor,
        grid_hw: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One scene; `lang_tokens` is `(frames * patches, encoder_width)`."""
        dtype = lang_tokens.dtype
        with torch.no_grad(), torch.autocast(device_type=points.device.type, enabled=False):
            positions, keep_mask = patch_positions(points, confidence, valid_mask, grid_hw)
            kept = keep_mask.nonzero().squeeze(1)
            positions = positions[kept]
            keys, _ = fitting_voxel_keys(positions, self.voxel_size_m, self.num_scene_tokens)
            order, lengths = group_by_voxel(keys, self.num_scene_tokens)
            kept, positions = kept[order], positions[order]
            pooled_positions = segment_means(positions, lengths)
            mask = lengths > 0

        features = nn.functional.layer_norm(lang_tokens[kept].float(), lang_tokens.shape[-1:])
        if self.position_mlp is not None:
            features = features + self.position_mlp(positions, dtype).float()
        tokens = self.norm(self.projector(segment_means(features, lengths).to(dtype)))
        # The projector's biases would fill empty slots.
        return tokens.masked_fill(~mask.unsqueeze(-1), 0.0), pooled_positions, mask


__all__ = [
    "VidLLMEmbeddingNorm",
    "VidLLMPointEmbedding",
    "VidLLMPositionMlp",
    "VidLLMSceneTokens",
    "VidLLMSceneTokensOutput",
    "relative_point_scale",
]
