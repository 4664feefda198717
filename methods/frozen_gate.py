"""Frozen-gate reconstruction: remove the experts that change the layer's output least, gates left as they are."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.plan import LayerPlan
from harness.stats import LayerStats
from methods import LayerMethod


@dataclass(frozen=True)
class FrozenGate(LayerMethod):
    """Experts whose outputs cancel or stand in for each other can go together; those that add up cannot.

    With gates frozen, removing the set P changes the layer's output over the calibration tokens by exactly

        sum over x of || sum over i in P of g_i(x) f_i(x) ||_2^2  =  p^T C p,    C_ij = sum over x of g_i g_j <f_i, f_j>

    with p the indicator of P. One matrix scores every set at every ratio. Experts are removed greedily, one by one from
    the whole layer and, a second time, taken back one by one into an empty one; either set is improved by exchanging a
    removed expert for a kept one as long as that lowers the error, and the better one is taken.

    Source: our own; the error is that of NAEE (Lu et al., arXiv 2402.14800) without its re-routing, at a cost that
    does not grow with the number of sets. The diagonal of C alone is `gated_energy`.

    Where we differ: from NAEE, in that the (k+1)-th expert does not step in for a removed one and gates are not
    renormalised; so it is no NAEE and is not called so.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gated_output_gram"})

    def plan_layer(self, stats: LayerStats, keep: int) -> LayerPlan:
        removed = least_error(stats["gated_output_gram"], stats.experts - keep)
        return LayerPlan.prune(np.flatnonzero(~removed), stats.experts)


def least_error(gram: np.ndarray, number: int) -> np.ndarray:
    """Indicator [E], bool, of ``number`` experts with a small p^T C p: the better of two greedy sets, each improved by
    exchanges. Removing one by one never removes two experts that cancel, taking back one by one leaves them out.
    """
    sets = [exchanged(gram, one_by_one(gram, number)), exchanged(gram, taken_back(gram, number))]
    return min(sets, key=lambda removed: round(float(gram[np.ix_(removed, removed)].sum() / _scale(gram)), 12))


def one_by_one(gram: np.ndarray, number: int) -> np.ndarray:
    removed = np.zeros(len(gram), dtype=bool)
    for _ in range(number):
        removed[_last_smallest(np.where(removed, np.inf, added_error(gram, removed)))] = True
    return removed


def taken_back(gram: np.ndarray, number: int) -> np.ndarray:
    removed = np.ones(len(gram), dtype=bool)
    for _ in range(len(gram) - number):
        left = np.diag(gram) - 2 * gram[:, removed].sum(axis=1)  # change of the error when each one comes back
        removed[int(np.argmin(np.where(removed, left, np.inf)))] = False
    return removed


def exchanged(gram: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """The set after the best exchange of a removed for a kept expert, again and again until none lowers the error."""
    removed = removed.copy()
    while removed.any() and not removed.all():
        change = exchange_errors(gram, removed)
        back, out = divmod(int(np.argmin(change)), len(gram))
        if change[back, out] >= -1e-12 * _scale(gram):
            break
        removed[back], removed[out] = False, True
    return removed


def _scale(gram: np.ndarray) -> float:
    return float(np.trace(gram)) or 1.0


def added_error(gram: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """By how much p^T C p grows when each expert is removed too."""
    return np.diag(gram) + 2 * gram[:, removed].sum(axis=1)


def exchange_errors(gram: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """[i, j]: change of p^T C p when removed expert i comes back and kept expert j goes; inf for other pairs."""
    cross, own = gram[:, removed].sum(axis=1), np.diag(gram)
    change = (own - 2 * cross)[:, None] + (own + 2 * cross)[None, :] - 2 * gram
    return np.where(removed[:, None] & ~removed[None, :], change, np.inf)


def _last_smallest(values: np.ndarray) -> int:
    """Index of the smallest value, of equal ones the last: the one with the lowest index stays."""
    return len(values) - 1 - int(np.argmin(values[::-1]))
