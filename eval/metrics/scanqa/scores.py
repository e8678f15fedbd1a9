"""ScanQA's scores of answers. Texts, no tensors."""

from collections.abc import Sequence

from vidllm.eval.metrics.answers import check_lengths, check_protocol, means_by_kind


PROTOCOLS = ("official",)


def scanqa_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    kinds: Sequence[str] | None = None,
    protocol: str = "official",
) -> dict[str, float]:
    """Score answers to ScanQA's questions.

    Args:
        predictions (`Sequence[str]`): One answer per question.
        references (`Sequence[Sequence[str]]`): Accepted answers of each question.
        kinds (`Sequence[str]`, *optional*): Kind of each question.
        protocol (`str`): `official`: an answer counts if it is one of the accepted ones, letter by letter.

    Returns:
        `dict[str, float]`: `exact_match`, a fraction; with kinds also `exact_match_macro` (mean over kinds) and `<kind>/exact_match`.

    Raises:
        ValueError: Columns of unequal length, or an unknown protocol.

    Source:
        Upstream: ATR-DBI/ScanQA@0a9f162 scripts/score.py (`Top1 (EM)`).
    """
    check_protocol("scanqa", protocol, PROTOCOLS)
    check_lengths("scanqa", predictions=predictions, references=references, kinds=kinds)
    hits = [answer in accepted for answer, accepted in zip(predictions, references, strict=True)]
    return means_by_kind({"exact_match": hits}, kinds)


__all__ = ["PROTOCOLS", "scanqa_scores"]
