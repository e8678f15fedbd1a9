"""Scale and room frame as a module of `evaluate`: `evaluate.load("eval/metrics/metric_scale")`, or this class."""

import datasets
import evaluate
import numpy as np

from vidllm.eval.metrics.answers import protocol_of
from vidllm.eval.metrics.metric_scale.scores import metric_scale_scores


class MetricScale(evaluate.Metric):
    """Scale and room frame of scenes, mean over scenes; `compute(predictions=, references=, protocol="metric")`.

    A prediction is a dictionary with `points_world` (a list of points of the first camera's frame) and `room_from_world` (3x3); a
    reference one with `points_world` (the same pixels, metres; no points: no scale error) and `annotation_from_world` (4x4; empty: no room
    frame is known). Each mean is over the scenes that have it.

    Source:
        Ours.
    """

    def _info(self) -> evaluate.MetricInfo:
        rows = datasets.List(datasets.List(datasets.Value("float64")))
        return evaluate.MetricInfo(
            description="Relative error of the scale; angles between the predicted room frame and the true one.",
            citation="Keetha et al., MapAnything (metric scale)",
            inputs_description="predictions: points_world, room_from_world; references: points_world, annotation_from_world",
            features=datasets.Features(
                {
                    "predictions": {"points_world": rows, "room_from_world": rows},
                    "references": {"points_world": rows, "annotation_from_world": rows},
                }
            ),
        )

    def _compute(self, predictions: list, references: list, protocol: str | None = None) -> dict:
        protocol = protocol_of(self.config_name, protocol, "metric")
        found: dict[str, list[float]] = {}
        for predicted, true in zip(predictions, references, strict=True):
            wanted = np.array(true["points_world"], dtype=float).reshape(-1, 3)
            scores = metric_scale_scores(
                np.array(predicted["points_world"], dtype=float).reshape(-1, 3),
                wanted,
                np.ones(len(wanted), dtype=bool),
                np.array(predicted["room_from_world"], dtype=float),
                np.array(true["annotation_from_world"], dtype=float) if true["annotation_from_world"] else None,
                protocol,
            )
            for name, value in scores.items():
                found.setdefault(name, []).append(value)
        return {name: float(np.mean(values)) for name, values in found.items()}
