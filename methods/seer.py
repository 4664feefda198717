"""SEER, the soft count of SEER-MoE (Muzio et al., arXiv 2404.05089)."""

from dataclasses import dataclass
from typing import ClassVar

from methods import SumScore


@dataclass(frozen=True)
class SEER(SumScore):
    """An expert that receives little gate weight in all is little missed.

        S_j = sum over x in X_j of g_j(x)        (the scoring family at 0, 1, 0)

    Source: the soft heavy-hitter count of SEER-MoE, arXiv 2404.05089; also the routing score of Expert Trimming, arXiv
    2406.02500, ranked per layer.

    Where we differ: SEER-MoE goes on to train the router and Expert Trimming ranks over all layers at once; here it is
    the score alone. HC-SMoE's "S-prune" sums the softmax over all tokens, chosen or not; this sums chosen gates.
    """

    b: ClassVar[int] = 0
    alpha: ClassVar[int] = 1
    beta: ClassVar[int] = 0
