"""Named sizes of Vid-LLM: everything that `vidllm init` needs to know besides weights.

The big presets use public encoders and language models; `vidllm-nano` runs on a laptop's CPU and `vidllm-tiny` inside unit tests.
"""

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from vidllm.modeling_vidllm.configuration_vidllm import VidLLMConfig


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VidLLMPreset:
    """A complete recipe of shapes.

    Args:
        name (`str`): As `vidllm init` takes it.
        description (`str`): One line for people.
        vision_config (`Mapping`): Fields of the encoder's transformers config.
        text_config (`Mapping`): Fields of the language model's transformers config.
        model_fields (`Mapping`): Fields of `VidLLMConfig` besides these two.
        num_frames (`int`): Frames per video by default.
        shortest_edge (`int`): Short side of the frames, pixels; both sides are cropped to multiples of the patch size.
        chat_template_family (`str`): `chatml` or `llama3`.
        merges (`str`, *optional*): File of merges of an untrained folder's tokenizer, see `byte_level_tokenizer`; None: bytes alone.
        keeps_vocabulary (`bool`): True: an untrained folder keeps the language model's vocabulary size although its byte-level
            tokenizer uses few of the rows; False: it is cut to the tokenizer.
        from_nothing (`bool`): True: an untrained folder gets first values of unit gain, see `draw_for_training_from_nothing`.
        image_mean (`tuple` of `float`): Per channel, of pixels in 0..1.
        image_std (`tuple` of `float`): Per channel.

    Source:
        Ours: design of the package; the numbers of the big presets are those of the public checkpoints they start from.
    """

    name: str
    description: str
    vision_config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    model_fields: Mapping[str, Any]
    num_frames: int
    shortest_edge: int
    chat_template_family: str = "chatml"
    merges: str | None = None
    keeps_vocabulary: bool = False
    from_nothing: bool = False
    image_mean: tuple[float, float, float] = field(default=IMAGENET_MEAN)
    image_std: tuple[float, float, float] = field(default=IMAGENET_STD)

    @property
    def patch_size(self) -> int:
        """Edge of an encoder patch, pixels."""
        return self.vision_config["patch_size"]

    def config(self, **changes) -> VidLLMConfig:
        """Build the model's config.

        Args:
            **changes: Fields of `VidLLMConfig`; `text_config` and `vision_config` are merged into the preset's.

        Returns:
            `VidLLMConfig`: complete and checked.

        Raises:
            ValueError: The fields contradict each other.

        Source:
            Ours.
        """
        fields = copy.deepcopy(dict(self.model_fields))
        for part, given in (("vision_config", self.vision_config), ("text_config", self.text_config)):
            fields[part] = copy.deepcopy({**given, **changes.pop(part, {})})
        return VidLLMConfig(**{**fields, **changes})


# facebook/dinov2-with-registers-large; VGGT's patch encoder has the same shape
_DINOV2_LARGE = {
    "model_type": "dinov2_with_registers",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "num_register_tokens": 4,
    "layer_norm_eps": 1e-6,
}

