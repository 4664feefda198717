"""M-SMoE, the merging half of MC-SMoE (Li et al., ICLR 2024, arXiv 2310.01334)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.plan import LayerPlan
from harness.stats import LayerStats, Stats
from methods import gram_cosine, mean_over, one_of


@dataclass(frozen=True)
class MSMoE:
    """The most used experts stay as group centres; each other expert joins the centre whose router column is nearest.

    Dominant experts: each layer's most frequently selected one, then the globally most frequent ones (counts normalised
    per layer) until the layers keep ``sum(keep)`` together, so layers may keep different numbers. Any other expert i
    joins the dominant j of its layer with the largest cosine between their columns of router logits over all tokens,

        cos(i, j) = G_ij / sqrt(G_ii * G_jj),   G = sum over x of z(x) z(x)^T,

    and each group's weights are averaged with the routing frequencies. The router is not touched.

    Options: ``reference_compat`` measures i and j as REAP's re-implementation does, by the cosine between rows i and j
    of the distance matrix 1 - cos (a second-order distance; on routers without much structure it sends about every
    other expert elsewhere). ``align: weights`` permutes members' hidden units to match the dominant's before averaging.

    Source: arXiv 2310.01334, section 3; REAP, arXiv 2510.13999, eq. 14 and appendix D.

    Where we differ: the official code's threshold loses groups on ties; ours is exact, and of equally frequent experts
    the one with the larger share of its layer's gates comes first, however experts are numbered. The official code
    aligns hidden units in Switch models and not in Mixtral, REAP's aligns them always; ours only if asked. With
    ``reference_compat`` the distances are those of the whole pass, where REAP's code averages them over batches.
    """

    align: str | None
    reference_compat: bool
    nested: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"count", "gate", "logit_gram"})

    def __post_init__(self) -> None:
        one_of("align", self.align or "null", ("null", "weights"))

    @property
    def aligns(self) -> bool:
        return self.align == "weights"

    def plan(self, stats: Stats, keep: Mapping[int, int]) -> dict[int, LayerPlan]:
        dominants = dominant_experts(stats, sum(keep.values()))
        return {index: self.group(layer, dominants[index]) for index, layer in stats.layers.items()}

    def group(self, stats: LayerStats, dominants: list[int]) -> LayerPlan:
        """Give every expert to its most similar dominant and merge the groups."""
        similarity = gram_cosine(stats["logit_gram"])
        if self.reference_compat:
            similarity = second_order(similarity)
        groups: dict[int, list[int]] = {dominant: [dominant] for dominant in dominants}
        for expert in sorted(set(range(stats.experts)) - set(dominants)):
            nearest = dominants[int(np.argmax(similarity[expert, dominants]))]
            groups[nearest].append(expert)
        return LayerPlan.merge(groups.values(), stats["count"].tolist(), align=self.aligns)


def second_order(cosine: np.ndarray) -> np.ndarray:
    """Cosines between the rows of the distance matrix 1 - cosine, [E, E]."""
    distance = 1 - cosine
    return gram_cosine(distance @ distance.T)


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
