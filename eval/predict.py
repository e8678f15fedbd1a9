"""One scene through the model: encoded once, then answers, boxes, captions, and the scores of its reconstruction.

Shapes: S sampled frames, H W pixels of the model's input, Q prompts, L text tokens.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from vidllm.eval.oriented import angles_of
from vidllm.eval.predictions import PredictionFiles
from vidllm.eval.proposals import best_overlap
from vidllm.eval.reconstruction import constant_reconstruction, plain, score_reconstruction
from vidllm.eval.reconstruction_views import accuracy_curves, scene_view
from vidllm.eval.truth import SceneTruth, scene_truth
from vidllm.eval.work import RECONSTRUCTION, SceneWork
from vidllm.modeling_vidllm.geometry_vidllm import boxes_annotation_from_room, boxes_room_from_annotation
from vidllm.modeling_vidllm.modeling_vidllm import VidLLMForConditionalGeneration
from vidllm.modeling_vidllm.scene_vidllm import VidLLMScene
from vidllm.processing.benchmarks.frames import frames_of
from vidllm.processing.benchmarks.prompts import box_turn
from vidllm.processing.benchmarks.proposals import SceneProposals
from vidllm.processing.processing_vidllm import VidLLMProcessor
from vidllm.processing.samples import Sample
from vidllm.processing.video_processing_vidllm import VidLLMVideoList
from vidllm.processing.video_reading_vidllm import VidLLMInputError


# Longest answers, in tokens: enough for a caption in bytes.
MAX_NEW_TOKENS = {"qa": 16, "sqa": 16, "caption": 96, "ground": 64}


@dataclass(frozen=True)
class PredictionSettings:
    """How the model is asked.

    Args:
        num_frames (`int`): Frames sampled evenly of each scene.
        batch_size (`int`): Prompts answered together.
        geometry (`str`): `predicted`, or `given`: the model gets true poses, intrinsics and depth.
        constant_depth_m (`float`, *optional*): Distance that the constant baseline says; None: depth is not scored.
        proposals (`SceneProposals`, *optional*): Boxes to choose from beside those that the model finds, and places to ask captions for instead
            of the true centres.

    Source:
        Ours.
    """

    num_frames: int
    batch_size: int = 32
    geometry: str = "predicted"
    constant_depth_m: float | None = None
    proposals: SceneProposals | None = None


def _key(sample: Sample) -> str:
    """Id of a record."""
    return sample.official_id


def _is_done(work: SceneWork, files: PredictionFiles) -> bool:
    """Whether nothing of a scene is left to do."""
    if work.reconstruct and work.scene_id not in files.of[RECONSTRUCTION]:
        return False
    return not any(files.of[name].missing(map(_key, samples)) for name, samples in work.samples.items())


class Predictor:
    """A model that is asked about scenes.

    Args:
        model (`VidLLMForConditionalGeneration`): In evaluation mode.
        processor (`VidLLMProcessor`): Of the model.
        data_root (`str`): Where the scenes lie.
        settings (`PredictionSettings`): How it is asked.

    Source:
        Ours: greedy decoding; a scene's prompts share its tokens and the language model's prefix over them.
    """

    def __init__(
        self,
        model: VidLLMForConditionalGeneration,
        processor: VidLLMProcessor,
        data_root: str,
        settings: PredictionSettings,
    ):
        self.model, self.processor, self.data_root, self.settings = model, processor, data_root, settings

    def run(self, work: SceneWork, files: PredictionFiles) -> None:
        """Do what is left of a scene and write it down, batch by batch.

        Args:
            work (`SceneWork`): What is asked.
            files (`PredictionFiles`): What is there already, and where the rest goes.

        Raises:
            VidLLMInputError: The scene cannot be read, lacks what is to be given, or a prompt is too long.
        """
        if _is_done(work, files):
            return
        is_fresh = not any(
            _key(sample) in files.of[name] for name, samples in work.samples.items() for sample in samples
        )
        started = time.perf_counter()
        videos, truth = self._read(work)
        geometry = self._given(work, truth)
        pixels = videos["pixel_values_videos"].to(self.model.device)
        scene = None
        if work.samples:
            scene = self.model.encode_scene(pixels, videos["video_size_shw"], geometry=geometry)
            reconstruction = scene.reconstruction
        else:
            reconstruction = self.model.reconstruct(pixels, videos["video_size_shw"], geometry=geometry)
        scoring = time.perf_counter()
        if work.reconstruct:
            files.of[RECONSTRUCTION].add([self._reconstruction_record(work, reconstruction, truth)])
        # What a scene costs is what the model takes for it, not what comparing with the truth takes.
        scoring = time.perf_counter() - scoring
        for name, samples in work.samples.items():
            for batch in _batches(samples, self.settings.batch_size):
                # A batch is answered whole even where a part is there: its answers then are those of an undisturbed run.
                if files.of[name].missing(map(_key, batch)):
                    files.of[name].add(self._records(batch, scene, truth))
        if is_fresh:
            num_prompts = sum(map(len, work.samples.values()))
            files.timing.add(
                [{"id": work.scene_id, "seconds": time.perf_counter() - started - scoring, "num_prompts": num_prompts}]
            )

    def _read(self, work: SceneWork) -> tuple[Any, SceneTruth]:
        """The scene's frames as model inputs, and what is true of them."""
        sample = next((samples[0] for samples in work.samples.values()), None) or Sample(
            sample_id=work.scene_id,
            scene_id=work.scene_id,
            task="chat",
            messages=[{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": RECONSTRUCTION}]}],
        )
        needs_depth = work.reconstruct or self.settings.geometry == "given"
        frames = frames_of(sample, self.data_root, self.settings.num_frames, depth=needs_depth)
        videos = self.processor.video_processor(
            VidLLMVideoList([frames.rgb]), do_sample_frames=False, return_tensors="pt"
        )
        return videos, scene_truth(frames, videos.video_metadata[0])

    def _given(self, work: SceneWork, truth: SceneTruth) -> dict[str, torch.Tensor] | None:
        """True geometry for the model, if it is to have it."""
        if self.settings.geometry == "predicted":
            return None
        given = truth.given()
        if given is None:
            raise VidLLMInputError(
                f"scene {work.scene_id}: wanted poses and intrinsics of all sampled frames, to give them to the model; it has none"
            )
        return given

    def _reconstruction_record(self, work: SceneWork, reconstruction: Any, truth: SceneTruth) -> dict[str, Any]:
        """Scores and curves of the scene's geometry, the model's and the constant one's, and what can be drawn of it."""
        if truth.cam_from_world is None:
            raise VidLLMInputError(
                f"scene {work.scene_id}: wanted poses and intrinsics of all sampled frames, to score the reconstruction; it has none"
            )
        predicted = plain(reconstruction)
        if not np.isfinite(predicted.cam_from_world).all() or not np.isfinite(predicted.room_from_world).all():
            raise VidLLMInputError(f"scene {work.scene_id}: the model's poses are not finite; are its weights broken?")
        constant = constant_reconstruction(truth, self.settings.constant_depth_m or 1.0)
        return {
            "id": work.scene_id,
            "unit": reconstruction.unit,
            "scores": score_reconstruction(predicted, truth),
            "constant": score_reconstruction(constant, truth),
            "curves": {"model": accuracy_curves(predicted, truth), "constant": accuracy_curves(constant, truth)},
            "view": scene_view(predicted, truth),
        }

    def _records(self, batch: Sequence[Sample], scene: VidLLMScene, truth: SceneTruth) -> list[dict[str, Any]]:
        """One record per prompt."""
        if batch[0].task == "ground":
            return self._box_records(batch, scene, truth)
        if batch[0].task == "caption" and self.settings.proposals is not None:
            return self._captions_of_proposals(batch, scene, truth)
        field = "caption" if batch[0].task == "caption" else "answer"
        texts = self._said(batch, scene, truth)
        return [
            {"id": _key(sample), "scene": sample.scene_id, field: text}
            for sample, text in zip(batch, texts, strict=True)
        ]

    def _said(self, batch: Sequence[Sample], scene: VidLLMScene, truth: SceneTruth) -> list[str]:
        """What the model says to each sample."""
        chats = [sample.chat(truth.annotation_from_world, with_reply=False) for sample in batch]
        return self._texts(chats, scene, MAX_NEW_TOKENS[batch[0].task])

    def _captions_of_proposals(
        self, batch: Sequence[Sample], scene: VidLLMScene, truth: SceneTruth
    ) -> list[dict[str, Any]]:
        """Captions at the centre of the proposal that fits each object best; of an object without one nothing is asked."""
        proposals = self.settings.proposals.boxes_annotation[batch[0].scene_id]
        chosen = [best_overlap(proposals, sample.boxes_annotation[0]) for sample in batch]
        asked = [
            replace(sample, points=proposals[number, :3][None], point_frame="annotation")
            for sample, (number, _) in zip(batch, chosen, strict=True)
            if number is not None
        ]
        texts = iter(self._said(asked, scene, truth) if asked else [])
        return [
            {
                "id": _key(sample),
                "scene": sample.scene_id,
                "caption": "" if number is None else next(texts),
                "proposal": number,
                "iou": iou,
            }
            for sample, (number, iou) in zip(batch, chosen, strict=True)
        ]

    def _texts(self, chats: list, scene: VidLLMScene, max_new_tokens: int) -> list[str]:
        """What the model says to each chat, on one line."""
        prompt = self._prompt(chats, scene, max_new_tokens)
        ids = self.model.generate(**prompt, scene=scene, max_new_tokens=max_new_tokens, do_sample=False)
        texts = self.processor.batch_decode(ids[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        # A line break inside an answer would put line-based scorers out of step.
        return [" ".join(text.split()) for text in texts]

    def _box_records(self, batch: Sequence[Sample], scene: VidLLMScene, truth: SceneTruth) -> list[dict[str, Any]]:
        """Best box of each description: what is looked for is there, so that "no target" has no say."""
        asked = [sample.chat(truth.annotation_from_world, with_reply=False) for sample in batch]
        room_from_world = scene.reconstruction.room_from_world[:1].double().cpu()
        annotation_from_world = torch.from_numpy(np.array(truth.annotation_from_world, dtype=np.float64))[None]
        among: list[dict[str, Any]] = [{} for _ in batch]
        if self.model.config.box_output == "text":
            found = [self.processor.parse_box_text(t) for t in self._texts(asked, scene, MAX_NEW_TOKENS["ground"])]
            best = [(boxes[0], None) if len(boxes) else None for boxes in found]
        else:
            # That a box is wanted is known, so that `<loc>` is put into the assistant's mouth.
            prompt = self._prompt([[*chat, box_turn()] for chat in asked], scene, 0)
            best = self._found_boxes(prompt, scene)
            if self.settings.proposals is not None:
                known = self.settings.proposals.boxes_annotation[batch[0].scene_id]
                among = self._among_proposals(prompt, scene, known, annotation_from_world, room_from_world)
        records = []
        turn = (annotation_from_world[0, :3, :3] @ room_from_world[0].T).numpy()
        for sample, entry, chosen in zip(batch, best, among, strict=True):
            record: dict[str, Any] = {"id": _key(sample), "scene": sample.scene_id}
            record.update(box_annotation=None, box_oriented=None, box_room=None)
            if entry is not None and bool(torch.isfinite(entry[0]).all()):
                box = entry[0].double().cpu()[None, None]
                carried = boxes_annotation_from_room(box, annotation_from_world, room_from_world)[0, 0]
                # The same box without the nearest quarter turn: its own edges, turned as the model sees the room.
                oriented = [*carried[:3].tolist(), *box[0, 0, 3:].tolist(), *angles_of(turn).tolist()]
                record.update(box_annotation=carried.tolist(), box_oriented=oriented, box_room=box[0, 0].tolist())
                record["score"] = entry[1]
            records.append({**record, **chosen})
        return records

    def _found_boxes(
        self, prompt: dict[str, Any], scene: VidLLMScene, proposals_room: torch.Tensor | None = None
    ) -> list[tuple[torch.Tensor, float] | None]:
        """Best box of each prompt `(6,)`, room frame, and its score."""
        given = {} if proposals_room is None else {"proposal_boxes": proposals_room}
        with torch.no_grad():
            forward = self.model(**prompt, scene=scene, use_cache=False, logits_to_keep=1, **given)
            output = self.model.boxes_of(forward)
        found = self.processor.post_process_grounding(output, min_boxes=1)
        # Best first.
        return [(row["boxes"][0], row["scores"][0].item()) if len(row["boxes"]) else None for row in found]

    def _among_proposals(
        self,
        prompt: dict[str, Any],
        scene: VidLLMScene,
        known: np.ndarray,
        annotation_from_world: torch.Tensor,
        room_from_world: torch.Tensor,
    ) -> list[dict[str, Any]]:
        """Which of the given boxes the model takes for each prompt, as it stands in its file."""
        if not len(known):
            return [{"proposal": None, "box_proposal": None} for _ in prompt["input_ids"]]
        carried = boxes_room_from_annotation(
            torch.from_numpy(np.array(known, dtype=np.float64))[None], annotation_from_world, room_from_world
        )
        records = []
        for entry in self._found_boxes(prompt, scene, carried.float().to(self.model.device)):
            # What comes out is one of those that went in, but for rounding.
            number = None if entry is None else int((carried[0] - entry[0].double().cpu()).abs().sum(dim=1).argmin())
            records.append({"proposal": number, "box_proposal": None if number is None else known[number].tolist()})
        return records

    def _prompt(self, chats: list, scene: VidLLMScene, max_new_tokens: int) -> dict[str, Any]:
        """Model inputs of chats about the scene."""
        inputs = self.processor.apply_chat_template(
            chats,
            scene=scene,
            scene_index=[0] * len(chats),
            add_generation_prompt=chats[0][-1]["role"] == "user",
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        most = getattr(self.model.config.text_config, "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1] + max_new_tokens
        if most is not None and length > most:
            raise VidLLMInputError(
                f"prompt: with scene and answer it has {length} tokens; this model takes at most {most}"
            )
        return dict(inputs.to(self.model.device))


def _batches(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Consecutive batches; the same on every run."""
    rest = iter(samples)
    while batch := list(islice(rest, size)):
        yield batch


__all__ = ["MAX_NEW_TOKENS", "PredictionSettings", "Predictor"]
