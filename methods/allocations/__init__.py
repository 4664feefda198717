"""Allocations: how many experts each layer keeps, given how many the whole model keeps.

An allocation composes with every method that prunes: the method says which experts of a layer go first, the allocation
how many go. `harness/run.py` finds it through ``_target_`` in ``conf/allocation/<name>.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from harness.errors import UserError
from harness.plan import LayerPlan
from harness.stats import Stats
from methods import Method


@dataclass(frozen=True)
class Budget:
    """``uniform[layer]``: experts that the ratio leaves in each layer; their sum is what any allocation spends.
    ``floor``: the least that a layer may keep (the router's top-k). ``experts[layer]``: how many there are.
    """

    experts: Mapping[int, int]
    uniform: Mapping[int, int]
    floor: int

    @property
    def kept(self) -> int:
        return sum(self.uniform.values())

    @property
    def dropped(self) -> int:
        return sum(self.experts.values()) - self.kept

    @property
    def capacity(self) -> dict[int, int]:
        """The most that each layer can drop."""
        return {layer: count - min(self.floor, count) for layer, count in self.experts.items()}


class Allocation(Protocol):
    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics it reads besides those of the method."""

    def check(self, method: Method) -> None:
        """Raise UserError, before any work, for methods whose experts it cannot count."""

    def keep(self, stats: Stats, method: Method, budget: Budget) -> dict[int, int]:
        """Experts that each layer keeps: at least ``floor`` (or all there are), ``budget.kept`` in all."""


def orders(stats: Stats, method: Method, layers: Iterable[int], floor: int) -> dict[int, dict[int, tuple[int, ...]]]:
    """What the method keeps of each layer at every count from ``floor`` up: [layer][count] -> experts, ascending.

    Raises UserError for methods that do not only prune: their experts cannot be masked.
    """
    given = stats.only(method.needs)
    most = {layer: stats.layers[layer].experts for layer in layers}
    kept: dict[int, dict[int, tuple[int, ...]]] = {layer: {} for layer in most}
    for count in range(min(floor, min(most.values())), max(most.values()) + 1):
        plans = method.plan(given, {layer: min(count, experts) for layer, experts in most.items()})
        for layer, experts in most.items():
            check_prunes(method, plans[layer])
            kept[layer][min(count, experts)] = plans[layer].kept_rows
    return kept


def check_prunes(method: Method, plan: LayerPlan | None) -> None:
    """Raise UserError if a plan of the method merges, where one is known."""
    if plan is not None and not plan.only_prunes:
        raise UserError(
            f"{type(method).__name__} merges experts, and an allocation is searched over pruned ones only. "
            "Choose allocation=uniform or a method that prunes."
        )


def largest_remainder(weights: Mapping[int, float], capacity: Mapping[int, int], total: int) -> dict[int, int]:
    """``total`` split over layers in proportion to ``weights``, none above its capacity: whole shares first, then one
    more for the largest remainders (equal ones: the lowest layer); what a full layer cannot take goes to the others in
    the same proportion.

    Raises UserError if the capacities hold less than the total.
    """
    if total > sum(capacity.values()):
        raise UserError(
            f"{total} experts are to go, but with the router's top-k left in each layer only {sum(capacity.values())} "
            "can. Lower the ratio."
        )
    share = dict.fromkeys(capacity, 0)
    while (left := total - sum(share.values())) > 0:
        open_layers = [layer for layer in capacity if share[layer] < capacity[layer]]
        mass = np.array([max(float(weights[layer]), 0.0) for layer in open_layers])
        mass = mass / mass.sum() if mass.sum() > 0 else np.full(len(mass), 1 / len(mass))
        wanted = left * mass
        whole = np.floor(wanted + 1e-9).astype(int)
        for place in np.argsort(whole - wanted, kind="stable")[: left - int(whole.sum())]:
            whole[place] += 1
        for layer, more in zip(open_layers, whole, strict=True):
            share[layer] += min(int(more), capacity[layer] - share[layer])
    return share
