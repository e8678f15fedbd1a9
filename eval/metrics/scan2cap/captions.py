"""Scan2Cap's scores of captions under the protocols of its peers: m@kIoU. Texts and boxes, no tensors. The benchmark toolbox is in `toolbox.py`.

Shapes: O objects, P proposals of a scene.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vidllm.eval.metrics.answers import check_protocol, check_texts
from vidllm.eval.metrics.scanrefer.scores import scanrefer_iou
from vidllm.eval.metrics.text_scorers import TextScores, text_scores


CAPTION_PROTOCOLS = ("scan2cap", "leo", "video3dllm", "ll3da")
# Protocols by which an overlap of exactly the threshold is not enough.
_STRICT = ("scan2cap", "ll3da")
START, END = "sos", "eos"
# Scan2Cap cuts descriptions after so many tokens.
MOST_TOKENS = 30
_TOKEN = re.compile(r"[\w'-]+|[^\w\s]")
# LL3DA leaves objects out whose key ends like this: what it calls proposals on objects that nobody described.
_LL3DA_UNKNOWN = "unknown"
_LL3DA_SCORES = ("bleu_4", "cider", "rouge_l", "meteor")
SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "cider", "rouge_l", "meteor")


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
    if protocol == "ll3da":
        said = _between(caption).replace("  ", " ") if has_caption else f"{START} {END}"
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
        objects (`Sequence[CaptionedObject]`): All objects of the split, in the order of the corpus, each once.
        protocol (`str`): `scan2cap`: tokens, references cut after 30, IoU greater than the threshold. `leo`: IoU at least the threshold, texts with full
            stops apart, no lower case. `video3dllm` (also 3DRS, VG-LLM, Ross3D): descriptions as text in lower case, IoU at least the threshold.
            `ll3da`: the caption as it is but for doubled blanks, references cut after 30, IoU greater than the threshold; objects whose key ends
            in "unknown" are left out.
        iou_threshold (`float`): k.

    Returns:
        `dict[str, float]`: `bleu_1` to `bleu_4`, `cider`, `rouge_l`, `meteor` (under `ll3da` of BLEU only `bleu_4`), fractions, without those that
        cannot be computed here; `objects`, `objects_with_caption`.

    Raises:
        ValueError: No objects, one twice, one without a description, a caption that is no text, an overlap that is not finite, or an
            unknown protocol.

    Source:
        Upstream: daveredrum/Scan2Cap@b9e9610 lib/eval_helper.py; embodied-generalist/embodied-generalist@567f2d8 evaluator/cap_eval.py;
        LaVi-Lab/Video-3D-LLM@3ff70e8 llava/eval/eval_scan2cap.py; Open3DA/LL3DA@ebbdd77 eval_utils/evaluate_densecap.py. "sos eos" keeps a
        floor: its ROUGE and METEOR are not 0.
    """
    kept, texts = caption_texts(objects, protocol, iou_threshold)
    hits = sum(_counts(item, protocol, iou_threshold) for item in kept)
    return {**texts.corpus, "objects": float(len(kept)), "objects_with_caption": float(hits)}


def _counts(item: CaptionedObject, protocol: str, iou_threshold: float) -> bool:
    """Whether an object has a caption whose proposal lies near enough."""
    near = item.iou > iou_threshold if protocol in _STRICT else item.iou >= iou_threshold
    return item.caption is not None and near


def caption_texts(
    objects: Sequence[CaptionedObject], protocol: str = "scan2cap", iou_threshold: float = 0.5
) -> tuple[list[CaptionedObject], TextScores]:
    """N-gram scores of the captions, and of each of them.

    Args:
        objects (`Sequence[CaptionedObject]`): As of `caption_scores`.
        protocol (`str`): As of `caption_scores`.
        iou_threshold (`float`): k.

    Returns:
        `tuple`: the objects that the protocol scores, in order; those scores of it that can be computed here.

    Raises:
        ValueError: As of `caption_scores`.

    Source:
        Upstream: as of `caption_scores`.
    """
    check_protocol("scan2cap", protocol, CAPTION_PROTOCOLS)
    if protocol == "ll3da":
        objects = [item for item in objects if not item.key.endswith(_LL3DA_UNKNOWN)]
    _check_objects(objects)
    prepared = [_prepared(item, protocol, _counts(item, protocol, iou_threshold)) for item in objects]
    found = text_scores([said for said, _ in prepared], [known for _, known in prepared], tokenize=False)
    names = [name for name in (_LL3DA_SCORES if protocol == "ll3da" else SCORES) if name in found.corpus]
    corpus, each = ({name: values[name] for name in names} for values in (found.corpus, found.each))
    return list(objects), TextScores(corpus, each, found.missing)


def _check_objects(objects: Sequence[CaptionedObject]) -> None:
    """Refuse objects that cannot be scored."""
    if not objects:
        raise ValueError("scan2cap: wanted at least one object; got none")
    seen: set[str] = set()
    for item in objects:
        if not item.descriptions or len(item.descriptions) != len(item.tokens):
            raise ValueError(
                f"scan2cap: wanted descriptions and their tokens of each object; {item.key} has none, or not both"
            )
        if item.key in seen:
            raise ValueError(f"scan2cap: wanted each object once; got {item.key} twice")
        if not np.isfinite(item.iou):
            raise ValueError(f"scan2cap: {item.key}: wanted a finite overlap; got {item.iou}")
        seen.add(item.key)
    check_texts("scan2cap, captions", [item.caption for item in objects if item.caption is not None])


def best_proposals(
    proposals: np.ndarray, objects: np.ndarray, iou_threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Which proposal speaks for which object, as LL3DA and Vote2Cap-DETR match them.

    A proposal belongs to the object that it overlaps most (the first of several); of an object's proposals the one of greatest overlap speaks
    (the first of several).

    Args:
        proposals (`np.ndarray` of shape `(P, 6)` or `(P, 8, 3)`): After non-maximum suppression, without background; see `scanrefer_iou`.
        objects (`np.ndarray` of shape `(O, 6)` or `(O, 8, 3)`): All objects of the scene, in the same frame and unit.
        iou_threshold (`float`): Overlaps that are not greater do not count.

    Returns:
        `tuple`: index of the proposal, -1 without one (`np.ndarray` of shape `(O,)`, int64), and its overlap, 0 without one
        (`np.ndarray` of shape `(O,)`).

    Raises:
        ValueError: Boxes of another shape.

    Source:
        Upstream: Open3DA/LL3DA@ebbdd77 eval_utils/evaluate_densecap.py.
    """
    chosen, best = np.full(len(objects), -1, dtype=np.int64), np.zeros(len(objects))
    if not len(proposals) or not len(objects):
        return chosen, best
    overlaps = scanrefer_iou(np.asarray(proposals)[:, None], np.asarray(objects)[None])
    for number, target in enumerate(overlaps.argmax(axis=1)):
        overlap = overlaps[number, target]
        if overlap > iou_threshold and overlap > best[target]:
            chosen[target], best[target] = number, overlap
    return chosen, best


__all__ = [
    "CAPTION_PROTOCOLS",
    "SCORES",
    "CaptionedObject",
    "best_proposals",
    "caption_scores",
    "caption_texts",
    "caption_tokens",
]
