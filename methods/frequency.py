"""Frequency: prune the experts that the router selects least often."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.stats import LayerStats
from methods import ScoreMethod


@dataclass(frozen=True)
class Frequency(ScoreMethod):
    """An expert that few tokens are routed to is little missed.

        S_j = N_j        (the number of calibration tokens whose top-k holds expert j)

    Source: the frequency baseline of REAP, arXiv 2510.13999, appendix D. Counts are the model's own selections, never
    recomputed from logits, and masked tokens do not count. Of experts with equal counts the one with the larger sum
    of gates stays; published codes leave ties to the order of torch.topk, which depends on how experts are numbered.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"count", "gate"})

    def score(self, stats: LayerStats) -> np.ndarray:
        return stats["count"]

    def second_score(self, stats: LayerStats) -> np.ndarray:
        return stats["gate"]
