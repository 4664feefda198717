"""Weighted EAN: the sum of gated output norms (Liu et al., arXiv 2606.15716)."""

from dataclasses import dataclass
from typing import ClassVar

from methods import SumScore


@dataclass(frozen=True)
class WeightedEAN(SumScore):
    """REAP without the division by frequency: what an expert adds to the layer's output in all.

        S_j = sum over x in X_j of g_j(x) * ||f_j(x)||_2        (the scoring family at 0, 1, 1)

    Source: arXiv 2606.15716, which finds it among the best when the calibration text and the tests share a domain. Key
    ``weighted_ean_sum`` in REAP's code; EASY-EP is this with a weight for each token.

    Where we differ: not known to; the paper was read in others' summaries.
    """

    b: ClassVar[int] = 0
    alpha: ClassVar[int] = 1
    beta: ClassVar[int] = 1
