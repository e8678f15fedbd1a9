"""ScanQA's scores of answers, under the protocols of its peers. Texts, no tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vidllm.eval.metrics.answers import check_lengths, check_protocol, clean_answer, means_by_kind, refined_match
from vidllm.eval.metrics.text_scorers import TextScores, one_line, text_scores


Texts = tuple[str, list[str]]


@dataclass(frozen=True)
class _Protocol:
    """What is done to an answer and its references before they are compared: exactly, leniently, and by n-grams.

    `broken` says what becomes of line breaks before exact and lenient comparison; n-grams always see a blank there.
    """

    compared: Callable[[str, Sequence[str]], Texts]
    spoken: Callable[[str, Sequence[str]], Texts]
    refined: Callable[[str, Sequence[str]], tuple[bool, bool]] | None
    tokenize: bool
    names: tuple[str, ...] | None = None
    broken: Callable[[str], str] = str


def _no_carriage_return(answer: str) -> str:
    """A blank for each carriage return, with which the authors' own scorer loses step; line feeds stay, and differ from blanks there too."""
    return answer.replace("\r", " ")


def _as_they_are(answer: str, references: Sequence[str]) -> Texts:
    return answer, list(references)


def _both_cleaned(answer: str, references: Sequence[str]) -> Texts:
    return clean_answer(answer), [clean_answer(text) for text in references]


def _without_full_stops(answer: str, references: Sequence[str]) -> Texts:
    return answer.rstrip("."), list(references)


def _blanks_collapsed(answer: str, references: Sequence[str]) -> Texts:
    """LL3DA: of several blanks one stays; other white space is not touched."""
    return " ".join(word for word in answer.split(" ") if word), list(references)


def _answer_cleaned(answer: str, references: Sequence[str]) -> Texts:
    """Chat-Scene: one full stop and the first capital go, then the answer alone is cleaned."""
    answer = answer[:-1] if answer.endswith(".") else answer
    return clean_answer(answer[:1].lower() + answer[1:]), list(references)


def member_match(answer: str, references: Sequence[str]) -> tuple[bool, bool]:
    """Exact and refined mark where any equal reference counts first.

    Args:
        answer (`str`): As it is compared.
        references (`Sequence[str]`): As they are compared.

    Returns:
        `tuple[bool, bool]`: one of the references; that, or contained in one or one in it, without blanks.

    Source:
        Upstream: ZCMax/LLaVA-3D@91d979d llava/eval/scanqa_evaluator.py. Unlike LEO's, an exact match behind a lenient one is found.
    """
    if answer in references:
        return True, True
    joined = "".join(answer.split())
    others = ["".join(text.split()) for text in references]
    return False, any(joined in other or other in joined for other in others)


def _member_match_of_something(answer: str, references: Sequence[str]) -> tuple[bool, bool]:
    """Chat-Scene: an empty answer matches nothing."""
    return member_match(answer, references) if answer else (False, False)


_PROTOCOLS = {
    "official": _Protocol(_as_they_are, _as_they_are, None, tokenize=True, broken=_no_carriage_return),
    "leo": _Protocol(_both_cleaned, _both_cleaned, refined_match, tokenize=False, broken=one_line),
    "llava3d": _Protocol(_both_cleaned, _both_cleaned, member_match, tokenize=True),
    "video3dllm": _Protocol(_as_they_are, _without_full_stops, None, tokenize=False, broken=one_line),
    "chat_scene": _Protocol(_answer_cleaned, _answer_cleaned, _member_match_of_something, tokenize=True),
    "ll3da": _Protocol(
        _as_they_are, _blanks_collapsed, None, tokenize=False, names=("bleu_4", "cider", "rouge_l", "meteor")
    ),
}
PROTOCOLS = tuple(_PROTOCOLS)


def scanqa_scores(
    predictions: Sequence[str | Sequence[str]],
    references: Sequence[Sequence[str]],
    kinds: Sequence[str] | None = None,
    protocol: str = "official",
    text: bool = False,
) -> dict[str, float]:
    """Score answers to ScanQA's questions.

    Args:
        predictions (`Sequence[str]` or `Sequence[Sequence[str]]`): One answer per question, or several in order of preference.
        references (`Sequence[Sequence[str]]`): Accepted answers of each question.
        kinds (`Sequence[str]`, *optional*): Kind of each question.
        protocol (`str`): How answers are prepared and compared:
            `official`: as they are, but for a blank in place of a carriage return; n-grams after the PTB tokenizer.
            `leo`: line breaks of the answer become blanks, both sides cleaned (`clean_answer`), refined match, no tokenizer.
            `llava3d`: both cleaned, any equal reference counts first, tokenizer.
            `video3dllm` (also 3DRS, Ross3D, Spatial-MLLM): as they are, but for blanks in place of line breaks of the answer; full stops at the
            end go before n-grams, no tokenizer.
            `chat_scene` (also GPT4Scene): the answer alone is cleaned, tokenizer.
            `ll3da`: n-grams alone, blanks collapsed, no tokenizer.
        text (`bool`): Whether to compute the n-gram scores too, which need Java.

    Returns:
        `dict[str, float]`: fractions: `exact_match` (but `ll3da`), `exact_match_at_10` under `official` where there are several answers, `exact_match_refined`
        under `leo`, `llava3d` and `chat_scene`; with kinds also `<metric>_macro` (mean over kinds) and `<kind>/<metric>`; with `text` also
        `bleu_1` to `bleu_4`, `meteor`, `rouge_l`, `cider`, without those that cannot be computed here.

    Raises:
        ValueError: Columns of unequal length, an unknown protocol, an answer that is no text, or a question without accepted answers.

    Source:
        Upstream: ATR-DBI/ScanQA@0a9f162 scripts/score.py; embodied-generalist/embodied-generalist@567f2d8 evaluator/scanqa_eval.py;
        ZCMax/LLaVA-3D@91d979d llava/eval/scanqa_evaluator.py; LaVi-Lab/Video-3D-LLM@3ff70e8 llava/eval/eval_scanqa.py;
        ZzZZCHS/Chat-Scene@475e106 utils/eval.py; Open3DA/LL3DA@ebbdd77.
    """
    check_lengths("scanqa", predictions=predictions, references=references, kinds=kinds)
    marks = scanqa_marks(predictions, references, protocol)
    scores = means_by_kind(marks, kinds) if marks else {}
    if text:
        scores.update(scanqa_texts(predictions, references, protocol).corpus)
    return scores


