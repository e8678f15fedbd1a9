"""ScanRefer as a module of `evaluate`: `evaluate.load("eval/metrics/scanrefer")`, or this class."""

import datasets
import evaluate

from vidllm.eval.metrics.scanrefer.scores import scanrefer_scores


class ScanRefer(evaluate.Metric):
    """Boxes of described objects; `compute(predictions=, references=, kinds=None, protocol="official")`, see `scanrefer_scores`.

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
        self, predictions: list, references: list, kinds: list | None = None, protocol: str = "official"
    ) -> dict:
        return scanrefer_scores(predictions, references, kinds, protocol)
