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

    with p the indicator of P. One matrix scores every set at every ratio: experts are removed greedily, and then a
    removed one is exchanged for a kept one as long as that lowers the error.

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
    """Indicator [E], bool, of ``number`` experts with a small p^T C p: greedy, then exchanges until none helps."""
    removed = np.zeros(len(gram), dtype=bool)
    for _ in range(number):
        removed[_last_smallest(np.where(removed, np.inf, added_error(gram, removed)))] = True
    tolerance = 1e-12 * float(np.trace(gram))
    while number and number < len(gram):
        gain = exchange_errors(gram, removed)
        back, out = divmod(int(np.argmin(gain)), len(gram))
        if gain[back, out] >= -tolerance:
            break
        removed[back], removed[out] = False, True
    return removed


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
