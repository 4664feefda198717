"""Is a difference more than chance? Two models compared on the same items, over all seeds at once.

One seed each, items right or wrong: McNemar's exact test on the items that only one of them got right, and the interval
of Agresti & Min (2005, Statistics in Medicine 24:729), which holds for small numbers too. Otherwise Student's t with
two sources of chance, which items a benchmark has and which text a seed draws:

    Var(mean difference) = S_items^2 / n + S_seeds^2 / k,   freedom after Welch and Satterthwaite

S_items: standard deviation over the n items of differences averaged over seeds; S_seeds: over the k seeds of
differences averaged over items. What items and seeds share is counted in both, so the test errs towards caution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05  # of tests; intervals cover one minus this


@dataclass(frozen=True)
class Difference:
    """Of the first model's mean value from the second's.

    mean: in the metric's unit. low, high: ends of its 95 % interval. p: two-sided, of no difference. test: its name.
    n: items. seeds: pairs of seeds. lost, won: items that the first alone got wrong, and right; None unless every
    value is 0 or 1 and there is one seed.
    """

    mean: float
    low: float
    high: float
    p: float
    test: str
    n: int
    seeds: int
    lost: int | None = None
    won: int | None = None

    @property
    def is_separated(self) -> bool:
        return self.p < LEVEL


def difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Compare values of the same items, float [seeds, items]. A model without seeds has one row, which stands for all.

    Raises ValueError unless both have the same items, and the same seeds where both have several.
    """
    if first.shape[1] != second.shape[1] or not first.shape[1]:
        raise ValueError(f"{first.shape[1]} and {second.shape[1]} items cannot be compared in pairs.")
    if first.shape[0] != second.shape[0] and 1 not in (first.shape[0], second.shape[0]):
        raise ValueError(f"{first.shape[0]} and {second.shape[0]} seeds cannot be compared in pairs.")
    gaps = first - second
    if len(gaps) == 1 and np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        return _mcnemar(gaps[0])
    return _student(gaps)


def _mcnemar(gaps: np.ndarray) -> Difference:
    n, won, lost = len(gaps), int((gaps > 0).sum()), int((gaps < 0).sum())
    p = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    more, fewer, all_of = won + 0.5, lost + 0.5, n + 2  # Agresti & Min: half an item more in each cell
    middle = (more - fewer) / all_of
    error = math.sqrt(more + fewer - (more - fewer) ** 2 / all_of) / all_of
    reach = float(stats.norm.ppf(1 - LEVEL / 2)) * error
    low, high = max(-1.0, middle - reach), min(1.0, middle + reach)
    return Difference((won - lost) / n, low, high, p, "McNemar", n, 1, lost, won)


def _student(gaps: np.ndarray) -> Difference:
    seeds, n = gaps.shape
    mean = float(gaps.mean())
    parts = [(_variance(gaps.mean(0)), n - 1), (_variance(gaps.mean(1)), seeds - 1)]
    variance = sum(part for part, _ in parts)
    test = "t over items and seeds" if seeds > 1 else "paired t"
    if not any(many for _, many in parts):
        return Difference(mean, -math.inf, math.inf, 1.0, test, n, seeds)
    if variance == 0:  # every item differs by the same: Student cannot say how likely that is, the signs can
        p = float(stats.binomtest(0, n).pvalue) if mean else 1.0
        return Difference(mean, mean, mean, p, test, n, seeds)
    freedom = variance**2 / sum(part**2 / many for part, many in parts if many)
    error = math.sqrt(variance)
    reach = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return Difference(mean, mean - reach, mean + reach, p, test, n, seeds)


def _variance(values: np.ndarray) -> float:
    """Of the mean of the values; 0 of a single one, about which nothing is known."""
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, corrected after Holm (1979): comparable to `LEVEL` each."""
    order = np.argsort(p_values)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def interval(values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the 95 % interval of the mean over the first axis, by Student's t. Of one value: infinitely wide."""
    array = np.asarray(values, float)
    mean = array.mean(0)
    if len(array) < 2:
        return np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
    reach = stats.t.ppf(1 - LEVEL / 2, len(array) - 1) * np.sqrt(array.var(0, ddof=1) / len(array))
    return mean - reach, mean + reach
