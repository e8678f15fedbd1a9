"""Scan2Cap as a module of `evaluate`: `evaluate.load("eval/metrics/scan2cap")`, or this class."""

import datasets
import evaluate

from vidllm.eval.metrics.scan2cap.scores import scan2cap_scores


class Scan2Cap(evaluate.Metric):
    """Captions of objects; `compute(predictions=, references=, protocol="rooms")`, see `scan2cap_scores`.

    References are dictionaries with `category` and `colour` (an empty text: none with a name).

    Source:
        Ours.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of captions that name the category and the colour of their object (procedural rooms).",
            citation="Chen et al., Scan2Cap: Context-aware Dense Captioning in RGB-D Scans, CVPR 2021 (the task)",
            inputs_description="predictions: captions; references: category and colour of the object",
            features=datasets.Features({"predictions": text, "references": {"category": text, "colour": text}}),
        )

    def _compute(self, predictions: list, references: list, protocol: str = "rooms") -> dict:
        pairs = [(reference["category"], reference["colour"] or None) for reference in references]
        return scan2cap_scores(predictions, pairs, protocol)
