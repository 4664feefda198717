"""HodgeCover, expert selection by covering what no potential explains (Zhong et al., arXiv 2605.13997)."""

from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np

from harness.plan import LayerPlan, Source
from harness.stats import BARRIER_MODES, LayerStats
from methods import LayerMethod, mean_over, one_of, within
from methods.hodge import Barriers, barrier_sums, expert_order
from methods.reap import REAP

ORIENTATIONS, SEED = 32, 0  # random directions that orientation=mean averages over
ZERO = 1e-12  # of the largest barrier: what is smaller is rounding


@dataclass(frozen=True)
class HodgeCover(LayerMethod):
    """The experts that stay are strong ones that together touch the pairs and triples that are hardest to merge.

    With b_ij and b_ijk how much the layer changes when a pair or triple of experts is merged (`harness.barriers`), b is
    placed on the edges of the complete graph and split into gradient, curl and harmonic part (`methods.hodge`). E* are
    the ``edge_share`` of all edges with the largest |harmonic part|, T* the ``triangle_share`` of all triangles with
    the largest barrier. Experts are added one by one, each the one with the largest gain in

        Phi(S) = sum over i in S of sal(i) + edge_weight |E*(S)| / |E*| + triangle_weight |T*(S)| / |T*|

    with sal REAP's score, normalised per layer, and E*(S), T*(S) those with an end in S. Phi is monotone and
    submodular: greedy is within 1 - 1/e of the best. A dropped i leads to the j in S with the least
    b_ij (1 + redirect_penalty |h_ij| / scale), h the harmonic part.

    Options: ``mode``, how barriers are measured. ``orientation``, which end of an edge is its first: that of the lower
    index (the paper's), that of the higher REAP score, or the mean of |h| over 32 random choices. ``sal_norm`` max,
    minmax or sum. ``redirect`` drop (the router rows of dropped experts are removed, and where they lead is not used)
    or replicate (their rows stay, and lead to copies of the expert that stands in: no smaller on disk, a probe of
    quality). ``redirect_norm``, the scale: l2 (||b||, the paper's formula) or max (max |h|, its text). The shares 0.2,
    the weights 1 and 0.5 and the penalty 3 are the paper's.

    Source: arXiv 2605.13997; no code was released.

    Where we differ: the paper's harmonic part depends on how the experts happen to be numbered (index); our default is
    saliency, which does not. It says neither where the divergence is taken, nor how REAP's score is normalised, nor how
    a redirect is carried out. Edges and triangles without any harmonic part or barrier are never in E* or T*. Scaled
    to a maximum of 1, REAP's scores outweigh the coverage (a first expert covers 2 / E of E* on average), so plans
    differ little from REAP's; with ``sal_norm=sum`` they do.
    """

    mode: str
    orientation: str
    sal_norm: str
    redirect: str
    redirect_norm: str
    edge_share: float
    triangle_share: float
    edge_weight: float
    triangle_weight: float
    redirect_penalty: float

    def __post_init__(self) -> None:
        one_of("mode", self.mode, BARRIER_MODES)
        one_of("orientation", self.orientation, ("index", "saliency", "mean"))
        one_of("sal_norm", self.sal_norm, ("max", "minmax", "sum"))
        one_of("redirect", self.redirect, ("drop", "replicate"))
        one_of("redirect_norm", self.redirect_norm, ("l2", "max"))
        within("edge_share", self.edge_share, 0, 1)
        within("triangle_share", self.triangle_share, 0, 1)
        for name in ("edge_weight", "triangle_weight", "redirect_penalty"):
            within(name, getattr(self, name), 0, float("inf"))

    @property
    def nested(self) -> bool:  # type: ignore[override]
        return self.redirect == "drop"  # one greedy order at every ratio; where the dropped ones lead may change

    @property
    def needs(self) -> frozenset[str]:
        return REAP().needs | {"count", *barrier_sums(self.mode)}

    def plan_layer(self, stats: LayerStats, keep: int) -> LayerPlan:
        barriers = by_saliency(stats, self.mode)
        harmonic = np.abs(self.harmonic(barriers))
        kept = self.cover(stats, barriers, harmonic).greedy(keep)
        if self.redirect == "drop":
            return LayerPlan.prune(barriers.order[kept], stats.experts)
        return _redirected(barriers.order, kept, self._stand_ins(barriers, harmonic, kept))

    def harmonic(self, barriers: Barriers) -> np.ndarray:
        """[E*(E-1)/2]: the harmonic part of the barrier on each edge; its size only for orientation=mean."""
        space, signal = barriers.space, barriers.edge_barrier
        if self.orientation == "mean":
            rng = np.random.default_rng(SEED)
            ways = [space.directions(rng.permutation(space.vertices)) for _ in range(ORIENTATIONS)]
            return np.mean([np.abs(space.split(way * signal).harmonic) for way in ways], axis=0)
        if self.orientation == "index":
            signal = signal * space.directions(np.argsort(barriers.order))
        return space.split(signal).harmonic

    def cover(self, stats: LayerStats, barriers: Barriers, harmonic: np.ndarray) -> "Cover":
        """The objective; experts and simplices numbered as in ``barriers``, |harmonic part| [E*(E-1)/2]."""
        space = barriers.space
        floor = ZERO * barriers.pair.max(initial=0)
        return Cover(
            saliency=normalised(REAP().score(stats)[barriers.order], self.sal_norm),
            edges=space.edges[_largest(self.edge_share, harmonic, floor)],
            triangles=space.triangles[_largest(self.triangle_share, barriers.triple, floor)],
            edge_weight=self.edge_weight,
            triangle_weight=self.triangle_weight,
        )

    def _stand_ins(self, barriers: Barriers, harmonic: np.ndarray, kept: list[int]) -> np.ndarray:
        """[E]: the kept vertex that each vertex leads to, itself if it is kept."""
        signal = barriers.edge_barrier
        scale = np.linalg.norm(signal) if self.redirect_norm == "l2" else harmonic.max(initial=0)
        cost = barriers.pair * (1 + self.redirect_penalty * barriers.space.square(harmonic) / max(float(scale), 1e-12))
        cost = (cost / max(float(cost.max(initial=0)), 1e-300)).round(12)  # so that twins stay twins
        survivors = np.sort(kept)
        found = survivors[np.argmin(cost[:, survivors], axis=1)]
        found[survivors] = survivors
        return found


