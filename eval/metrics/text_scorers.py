"""The n-gram scores of captioning, as the benchmarks compute them: BLEU, METEOR, ROUGE-L, CIDEr-D, with or without the PTB tokenizer. Texts, no tensors.

METEOR and the tokenizer are Java programs that pycocoevalcap brings along. METEOR's is started once per process and kept.
"""

import atexit
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np


# METEOR without its paraphrase table says nothing and scores lower; some repositories ship a pointer of 133 bytes in its place.
PARAPHRASE_BYTES, GZIP_MAGIC = 61_813_011, b"\x1f\x8b"
NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_BREAK = re.compile("\r\n|[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")


@dataclass(frozen=True)
class TextScores:
    """Scores of a corpus, and of each of its texts.

    Args:
        corpus (`Mapping[str, float]`): By name, fractions; CIDEr too, whose best is about 10.
        each (`Mapping[str, np.ndarray]`): By name, one number per text, in order.
        missing (`tuple[str, ...]`): Scores that could not be computed here.

    Source:
        Ours.
    """

    corpus: Mapping[str, float]
    each: Mapping[str, np.ndarray]
    missing: tuple[str, ...] = ()


def java_obstacle() -> str | None:
    """Why METEOR and the PTB tokenizer cannot run here.

    Returns:
        `str`, or None where they can.

    Source:
        Ours: a score that could not be computed is missing, not zero.
    """
    if shutil.which("java") is None:
        return "no `java` on the path (Debian: default-jre-headless)"
    try:
        table = _jar_folder("meteor") / "data" / "paraphrase-en.gz"
    except ModuleNotFoundError:
        return "pycocoevalcap is not installed (extra `eval`)"
    if not table.is_file():
        return f"METEOR's paraphrase table is not there: {table}"
    with open(table, "rb") as file:
        magic = file.read(2)
    if table.stat().st_size != PARAPHRASE_BYTES or magic != GZIP_MAGIC:
        return f"METEOR's paraphrase table {table} has {table.stat().st_size} bytes instead of {PARAPHRASE_BYTES}, or is no gzip file"
    return None


def _jar_folder(part: str) -> Path:
    """Folder of pycocoevalcap that holds a Java program."""
    import pycocoevalcap

    # It has no __init__.py.
    return Path(next(iter(pycocoevalcap.__path__))) / part


def one_line(text: str) -> str:
    """A text with a blank for each line break, of whatever kind, and U+FFFD for each half of a pair of surrogates.

    Args:
        text (`str`): Any.

    Returns:
        `str`

    Source:
        Ours: the Java programs read a text per line; a break within one would move all later ones by a line. Half a pair of surrogates (JSON may
        hold one) cannot be written to them at all.
    """
    return _LONE_SURROGATE.sub("\ufffd", _LINE_BREAK.sub(" ", text))


def ptb_tokenized(texts: Sequence[str]) -> list[str]:
    """Texts as the benchmarks tokenize them: Penn Treebank tokens in lower case, punctuation left out.

    Args:
        texts (`Sequence[str]`): Any.

    Returns:
        `list[str]`: tokens with blanks between them, one text each.

    Raises:
        RuntimeError: Java is not there, or the program fails.

    Source:
        Upstream: salaniz/pycocoevalcap `PTBTokenizer` (its program and its list of punctuation). Ours: the file that it reads lies in a
        temporary folder, because the package may be installed where nobody can write.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

    if not texts:
        return []
    jar = _jar_folder("tokenizer") / STANFORD_CORENLP_3_4_1_JAR
    with tempfile.NamedTemporaryFile("wb", suffix=".txt") as file:
        file.write("\n".join(one_line(text) for text in texts).encode())
        file.flush()
        command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        try:
            done = subprocess.run([*command, file.name], capture_output=True, check=False)
        except OSError as error:
            raise RuntimeError(f"PTB tokenizer: wanted Java; {java_obstacle() or error}") from error
    if done.returncode:
        raise RuntimeError(
            f"PTB tokenizer: ended with {done.returncode}: {done.stderr.decode(errors='replace')[-300:]}"
        )
    # A blank last text writes no line of its own.
    lines = done.stdout.decode().split("\n")
    lines = [*lines, *[""] * (len(texts) - len(lines))]
    dropped = set(PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in lines[: len(texts)]]


@lru_cache(maxsize=1)
def _meteor() -> Any:
    """METEOR's program, started once."""
    from pycocoevalcap.meteor.meteor import Meteor

    obstacle = java_obstacle()
    if obstacle is not None:
        raise RuntimeError(f"METEOR: {obstacle}")
    program = Meteor()
    atexit.register(_stop, program)
    return program


def _stop(program: Any) -> None:
    """End METEOR's program; its own finaliser may run when modules are gone."""
    program.meteor_p.stdin.close()
    program.meteor_p.kill()
    program.meteor_p.wait()
    type(program).__del__ = lambda _: None


def text_scores(candidates: Sequence[str], references: Sequence[Sequence[str]], tokenize: bool) -> TextScores:
    """Score texts against their references.

    Args:
        candidates (`Sequence[str]`): One text each.
        references (`Sequence[Sequence[str]]`): At least one per candidate.
        tokenize (`bool`): Whether both go through the PTB tokenizer.

    Returns:
        `TextScores`: `bleu_1` to `bleu_4`, `meteor`, `rouge_l`, `cider`. Where Java is not there, `meteor` is missing, and with `tokenize` all
        are.

    Raises:
        ValueError: Columns of unequal length, or a text without references.

    Source:
        Upstream: salaniz/pycocoevalcap (tylin/coco-caption): corpus BLEU with the closest reference length, METEOR 1.5, ROUGE-L with beta 1.2,
        CIDEr-D with the document frequencies of the references given.
    """
    if len(candidates) != len(references) or not candidates or not all(references):
        raise ValueError(
            f"text scores: wanted at least one text, each with references; got {len(candidates)} texts and {len(references)} lists of references"
        )
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    obstacle = java_obstacle()
    if tokenize and obstacle is not None:
        return TextScores({}, {}, NAMES)
    candidates = [one_line(text) for text in candidates]
    references = [[one_line(text) for text in texts] for texts in references]
    if tokenize:
        flat = ptb_tokenized([*candidates, *[text for texts in references for text in texts]])
        candidates, rest = flat[: len(candidates)], iter(flat[len(candidates) :])
        references = [[next(rest) for _ in texts] for texts in references]
    said = {number: [text] for number, text in enumerate(candidates)}
    known = {number: list(texts) for number, texts in enumerate(references)}
    corpus: dict[str, float] = {}
    each: dict[str, np.ndarray] = {}
    bleu, bleus = Bleu(4).compute_score(known, said, verbose=0)
    for order in range(4):
        corpus[f"bleu_{order + 1}"], each[f"bleu_{order + 1}"] = float(bleu[order]), np.asarray(bleus[order], float)
    programs = [("rouge_l", Rouge()), ("cider", Cider())]
    if obstacle is None:
        programs.insert(0, ("meteor", _meteor()))
    for name, program in programs:
        score, scores = program.compute_score(known, said)
        corpus[name], each[name] = float(score), np.asarray(scores, float)
    return TextScores(corpus, each, () if obstacle is None else ("meteor",))


__all__ = ["NAMES", "TextScores", "java_obstacle", "one_line", "ptb_tokenized", "text_scores"]
