"""M-SMoE, the merging half of MC-SMoE (Li et al., ICLR 2024, arXiv 2310.01334)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.plan import LayerPlan
from harness.stats import LayerStats, Stats
from methods import mean_over


@dataclass(frozen=True)
class MSMoE:
    """The most used experts stay as group centres; each other expert joins the centre whose router column is nearest.

    Dominant experts: each layer's most frequently selected one, then the globally most frequent ones (counts normalised
    per layer) until the layers keep ``sum(keep)`` together, so layers may keep different numbers. Any other expert i
    joins the dominant j of its layer with the largest cosine between their columns of router logits over all tokens,

        cos(i, j) = G_ij / sqrt(G_ii * G_jj),   G = sum over x of z(x) z(x)^T,

    and each group's weights are averaged with the routing frequencies. The router is not touched.

    Where we differ: the official code's threshold loses groups on ties, ours is exact; REAP's re-implementation puts
    the distance matrix through the distance once more (a second-order distance), ours does not; the hidden units are
    not permuted to match, as in the official Mixtral path.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"count", "logit_gram"})

    def plan(self, stats: Stats, keep: Mapping[int, int]) -> dict[int, LayerPlan]:
        dominants = dominant_experts(stats, sum(keep.values()))
        return {index: group_layer(layer, dominants[index]) for index, layer in stats.layers.items()}


def dominant_experts(stats: Stats, total: int) -> dict[int, list[int]]:
    """``total`` dominant experts over all layers, at least one in each; ties go to the lower layer and index."""
    usage = {index: mean_over(layer["count"], layer["count"].sum()) for index, layer in stats.layers.items()}
    chosen = {index: [int(np.argmax(frequency))] for index, frequency in usage.items()}
    rest = [
        (-frequency, index, expert)
        for index, frequencies in usage.items()
        for expert, frequency in enumerate(frequencies.tolist())
        if expert != chosen[index][0]
    ]
    for _, index, expert in sorted(rest)[: total - len(chosen)]:
        chosen[index].append(expert)
    return {index: sorted(experts) for index, experts in chosen.items()}


def group_layer(stats: LayerStats, dominants: list[int]) -> LayerPlan:
    """Give every expert to its most similar dominant and merge the groups."""
    similarity = gram_cosine(stats["logit_gram"])
    groups: dict[int, list[int]] = {dominant: [dominant] for dominant in dominants}
    for expert in sorted(set(range(stats.experts)) - set(dominants)):
        nearest = dominants[int(np.argmax(similarity[expert, dominants]))]
        groups[nearest].append(expert)
    return LayerPlan.merge(groups.values(), stats["count"].tolist())


def gram_cosine(gram: np.ndarray) -> np.ndarray:
    """Cosines between columns whose inner products are ``gram`` [E, E]; 0 for a column of zeros."""
    norms = np.sqrt(np.diag(gram))
    return mean_over(gram, np.outer(norms, norms))
