"""From samples to batches: one video per scene, all its prompts, labels on the assistant's tokens, true geometry beside them.

Shapes: B videos, Q prompts, L text tokens, S frames, H W pixels of the model's input, M boxes of a prompt, K frames that vote for the scale.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidllm.modeling_vidllm.geometry_vidllm import (
    START_ROOM_FROM_CAM,
    boxes_room_from_annotation,
    nearest_heading,
    room_headings,
)
from vidllm.modeling_vidllm.scene_vidllm import VidLLMScene
from vidllm.processing.benchmarks.frames import SceneFrames, frames_of, scene_key
from vidllm.processing.benchmarks.prompts import spoken
from vidllm.processing.benchmarks.proposals import SceneProposals
from vidllm.processing.given_geometry_vidllm import prepare_geometry
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.samples import Sample
from vidllm.processing.video_processing_vidllm import VidLLMVideoList
from vidllm.processing.video_reading_vidllm import VidLLMInputError


IGNORED_LABEL = -100
NUM_SCALE_FRAMES = 16
# What of a batch is not for the model's forward.
NOT_FOR_THE_MODEL = ("targets", "sample_ids")


def keyed_generator(seed: int, epoch: int, *names: str) -> np.random.Generator:
    """Random numbers that depend on what they are drawn for, and on nothing else.

    Args:
        seed (`int`): Of the run.
        epoch (`int`): Of the data.
        *names (`str`): What is drawn, and for which scene or sample.

    Returns:
        `np.random.Generator`

    Source:
        Ours: the same draw in any batch, process, or order.
    """
    digest = hashlib.sha256("\0".join([str(seed), str(epoch), *names]).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch goes into `VidLLMForConditionalGeneration.forward`.

    Args:
        batch (`dict`): From `VidLLMCollator`.

    Returns:
        `dict`: all but the targets and the ids.

    Source:
        Ours.
    """
    return {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}


