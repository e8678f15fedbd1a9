"""Kinds of questions, by the rules that the benchmarks' own scorers use. Texts only; no shapes."""

SQA3D_TYPES = ("what", "is", "how", "can", "which", "others")
SCANQA_TYPES = ("Place", "Number", "Color", "Object nature", "Object", "Other")

# Looked for in this order, letter by letter, anywhere in the question.
_SCANQA_WORDS = (
    ("Where", "Place"),
    ("How many", "Number"),
    ("What color", "Color"),
    ("What is the color", "Color"),
    ("What shape", "Object nature"),
    ("What type", "Object nature"),
    ("What kind", "Object nature"),
    ("What is", "Object"),
)


def sqa3d_type(question: str) -> str:
    """Kind of an SQA3D question: its first letters, so that "Isn't" counts as `is` and "Whatever" as `what`.

    Args:
        question (`str`): The question.

    Returns:
        `str`: one of `SQA3D_TYPES`.

    Source:
        Upstream: embodied-generalist/embodied-generalist@567f2d8 (the files say "N/A" for every question).
    """
    start = question.strip().lower()
    return next((kind for kind in SQA3D_TYPES[:-1] if start.startswith(kind)), SQA3D_TYPES[-1])


def scanqa_type(question: str) -> str:
    """Kind of a ScanQA question: the first of an ordered list of words that it contains, in upper and lower case as given.

    Args:
        question (`str`): The question.

    Returns:
        `str`: one of `SCANQA_TYPES`.

    Source:
        Upstream: ATR-DBI/ScanQA@0a9f162.
    """
    return next((kind for words, kind in _SCANQA_WORDS if words in question), SCANQA_TYPES[-1])


__all__ = ["SCANQA_TYPES", "SQA3D_TYPES", "scanqa_type", "sqa3d_type"]
