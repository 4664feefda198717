"""One option of every group at an exact total cost, for a loss that is no sum over groups: the geometry of RCO.

Group i has logits alpha_i over K options with costs c_i. The surface is where the expected cost meets the budget,

    C(alpha) = sum over i of <softmax(alpha_i), c_i> = B,

a smooth manifold of dimension G K - 1: a search that steps along its tangents and is pulled back onto it never leaves
the budget (Helcig and Alistarh, arXiv 2605.00649). Arrays are float64 [G, K] unless noted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.errors import UserError

TOLERANCE = 1e-9  # of the budget after a retraction
FARTHEST, BISECTIONS = 2.0**40, 100  # of a retraction
FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8  # Adam's usual constants


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@dataclass(frozen=True)
class BudgetSurface:
    """``costs`` [G, K]; ``budget`` lies strictly between the least and the largest total that options can have."""

    costs: np.ndarray
    budget: float

    def __post_init__(self) -> None:
        least, most = self.costs.min(axis=1).sum(), self.costs.max(axis=1).sum()
        assert least < self.budget < most, (least, self.budget, most)

    def cost(self, alpha: np.ndarray) -> float:
        """C(alpha)."""
        return float((softmax(alpha) * self.costs).sum())

    def normal(self, alpha: np.ndarray) -> np.ndarray:
        """Gradient of C: n_ik = p_ik (c_ik - E_i[c])."""
        p = softmax(alpha)
        return p * (self.costs - (p * self.costs).sum(axis=1, keepdims=True))

    def project(self, vector: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        """The part of a vector that is tangent to the surface at alpha: also the transport of a moment there."""
        normal = self.normal(alpha)
        length = float(np.linalg.norm(normal))
        if length == 0:  # every group has settled: nothing that is left to first order changes the cost
            return vector
        unit = normal / length
        return vector - float((vector * unit).sum()) * unit

    def retract(self, alpha: np.ndarray) -> np.ndarray:
        """alpha + t c with C(alpha + t c) = B to within 1e-9.

        C grows with t, as dC/dt = sum over i of Var_i(c) > 0, so a bracket and bisection find t.
        """

        def excess(t: float) -> float:
            return self.cost(alpha + t * self.costs) - self.budget

        low, high, t = -1.0, 1.0, 0.0
        while excess(low) > 0 and low > -FARTHEST:
            low *= 2
        while excess(high) < 0 and high < FARTHEST:
            high *= 2
        for _ in range(BISECTIONS):
            if abs(found := excess(t)) <= TOLERANCE:
                return alpha + t * self.costs
            low, high = (t, high) if found < 0 else (low, t)
            t = (low + high) / 2
        raise AssertionError(f"the cost {excess(t) + self.budget} is not the budget {self.budget}")


Blocks = Sequence[tuple[slice, BudgetSurface]]  # which groups each budget is for; one block: a global budget


def project(vector: np.ndarray, alpha: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Every block's part projected on the tangent space of its surface."""
    result = vector.copy()
    for rows, surface in blocks:
        result[rows] = surface.project(vector[rows], alpha[rows])
    return result


def retract(alpha: np.ndarray, blocks: Blocks) -> np.ndarray:
    """Every block's part back on its surface."""
    result = alpha.copy()
    for rows, surface in blocks:
        result[rows] = surface.retract(alpha[rows])
    return result


@dataclass(frozen=True)
class Adam:
    """Adam on budget surfaces: a point, its two moments, and the number of steps taken."""

    alpha: np.ndarray
    first: np.ndarray
    second: np.ndarray
    steps: int

    @classmethod
    def at(cls, alpha: np.ndarray) -> Adam:
        return cls(alpha, np.zeros_like(alpha), np.zeros_like(alpha), 0)

    def step(self, gradient: np.ndarray, lr: float, blocks: Blocks) -> Adam:
        """Downhill: the gradient made tangent, an ordinary step of Adam, back onto the surfaces, and the first moment
        transported to the new tangent space. The second moment, a scale for each coordinate, is left as it is.
        """
        tangent, steps = project(gradient, self.alpha, blocks), self.steps + 1
        first = FIRST_DECAY * self.first + (1 - FIRST_DECAY) * tangent
        second = SECOND_DECAY * self.second + (1 - SECOND_DECAY) * tangent**2
        scale = np.sqrt(second / (1 - SECOND_DECAY**steps)) + EPSILON
        alpha = retract(self.alpha - lr * first / (1 - FIRST_DECAY**steps) / scale, blocks)
        return Adam(alpha, project(first, alpha, blocks), second, steps)

    def to_json(self) -> dict[str, Any]:
        moments = {name: getattr(self, name).tolist() for name in ("alpha", "first", "second")}
        return {**moments, "steps": self.steps}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Adam:
        alpha, first, second = (np.array(state[name], dtype=np.float64) for name in ("alpha", "first", "second"))
        return cls(alpha, first, second, int(state["steps"]))


def capped_top(number: int, group: np.ndarray, capacity: Mapping[int, int], *scores: np.ndarray) -> np.ndarray:
    """Indicator [N] (bool) of ``number`` members with the largest sum of scores, at most ``capacity[g]`` of group g.

    scores: [N] each; the first decides, of equal ones the next, and last of all the highest index: what is dropped
    first is what `methods.highest` keeps last. group: [N] int. Taking the best while its group has room is optimal:
    the sets that fit are the independent sets of a partition matroid.
    """
    order = np.lexsort([-np.arange(len(group)), *(-score for score in reversed(scores))])
    room = np.zeros(len(group), dtype=bool)
    for key in np.unique(group):
        room[order[group[order] == key][: capacity[int(key)]]] = True
    assert room.sum() >= number, "the capacities hold the number"
    taken = np.zeros(len(group), dtype=bool)
    taken[order[room[order]][:number]] = True
    return taken


def best_options(values: np.ndarray, costs: np.ndarray, budget: int) -> np.ndarray:
    """The option of each group, [G] int, with the largest sum of values among those that cost exactly the budget.

    values: [G, K]. costs: [G, K] int, not negative. Dynamic programming over groups and totals, O(G K B).
    Raises UserError if no choice costs exactly the budget.
    """
    best = np.full(budget + 1, -np.inf)
    best[0] = 0.0
    taken = np.zeros((len(values), budget + 1), dtype=np.int64)
    for group, (value, cost) in enumerate(zip(values, costs, strict=True)):
        before, best = best, np.full(budget + 1, -np.inf)
        for option in np.flatnonzero(cost <= budget):
            here = before[: budget + 1 - cost[option]] + value[option]
            better = here > best[cost[option] :]
            best[cost[option] :][better] = here[better]
            taken[group, cost[option] :][better] = option
    if not np.isfinite(best[budget]):
        raise UserError(f"No choice of one option for each of {len(values)} groups costs exactly {budget}.")
    return _traced(taken, costs, budget)


def _traced(taken: np.ndarray, costs: np.ndarray, budget: int) -> np.ndarray:
    choice, left = np.zeros(len(taken), dtype=np.int64), budget
    for group in reversed(range(len(taken))):
        choice[group] = taken[group, left]
        left -= int(costs[group, choice[group]])
    assert left == 0
    return choice
