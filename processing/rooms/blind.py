"""What can be scored without looking: baselines that see the question only, fitted on a train split.

`majority` answers what was most frequent for the very text of the question, for its template (the text with the names of things and
colours taken out) where the text is new, for the kind where the template is new. `bag_of_words` is a logistic regression on words and
pairs of neighbouring words. The gain is measured over a uniform guess among the kind's answers.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .furniture import CATEGORIES
from .materials import COLOURS
from .scene_graph import plural


@dataclass(frozen=True)
class BlindItem:
    """A question as a blind model sees it.

    Args:
        kind (`str`): Kind of question.
        text (`str`): The question, possibly with its situation before it.
        answer (`str`): The usual answer.

    Source:
        Ours.
    """

    kind: str
    text: str
    answer: str


_NAMES = sorted([*CATEGORIES, *(plural(name) for name in CATEGORIES), *COLOURS], key=len, reverse=True)
_NAME = re.compile(r"\b(?:" + "|".join(map(re.escape, _NAMES)) + r")\b")


def template_of(text: str) -> str:
    """A question without the names of things and colours.

    Args:
        text (`str`): The question.

    Returns:
        `str`: lower case, every name replaced by `_`.

    Source:
        Ours.
    """
    return _NAME.sub("_", text.lower())


class MajorityBaseline:
    """The most frequent answer of the train split, for the text, else the template, else the kind.

    Args:
        train (`Sequence` of `BlindItem`): What to count.
        use_text (`bool`): Whether to look at the whole text at all, or at the template first.
        least (`int`): A text seen less often than this says nothing; its template is asked.

    Source:
        Ours.
    """

    def __init__(self, train: Sequence[BlindItem], use_text: bool = True, least: int = 5):
        self.use_text, self.least = use_text, least
        self.counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
        for item in train:
            for key in self._keys(item):
                self.counts[key][item.answer] += 1

    def _keys(self, item: BlindItem) -> list[tuple[str, str]]:
        keys = [("template", template_of(item.text)), ("kind", item.kind)]
        return [("text", item.text.lower()), *keys] if self.use_text else keys

    def predict(self, item: BlindItem) -> str:
        """Answer of one question."""
        for key in self._keys(item):
            counts = self.counts.get(key)
            if counts and (key[0] != "text" or counts.total() >= self.least):
                # The first in the alphabet among equally frequent ones: the same on every run.
                return min(counts, key=lambda answer: (-counts[answer], answer))
        return ""


class BagOfWordsBaseline:
    """Multinomial logistic regression on words and neighbouring words, one per kind, by full gradient steps.

    Args:
        train (`Sequence` of `BlindItem`): What to fit.
        steps (`int`): Gradient steps.
        decay (`float`): L2 penalty.

    Source:
        Ours.
    """

    def __init__(self, train: Sequence[BlindItem], steps: int = 150, decay: float = 1e-3):
        self.models: dict[str, tuple[dict[str, int], list[str], np.ndarray]] = {}
        by_kind: dict[str, list[BlindItem]] = defaultdict(list)
        for item in train:
            by_kind[item.kind].append(item)
        for kind, items in sorted(by_kind.items()):
            words = Counter(word for item in items for word in self._words(item.text))
            vocabulary = {word: i for i, word in enumerate(sorted(word for word, n in words.items() if n >= 2))}
            answers = sorted({item.answer for item in items})
            features = self._features(items, vocabulary)
            target = np.eye(len(answers))[[answers.index(item.answer) for item in items]]
            weights, momentum = np.zeros((features.shape[1], len(answers))), 0.0
            for _ in range(steps):
                scores = features @ weights
                chances = np.exp(scores - scores.max(axis=1, keepdims=True))
                chances /= chances.sum(axis=1, keepdims=True)
                gradient = features.T @ (chances - target) / len(items) + decay * weights
                momentum = 0.9 * momentum + gradient
                weights = weights - 0.5 * momentum
            self.models[kind] = (vocabulary, answers, weights)

    @staticmethod
    def _words(text: str) -> list[str]:
        words = re.findall(r"[a-z0-9]+", text.lower())
        return words + [f"{a} {b}" for a, b in pairwise(words)]

    def _features(self, items: Sequence[BlindItem], vocabulary: dict[str, int]) -> np.ndarray:
        rows = np.zeros((len(items), len(vocabulary) + 1))
        rows[:, -1] = 1
        for row, item in enumerate(items):
            for word in self._words(item.text):
                if word in vocabulary:
                    rows[row, vocabulary[word]] = 1
        return rows

    def predict(self, item: BlindItem) -> str:
        """Answer of one question."""
        if item.kind not in self.models:
            return ""
        vocabulary, answers, weights = self.models[item.kind]
        return answers[int((self._features([item], vocabulary) @ weights)[0].argmax())]


@dataclass(frozen=True)
class BlindScore:
    """How well one kind of question is answered blindly.

    Args:
        count (`int`): Questions scored.
        share (`float`): Of all questions.
        uniform (`float`): Accuracy of a uniform guess among the kind's answers.
        template, text, words (`float`): Accuracy of the majority per template, per text, and of the bag of words.

    Source:
        Ours.
    """

    count: int
    share: float
    uniform: float
    template: float
    text: float
    words: float

    @property
    def gain(self) -> float:
        """Greatest gain over a uniform guess."""
        return max(self.template, self.text, self.words) - self.uniform


def blind_scores(train: Sequence[BlindItem], test: Sequence[BlindItem]) -> dict[str, BlindScore]:
    """Score the blind baselines, kind by kind.

    Args:
        train (`Sequence` of `BlindItem`): To fit on.
        test (`Sequence` of `BlindItem`): To score on.

    Returns:
        `dict`: `BlindScore` by kind; answers of a kind are those of both splits together.

    Source:
        Ours.
    """
    models = (MajorityBaseline(train, use_text=False), MajorityBaseline(train), BagOfWordsBaseline(train))
    scores = {}
    for kind in sorted({item.kind for item in test}):
        items = [item for item in test if item.kind == kind]
        answers = {item.answer for item in (*train, *items) if item.kind == kind}
        accuracy = [float(np.mean([model.predict(item) == item.answer for item in items])) for model in models]
        scores[kind] = BlindScore(len(items), len(items) / len(test), 1 / len(answers), *accuracy)
    return scores
