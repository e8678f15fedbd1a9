"""SQA3D's scores of answers. Texts, no tensors."""

from collections.abc import Sequence

from vidllm.eval.metrics.answers import check_lengths, check_protocol, clean_answer, means_by_kind, refined_match


PROTOCOLS = ("official", "leo")


def sqa3d_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    kinds: Sequence[str] | None = None,
    protocol: str = "official",
) -> dict[str, float]:
    """Score answers to SQA3D's questions.

    Args:
        predictions (`Sequence[str]`): One answer per question.
        references (`Sequence[str]`): The one right answer of each question.
        kinds (`Sequence[str]`, *optional*): Kind of each question.
        protocol (`str`): `official`: equal letter by letter, which is what the authors' choice among known answers amounts to for free
            text. `leo`: both sides cleaned (`clean_answer`); refined: one contained in the other is enough.

    Returns:
        `dict[str, float]`: `exact_match`, under `leo` also `exact_match_refined`, fractions; with kinds also `<metric>_macro` (mean over
        kinds) and `<kind>/<metric>`.

    Raises:
        ValueError: Columns of unequal length, or an unknown protocol.

    Source:
        Upstream: SilongYong/SQA3D@a98da8f; embodied-generalist/embodied-generalist@567f2d8 evaluator/scanqa_eval.py.
    """
    check_protocol("sqa3d", protocol, PROTOCOLS)
    check_lengths("sqa3d", predictions=predictions, references=references, kinds=kinds)
    pairs = list(zip(predictions, references, strict=True))
    if protocol == "official":
        return means_by_kind({"exact_match": [answer == right for answer, right in pairs]}, kinds)
    marks = [refined_match(clean_answer(answer), [clean_answer(right)]) for answer, right in pairs]
    return means_by_kind(
        {"exact_match": [exact for exact, _ in marks], "exact_match_refined": [refined for _, refined in marks]}, kinds
    )


__all__ = ["PROTOCOLS", "sqa3d_scores"]
