"""Point clouds as a module of `evaluate`: `evaluate.load("eval/metrics/point_map")`, or this class."""

import datasets
import evaluate
import numpy as np

from vidllm.eval.metrics.point_map.scores import point_scores


class PointMap(evaluate.Metric):
    """Clouds of scenes, mean over scenes; `compute(predictions=, references=, threshold=0.05, voxel_size=0.02)`, see `point_scores`.

    A prediction or reference is one scene: a list of points `(x, y, z)`, metres, same frame.

    Source:
        Upstream: CUT3R/CUT3R@8bc15dc eval/mv_recon/utils.py; ByteDance-Seed/Depth-Anything-3@2c21ea8 src/depth_anything_3/bench/utils.py.
    """

    def _info(self) -> evaluate.MetricInfo:
        cloud = datasets.List(datasets.List(datasets.Value("float64")))
        return evaluate.MetricInfo(
            description="Accuracy, completeness and F-score of point clouds.",
            citation="Knapitsch et al., Tanks and Temples, ACM Transactions on Graphics 2017 (the F-score)",
            inputs_description="predictions, references: per scene a list of points (x, y, z), metres",
            features=datasets.Features({"predictions": cloud, "references": cloud}),
        )

    def _compute(
        self, predictions: list, references: list, threshold: float = 0.05, voxel_size: float | None = 0.02
    ) -> dict:
        scenes = [
            point_scores(np.array(predicted), np.array(true), threshold, voxel_size)
            for predicted, true in zip(predictions, references, strict=True)
        ]
        return {name: float(np.mean([scores[name] for scores in scenes])) for name in scenes[0]}
