"""VSI-Bench as a module of `evaluate`: `evaluate.load("eval/metrics/vsi_bench")`, or this class."""

import datasets
import evaluate

from vidllm.eval.metrics.answers import protocol_of
from vidllm.eval.metrics.vsi_bench.scores import vsi_bench_scores


class VSIBench(evaluate.Metric):
    """Answers about spaces; `compute(predictions=, references=, question_types=, protocol="official")`, see `vsi_bench_scores`.

    Source:
        Upstream: vision-x-nyu/thinking-in-space@51e089c lmms_eval/tasks/vsibench/utils.py.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Letters and relative accuracy of numbers, mean over tasks (VSI-Bench).",
            citation="Yang et al., Thinking in Space, CVPR 2025",
            inputs_description="predictions: texts; references: letters or numbers as texts; question_types: a text per question",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list, references: list, question_types: list, protocol: str | None = None) -> dict:
        protocol = protocol_of(self.config_name, protocol, "official")
        return vsi_bench_scores(predictions, references, question_types, protocol)
