"""Image encoder: any transformers vision model that gives one token per patch.

Shapes: F frames, H W pixels, h w patch grid, P = h * w patches per frame, C encoder width.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto.modeling_auto import AutoModel

from .configuration_vidllm import VidLLMConfig


# Attribute names under which vision models of transformers keep their last LayerNorm.
_FINAL_NORM_NAMES = ("layernorm", "norm", "post_layernorm")
# Models whose `last_hidden_state` is taken before that norm.
_UNNORMED_MODEL_TYPES = ("clip_vision_model", "mlcd_vision_model")
# Parts of a vision model that no patch token depends on: masking in pre-training, pooling over the image.
_UNREACHABLE_PARTS = ("mask_token", "head", "pooler")


@dataclass
class VidLLMEncoderOutput(ModelOutput):
    """What the encoder gives.

    Args:
        patch_tokens (`torch.Tensor` of shape `(frames, patches, channels)`): Final-norm patch tokens, row by row.
        layer_tokens (`tuple` of 4 `torch.Tensor` of shape `(frames, patches, channels)`, *optional*): Patch tokens after the
            blocks `config.metric_depth_layers`, each through the model's final norm.

    Source:
        Paper: section 3.1 (T_base), section 3.2 (encoder layers read by the metric decoder).
    """

    patch_tokens: torch.Tensor | None = None
    layer_tokens: tuple[torch.Tensor, ...] | None = None


def patch_size_hw(vision_config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of a patch.

    Args:
        vision_config (`PreTrainedConfig`): Config of the vision model.

    Returns:
        `tuple[int, int]`: Pixels, height first.

    Raises:
        ValueError: The config has no patch size.

    Source:
        Ours: transformers stores an int or a pair.
    """
    patch_size = getattr(vision_config, "patch_size", None)
    if isinstance(patch_size, int):
        return patch_size, patch_size
    if isinstance(patch_size, (list, tuple)) and len(patch_size) == 2:
        return int(patch_size[0]), int(patch_size[1])
    raise ValueError(
        f"vision_config: wanted a vision model with a two-dimensional patch size; got model_type "
        f"{vision_config.model_type!r} with patch_size {patch_size!r}"
    )


