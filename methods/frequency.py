"""Frequency: prune the experts that the router selects least often."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.stats import LayerStats
from methods import SumScore


@dataclass(frozen=True)
class Frequency(SumScore):
    """An expert that few tokens are routed to is little missed.

        S_j = N_j        (the number of calibration tokens whose top-k holds expert j; the scoring family at 0, 0, 0)

    Source: the frequency baseline of REAP, arXiv 2510.13999, appendix D.

    Where we differ: counts are the model's own selections, never recomputed from logits, and masked tokens do not
    count. Of experts with equal counts the one with the larger sum of gates stays; published codes leave ties to the
    order of torch.topk, which depends on how experts are numbered.
    """

    b: ClassVar[int] = 0
    alpha: ClassVar[int] = 0
    beta: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset({"count", "gate"})

    def second_score(self, stats: LayerStats) -> np.ndarray:
        return stats["gate"]
