"""ScanQA as a module of `evaluate`: `evaluate.load("eval/metrics/scanqa")`, or this class."""

import datasets
import evaluate

from vidllm.eval.metrics.answers import protocol_of
from vidllm.eval.metrics.scanqa.scores import scanqa_scores


class ScanQA(evaluate.Metric):
    """Answers to ScanQA's questions; `compute(predictions=, references=, kinds=None, protocol="official", text=False)`, see `scanqa_scores`.

    `evaluate.load(..., "leo")` names the protocol too. Modules take one answer per question; for ten in order call `scanqa_scores`.

    Source:
        Upstream: ATR-DBI/ScanQA@0a9f162 scripts/score.py.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exact match and n-gram scores of answers about a scene (ScanQA), under six named protocols.",
            citation="Azuma et al., ScanQA: 3D Question Answering for Spatial Scene Understanding, CVPR 2022",
            inputs_description="predictions: texts; references: lists of accepted texts; kinds: a text per question",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def _compute(
        self,
        predictions: list,
        references: list,
        kinds: list | None = None,
        protocol: str | None = None,
        text: bool = False,
    ) -> dict:
        protocol = protocol_of(self.config_name, protocol, "official")
        return scanqa_scores(predictions, references, kinds, protocol, text)
