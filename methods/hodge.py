"""Hodge decomposition of merge barriers (Zhong et al., "HodgeCover", arXiv 2605.13997). Pure arrays.

The experts of a layer are the vertices of a simplicial complex, all their pairs its edges, some triples its triangles.
A barrier is a number on every edge and is split into three orthogonal parts:

    b = gradient + curl + harmonic,    gradient in the range of B1^T, curl in the range of B2,  B1 B2 = 0

with B1 [V, E] and B2 [E, T] the boundary maps. An edge has a direction, from the earlier to the later vertex in some
order. A barrier has none, so its parts depend on the order that is chosen to place it on the edges.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from harness.stats import BARRIER_SUMS, LayerStats

SHUFFLES, SEED = 200, 0  # of the controls in `diagnose`
STEPS = 80  # thresholds of `betti_curve`, the paper's


@dataclass(frozen=True, eq=False)
class Complex:
    """``vertices``, all edges between them, and ``triangles`` [T, 3], ascending integers.

    A signal on the edges is an array [E] in the order of `edges`, with the direction from the lower to the higher
    vertex; `directions` turns it to another.
    """

    vertices: int
    triangles: np.ndarray

    @cached_property
    def edges(self) -> np.ndarray:
        """[E, 2], in lexicographic order."""
        return np.stack(np.triu_indices(self.vertices, 1), axis=1)

    def directions(self, order: Iterable[int]) -> np.ndarray:
        """[E]: +1 where ``order`` (all vertices) has the lower vertex of the edge first, else -1. A change of
        directions is a change of signs, so the parts of ``d * b`` times d are those of b under the other directions.
        """
        place = np.argsort(np.fromiter(order, dtype=int))
        return np.where(place[self.edges[:, 0]] < place[self.edges[:, 1]], 1.0, -1.0)

    def on_edges(self, pair: np.ndarray) -> np.ndarray:
        """The entries [E] of a symmetric matrix [V, V]."""
        return pair[self.edges[:, 0], self.edges[:, 1]]

    def square(self, signal: np.ndarray) -> np.ndarray:
        """The symmetric matrix [V, V] of an edge signal [E], its diagonal 0."""
        matrix = np.zeros((self.vertices, self.vertices))
        matrix[self.edges[:, 0], self.edges[:, 1]] = signal
        return matrix + matrix.T

    def gradient(self, signal: np.ndarray) -> np.ndarray:
        """B1^T (B1 B1^T)^+ B1 s. On the complete graph the pseudo-inverse is 1/V on what B1 gives."""
        low, high = self.edges.T
        flow = np.bincount(high, signal, self.vertices) - np.bincount(low, signal, self.vertices)
        return (flow[high] - flow[low]) / self.vertices

    def curl(self, signal: np.ndarray) -> np.ndarray:
        """B2 (B2^T B2)^+ B2^T s."""
        rows, boundary, inverse = self._rotation
        found = np.zeros(len(self.edges))
        found[rows] = boundary @ (inverse @ (boundary.T @ signal[rows]))
        return found

    @cached_property
    def _rotation(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which edges bound a triangle [U], their rows of B2 [U, T], and (B2^T B2)^+ [T, T]."""
        used, boundary = bounded(self.triangles)
        low, high = used.T
        rows = low * self.vertices - low * (low + 1) // 2 + high - low - 1  # places among all edges
        return rows, boundary, np.linalg.pinv(boundary.T @ boundary, rcond=1e-10, hermitian=True)

    def split(self, signal: np.ndarray) -> Parts:
        gradient = self.gradient(signal)
        curl = self.curl(signal - gradient)
        return Parts(gradient, curl, signal - gradient - curl)


@dataclass(frozen=True, eq=False)
class Parts:
    """The three components [E] of an edge signal. They are orthogonal and add up to it."""

    gradient: np.ndarray
    curl: np.ndarray
    harmonic: np.ndarray


def edge_boundary(vertices: int, edges: np.ndarray) -> np.ndarray:
    """B1 [V, E]: the boundary of the edge (i, j), i < j, is j - i."""
    boundary = np.zeros((vertices, len(edges)))
    number = np.arange(len(edges))
    boundary[edges[:, 0], number], boundary[edges[:, 1], number] = -1, 1
    return boundary


