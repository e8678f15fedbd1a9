"""Captions of a run under every protocol of Scan2Cap: the scores, and the numbers of single objects that they are means of. Texts and boxes, no tensors."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vidllm.eval.metrics.scan2cap.captions import (
    CAPTION_PROTOCOLS,
    END,
    START,
    CaptionedObject,
    caption_texts,
    caption_tokens,
)
from vidllm.eval.metrics.scan2cap.toolbox import BOX_ORDER, SceneCaptions, toolbox_scores, toolbox_texts
from vidllm.eval.metrics.text_scorers import TextScores
from vidllm.eval.proposals import CAPTION_IOUS
from vidllm.eval.work import BenchmarkWork
from vidllm.processing.samples import Sample


TOOLBOX = "benchmark_toolbox"
# At true places every proposal lies on its object, so that precision, recall and F1 are one number, whatever the overlap.
TOOLBOX_ENDING = "_f1@0.5"


@dataclass(frozen=True)
class CaptionTexts:
    """Captions as one protocol sees them.

    Args:
        protocol (`str`): Which.
        prefix (`str`): What its metrics' names begin with.
        keys (`tuple[str, ...]`): Of the objects that it scores, in order.
        texts (`TextScores`): Their scores.

    Source:
        Ours.
    """

    protocol: str
    prefix: str
    keys: tuple[str, ...]
    texts: TextScores


def captioned(sample: Sample, record: Mapping[str, Any]) -> CaptionedObject:
    """An object with what people and the model say of it.

    Args:
        sample (`Sample`): Scan2Cap's.
        record (`Mapping`): `caption`; with proposals also `proposal` (None: no caption) and `iou`, else the true place was asked about.

    Returns:
        `CaptionedObject`

    Source:
        Upstream: daveredrum/Scan2Cap@b9e9610 (the file's own tokens are compared). Ours: where a file has none, descriptions are cut by our rule.
    """
    rows = sample.official.get("rows", [])
    kept = [row.get("token") if isinstance(row, Mapping) else None for row in rows]
    tokens = [
        tuple(words)
        if isinstance(words, list) and all(isinstance(word, str) for word in words) and words
        else caption_tokens(said)
        for words, said in zip(
            kept if len(kept) == len(sample.references) else [None] * len(sample.references),
            sample.references,
            strict=True,
        )
    ]
    given = "iou" not in record or record["proposal"] is not None
    return CaptionedObject(
        key=sample.official_id,
        descriptions=sample.references,
        tokens=tuple(tokens),
        caption=record["caption"] if given else None,
        iou=float(record.get("iou", 1.0)),
    )


def score_caption_texts(work: BenchmarkWork, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Score captions by n-grams under every protocol.

    Args:
        work (`BenchmarkWork`): Scan2Cap's objects.
        records (`Sequence[Mapping]`): One per object, see `captioned`.

    Returns:
        `dict` by protocol and metric. With proposals: m@0.5IoU, and m@0.25IoU as `iou_0.25/<metric>`. At true places overlaps are 1, and the benchmark
        toolbox is scored too (`<metric>_f1@0.5`), every object being a proposal.

    Source:
        Ours.
    """
    found: dict[str, dict[str, float]] = {}
    for one in caption_texts_of(work, records):
        numbers = {f"{one.prefix}{name}": value for name, value in one.texts.corpus.items()}
        found.setdefault(one.protocol, {}).update(numbers)
    scenes = _toolbox_scenes(work, records)
    if scenes:
        found[TOOLBOX] = {
            name: value
            for name, value in toolbox_scores(scenes).items()
            if name.endswith(TOOLBOX_ENDING) and math.isfinite(value)
        }
    return {name: scores for name, scores in found.items() if scores}


def caption_texts_of(work: BenchmarkWork, records: Sequence[Mapping[str, Any]]) -> Iterator[CaptionTexts]:
    """Captions under every protocol but the toolbox, whose scores `score_caption_texts` gives.

    Args:
        work (`BenchmarkWork`): Scan2Cap's objects.
        records (`Sequence[Mapping]`): One per object, see `captioned`.

    Returns:
        `Iterator[CaptionTexts]`

    Source:
        Ours.
    """
    objects = [captioned(sample, record) for sample, record in zip(work.samples, records, strict=True)]
    thresholds = CAPTION_IOUS[:1] if _at_true_places(records) else CAPTION_IOUS
    for protocol in CAPTION_PROTOCOLS:
        if protocol == "ll3da" and all(item.key.endswith("unknown") for item in objects):
            continue
        for number, threshold in enumerate(thresholds):
            kept, texts = caption_texts(objects, protocol, threshold)
            prefix = f"iou_{threshold}/" if number else ""
            yield CaptionTexts(protocol, prefix, tuple(item.key for item in kept), texts)


def toolbox_values(work: BenchmarkWork, records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """What each object adds to the toolbox's numbers.

    Args:
        work (`BenchmarkWork`): Scan2Cap's objects.
        records (`Sequence[Mapping]`): One per object, see `captioned`.

    Returns:
        `dict` of `np.ndarray` of shape `(objects,)` by metric, in the order of the samples; none where the toolbox is not scored.

    Source:
        Ours.
    """
    scenes = _toolbox_scenes(work, records)
    if not scenes:
        return {}
    matched = toolbox_texts(scenes)
    counts = matched.ious >= 0.5
    # Scenes one after the other, in which the samples may be mixed.
    order = [number for numbers in _rows_by_scene(work).values() for number in numbers]
    found = {}
    for name, values in matched.texts.each.items():
        found[f"{name}{TOOLBOX_ENDING}"] = np.empty(len(order))
        found[f"{name}{TOOLBOX_ENDING}"][order] = values * counts
    return found


def _at_true_places(records: Sequence[Mapping[str, Any]]) -> bool:
    return not any("iou" in record for record in records)


def _rows_by_scene(work: BenchmarkWork) -> dict[str, list[int]]:
    """Numbers of the samples of each scene."""
    rows: dict[str, list[int]] = {}
    for number, sample in enumerate(work.samples):
        rows.setdefault(sample.scene_id, []).append(number)
    return rows


def _has_box(sample: Sample) -> bool:
    return sample.boxes_annotation is not None and len(sample.boxes_annotation) > 0


def _toolbox_scenes(work: BenchmarkWork, records: Sequence[Mapping[str, Any]]) -> dict[str, SceneCaptions]:
    """Objects by scene as the toolbox takes them: at true places, each is its own proposal; none where it cannot score them."""
    if not _at_true_places(records) or not all(_has_box(sample) for sample in work.samples):
        return {}
    objects = [captioned(sample, record) for sample, record in zip(work.samples, records, strict=True)]
    scenes = {}
    for scene, numbers in _rows_by_scene(work).items():
        boxes = np.stack([work.samples[number].boxes_annotation[0] for number in numbers])
        corners = boxes[:, None, :3] + np.array(BOX_ORDER)[None] * boxes[:, None, 3:] / 2
        said = tuple(
            f"{START} {' '.join(caption_tokens(objects[number].caption or ''))} {END}".replace("  ", " ")
            for number in numbers
        )
        # Whole, unlike Scan2Cap's own scorer: the toolbox's references are not cut after 30 tokens.
        known = tuple(
            tuple(f"{START} {' '.join(words)} {END}" for words in objects[number].tokens) for number in numbers
        )
        scenes[scene] = SceneCaptions(known, corners, said, corners)
    return scenes


__all__ = [
    "TOOLBOX",
    "TOOLBOX_ENDING",
    "CaptionTexts",
    "caption_texts_of",
    "captioned",
    "score_caption_texts",
    "toolbox_values",
]