def box_text(boxes: np.ndarray | torch.Tensor) -> str:
    """Boxes as a model with `box_output="text"` writes them; `VidLLMProcessor.parse_box_text` reads them back.

    Args:
        boxes (`np.ndarray` or `torch.Tensor` of shape `(M, 6)`): `(cx, cy, cz, dx, dy, dz)`, room frame, metres.

    Returns:
        `str`: `[1.13, 1.64, 0.35, 0.92, 0.03, 1.16]`, several separated by commas; `[]` for none.

    Raises:
        ValueError: Not finite boxes of six numbers.

    Source:
        Paper: the teaser's answer. Ours: centimetres; an edge is at least 0.01, because 0.00 would not be read as a box.
    """
    values = np.asarray(boxes, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != 6 or not np.isfinite(values).all():
        raise ValueError(f"box_text: wanted finite boxes of shape (M, 6); got {values.shape}")
    # Adding 0 turns -0.0 into 0.0.
    values = np.concatenate([values[:, :3], values[:, 3:].clip(min=0.01)], axis=1).round(2) + 0.0
    return ", ".join("[" + ", ".join(f"{value:.2f}" for value in box) + "]" for box in values) or "[]"


def boxes_for_text(boxes_annotation: np.ndarray, annotation_from_world: np.ndarray) -> np.ndarray:
    """True boxes in the frame in which a model with `box_output="text"` learns to write them.

    Args:
        boxes_annotation (`np.ndarray` of shape `(M, 6)`): `(cx, cy, cz, dx, dy, dz)`, annotation frame, metres.
        annotation_from_world (`np.ndarray` of shape `(4, 4)`): Of the sampled frames.

    Returns:
        `np.ndarray` of shape `(M, 6)`, float64: room frame, metres.

    Source:
        Ours: the true room frame whose heading is nearest to `START_ROOM_FROM_CAM`. The rotation that the model predicts, which a
        target of the grounding decoder follows, is not known when the text is written; this is where that prediction starts and what
        its loss leads to, and the positions in the scene tokens are in the same frame, so that the numbers can be read off them.
        (Turned by the start rotation itself, z would not be up when the first camera looks down, and no box would lie along the
        axes.) A first camera halfway between two walls has two such headings, and no text can tell which.
    """
    boxes = torch.from_numpy(np.array(boxes_annotation, dtype=np.float64))[None]
    annotation = torch.from_numpy(np.array(annotation_from_world, dtype=np.float64))[None]
    start = torch.tensor(START_ROOM_FROM_CAM, dtype=torch.float64)[None]
    room = room_headings(annotation)[0, nearest_heading(start, annotation)]
    return boxes_room_from_annotation(boxes, annotation, room)[0].numpy()


class VidLLMCollator:
    """Makes batches of samples of any task. Samples of the same scene share a video (`scene_index`).

    Args:
        processor (`VidLLMProcessor`): Of the model.
        data_root (`str` or `Path`, *optional*): Where scenes lie; by default what each sample says.
        num_frames (`int`, *optional*): Frames per video; by default the processor's.
        frame_choice (`str`): `uniform`, `max_coverage` or `random`, see `sample_indices`.
        depth (`bool`): Whether true depth is read, where there is any.
        given_geometry (`float`): Share of the videos whose true geometry the model is given; drawn per scene and epoch.
        reply_choice (`str`): Which of several good replies is learned: `first` or `random` (drawn per sample and epoch).
        with_replies (`bool`): False makes prompts only, padded on the left, without labels: for generation.
        seed (`int`): Of everything that is drawn.
        box_output (`str`): As the model's config has it: `decoder` (an assistant's box is `<loc>`) or `text` (six numbers, see `boxes_for_text`).
        proposals (`SceneProposals`, *optional*): Boxes that the decoder chooses among, of every scene that is asked for boxes.

    Raises:
        ValueError: An argument is out of range.

    Source:
        Ours. Paper: uniform frames.
    """

    def __init__(
        self,
        processor: VidLLMProcessor,
        data_root: str | Path | None = None,
        num_frames: int | None = None,
        frame_choice: str = "uniform",
        depth: bool = True,
        given_geometry: float = 0.0,
        reply_choice: str = "first",
        with_replies: bool = True,
        seed: int = 0,
        box_output: str = "decoder",
        proposals: SceneProposals | None = None,
    ):
        if box_output not in ("decoder", "text"):
            raise ValueError(f"collator: wanted box_output decoder or text; got {box_output!r}")
        if not 0 <= given_geometry <= 1 or reply_choice not in ("first", "random"):
            raise ValueError(
                f"collator: wanted given_geometry in 0..1 and reply_choice first or random; got {given_geometry}, {reply_choice!r}"
            )
        self.processor = processor
        self.data_root = data_root
        self.num_frames = num_frames or processor.video_processor.num_frames
        if not self.num_frames:
            raise ValueError("collator: wanted num_frames; the processor samples by frames per second and has none")
        self.frame_choice = frame_choice
        self.depth = depth
        self.given_geometry = given_geometry
        self.reply_choice = reply_choice
        self.with_replies = with_replies
        self.seed = seed
        self.box_output = box_output
        self.proposals = proposals
        # In shared memory, so that loader processes that live on see a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Epoch that random draws are for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Change the epoch, also in the processes of a running loader."""
        self._epoch.fill_(epoch)

    def __call__(self, rows: Sequence[Mapping[str, Any] | Sample]) -> dict[str, Any]:
        """Make a batch.

        Args:
            rows (`list`): Rows of `load_benchmark`, or samples.

        Returns:
            `dict`: for `forward` (see `model_inputs`)
            - input_ids, attention_mask, labels (`torch.Tensor` of shape `(Q, L)`, int64): labels are -100 but at the assistant's tokens.
            - scene_index (`torch.Tensor` of shape `(Q,)`, int64).
            - coord_points_world (`torch.Tensor` of shape `(Q, P, 3)`), coord_mask (`(Q, P)`, bool), if any prompt names a place.
            - pixel_values_videos (`torch.Tensor` of shape `(B, S, 3, H, W)`), video_size_shw (`(B, 3)`, int64).
            - scale_frames (`torch.Tensor` of shape `(B, K)`, int64): with replies; -1 = unused.
            - proposal_boxes (`torch.Tensor` of shape `(B, M, 6)`): annotation frame, metres; proposal_mask (`(B, M)`, bool), and
              annotation_from_world (`(B, 4, 4)`) as below, if there are proposals.
            - geometry (`dict`), if `given_geometry` > 0: `cam_from_world`, `intrinsics_px`, `depth_m` as below and `mask` `(B,)`, bool.
            and beside it
            - targets (`dict`):
              boxes_annotation (`(Q, M, 6)`): annotation frame, metres; boxes_world (`(Q, M, 6)`): the same with centres in the world frame, edge
              lengths along the annotation frame's axes; box_mask (`(Q, M)`, bool); box_block (`(Q, M)`, int64): which `<loc>` of the prompt;
              boxes_known (`(Q,)`, bool): whether the prompt's boxes are known; a known empty list says that nothing is meant;
              annotation_from_world (`(B, 4, 4)`), annotation_mask (`(B,)`, bool): where it is known;
              cam_from_world (`(B, S, 4, 4)`), intrinsics_px (`(B, S, 3, 3)`, pixels of the model's input), camera_mask (`(B,)`, bool);
              depth_m (`(B, S, H, W)`, metres, 0 = invalid), depth_mask (`(B,)`, bool).
            - sample_ids (`list[str]`).

        Raises:
            VidLLMInputError: A sample cannot be used (see `usable_rows`), a scene cannot be read, or one that is asked for boxes has no proposals.

        Source:
            Ours.
        """
        samples = [row if isinstance(row, Sample) else Sample.from_row(row) for row in rows]
        if not samples:
            raise VidLLMInputError("collator: wanted at least one sample; got none")
        row_of_scene: dict[tuple, int] = {}
        scene_index = [row_of_scene.setdefault(scene_key(s, self.data_root), len(row_of_scene)) for s in samples]
        scenes = [self._frames(samples[scene_index.index(row)]) for row in range(len(row_of_scene))]
        scenes = [
            _with_annotation(scene, [s for s, index in zip(samples, scene_index, strict=True) if index == row])
            for row, scene in enumerate(scenes)
        ]
        batch = self._encode_text(samples, scene_index, scenes)
        videos = self.processor.video_processor(
            VidLLMVideoList([scene.rgb for scene in scenes]), do_sample_frames=False, return_tensors="pt"
        )
        batch.update(videos)
        batch["targets"] = {
            **_box_targets(samples, scene_index, scenes),
            **_camera_targets(scenes, videos.video_metadata, videos["pixel_values_videos"], self.depth),
        }
        keys = list(row_of_scene)
        if self.with_replies:
            batch["scale_frames"] = self._scale_frames(keys, scenes)
        if self.proposals is not None:
            batch.update(self._proposals(samples, scene_index, batch["targets"]))
        if self.given_geometry:
            batch["geometry"] = self._geometry(keys, batch["targets"])
        batch["sample_ids"] = [sample.sample_id for sample in samples]
        return batch

    def _generator(self, what: str, *names: str) -> np.random.Generator:
        """Random numbers for one purpose and one scene or sample."""
        return keyed_generator(self.seed, self.epoch, what, *names)

    def _frames(self, sample: Sample) -> SceneFrames:
        """Frames of a sample's scene."""
        name = scene_key(sample, self.data_root)[1]
        return frames_of(
            sample,
            self.data_root,
            self.num_frames,
            method=self.frame_choice,
            depth=self.depth,
            generator=self._generator("frames", name) if self.frame_choice == "random" else None,
        )

    def _reply(self, sample: Sample) -> str | None:
        """Another good reply than the one in the messages, or None."""
        choices = [text for text in sample.replies if text.strip()]
        if self.reply_choice == "first" or len(choices) < 2 or sample.num_box_blocks or not sample.has_reply:
            return None
        number = int(self._generator("reply", sample.sample_id).integers(len(choices)))
        # The first is in the messages, as the prompts want it written.
        return spoken(choices[number]) if number else None

    def _encode_text(
        self, samples: list[Sample], scene_index: list[int], scenes: list[SceneFrames]
    ) -> dict[str, torch.Tensor]:
        """Ids, mask, labels and points of the prompts."""
        chats = []
        for sample, row in zip(samples, scene_index, strict=True):
            if self.with_replies and not sample.has_reply:
                raise VidLLMInputError(
                    f"sample {sample.sample_id}: wanted a reply to learn; it has none (answers of test splits are hidden)"
                )
            matrix = scenes[row].annotation_from_world
            chat = sample.chat(matrix, reply=self._reply(sample), with_reply=self.with_replies)
            chats.append(_with_box_texts(sample, chat, matrix) if self.box_output == "text" else chat)
        # Chats about encoded scenes name no media, so that text and videos are made apart, each once.
        stand_in = VidLLMScene(tokens=torch.zeros(len(scenes), self.processor.num_scene_tokens, 0))
        encoded = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=not self.with_replies,
            scene=stand_in,
            scene_index=scene_index,
            processor_kwargs={"padding_side": "right" if self.with_replies else "left"},
        )
        batch = dict(encoded)
        if not self.with_replies:
            return batch
        # Every assistant's turn is learned: from the end of the ids of what comes before it to the end of its own.
        starts = [
            (q, turn)
            for q, chat in enumerate(chats)
            for turn, message in enumerate(chat)
            if message["role"] == "assistant"
        ]
        before = self._ids(
            [chats[q][:turn] for q, turn in starts], [scene_index[q] for q, _ in starts], stand_in, True
        )
        through = self._ids(
            [chats[q][: turn + 1] for q, turn in starts], [scene_index[q] for q, _ in starts], stand_in, False
        )
        labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
        for (q, _), prompt, whole in zip(starts, before, through, strict=True):
            ids = batch["input_ids"][q].tolist()
            if ids[: len(whole)] != whole or whole[: len(prompt)] != prompt or len(whole) == len(prompt):
                raise VidLLMInputError(
                    f"sample {samples[q].sample_id}: the ids of prompt and reply do not start with those of the prompt, so its labels are "
                    "not defined; does the chat template rewrite earlier turns?"
                )
            labels[q, len(prompt) : len(whole)] = batch["input_ids"][q, len(prompt) : len(whole)]
        batch["labels"] = labels
        return batch

    def _ids(self, chats: list[list[dict]], rows: list[int], stand_in: VidLLMScene, ask: bool) -> list[list[int]]:
        """Token ids of beginnings of chats, unpadded."""
        encoded = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=ask,
            scene=stand_in,
            scene_index=rows,
            processor_kwargs={"padding": False},
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _scale_frames(self, keys: list[tuple], scenes: list[SceneFrames]) -> torch.Tensor:
        """Frames that vote for the scale, `(B, K)` int64, rising, -1 = unused."""
        counts = [min(NUM_SCALE_FRAMES, len(scene.indices)) for scene in scenes]
        votes = torch.full((len(scenes), max(counts)), -1)
        for row, (key, scene, count) in enumerate(zip(keys, scenes, counts, strict=True)):
            drawn = self._generator("scale frames", key[1]).choice(len(scene.indices), count, replace=False)
            votes[row, :count] = torch.from_numpy(np.sort(drawn))
        return votes

    def _scene_id(self, sample: Sample) -> str | None:
        """Name of the sample's scene in its dataset."""
        return sample.scene_id

    def _proposals(
        self, samples: list[Sample], scene_index: list[int], targets: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Proposals of the videos, none where the annotation frame is not known: there no box can be learned either."""
        of_scene: dict[int, np.ndarray] = {}
        for sample, row in zip(samples, scene_index, strict=True):
            scene_id = self._scene_id(sample)
            known = self.proposals.boxes_annotation.get(scene_id)
            if known is None and sample.num_box_blocks and sample.boxes_annotation is not None:
                raise VidLLMInputError(
                    f"sample {sample.sample_id}: wanted proposals of scene {scene_id}, in which boxes are asked for; "
                    f"{self.proposals.source or 'what was given'} has none"
                )
            if known is not None and targets["annotation_mask"][row]:
                of_scene[row] = known
        counts = [len(of_scene.get(row, ())) for row in range(len(targets["annotation_mask"]))]
        boxes = torch.zeros(len(counts), max(counts), 6)
        for row, known in of_scene.items():
            boxes[row, : len(known)] = torch.from_numpy(np.array(known, dtype=np.float32))
        return {
            "proposal_boxes": boxes,
            "proposal_mask": torch.arange(max(counts)) < torch.tensor(counts)[:, None],
            "annotation_from_world": targets["annotation_from_world"],
        }

    def _geometry(self, keys: list[tuple], targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """True geometry for the videos that it is drawn for and that have all of it."""
        drawn = [self._generator("given geometry", key[1]).random() < self.given_geometry for key in keys]
        mask = torch.tensor(drawn) & targets["camera_mask"]
        names = ["cam_from_world", "intrinsics_px"]
        if "depth_m" in targets:
            mask &= targets["depth_mask"]
            names.append("depth_m")
        return {**{name: targets[name] for name in names}, "mask": mask}


def _with_box_texts(sample: Sample, chat: list[dict], annotation_from_world: np.ndarray | None) -> list[dict]:
    """A chat whose box blocks are texts."""
    if not any(block["type"] == "box" for turn in chat for block in turn["content"]):
        return chat
    if sample.boxes_annotation is None:
        raise VidLLMInputError(
            f'sample {sample.sample_id}: wanted boxes, because box_output="text" writes them into the reply; they are not known'
        )
    boxes = sample.boxes_annotation
    if len(boxes):
        if annotation_from_world is None:
            raise VidLLMInputError(
                f'sample {sample.sample_id}: wanted annotation_from_world of the sampled frames, because box_output="text" writes boxes in '
                "the room frame; the scene has no valid pose for its first sampled frame, or no known alignment"
            )
        boxes = boxes_for_text(boxes, annotation_from_world)
    number, written = 0, []
    for turn in chat:
        content: list[dict] = []
        for position, block in enumerate(turn["content"]):
            if block["type"] == "box":
                follows_box = position > 0 and turn["content"][position - 1]["type"] == "box"
                text = box_text(boxes[np.array(sample.box_block, dtype=np.int64) == number])
                block, number = {"type": "text", "text": ", " + text if follows_box else text}, number + 1
            content.append(block)
        written.append({**turn, "content": content})
    return written


def _with_annotation(scene: SceneFrames, samples: list[Sample]) -> SceneFrames:
    """A video's annotation frame, which any of its samples may tell."""
    for sample in samples:
        if sample.told_from_first_frame and scene.indices[0] != 0:
            raise VidLLMInputError(
                f"sample {sample.sample_id}: its places are told from the first frame of {scene.source}, which was not sampled"
            )
        told, known = sample.annotation_from_world, scene.annotation_from_world
        if told is None:
            continue
        if known is not None and not np.allclose(told, known, atol=1e-6):
            raise VidLLMInputError(
                f"sample {sample.sample_id}: its room_from_world is not that of another sample of {scene.source}"
            )
        scene = replace(scene, annotation_from_world=told)
    return scene


def _box_targets(samples: list[Sample], scene_index: list[int], scenes: list[SceneFrames]) -> dict[str, torch.Tensor]:
    """Ragged boxes of the prompts that ask for some, and where the annotation frames are."""
    known = [sample.box_block if sample.num_box_blocks else () for sample in samples]
    most = max(map(len, known))
    targets = {
        "boxes_annotation": torch.zeros(len(samples), most, 6),
        "boxes_world": torch.zeros(len(samples), most, 6),
        "box_mask": torch.zeros(len(samples), most, dtype=torch.bool),
        "box_block": torch.zeros(len(samples), most, dtype=torch.int64),
        "boxes_known": torch.tensor([s.num_box_blocks > 0 and s.boxes_annotation is not None for s in samples]),
        "annotation_from_world": torch.eye(4).repeat(len(scenes), 1, 1),
        "annotation_mask": torch.tensor([scene.annotation_from_world is not None for scene in scenes]),
    }
    for row, scene in enumerate(scenes):
        if scene.annotation_from_world is not None:
            targets["annotation_from_world"][row] = torch.tensor(scene.annotation_from_world.tolist())
    for q, (sample, blocks) in enumerate(zip(samples, known, strict=True)):
        if not blocks:
            continue
        matrix = scenes[scene_index[q]].annotation_from_world
        count = len(blocks)
        targets["boxes_world"][q, :count] = torch.from_numpy(sample.boxes_world(matrix))
        targets["boxes_annotation"][q, :count] = torch.from_numpy(sample.boxes_annotation.copy())
        targets["box_mask"][q, :count] = True
        targets["box_block"][q, :count] = torch.tensor(blocks)
    return targets


def _camera_targets(
    scenes: list[SceneFrames], metadata: list[dict], pixel_values: torch.Tensor, with_depth: bool
) -> dict[str, torch.Tensor]:
    """True cameras and depth in the pixels of the model's input, padded like the videos."""
    num_videos, num_frames, _, height, width = pixel_values.shape
    targets = {
        "cam_from_world": torch.eye(4).repeat(num_videos, num_frames, 1, 1),
        "intrinsics_px": torch.eye(3).repeat(num_videos, num_frames, 1, 1),
        "camera_mask": torch.zeros(num_videos, dtype=torch.bool),
        "depth_mask": torch.zeros(num_videos, dtype=torch.bool),
    }
    if with_depth and any(scene.depth_m is not None for scene in scenes):
        targets["depth_m"] = torch.zeros(num_videos, num_frames, height, width)
    for row, (scene, info) in enumerate(zip(scenes, metadata, strict=True)):
        source = {}
        if scene.cam_from_world is not None and scene.intrinsics_px is not None:
            source = {"cam_from_world": scene.cam_from_world, "intrinsics_px": scene.intrinsics_px}
            targets["camera_mask"][row] = True
        if with_depth and scene.depth_m is not None:
            source["depth_m"] = np.stack(scene.depth_m)
            targets["depth_mask"][row] = True
        if not source:
            continue
        for name, value in prepare_geometry([source], [info]).items():
            value = value[0]
            targets[name][row][tuple(slice(side) for side in value.shape)] = value
    return targets


__all__ = ["IGNORED_LABEL", "VidLLMCollator", "box_text", "boxes_for_text", "keyed_generator", "model_inputs"]