def triangle_boundary(edges: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """B2 [E, T]: the boundary of the triangle (i, j, k), i < j < k, is (j, k) - (i, k) + (i, j)."""
    place = {(int(i), int(j)): row for row, (i, j) in enumerate(edges)}
    boundary = np.zeros((len(edges), len(triangles)))
    for column, (i, j, k) in enumerate(triangles.tolist()):
        for edge, sign in (((j, k), 1), ((i, k), -1), ((i, j), 1)):
            boundary[place[edge], column] = sign
    return boundary


def bounded(triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edges [U, 2] that bound some triangle, and their rows of B2 [U, T]."""
    sides = np.concatenate([triangles[:, [0, 1]], triangles[:, [0, 2]], triangles[:, [1, 2]]])
    used = np.unique(sides, axis=0).reshape(-1, 2)
    return used, triangle_boundary(used, triangles)


def betti(vertices: int, edges: np.ndarray, triangles: np.ndarray) -> int:
    """The number of independent holes that triangles do not fill: beta_1 = E - rank B1 - rank B2. Real coefficients."""
    adjacency = np.zeros((vertices, vertices))
    adjacency[edges[:, 0], edges[:, 1]] = adjacency[edges[:, 1], edges[:, 0]] = 1
    return len(edges) - _rank(np.diag(adjacency.sum(axis=1)) - adjacency) - _rank(_gram(triangles))


def _gram(triangles: np.ndarray) -> np.ndarray:
    boundary = bounded(triangles)[1]
    return boundary.T @ boundary


def _rank(gram: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(gram, hermitian=True)) if gram.size else 0


def betti_curve(barriers: Barriers) -> tuple[np.ndarray, np.ndarray, int]:
    """The paper's sweep: thresholds [80] from 0 to 1.1 times the largest barrier, beta_1 [80] of the complex of edges
    and triangles whose barriers are no higher (a triangle only with its three edges), and the place of the highest,
    of equal ones that with most edges. A report: on every layer of the paper everything was in.
    """
    edges, edge_barrier = barriers.space.edges, barriers.edge_barrier
    thresholds = np.linspace(0, 1.1 * edge_barrier.max(initial=0), STEPS)
    needed = np.maximum(barriers.triple, barriers.highest_side)
    found, known = [], {}
    for threshold in thresholds:
        low, filled = edge_barrier <= threshold, needed <= threshold
        key = int(low.sum()), int(filled.sum())
        if key not in known:
            known[key] = betti(barriers.space.vertices, edges[low], barriers.space.triangles[filled])
        found.append((known[key], key[0]))
    return thresholds, np.array([holes for holes, _ in found]), max(range(STEPS), key=found.__getitem__)


@dataclass(frozen=True, eq=False)
class Barriers:
    """The barriers of one layer, its experts renamed: vertex v is the expert ``order[v]``. pair [V, V], triple [T].

    What is computed from them does not depend on how experts were numbered, if the order does not.
    """

    order: np.ndarray
    space: Complex
    pair: np.ndarray
    triple: np.ndarray

    @classmethod
    def read(cls, stats: LayerStats, mode: str, order: np.ndarray) -> Barriers:
        """Those of `harness.barriers` in this mode."""
        pair, triangles, triple = (stats[name] for name in barrier_sums(mode))
        vertex = np.argsort(order)
        renamed = np.sort(vertex[triangles.astype(int)].reshape(-1, 3), axis=1)
        listed = np.lexsort(renamed.T[::-1])
        return cls(order, Complex(len(order), renamed[listed]), pair[np.ix_(order, order)], triple[listed])

    @cached_property
    def edge_barrier(self) -> np.ndarray:
        return self.space.on_edges(self.pair)

    @cached_property
    def highest_side(self) -> np.ndarray:
        """[T]: the largest pair barrier within each triangle."""
        i, j, k = self.space.triangles.T
        return np.maximum(np.maximum(self.pair[i, j], self.pair[i, k]), self.pair[j, k])


def barrier_sums(mode: str) -> tuple[str, ...]:
    """Names of the three statistics, in the order of `harness.stats.BARRIER_SUMS`."""
    return tuple(f"{name}.{mode}" for name in BARRIER_SUMS)


def expert_order(pair: np.ndarray, *scores: np.ndarray) -> np.ndarray:
    """All experts, the highest first by the first score [E], of equal ones by the next, then by the sum of their
    barriers; only of experts that none of these tells apart does the lowest index come first.
    """
    sums = np.sort(pair, axis=1).sum(axis=1)  # sorted, so that the sum does not depend on the numbering
    return np.lexsort([-score for score in (*scores, sums)][::-1])


def share(part: np.ndarray, signal: np.ndarray) -> float:
    """||part||^2 / ||signal||^2, and 0 for a signal of zeros."""
    whole = float(signal @ signal)
    return float(part @ part) / whole if whole > 0 else 0.0


def harmonic_share(space: Complex, signal: np.ndarray) -> float:
    """rho_harm = ||harmonic||^2 / ||signal||^2."""
    return share(space.split(signal).harmonic, signal)


def hard_triangles(barriers: Barriers) -> float:
    """delta: the share of triangles whose barrier is above 1.2 times the largest of their edges' (0 without any)."""
    return float((barriers.triple > 1.2 * barriers.highest_side).mean()) if len(barriers.triple) else 0.0


def additive_fit(pair: np.ndarray) -> np.ndarray:
    """u [V] that minimises the sum over pairs of (b_ij - u_i - u_j)^2, V > 2: what a score per expert can explain."""
    experts, sums = len(pair), pair.sum(axis=1)
    return (sums - sums.sum() / (2 * (experts - 1))) / (experts - 2)


def additive_explained(barriers: Barriers) -> float:
    """R^2 of the additive fit; 1 if it leaves nothing, as for a constant barrier."""
    low, high = barriers.space.edges.T
    fit = additive_fit(barriers.pair)
    rest, spread = barriers.edge_barrier - fit[low] - fit[high], barriers.edge_barrier - barriers.edge_barrier.mean()
    left, all_of_it = float(rest @ rest), float(spread @ spread)
    negligible = 1e-24 * float(barriers.edge_barrier @ barriers.edge_barrier)
    return 1.0 if left <= negligible else 1 - left / all_of_it


def retained_mass(component: np.ndarray, simplices: np.ndarray, kept: Iterable[int]) -> float:
    """The share of sum |component| that lies on edges or triangles [N, 2 or 3] with a kept vertex; 1 if it is all 0.

    For any method's kept set, numbered as the simplices are.
    """
    size = np.abs(component)
    touched = np.isin(simplices, list(kept)).any(axis=1)
    return float(size[touched].sum() / size.sum()) if size.sum() > 0 else 1.0


def diagnose(barriers: Barriers) -> dict[str, float]:
    """The paper's diagnostics of a layer, and three controls beside them, without which they say little: barriers that
    are noise have a harmonic share of about one half, too.

    ``shuffled_above``: share of 200 shuffles of the barriers over the edges whose harmonic share is above that found.
    ``relabelled_low``, ``relabelled_high``: the harmonic share over as many random orders of the experts.
    ``additive``: R^2 of b_ij = u_i + u_j.
    """
    rng, space, signal = np.random.default_rng(SEED), barriers.space, barriers.edge_barrier
    parts, found = space.split(signal), harmonic_share(space, signal)
    shuffled = [harmonic_share(space, rng.permutation(signal)) for _ in range(SHUFFLES)]
    orders = (rng.permutation(space.vertices) for _ in range(SHUFFLES))
    relabelled = [harmonic_share(space, space.directions(order) * signal) for order in orders]
    return {
        "harmonic": found,
        "curl": share(parts.curl, signal),
        "hard_triangles": hard_triangles(barriers),
        "betti": float(betti(space.vertices, space.edges, space.triangles)),
        "shuffled_above": float(np.mean(np.array(shuffled) > found)),
        "relabelled_low": min(relabelled),
        "relabelled_high": max(relabelled),
        "additive": additive_explained(barriers),
    }
