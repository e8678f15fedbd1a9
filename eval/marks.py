"""What every single row brought: the numbers whose means are the metrics of a run. No tensors.

BLEU has none: it is made of the counts of all texts together, and the mean of the texts' own BLEU is another number.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vidllm.eval.caption_scoring import TOOLBOX, caption_texts_of, toolbox_values
from vidllm.eval.intervals import Marks
from vidllm.eval.metrics.scan2cap.scores import scan2cap_scores
from vidllm.eval.metrics.scanqa import scores as scanqa
from vidllm.eval.metrics.scanrefer.scores import THRESHOLDS, scanrefer_overlaps
from vidllm.eval.metrics.sqa3d import scores as sqa3d
from vidllm.eval.metrics.text_scorers import TextScores
from vidllm.eval.oriented import oriented_overlaps
from vidllm.eval.scoring import BY_KIND
from vidllm.eval.truth import named_objects
from vidllm.eval.work import RECONSTRUCTION, BenchmarkWork, EvaluationWork


Records = Mapping[str, Mapping[str, Any]]
ByProtocol = dict[str, dict[str, Marks]]
# Scores of a corpus that single texts have; METEOR's is near their mean, the others' are their mean.
TEXT_MARKS = ("meteor", "rouge_l", "cider")


def row_marks(work: EvaluationWork, records: Mapping[str, Records], text: bool = False) -> dict[str, ByProtocol]:
    """Marks of all rows of a run.

    Args:
        work (`EvaluationWork`): What was asked.
        records (`Mapping`): Records by benchmark and id; complete.
        text (`bool`): Whether n-gram scores are computed; what needs Java is left out where there is none.

    Returns:
        `dict` by benchmark, protocol and metric: of exact matches, shares of boxes, `category_and_colour`, with their kinds; of METEOR, ROUGE-L and CIDEr;
        of the toolbox; and of whatever is scored per scene of `reconstruction`.

    Source:
        Ours.
    """
    found: dict[str, ByProtocol] = {}
    for name, benchmark in work.benchmarks.items():
        if benchmark.samples:
            rows = [records[name][sample.official_id] for sample in benchmark.samples]
            if name == "scanrefer":
                protocols = _boxes(benchmark, rows)
            elif name == "scan2cap":
                protocols = _captions(benchmark, rows, work.data_root, text)
            else:
                protocols = _answers(benchmark, rows, text)
            if protocols:
                found[name] = protocols
    if work.reconstructed:
        found[RECONSTRUCTION] = _scenes(
            {scene: records[RECONSTRUCTION][scene]["scores"] for scene in work.reconstructed}
        )
    return found


def _marks(work: BenchmarkWork, values: Iterable[float], chosen: np.ndarray | None = None, **more: Any) -> Marks:
    """One value per sample, or of some of the samples."""
    numbers = np.arange(len(work.samples)) if chosen is None else np.flatnonzero(chosen)
    return Marks(
        np.asarray(list(values), dtype=np.float64)[numbers],
        tuple(work.samples[number].scene_id for number in numbers),
        tuple(work.samples[number].official_id for number in numbers),
        **more,
    )


def _by_kind(work: BenchmarkWork, values: Mapping[str, Sequence[float]], macro: bool) -> dict[str, Marks]:
    """Marks of all rows, of those of each kind, and of the mean over kinds."""
    found = {name: _marks(work, each) for name, each in values.items()}
    if work.kinds is None:
        return found
    of_kind = np.array(work.kinds)
    for name, each in values.items():
        if macro:
            found[f"{name}_macro"] = _marks(work, each, groups=tuple(work.kinds))
        for kind in sorted(set(work.kinds)):
            found[f"{kind}/{name}"] = _marks(work, each, of_kind == kind)
    return found


def _answers(work: BenchmarkWork, rows: Sequence[Mapping[str, Any]], text: bool) -> ByProtocol:
    """ScanQA and SQA3D, as `score_answers` scores them."""
    said = [row.get("answers", row["answer"]) for row in rows]
    found: ByProtocol = {}
    for protocol in scanqa.PROTOCOLS if work.name == "scanqa" else sqa3d.PROTOCOLS:
        if work.name == "scanqa":
            accepted = [sample.answers for sample in work.samples]
            values = scanqa.scanqa_marks(said, accepted, protocol)
        else:
            values = sqa3d.sqa3d_marks(said, [sample.answers[0] for sample in work.samples], protocol)
        if protocol in BY_KIND[work.name]:
            found[protocol] = _by_kind(work, values, macro=True)
        else:
            found[protocol] = {name: _marks(work, each) for name, each in values.items()}
        if text and work.name == "scanqa":
            texts = scanqa.scanqa_texts(said, accepted, protocol)
            found[protocol].update(_texts(work, texts, [sample.official_id for sample in work.samples]))
    return {protocol: metrics for protocol, metrics in found.items() if metrics}


def _texts(work: BenchmarkWork, texts: TextScores, keys: Sequence[str], prefix: str = "") -> dict[str, Marks]:
    """Marks of a corpus whose texts have these ids."""
    scene_of = {sample.official_id: sample.scene_id for sample in work.samples}
    scenes = tuple(scene_of[key] for key in keys)
    return {
        f"{prefix}{name}": Marks(
            texts.each[name], scenes, tuple(keys), whole=texts.corpus[name] if name == "meteor" else None
        )
        for name in TEXT_MARKS
        if name in texts.each
    }


def _boxes(work: BenchmarkWork, rows: Sequence[Mapping[str, Any]]) -> ByProtocol:
    """ScanRefer under every protocol that the predictions allow; no box is a miss."""
    true = [sample.boxes_annotation[0] for sample in work.samples]
    measured = {"official": scanrefer_overlaps([row["box_annotation"] for row in rows], true)}
    if all("box_oriented" in row for row in rows):
        measured["oriented"] = oriented_overlaps([row["box_oriented"] for row in rows], true)
    if all("box_proposal" in row for row in rows):
        measured["proposals"] = scanrefer_overlaps([row["box_proposal"] for row in rows], true)
    found = {}
    for protocol, overlaps in measured.items():
        hits = {f"acc_{level}": (overlaps >= level).astype(float) for level in THRESHOLDS}
        found[protocol] = _by_kind(work, hits, macro=False)
    return found


def _captions(work: BenchmarkWork, rows: Sequence[Mapping[str, Any]], data_root: str, text: bool) -> ByProtocol:
    """Scan2Cap: of rooms by category and colour; by n-grams."""
    found: ByProtocol = {}
    named = named_objects(data_root, work.split)
    if named is not None:
        hits = [
            scan2cap_scores([row["caption"]], [named[sample.scene_id, sample.object_ids[0]]])["category_and_colour"]
            for row, sample in zip(rows, work.samples, strict=True)
        ]
        found["rooms"] = {"category_and_colour": _marks(work, hits)}
    if text:
        for one in caption_texts_of(work, rows):
            found.setdefault(one.protocol, {}).update(_texts(work, one.texts, one.keys, one.prefix))
        toolbox = toolbox_values(work, rows)
        if toolbox:
            found[TOOLBOX] = {name: _marks(work, values) for name, values in toolbox.items()}
    return found


def _scenes(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> ByProtocol:
    """Scores of scenes, by protocol and metric."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for scene, protocols in scores.items():
        for protocol, metrics in protocols.items():
            for metric, value in metrics.items():
                found.setdefault(protocol, {}).setdefault(metric, {})[scene] = value
    return {
        protocol: {
            metric: Marks(np.array(list(values.values()), dtype=np.float64), tuple(values), tuple(values))
            for metric, values in metrics.items()
        }
        for protocol, metrics in found.items()
    }


__all__ = ["TEXT_MARKS", "row_marks"]
