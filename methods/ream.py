"""REAM, merging around the most salient experts, layer after layer (Jha et al., arXiv 2604.04356)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.plan import LayerPlan
from harness.stats import LayerStats
from methods import SequentialMethod, gram_cosine, highest, mean_over, one_of, within


@dataclass(frozen=True)
class REAM(SequentialMethod):
    """The most salient experts absorb the others instead of replacing them, each as many as it likes up to a limit.

    Layer by layer, each observed behind the layers that are compressed already: the ``keep`` experts with the highest
    REAP score are centres. In order of their score, each absorbs up to ``group_size`` - 1 of the experts not yet taken
    that are most similar to it, so that most centres stay alone,

        similarity(i, j) = mean of (cos(q_i, q_j) + 1) / 2 and 1 - d_ij / max d,
        q_j = sum over all x of p_j(x) f_j(x),    d_ij = || z_i / ||z_i|| - z_j / ||z_j|| ||

    with p the softmax over all E and z_j the router's logits of expert j over all tokens. Groups are averaged with the
    scores as weights, hidden units aligned to the centre's. Router rows of absorbed experts are deleted, as when
    pruning, and so is an expert that no group has room for.

    Options: ``saliency`` reap (default, as the paper says) or gate_squared, the mean of g^2 ||f|| that the released
    default computes, as it multiplies by the gate twice; ``group_size``.

    Source: arXiv 2604.04356 and its published code (SamsungSAILMontreal/ream).

    Where we differ: similarity is the code's (a second reading of the paper's eq. 7-8 has a sum of the terms and a
    cosine per token). Alignment
    matches weights; the code matches sampled hidden activations and a 64-dimensional PCA of the weights. Padding never
    counts and sums are over all batches, where the code averages batch means.
    """

    saliency: str
    group_size: int
    aligns: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset(
        {"count", "gate_norm", "gate_sq_norm", "all_gated_output_sum", "logit_gram"}
    )

    def __post_init__(self) -> None:
        one_of("saliency", self.saliency, ("reap", "gate_squared"))
        within("group_size", self.group_size, 1, 1_000_000)

    def plan_layer(self, stats: LayerStats, keep: int) -> LayerPlan:
        score = mean_over(stats["gate_norm" if self.saliency == "reap" else "gate_sq_norm"], stats["count"])
        order = [int(expert) for expert in highest(stats.experts, score)]
        free = order[keep:]
        likeness = similarity(stats)
        groups: dict[int, list[int]] = {}
        for centre in order[:keep]:
            nearest = highest(self.group_size - 1, likeness[centre, free], score[free])
            groups[centre] = [centre, *(free[place] for place in nearest)]
            free = [expert for expert in free if expert not in groups[centre]]
        return LayerPlan.absorb(groups, score.tolist(), align=True)


def similarity(stats: LayerStats) -> np.ndarray:
    """[E, E], each entry in [0, 1]."""
    outputs = stats["all_gated_output_sum"]
    distance = np.sqrt(np.maximum(0, 2 - 2 * gram_cosine(stats["logit_gram"])))
    largest = float(distance.max())
    return ((gram_cosine(outputs @ outputs.T) + 1) / 2 + 1 - distance / (largest or 1.0)) / 2
