"""How sure a number is: intervals over scenes by the bootstrap. No tensors.

Rows of one scene depend on each other, so scenes are drawn again, not rows.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Marks:
    """One number per row, whose mean is a metric.

    Args:
        values (`np.ndarray` of shape `(rows,)`): float64.
        scenes (`tuple[str, ...]`): Scene of each row.
        ids (`tuple[str, ...]`): Of each row.
        groups (`tuple[str, ...]`, *optional*): Group of each row, where the metric is the mean over groups of the means within them.
        whole (`float`, *optional*): The metric itself, where a program makes it of all rows at once and it is only near their mean (METEOR).

    Source:
        Ours.
    """

    values: np.ndarray
    scenes: tuple[str, ...]
    ids: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    whole: float | None = None

    @property
    def metric(self) -> float:
        """The number that they give."""
        return self._mean() if self.whole is None else self.whole

    @property
    def shift(self) -> float:
        """What the number lies above the mean of the rows."""
        return 0.0 if self.whole is None else self.whole - self._mean()

    def _mean(self) -> float:
        if self.groups is None:
            return float(self.values.mean())
        of_group = np.array(self.groups)
        return float(np.mean([self.values[of_group == group].mean() for group in sorted(set(self.groups))]))


def bootstrap_interval(marks: Marks, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Where the mean lies if other scenes of the same kind had been evaluated.

    Args:
        marks (`Marks`): At least one row.
        level (`float`): Share of the draws within the interval.
        draws (`int`): How often as many scenes are drawn, with replacement.
        seed (`int`): Of the draws.

    Returns:
        `tuple[float, float]`: percentiles of the means; the mean itself twice where there is one scene. A metric that is not quite the mean of its
        rows has the mean's interval, moved by the difference.

    Raises:
        ValueError: No row, or numbers out of range.

    Source:
        Upstream: Efron 1979 (percentile bootstrap). Ours: over scenes; a scene brings all of its rows.
    """
    if not len(marks.values) or not 0 < level < 1 or draws < 1:
        raise ValueError(
            f"bootstrap: wanted rows, a level in (0, 1) and draws; got {len(marks.values)}, {level}, {draws}"
        )
    names, scene_of = np.unique(np.array(marks.scenes), return_inverse=True)
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = np.nanmean([_means(marks, scene_of, drawn, rows) for rows in _rows_of_groups(marks)], axis=0) + marks.shift
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _rows_of_groups(marks: Marks) -> list[np.ndarray]:
    """Masks `(rows,)` of the groups."""
    if marks.groups is None:
        return [np.ones(len(marks.values), dtype=bool)]
    of_group = np.array(marks.groups)
    return [of_group == group for group in sorted(set(marks.groups))]


def _means(marks: Marks, scene_of: np.ndarray, drawn: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean `(draws,)` of some rows in each draw of scenes; NaN where it has none of them."""
    number = drawn.shape[1]
    sums = np.bincount(scene_of[rows], marks.values[rows], number)
    counts = np.bincount(scene_of[rows], minlength=number)
    sums, counts = sums[drawn].sum(axis=1), counts[drawn].sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


__all__ = ["Marks", "bootstrap_interval"]
