"""EASY-EP (Dong et al., "Domain-Specific Pruning of Large Mixture-of-Experts Models", arXiv 2504.06792)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.stats import LayerStats
from methods import ScoreMethod


@dataclass(frozen=True)
class EasyEP(ScoreMethod):
    """An expert matters by what it adds to the layer's output on the tokens whose direction the layer really changes.

        S_j = sum over x in X_j of g_j(x) * ||f_j(x)||_2 * s(x),    s = max(0, 1 - cos(u, u + r))

    with u the residual stream in front of the MoE block and r the gated sum of the token's routed experts.

    Source: arXiv 2504.06792 and its published code (expert_selection.py).

    Where we differ: the paper calibrates on 25 demonstrations that the model itself wrote in the target domain; here
    it sees the same tokens as every other method. For mixed domains the code normalises each domain's scores first;
    here all tokens count alike.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gate_norm_turn"})

    def score(self, stats: LayerStats) -> np.ndarray:
        return stats["gate_norm_turn"]
