"""Uniform allocation: the same share of every layer's experts, as stock checkpoints need it."""

from dataclasses import dataclass
from typing import ClassVar

from harness.stats import Stats
from methods import Method
from methods.allocations import Budget


@dataclass(frozen=True)
class Uniform:
    """keep_l = E_l - floor(ratio * E_l) in every layer l."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, method: Method) -> None:
        """Goes with every method."""

    def keep(self, stats: Stats, method: Method, budget: Budget) -> dict[int, int]:
        return dict(budget.uniform)
