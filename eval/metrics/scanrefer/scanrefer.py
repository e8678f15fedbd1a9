"""ScanRefer as a module of `evaluate`: `evaluate.load("eval/metrics/scanrefer")`, or this class."""

import datasets
import evaluate

from vidllm.eval.metrics.answers import protocol_of
from vidllm.eval.metrics.scanrefer.scores import scanrefer_scores


class ScanRefer(evaluate.Metric):
    """Boxes of described objects; `compute(predictions=, references=, kinds=None, protocol="official", in_others=None)`, see `scanrefer_scores`.

    Boxes are lists `[cx, cy, cz, dx, dy, dz]`; an empty list is a miss.

    Source:
        Upstream: daveredrum/ScanRefer@9d74830 benchmark/eval.py.
    """

    def _info(self) -> evaluate.MetricInfo:
        box = datasets.List(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description="Share of described objects whose box overlaps the true one enough (ScanRefer).",
            citation="Chen et al., ScanRefer: 3D Object Localization in RGB-D Scans using Natural Language, ECCV 2020",
            inputs_description="predictions, references: boxes (cx, cy, cz, dx, dy, dz); kinds: unique or multiple",
            features=datasets.Features({"predictions": box, "references": box}),
        )

    def _compute(
        self,
        predictions: list,
        references: list,
        kinds: list | None = None,
        protocol: str | None = None,
        in_others: list | None = None,
    ) -> dict:
        protocol = protocol_of(self.config_name, protocol, "official")
        return scanrefer_scores(predictions, references, kinds, protocol, in_others)
