"""Depth as a module of `evaluate`: `evaluate.load("eval/metrics/depth")`, or this class."""

import datasets
import evaluate
import numpy as np

from vidllm.eval.metrics.answers import protocol_of
from vidllm.eval.metrics.depth.scores import MAX_DEPTH_M, depth_errors


class Depth(evaluate.Metric):
    """Depth maps of scenes, mean over scenes; `compute(predictions=, references=, protocol="metric")`, see `depth_errors`.

    A prediction or reference is one scene: a list of depth maps, kept in float32. With `weight_by_pixels` a scene counts by its valid pixels, else once.
    Scenes without valid pixels are left out; `valid_pixels` is the sum. `evaluate.load(..., "median")` names the protocol too.

    Source:
        Upstream: CUT3R/CUT3R@8bc15dc eval/video_depth/tools.py.
    """

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.List(datasets.List(datasets.List(datasets.Value("float32"))))
        return evaluate.MetricInfo(
            description="Relative error and accuracy of depth maps, one alignment per scene.",
            citation="Eigen et al., Depth Map Prediction from a Single Image, NeurIPS 2014 (the measures)",
            inputs_description="predictions, references: per scene a list of depth maps, metres, 0 = invalid",
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def _compute(
        self,
        predictions: list,
        references: list,
        protocol: str | None = None,
        max_depth_m: float | None = MAX_DEPTH_M,
        weight_by_pixels: bool = False,
    ) -> dict:
        protocol = protocol_of(self.config_name, protocol, "metric")
        scenes = [
            depth_errors(np.array(predicted, np.float32), np.array(true, np.float32), protocol, max_depth_m)
            for predicted, true in zip(predictions, references, strict=True)
        ]
        scored = [scores for scores in scenes if scores]
        if not scored:
            return {}
        pixels = [scores.pop("valid_pixels") for scores in scored]
        weights = pixels if weight_by_pixels else None
        means = {name: float(np.average([s[name] for s in scored], weights=weights)) for name in scored[0]}
        return {**means, "valid_pixels": float(sum(pixels))}
