"""HC-SMoE, hierarchical clustering of experts (Chen et al., ICML 2025, arXiv 2410.08589)."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import pdist

from harness.errors import UserError
from harness.plan import LayerPlan
from harness.stats import LayerStats
from methods import LayerMethod, one_of


@dataclass(frozen=True)
class HCSMoE(LayerMethod):
    """Experts that say the same on average are merged into one.

    Each expert is represented by its mean output over all calibration tokens, routed to it or not,

        o_j = (1 / T) * sum over all x of f_j(x),

    the o_j of a layer are clustered agglomeratively until ``keep`` clusters are left, and a cluster's weights are
    averaged with the members' routing frequencies. The router is not touched: every member's row leads to the merged
    expert, so gates of members selected together add up.

    Options: ``distance`` euclidean (default) or cosine; ``linkage`` average (default), complete, single or ward (the
    last on Euclidean distance only); ``clustering`` hierarchical (default) or kmeans (k-means++ drawn by ``seed``; not
    nested). Ward, complete and single are scipy's.

    Source: arXiv 2410.08589, section 3, and REAP, arXiv 2510.13999, section 2 and appendix D.

    Where we differ: REAP's appendix D (eq. 16) says cosine distance, but its section 2 and both codes use Euclidean.
    The published run scripts of HC-SMoE misspell the option and silently run k-means; its code's complete linkage joins
    the farthest pair and its ward is not Ward's. A cluster that no token was routed to is averaged uniformly, where
    the published code would write an all-zero expert.
    """

    distance: str
    linkage: str
    clustering: str
    seed: int
    needs: ClassVar[frozenset[str]] = frozenset({"count", "all_output_sum"})

    def __post_init__(self) -> None:
        one_of("distance", self.distance, ("euclidean", "cosine"))
        one_of("linkage", self.linkage, ("average", "complete", "single", "ward"))
        one_of("clustering", self.clustering, ("hierarchical", "kmeans"))
        if self.distance == "cosine" and (self.linkage == "ward" or self.clustering == "kmeans"):
            raise UserError(
                "method.distance=cosine goes with average, complete or single linkage: ward and kmeans minimise "
                "squared Euclidean distances. Set method.distance=euclidean."
            )

    @property
    def nested(self) -> bool:  # type: ignore[override]
        return self.clustering == "hierarchical"

    def plan_layer(self, stats: LayerStats, keep: int) -> LayerPlan:
        # Sums over the same tokens for every expert: their means would give the same clusters.
        return LayerPlan.merge(self.clusters(stats["all_output_sum"], keep), stats["count"].tolist())

    def clusters(self, points: np.ndarray, number: int) -> list[list[int]]:
        if self.clustering == "kmeans":
            return kmeans_clusters(points, number, self.seed)
        return linkage_clusters(points, number, self.linkage, self.distance)


def linkage_clusters(
    points: np.ndarray, clusters: int, method: str = "average", distance: str = "euclidean"
) -> list[list[int]]:
    """Rows of ``points`` [n, d] in exactly ``clusters`` groups, also where equal heights would make scipy's cut by
    height return fewer. A row of zeros has cosine distance 1 to every other.
    """
    n = len(points)
    members: dict[int, list[int]] = {index: [index] for index in range(n)}
    if clusters < n:
        apart = np.nan_to_num(pdist(points, distance), nan=1.0)  # type: ignore[call-overload]
        for step, (a, b, _, _) in enumerate(linkage(apart, method)[: n - clusters]):  # type: ignore[arg-type]
            members[n + step] = members.pop(int(a)) + members.pop(int(b))
    return list(members.values())


def kmeans_clusters(points: np.ndarray, clusters: int, seed: int) -> list[list[int]]:
    """k-means++ and Lloyd's iterations; a cluster left empty takes the point farthest from its own centre."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", UserWarning)  # an empty cluster: filled below
        centres, labels = kmeans2(points, clusters, iter=100, minit="++", seed=seed, missing="warn")
    for empty in sorted(set(range(clusters)) - set(labels)):
        crowded = np.bincount(labels, minlength=clusters)[labels] > 1
        labels[np.argmax(np.where(crowded, ((points - centres[labels]) ** 2).sum(axis=1), -1))] = empty
    return [np.flatnonzero(labels == label).tolist() for label in range(clusters)]
