"""What the `vidllm` command does with an encoded scene, as functions: ask, ground, caption.

    model, processor = load("vidllm-nano-untrained")
    scene = encode(model, read_video(processor, "room.mp4"))
    ask(model, processor, scene, ["How many chairs are there?", "What is next to the door?"])

Shapes: M boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vidllm.loading import encode, frames_rgb, load, load_model, load_processor, read_video

# the very words that training uses
from vidllm.processing.benchmarks.prompts import DEFAULT_STYLE, user_turn


if TYPE_CHECKING:
    import torch

    from vidllm import VidLLMForConditionalGeneration, VidLLMProcessor, VidLLMScene

# Prompts answered together; more would need more memory without being faster on small machines.
QUESTIONS_PER_BATCH = 8


class PromptTooLongError(ValueError):
    """Scene, prompt and answer together have more tokens than the language model has positions.

    Source:
        Ours: a chat can then forget its oldest turns.
    """


@dataclass(frozen=True)
class FoundBox:
    """A 3D box.

    Args:
        box (`tuple` of 6 `float`): `(cx, cy, cz, dx, dy, dz)`: centre and size, room frame, in the reconstruction's unit.
        score (`float`, *optional*): Matching probability in 0..1; None where the model wrote the box as text.

    Source:
        Ours.
    """

    box: tuple[float, ...]
    score: float | None = None


@dataclass(frozen=True)
class Answer:
    """What the model says.

    Args:
        question (`str`): What was asked.
        answer (`str`): Decoded, without special tokens.
        boxes (`tuple` of `FoundBox`): Boxes of the `<loc>` tokens in the answer, those that beat "no target".

    Source:
        Ours.
    """

    question: str
    answer: str
    boxes: tuple[FoundBox, ...] = ()


@dataclass(frozen=True)
class Grounding:
    """Where something is.

    Args:
        description (`str`): What was looked for.
        matched (`bool`): False: nothing beat "no target"; `boxes` then holds the best candidate, if there is one.
        boxes (`tuple` of `FoundBox`): Best first.
        no_target_score (`float`, *optional*): Probability that nothing in the room is meant; None where the model wrote text.

    Source:
        Ours.
    """

    description: str
    matched: bool
    boxes: tuple[FoundBox, ...]
    no_target_score: float | None


@dataclass(frozen=True)
class Caption:
    """A description of the object at a place.

    Args:
        caption (`str`): What the model says.
        point_room (`tuple` of 3 `float`): The place, room frame.
        point_world (`tuple` of 3 `float`): The place, world frame (first camera).

    Source:
        Ours.
    """

    caption: str
    point_room: tuple[float, ...]
    point_world: tuple[float, ...]


def check_texts(texts: Sequence[str], what: str) -> None:
    """Refuse empty texts by number, before a model is loaded.

    Args:
        texts (`Sequence[str]`): Questions or descriptions.
        what (`str`): What they are, for the message.

    Raises:
        ValueError: There is none, or one is empty.

    Source:
        Ours.
    """
    if not texts:
        raise ValueError(f"{what}: wanted at least one; got none")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise ValueError(
                f"{what}: wanted a text; got an empty one" + (f" (number {number})" if number > 1 else "")
            )


def make_prompt(
    model: "VidLLMForConditionalGeneration",
    processor: "VidLLMProcessor",
    scene: "VidLLMScene",
    chats: list,
    max_new_tokens: int | None = None,
    add_generation_prompt: bool = True,
) -> dict[str, Any]:
    """Model inputs of chats about one encoded scene.

    Args:
        model (`VidLLMForConditionalGeneration`): Read for its device and the most tokens that it takes.
        processor (`VidLLMProcessor`): Of the model.
        scene (`VidLLMScene`): Of one video.
        chats (`list`): One list of messages per prompt.
        max_new_tokens (`int`, *optional*): That will be generated; the checkpoint's own number if not given.
        add_generation_prompt (`bool`): False where the assistant's turn is written already.

    Returns:
        `dict`: arguments of `forward` or `generate`, without the scene.

    Raises:
        PromptTooLongError: See there; a `ValueError`.
        ValueError: A chat is not usable.

    Source:
        Ours: beyond its positions a language model answers noise without a word.
    """
    inputs = processor.apply_chat_template(
        chats,
        scene=scene,
        scene_index=[0] * len(chats),
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    new_tokens = 0
    if add_generation_prompt:
        new_tokens = max_new_tokens or model.generation_config.max_new_tokens or 0
    most = getattr(model.config.text_config, "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1] + new_tokens
    if most is not None and length > most:
        raise PromptTooLongError(
            f"prompt: with scene and answer it has {length} tokens; this model takes at most {most}"
        )
    return dict(inputs.to(model.device))


def answer_batch(
    model: "VidLLMForConditionalGeneration",
    processor: "VidLLMProcessor",
    scene: "VidLLMScene",
    chats: list,
    max_new_tokens: int | None = None,
    streamer: Any = None,
) -> list[tuple[str, tuple[FoundBox, ...], list[int]]]:
    """Generate one answer per chat.

    Args:
        model (`VidLLMForConditionalGeneration`): The model.
        processor (`VidLLMProcessor`): Of the model.
        scene (`VidLLMScene`): Of one video.
        chats (`list`): One list of messages per prompt.
        max_new_tokens (`int`, *optional*): Longest answer; the checkpoint's own number if not given.
        streamer (`TextStreamer`, *optional*): For a single chat: is given each token at once.

    Returns:
        `list[tuple]`: text, boxes that beat "no target", and ids of the new tokens.

    Raises:
        ValueError: A chat is not usable or too long.

    Source:
        Ours.
    """
    prompt = make_prompt(model, processor, scene, chats, max_new_tokens)
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    output = model.generate(**prompt, scene=scene, return_dict_in_generate=True, streamer=streamer, **limit)
    new_ids = output.sequences[:, prompt["input_ids"].shape[1] :]
    texts = processor.batch_decode(new_ids, skip_special_tokens=True)
    results = []
    for text, ids, found in zip(texts, new_ids.tolist(), processor.post_process_grounding(output), strict=True):
        if model.config.box_output == "text":
            boxes = _boxes(processor.parse_box_text(text))
        else:
            boxes = _boxes(found["boxes"], found["scores"])
        results.append((text.strip(), boxes, ids))
    return results


def _boxes(boxes: "torch.Tensor", scores: "torch.Tensor | None" = None) -> tuple[FoundBox, ...]:
    """Tensors `(M, 6)` and `(M,)` to plain numbers."""
    values = [None] * len(boxes) if scores is None else scores.tolist()
    return tuple(FoundBox(tuple(box), score) for box, score in zip(boxes.tolist(), values, strict=True))


def ask(
    model: "VidLLMForConditionalGeneration",
    processor: "VidLLMProcessor",
    scene: "VidLLMScene",
    questions: Sequence[str],
    max_new_tokens: int | None = None,
) -> list[Answer]:
    """Answer questions about an encoded scene; each stands for itself.

    Args:
        model (`VidLLMForConditionalGeneration`): The model.
        processor (`VidLLMProcessor`): Of the model.
        scene (`VidLLMScene`): Of one video.
        questions (`Sequence[str]`): In any number and length; special tokens in them are plain text.
        max_new_tokens (`int`, *optional*): Longest answer; the checkpoint's own number if not given.

    Returns:
        `list[Answer]`: in the order of the questions.

    Raises:
        ValueError: A question is empty or too long.

    Source:
        Ours.
    """
    check_texts(questions, "question")
    answers = []
    for start in range(0, len(questions), QUESTIONS_PER_BATCH):
        batch = questions[start : start + QUESTIONS_PER_BATCH]
        chats = [[{"role": "user", "content": [{"type": "text", "text": question}]}] for question in batch]
        results = answer_batch(model, processor, scene, chats, max_new_tokens)
        for question, (text, boxes, _) in zip(batch, results, strict=True):
            answers.append(Answer(question, text, boxes))
    return answers


def ground(
    model: "VidLLMForConditionalGeneration",
    processor: "VidLLMProcessor",
    scene: "VidLLMScene",
    description: str,
) -> Grounding:
    """Find what a sentence describes.

    Args:
        model (`VidLLMForConditionalGeneration`): The model.
        processor (`VidLLMProcessor`): Of the model.
        scene (`VidLLMScene`): Of one video.
        description (`str`): Such as "the chair next to the window".

    Returns:
        `Grounding`: boxes in the room frame.

    Raises:
        ValueError: The description is empty or too long.

    Source:
        Ours: that a box is wanted is known, so `<loc>` is put into the assistant's mouth and nothing is decoded.
    """
    import torch

    check_texts([description], "description")
    chat = [user_turn(DEFAULT_STYLE, "ground", description=description)]
    if model.config.box_output == "text":
        boxes = answer_batch(model, processor, scene, [chat])[0][1]
        return Grounding(description, bool(boxes), boxes, None)
    chat.append({"role": "assistant", "content": [{"type": "box"}]})
    prompt = make_prompt(model, processor, scene, [chat], add_generation_prompt=False)
    with torch.no_grad():
        output = model.boxes_of(model(**prompt, scene=scene, use_cache=False, logits_to_keep=1))
    found = processor.post_process_grounding(output)[0]
    matched = len(found["boxes"]) > 0
    if not matched:
        found = processor.post_process_grounding(output, min_boxes=1)[0]
    # One number per <loc>, repeated for each of its boxes.
    no_target = output.no_target_scores[0, 0].item() if output.no_target_scores.shape[1] else None
    return Grounding(description, matched, _boxes(found["boxes"], found["scores"]), no_target)


def caption(
    model: "VidLLMForConditionalGeneration",
    processor: "VidLLMProcessor",
    scene: "VidLLMScene",
    point: Sequence[float],
    frame_of: str = "room",
    max_new_tokens: int | None = None,
) -> Caption:
    """Describe the object at a place.

    Args:
        model (`VidLLMForConditionalGeneration`): The model.
        processor (`VidLLMProcessor`): Of the model.
        scene (`VidLLMScene`): Of one video.
        point (`Sequence[float]` of length 3): x, y, z in the reconstruction's unit.
        frame_of (`str`): `room` (what `ground` gives) or `world` (first camera).
        max_new_tokens (`int`, *optional*): Longest answer; the checkpoint's own number if not given.

    Returns:
        `Caption`.

    Raises:
        ValueError: A coordinate is not finite, or the frame is unknown.

    Source:
        Ours.
    """
    import torch

    turn = user_turn(DEFAULT_STYLE, "caption")
    for block in turn["content"]:
        if block["type"] == "point":
            block.update(xyz=list(point), frame=frame_of)
    text = answer_batch(model, processor, scene, [[turn]], max_new_tokens)[0][0]
    room_from_world = scene.reconstruction.room_from_world[0].double().cpu()
    given = torch.tensor([float(value) for value in point], dtype=torch.float64)
    other = room_from_world.T @ given if frame_of == "room" else room_from_world @ given
    room, world = (given, other) if frame_of == "room" else (other, given)
    return Caption(text, tuple(room.tolist()), tuple(world.tolist()))


__all__ = [
    "Answer",
    "Caption",
    "FoundBox",
    "Grounding",
    "PromptTooLongError",
    "answer_batch",
    "ask",
    "caption",
    "check_texts",
    "encode",
    "frames_rgb",
    "ground",
    "load",
    "load_model",
    "load_processor",
    "make_prompt",
    "read_video",
]
