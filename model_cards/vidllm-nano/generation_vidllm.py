"""Generation: encode once, mask empty slots, reuse the prefix of a kept scene, turn `<loc>` into boxes.

Shapes: Q prompts, R returned sequences, L text tokens, N scene-token slots, M boxes of a row.
"""

import copy
import weakref
from dataclasses import dataclass

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerateBeamDecoderOnlyOutput

from .grounding_vidllm import select_boxes
from .prompt_vidllm import check_placeholders, mask_empty_slots, resolve_scene_index
from .scene_vidllm import VidLLMScene


# Kept prefixes per scene object: as many as there are system prompts in use, usually one.
MAX_KEPT_PREFIXES = 8


@dataclass
class VidLLMGenerateOutput(GenerateBeamDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` returns: transformers' fields, and boxes.

    Args:
        sequences (`torch.LongTensor` of shape `(R, L + new)`, *optional*): Prompts as they were given, then the new tokens.
        boxes (`torch.Tensor` of shape `(R, M, 6)`, *optional*): `(cx, cy, cz, dx, dy, dz)`, room frame, in `box_unit`; rows are filled from the
            front, by place of the `<loc>` and then by score.
        box_scores (`torch.Tensor` of shape `(R, M)`, *optional*): Matching probability in 0..1.
        box_token_index (`torch.Tensor` of shape `(R, M)`, int64, *optional*): Column of `sequences` with the `<loc>` that gave the box, -1 = no box.
        no_target_scores (`torch.Tensor` of shape `(R, M)`, *optional*): Probability that the `<loc>` means nothing in the room, same scale.
        scene (`VidLLMScene`, *optional*): What was asked.
        scene_index (`torch.Tensor` of shape `(R,)`, int64, *optional*): Its row for each sequence, -1 = text only.

    Source:
        Ours.
    """

    sequences: torch.LongTensor | None = None
    boxes: torch.Tensor | None = None
    box_scores: torch.Tensor | None = None
    box_token_index: torch.Tensor | None = None
    no_target_scores: torch.Tensor | None = None
    scene: VidLLMScene | None = None
    scene_index: torch.Tensor | None = None

    @property
    def box_unit(self) -> str:
        """`"m"` or `"relative"`."""
        return "relative" if self.scene is None else self.scene.reconstruction.unit


class _Same:
    """Equal only to itself of the same living object: a number from `id()` is given to another one once it is free."""

    def __init__(self, thing: object):
        self.reference = weakref.ref(thing)

    def __eq__(self, other: object) -> bool:
        thing = self.reference()
        return isinstance(other, _Same) and thing is not None and thing is other.reference()

    __hash__ = None


class VidLLMGenerationMixin(GenerationMixin):
    """`generate` for a model that answers about an encoded video.

    Source:
        Upstream: huggingface/transformers `GenerationMixin` (decoding). Ours: scenes, prefix reuse, boxes.
    """

    def _setting(self, name: str, generation_config, kwargs: dict):  # noqa: ANN001
        """A generation setting, from the call, the given config or the model's own."""
        if kwargs.get(name) is not None:
            return kwargs[name]
        value = getattr(generation_config, name, None)
        return getattr(self.generation_config, name, None) if value is None else value

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config=None,  # noqa: ANN001
        *,
        scene: VidLLMScene | None = None,
        scene_index: torch.LongTensor | None = None,
        pixel_values_videos: torch.FloatTensor | None = None,
        video_size_shw: torch.LongTensor | None = None,
        geometry: dict | None = None,
        coord_points_world: torch.FloatTensor | None = None,
        coord_mask: torch.BoolTensor | None = None,
        proposal_boxes: torch.FloatTensor | None = None,
        proposal_mask: torch.BoolTensor | None = None,
        **kwargs,
    ) -> torch.LongTensor | VidLLMGenerateOutput:
        """Answer prompts about videos or about a scene that was encoded before.

        Args:
            inputs (`torch.LongTensor` of shape `(Q, L)`, *optional*): Left-padded prompts; `input_ids=` serves as well.
            generation_config (`GenerationConfig`, *optional*): As in transformers.
            scene (`VidLLMScene`, *optional*): Instead of pixels; its language-model prefix is computed once and reused.
            scene_index (`torch.LongTensor` of shape `(Q,)`, *optional*): Row of each prompt, -1 = text only.
            pixel_values_videos (`torch.FloatTensor` of shape `(B, S, 3, H, W)`, *optional*): Normalised by the processor.
            video_size_shw (`torch.LongTensor` of shape `(B, 3)`, *optional*): Size of each video without padding.
            geometry (`dict`, *optional*): Given poses, intrinsics, depth; see `check_given_geometry`.
            coord_points_world (`torch.FloatTensor` of shape `(Q, M, 3)`, *optional*): Points in the prompts, world frame, in the reconstruction's unit.
            coord_mask (`torch.BoolTensor` of shape `(Q, M)`, *optional*): Real points.
            proposal_boxes (`torch.FloatTensor` of shape `(B, M, 6)`, *optional*): Candidate boxes per video, room frame, in the
                reconstruction's unit; the boxes that come back are then among them.
            proposal_mask (`torch.BoolTensor` of shape `(B, M)`, *optional*): Real proposals.
            kwargs: Everything that transformers' `generate` takes.

        Returns:
            `torch.LongTensor` of shape `(R, L + new)`, or [`VidLLMGenerateOutput`] with `return_dict_in_generate=True`.

        Raises:
            ValueError: Inputs contradict each other.

        Source:
            Ours: the video is encoded before decoding starts, so that beams never copy pixels.
        """
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if input_ids is None:
            raise ValueError(
                "generate: wanted input_ids; got none (video and question go through the processor's apply_chat_template)"
            )
        for name in ("scale_frames", "metric"):
            if kwargs.get(name) is not None:
                raise ValueError(f"generate: {name}: wanted in a forward or in reconstruct; got it here")
        if pixel_values_videos is not None:
            if scene is not None:
                raise ValueError("generate: wanted pixel_values_videos or scene; got both")
            fresh = self.encode_scene(pixel_values_videos, video_size_shw, geometry=geometry)
        elif geometry is not None:
            raise ValueError("generate: geometry: wanted together with pixel_values_videos; got it without")
        else:
            fresh = None
        suppressed = list(self._setting("suppress_tokens", generation_config, kwargs) or [])
        # placeholders stand for inputs; the model never writes them
        suppressed = sorted({*suppressed, self.config.video_token_id, self.config.coord_token_id})
        if generation_config is None:
            kwargs["suppress_tokens"] = suppressed
        else:
            # transformers warns of a config beside loose settings
            kwargs.pop("suppress_tokens", None)
            generation_config = copy.deepcopy(generation_config)
            generation_config.suppress_tokens = suppressed
        known = scene if fresh is None else fresh
        if known is None:
            if coord_points_world is not None:
                raise ValueError("coord_points_world: a point in a prompt needs a scene; got a prompt without one")
            return super().generate(input_ids, generation_config=generation_config, **kwargs)

        scene_index = resolve_scene_index(input_ids.shape[0], known, scene_index, input_ids.device)
        attention_mask = kwargs.pop("attention_mask", None)
        if attention_mask is None:
            attention_mask = self._mask_of_padding(input_ids, generation_config, kwargs)
        if kwargs.get("past_key_values") is None:
            check_placeholders(input_ids, known, scene_index, self.config.video_token_id)
        attention_mask = mask_empty_slots(input_ids, attention_mask, known, scene_index, self.config.video_token_id)
        prompt = {
            "scene": known,
            "scene_index": scene_index,
            "coord_points_world": coord_points_world,
            "coord_mask": coord_mask,
        }
        layout = None
        if scene is not None and self._may_reuse_prefix(generation_config, kwargs):
            layout = self._lay_out_prefix(input_ids, attention_mask, scene, scene_index)
        if layout is None:
            output = super().generate(
                input_ids, generation_config=generation_config, attention_mask=attention_mask, **prompt, **kwargs
            )
        else:
            laid_ids, laid_mask, cache = layout
            # lengths count the caller's prompt, not the layout
            settings = kwargs if generation_config is None else generation_config.__dict__
            for name in ("max_length", "min_length"):
                length = self._setting(name, generation_config, kwargs)
                if length and self._setting(name.replace("length", "new_tokens"), generation_config, kwargs) is None:
                    kwargs.pop(name, None)
                    settings[name] = length + laid_ids.shape[1] - input_ids.shape[1]
            output = super().generate(
                laid_ids,
                generation_config=generation_config,
                attention_mask=laid_mask,
                past_key_values=cache,
                **prompt,
                **kwargs,
            )
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            returned = sequences.shape[0] // input_ids.shape[0]
            # the caller's own layout again: [their prompt | new tokens]
            new_tokens = sequences[:, laid_ids.shape[1] :]
            sequences = torch.cat(
                [input_ids.to(sequences.device).repeat_interleave(returned, dim=0), new_tokens], dim=1
            )
            if isinstance(output, torch.Tensor):
                return sequences
            found = {**output, "sequences": sequences}
            if not torch.equal(laid_mask, attention_mask):
                found.pop("past_key_values", None)  # its columns are not those of the sequences
            output = type(output)(**found)
        if isinstance(output, torch.Tensor):
            return output
        return self._with_boxes(output, input_ids, attention_mask, prompt, proposal_boxes, proposal_mask)

    def _mask_of_padding(self, input_ids: torch.Tensor, generation_config, kwargs: dict) -> torch.Tensor:  # noqa: ANN001
        """The mask that transformers infers where none is given: padding is masked if it cannot be an end of text."""
        pad = self._setting("pad_token_id", generation_config, kwargs)
        ends = self._setting("eos_token_id", generation_config, kwargs)
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        if not isinstance(pad, int) or pad in ends:
            return torch.ones_like(input_ids)
        return (input_ids != pad).long()

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration: bool | None = False, **kwargs):  # noqa: ANN001, ANN201
        """Transformers' hook: the scene goes in at the first step only (or at each, without a cache).

        Source:
            Upstream: huggingface/transformers `GenerationMixin.prepare_inputs_for_generation`.
        """
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("scene", "scene_index", "coord_points_world", "coord_mask"):
                kwargs.pop(name, None)
        kwargs["output_grounding"] = False
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        points = inputs.get("coord_points_world")
        cached = 0 if inputs.get("input_ids") is None else input_ids.shape[1] - inputs["input_ids"].shape[1]
        if points is not None and cached > 0:
            # the caller's cache holds the beginning of the prompt, and the points in it
            spent = (input_ids[:, :cached] == self.config.coord_token_id).sum(dim=1, keepdim=True)
            mask = inputs.get("coord_mask")
            mask = torch.ones(points.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            inputs["coord_mask"] = mask & (mask.cumsum(dim=1) > spent.to(mask.device))
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs,
    ) -> tuple:
        """The scene is not copied for beams (`scene_index` is); a ready prefix cache is."""
        cache = model_kwargs.get("past_key_values")
        if expand_size > 1 and cache is not None and cache.get_seq_length() > 0:
            cache.batch_repeat_interleave(expand_size)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    # ------------------------------------------------------------------ prefix reuse

    def _may_reuse_prefix(self, generation_config, kwargs: dict) -> bool:  # noqa: ANN001
        """Only plain cached decoding starts from a ready dynamic cache."""
        if self.training or kwargs.get("past_key_values") is not None or kwargs.get("inputs_embeds") is not None:
            return False
        if self._setting("use_cache", generation_config, kwargs) is False:
            return False
        blocking = (
            "cache_implementation",
            "prefill_chunk_size",
            "assistant_model",
            "prompt_lookup_num_tokens",
            "custom_generate",
            "negative_prompt_ids",
            "guidance_scale",
        )
        if any(
            self._setting(name, generation_config, kwargs) for name in ("output_hidden_states", "output_attentions")
        ):
            return False  # the caller wants those of the whole prompt, in its own layout
        return all(self._setting(name, generation_config, kwargs) is None for name in blocking)

    def _prefix_state(self, scene: VidLLMScene) -> tuple:
        """Changes whenever the language model would compute another prefix over this scene."""
        versions, samples, adapters = 0, [], []
        for module in self.model.language_model.modules():
            active = getattr(module, "active_adapters", None)
            if isinstance(active, (list, tuple)):  # a PEFT layer; models carry a method of that name
                # not every kind of PEFT layer has every one of these
                names = ("disable_adapters", "merged", "scaling")
                adapters.append((tuple(active), *(getattr(module, name, None) for name in names)))
            for parameter in module.parameters(recurse=False):
                versions += 0 if parameter.is_inference() else parameter._version
                # fused optimisers and `parameter.data` leave the version alone; quantised tensors are of other types
                if type(parameter.data) is torch.Tensor and not parameter.is_meta and parameter.numel():
                    flat = parameter.detach().flatten()
                    sample = flat[:: max(1, flat.numel() // 8)][:8].float()
                    samples.append(sample.to(samples[0].device if samples else sample.device))
        fields = [
            (_Same(field), 0 if field.is_inference() else field._version) for field in (scene.tokens, scene.mask)
        ]
        values = torch.cat(samples).tolist() if samples else []
        return _Same(self), self.dtype, str(self.device), versions, values, str(adapters), fields

    def _lay_out_prefix(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, scene: VidLLMScene, scene_index: torch.Tensor
    ) -> tuple | None:
        """Prompts `(Q, L)` -> ids and mask laid out as [prefix | pad | question], and the filled cache; None if not possible."""
        placeholder_mask = input_ids == self.config.video_token_id
        coord_mask = input_ids == self.config.coord_token_id
        slots = mask_empty_slots(input_ids, torch.ones_like(input_ids), scene, scene_index, self.config.video_token_id)
        if (attention_mask != slots)[placeholder_mask].any():
            return None  # the caller masks filled slots
        prefixes, questions = [], []
        for row in range(input_ids.shape[0]):
            real = attention_mask[row].bool() | placeholder_mask[row]
            if not real[-1]:
                return None  # not left-padded
            start = int(real.int().argmax())
            if not real[start:].all():
                return None  # the caller masks tokens inside the prompt: a shared prefix would ignore that
            places = placeholder_mask[row].nonzero()
            end = int(places[-1]) + 1 if len(places) else start
            if end == input_ids.shape[1] or coord_mask[row, :end].any():
                return None  # nothing follows the video, or a point precedes it
            prefixes.append((int(scene_index[row]), tuple(input_ids[row, start:end].tolist())))
            questions.append(input_ids[row, end:])
        if not any(tokens for _, tokens in prefixes):
            return None
        state = self._prefix_state(scene)
        filled = {}
        for key in dict.fromkeys(prefixes):
            if key[1]:
                filled[key] = self._prefix_cache(scene, key, state, input_ids.device)
                if filled[key] is None:
                    return None
        pad_id = next(
            (
                value
                for value in (self.generation_config.pad_token_id, self.generation_config.eos_token_id)
                if isinstance(value, int)
            ),
            0,
        )
        prefix_length = max(len(tokens) for _, tokens in prefixes)
        question_length = max(len(question) for question in questions)
        laid_ids = input_ids.new_full((len(prefixes), prefix_length + question_length), pad_id)
        laid_mask = attention_mask.new_zeros(laid_ids.shape)
        for row, ((_, tokens), question) in enumerate(zip(prefixes, questions, strict=True)):
            first = prefix_length - len(tokens)
            laid_ids[row, first:prefix_length] = input_ids.new_tensor(tokens)
            laid_mask[row, first:prefix_length] = 1
            laid_ids[row, laid_ids.shape[1] - len(question) :] = question
            laid_mask[row, laid_ids.shape[1] - len(question) :] = 1
        laid_mask = mask_empty_slots(laid_ids, laid_mask, scene, scene_index, self.config.video_token_id)

        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        shapes = next(iter(filled.values()))
        for layer in range(len(shapes)):
            keys, values = [], []
            for key in prefixes:
                for kept, which in ((keys, 0), (values, 1)):
                    example = shapes[layer][which]
                    states = filled[key][layer][which] if key[1] else example[:, :, :0]
                    gap = prefix_length - states.shape[2]
                    kept.append(torch.nn.functional.pad(states, (0, 0, gap, 0)) if gap else states)
            cache.update(torch.cat(keys), torch.cat(values), layer)
        return laid_ids, laid_mask, cache

    def _prefix_cache(self, scene: VidLLMScene, key: tuple, state: tuple, device: torch.device) -> list | None:
        """Keys and values of one prefix, one pair `(1, heads, tokens, head_dim)` per layer; None for caches of another kind."""
        kept = scene.prefix_caches.get(key)
        if kept is not None and kept[0] == state:
            return kept[1]
        row, tokens = key
        ids = torch.tensor([tokens], device=device)
        # a cache of its own: transformers' class for this model decides the kinds of layers
        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        output = self.model(
            input_ids=ids,
            scene=scene.select(row),
            past_key_values=cache,
            use_cache=True,
            output_grounding=False,
            return_dict=True,
        )
        cache = output.past_key_values
        plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
        states = [(layer.keys, layer.values) for layer in cache.layers] if plain else None
        while len(scene.prefix_caches) >= MAX_KEPT_PREFIXES * scene.num_scenes:
            scene.prefix_caches.pop(next(iter(scene.prefix_caches)))
        scene.prefix_caches[key] = (state, states)
        return states

    # ------------------------------------------------------------------ boxes

    def _with_boxes(
        self,
        output: GenerateBeamDecoderOnlyOutput,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        prompt: dict,
        proposal_boxes: torch.Tensor | None,
        proposal_mask: torch.Tensor | None,
    ) -> VidLLMGenerateOutput:
        """One forward over the finished sequences that hold a new `<loc>`; boxes in the reconstruction's unit."""
        sequences, scene = output.sequences, prompt["scene"]
        returned = sequences.shape[0] // input_ids.shape[0]

        def repeat(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(sequences.device).repeat_interleave(returned, dim=0)

        scene_index = repeat(prompt["scene_index"])
        result = VidLLMGenerateOutput(**dict(output.items()), scene=scene, scene_index=scene_index)
        if self.model.grounding is None:
            return result
        prompt_length = input_ids.shape[1]
        rows = (
            ((sequences[:, prompt_length:] == self.config.loc_token_id).any(dim=1) & (scene_index >= 0))
            .nonzero()
            .flatten()
        )
        found = [[] for _ in range(sequences.shape[0])]
        if rows.numel():
            new_mask = attention_mask.new_ones(sequences.shape[0], sequences.shape[1] - prompt_length)
            full_mask = torch.cat([repeat(attention_mask), new_mask.to(sequences.device)], dim=1)
            coords, coord_mask = repeat(prompt["coord_points_world"]), repeat(prompt["coord_mask"])
            forward = self.model(
                input_ids=sequences[rows],
                attention_mask=full_mask[rows],
                scene=scene,
                scene_index=scene_index[rows],
                coord_points_world=None if coords is None else coords[rows],
                coord_mask=None if coord_mask is None else coord_mask[rows],
                proposal_boxes=proposal_boxes,
                proposal_mask=proposal_mask,
                use_cache=False,
                return_dict=True,
            )
            for row, boxes in boxes_of_rows(self.config, forward, scene, scene_index[rows], len(rows)).items():
                found[int(rows[row])] = [entry for entry in boxes if entry[0] >= prompt_length]
        fill_box_fields(result, found, sequences.device)
        return result


def boxes_of_rows(config, forward, scene: VidLLMScene, scene_index: torch.Tensor, num_rows: int) -> dict:  # noqa: ANN001
    """Boxes of each prompt of a forward pass.

    Args:
        config (`VidLLMConfig`): Read for `max_boxes_per_loc`.
        forward (`VidLLMModelOutput`): With `grounding` and `loc_index`.
        scene (`VidLLMScene`): What was asked.
        scene_index (`torch.Tensor` of shape `(Q,)`, int64): Row of each prompt.
        num_rows (`int`): Q.

    Returns:
        `dict` of prompt -> list of `(column of the <loc>, box (6,) in the reconstruction's unit, score, no-target score)`.

    Source:
        Ours: boxes leave the position units of relative scenes here.
    """
    rows = {row: [] for row in range(num_rows)}
    if forward.grounding is None or forward.loc_index.shape[0] == 0:
        return rows
    boxes, scores, no_target_scores, keep_mask = select_boxes(forward.grounding, config.max_boxes_per_loc)
    for loc, (row, column) in enumerate(forward.loc_index.tolist()):
        factor = scene.position_scale[scene_index[row]].to(boxes.device)
        for slot in keep_mask[loc].nonzero().flatten().tolist():
            entry = (column, boxes[loc, slot] / factor, scores[loc, slot], no_target_scores[loc])
            rows[row].append(entry)
    return rows


def fill_box_fields(output, found: list, device: torch.device) -> None:  # noqa: ANN001
    """Write lists of boxes into the padded tensors of an output.

    Args:
        output (`ModelOutput`): Gets `boxes (R, M, 6)`, `box_scores (R, M)`, `box_token_index (R, M)`, `no_target_scores (R, M)`.
        found (`list` of lists): Per row what [`boxes_of_rows`] gives.
        device (`torch.device`): Where the tensors go.

    Source:
        Ours.
    """
    most = max((len(row) for row in found), default=0)
    boxes = torch.zeros(len(found), most, 6, device=device)
    scores = torch.zeros(len(found), most, device=device)
    no_target_scores = torch.zeros(len(found), most, device=device)
    index = torch.full((len(found), most), -1, dtype=torch.long, device=device)
    for row, entries in enumerate(found):
        for slot, (column, box, score, no_target) in enumerate(entries):
            boxes[row, slot] = box
            scores[row, slot] = score
            no_target_scores[row, slot] = no_target
            index[row, slot] = column
    output.boxes, output.box_scores, output.box_token_index, output.no_target_scores = (
        boxes,
        scores,
        index,
        no_target_scores,
    )
