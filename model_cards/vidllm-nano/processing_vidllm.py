"""`VidLLMProcessor`: chats, videos, points and given geometry to model inputs, and model outputs to boxes.

Shapes: B videos, Q prompts (several may share a video), L text tokens, M points of a prompt.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .chat_reading_vidllm import VidLLMPackedChats, pack_chats
from .given_geometry_vidllm import prepare_geometry
from .video_processing_vidllm import VidLLMVideoList, VidLLMVideoProcessor, split_videos
from .video_reading_vidllm import VidLLMInputError


NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
BOX_TEXT = re.compile(r"\[\s*" + r"\s*,\s*".join([f"({NUMBER})"] * 6) + r"\s*\]")


class VidLLMProcessor(ProcessorMixin):
    """Everything around the model: one call makes its inputs from a chat with a video.

    Args:
        image_processor (`VidLLMVideoProcessor`): Reads the videos; also reachable as `video_processor`.
        tokenizer (`PreTrainedTokenizerBase`): Must know the three tokens below, each as one token.
        num_scene_tokens (`int`): Placeholders per video, the model's `config.num_scene_tokens`.
        chat_template (`str`, *optional*): Jinja template of the language model's family.
        video_token (`str`): Placeholder of one scene-token slot.
        coord_token (`str`): Placeholder of one 3D point in a prompt.
        loc_token (`str`): Token that asks for boxes.

    Raises:
        ValueError: The tokenizer lacks one of the tokens.

    Source:
        Paper: the language model reads scene tokens, then the question. Upstream: huggingface/transformers `ProcessorMixin`. Ours: points, packing
        of prompts that share a video, sanitised text by default.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor: VidLLMVideoProcessor,
        tokenizer: Any,
        num_scene_tokens: int,
        chat_template: str | None = None,
        video_token: str = "<video>",
        coord_token: str = "<coord>",
        loc_token: str = "<loc>",
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if num_scene_tokens < 1:
            raise ValueError(f"num_scene_tokens: wanted a positive number; got {num_scene_tokens}")
        self.num_scene_tokens = num_scene_tokens
        self.video_token = video_token
        self.coord_token = coord_token
        self.loc_token = loc_token
        known = tokenizer.get_added_vocab()
        missing = [token for token in (video_token, coord_token, loc_token) if token not in known]
        if missing:
            raise ValueError(
                f"tokenizer: wanted the added tokens {video_token}, {coord_token}, {loc_token}; it lacks {', '.join(missing)} "
                "(tokenizer.add_special_tokens)"
            )
        self.video_token_id = known[video_token]
        self.coord_token_id = known[coord_token]
        self.loc_token_id = known[loc_token]

    @property
    def video_processor(self) -> VidLLMVideoProcessor:
        """The reader of videos. It lives in the `image_processor` slot, because the `video_processor` slot needs torchvision."""
        return self.image_processor

    @property
    def model_input_names(self) -> list[str]:
        """Names of all tensors that a call may return for the model."""
        names = ["input_ids", "attention_mask", "scene_index", "coord_points_world", "coord_mask"]
        return [*self.image_processor.model_input_names, *names]

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict | None = None, **kwargs
    ) -> list[Any]:
        """Load the parts; the video processor is the class beside this one, not a second copy through the auto class."""
        subfolder = kwargs.pop("subfolder", "")
        video_kwargs = {key: value for key, value in kwargs.items() if key != "trust_remote_code"}
        image_processor = VidLLMVideoProcessor.from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **video_kwargs
        )
        tokenizer = cls._load_tokenizer_from_pretrained(
            "tokenizer", pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        return [image_processor, tokenizer]

    def replace_video_token(self, video_inputs: dict | None = None, video_idx: int = 0, **kwargs) -> str:
        """What the one placeholder of a prompt becomes.

        Args:
            video_inputs (`dict`, *optional*): Not read; every video has the same number of slots, the model masks empty ones.
            video_idx (`int`): Not read.
            **kwargs: Not read.

        Returns:
            `str`: `num_scene_tokens` placeholders.

        Source:
            Ours: a fixed number of slots, so that prompts do not depend on the video.
        """
        return self.video_token * self.num_scene_tokens

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        scene: Any = None,
        scene_index: Sequence[int] | None = None,
        room_from_world: torch.Tensor | None = None,
        return_assistant_tokens_mask: bool = False,
        sanitize_control_tokens: bool | None = None,
        processor_kwargs: dict | None = None,
        **kwargs,
    ) -> Any:
        """Render chats, and make model inputs of them with `tokenize=True, return_dict=True`.

        Content blocks: `{"type": "video", "path": ...}` (or `video`, `url` with a local path; at most one per chat; `image` is a
        video of one frame), `{"type": "text", "text": ...}`, `{"type": "point", "xyz": [x, y, z], "frame": "world" | "room"}` in
        a user's message, `{"type": "box"}` in an assistant's. Only blocks write placeholders: `<loc>`, `<coord>`, `<video>` or a
        turn marker inside a text is plain text.

        Args:
            conversation (`list`): One chat or a list of chats. Chats that name the same video share it.
            chat_template (`str`, *optional*): Instead of the processor's.
            tokenize (`bool`): Whether to return ids rather than text.
            scene (`VidLLMScene`, *optional*): Ask about an encoded scene: placeholders are written, no media is loaded.
            scene_index (`list[int]`, *optional*): With `scene`, its row per chat, -1 = text only. Default: 0 if the scene has one
                row, else the chat's number.
            room_from_world (`torch.Tensor` of shape `(3, 3)` or `(videos, 3, 3)`, *optional*): Turns points given in the room frame;
                default: the scene's.
            return_assistant_tokens_mask (`bool`): Refused: sanitised text cannot be traced. Labels are the ids of prompt and
                answer less those of the prompt.
            sanitize_control_tokens (`bool`, *optional*): Default: True when tokenising. False lets text write control tokens.
            processor_kwargs (`dict`, *optional*): Arguments of the call, such as `num_frames`, `padding` or `return_metadata`.
            **kwargs: As transformers takes them: `add_generation_prompt`, `continue_final_message`, `return_dict`,
                `return_tensors`, ...

        Returns:
            `str` or `list[str]` without `tokenize`; ids without `return_dict`; else `BatchFeature`, see `__call__`.

        Raises:
            VidLLMInputError: A chat, a block, a coordinate or a video is not usable.

        Source:
            Upstream: huggingface/transformers `ProcessorMixin.apply_chat_template`. Ours: blocks `point` and `box`, `scene`.
        """
        if return_assistant_tokens_mask:
            raise VidLLMInputError(
                "return_assistant_tokens_mask: not possible, because user text is sanitised; labels are ids(prompt + answer) with the "
                "first len(ids(prompt)) masked"
            )
        chats, is_batched = _as_batch(conversation)
        packed = pack_chats(chats, scene=scene, scene_index=scene_index, room_from_world=room_from_world)
        if scene is not None and scene.tokens.shape[1] != self.num_scene_tokens:
            raise VidLLMInputError(
                f"scene: it has {scene.tokens.shape[1]} slots; this processor writes {self.num_scene_tokens} placeholders"
            )
        processor_kwargs = dict(processor_kwargs or {})
        if tokenize:
            processor_kwargs["packed_chats"] = packed
            # The template writes all control tokens itself.
            processor_kwargs.setdefault("add_special_tokens", False)
        return super().apply_chat_template(
            packed.chats if is_batched else packed.chats[0],
            chat_template=chat_template,
            tokenize=tokenize,
            sanitize_control_tokens=tokenize if sanitize_control_tokens is None else sanitize_control_tokens,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        scene_index: Sequence[int] | None = None,
        coord_points_world: Sequence[Sequence[Sequence[float]]] | None = None,
        packed_chats: VidLLMPackedChats | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Model inputs from rendered text and videos; `apply_chat_template` calls this with checked chats.

        Args:
            images: Refused; a photograph is a video of one frame.
            text (`str` or `list[str]`, *optional*): Prompts, with one `<video>` where the scene goes and one `<coord>` per point.
            videos (*optional*): One video or a list of videos, see `VidLLMVideoProcessor.preprocess`.
            audio: Refused.
            scene_index (`list[int]`, *optional*): Video of each prompt, -1 = none. Default: the next video for each prompt with
                a placeholder; the one video for all of them.
            coord_points_world (`list`, *optional*): Per prompt its points `[x, y, z]`, world frame.
            packed_chats (`VidLLMPackedChats`, *optional*): In place of the three arguments above.
            **kwargs: `num_frames`, `fps`, `size`, `padding`, `return_tensors`, `return_metadata`, ... as transformers takes them.
                Prompts are padded on the left unless told otherwise.

        Returns:
            `BatchFeature`:
            - input_ids, attention_mask (`torch.Tensor` of shape `(prompts, tokens)`, int64), if text was given.
            - scene_index (`torch.Tensor` of shape `(prompts,)`, int64): row of the prompt's video; -1 is text only.
            - coord_points_world (`torch.Tensor` of shape `(prompts, points, 3)`) and coord_mask (`(prompts, points)`, bool), world
              frame, if any prompt has a point.
            - pixel_values_videos (`torch.Tensor` of shape `(videos, frames, 3, height, width)`) and video_size_shw (`(videos, 3)`,
              int64), if videos were given.
            - video_metadata (`list[dict]`), with `return_metadata=True`. It is an attribute of the result either way.

        Raises:
            VidLLMInputError: Placeholders, videos and points do not fit together, or truncation cut a placeholder.

        Source:
            Upstream: huggingface/transformers `ProcessorMixin.__call__`. Ours: one video for several prompts, points.
        """
        if images is not None or audio is not None:
            kind = "images" if images is not None else "audio"
            raise VidLLMInputError(
                f"{kind}: this model takes videos; give a photograph as videos=[[image]] or in a video block"
            )
        if text is None and videos is None:
            raise VidLLMInputError("processor: wanted text, videos, or both; got neither")
        return_metadata = kwargs.get("return_metadata")
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs, videos_kwargs = merged["text_kwargs"], merged["videos_kwargs"]
        for key, default in (("padding_side", "left"), ("padding", True)):
            # Only what the caller asked for counts; a tokenizer's own setting would be for training.
            if kwargs.get(key) is None and kwargs.get("text_kwargs", {}).get(key) is None:
                text_kwargs[key] = default
        text_kwargs.setdefault("return_token_type_ids", False)
        sources = [] if videos is None else split_videos(videos)
        data: dict[str, Any] = {}
        if text is not None:
            data.update(self._encode_text(text, sources, scene_index, coord_points_world, packed_chats, text_kwargs))
        if packed_chats is not None:
            sources = VidLLMVideoList(packed_chats.sources)
        metadata = []
        if sources:
            video_inputs = self.video_processor(sources, **{**videos_kwargs, "return_tensors": None})
            metadata = video_inputs.video_metadata
            data.update(video_inputs)
        data.pop("video_metadata", None)
        if return_metadata:
            data["video_metadata"] = metadata
        batch = BatchFeature(
            data, tensor_type=text_kwargs.get("return_tensors"), skip_tensor_conversion=self.skip_tensor_conversion
        )
        batch.video_metadata = metadata
        return batch

    def _encode_text(
        self,
        text: str | list[str],
        sources: list[Any],
        scene_index: Sequence[int] | None,
        points: Sequence | None,
        packed: VidLLMPackedChats | None,
        text_kwargs: dict,
    ) -> dict[str, Any]:
        """Expand placeholders, tokenise, and check that ids, videos and points fit together."""
        prompts = [text] if isinstance(text, str) else text
        if (
            not isinstance(prompts, (list, tuple))
            or not prompts
            or not all(isinstance(prompt, str) for prompt in prompts)
        ):
            raise VidLLMInputError(f"text: wanted a text or a list of texts; got {text!r:.80}")
        # Placeholders that sanitising marked as the user's own words are left alone by this.
        most = sum(prompt.count(self.video_token) for prompt in prompts)
        prompts, found = self.get_text_with_replacements(list(prompts), [], [self.replace_video_token()] * most, [])
        counts = [len(matches) for matches in found]
        if packed is not None:
            scene_index, points = packed.scene_index, packed.points_world
        else:
            scene_index = _match_videos(counts, len(sources), scene_index)
            points = [[]] * len(prompts) if points is None else [list(row) for row in points]
        if len(points) != len(prompts):
            raise VidLLMInputError(f"coord_points_world: wanted points for {len(prompts)} prompts; got {len(points)}")
        encoded = self.tokenizer(prompts, **text_kwargs)
        for number, ids in enumerate(encoded["input_ids"]):
            ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
            wanted = self.num_scene_tokens if scene_index[number] >= 0 else 0
            for token, token_id, want in (
                (self.video_token, self.video_token_id, wanted),
                (self.coord_token, self.coord_token_id, len(points[number])),
            ):
                if ids.count(token_id) != want:
                    raise VidLLMInputError(
                        f"prompt {number}: wanted {want} {token} tokens (for its video and points); got {ids.count(token_id)}. Was the "
                        "prompt truncated, does its text hold the token, or does the chat template not write it?"
                    )
        data = {**encoded, "scene_index": torch.tensor(scene_index, dtype=torch.int64)}
        most = max(len(row) for row in points)
        if most:
            padded = [[*row, *[[0.0] * 3] * (most - len(row))] for row in points]
            data["coord_points_world"] = torch.tensor(padded, dtype=torch.float32)
            data["coord_mask"] = torch.tensor([[i < len(row) for i in range(most)] for row in points])
            if data["coord_points_world"].shape[2:] != (3,) or not torch.isfinite(data["coord_points_world"]).all():
                raise VidLLMInputError("coord_points_world: wanted points of three finite coordinates")
        return data

    def prepare_geometry(
        self, source: Any, inputs: Any, max_time_difference_s: float = 0.02
    ) -> dict[str, torch.Tensor]:
        """Poses, intrinsics and depth that the caller has, for `geometry=` of the model.

        Args:
            source: `cameras.json`, a TUM trajectory, a COLMAP text folder, or a dict of arrays; a list of them for several videos.
                See `prepare_geometry` in `given_geometry_vidllm`.
            inputs (`BatchFeature` or `list[dict]`): What this processor made of the videos, or its `video_metadata`.
            max_time_difference_s (`float`): Farthest that a pose's time may be from its frame's, seconds.

        Returns:
            `dict[str, torch.Tensor]`: any of `cam_from_world` `(videos, frames, 4, 4)` metres, OpenCV axes; `intrinsics_px`
            `(videos, frames, 3, 3)` in pixels of the model's input; `depth_m` `(videos, frames, height, width)` metres, 0 = invalid.

        Raises:
            VidLLMInputError: Names the frame whose pose is invalid or missing.

        Source:
            Ours: the same frames, resize and crop as the inputs.
        """
        metadata = inputs if isinstance(inputs, (list, tuple)) else getattr(inputs, "video_metadata", None)
        if isinstance(inputs, dict):
            metadata = [inputs] if "frames_indices" in inputs else inputs.get("video_metadata")
        if not metadata:
            raise VidLLMInputError(
                "prepare_geometry: wanted the inputs that this processor made of a video (with their video_metadata), or the metadata"
            )
        return prepare_geometry(source, metadata, max_time_difference_s)

    def post_process_grounding(self, outputs: Any, min_boxes: int = 0) -> list[dict[str, Any]]:
        """Boxes of each prompt that the model is sure enough of.

        Args:
            outputs (`VidLLMGenerateOutput` or `dict`): Of `generate(..., return_dict_in_generate=True)`: `boxes` `(prompts, boxes, 6)`,
                `box_scores` and `box_token_index` `(prompts, boxes)` (-1 = no box), optionally `no_target_scores` `(prompts, boxes)`
                and `box_unit`.
            min_boxes (`int`): Keep at least so many of the best boxes of a prompt, if it has them.

        Returns:
            `list[dict]`: per prompt
            - boxes (`torch.Tensor` of shape `(kept, 6)`): centre and size, axis-aligned in the room frame.
            - scores (`torch.Tensor` of shape `(kept,)`): matching scores.
            - token_index (`torch.Tensor` of shape `(kept,)`, int64): which generated token each box belongs to.
            - frame (`str`): `room`.
            - unit (`str`): `m` or `relative`.

        Raises:
            VidLLMInputError: Bare ids were given.

        Source:
            Ours: a box counts if it beats the learned "no target" score of its `<loc>`.
        """
        take = outputs.get if isinstance(outputs, dict) else lambda name: getattr(outputs, name, None)
        if isinstance(outputs, (torch.Tensor, list, tuple)) or (take("boxes") is None and take("sequences") is None):
            raise VidLLMInputError(
                "post_process_grounding: wanted the output of generate(..., return_dict_in_generate=True), which holds boxes; got "
                f"{type(outputs).__name__}"
            )
        unit = take("box_unit") or getattr(outputs, "box_unit", None) or "relative"
        boxes = take("boxes")
        if boxes is None:
            num_prompts = take("sequences").shape[0]
            boxes = torch.zeros(num_prompts, 0, 6)
            scores, token_index = boxes[..., 0], boxes[..., 0].long()
        else:
            scores, token_index = take("box_scores"), take("box_token_index")
        is_box = token_index >= 0
        keep = is_box
        if take("no_target_scores") is not None:
            keep = is_box & (scores > take("no_target_scores"))
        results = []
        for row in range(boxes.shape[0]):
            chosen = keep[row].clone()
            if int(chosen.sum()) < min_boxes:
                ranked = scores[row].masked_fill(~is_box[row], -math.inf).argsort(descending=True, stable=True)
                chosen[ranked[:min_boxes]] = True
                chosen &= is_box[row]
            results.append(
                {
                    "boxes": boxes[row][chosen],
                    "scores": scores[row][chosen],
                    "token_index": token_index[row][chosen],
                    "frame": "room",
                    "unit": unit,
                }
            )
        return results

    def parse_box_text(self, text: str) -> torch.Tensor:
        """Boxes that a model with `box_output="text"` wrote.

        Args:
            text (`str`): An answer with boxes like `[1.0, -0.5, 0.4, 0.6, 0.6, 0.9]`: centre x, y, z and size x, y, z, room frame.

        Returns:
            `torch.Tensor` of shape `(boxes, 6)`: in order of appearance. What is not exactly six finite numbers with positive
            sizes in square brackets gives no box.

        Source:
            Ours: a strict pattern; nothing of an answer is ever evaluated.
        """
        boxes = [[float(number) for number in match.groups()] for match in BOX_TEXT.finditer(text)]
        boxes = [box for box in boxes if all(math.isfinite(number) for number in box) and min(box[3:]) > 0]
        return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6)


def _as_batch(conversation: Any) -> tuple[list[Any], bool]:
    """A list of chats, and whether several were given."""
    if hasattr(conversation, "messages"):
        return [conversation], False
    if not isinstance(conversation, (list, tuple)) or len(conversation) == 0:
        raise VidLLMInputError(f"chat: wanted a list of messages, or a list of such lists; got {conversation!r:.80}")
    if isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages"):
        return list(conversation), True
    return [conversation], False


def _match_videos(counts: list[int], num_videos: int, scene_index: Sequence[int] | None) -> list[int]:
    """Row of the video of each prompt of a plain call."""
    if any(count > 1 for count in counts):
        raise VidLLMInputError(f"text: wanted at most one video placeholder per prompt; got {counts}")
    if scene_index is not None:
        rows = [int(row) for row in scene_index]
        if [int(row >= 0) for row in rows] != counts or any(row >= num_videos for row in rows):
            raise VidLLMInputError(
                f"scene_index: wanted a row of {num_videos} videos for each prompt with a placeholder, else -1; got {rows} for {counts}"
            )
        return rows
    if sum(counts) not in ((num_videos,) if num_videos != 1 else range(1, len(counts) + 1)):
        raise VidLLMInputError(
            f"text: wanted one video placeholder per video; got {sum(counts)} placeholders and {num_videos} videos"
        )
    ends = [sum(counts[: number + 1]) - 1 for number in range(len(counts))]
    return [(0 if num_videos == 1 else end) if count else -1 for count, end in zip(counts, ends, strict=True)]


__all__ = ["VidLLMProcessor"]
