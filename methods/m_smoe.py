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

    Where we differ: the official code's threshold loses groups on ties; ours is exact, and of equally frequent experts
    the one with the larger share of its layer's gates comes first, however experts are numbered. REAP's
    re-implementation puts the distance matrix through the distance once more (a second-order distance), ours does not.
    The hidden units are not permuted to match, as in the official Mixtral path.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"count", "gate", "logit_gram"})

    def plan(self, stats: Stats, keep: Mapping[int, int]) -> dict[int, LayerPlan]:
        dominants = dominant_experts(stats, sum(keep.values()))
        return {index: group_layer(layer, dominants[index]) for index, layer in stats.layers.items()}


def dominant_experts(stats: Stats, total: int) -> dict[int, list[int]]:
    """``total`` dominant experts over all layers, at least one in each.

    Ties go to the larger share of the layer's gates, then to the lower layer and index.
    """
    ranked = {index: _by_use(index, layer) for index, layer in stats.layers.items()}
    first = [experts[0] for experts in ranked.values()]
    rest = sorted(expert for experts in ranked.values() for expert in experts[1:])
    chosen = [*first, *rest[: total - len(first)]]
    return {index: sorted(expert for *_, layer, expert in chosen if layer == index) for index in stats.layers}


def _by_use(index: int, layer: LayerStats) -> list[tuple[float, float, int, int]]:
    """(-share of choices, -share of gates, layer, expert) of every expert, the most used first."""
    frequency, gate = (mean_over(layer[name], layer[name].sum()) for name in ("count", "gate"))
    return sorted((-float(frequency[e]), -float(gate[e]), index, e) for e in range(layer.experts))


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