def scanqa_marks(
    predictions: Sequence[str | Sequence[str]], references: Sequence[Sequence[str]], protocol: str = "official"
) -> dict[str, list[bool]]:
    """Marks of single answers, whose means are the scores.

    Args:
        predictions (`Sequence[str]` or `Sequence[Sequence[str]]`): As of `scanqa_scores`.
        references (`Sequence[Sequence[str]]`): As of `scanqa_scores`.
        protocol (`str`): As of `scanqa_scores`.

    Returns:
        `dict[str, list[bool]]`: by metric, one per question; none under `ll3da`.

    Raises:
        ValueError: As of `scanqa_scores`.

    Source:
        Upstream: as of `scanqa_scores`.
    """
    ranked = _checked(predictions, references, protocol)
    chosen = _PROTOCOLS[protocol]
    if chosen.names is not None:
        return {}
    ranked = [[chosen.broken(answer) for answer in answers] for answers in ranked]
    marks: dict[str, list[bool]] = {}
    compared = [chosen.compared(answers[0], known) for answers, known in zip(ranked, references, strict=True)]
    if chosen.refined is None:
        marks["exact_match"] = [answer in known for answer, known in compared]
    else:
        both = [chosen.refined(answer, known) for answer, known in compared]
        marks["exact_match"] = [exact for exact, _ in both]
        marks["exact_match_refined"] = [refined for _, refined in both]
    if protocol == "official" and any(len(answers) > 1 for answers in ranked):
        marks["exact_match_at_10"] = [
            any(answer in known for answer in answers[:10]) for answers, known in zip(ranked, references, strict=True)
        ]
    return marks


def scanqa_texts(
    predictions: Sequence[str | Sequence[str]], references: Sequence[Sequence[str]], protocol: str = "official"
) -> TextScores:
    """N-gram scores of the answers, and of each of them.

    Args:
        predictions (`Sequence[str]` or `Sequence[Sequence[str]]`): As of `scanqa_scores`.
        references (`Sequence[Sequence[str]]`): As of `scanqa_scores`.
        protocol (`str`): As of `scanqa_scores`.

    Returns:
        `TextScores`: those that the protocol has and that can be computed here.

    Raises:
        ValueError: As of `scanqa_scores`.

    Source:
        Upstream: as of `scanqa_scores`. Ours: line breaks become blanks before anything else is done to an answer.
    """
    ranked = _checked(predictions, references, protocol)
    chosen = _PROTOCOLS[protocol]
    spoken = [chosen.spoken(one_line(answers[0]), known) for answers, known in zip(ranked, references, strict=True)]
    found = text_scores([answer for answer, _ in spoken], [known for _, known in spoken], chosen.tokenize)
    if chosen.names is None:
        return found
    corpus = {name: value for name, value in found.corpus.items() if name in chosen.names}
    return TextScores(corpus, {name: found.each[name] for name in corpus}, found.missing)


def _checked(
    predictions: Sequence[str | Sequence[str]], references: Sequence[Sequence[str]], protocol: str
) -> list[list[str]]:
    """Answers of each question in order of preference, when everything is in order."""
    check_protocol("scanqa", protocol, PROTOCOLS)
    check_lengths("scanqa", predictions=predictions, references=references)
    _check_references(references)
    return _ranked(predictions)


def _ranked(predictions: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """Answers of each question in order of preference, at least one."""
    ranked = []
    for row, answers in enumerate(predictions):
        several = [answers] if isinstance(answers, str) else list(answers) if isinstance(answers, list | tuple) else []
        if not several or not all(isinstance(answer, str) for answer in several):
            raise ValueError(f"scanqa, predictions, row {row}: wanted a text, or texts in order; got {answers!r:.80}")
        ranked.append(several)
    return ranked


def _check_references(references: Sequence[Sequence[str]]) -> None:
    """A single text would be searched for answers inside it, and without answers nothing can be right."""
    for row, known in enumerate(references):
        if isinstance(known, str) or not known or not all(isinstance(text, str) for text in known):
            raise ValueError(
                f"scanqa, references, row {row}: wanted a list of at least one accepted text; got {known!r:.80}"
            )


__all__ = ["PROTOCOLS", "member_match", "scanqa_marks", "scanqa_scores", "scanqa_texts"]
