"""Configuration of a Vid-LLM checkpoint. Imports no torch."""

import difflib
import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig


ADAPTER_TYPES = ("bridge", "none", "concat_self_attention", "cross_attention")
BRIDGE_SCOPES = ("scene", "frame")
BOX_OUTPUTS = ("decoder", "text")
CAMERA_TOKEN_NORMS = ("layer", "centred")


def check_choice(name: str, value: str, choices: tuple) -> None:
    """Raise a `ValueError` that names the closest allowed value.

    Args:
        name (`str`): What is being chosen, for the message.
        value (`str`): What was given.
        choices (`tuple` of `str`): What is allowed.

    Raises:
        ValueError: `value` is not one of `choices`.

    Source:
        Ours: a typo in a switch must not train the wrong ablation.
    """
    if value in choices:
        return
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{name}: wanted one of {', '.join(choices)}; got {value!r}{hint}")


@strict
class VidLLMConfig(PreTrainedConfig):
    r"""Everything that fixes the shape and the behaviour of a Vid-LLM model.

    Defaults are the paper's where it states a value; a line that starts with `Ours` marks a value that the paper leaves open.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to DINOv2-L/14 with registers):
            Any transformers vision encoder that gives patch tokens.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to Qwen2-7B's shape):
            Any transformers decoder.
        video_token_id (`int`): Id of the placeholder of one scene-token slot.
        coord_token_id (`int`): Id of the placeholder of one 3D point in a prompt.
        loc_token_id (`int`): Id of the token whose hidden state asks for boxes.
        tie_word_embeddings (`bool`): Whether `lm_head` shares the input embedding; `True` where the language model ties them.
        shared_encoder (`bool`): Paper's ablation. False: a second encoder feeds the language stream.
        encoder_frame_chunk (`int`): Frames per pass through the encoder; bounds memory, does not change results.
        metric_depth_layers (`list[int]`): 0-based encoder blocks read by the metric depth decoder, shallow to deep.
        adapter_type (`str`): One of `bridge`, `none`, `concat_self_attention`, `cross_attention` (paper, Table 6).
        num_bridge_tokens (`int`): K of paper eq. 2.
        num_adapter_layers (`int`): Ours: bridge (or ablation) layers after the two MLPs.
        num_adapter_heads (`int`): Ours: attention heads of the adapter.
        adapter_expansion (`int`): Hidden width of phi_geom and phi_lang over the encoder width.
        bridge_scope (`str`): Ours: `scene` shares the bridge tokens over all frames of a video, `frame` gives each frame its own.
        num_reconstruction_layers (`int`): Ours: pairs of frame and global blocks (VGGT: 24).
        num_reconstruction_heads (`int`): Attention heads of the frame and global blocks.
        reconstruction_tap_layers (`list[int]`): 0-based pairs that feed the dense head; the last one also feeds the camera head.
        reconstruction_layer_scale (`float`): Initial layer scale of the frame, global and camera blocks.
        num_reconstruction_registers (`int`): Register tokens per frame beside the camera token.
        rope_base (`float`): Base of the 2D rotary embedding.
        num_camera_layers (`int`): Blocks of the camera head's trunk.
        num_camera_heads (`int`): Attention heads of the camera head's trunk.
        num_camera_iterations (`int`): Refinement iterations of the camera head.
        camera_token_norm (`str`): What camera and room head read camera tokens through: `layer`, or `centred` (statistics of the batch in training).
        dense_head_channels (`list[int]`): Channels of the four pyramid levels of the dense head.
        dense_head_features (`int`): Width of the dense head's fusion path.
        dense_frame_chunk (`int`): Frames per pass through the dense and metric decoders; does not change results.
        use_metric_depth (`bool`): Paper's ablation. False: no metric decoder, geometry stays as the dense head gives it.
        use_scale_alignment (`bool`): Paper's ablation. False: geometry uses the metric head's own depth.
        metric_decoder_features (`int`): Ours: width of the metric depth decoder.
        num_depth_bins (`int`): Ours: number of metric bins.
        min_depth_m (`float`): Ours: centre of the nearest initial bin, metres.
        max_depth_m (`float`): Ours: centre of the farthest initial bin, metres.
        num_scale_frames (`int`): Frames per scene that vote for the scale (paper: 16).
        is_metric (`bool`): Whether the weights were trained to give metres. False: every geometric output is relative.
        pose_refinement_sizes (`list[int]`): Ours: short sides, pixels, of the pictures on which predicted poses are made exact, coarse to fine; see
            `refine_poses`. Empty (the default): poses stay as the network gives them.
        pose_refinement_steps (`int`): Ours: steps at each size.
        pose_refinement_window (`int`): Ours: frames further apart are not compared.
        pose_refinement_depth_grid (`list[int]`): Ours: rows and columns of a grid of factors by which depth may bend while poses are refined; see
            `refine_poses_and_depth`. Empty (the default): depth stays as the network gives it.
        pose_refinement_focal_spread (`float`): Ours: by about how much (natural logarithm) predicted focal lengths are off; their common factor is found
            with poses and depth. 0 (the default): they stay as the network gives them.
        pose_refinement_depth_per_focal (`float`): Ours: the power of that factor by which depth and camera ways follow.
        align_room_to_walls (`bool`): Ours: whether the heading of the room frame is read off the reconstruction's walls; see `turn_to_walls`.
        num_scene_tokens (`int`): Scene-token slots N per video.
        voxel_size_m (`float`): Edge of the smallest pooling voxel, metres.
        position_embedding (`bool`): Whether the 3D position is added to the language stream (paper eq. 4).
        position_hidden_size (`int`): Ours: hidden width of the position MLPs.
        projector_hidden_size (`int`, *optional*): Ours: hidden width of the projector; the language model's width if not given.
        scene_token_scale (`float`): Ours: root mean square of scene tokens and point embeddings, that of the language model's word embeddings.
        box_output (`str`): `decoder` (grounding decoder) or `text` (six numbers in the answer).
        grounding_hidden_size (`int`): Ours: width of the grounding decoder.
        num_grounding_heads (`int`): Ours: attention heads of the grounding decoder.
        num_grounding_queries (`int`): Instance queries by farthest-point sampling (LLaVA-3D: 512).
        grounding_neighbors (`list[int]`): Nearest scene tokens that a query reads, one entry per decoder layer (LLaVA-3D: 16, 32, 64, 128).
        grounding_temperature (`float`): Ours: temperature of the matching score.
        max_boxes_per_loc (`int`): Ours: most boxes that one `<loc>` returns.
        initializer_range (`float`): Standard deviation of freshly drawn linear weights.

    Raises:
        ValueError: A switch has an unknown value, or two fields contradict each other.

    Source:
        Paper: sections 3.1 to 3.4. Ours: every line marked so.
    """

    model_type = "vidllm"
    # what a Trainer's evaluation must not gather over batches: everything but the logits
    keys_to_ignore_at_inference = [
        "last_hidden_state",
        "past_key_values",
        "hidden_states",
        "attentions",
        "attention_mask",
        "scene",
        "raw_reconstruction",
        "metric_depth_m",
        "grounding",
        "loc_index",
        "scene_index",
        "geom_tokens",
        "lang_tokens",
    ]
    # saving copies this file beside the config
    _auto_class: ClassVar[str] = "AutoConfig"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="dinov2_with_registers",
            init_kwargs={
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 518,
                "patch_size": 14,
            },
        ),
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="qwen2",
            init_kwargs={
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "vocab_size": 152064,
            },
        ),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    # tokens
    video_token_id: int = 151665
    coord_token_id: int = 151666
    loc_token_id: int = 151667
    tie_word_embeddings: bool = False
    # encoder
    shared_encoder: bool = True
    encoder_frame_chunk: int = 8
    metric_depth_layers: list[int] | None = None
    # cross-task adapter
    adapter_type: str = "bridge"
    num_bridge_tokens: int = 16
    num_adapter_layers: int = 1
    num_adapter_heads: int = 16
    adapter_expansion: int = 4
    bridge_scope: str = "scene"
    # reconstruction
    num_reconstruction_layers: int = 24
    num_reconstruction_heads: int = 16
    reconstruction_tap_layers: list[int] | None = None
    reconstruction_layer_scale: float = 0.01
    num_reconstruction_registers: int = 4
    rope_base: float = 100.0
    num_camera_layers: int = 4
    num_camera_heads: int = 16
    num_camera_iterations: int = 4
    camera_token_norm: str = "layer"
    dense_head_channels: list[int] | None = None
    dense_head_features: int = 256
    dense_frame_chunk: int = 8
    # metric depth
    use_metric_depth: bool = True
    use_scale_alignment: bool = True
    metric_decoder_features: int = 256
    num_depth_bins: int = 64
    min_depth_m: float = 0.1
    max_depth_m: float = 10.0
    num_scale_frames: int = 16
    is_metric: bool = False
    pose_refinement_sizes: list[int] | None = None
    pose_refinement_steps: int = 8
    pose_refinement_window: int = 8
    pose_refinement_depth_grid: list[int] | None = None
    pose_refinement_focal_spread: float = 0.0
    pose_refinement_depth_per_focal: float = 1.0
    align_room_to_walls: bool = False
    # scene tokens
    num_scene_tokens: int = 3072
    voxel_size_m: float = 0.2
    position_embedding: bool = True
    position_hidden_size: int = 1024
    projector_hidden_size: int | None = None
    scene_token_scale: float = 0.02
    # grounding
    box_output: str = "decoder"
    grounding_hidden_size: int = 256
    num_grounding_heads: int = 8
    num_grounding_queries: int = 512
    grounding_neighbors: list[int] | None = None
    grounding_temperature: float = 0.07
    max_boxes_per_loc: int = 8
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for part, names in (
            ("vision_config", ("hidden_size", "num_hidden_layers", "patch_size")),
            ("text_config", ("hidden_size", "vocab_size")),
        ):
            sub_config = getattr(self, part)
            missing = [name for name in names if not hasattr(sub_config, name)]
            if missing:
                raise ValueError(
                    f"{part}: wanted a model with {', '.join(names)}; got {sub_config.model_type!r} without {', '.join(missing)}"
                )
        if self.metric_depth_layers is None:
            self.metric_depth_layers = self._spread(self.vision_config.num_hidden_layers)
        if self.reconstruction_tap_layers is None:
            self.reconstruction_tap_layers = self._spread(self.num_reconstruction_layers)
        if self.dense_head_channels is None:
            self.dense_head_channels = [256, 512, 1024, 1024]
        if self.grounding_neighbors is None:
            self.grounding_neighbors = [16, 32, 64, 128]
        if self.pose_refinement_sizes is None:
            self.pose_refinement_sizes = []
        if self.pose_refinement_depth_grid is None:
            self.pose_refinement_depth_grid = []
        if self.text_config.tie_word_embeddings:
            self.tie_word_embeddings = True
        self._check()

    @staticmethod
    def _spread(num_layers: int) -> list[int]:
        """Four taps at the depths that VGGT uses (4, 11, 17, 23 of 24), for any number of layers."""
        return [max(0, min(num_layers - 1, round((tap + 1) * num_layers / 24) - 1)) for tap in (4, 11, 17, 23)]

    def _check(self) -> None:
        check_choice("adapter_type", self.adapter_type, ADAPTER_TYPES)
        check_choice("bridge_scope", self.bridge_scope, BRIDGE_SCOPES)
        check_choice("box_output", self.box_output, BOX_OUTPUTS)
        check_choice("camera_token_norm", self.camera_token_norm, CAMERA_TOKEN_NORMS)
        width = self.vision_config.hidden_size
        for heads, of, size in (
            ("num_adapter_heads", "vision_config.hidden_size", width),
            ("num_reconstruction_heads", "vision_config.hidden_size", width),
            ("num_camera_heads", "2 * vision_config.hidden_size", 2 * width),
            ("num_grounding_heads", "grounding_hidden_size", self.grounding_hidden_size),
        ):
            if size % getattr(self, heads):
                raise ValueError(f"{heads}: wanted a divisor of {of} = {size}; got {getattr(self, heads)}")
        if (width // self.num_reconstruction_heads) % 4:
            raise ValueError(
                f"num_reconstruction_heads: the 2D rotary embedding wants a head width that is a multiple of 4; "
                f"got {width} / {self.num_reconstruction_heads} = {width // self.num_reconstruction_heads}"
            )
        for name, wanted, limit in (
            ("metric_depth_layers", 4, self.vision_config.num_hidden_layers),
            ("reconstruction_tap_layers", 4, self.num_reconstruction_layers),
        ):
            taps = getattr(self, name)
            if len(taps) != wanted or any(not 0 <= tap < limit for tap in taps) or list(taps) != sorted(taps):
                raise ValueError(f"{name}: wanted {wanted} rising layer numbers in 0..{limit - 1}; got {taps}")
        if self.reconstruction_tap_layers[-1] != self.num_reconstruction_layers - 1:
            raise ValueError(
                "reconstruction_tap_layers: the last entry feeds the camera head and must be the last pair "
                f"{self.num_reconstruction_layers - 1}; got {self.reconstruction_tap_layers}"
            )
        if len(self.dense_head_channels) != 4:
            raise ValueError(f"dense_head_channels: wanted 4 numbers; got {self.dense_head_channels}")
        if not 0 < self.min_depth_m < self.max_depth_m:
            raise ValueError(
                f"min_depth_m, max_depth_m: wanted 0 < min < max; got {self.min_depth_m}, {self.max_depth_m}"
            )
        if self.use_scale_alignment and not self.use_metric_depth:
            # Without a metric decoder there is nothing to align with; the switch that removes it decides.
            self.use_scale_alignment = False
        positive = (
            "encoder_frame_chunk num_bridge_tokens num_adapter_layers adapter_expansion num_camera_layers num_camera_iterations "
            "dense_head_features dense_frame_chunk metric_decoder_features num_depth_bins num_scale_frames num_scene_tokens "
            "voxel_size_m position_hidden_size scene_token_scale num_grounding_queries grounding_temperature max_boxes_per_loc rope_base "
            "pose_refinement_steps pose_refinement_window"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: wanted a positive number; got {getattr(self, name)}")
        if any(size < 1 for size in self.pose_refinement_sizes):
            raise ValueError(f"pose_refinement_sizes: wanted positive numbers; got {self.pose_refinement_sizes}")
        grid = self.pose_refinement_depth_grid
        if grid and (len(grid) != 2 or min(grid) < 2 or not self.pose_refinement_sizes):
            raise ValueError(
                f"pose_refinement_depth_grid: wanted at least 2 rows and 2 columns, and pose_refinement_sizes; got {grid} and "
                f"{self.pose_refinement_sizes}"
            )
        spread, power = self.pose_refinement_focal_spread, self.pose_refinement_depth_per_focal
        if not (0 <= spread < math.inf and 0 <= power < math.inf) or (spread > 0 and not grid):
            raise ValueError(
                "pose_refinement_focal_spread, pose_refinement_depth_per_focal: wanted numbers of at least 0, and "
                f"pose_refinement_depth_grid beside a spread; got {spread}, {power}, {grid}"
            )
        if self.projector_hidden_size is not None and not self.projector_hidden_size > 0:
            raise ValueError(
                f"projector_hidden_size: wanted a positive number or none; got {self.projector_hidden_size}"
            )


__all__ = ["VidLLMConfig"]
