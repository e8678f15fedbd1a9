"""Depth as a module of `evaluate`: `evaluate.load("eval/metrics/depth")`, or this class."""

import datasets
import evaluate
import numpy as np

from vidllm.eval.metrics.depth.scores import depth_scores


class Depth(evaluate.Metric):
    """Depth maps of scenes, mean over scenes; `compute(predictions=, references=, protocol="metric")`, see `depth_scores`.

    A prediction or reference is one scene: a list of depth maps.

    Source:
        Upstream: CUT3R/CUT3R@8bc15dc eval/video_depth/tools.py.
    """

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.List(datasets.List(datasets.List(datasets.Value("float64"))))
        return evaluate.MetricInfo(
            description="Relative error and accuracy of depth maps, one alignment per scene.",
            citation="Eigen et al., Depth Map Prediction from a Single Image, NeurIPS 2014 (the measures)",
            inputs_description="predictions, references: per scene a list of depth maps, metres, 0 = invalid",
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def _compute(
        self, predictions: list, references: list, protocol: str = "metric", max_depth_m: float | None = 80.0
    ) -> dict:
        scenes = [
            depth_scores(np.array(predicted), np.array(true), protocol, max_depth_m)
            for predicted, true in zip(predictions, references, strict=True)
        ]
        scored = [scores for scores in scenes if scores]
        return {name: float(np.mean([scores[name] for scores in scored])) for name in (scored[0] if scored else ())}