class VidLLMEncoder(nn.Module):
    """Patch tokens of single frames.

    Args:
        config (`VidLLMConfig`): Reads `vision_config`, `metric_depth_layers`, `encoder_frame_chunk`.

    Raises:
        ValueError: `vision_config` names a model that gives no patch tokens.

    Source:
        Paper: section 3.1 (one DINOv2 encoder shared by both streams). Ours: any vision model of transformers; prefix tokens
        (class, registers) are what stands before the last h * w tokens.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__()
        vision_config = config.vision_config
        self.patch_hw = patch_size_hw(vision_config)
        self.layers = list(config.metric_depth_layers)
        self.num_hidden_layers = vision_config.num_hidden_layers
        self.frame_chunk = config.encoder_frame_chunk
        self.model = AutoModel.from_config(vision_config)
        parameters = inspect.signature(type(self.model).forward).parameters
        self.interpolate_positions = "interpolate_pos_encoding" in parameters
        self.norm_last_state = vision_config.model_type in _UNNORMED_MODEL_TYPES
        self.final_norm_name = self._check_model(vision_config, parameters)
        self.unreachable_parameters = [
            name
            for name, _ in self.named_parameters()
            # "model.head.probe" -> "head"; "model.embeddings.mask_token" -> "mask_token"
            if name.split(".")[1] in _UNREACHABLE_PARTS or name.split(".")[-1] in _UNREACHABLE_PARTS
        ]
        self.freeze_unreachable()

    def _check_model(self, vision_config: PreTrainedConfig, parameters: Mapping[str, inspect.Parameter]) -> str:
        """Name of the model's final norm; `ValueError` if the model's structure cannot give patch tokens."""
        required = [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            and name not in ("self", "pixel_values")
        ]
        norms = [name for name in _FINAL_NORM_NAMES if isinstance(getattr(self.model, name, None), nn.Module)]
        patch_embedding = any(
            isinstance(module, nn.Conv2d)
            and tuple(module.kernel_size) == tuple(module.stride) == self.patch_hw
            and module.out_channels == vision_config.hidden_size
            for module in self.model.modules()
        )
        for held, wanted, got in (
            (self.model.main_input_name == "pixel_values", "main input pixel_values", self.model.main_input_name),
            (not required, "no further required input", required),
            (patch_embedding, f"a patch embedding {self.patch_hw} to width {vision_config.hidden_size}", "none"),
            (len(norms) == 1, f"one final norm out of {_FINAL_NORM_NAMES}", norms),
        ):
            if not held:
                raise ValueError(
                    f"vision_config: wanted a model that gives one token per patch ({wanted}); "
                    f"got {type(self.model).__name__} with {got}"
                )
        return norms[0]

    def freeze_unreachable(self) -> None:
        """Take the parameters `unreachable_parameters` out of training.

        Source:
            Ours: distributed training wants a gradient for every parameter that asks for one.
        """
        for name in self.unreachable_parameters:
            self.get_parameter(name).requires_grad_(False)

    def train(self, mode: bool = True) -> "VidLLMEncoder":
        """Set training mode.

        Args:
            mode (`bool`): Training or evaluation.

        Returns:
            `VidLLMEncoder`: Itself.

        Source:
            Ours: loading makes new parameters, which forget that they were frozen, so it is repeated here (`from_pretrained`
            ends with `eval()`). DINOv3's rotary embedding draws a random scale per call in training mode, so that frames of
            one video would disagree about their grid; it stays in evaluation mode.
        """
        super().train(mode)
        self.freeze_unreachable()
        rope_embeddings = getattr(self.model, "rope_embeddings", None)
        if rope_embeddings is not None:
            rope_embeddings.eval()
        return self

    def grid_hw(self, height: int, width: int) -> tuple[int, int]:
        """Patch grid of a frame.

        Args:
            height (`int`): Pixels.
            width (`int`): Pixels.

        Returns:
            `tuple[int, int]`: Rows and columns of patches.

        Raises:
            ValueError: A side is not a multiple of the patch size.

        Source:
            Ours: a cropped last patch would silently shift every intrinsic matrix.
        """
        patch_height, patch_width = self.patch_hw
        if height <= 0 or width <= 0 or height % patch_height or width % patch_width:
            raise ValueError(
                f"pixel_values: wanted height and width that are positive multiples of {self.patch_hw}; got {(height, width)}"
            )
        return height // patch_height, width // patch_width

    def forward(self, pixel_values: torch.Tensor, return_layers: bool = True) -> VidLLMEncoderOutput:
        """Encode frames, `encoder_frame_chunk` at a time.

        Args:
            pixel_values (`torch.Tensor` of shape `(frames, 3, height, width)`): Normalised with the encoder's mean and std.
            return_layers (`bool`): Whether the metric depth layers are wanted.

        Returns:
            [`VidLLMEncoderOutput`]: `(frames, patches, channels)` each.

        Raises:
            ValueError: Wrong rank or size of the frames, or the model gives another number of tokens than patches.

        Source:
            Paper: section 3.1. Ours: chunks bound the memory; frames are independent, so they change no result.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[0] == 0:
            raise ValueError(
                f"pixel_values: wanted (frames, 3, height, width) with at least one frame; got {tuple(pixel_values.shape)}"
            )
        grid_height, grid_width = self.grid_hw(*pixel_values.shape[-2:])
        trained = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            chunks = [
                self._encode_chunk(chunk, grid_height * grid_width, return_layers)
                for chunk in pixel_values.split(self.frame_chunk)
            ]
            merged = [torch.cat(tensors) if len(tensors) > 1 else tensors[0] for tensors in zip(*chunks, strict=True)]
        return VidLLMEncoderOutput(patch_tokens=merged[0], layer_tokens=tuple(merged[1:]) if return_layers else None)

    def _encode_chunk(self, pixel_values: torch.Tensor, num_patches: int, return_layers: bool) -> list[torch.Tensor]:
        """Final patch tokens, then those of the wanted layers; all other hidden states are let go."""
        arguments = {"interpolate_pos_encoding": True} if self.interpolate_positions else {}
        output = self.model(pixel_values, output_hidden_states=return_layers, **arguments)
        final_norm = getattr(self.model, self.final_norm_name)
        last = final_norm(output.last_hidden_state) if self.norm_last_state else output.last_hidden_state
        if last.ndim != 3 or last.shape[1] < num_patches:
            raise ValueError(
                f"vision_config: wanted a model that gives one token per patch, {num_patches} for this frame size; "
                f"{type(self.model).__name__} gave a tensor {tuple(last.shape)}"
            )
        states = [last]
        if return_layers:
            if len(output.hidden_states) != self.num_hidden_layers + 1:
                raise ValueError(
                    f"vision_config: wanted {self.num_hidden_layers + 1} hidden states from {type(self.model).__name__}; "
                    f"got {len(output.hidden_states)}"
                )
            for layer in self.layers:
                is_last = layer == self.num_hidden_layers - 1
                states.append(last if is_last else final_norm(output.hidden_states[layer + 1]))
        # (frames, prefix + patches, channels) -> (frames, patches, channels)
        return [state[:, state.shape[1] - num_patches :] for state in states]


__all__ = ["VidLLMEncoder", "VidLLMEncoderOutput", "patch_size_hw"]
