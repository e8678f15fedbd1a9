"""From records of predictions to scores, the model's and the baselines', by benchmark and protocol.

Shapes: each box is `(6,)`.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vidllm.eval.baselines import answer_baselines, constant_box, constant_caption, constant_proposal
from vidllm.eval.caption_scoring import score_caption_texts
from vidllm.eval.metrics.scan2cap.scores import scan2cap_scores
from vidllm.eval.metrics.scanqa import scores as scanqa
from vidllm.eval.metrics.scanrefer.scores import scanrefer_scores
from vidllm.eval.metrics.sqa3d import scores as sqa3d
from vidllm.eval.metrics.text_scorers import java_obstacle
from vidllm.eval.oriented import oriented_scores
from vidllm.eval.reconstruction import Scores, mean_over_scenes
from vidllm.eval.train_facts import TrainFacts, blind_items
from vidllm.eval.truth import named_objects
from vidllm.eval.work import RECONSTRUCTION, BenchmarkWork, EvaluationWork
from vidllm.processing.benchmarks.proposals import SceneProposals


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


@dataclass(frozen=True)
class ScoringSettings:
    """What is needed beside the predictions.

    Args:
        data_root (`str`): Absolute path.
        facts (`TrainFacts`, *optional*): For the baselines.
        text (`bool`): Whether n-gram scores are computed.
        proposals (`SceneProposals`, *optional*): What the model had to choose from.

    Source:
        Ours.
    """

    data_root: str
    facts: TrainFacts | None = None
    text: bool = False
    proposals: SceneProposals | None = None


# Protocols under which answers are scored by kind of question, too; of the others the numbers of all questions are enough.
BY_KIND = {"scanqa": ("official",), "sqa3d": ("official", "leo")}


def text_obstacle() -> str | None:
    """Why n-gram scores, or some of them, cannot be computed here.

    Returns:
        `str`, or None: all can.

    Source:
        Ours: a score that could not be computed is missing and said to be, never zero.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "pycocoevalcap is not installed (extra `eval`)"
    return java_obstacle()


def can_score_text() -> bool:
    """Whether any n-gram score can be computed here.

    Returns:
        `bool`

    Source:
        Ours: without Java those remain that need no tokenizer.
    """
    return importlib.util.find_spec("pycocoevalcap") is not None


def score_answers(work: BenchmarkWork, answers: Sequence[str | Sequence[str]], text: bool = False) -> Scores:
    """Score answers under every protocol of their benchmark.

    Args:
        work (`BenchmarkWork`): ScanQA's or SQA3D's questions.
        answers (`Sequence`): One per question; of ScanQA several in order of preference are taken, too.
        text (`bool`): Whether n-gram scores are computed; SQA3D has none.

    Returns:
        `dict` by protocol and metric; a protocol that has no number without n-grams is left out then.

    Source:
        Ours.
    """
    found: Scores = {}
    if work.name == "scanqa":
        accepted = [sample.answers for sample in work.samples]
        for name in scanqa.PROTOCOLS:
            kinds = work.kinds if name in BY_KIND["scanqa"] else None
            found[name] = scanqa.scanqa_scores(answers, accepted, kinds, name, text)
    else:
        right = [sample.answers[0] for sample in work.samples]
        for name in sqa3d.PROTOCOLS:
            found[name] = sqa3d.sqa3d_scores(answers, right, work.kinds if name in BY_KIND["sqa3d"] else None, name)
    return {name: scores for name, scores in found.items() if scores}


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
    return {"official": scanrefer_scores(boxes, _true_boxes(work), work.kinds)}


def _true_boxes(work: BenchmarkWork) -> list[np.ndarray]:
    """Box of each description."""
    return [sample.boxes_annotation[0] for sample in work.samples]


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


def _score_questions(work: BenchmarkWork, records: Records, settings: ScoringSettings) -> Scored:
    """ScanQA and SQA3D, with baselines that do not look."""
    rows = [records[sample.official_id] for sample in work.samples]
    text = settings.text and can_score_text()
    scored = Scored(score_answers(work, [row.get("answers", row["answer"]) for row in rows], text))
    if settings.text and work.name == "scanqa":
        _note_missing(scored, work.name)
    train = [] if settings.facts is None else settings.facts.questions.get(work.name, [])
    if not train:
        scored.notes.append(f"{work.name}: no blind baselines, because there is no train split to fit them on")
        return scored
    answers = answer_baselines(train, blind_items(work.samples, work.kinds))
    scored.baselines = {kind: score_answers(work, said, text) for kind, said in answers.items()}
    scored.notes.append(
        f"{work.name}: blind, majority and constant fitted on {len(train)} questions ({settings.facts.source})"
    )
    return scored


