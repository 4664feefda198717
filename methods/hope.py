"""HOPE, pruning by pairs (arXiv 2609.18916)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.plan import LayerPlan
from harness.stats import LayerStats
from methods import LayerMethod, highest, mean_over, one_of

STEPS = 500  # of the relaxation; it stops earlier at a stationary point


@dataclass(frozen=True)
class HOPE(LayerMethod):
    """Two experts that are strong together must not both go: the set to prune is chosen by pairs, not one by one.

        F_ij = (1 / N_ij) * sum over x routed to both i and j of a_i(x) a_j(x),    a = g(x) ||f(x)||_2
        prune P = argmin p^T F p,   p in {0, 1}^E,   sum p = |P|

    solved over the relaxed set 0 <= p <= 1, sum p = |P|, and rounded to the |P| largest entries of p. The diagonal is
    the mean of a^2, which is not the square of REAP's score.

    Options: ``average`` pairs (default, the paper's practice: N_ij is the number of tokens routed to both) or tokens
    (its theory: all T calibration tokens instead of N_ij).

    Source: arXiv 2609.18916, read in summaries.

    Where we differ: the paper's solver is not known to us; ours is Frank-Wolfe with exact line search from the uniform
    point, at most 500 steps, deterministic and independent of how experts are numbered. F need not be positive
    definite, so this comes near a stationary point of the relaxation, not its global minimum, and the rounded set is
    not improved further.
    """

    average: str
    needs: ClassVar[frozenset[str]] = frozenset({"coactivation", "gated_norm_gram"})

    def __post_init__(self) -> None:
        one_of("average", self.average, ("pairs", "tokens"))

    def plan_layer(self, stats: LayerStats, keep: int) -> LayerPlan:
        energy = pairwise_energy(stats) if self.average == "pairs" else stats["gated_norm_gram"] / max(stats.tokens, 1)
        pruned = relaxed(energy, stats.experts - keep)
        return LayerPlan.prune(highest(keep, -pruned.round(9)), stats.experts)


def pairwise_energy(stats: LayerStats) -> np.ndarray:
    """F [E, E]; 0 for a pair that no token was routed to together."""
    return mean_over(stats["gated_norm_gram"], stats["coactivation"])


def relaxed(energy: np.ndarray, number: int) -> np.ndarray:
    """Near a stationary point p [E] of p^T F p over 0 <= p <= 1, sum p = number."""
    experts = len(energy)
    p = np.full(experts, number / experts)
    for _ in range(STEPS):
        gradient = energy @ p
        scale = float(np.abs(gradient).max()) or 1.0
        corner = np.ones(experts)  # rounded, so that twins stay twins whatever the order of summation
        corner[highest(experts - number, (gradient / scale).round(12), -p.round(12))] = 0
        step = corner - p
        slope, curvature = gradient @ step, step @ energy @ step
        if slope >= -1e-12 * max(abs(p @ gradient), 1e-300):
            break
        p = p + step * (min(1.0, -slope / curvature) if curvature > 0 else 1.0)
    return p
