"""Scan2Cap's scores of captions under the protocols of its peers: m@kIoU, and the benchmark toolbox's precision, recall, F1. Texts and boxes, no tensors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from vidllm.eval.metrics.answers import check_protocol
from vidllm.eval.metrics.text_scorers import text_scores


CAPTION_PROTOCOLS = ("scan2cap", "leo", "video3dllm")
START, END = "sos", "eos"
# Scan2Cap cuts descriptions after so many tokens.
MOST_TOKENS = 30
_TOKEN = re.compile(r"[\w'-]+|[^\w\s]")
_SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l", "meteor")


@dataclass(frozen=True)
class CaptionedObject:
    """An object, what people say of it, and what a model said.

    Args:
        key (`str`): `scene|object|name`; its order is that of the corpus.
        descriptions (`tuple[str, ...]`): As people wrote them.
        tokens (`tuple[tuple[str, ...], ...]`): The same, cut into tokens as ScanRefer's files have them.
        caption (`str`, *optional*): What the model said of the proposal that was matched with it; None: nothing was matched.
        caption_tokens (`tuple[str, ...]`, *optional*): The caption cut into tokens; by default words and signs in lower case.
        iou (`float`): Of that proposal's box with the object's.

    Source:
        Ours.
    """

    key: str
    descriptions: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    caption: str | None = None
    caption_tokens: tuple[str, ...] | None = None
    iou: float = 0.0


def caption_tokens(text: str) -> tuple[str, ...]:
    """A caption cut into words and signs, in lower case, as ScanRefer's descriptions are.

    Args:
        text (`str`): The caption.

    Returns:
        `tuple[str, ...]`

    Source:
        Upstream: daveredrum/ScanRefer (`token`: lower case, signs apart). Ours: for captions that come as text.
    """
    return tuple(_TOKEN.findall(text.lower()))


def _between(words: str) -> str:
    return f"{START} {words} {END}"


def _prepared(item: CaptionedObject, protocol: str, has_caption: bool) -> tuple[str, list[str]]:
    """Candidate and references of an object, as a protocol writes them."""
    caption = item.caption or ""
    if protocol == "scan2cap":
        tokens = caption_tokens(caption) if item.caption_tokens is None else item.caption_tokens
        said = " ".join([START, *tokens, END]) if has_caption else f"{START} {END}"
        return said, [_between(" ".join(words[:MOST_TOKENS])) for words in item.tokens]
    if protocol == "leo":
        said = _between(caption).replace(". ", " . ") if has_caption else f"{START} {END}"
        return said, [_between(" ".join(words)) for words in item.tokens]
    # An empty caption leaves two blanks between the marks, which ROUGE counts as a word.
    said = _between(_spaced(caption if has_caption else ""))
    return said, [_between(_spaced(text)) for text in item.descriptions]


def _spaced(text: str) -> str:
    """Video-3D-LLM: full stops and commas apart, lower case."""
    return text.replace(".", " . ").replace(",", " , ").lower()


def caption_scores(
    objects: Sequence[CaptionedObject], protocol: str = "scan2cap", iou_threshold: float = 0.5
) -> dict[str, float]:
    """m@kIoU: captions of all objects, those whose proposal lies too far off count as empty.

    Args:
        objects (`Sequence[CaptionedObject]`): All objects of the split, in the order of the corpus.
        protocol (`str`): `scan2cap`: tokens, references cut after 30, IoU greater than the threshold. `leo`: IoU at least the threshold, texts with full
            stops apart, no lower case. `video3dllm` (also 3DRS, VG-LLM, Ross3D): descriptions as text in lower case, IoU at least the threshold.
        iou_threshold (`float`): k.

    Returns:
        `dict[str, float]`: `bleu_1` to `bleu_4`, `cider`, `rouge_l`, `meteor`, fractions, without those that cannot be computed here; `objects`,
        `objects_with_caption`.

    Raises:
        ValueError: No objects, one without a description, or an unknown protocol.

    Source:
        Upstream: daveredrum/Scan2Cap@b9e9610 lib/eval_helper.py; embodied-generalist/embodied-generalist@567f2d8 evaluator/cap_eval.py;
        LaVi-Lab/Video-3D-LLM@3ff70e8 llava/eval/eval_scan2cap.py. "sos eos" keeps a floor: its ROUGE and METEOR are not 0.
    """
    check_protocol("scan2cap", protocol, CAPTION_PROTOCOLS)
    if not objects:
        raise ValueError("scan2cap: wanted at least one object; got none")
    lacking = [item.key for item in objects if not item.descriptions or len(item.descriptions) != len(item.tokens)]
    if lacking:
        raise ValueError(
            f"scan2cap: wanted descriptions and their tokens of each object; {lacking[0]} has none, or not both"
        )
    hits = [
        item.caption is not None
        and (item.iou > iou_threshold if protocol == "scan2cap" else item.iou >= iou_threshold)
        for item in objects
    ]
    prepared = [_prepared(item, protocol, hit) for item, hit in zip(objects, hits, strict=True)]
    found = text_scores([said for said, _ in prepared], [known for _, known in prepared], tokenize=False)
    scores = {name: found.corpus[name] for name in _SCORES if name in found.corpus}
    return {**scores, "objects": float(len(objects)), "objects_with_caption": float(sum(hits))}


# ---------------------------------------------------------------------- benchmark toolbox


@dataclass(frozen=True)
class SceneCaptions:
    """A scene of the benchmark toolbox: objects and proposals.

    Args:
        references (`tuple[tuple[str, ...], ...]`): Of each object, between `sos` and `eos`.
        object_corners (`np.ndarray` of shape `(objects, 8, 3)`): Corners of their boxes, metres.
        captions (`tuple[str, ...]`): Of each proposal, between `sos` and `eos`.
        proposal_corners (`np.ndarray` of shape `(proposals, 8, 3)`): Corners of their boxes.

    Source:
        Upstream: daveredrum/faster-captioning benchmark/eval.py.
    """

    references: tuple[tuple[str, ...], ...]
    object_corners: np.ndarray
    captions: tuple[str, ...]
    proposal_corners: np.ndarray


def _extents(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest corner `(boxes, 3)` of boxes `(boxes, 8, 3)`."""
    corners = np.asarray(corners, dtype=np.float32).reshape(-1, 8, 3)
    return corners.min(axis=1), corners.max(axis=1)


