"""HC-SMoE, hierarchical clustering of experts (Chen et al., ICML 2025, arXiv 2410.08589)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.cluster.hierarchy import linkage

from harness.plan import LayerPlan
from harness.stats import LayerStats
from methods import LayerMethod


@dataclass(frozen=True)
class HCSMoE(LayerMethod):
    """Experts that say the same on average are merged into one.

    Each expert is represented by its mean output over all calibration tokens, routed to it or not,

        o_j = (1 / T) * sum over all x of f_j(x),

    the o_j of a layer are clustered agglomeratively (Euclidean distance, average linkage) until ``keep`` clusters are
    left, and a cluster's weights are averaged with the members' routing frequencies. The router is not touched: every
    member's row leads to the merged expert, so gates of members selected together add up.

    Where we differ: REAP's appendix D says cosine distance, but the paper's section 2 and both codes use Euclidean;
    the published run scripts of HC-SMoE misspell the option and silently run k-means; a cluster that no token was
    routed to is averaged uniformly, where the published code would write an all-zero expert.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"count", "all_output_sum"})

    def plan_layer(self, stats: LayerStats, keep: int) -> LayerPlan:
        means = stats["all_output_sum"] / max(stats.tokens, 1)
        return LayerPlan.merge(average_linkage_clusters(means, keep), stats["count"].tolist())


def average_linkage_clusters(points: np.ndarray, clusters: int) -> list[list[int]]:
    """Rows of ``points`` [n, d] in exactly ``clusters`` groups, also where equal heights would make scipy's cut by
    height return fewer.
    """
    n = len(points)
    members: dict[int, list[int]] = {index: [index] for index in range(n)}
    if clusters < n:
        merges = linkage(points, method="average", metric="euclidean")
        for step, (a, b, _, _) in enumerate(merges[: n - clusters]):
            members[n + step] = members.pop(int(a)) + members.pop(int(b))
    return list(members.values())