_PRESETS = (
    VidLLMPreset(
        name="vidllm-7b",
        description="the paper: DINOv2-L/14 with registers, 24 reconstruction pairs, Qwen2-7B (as LLaVA-Video-7B)",
        vision_config=_DINOV2_LARGE,
        text_config={
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "tie_word_embeddings": False,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
        # Qwen2 and Qwen2.5 name ids up to 151664; the rows behind them only pad the matrix.
        model_fields={
            "video_token_id": 151665,
            "coord_token_id": 151666,
            "loc_token_id": 151667,
            "num_scene_tokens": 3072,
        },
        num_frames=32,
        shortest_edge=518,
        keeps_vocabulary=True,
    ),
    VidLLMPreset(
        name="vidllm-4b",
        description="one 24-80 GB GPU: DINOv2-L/14 with registers, 24 reconstruction pairs, Qwen3-4B",
        vision_config=_DINOV2_LARGE,
        text_config={
            "model_type": "qwen3",
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "tie_word_embeddings": True,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
        # Qwen3 names ids up to 151668 (its thinking marks are 151667 and 151668).
        model_fields={
            "video_token_id": 151669,
            "coord_token_id": 151670,
            "loc_token_id": 151671,
            "num_scene_tokens": 2048,
        },
        num_frames=32,
        # 4:3 videos become 518 x 392
        shortest_edge=392,
        keeps_vocabulary=True,
    ),
    VidLLMPreset(
        name="vidllm-nano",
        description="CPU: small ViT with 16-pixel patches, 3 reconstruction pairs, small Qwen3-type decoder, own tokenizer",
        vision_config={
            "model_type": "dinov2_with_registers",
            "hidden_size": 192,
            "num_hidden_layers": 8,
            "num_attention_heads": 3,
            "mlp_ratio": 3,
            "image_size": 96,
            "patch_size": 16,
            "num_register_tokens": 4,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "model_type": "qwen3",
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 776,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
        model_fields={
            "video_token_id": 768,
            "coord_token_id": 769,
            "loc_token_id": 770,
            "num_adapter_heads": 3,
            "adapter_expansion": 2,
            "num_bridge_tokens": 16,
            "num_reconstruction_layers": 3,
            "num_reconstruction_heads": 3,
            # trained from nothing, in few steps: VGGT's 0.01 lets the blocks speak only after many
            "reconstruction_layer_scale": 1.0,
            "num_camera_layers": 1,
            "num_camera_iterations": 1,
            "camera_token_norm": "centred",
            "num_camera_heads": 6,
            "dense_head_channels": [32, 32, 32, 32],
            "dense_head_features": 32,
            "metric_decoder_features": 48,
            "num_depth_bins": 32,
            # patches of 16 pixels see a motion to within some pixels; the pictures know better
            "pose_refinement_sizes": [12, 24],
            "pose_refinement_depth_grid": [6, 8],
            "pose_refinement_focal_spread": 0.06,
            "pose_refinement_depth_per_focal": 0.5,
            "num_scene_tokens": 64,
            # twice the encoder's width: a projector that starts as a linear map keeps all of it
            "projector_hidden_size": 384,
            "encoder_frame_chunk": 128,
            "dense_frame_chunk": 128,
            "position_hidden_size": 192,
            "grounding_hidden_size": 96,
            "num_grounding_heads": 4,
            "num_grounding_queries": 64,
            "grounding_neighbors": [8, 16, 32],
        },
        num_frames=12,
        shortest_edge=96,
        # learned by `learn_merges(room_texts(seed=3, count=60), 762)`: every word of the rooms is one token
        merges="nano_merges.json",
        from_nothing=True,
    ),
    VidLLMPreset(
        name="vidllm-tiny",
        description="unit tests: random weights in milliseconds, 3 frames of 28 x 42",
        vision_config={
            "model_type": "dinov2_with_registers",
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "image_size": 28,
            "patch_size": 14,
            "num_register_tokens": 2,
        },
        text_config={
            "model_type": "qwen3",
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "vocab_size": 264,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
        },
        model_fields={
            "video_token_id": 259,
            "coord_token_id": 260,
            "loc_token_id": 261,
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
        },
        num_frames=3,
        shortest_edge=28,
    ),
)
PRESETS: Mapping[str, VidLLMPreset] = MappingProxyType({preset.name: preset for preset in _PRESETS})


def preset(name: str) -> VidLLMPreset:
    """Look a preset up.

    Args:
        name (`str`): One of `PRESETS`.

    Returns:
        `VidLLMPreset`: the recipe.

    Raises:
        ValueError: There is none of that name; the closest one is suggested.

    Source:
        Ours.
    """
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.0)[0]
    raise ValueError(f"preset: wanted one of {', '.join(PRESETS)}; got {name!r}; did you mean {close!r}?")
