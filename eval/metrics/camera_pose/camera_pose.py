"""Camera poses as a module of `evaluate`: `evaluate.load("eval/metrics/camera_pose")`, or this class."""

import datasets
import evaluate
import numpy as np

from vidllm.eval.metrics.answers import protocol_of
from vidllm.eval.metrics.camera_pose.scores import camera_pose_scores, pair_scores, relative_pose_errors
from vidllm.eval.metrics.camera_pose.trajectory import trajectory_scores


class CameraPose(evaluate.Metric):
    """Poses of scenes, mean over scenes; `compute(predictions=, references=, protocol="vggt_i_inv_j")`, see `camera_pose_scores`.

    A prediction or reference is one scene: a list of 4x4 matrices cam_from_world. With `pooled` the pairs of all scenes count alike in `auc`,
    `rra` and `rta`, else the scenes. `trajectory="se3"` or `"sim3"` or `"none"` adds `trajectory_scores` under that alignment, as
    `sim3/rpe_trans_m`. Scenes of a single frame are left out. `evaluate.load(..., "pi3_j_inv_i")` names the protocol too.

    Source:
        Upstream: facebookresearch/vggt@851d257 evaluation/test_co3d.py; MichaelGrupp/evo 1.38.
    """

    def _info(self) -> evaluate.MetricInfo:
        poses = datasets.List(datasets.List(datasets.List(datasets.Value("float64"))))
        return evaluate.MetricInfo(
            description="Relative pose accuracy of all pairs of frames, and absolute trajectory error.",
            citation="Wang et al., VGGT: Visual Geometry Grounded Transformer, CVPR 2025 (the protocol)",
            inputs_description="predictions, references: per scene a list of 4x4 matrices, camera from world",
            features=datasets.Features({"predictions": poses, "references": poses}),
        )

    def _compute(
        self,
        predictions: list,
        references: list,
        protocol: str | None = None,
        limit_deg: int = 30,
        pooled: bool = False,
        trajectory: str | None = None,
    ) -> dict:
        protocol = protocol_of(self.config_name, protocol, "vggt_i_inv_j")
        pairs = [(np.array(said), np.array(true)) for said, true in zip(predictions, references, strict=True)]
        scenes = [camera_pose_scores(said, true, protocol, limit_deg) for said, true in pairs]
        if trajectory is not None:
            for scores, (said, true) in zip(scenes, pairs, strict=True):
                found = trajectory_scores(said, true, trajectory)
                scores.update({f"{trajectory}/{name}": value for name, value in found.items()})
        scored = [scores for scores in scenes if scores]
        if not scored:
            return {}
        means = {name: float(np.mean([scores[name] for scores in scored])) for name in scored[0]}
        if pooled:
            errors = [relative_pose_errors(said, true, protocol) for said, true in pairs]
            rotation, translation = (np.concatenate(kind) for kind in zip(*errors, strict=True))
            means.update(pair_scores(rotation, translation, limit_deg))
        return means