@dataclass(frozen=True, eq=False)
class Cover:
    """Phi. saliency [E]; edges [N, 2] and triangles [M, 3]: E* and T*, vertices in the order that decides ties."""

    saliency: np.ndarray
    edges: np.ndarray
    triangles: np.ndarray
    edge_weight: float
    triangle_weight: float

    @cached_property
    def _sides(self) -> list[tuple[float, np.ndarray]]:
        """(value of one simplex, incidence [E, N]) of the edges and of the triangles."""
        weighted = ((self.edge_weight, self.edges), (self.triangle_weight, self.triangles))
        return [(weight / max(len(s), 1), _incidence(len(self.saliency), s)) for weight, s in weighted]

    def value(self, kept: list[int]) -> float:
        """Phi of a set."""
        covered = (value * float(incidence[kept].any(axis=0).sum()) for value, incidence in self._sides)
        return float(self.saliency[kept].sum()) + sum(covered)

    def greedy(self, keep: int) -> list[int]:
        """The vertices in the order in which they are added, ``keep`` of them."""
        kept: list[int] = []
        uncovered = [np.ones(incidence.shape[1]) for _, incidence in self._sides]
        while len(kept) < keep:
            gain = self.saliency.copy()
            for (value, incidence), left in zip(self._sides, uncovered, strict=True):
                gain += value * (incidence @ left)
            gain[kept] = -np.inf
            kept.append(int(np.argmax(gain.round(12))))
            for (_, incidence), left in zip(self._sides, uncovered, strict=True):
                left[incidence[kept[-1]] > 0] = 0
        return kept


def by_saliency(stats: LayerStats, mode: str) -> Barriers:
    """The barriers of a layer, its experts in the order of REAP's score."""
    pair = stats[barrier_sums(mode)[0]]
    return Barriers.read(stats, mode, expert_order(pair, REAP().score(stats), stats["count"]))


def normalised(score: np.ndarray, how: str) -> np.ndarray:
    """A score [E]: divided by its ``max`` or ``sum``, or ``minmax``: shifted and scaled to [0, 1]. Zeros stay zeros."""
    low = score.min() if how == "minmax" else 0.0
    whole = np.sort(score).sum() if how == "sum" else score.max() - low
    return mean_over(score - low, np.full_like(score, whole))


def _largest(part: float, size: np.ndarray, floor: float) -> np.ndarray:
    """The ceil(part * N) places with the largest size [N], equal ones by place; none that is not above the floor."""
    rounded = (size / floor).round(3) if floor > 0 else np.zeros_like(size)  # twins stay twins
    chosen = np.argsort(-rounded, kind="stable")[: ceil(part * len(size) - 1e-9)]
    return chosen[rounded[chosen] > 1]


def _incidence(vertices: int, simplices: np.ndarray) -> np.ndarray:
    """[V, N]: 1 where the vertex is one of the simplex."""
    incidence = np.zeros((vertices, len(simplices)))
    incidence[simplices.T, np.arange(len(simplices))] = 1
    return incidence


def _redirected(order: np.ndarray, kept: list[int], stand_ins: np.ndarray) -> LayerPlan:
    """Every kept expert a slot; each router row leads to its expert's stand-in."""
    slots = sorted(int(expert) for expert in order[kept])
    slot_of = {expert: slot for slot, expert in enumerate(slots)}
    leads = {int(order[vertex]): slot_of[int(order[stand])] for vertex, stand in enumerate(stand_ins)}
    return LayerPlan(
        slots=tuple((Source(expert),) for expert in slots),
        routes=tuple(leads[expert] for expert in range(len(order))),
    )
