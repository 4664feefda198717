"""Merging by barriers, the three ablations of HodgeCover (Zhong et al., arXiv 2605.13997)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.plan import LayerPlan
from harness.stats import BARRIER_MODES, LayerStats
from methods import LayerMethod, mean_over, one_of, within
from methods.hodge import Barriers, barrier_sums, expert_order

QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the triple barriers: the threshold of the veto, as it is relaxed


@dataclass(frozen=True)
class BarrierMerge(LayerMethod):
    """Pairs of experts are merged in the order of what merging them costs, until ``keep`` groups are left.

    Union-find over all pairs, the cheapest first; a pair whose ends are together already is passed over. With b the
    merge barriers (`harness.barriers`) and p_ij the mean of b_ijk over the triangles that hold i and j, divided by the
    layer's largest such mean,

        cost_ij = b_ij                        (barrier, the paper's Greedy-Barrier)
        cost_ij = b_ij (1 + penalty p_ij)     (penalty, its Triplet-Penalty)
        cost_ij = b_ij, but no union whose triangles have a b_ijk above the median    (hypergraph, Triplet-Hypergraph)

    A group's weights are averaged by routing frequency into its most frequent member, whose router row stays.

    Options: ``cost``; ``mode``, how barriers are measured; ``penalty``, of cost=penalty.

    Source: arXiv 2605.13997, the ablations of its appendix; no code was released.

    Where we differ: the paper gives no value for the penalty (ours is 1), no normalisation of p (0 for a pair in no
    triangle), no way out when the veto leaves more than ``keep`` groups (ours raises the threshold by tenths of the
    layer's triple barriers and goes on merging), and no word on router rows. Equally dear pairs are merged in the order
    of their members' frequency, gates and barriers, not of their numbers.
    """

    cost: str
    mode: str
    penalty: float
    nested: ClassVar[bool] = False  # groups are unions of those of a lower ratio, but absorbed experts have no row

    def __post_init__(self) -> None:
        one_of("cost", self.cost, ("barrier", "penalty", "hypergraph"))
        one_of("mode", self.mode, BARRIER_MODES)
        within("penalty", self.penalty, 0, float("inf"))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"count", "gate", *barrier_sums(self.mode)})

    def plan_layer(self, stats: LayerStats, keep: int) -> LayerPlan:
        order = expert_order(stats[barrier_sums(self.mode)[0]], stats["count"], stats["gate"])
        groups = self.groups(Barriers.read(stats, self.mode, order), keep)
        named = {int(order[group[0]]): order[group].tolist() for group in groups}  # vertex 0 is the most frequent
        return LayerPlan.absorb(named, stats["count"].tolist())

    def groups(self, barriers: Barriers, keep: int) -> list[list[int]]:
        """``keep`` groups of vertices, each ascending."""
        group_of = {vertex: [vertex] for vertex in range(barriers.space.vertices)}
        left = len(group_of)
        for (first, second), limit in self._candidates(barriers):
            one, other = group_of[first], group_of[second]
            if left == keep:
                break
            if one is other or _vetoed(barriers, one + other, limit):
                continue
            joined = sorted(one + other)
            group_of.update(dict.fromkeys(joined, joined))
            left -= 1
        return [group for vertex, group in group_of.items() if group[0] == vertex]

    def _candidates(self, barriers: Barriers) -> Iterator[tuple[tuple[int, int], float]]:
        """(pair, the highest triple barrier that a group may hold), in the order in which they are tried."""
        cost = barriers.edge_barrier
        if self.cost == "penalty":
            cost = cost * (1 + self.penalty * triangle_means(barriers))
        pairs = [(int(i), int(j)) for i, j in barriers.space.edges[np.argsort(cost, kind="stable")]]
        vetoing = self.cost == "hypergraph" and len(barriers.triple) > 0
        for limit in np.quantile(barriers.triple, QUANTILES) if vetoing else (np.inf,):
            yield from ((pair, float(limit)) for pair in pairs)


def triangle_means(barriers: Barriers) -> np.ndarray:
    """p [edges]: the mean triple barrier over the triangles on each edge, relative to the largest mean."""
    triangles, vertices = barriers.space.triangles, barriers.space.vertices
    total, number = np.zeros((vertices, vertices)), np.zeros((vertices, vertices))
    for low, high in ((0, 1), (0, 2), (1, 2)):
        np.add.at(total, (triangles[:, low], triangles[:, high]), barriers.triple)
        np.add.at(number, (triangles[:, low], triangles[:, high]), 1)
    mean = barriers.space.on_edges(mean_over(total, number))
    return mean_over(mean, np.full_like(mean, mean.max(initial=0)))


def _vetoed(barriers: Barriers, group: list[int], limit: float) -> bool:
    if limit == np.inf:
        return False
    inside = np.isin(barriers.space.triangles, group).all(axis=1)
    return bool((barriers.triple[inside] > limit).any())
