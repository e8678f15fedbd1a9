"""SQA3D as a module of `evaluate`: `evaluate.load("eval/metrics/sqa3d")`, or this class."""

import datasets
import evaluate

from vidllm.eval.metrics.answers import protocol_of
from vidllm.eval.metrics.sqa3d.scores import sqa3d_scores


class SQA3D(evaluate.Metric):
    """Answers to SQA3D's questions; `compute(predictions=, references=, kinds=None, protocol="official")`, see `sqa3d_scores`.

    `evaluate.load(..., "leo")` names the protocol too.

    Source:
        Upstream: SilongYong/SQA3D@a98da8f.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exact match of answers from a standpoint in a scene (SQA3D).",
            citation="Ma et al., SQA3D: Situated Question Answering in 3D Scenes, ICLR 2023",
            inputs_description="predictions: texts; references: texts; kinds: a text per question",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self, predictions: list, references: list, kinds: list | None = None, protocol: str | None = None
    ) -> dict:
        return sqa3d_scores(predictions, references, kinds, protocol_of(self.config_name, protocol, "official"))
