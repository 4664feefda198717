"""AIMER, a score of the weights alone (arXiv 2603.18492)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.stats import LayerStats
from methods import ScoreMethod, mean_over


@dataclass(frozen=True)
class AIMER(ScoreMethod):
    """An expert whose weights are all about equally large has learnt little that stands out.

        S_j = - mean |W_j| / sqrt(mean W_j^2)        over the entries of its gate, up and down matrices together

    The quotient of the two means is 1 when all entries have one size, 0.80 for a Gaussian and less for heavier tails;
    the highest quotients are pruned. No text is read, so it is the baseline that a calibrated score has to beat.

    Source: arXiv 2603.18492 and its published code.

    Where we differ: sums are float64, where the code adds up in float32. An expert whose weights are all zero has no
    quotient and goes first.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weight_count", "weight_abs", "weight_sq"})

    def score(self, stats: LayerStats) -> np.ndarray:
        count = stats["weight_count"]
        quotient = mean_over(mean_over(stats["weight_abs"], count), np.sqrt(mean_over(stats["weight_sq"], count)))
        return np.where(stats["weight_sq"] > 0, -quotient, -np.inf)
