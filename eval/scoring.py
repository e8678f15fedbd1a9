"""From records of predictions to scores, the model's and the baselines', by benchmark and protocol.

Shapes: each box is `(6,)`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vidllm.eval.baselines import answer_baselines, constant_box, constant_caption
from vidllm.eval.metrics.scan2cap.scores import scan2cap_scores
from vidllm.eval.metrics.scanqa import scores as scanqa
from vidllm.eval.metrics.scanrefer.scores import scanrefer_scores
from vidllm.eval.metrics.sqa3d import scores as sqa3d
from vidllm.eval.reconstruction import Scores, mean_over_scenes
from vidllm.eval.train_facts import TrainFacts, blind_items
from vidllm.eval.truth import named_objects
from vidllm.eval.work import RECONSTRUCTION, BenchmarkWork, EvaluationWork


Records = Mapping[str, Mapping[str, Any]]


@dataclass
class Scored:
    """Scores of one benchmark.

    Args:
        results (`dict`): The model's, by protocol and metric.
        baselines (`dict`): By kind (`blind`, `majority`, `constant`), protocol and metric.
        notes (`list[str]`): How the baselines were made; what is not scored, and why.

    Source:
        Ours.
    """

    results: Scores
    baselines: dict[str, Scores] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# Of the protocols that there are, those under which a run is scored; the others compare with one peer each.
ANSWER_PROTOCOLS = {"scanqa": ("official",), "sqa3d": ("official", "leo")}


def score_answers(work: BenchmarkWork, answers: Sequence[str]) -> Scores:
    """Score answers under every protocol of their benchmark.

    Args:
        work (`BenchmarkWork`): ScanQA's or SQA3D's questions.
        answers (`Sequence[str]`): One per question.

    Returns:
        `dict` by protocol and metric.

    Source:
        Ours.
    """
    if work.name == "scanqa":
        accepted = [sample.answers for sample in work.samples]
        return {name: scanqa.scanqa_scores(answers, accepted, work.kinds, name) for name in ANSWER_PROTOCOLS["scanqa"]}
    right = [sample.answers[0] for sample in work.samples]
    return {name: sqa3d.sqa3d_scores(answers, right, work.kinds, name) for name in ANSWER_PROTOCOLS["sqa3d"]}


def score_boxes(work: BenchmarkWork, boxes: Sequence[Sequence[float] | None]) -> Scores:
    """Score boxes of descriptions.

    Args:
        work (`BenchmarkWork`): ScanRefer's descriptions.
        boxes (`Sequence`): `(cx, cy, cz, dx, dy, dz)` per description, annotation frame, metres; None is a miss.

    Returns:
        `dict` by protocol and metric.

    Source:
        Ours.
    """
    true = [sample.boxes_annotation[0] for sample in work.samples]
    return {"official": scanrefer_scores(boxes, true, work.kinds)}


def score_captions(captions: Sequence[str], objects: Sequence[tuple[str, str | None]]) -> Scores:
    """Score captions of the rooms' objects.

    Args:
        captions (`Sequence[str]`): One per object.
        objects (`Sequence` of `(category, colour)`): What each object is.

    Returns:
        `dict` by protocol and metric.

    Source:
        Ours.
    """
    return {"rooms": scan2cap_scores(captions, objects)}


def _score_questions(work: BenchmarkWork, records: Records, facts: TrainFacts | None, _: str) -> Scored:
    """ScanQA and SQA3D, with blind baselines."""
    scored = Scored(score_answers(work, [records[sample.official_id]["answer"] for sample in work.samples]))
    train = [] if facts is None else facts.questions.get(work.name, [])
    if not train:
        scored.notes.append(f"{work.name}: no blind baselines, because there is no train split to fit them on")
        return scored
    answers = answer_baselines(train, blind_items(work.samples, work.kinds))
    scored.baselines = {kind: score_answers(work, said) for kind, said in answers.items()}
    scored.notes.append(f"{work.name}: blind and majority fitted on {len(train)} questions ({facts.source})")
    return scored


def _score_grounding(work: BenchmarkWork, records: Records, facts: TrainFacts | None, _: str) -> Scored:
    """ScanRefer, with one box for all."""
    scored = Scored(score_boxes(work, [records[sample.official_id]["box_annotation"] for sample in work.samples]))
    box, how = constant_box(facts, np.stack([sample.boxes_annotation[0] for sample in work.samples]))
    scored.baselines["constant"] = score_boxes(work, [box.tolist()] * len(work.samples))
    scored.notes.append(f"{work.name}: constant is {how}")
    return scored


def _score_captioning(work: BenchmarkWork, records: Records, facts: TrainFacts | None, data_root: str) -> Scored:
    """Scan2Cap of rooms, with one caption for all."""
    named = named_objects(data_root, work.split)
    if named is None:
        return Scored(
            {}, notes=[f"{work.name}: captions are written but not scored, because their protocol is for rooms"]
        )
    objects = [named[sample.scene_id, sample.object_ids[0]] for sample in work.samples]
    scored = Scored(score_captions([records[sample.official_id]["caption"] for sample in work.samples], objects))
    caption, how = constant_caption(facts, objects)
    scored.baselines["constant"] = score_captions([caption] * len(objects), objects)
    scored.notes.append(f"{work.name}: constant is {caption!r}, {how}")
    return scored


_SCORERS: dict[str, Callable[[BenchmarkWork, Records, TrainFacts | None, str], Scored]] = {
    "scanqa": _score_questions,
    "sqa3d": _score_questions,
    "scanrefer": _score_grounding,
    "scan2cap": _score_captioning,
}


def score_run(work: EvaluationWork, records: Mapping[str, Records], facts: TrainFacts | None) -> dict[str, Scored]:
    """Score everything that a run has predicted.

    Args:
        work (`EvaluationWork`): What was asked.
        records (`Mapping`): Records by benchmark and id; complete.
        facts (`TrainFacts`, *optional*): For the baselines.

    Returns:
        `dict[str, Scored]`: by benchmark; one without questions is left out.

    Source:
        Ours.
    """
    found = {
        name: _SCORERS[name](benchmark, records[name], facts, work.data_root)
        for name, benchmark in work.benchmarks.items()
        if benchmark.samples
    }
    if work.reconstructed:
        scenes = [records[RECONSTRUCTION][scene_id] for scene_id in work.reconstructed]
        found[RECONSTRUCTION] = Scored(
            mean_over_scenes([scene["scores"] for scene in scenes]),
            {"constant": mean_over_scenes([scene["constant"] for scene in scenes])},
        )
        relative = sum(scene["unit"] != "m" for scene in scenes)
        if relative:
            found[RECONSTRUCTION].notes.append(
                f"{RECONSTRUCTION}: the model's geometry has no unit in {relative} of {len(scenes)} scenes, so that metric errors mean little"
            )
    return found


__all__ = ["Scored", "score_answers", "score_boxes", "score_captions", "score_run"]
