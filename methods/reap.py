"""REAP, router-weighted expert activation pruning (Lasby et al., "REAP the Experts", arXiv 2510.13999)."""

from dataclasses import dataclass
from typing import ClassVar

from methods import SumScore


@dataclass(frozen=True)
class REAP(SumScore):
    """An expert that contributes little to the layer's output, over the tokens it is active for, is little missed.

        S_j = (1 / |X_j|) * sum over x in X_j of g_j(x) * ||f_j(x)||_2        (the scoring family at 1, 1, 1)

    with X_j the tokens routed to j, f_j the expert's output before the gate and g_j the gate.

    Source: arXiv 2510.13999, eq. 9.

    Where we differ: experts and gates are those the model really used (sigmoid routers, correction biases, scaling and
    renormalisation included), where the published code takes the top-k and the softmax of raw logits for every
    architecture; ``routing=paper`` does as that code does. The two agree on softmax routers that renormalise and whose
    config says so (norm_topk_prob, as Qwen3's): Mixtral and ERNIE renormalise too, but their configs do not say so.
    """

    b: ClassVar[int] = 1
    alpha: ClassVar[int] = 1
    beta: ClassVar[int] = 1
