"""Reconstruction: camera poses, relative depth and the room's orientation from patch tokens.

Shapes: B videos, S frames, H W pixels, h w patch grid, P = h * w patches, R special tokens (camera, registers), L = R + P,
C encoder width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from .camera_head_vidllm import VidLLMCameraHead
from .configuration_vidllm import VidLLMConfig
from .dense_head_vidllm import VidLLMDenseHead
from .encoder_vidllm import patch_size_hw
from .geometry_vidllm import START_ROOM_FROM_CAM, rotation_from_6d
from .layers_vidllm import VidLLMCentredNorm, VidLLMMlp
from .reconstruction_blocks_vidllm import VidLLMReconstructionBlock, rope_2d, token_positions


@dataclass
class VidLLMRawReconstruction(ModelOutput):
    """What the reconstruction network itself says: no identity for frame 0, no metres.

    Args:
        pose_encodings (`torch.Tensor` of shape `(batch, iterations, frames, 9)`): Translation of cam_from_world (relative unit),
            quaternion xyzw (not normalised), vertical and horizontal field of view (radians), one per refinement iteration.
        depth_relative (`torch.Tensor` of shape `(batch, frames, height, width)`): Depth along the optical axis, relative unit.
        depth_confidence (`torch.Tensor` of shape `(batch, frames, height, width)`): Confidence, > 1.
        room_from_world (`torch.Tensor` of shape `(batch, 3, 3)`): Rotation from the first camera to the room (z up).

    Source:
        Paper: section 3.1 (pose, depth). Ours: `room_from_world`.
    """

    pose_encodings: torch.Tensor | None = None
    depth_relative: torch.Tensor | None = None
    depth_confidence: torch.Tensor | None = None
    room_from_world: torch.Tensor | None = None


class VidLLMReconstructionTokens(nn.Module):
    """Learned camera and register tokens, one set for the first frame and one for all others; kept in float32.

    Args:
        config (`VidLLMConfig`): Reads `vision_config.hidden_size`, `num_reconstruction_registers`.

    Source:
        Upstream: facebookresearch/vggt aggregator (`camera_token`, `register_token`; initial std 1e-6).
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        dim = config.vision_config.hidden_size
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.zeros(1, 2, config.num_reconstruction_registers, dim))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw both sets almost at zero."""
        init.normal_(self.camera_token, std=1e-6)
        init.normal_(self.register_token, std=1e-6)

    def forward(self, num_videos: int, num_frames: int) -> torch.Tensor:
        """-> `(num_videos, num_frames, 1 + registers, channels)`: slot 0 for the first frame of each video, slot 1 after it."""
        special = torch.cat([self.camera_token, self.register_token], dim=2)
        first = special[:, :1].expand(num_videos, -1, -1, -1)
        others = special[:, 1:].expand(num_videos, num_frames - 1, -1, -1)
        return torch.cat([first, others], dim=1)


class VidLLMRoomHead(nn.Module):
    """Rotation from the first camera to a room frame with z up and x, y along the walls, in float32.

    Args:
        config (`VidLLMConfig`): Reads `vision_config.hidden_size`, `camera_token_norm`.

    Source:
        Ours: boxes need an upright frame and the paper takes it from the dataset. A 6D rotation is applied on top of the start
        value (first camera held upright); the last layer starts at zero, so a fresh head gives the start value.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        dim = 2 * config.vision_config.hidden_size
        centred = config.camera_token_norm == "centred"
        self.norm = VidLLMCentredNorm(dim) if centred else nn.LayerNorm(dim, eps=1e-5)
        self.mlp = VidLLMMlp(dim, dim // 2, 6)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Zero the last layer."""
        init.zeros_(self.mlp.fc2.weight)
        init.zeros_(self.mlp.fc2.bias)

    def forward(self, camera_token: torch.Tensor) -> torch.Tensor:
        """First frame's camera token `(batch, 2 * channels)` -> room_from_world `(batch, 3, 3)`."""
        with torch.autocast(device_type=camera_token.device.type, enabled=False):
            change = self.mlp(self.norm(camera_token.float()))
            # The identity in 6D, (1, 0, 0, 0, 1, 0), made without a copy from the host.
            identity = (torch.arange(6, device=change.device) % 4 == 0).to(change.dtype)
            start = torch.tensor(START_ROOM_FROM_CAM, dtype=change.dtype).to(change.device, non_blocking=True)
            return rotation_from_6d(identity + change) @ start


class VidLLMReconstructor(nn.Module):
    """Alternating attention within frames and over all frames, then camera, dense and room heads.

    Args:
        config (`VidLLMConfig`): Reads the reconstruction, camera and dense head fields.

    Source:
        Upstream: facebookresearch/vggt aggregator. Ours: only the four layers that the heads read are kept.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        dim = config.vision_config.hidden_size
        self.patch_hw = patch_size_hw(config.vision_config)
        self.tap_layers = list(config.reconstruction_tap_layers)
        self.rope_base = config.rope_base
        self.head_dim = dim // config.num_reconstruction_heads
        self.num_special_tokens = 1 + config.num_reconstruction_registers
        self.tokens = VidLLMReconstructionTokens(config)
        self.frame_blocks = nn.ModuleList(
            VidLLMReconstructionBlock(config, dim, config.num_reconstruction_heads)
            for _ in range(config.num_reconstruction_layers)
        )
        self.global_blocks = nn.ModuleList(
            VidLLMReconstructionBlock(config, dim, config.num_reconstruction_heads)
            for _ in range(config.num_reconstruction_layers)
        )
        self.camera_head = VidLLMCameraHead(config)
        self.depth_head = VidLLMDenseHead(config)
        self.room_head = VidLLMRoomHead(config)

    def forward(
        self, geom_tokens: torch.Tensor, grid_hw: tuple[int, int], size_hw: tuple[int, int]
    ) -> VidLLMRawReconstruction:
        """Reconstruct each video.

        Args:
            geom_tokens (`torch.Tensor` of shape `(batch, frames, patches, channels)`): Geometry stream of the adapter.
            grid_hw (`tuple[int, int]`): Rows and columns of patches.
            size_hw (`tuple[int, int]`): Height and width of the frames, pixels.

        Returns:
            [`VidLLMRawReconstruction`], float32; world is the first frame's camera, up to what the network learned.

        Raises:
            ValueError: Tokens, grid and frame size contradict each other.

        Source:
            Upstream: facebookresearch/vggt. Ours: room head.
        """
        wanted = (grid_hw[0] * self.patch_hw[0], grid_hw[1] * self.patch_hw[1])
        if tuple(size_hw) != wanted:
            raise ValueError(f"size_hw: wanted {wanted} for a grid {tuple(grid_hw)}; got {tuple(size_hw)}")
        if geom_tokens.ndim != 4 or geom_tokens.shape[2] != grid_hw[0] * grid_hw[1]:
            raise ValueError(
                f"geom_tokens: wanted (batch, frames, {grid_hw[0] * grid_hw[1]}, channels); got {tuple(geom_tokens.shape)}"
            )
        taps = self.tapped_layers(geom_tokens, grid_hw)
        patches = tuple(tokens[:, :, self.num_special_tokens :] for tokens in taps)
        camera_tokens = taps[-1][:, :, 0]
        depth_relative, depth_confidence = self.depth_head(patches, grid_hw, size_hw)
        return VidLLMRawReconstruction(
            pose_encodings=self.camera_head(camera_tokens),
            depth_relative=depth_relative,
            depth_confidence=depth_confidence,
            room_from_world=self.room_head(camera_tokens[:, 0]),
        )

    def tapped_layers(self, geom_tokens: torch.Tensor, grid_hw: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """Run the alternating blocks and keep what the heads read.

        Args:
            geom_tokens (`torch.Tensor` of shape `(batch, frames, patches, channels)`): Geometry stream of the adapter.
            grid_hw (`tuple[int, int]`): Rows and columns of patches.

        Returns:
            `tuple` of 4 `torch.Tensor` of shape `(batch, frames, special + patches, 2 * channels)`: frame half, then global
            half, after the pairs `config.reconstruction_tap_layers`.

        Source:
            Upstream: facebookresearch/vggt aggregator (camera token, registers, patches; frame block before global block).
        """
        num_videos, num_frames = geom_tokens.shape[:2]
        special = self.tokens(num_videos, num_frames).to(geom_tokens.dtype)
        hidden_states = torch.cat([special, geom_tokens], dim=2)
        num_tokens = hidden_states.shape[2]
        positions = token_positions(grid_hw, self.num_special_tokens, geom_tokens.device)
        cos, sin = (part.to(geom_tokens.dtype) for part in rope_2d(positions, self.head_dim, self.rope_base))
        # (tokens, head_dim) -> (frames * tokens, head_dim): all frames share one grid, time has no position
        global_cos, global_sin = cos.repeat(num_frames, 1), sin.repeat(num_frames, 1)
        kept = {}
        for layer, (frame_block, global_block) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            # (batch, frames, tokens, channels) -> (batch * frames, tokens, channels)
            frame_states = frame_block(hidden_states.flatten(0, 1), cos, sin)
            # (batch * frames, tokens, channels) -> (batch, frames * tokens, channels)
            frame_states = frame_states.unflatten(0, (num_videos, num_frames)).flatten(1, 2)
            global_states = global_block(frame_states, global_cos, global_sin)
            if layer in self.tap_layers:
                kept[layer] = torch.cat([frame_states, global_states], dim=-1).unflatten(1, (num_frames, num_tokens))
            # (batch, frames * tokens, channels) -> (batch, frames, tokens, channels)
            hidden_states = global_states.unflatten(1, (num_frames, num_tokens))
        return tuple(kept[layer] for layer in self.tap_layers)


__all__ = ["VidLLMRawReconstruction", "VidLLMReconstructionTokens", "VidLLMReconstructor", "VidLLMRoomHead"]
