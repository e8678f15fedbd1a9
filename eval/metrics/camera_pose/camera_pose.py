"""Camera poses as a module of `evaluate`: `evaluate.load("eval/metrics/camera_pose")`, or this class."""

import datasets
import evaluate
import numpy as np

from vidllm.eval.metrics.camera_pose.scores import camera_pose_scores


class CameraPose(evaluate.Metric):
    """Poses of scenes, mean over scenes; `compute(predictions=, references=, protocol="vggt_i_inv_j")`, see `camera_pose_scores`.

    A prediction or reference is one scene: a list of 4x4 matrices cam_from_world.

    Source:
        Upstream: facebookresearch/vggt@851d257 evaluation/test_co3d.py.
    """

    def _info(self) -> evaluate.MetricInfo:
        poses = datasets.List(datasets.List(datasets.List(datasets.Value("float64"))))
        return evaluate.MetricInfo(
            description="Relative pose accuracy of all pairs of frames, and absolute trajectory error.",
            citation="Wang et al., VGGT: Visual Geometry Grounded Transformer, CVPR 2025 (the protocol)",
            inputs_description="predictions, references: per scene a list of 4x4 matrices, camera from world",
            features=datasets.Features({"predictions": poses, "references": poses}),
        )

    def _compute(self, predictions: list, references: list, protocol: str = "vggt_i_inv_j") -> dict:
        scenes = [
            camera_pose_scores(np.array(predicted), np.array(true), protocol)
            for predicted, true in zip(predictions, references, strict=True)
        ]
        scored = [scores for scores in scenes if scores]
        return {name: float(np.mean([scores[name] for scores in scored])) for name in (scored[0] if scored else ())}