def _overlaps(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and generalised IoU `(a, b)` of axis-aligned boxes; in float32, as the toolbox computes them, which decides overlaps of one half."""
    (low_a, high_a), (low_b, high_b) = _extents(a), _extents(b)
    low = np.maximum(low_a[:, None], low_b[None])
    high = np.minimum(high_a[:, None], high_b[None])
    shared = np.prod(np.clip(high - low, 0, None), axis=-1)
    volume_a, volume_b = np.prod(high_a - low_a, axis=-1), np.prod(high_b - low_b, axis=-1)
    union = volume_a[:, None] + volume_b[None] - shared
    hull = np.prod(np.maximum(high_a[:, None], high_b[None]) - np.minimum(low_a[:, None], low_b[None]), axis=-1)
    iou = np.divide(shared, union, out=np.zeros_like(union), where=union > 0)
    return iou, iou - np.divide(hull - union, hull, out=np.zeros_like(hull), where=hull > 0)


def toolbox_scores(
    scenes: Mapping[str, SceneCaptions], iou_thresholds: Sequence[float] = (0.0, 0.25, 0.5)
) -> dict[str, float]:
    """The benchmark toolbox's precision, recall and F1 of dense captions.

    Proposals and objects of a scene are matched one to one by generalised IoU. The score of an object's caption counts where the boxes overlap enough.

    Args:
        scenes (`Mapping[str, SceneCaptions]`): By name, in the order of the corpus; each with at least one proposal.
        iou_thresholds (`Sequence[float]`): Overlaps that are enough.

    Returns:
        `dict[str, float]`: `<score>_<precision|recall|f1>@<threshold>`, fractions; F1 is 0 where precision and recall are (the toolbox gives NaN).

    Raises:
        ValueError: No scene, or one without proposals or objects.

    Source:
        Upstream: daveredrum/faster-captioning@32df70d benchmark/eval.py. An object that no proposal is left for gets the caption of the first
        proposal, as there; its box decides whether that counts.
    """
    if not scenes:
        raise ValueError("scan2cap toolbox: wanted at least one scene; got none")
    said, known, ious, proposals = [], [], [], 0
    for name, scene in scenes.items():
        if not scene.captions or not scene.references:
            raise ValueError(f"scan2cap toolbox: {name}: wanted objects and at least one proposal")
        iou, generalised = _overlaps(scene.proposal_corners, scene.object_corners)
        chosen = np.zeros(len(scene.references), dtype=np.int64)
        rows, columns = linear_sum_assignment(-generalised)
        chosen[columns] = rows
        proposals += len(scene.captions)
        for number, texts in enumerate(scene.references):
            said.append(scene.captions[chosen[number]])
            known.append(list(texts))
            ious.append(iou[chosen[number], number])
    found = text_scores(said, known, tokenize=False)
    scores: dict[str, float] = {}
    for threshold in iou_thresholds:
        counts = np.asarray(ious) >= threshold
        for name in _SCORES:
            if name not in found.each:
                continue
            total = float((found.each[name] * counts).sum())
            precision, recall = total / proposals, total / len(said)
            both = precision + recall
            scores[f"{name}_precision@{threshold:g}"] = precision
            scores[f"{name}_recall@{threshold:g}"] = recall
            scores[f"{name}_f1@{threshold:g}"] = 2 * precision * recall / both if both else 0.0
    return scores


__all__ = [
    "CAPTION_PROTOCOLS",
    "CaptionedObject",
    "SceneCaptions",
    "caption_scores",
    "caption_tokens",
    "toolbox_scores",
]
