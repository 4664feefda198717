"""Random pruning: what a method must beat to have learnt anything from the calibration data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.plan import LayerPlan
from harness.stats import Stats
from methods import highest


@dataclass(frozen=True)
class Random:
    """Keeps a uniformly random set of experts in each layer.

    Nested: with one seed, the experts kept at a higher ratio are a subset of those kept at a lower one.
    """

    seed: int
    nested: ClassVar[bool] = True
    aligns: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def plan(self, stats: Stats, keep: Mapping[int, int]) -> dict[int, LayerPlan]:
        return {index: self._keep(index, layer.experts, keep[index]) for index, layer in stats.layers.items()}

    def _keep(self, index: int, experts: int, keep: int) -> LayerPlan:
        order = np.random.default_rng([self.seed, index]).random(experts)
        return LayerPlan.prune(highest(keep, order), experts)
