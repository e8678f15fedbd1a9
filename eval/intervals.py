"""How sure a number is: marks of single rows, and intervals over scenes by the bootstrap. No tensors.

Rows of one scene depend on each other, so scenes are drawn again, not rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vidllm.eval.metrics.answers import clean_answer, refined_match
from vidllm.eval.metrics.scan2cap.scores import scan2cap_scores
from vidllm.eval.metrics.scanrefer.scores import THRESHOLDS, scanrefer_iou
from vidllm.eval.truth import named_objects
from vidllm.eval.work import RECONSTRUCTION, BenchmarkWork, EvaluationWork


Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Marks:
    """One number per row, whose mean is a metric.

    Args:
        values (`np.ndarray` of shape `(rows,)`): float64.
        scenes (`tuple[str, ...]`): Scene of each row.
        ids (`tuple[str, ...]`): Of each row.

    Source:
        Ours.
    """

    values: np.ndarray
    scenes: tuple[str, ...]
    ids: tuple[str, ...]


def bootstrap_interval(marks: Marks, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Where the mean lies if other scenes of the same kind had been evaluated.

    Args:
        marks (`Marks`): At least one row.
        level (`float`): Share of the draws within the interval.
        draws (`int`): How often as many scenes are drawn, with replacement.
        seed (`int`): Of the draws.

    Returns:
        `tuple[float, float]`: percentiles of the means; the mean itself twice where there is one scene.

    Raises:
        ValueError: No row, or numbers out of range.

    Source:
        Upstream: Efron 1979 (percentile bootstrap). Ours: over scenes; a scene brings all of its rows.
    """
    if not len(marks.values) or not 0 < level < 1 or draws < 1:
        raise ValueError(
            f"bootstrap: wanted rows, a level in (0, 1) and draws; got {len(marks.values)}, {level}, {draws}"
        )
    names, scene_of = np.unique(np.array(marks.scenes), return_inverse=True)
    sums, counts = np.bincount(scene_of, marks.values), np.bincount(scene_of)
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def row_marks(work: EvaluationWork, records: Mapping[str, Records]) -> dict[str, dict[str, dict[str, Marks]]]:
    """Marks of all rows of a run.

    Args:
        work (`EvaluationWork`): What was asked.
        records (`Mapping`): Records by benchmark and id; complete.

    Returns:
        `dict` by benchmark, protocol and metric, of the metrics that are means over rows: `exact_match`, `exact_match_refined`, `acc_0.25`, `acc_0.5`,
        `category_and_colour`, and whatever is scored per scene of `reconstruction`.

    Source:
        Ours.
    """
    found: dict[str, dict[str, dict[str, Marks]]] = {}
    for name, benchmark in work.benchmarks.items():
        if benchmark.samples:
            of = {"scanrefer": _boxes, "scan2cap": _captions}.get(name, _answers)
            protocols = of(benchmark, records[name], work.data_root)
            if protocols:
                found[name] = protocols
    if work.reconstructed:
        found[RECONSTRUCTION] = _scenes(
            {scene: records[RECONSTRUCTION][scene]["scores"] for scene in work.reconstructed}
        )
    return found


def _marks(work: BenchmarkWork, values: Sequence[float]) -> Marks:
    """One value per sample."""
    return Marks(
        np.asarray(values, dtype=np.float64),
        tuple(sample.scene_id for sample in work.samples),
        tuple(sample.official_id for sample in work.samples),
    )


def _answers(work: BenchmarkWork, records: Records, _: str) -> dict[str, dict[str, Marks]]:
    """ScanQA and SQA3D."""
    said = [records[sample.official_id]["answer"] for sample in work.samples]
    if work.name == "scanqa":
        hits = [answer in sample.answers for answer, sample in zip(said, work.samples, strict=True)]
        return {"official": {"exact_match": _marks(work, hits)}}
    right = [sample.answers[0] for sample in work.samples]
    exact = [answer == other for answer, other in zip(said, right, strict=True)]
    cleaned = [refined_match(clean_answer(a), [clean_answer(b)]) for a, b in zip(said, right, strict=True)]
    return {
        "official": {"exact_match": _marks(work, exact)},
        "leo": {
            "exact_match": _marks(work, [hit for hit, _ in cleaned]),
            "exact_match_refined": _marks(work, [hit for _, hit in cleaned]),
        },
    }


def _boxes(work: BenchmarkWork, records: Records, _: str) -> dict[str, dict[str, Marks]]:
    """ScanRefer; no box is a miss."""
    found = [records[sample.official_id]["box_annotation"] for sample in work.samples]
    ious = [
        0.0 if box is None else float(scanrefer_iou(np.asarray(box), np.asarray(sample.boxes_annotation[0])))
        for box, sample in zip(found, work.samples, strict=True)
    ]
    return {"official": {f"acc_{level}": _marks(work, [iou >= level for iou in ious]) for level in THRESHOLDS}}


def _captions(work: BenchmarkWork, records: Records, data_root: str) -> dict[str, dict[str, Marks]]:
    """Scan2Cap of rooms; others are not scored."""
    named = named_objects(data_root, work.split)
    if named is None:
        return {}
    hits = [
        scan2cap_scores([records[sample.official_id]["caption"]], [named[sample.scene_id, sample.object_ids[0]]])
        for sample in work.samples
    ]
    return {"rooms": {"category_and_colour": _marks(work, [hit["category_and_colour"] for hit in hits])}}


def _scenes(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Marks]]:
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


__all__ = ["Marks", "bootstrap_interval", "row_marks"]
