"""SQA3D's scores of answers. Texts, no tensors."""

from collections.abc import Sequence

from vidllm.eval.metrics.answers import (
    check_lengths,
    check_protocol,
    check_texts,
    clean_answer,
    means_by_kind,
    refined_match,
)


PROTOCOLS = ("official", "leo", "llava3d", "video3dllm", "chat_scene")
# By the first letters of the question, in this order.
_TYPES = (("what", 4), ("is", 2), ("how", 3), ("can", 3), ("which", 5))


def question_type(question: str) -> str:
    """Kind of a question, by how it begins.

    Args:
        question (`str`): In upper or lower case.

    Returns:
        `str`: `what`, `is`, `how`, `can`, `which` or `others`; "Isn't" counts as `is`, "Whatever" as `what`.

    Source:
        Upstream: embodied-generalist/embodied-generalist@567f2d8 data/data_utils.py.
    """
    start = question.strip().lower()
    return next((name for name, letters in _TYPES if start[:letters] == name), "others")


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
            text. `leo`: both sides cleaned (`clean_answer`); refined: one contained in the other is enough. `llava3d`: the same marks, with one
            answer per question. `video3dllm` (also 3DRS): both cleaned, exact alone. `chat_scene` (also GPT4Scene): as `leo`, but an empty
            answer is contained in nothing.

    Returns:
        `dict[str, float]`: `exact_match`, under `leo`, `llava3d` and `chat_scene` also `exact_match_refined`, fractions; with kinds also `<metric>_macro` (mean over
        kinds) and `<kind>/<metric>`.

    Raises:
        ValueError: Columns of unequal length, an unknown protocol, or an entry that is no text.

    Source:
        Upstream: SilongYong/SQA3D@a98da8f; embodied-generalist/embodied-generalist@567f2d8 evaluator/scanqa_eval.py;
        ZCMax/LLaVA-3D@91d979d llava/eval/sqa3d_evaluator.py; LaVi-Lab/Video-3D-LLM@3ff70e8 llava/eval/eval_sqa3d.py;
        ZzZZCHS/Chat-Scene@475e106 utils/eval.py.
    """
    check_lengths("sqa3d", predictions=predictions, references=references, kinds=kinds)
    return means_by_kind(sqa3d_marks(predictions, references, protocol), kinds)


def sqa3d_marks(
    predictions: Sequence[str], references: Sequence[str], protocol: str = "official"
) -> dict[str, list[bool]]:
    """Marks of single answers, whose means are the scores.

    Args:
        predictions (`Sequence[str]`): As of `sqa3d_scores`.
        references (`Sequence[str]`): As of `sqa3d_scores`.
        protocol (`str`): As of `sqa3d_scores`.

    Returns:
        `dict[str, list[bool]]`: by metric, one per question.

    Raises:
        ValueError: As of `sqa3d_scores`.

    Source:
        Upstream: as of `sqa3d_scores`.
    """
    check_protocol("sqa3d", protocol, PROTOCOLS)
    check_lengths("sqa3d", predictions=predictions, references=references)
    check_texts("sqa3d, predictions", predictions)
    check_texts("sqa3d, references", references)
    pairs = list(zip(predictions, references, strict=True))
    if protocol == "official":
        return {"exact_match": [answer == right for answer, right in pairs]}
    cleaned = [(clean_answer(answer), clean_answer(right)) for answer, right in pairs]
    if protocol == "video3dllm":
        return {"exact_match": [answer == right for answer, right in cleaned]}
    marks = [
        (False, False) if protocol == "chat_scene" and not answer else refined_match(answer, [right])
        for answer, right in cleaned
    ]
    return {"exact_match": [exact for exact, _ in marks], "exact_match_refined": [refined for _, refined in marks]}


__all__ = ["PROTOCOLS", "question_type", "sqa3d_marks", "sqa3d_scores"]
