"""REAP, router-weighted expert activation pruning (Lasby et al., "REAP the Experts", arXiv 2510.13999)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.stats import LayerStats
from methods import ScoreMethod, mean_over


@dataclass(frozen=True)
class REAP(ScoreMethod):
    """An expert that contributes little to the layer's output, over the tokens it is active for, is little missed.

        S_j = (1 / |X_j|) * sum over x in X_j of g_j(x) * ||f_j(x)||_2        (eq. 9)

    with X_j the tokens routed to j, f_j the expert's output before the gate and g_j the gate.

    Where we differ from the published code: experts and gates are those the model really used (sigmoid routers,
    correction biases, scaling and renormalisation included), where the code takes the top-k and the softmax of raw
    logits for every architecture. On softmax routers that renormalise over the top-k the two agree.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"count", "gate_norm"})

    def score(self, stats: LayerStats) -> np.ndarray:
        return mean_over(stats["gate_norm"], stats["count"])
