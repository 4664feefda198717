"""Compression methods, one file per paper: ``Stats -> Plan``, nothing else.

A method sees no model, path, device or ratio: it is given the statistics of the calibration pass and how many experts
each layer keeps. `harness/run.py` finds it through ``_target_`` in ``conf/method/<name>.yaml``.

What all of them promise (equal input, equal plan; exactly as many experts as asked for; renaming the experts renames
the plan, unless it is drawn by a seed; of experts that nothing tells apart the one with the lowest index stays) is
tested for every YAML there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from harness.errors import UserError
from harness.plan import LayerPlan
from harness.stats import LayerStats, Stats


class Method(Protocol):
    """``nested``: whether the experts kept at a higher ratio are among those kept at a lower one (for merging: whether
    its clusters are unions of the lower one's). ``aligns``: whether its plans match hidden units before averaging.
    """

    @property
    def nested(self) -> bool: ...

    @property
    def aligns(self) -> bool: ...

    @property
    def needs(self) -> frozenset[str]:
        """Names of what it reads (`harness.stats`); it is given nothing else. Empty: no calibration is run."""

    def plan(self, stats: Stats, keep: Mapping[int, int]) -> dict[int, LayerPlan]:
        """Decide every layer. ``keep[layer]``: experts kept by pruning, or distinct experts left by merging."""


class LayerMethod:
    """Base of the methods that decide each layer on its own: they define ``plan_layer``."""

    nested: ClassVar[bool] = False
    aligns: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        raise NotImplementedError

    def plan_layer(self, stats: LayerStats, keep: int) -> LayerPlan:
        raise NotImplementedError

    def plan(self, stats: Stats, keep: Mapping[int, int]) -> dict[int, LayerPlan]:
        return {index: self.plan_layer(layer, keep[index]) for index, layer in stats.layers.items()}


class SequentialMethod(LayerMethod):
    """Base of the methods whose layers are decided one after another, each from statistics gathered behind the layers
    that are compressed already. They need the model's weights, and a pass of their own for every ratio.
    """


class ScoreMethod(LayerMethod):
    """Base of the methods that prune the experts with the lowest score: they define ``score``."""

    nested: ClassVar[bool] = True

    def score(self, stats: LayerStats) -> np.ndarray:
        """Importance of each expert, shape [E]; the lowest are pruned."""
        raise NotImplementedError

    def second_score(self, stats: LayerStats) -> np.ndarray:
        """Decides between experts of equal score, shape [E]; by default nothing does but their index."""
        return np.zeros(stats.experts)

    def plan_layer(self, stats: LayerStats, keep: int) -> LayerPlan:
        return LayerPlan.prune(highest(keep, self.score(stats), self.second_score(stats)), stats.experts)


@dataclass(frozen=True)
class SumScore(ScoreMethod):
    """The scoring family: almost every one-shot criterion for pruning experts is a member of

        S_j(b, alpha, beta) = N_j^(-b) * sum over x in X_j of g_j(x)^alpha * ||f_j(x)||_2^beta

    with X_j the N_j tokens routed to j, g_j the gate and f_j the expert's output before it. A member names its three
    numbers (Liu et al., arXiv 2606.15716). All are quotients of sums of one calibration pass, so none is a mean of
    means, and an expert that no token was routed to scores 0.
    """

    b: ClassVar[int]
    alpha: ClassVar[int]
    beta: ClassVar[int]
    needs: ClassVar[frozenset[str]]

    _SUM: ClassVar[Mapping[tuple[int, int], str]] = {
        (0, 0): "count",
        (0, 1): "norm",
        (0, 2): "norm_sq",
        (1, 0): "gate",
        (1, 1): "gate_norm",
        (2, 2): "gate_sq_norm_sq",
    }

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "needs" not in vars(cls):
            cls.needs = frozenset({cls._SUM[cls.alpha, cls.beta], *(["count"] if cls.b else [])})

    def score(self, stats: LayerStats) -> np.ndarray:
        total = stats[self._SUM[self.alpha, self.beta]]
        return mean_over(total, stats["count"] ** self.b) if self.b else total


def highest(keep: int, *scores: np.ndarray) -> np.ndarray:
    """Indices of the ``keep`` highest by the first score, of equal ones by the next, and last of all the lowest index:
    the same on every machine.
    """
    return np.lexsort([-score for score in reversed(scores)])[:keep]


def mean_over(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """``total / count``, and 0 where nothing was counted: a never-routed expert scores 0 and goes first."""
    return np.divide(total, count, out=np.zeros_like(total, dtype=np.float64), where=count > 0)


def gram_cosine(gram: np.ndarray) -> np.ndarray:
    """Cosines between vectors whose inner products are ``gram`` [E, E]; 0 for a vector of zeros."""
    norms = np.sqrt(np.diag(gram))
    return mean_over(gram, np.outer(norms, norms))


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise UserError unless a method's option lies between these, both possible."""
    if not low <= value <= high:
        raise UserError(f"method.{name}={value} is not between {low:g} and {high:g}.")


def one_of(name: str, value: object, possible: tuple[str, ...]) -> None:
    """Raise UserError unless a method's option is one of these."""
    if value not in possible:
        raise UserError(f"method.{name}={value} is not one of {', '.join(possible)}.")
