"""Compression methods, one file per paper: ``Stats -> Plan``, nothing else.

A method sees no model, path, device or ratio: it is given the statistics of the calibration pass and how many experts
each layer keeps. `harness/run.py` finds it through ``_target_`` in ``conf/method/<name>.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import numpy as np

from harness.plan import LayerPlan
from harness.stats import LayerStats, Stats


class Method(Protocol):
    """``needs``: names of the sums (`harness.stats`) it reads; it is given no others. Empty: no calibration is run."""

    needs: ClassVar[frozenset[str]]

    def plan(self, stats: Stats, keep: Mapping[int, int]) -> dict[int, LayerPlan]:
        """Decide every layer. ``keep[layer]``: experts kept by pruning, or distinct experts left by merging."""


class LayerMethod:
    """Base of the methods that decide each layer on its own: they define ``plan_layer``."""

    def plan_layer(self, stats: LayerStats, keep: int) -> LayerPlan:
        raise NotImplementedError

    def plan(self, stats: Stats, keep: Mapping[int, int]) -> dict[int, LayerPlan]:
        return {index: self.plan_layer(layer, keep[index]) for index, layer in stats.layers.items()}


class ScoreMethod(LayerMethod):
    """Base of the methods that prune the experts with the lowest score: they define ``score``."""

    def score(self, stats: LayerStats) -> np.ndarray:
        """Importance of each expert, shape [E]; the lowest are pruned."""
        raise NotImplementedError

    def second_score(self, stats: LayerStats) -> np.ndarray:
        """Decides between experts of equal score, shape [E]; by default nothing does but their index."""
        return np.zeros(stats.experts)

    def plan_layer(self, stats: LayerStats, keep: int) -> LayerPlan:
        return LayerPlan.prune(highest(keep, self.score(stats), self.second_score(stats)), stats.experts)


def highest(keep: int, *scores: np.ndarray) -> np.ndarray:
    """Indices of the ``keep`` highest by the first score, of equal ones by the next, and last of all the lowest index:
    the same on every machine.
    """
    return np.lexsort([-score for score in reversed(scores)])[:keep]


def mean_over(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """``total / count``, and 0 where nothing was counted: a never-routed expert scores 0 and goes first."""
    return np.divide(total, count, out=np.zeros_like(total, dtype=np.float64), where=count > 0)
