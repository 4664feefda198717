"""EAN, expert activation norm (Jaiswal et al., "Finding Fantastic Experts in MoEs", arXiv 2504.05586)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.stats import LayerStats
from methods import ScoreMethod


@dataclass(frozen=True)
class EAN(ScoreMethod):
    """An expert whose outputs are small, summed over the tokens it sees, is little missed.

        S_j = sum over x routed to j of ||f_j(x)||_2        (f_j before the gate)

    Source: arXiv 2504.05586 as restated in REAP, arXiv 2510.13999, eq. 13: the *sum* of norms. The mean, which some
    ports also call EAN, is another method.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"norm"})

    def score(self, stats: LayerStats) -> np.ndarray:
        return stats["norm"]
