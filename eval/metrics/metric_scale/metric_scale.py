"""Scale and room frame as a module of `evaluate`: `evaluate.load("eval/metrics/metric_scale")`, or this class."""

import datasets
import evaluate
import numpy as np

from vidllm.eval.metrics.answers import check_protocol
from vidllm.eval.metrics.metric_scale.scores import PROTOCOLS, heading_error_deg, scale_error, up_error_deg


class MetricScale(evaluate.Metric):
    """Scale and room frame of scenes, mean over scenes; `compute(predictions=, references=, protocol="metric")`.

    A prediction is a dictionary with `points_world` (a list of points of the first camera's frame) and `room_from_world` (3x3); a
    reference one with `points_world` (the same pixels, metres) and `annotation_from_world` (4x4).

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

    def _compute(self, predictions: list, references: list, protocol: str = "metric") -> dict:
        check_protocol("metric_scale", protocol, PROTOCOLS)
        found = []
        for predicted, true in zip(predictions, references, strict=True):
            points, wanted = np.array(predicted["points_world"]), np.array(true["points_world"])
            room, annotation = np.array(predicted["room_from_world"]), np.array(true["annotation_from_world"])
            error = scale_error(points, wanted, np.ones(len(wanted), dtype=bool))
            found.append((error, up_error_deg(room, annotation), heading_error_deg(room, annotation)))
        names = ("scale_error", "up_error_deg", "heading_error_deg")
        return {name: float(np.mean(values)) for name, values in zip(names, zip(*found, strict=True), strict=True)}
