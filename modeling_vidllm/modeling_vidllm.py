"""Vid-LLM: from a video of a room to text, 3D boxes and a metric reconstruction.

`VidLLMModel.forward` reads top to bottom like the paper's Fig. 2.

Shapes: B videos, Q prompts, S frames, H W pixels, h w patch grid, P = h * w patches, C encoder width, N scene-token slots,
D language-model width, L text tokens, G `<loc>` tokens.
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .assembly_vidllm import assemble_reconstruction, check_given_geometry
from .configuration_vidllm import VidLLMConfig
from .cross_task_adapter_vidllm import VidLLMCrossTaskAdapter
from .encoder_vidllm import VidLLMEncoder
from .generation_vidllm import VidLLMGenerateOutput, VidLLMGenerationMixin, boxes_of_rows, fill_box_fields
from .grounding_vidllm import VidLLMGroundingDecoder, place_proposals
from .metric_depth_vidllm import VidLLMMetricDepth
from .outputs_vidllm import VidLLMModelOutput, VidLLMOutput
from .pose_refinement_vidllm import refine_reconstruction
from .prefix_attention_vidllm import decode_packed
from .prompt_vidllm import (
    check_placeholders,
    embed_prompt,
    is_token_mask,
    mask_empty_slots,
    position_ids_from_mask,
    resolve_scene_index,
)
from .ragged_vidllm import group_rows_by_size, ragged_masks, scatter_rows
from .reconstruction_vidllm import VidLLMReconstructor
from .room_heading_vidllm import align_room
from .scene_tokens_vidllm import VidLLMPointEmbedding, VidLLMSceneTokens, relative_point_scale
from .scene_vidllm import VidLLMReconstruction, VidLLMScene
from .shared_prefix_vidllm import check_prefix_arguments, shared_prefix


AUTO_MAP = {
    "AutoConfig": "configuration_vidllm.VidLLMConfig",
    "AutoModel": "modeling_vidllm.VidLLMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_vidllm.VidLLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_vidllm.VidLLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_vidllm.VidLLMForConditionalGeneration",
}
# Everything but the language model: what `modules_to_not_convert` / `llm_int8_skip_modules` must hold so that quantisation
# leaves the geometry alone.
MODULES_NOT_TO_QUANTISE = [
    "model.encoder",
    "model.language_encoder",
    "model.adapter",
    "model.reconstruction",
    "model.metric_depth",
    "model.scene_tokens",
    "model.point_embedding",
    "model.grounding",
    "lm_head",
]


class VidLLMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial values, shared by the model and its head.

    Source:
        Upstream: huggingface/transformers `PreTrainedModel`.
    """

    config_class = VidLLMConfig
    config: VidLLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = False
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]
    _no_split_modules = [
        "VidLLMReconstructionBlock",
        "VidLLMReconstructionTokens",
        "VidLLMEmptyPose",
        "VidLLMBridgeTokens",
        "VidLLMBridgeLayer",
        "VidLLMConcatSelfAttentionLayer",
        "VidLLMCrossAttentionLayer",
        "VidLLMMetricDepthDecoder",
        "VidLLMMetricBins",
        "VidLLMGroundingLayer",
        "VidLLMNoTarget",
    ]
    # geometry heads, learned tokens and bins: bfloat16 costs centimetres
    _keep_in_fp32_modules_strict = [
        "camera_head",
        "depth_head",
        "room_head",
        "reconstruction.tokens",
        "metric_depth",
        "grounding",
    ]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Without the shortcut for foreign code, which skips modules that set the weights of their children (zero gates)."""
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "init_weights") and not isinstance(module, PreTrainedModel):
            module.init_weights()

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> "VidLLMPreTrainedModel":
        """Load as transformers does, and align the weights in memory.

        Args:
            *args: As in transformers.
            **kwargs: As in transformers.

        Returns:
            The model, or what transformers returns with `output_loading_info=True`.

        Source:
            Ours: weights read from a memory-mapped file start at any multiple of 8 bytes, and matrix products of unaligned
            operands round differently in the last bit; copied to aligned memory, a loaded model equals the saved one exactly.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        getattr(
            model, "model", model
        )._restore_float32()  # parts that the checkpoint lacks are made in the model's dtype
        for tensor in [*model.parameters(), *model.buffers()]:
            if type(tensor.data) is torch.Tensor and tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()
        return loaded