def _score_grounding(work: BenchmarkWork, records: Records, settings: ScoringSettings) -> Scored:
    """ScanRefer: boxes that the model finds, upright and as it turns them, and those that it chooses; with one box for all."""
    rows = [records[sample.official_id] for sample in work.samples]
    true = _true_boxes(work)
    box, how = constant_box(settings.facts, np.stack(true))
    scored = Scored(score_boxes(work, [row["box_annotation"] for row in rows]))
    constant = score_boxes(work, [box.tolist()] * len(rows))
    scored.notes.append(f"{work.name}: constant is {how}")
    if all("box_oriented" in row for row in rows):
        scored.results["oriented"] = oriented_scores([row["box_oriented"] for row in rows], true, work.kinds)
        constant["oriented"] = oriented_scores([[*box.tolist(), 0, 0, 0]] * len(rows), true, work.kinds)
    else:
        scored.notes.append(f"{work.name}: no oriented boxes, because the predictions do not say how boxes are turned")
    if settings.proposals is not None and all("box_proposal" in row for row in rows):
        boxes = settings.proposals.boxes_annotation
        scored.results["proposals"] = scanrefer_scores([row["box_proposal"] for row in rows], true, work.kinds)
        said = [constant_proposal(box, boxes[sample.scene_id]) for sample in work.samples]
        constant["proposals"] = scanrefer_scores(said, true, work.kinds)
        scored.notes.append(
            f"{work.name}: proposals are {settings.proposals.source}, on average {np.mean([len(boxes[sample.scene_id]) for sample in work.samples]):.1f} "
            "per description; constant is the one nearest to the constant box"
        )
    scored.baselines["constant"] = constant
    return scored


def _score_captioning(work: BenchmarkWork, records: Records, settings: ScoringSettings) -> Scored:
    """Scan2Cap: by n-grams, and of rooms by category and colour; with one caption for all."""
    rows = [records[sample.official_id] for sample in work.samples]
    named = named_objects(settings.data_root, work.split)
    text = settings.text and can_score_text()
    scored = Scored({})
    if named is None:
        objects = [(next(iter(sample.object_names), "object").replace("_", " "), None) for sample in work.samples]
        caption, how = constant_caption(None, objects)
    else:
        objects = [named[sample.scene_id, sample.object_ids[0]] for sample in work.samples]
        caption, how = constant_caption(settings.facts, objects)
        scored.results = score_captions([row["caption"] for row in rows], objects)
        scored.baselines["constant"] = score_captions([caption] * len(objects), objects)
    if text:
        scored.results.update(score_caption_texts(work, rows))
        # Said of every object at the same places as the model's.
        same = [{**row, "caption": caption} for row in rows]
        scored.baselines.setdefault("constant", {}).update(score_caption_texts(work, same))
    if settings.text:
        _note_missing(scored, work.name)
    elif named is None:
        scored.notes.append(
            f"{work.name}: captions are written but not scored, because n-gram scores were not asked for"
        )
    scored.notes.append(f"{work.name}: constant is {caption!r}, {how}")
    if any("iou" in row for row in rows):
        asked = sum(row.get("proposal") is not None for row in rows)
        where = "proposals" if settings.proposals is None else f"proposals ({settings.proposals.source})"
        scored.notes.append(
            f"{work.name}: captions are of {where}, which {asked} of {len(rows)} objects have; scores count them where they overlap by 0.5 "
            "(iou_0.25: by 0.25); no benchmark_toolbox, which wants captions of all proposals"
        )
    elif text:
        scored.notes.append(f"{work.name}: captions are of the true centres, so that every object has one")
    return scored


def _note_missing(scored: Scored, name: str) -> None:
    """Say which n-gram scores are missing."""
    obstacle = text_obstacle()
    if obstacle is not None:
        scored.notes.append(
            f"{name}: n-gram scores that need Java (METEOR; all of protocols with the PTB tokenizer) are missing: {obstacle}"
        )


_SCORERS: dict[str, Callable[[BenchmarkWork, Records, ScoringSettings], Scored]] = {
    "scanqa": _score_questions,
    "sqa3d": _score_questions,
    "scanrefer": _score_grounding,
    "scan2cap": _score_captioning,
}


def score_run(work: EvaluationWork, records: Mapping[str, Records], settings: ScoringSettings) -> dict[str, Scored]:
    """Score everything that a run has predicted.

    Args:
        work (`EvaluationWork`): What was asked.
        records (`Mapping`): Records by benchmark and id; complete.
        settings (`ScoringSettings`): What is needed beside them.

    Returns:
        `dict[str, Scored]`: by benchmark; one without questions is left out.

    Source:
        Ours.
    """
    found = {
        name: _SCORERS[name](benchmark, records[name], settings)
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


__all__ = [
    "BY_KIND",
    "Scored",
    "ScoringSettings",
    "can_score_text",
    "score_answers",
    "score_boxes",
    "score_captions",
    "score_run",
    "text_obstacle",
]
