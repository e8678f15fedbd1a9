"""Camera head: iterative refinement of one pose encoding per frame.

Shapes: B videos, S frames, I iterations, C width of the camera token (twice the encoder width).
"""

import torch
from torch import nn
from transformers import initialization as init

from .configuration_vidllm import VidLLMConfig
from .layers_vidllm import VidLLMCentredNorm, VidLLMMlp
from .reconstruction_blocks_vidllm import VidLLMReconstructionBlock


POSE_SIZE = 9


def activate_pose(raw_pose: torch.Tensor) -> torch.Tensor:
    """Turn accumulated raw poses into pose encodings.

    Args:
        raw_pose (`torch.Tensor` of shape `(..., 9)`): Translation, quaternion, raw fields of view.

    Returns:
        `torch.Tensor` of shape `(..., 9)`: Translation (3, relative unit), quaternion xyzw (4, not normalised), vertical and
        horizontal field of view (2, radians, not negative).

    Source:
        Upstream: facebookresearch/vggt camera head (linear, linear, relu).
    """
    return torch.cat([raw_pose[..., :7], nn.functional.relu(raw_pose[..., 7:])], dim=-1)


class VidLLMEmptyPose(nn.Module):
    """Learned pose that the first iteration starts from, in a module of its own so that frameworks can place it.

    Source:
        Upstream: facebookresearch/vggt camera head (`empty_pose_tokens`, zero at the start).
    """

    def __init__(self):
        super().__init__()
        self.pose = nn.Parameter(torch.zeros(1, 1, POSE_SIZE))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start at zero."""
        init.zeros_(self.pose)

    def forward(self) -> torch.Tensor:
        """-> `(1, 1, 9)`: a copy; where parameters are sharded, the parameter itself is gone once this returns."""
        return self.pose.clone()


class VidLLMCameraHead(nn.Module):
    """Pose encodings of all frames from their camera tokens, in float32.

    Args:
        config (`VidLLMConfig`): Reads `vision_config.hidden_size`, `num_camera_layers`, `num_camera_heads`,
            `num_camera_iterations`, `camera_token_norm`.

    Source:
        Upstream: facebookresearch/vggt camera head.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        dim = 2 * config.vision_config.hidden_size
        self.num_iterations = config.num_camera_iterations
        self.empty_pose = VidLLMEmptyPose()
        centred = config.camera_token_norm == "centred"
        self.token_norm = VidLLMCentredNorm(dim) if centred else nn.LayerNorm(dim, eps=1e-5)
        self.embed_pose = nn.Linear(POSE_SIZE, dim)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.adaptive_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.trunk = nn.ModuleList(
            VidLLMReconstructionBlock(config, dim, config.num_camera_heads, qk_norm=False)
            for _ in range(config.num_camera_layers)
        )
        self.trunk_norm = nn.LayerNorm(dim, eps=1e-5)
        self.pose_branch = VidLLMMlp(dim, dim // 2, POSE_SIZE)

    @torch.no_grad()
    def init_weights(self) -> None:
        """A fresh head says: no turn, one radian of view.

        Ours: at a quaternion of length 0 gradients explode, and a field of view that its ReLU cuts off at the start may never come back.
        """
        start = torch.zeros(POSE_SIZE)
        # the iterations' deltas add up
        start[6:] = 1.0 / self.num_iterations
        init.copy_(self.pose_branch.fc2.bias, start)

    def forward(self, camera_tokens: torch.Tensor) -> torch.Tensor:
        """Refine the poses of all frames together.

        Args:
            camera_tokens (`torch.Tensor` of shape `(batch, frames, channels)`): Camera tokens of the last tapped layer.

        Returns:
            `torch.Tensor` of shape `(batch, iterations, frames, 9)`: Encodings as in [`activate_pose`], all iterations; the
            translation is camera-from-world.

        Source:
            Upstream: facebookresearch/vggt camera head (each iteration sees the previous pose without its gradient).
        """
        with torch.autocast(device_type=camera_tokens.device.type, enabled=False):
            tokens = self.token_norm(camera_tokens.float())
            normed_tokens = self.adaptive_norm(tokens)
            raw_pose = None
            encodings = []
            for _ in range(self.num_iterations):
                if raw_pose is None:
                    previous = self.empty_pose().expand(*tokens.shape[:2], -1)
                else:
                    raw_pose = previous = raw_pose.detach()
                shift, scale, gate = self.modulation(self.embed_pose(previous)).chunk(3, dim=-1)
                hidden_states = gate * (normed_tokens * (1 + scale) + shift) + tokens
                for block in self.trunk:
                    hidden_states = block(hidden_states)
                delta = self.pose_branch(self.trunk_norm(hidden_states))
                raw_pose = delta if raw_pose is None else raw_pose + delta
                encodings.append(activate_pose(raw_pose))
            return torch.stack(encodings, dim=1)


__all__ = ["VidLLMCameraHead", "VidLLMEmptyPose", "activate_pose"]