class VidLLMModel(VidLLMPreTrainedModel):
    """Encoder, adapter, reconstruction, metric depth, scene tokens, language model, grounding decoder; no `lm_head`.

    Args:
        config (`VidLLMConfig`): Shapes and switches.

    Source:
        Paper: section 3, Fig. 2.
    """

    def __init__(self, config: VidLLMConfig):
        super().__init__(config)
        self.encoder = VidLLMEncoder(config)
        self.language_encoder = None if config.shared_encoder else VidLLMEncoder(config)
        self.adapter = VidLLMCrossTaskAdapter(config)
        self.reconstruction = VidLLMReconstructor(config)
        self.metric_depth = VidLLMMetricDepth(config) if config.use_metric_depth else None
        self.scene_tokens = VidLLMSceneTokens(config)
        self.point_embedding = VidLLMPointEmbedding(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.grounding = VidLLMGroundingDecoder(config) if config.box_output == "decoder" else None
        self.post_init()
        for encoder in (self.encoder, self.language_encoder):
            if encoder is not None:
                # transformers reads this list of direct children only; modules with both parameters and children need it most
                self._no_split_modules |= set(encoder.model._no_split_modules or [])
                self._no_split_modules |= {
                    type(module).__name__
                    for module in encoder.model.modules()
                    if next(module.parameters(recurse=False), None) is not None
                    and next(module.children(), None) is not None
                }

        self._restore_float32()  # `from_config(dtype=...)` builds everything in that dtype

    def _float32_parameters(self) -> dict:
        """Parameters that stay in float32 in a half-precision model, by name."""
        kept = VidLLMPreTrainedModel._keep_in_fp32_modules_strict
        return {name: p for name, p in self.named_parameters() if any(f"{part}." in f"{name}." for part in kept)}

    def _restore_float32(self, exact: dict | None = None) -> None:
        """Undo a cast to half precision of those parameters, from their exact values where these are known."""
        for name, parameter in self._float32_parameters().items():
            if parameter.dtype in (torch.bfloat16, torch.float16, torch.float64):
                source = parameter.data if exact is None or name not in exact else exact[name]
                parameter.data = source.to(parameter.device, torch.float32)

    def _apply(self, fn, recurse: bool = True):  # noqa: ANN001
        """`to(torch.bfloat16)` and `half()` cast the model as loading with that dtype would: geometry heads stay in float32."""
        exact = {name: parameter.data for name, parameter in self._float32_parameters().items()}
        super()._apply(fn, recurse)
        self._restore_float32(exact)
        return self

    # ------------------------------------------------------------------ video -> scene

    def _encode_group(
        self,
        pixel_values: torch.Tensor,
        geometry: dict | None,
        scale_frames: torch.Tensor | None,
        metric: bool | None,
        with_tokens: bool,
    ) -> tuple:
        """One group of equally sized videos `(B, S, 3, H, W)` -> scene, raw reconstruction, metric depth, both adapter streams."""
        batch, num_frames, _, height, width = pixel_values.shape
        grid_hw = self.encoder.grid_hw(height, width)
        exact_frames, pixel_values = pixel_values, pixel_values.to(self.dtype)
        frames = pixel_values.flatten(0, 1)  # (B, S, 3, H, W) -> (B * S, 3, H, W)

        def per_video(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.unflatten(0, (batch, num_frames))  # (B * S, P, C) -> (B, S, P, C)

        encoded = self.encoder(frames, return_layers=self.metric_depth is not None)
        base = per_video(encoded.patch_tokens)
        if self.language_encoder is None:
            language_base = base
        else:
            language_base = per_video(self.language_encoder(frames, return_layers=False).patch_tokens)

        geom_tokens, lang_tokens = self.adapter(base, language_base)
        raw = self.reconstruction(geom_tokens, grid_hw, (height, width))
        metric_depth_m = None
        if self.metric_depth is not None:
            layers = tuple(per_video(layer) for layer in encoded.layer_tokens)
            metric_depth_m = self.metric_depth(layers, grid_hw, (height, width))
        reconstruction = assemble_reconstruction(raw, metric_depth_m, self.config, geometry, scale_frames, metric)
        if self.config.pose_refinement_sizes:
            refine_reconstruction(reconstruction, exact_frames, geometry, self.config)
        if self.config.align_room_to_walls:
            align_room(reconstruction, geometry)
        scene = VidLLMScene(reconstruction=reconstruction)
        if with_tokens:
            scene = self._tokens_of(lang_tokens, reconstruction, grid_hw)
        return scene, raw, metric_depth_m, geom_tokens, lang_tokens

    def _tokens_of(self, lang_tokens: torch.Tensor, recon: VidLLMReconstruction, grid_hw: tuple) -> VidLLMScene:
        """Language stream `(B, S, P, C)` at its 3D places -> scene; no gradient into the geometry (paper 3.4)."""
        with torch.no_grad(), torch.autocast(device_type=lang_tokens.device.type, enabled=False):
            valid_mask = (recon.depth > 0) & torch.isfinite(recon.points_world).all(dim=-1)
            rotation = recon.room_from_world[:, None, None]  # (B, 3, 3) -> (B, 1, 1, 3, 3)
            points_room = recon.points_world @ rotation.transpose(-1, -2)
            position_scale = relative_point_scale(points_room, valid_mask)
            position_scale = torch.where(recon.metric_mask, torch.ones_like(position_scale), position_scale)
            points_room = points_room * position_scale[:, None, None, None, None]
        pooled = self.scene_tokens(lang_tokens, points_room, recon.depth_confidence, valid_mask, grid_hw)
        return VidLLMScene(
            tokens=pooled.tokens,
            positions=pooled.positions_room,
            mask=pooled.mask,
            position_scale=position_scale,
            reconstruction=recon,
        )

    def _encode(
        self,
        pixel_values_videos: torch.Tensor,
        video_size_shw: torch.Tensor | None,
        geometry: dict | None,
        scale_frames: torch.Tensor | None,
        metric: bool | None,
        with_tokens: bool = True,
    ) -> tuple:
        """`(B, S, 3, H, W)` padded for transport -> what `_encode_group` gives; each size runs unpadded."""
        if pixel_values_videos.ndim != 5 or pixel_values_videos.shape[2] != 3 or len(pixel_values_videos) == 0:
            raise ValueError(
                "pixel_values_videos: wanted shape (videos, frames, 3, height, width); "
                f"got {tuple(pixel_values_videos.shape)}"
            )
        batch, num_frames, _, height, width = pixel_values_videos.shape
        full_size = torch.tensor([num_frames, height, width])
        if video_size_shw is None:
            video_size_shw = full_size.repeat(batch, 1)
        sizes = video_size_shw.cpu()
        if sizes.is_floating_point():
            raise ValueError(f"video_size_shw: wanted whole numbers; got {sizes.dtype}")
        if tuple(sizes.shape) != (batch, 3) or (sizes < 1).any() or (sizes > full_size).any():
            raise ValueError(
                f"video_size_shw: wanted ({batch}, 3) with sizes in 1..{full_size.tolist()}; got {sizes.tolist()}"
            )
        if geometry:
            geometry = check_given_geometry(geometry, sizes)
            if sizes.max(dim=0).values.tolist() != full_size.tolist():
                raise ValueError("pixel_values_videos: wanted padding only up to the largest video")
        if scale_frames is not None:
            votes = scale_frames.cpu()
            if votes.ndim != 2 or len(votes) != batch or (votes < -1).any() or (votes >= sizes[:, :1]).any():
                raise ValueError(
                    f"scale_frames: wanted ({batch}, K) with frame numbers below {sizes[:, 0].tolist()} or -1; "
                    f"got {votes.tolist()}"
                )
        results = []
        for size, rows in group_rows_by_size(sizes):
            frames, rows_px, columns_px = size
            index = torch.tensor(rows, device=pixel_values_videos.device)
            group = pixel_values_videos
            if len(rows) != batch or list(size) != full_size.tolist():
                group = group.index_select(0, index)[:, :frames, :, :rows_px, :columns_px]
            if not torch.isfinite(group).all():
                raise ValueError(f"pixel_values_videos: wanted finite pixels; got NaN or infinity in videos {rows}")
            group_geometry = None
            if geometry:
                group_geometry = {}
                for name, value in geometry.items():
                    value = value[torch.tensor(rows, device=value.device)]
                    if name in ("cam_from_world", "intrinsics_px", "depth_m"):
                        value = value[:, :frames]
                    if name == "depth_m":
                        value = value[..., :rows_px, :columns_px]
                    group_geometry[name] = value
            group_scale_frames = (
                None if scale_frames is None else scale_frames.index_select(0, index.to(scale_frames.device))
            )
            results.append((rows, *self._encode_group(group, group_geometry, group_scale_frames, metric, with_tokens)))
        if len(results) == 1:
            return results[0][1:]
        scene, raw, metric_depth_m, geom_tokens, lang_tokens = (
            scatter_rows([(result[0], result[part]) for result in results], batch) for part in range(1, 6)
        )
        frame_mask, pixel_mask = ragged_masks(sizes.to(pixel_values_videos.device))
        recon = scene.reconstruction
        eye = torch.eye(4, device=recon.cam_from_world.device)
        # a padded frame has no camera: the identity keeps the matrix invertible
        recon.cam_from_world = torch.where(frame_mask[..., None, None], recon.cam_from_world, eye)
        recon.intrinsics_px = torch.where(frame_mask[..., None, None], recon.intrinsics_px, eye[:3, :3])
        scene.reconstruction.frame_mask = frame_mask
        scene.reconstruction.pixel_mask = pixel_mask
        return scene, raw, metric_depth_m, geom_tokens, lang_tokens

    # ------------------------------------------------------------------ <loc> -> boxes

    def _ground(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        scene: VidLLMScene,
        scene_index: torch.Tensor,
        proposal_boxes: torch.Tensor | None,
        proposal_mask: torch.Tensor | None,
        annotation_from_world: torch.Tensor | None,
    ) -> tuple:
        """Hidden states `(Q, L, D)` at `<loc>` tokens -> grounding output and their `(G, 2)` places."""
        where = (input_ids == self.config.loc_token_id) & (scene_index >= 0)[:, None]
        loc_index = where.nonzero()
        grounding = self.grounding(
            hidden_states[where],
            scene_index[loc_index[:, 0]],
            scene.tokens.to(hidden_states.device),
            scene.positions.to(hidden_states.device),
            scene.mask.to(hidden_states.device),
            *place_proposals(proposal_boxes, proposal_mask, annotation_from_world, scene, hidden_states.device),
        )
        return grounding, loc_index

    # ------------------------------------------------------------------ the flow

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_size_shw: torch.LongTensor | None = None,
        scene: VidLLMScene | None = None,
        scene_index: torch.LongTensor | None = None,
        coord_points_world: torch.FloatTensor | None = None,
        coord_mask: torch.BoolTensor | None = None,
        geometry: dict | None = None,
        scale_frames: torch.LongTensor | None = None,
        metric: bool | None = None,
        proposal_boxes: torch.FloatTensor | None = None,
        proposal_mask: torch.BoolTensor | None = None,
        annotation_from_world: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_scene_tokens: bool = True,
        output_grounding: bool = True,
        output_adapter_tokens: bool = False,
        share_prefix: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VidLLMModelOutput:
        """From pixels and prompts to hidden states, geometry and boxes.

        Args:
            input_ids (`torch.LongTensor` of shape `(Q, L)`, *optional*): Prompts with N video placeholders each. None: only the video is encoded.
            attention_mask (`torch.Tensor` of shape `(Q, L)` or `(Q, past + L)`, *optional*): 1 = real token.
            position_ids (`torch.LongTensor` of shape `(Q, L)`, *optional*): By default counted over the mask with empty slots left out.
            past_key_values (`Cache`, *optional*): Language model's cache.
            inputs_embeds (`torch.FloatTensor` of shape `(Q, L, D)`, *optional*): Ready embeddings in place of `input_ids`.
            pixel_values_videos (`torch.FloatTensor` of shape `(B, S, 3, H, W)`, *optional*): Normalised by the processor.
            video_size_shw (`torch.LongTensor` of shape `(B, 3)`, *optional*): Frames, height, width of each video without padding.
            scene (`VidLLMScene`, *optional*): Encoded before; instead of pixels.
            scene_index (`torch.LongTensor` of shape `(Q,)`, *optional*): Video of each prompt, -1 = text only.
            coord_points_world (`torch.FloatTensor` of shape `(Q, M, 3)`, *optional*): Points of the `<coord>` tokens, world frame, in the
                reconstruction's unit.
            coord_mask (`torch.BoolTensor` of shape `(Q, M)`, *optional*): Real points.
            geometry (`dict`, *optional*): Given poses, intrinsics, depth, see `check_given_geometry`.
            scale_frames (`torch.LongTensor` of shape `(B, K)`, *optional*): Frames that vote for the scale, -1 = unused.
            metric (`bool`, *optional*): See `assemble_reconstruction`.
            proposal_boxes (`torch.FloatTensor` of shape `(B, M, 6)`, *optional*): Candidate boxes, room frame, in the reconstruction's
                unit; the decoder chooses among them.
            proposal_mask (`torch.BoolTensor` of shape `(B, M)`, *optional*): Real proposals.
            annotation_from_world (`torch.FloatTensor` of shape `(B, 4, 4)`, *optional*): The proposals are in this frame instead, as
                annotated ones are when a model is trained, which predicts the room frame only on its way.
            use_cache (`bool`, *optional*): Return the language model's cache.
            output_scene_tokens (`bool`): False stops after the reconstruction.
            output_grounding (`bool`): False skips the grounding decoder.
            output_adapter_tokens (`bool`): True returns both streams of the adapter, for losses on them.
            share_prefix (`bool`): True lets the prompts of a video share what they begin with, scene tokens included: the same hidden states for
                a fraction of the work. Without cache, for prompts padded on the right.
            kwargs: Passed to the language model (`output_hidden_states`, `output_attentions`, ...).

        Returns:
            [`VidLLMModelOutput`].

        Raises:
            ValueError: Inputs contradict each other; the message names what, wanted and got.

        Source:
            Paper: Fig. 2.
        """
        if pixel_values_videos is not None and scene is not None:
            raise ValueError("wanted pixel_values_videos or scene; got both")
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("wanted input_ids or inputs_embeds; got both")
        if scene is not None and torch.is_grad_enabled() and scene.tokens.is_inference():
            scene = scene._map(torch.clone)  # encoded under inference_mode: autograd takes copies only
        raw = metric_depth_m = geom_tokens = lang_tokens = None
        if pixel_values_videos is not None:
            scene, raw, metric_depth_m, geom_tokens, lang_tokens = self._encode(
                pixel_values_videos, video_size_shw, geometry, scale_frames, metric, output_scene_tokens
            )
        elif geometry is not None:
            raise ValueError("geometry: wanted together with pixel_values_videos; got it without")
        output = VidLLMModelOutput(scene=scene, raw_reconstruction=raw, metric_depth_m=metric_depth_m)
        if output_adapter_tokens:
            output.geom_tokens, output.lang_tokens = geom_tokens, lang_tokens
        if input_ids is None and inputs_embeds is None:
            if scene is None:
                raise ValueError("forward: wanted input_ids, inputs_embeds or pixel_values_videos; got none of them")
            return output

        plan = None
        if share_prefix:
            cached = bool(use_cache) or past_key_values is not None
            check_prefix_arguments(self.language_model, input_ids, attention_mask, position_ids, cached, kwargs)
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            plan = shared_prefix(input_ids, attention_mask, scene, scene_index, self.config.coord_token_id)
        if input_ids is not None:
            past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
            if scene is not None:
                if scene.tokens is None:
                    raise ValueError("output_scene_tokens: wanted True where there are prompts; got False")
                scene_index = resolve_scene_index(input_ids.shape[0], scene, scene_index, input_ids.device)
                if past_length == 0:
                    check_placeholders(input_ids, scene, scene_index, self.config.video_token_id)
                if attention_mask is None:
                    attention_mask = input_ids.new_ones(input_ids.shape[0], past_length + input_ids.shape[1])
                if is_token_mask(attention_mask):
                    attention_mask = mask_empty_slots(
                        input_ids, attention_mask, scene, scene_index, self.config.video_token_id
                    )
            elif past_length == 0 and (input_ids == self.config.video_token_id).any():
                raise ValueError(
                    f"input_ids: prompts hold video placeholders (token {self.config.video_token_id}); wanted pixel_values_videos or scene; got neither"
                )
            elif past_length == 0 and (input_ids == self.config.coord_token_id).any():
                raise ValueError(
                    f"input_ids: prompts hold points (coord token {self.config.coord_token_id}), which need a scene; got none"
                )
            inputs_embeds = embed_prompt(
                input_ids,
                self.get_input_embeddings(),
                self.point_embedding,
                scene,
                scene_index,
                coord_points_world,
                coord_mask,
                self.config.video_token_id,
                self.config.coord_token_id,
            )
        if position_ids is None and is_token_mask(attention_mask):
            position_ids = position_ids_from_mask(attention_mask)[:, -inputs_embeds.shape[1] :]

        if plan is None:
            decoded = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        else:
            decoded = decode_packed(self.language_model, plan, inputs_embeds, attention_mask, kwargs)
        output.last_hidden_state = decoded.last_hidden_state
        output.past_key_values = decoded.past_key_values
        output.hidden_states = decoded.hidden_states
        output.attentions = decoded.attentions
        output.attention_mask = attention_mask
        output.scene_index = scene_index
        if self.grounding is not None and output_grounding and scene is not None and input_ids is not None:
            output.grounding, output.loc_index = self._ground(
                decoded.last_hidden_state,
                input_ids,
                scene,
                scene_index,
                proposal_boxes,
                proposal_mask,
                annotation_from_world,
            )
        return output


class VidLLMForConditionalGeneration(VidLLMPreTrainedModel, VidLLMGenerationMixin):
    """Vid-LLM with its language-model head: `generate`, `encode_scene`, `reconstruct`, training forward.

    Args:
        config (`VidLLMConfig`): Shapes and switches.

    Source:
        Paper: section 3, Fig. 2.
    """

    # saving copies the code files beside the weights
    _auto_class = "AutoModel"
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: VidLLMConfig):
        super().__init__(config)
        self.model = VidLLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embedding = self.model.get_input_embeddings()
        # most language models call it embed_tokens, GPT-2 wte, OPT decoder.embed_tokens
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save as transformers does, with an `auto_map` that names every Auto class.

        Args:
            save_directory (`str`): Folder to write.
            kwargs: As in transformers.

        Source:
            Ours: `register_for_auto_class` remembers a single Auto class.
        """
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def encode_scene(
        self,
        pixel_values_videos: torch.FloatTensor,
        video_size_shw: torch.LongTensor | None = None,
        geometry: dict | None = None,
    ) -> VidLLMScene:
        """Encode videos once, to ask them often.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(B, S, 3, H, W)`): Normalised by the processor.
            video_size_shw (`torch.LongTensor` of shape `(B, 3)`, *optional*): Frames, height, width of each video without padding.
            geometry (`dict`, *optional*): Given poses, intrinsics, depth (metres); see `check_given_geometry`.

        Returns:
            [`VidLLMScene`]: scene tokens and reconstruction, batch-first.

        Raises:
            ValueError: Inputs of wrong shape or a wrong given pose; the message names the frame.

        Source:
            Paper: Fig. 2, up to the language model. Ours: given geometry.
        """
        return self.model(
            pixel_values_videos=pixel_values_videos, video_size_shw=video_size_shw, geometry=geometry, return_dict=True
        ).scene

    @torch.no_grad()
    def reconstruct(
        self,
        pixel_values_videos: torch.FloatTensor,
        video_size_shw: torch.LongTensor | None = None,
        metric: bool | None = None,
        geometry: dict | None = None,
    ) -> VidLLMReconstruction:
        """Poses, depth and points, without scene tokens and language model.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(B, S, 3, H, W)`): Normalised by the processor.
            video_size_shw (`torch.LongTensor` of shape `(B, 3)`, *optional*): Frames, height, width of each video without padding.
            metric (`bool`, *optional*): True demands metres, False leaves relative units, None gives metres where the weights can.
            geometry (`dict`, *optional*): Given poses, intrinsics, depth (metres).

        Returns:
            [`VidLLMReconstruction`].

        Raises:
            ValueError: `metric=True` for weights that were not trained for metres; wrong inputs.

        Source:
            Paper: section 3.2.
        """
        output = self.model(
            pixel_values_videos=pixel_values_videos,
            video_size_shw=video_size_shw,
            metric=metric,
            geometry=geometry,
            output_scene_tokens=False,
            return_dict=True,
        )
        return output.scene.reconstruction

    def get_video_features(
        self,
        pixel_values_videos: torch.FloatTensor,
        video_size_shw: torch.LongTensor | None = None,
        geometry: dict | None = None,
    ) -> BaseModelOutputWithPooling:
        """Projected scene tokens, under transformers' usual name.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(B, S, 3, H, W)`): Normalised by the processor.
            video_size_shw (`torch.LongTensor` of shape `(B, 3)`, *optional*): Frames, height, width of each video without padding.
            geometry (`dict`, *optional*): Given poses, intrinsics, depth (metres).

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` holds the tokens `(B, N, D)`; empty slots are 0.

        Source:
            Upstream: huggingface/transformers composite models (name and type).
        """
        scene = self.model(
            pixel_values_videos=pixel_values_videos, video_size_shw=video_size_shw, geometry=geometry, return_dict=True
        ).scene
        return BaseModelOutputWithPooling(last_hidden_state=scene.tokens, pooler_output=scene.tokens)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_size_shw: torch.LongTensor | None = None,
        scene: VidLLMScene | None = None,
        scene_index: torch.LongTensor | None = None,
        coord_points_world: torch.FloatTensor | None = None,
        coord_mask: torch.BoolTensor | None = None,
        geometry: dict | None = None,
        scale_frames: torch.LongTensor | None = None,
        metric: bool | None = None,
        proposal_boxes: torch.FloatTensor | None = None,
        proposal_mask: torch.BoolTensor | None = None,
        annotation_from_world: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_scene_tokens: bool = True,
        output_grounding: bool = True,
        output_adapter_tokens: bool = False,
        share_prefix: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VidLLMOutput:
        """One forward for training and decoding; arguments as in [`VidLLMModel.forward`], labels, and kept logits.

        Args:
            input_ids (`torch.LongTensor` of shape `(Q, L)`, *optional*): Prompts, see [`VidLLMModel.forward`] for it and what follows.
            attention_mask (`torch.Tensor` of shape `(Q, L)`, *optional*): 1 = real token.
            position_ids (`torch.LongTensor` of shape `(Q, L)`, *optional*): Positions.
            past_key_values (`Cache`, *optional*): Language model's cache.
            inputs_embeds (`torch.FloatTensor` of shape `(Q, L, D)`, *optional*): Ready embeddings.
            pixel_values_videos (`torch.FloatTensor` of shape `(B, S, 3, H, W)`, *optional*): Videos.
            video_size_shw (`torch.LongTensor` of shape `(B, 3)`, *optional*): Sizes without padding.
            scene (`VidLLMScene`, *optional*): Encoded before.
            scene_index (`torch.LongTensor` of shape `(Q,)`, *optional*): Video of each prompt, -1 = text only.
            coord_points_world (`torch.FloatTensor` of shape `(Q, M, 3)`, *optional*): Points in prompts, world frame.
            coord_mask (`torch.BoolTensor` of shape `(Q, M)`, *optional*): Real points.
            geometry (`dict`, *optional*): Given poses, intrinsics, depth.
            scale_frames (`torch.LongTensor` of shape `(B, K)`, *optional*): Frames that vote for the scale.
            metric (`bool`, *optional*): Demand or refuse metres.
            proposal_boxes (`torch.FloatTensor` of shape `(B, M, 6)`, *optional*): Candidate boxes, room frame.
            proposal_mask (`torch.BoolTensor` of shape `(B, M)`, *optional*): Real proposals.
            annotation_from_world (`torch.FloatTensor` of shape `(B, 4, 4)`, *optional*): Frame of the proposals, if not the room.
            labels (`torch.LongTensor` of shape `(Q, L)`, *optional*): Next-token targets, -100 = ignored.
            use_cache (`bool`, *optional*): Return the cache.
            output_scene_tokens (`bool`): False stops after the reconstruction.
            output_grounding (`bool`): False skips the grounding decoder.
            output_adapter_tokens (`bool`): True returns both streams of the adapter, for losses on them.
            share_prefix (`bool`): True lets the prompts of a video share what they begin with, scene tokens included: the same hidden states for
                a fraction of the work. Without cache, for prompts padded on the right.
            logits_to_keep (`int` or `torch.Tensor` of shape `(kept,)`, int64): Last positions for which logits are computed, 0 = all; or
                their indices.
            kwargs: transformers' own (`output_hidden_states`, `num_items_in_batch`, ...); anything else is refused.

        Returns:
            [`VidLLMOutput`].

        Raises:
            ValueError: Inputs contradict each other, or an argument has an unknown name.

        Source:
            Paper: Fig. 2; eq. 8 for what the losses read.
        """
        unknown = sorted(set(kwargs) - set(TransformersKwargs.__optional_keys__) - {"cache_position", "return_dict"})
        if unknown:
            raise ValueError(f"forward: unknown argument {', '.join(unknown)}")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            video_size_shw=video_size_shw,
            scene=scene,
            scene_index=scene_index,
            coord_points_world=coord_points_world,
            coord_mask=coord_mask,
            geometry=geometry,
            scale_frames=scale_frames,
            metric=metric,
            proposal_boxes=proposal_boxes,
            proposal_mask=proposal_mask,
            annotation_from_world=annotation_from_world,
            use_cache=use_cache,
            output_scene_tokens=output_scene_tokens,
            output_grounding=output_grounding,
            output_adapter_tokens=output_adapter_tokens,
            share_prefix=share_prefix,
            return_dict=True,
            **kwargs,
        )
        loss = logits = None
        if outputs.last_hidden_state is not None:
            # -0 keeps everything
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
            if labels is not None:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
                )
        return VidLLMOutput(loss=loss, logits=logits, **dict(outputs.items()))

    def boxes_of(self, outputs: VidLLMOutput) -> VidLLMGenerateOutput:
        """Boxes of a forward pass whose prompts end in `<loc>`, in the form that `post_process_grounding` takes.

        Args:
            outputs (`VidLLMOutput`): Of a forward with a scene and `output_grounding=True`.

        Returns:
            [`VidLLMGenerateOutput`]: `boxes`, `box_scores`, `box_token_index`, `no_target_scores`, `scene`.

        Raises:
            ValueError: The model has no grounding decoder, or the forward had no scene.

        Source:
            Ours: asking for a box needs no decoding when the question is known to be one for a box.
        """
        if outputs.grounding is None or outputs.scene is None:
            raise ValueError("boxes_of: wanted the output of a forward with a scene and a grounding decoder; got none")
        num_rows = outputs.attention_mask.shape[0]
        scene_index = resolve_scene_index(num_rows, outputs.scene, outputs.scene_index, outputs.attention_mask.device)
        found = boxes_of_rows(self.config, outputs, outputs.scene, scene_index, num_rows)
        result = VidLLMGenerateOutput(scene=outputs.scene, scene_index=scene_index)
        fill_box_fields(result, [found[row] for row in range(num_rows)], outputs.attention_mask.device)
        return result


__all__ = ["VidLLMForConditionalGeneration", "VidLLMModel", "VidLLMPreTrainedModel"]
