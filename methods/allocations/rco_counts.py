"""RCO over counts: how many experts of each layer go, by descent on the budget's surface (after arXiv 2605.00649)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from harness.stats import Stats
from harness.trial import trial_plan
from methods import Method
from methods.allocations import Budget, check_prunes, largest_remainder, orders
from methods.budget_surface import Blocks, BudgetSurface, best_options, retract
from methods.rco import Descent

NEVER = -1e30  # logit of an option that a layer does not have: its probability is exactly 0


@dataclass(frozen=True)
class Counts:
    """Every layer is a group: option r drops the r experts that the order says go first, at a cost of r.

    stays[layer]: [options, E] in {0, 1}, row r what dropping r experts leaves. uniform: how many go of each layer
    in the uniform plan, their sum the budget.
    """

    stays: Mapping[int, np.ndarray]
    uniform: Mapping[int, int]

    @property
    def budget(self) -> int:
        return sum(self.uniform.values())

    @cached_property
    def costs(self) -> np.ndarray:
        """[layers, options] int; 0 for the options that a layer lacks, which its option 0 always beats."""
        options = np.arange(max(len(rows) for rows in self.stays.values()))
        return np.stack([np.where(options < len(rows), options, 0) for rows in self.stays.values()])

    @cached_property
    def blocks(self) -> Blocks:
        return ((slice(0, len(self.costs)), BudgetSurface(self.costs.astype(float), self.budget)),)

    @cached_property
    def start(self) -> np.ndarray:
        """-(r - uniform)^2 / (2 sigma^2), sigma a quarter of the layer's options, at least 1."""
        alpha = np.full(self.costs.shape, NEVER)
        for row, (layer, rows) in enumerate(self.stays.items()):
            sigma = max(1.0, (len(rows) - 1) / 4)
            alpha[row, : len(rows)] = -((np.arange(len(rows)) - self.uniform[layer]) ** 2) / (2 * sigma**2)
        return retract(alpha, self.blocks)

    def best(self, values: np.ndarray) -> np.ndarray:
        return best_options(values, self.costs, self.budget)

    def survival(self, choice: np.ndarray) -> dict[int, np.ndarray]:
        return {layer: rows[option] for (layer, rows), option in zip(self.stays.items(), choice, strict=True)}

    def slopes(self, by_survival: Mapping[int, np.ndarray]) -> np.ndarray:
        slopes = np.zeros(self.costs.shape)
        for row, (layer, rows) in enumerate(self.stays.items()):
            slopes[row, : len(rows)] = rows @ by_survival[layer]
        return slopes


@dataclass(frozen=True)
class RCOCounts(Descent):
    """Only how many experts of each layer go is searched, by RCO's descent; which of them is the method's business.

    Layer l has the options r = 0 .. E_l - top_k at a cost of r each. Where B experts go, its logits alpha_l move on

        sum over l of E_r[r] = B,    r ~ softmax(alpha_l)

    Each sample adds Gumbel noise, takes the counts with the largest sum of (alpha + noise) / tau among those that total
    B (dynamic programming), and differentiates KL(original || pruned) straight through the survival of the expert of
    rank i (0 goes first): 1[i >= r_l] as it is, sum over r <= i of softmax((alpha + noise) / tau)_r as it is taken to
    move. It starts from alpha_lr = -(r - uniform_l)^2 / (2 sigma^2), whose plan is the uniform one.

    Options: ``steps``, ``lr``, ``tau_start``, ``tau_end``, ``samples``, ``check_every``, ``sequences`` and ``seed``, as
    in `rco`.

    Source: our own, after arXiv 2605.00649: the search space of EvoESAP, so that the two searches can be compared.
    Experimental.

    Where we differ: the paper chooses experts or bit widths, not counts. Of the plans measured the one with the lowest
    deployed KL is taken, as the last one alone was unreliable in trials on tiny models. A method whose sets are not
    nested is followed too: an expert's survival is then the probability of the counts that keep it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"search"})

    def check(self, method: Method) -> None:
        check_prunes(method, trial_plan(method))

    def keep(self, stats: Stats, method: Method, budget: Budget) -> dict[int, int]:
        experts, capacity = budget.experts, budget.capacity
        wanted = {layer: count - budget.uniform[layer] for layer, count in experts.items()}
        uniform = largest_remainder(wanted, capacity, budget.dropped)
        if budget.dropped in (0, sum(capacity.values())):
            return {layer: count - uniform[layer] for layer, count in experts.items()}  # there is one plan
        kept = orders(stats, method, experts, budget.floor)
        stays = {
            layer: np.stack([_indicator(kept[layer][count - r], count) for r in range(capacity[layer] + 1)])
            for layer, count in experts.items()
        }
        assert stats.search is not None, "it is among the needs"
        plain = {layer: kept[layer][count - uniform[layer]] for layer, count in experts.items()}
        found = self.descend(stats.search(self.sequences), Counts(stays, uniform), plain)
        return {layer: len(survivors) for layer, survivors in found.items()}


def _indicator(members: tuple[int, ...], size: int) -> np.ndarray:
    return np.isin(np.arange(size), members).astype(float)
