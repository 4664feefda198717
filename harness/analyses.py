"""The numbers behind the analyses of "REAP the Experts" (arXiv 2510.13999): from what is on disk, without a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment, linprog
from scipy.spatial.distance import cdist

from harness.errors import StageError
from harness.plan import LayerPlan, Plan
from harness.spec import Row

LARGEST_ASSIGNMENT = 1024  # beyond, the linear program is the faster one
NGRAMS = (2, 3, 4)  # as in the paper


@dataclass(frozen=True)
class Texts:
    """What a model wrote on one task. nll: nats per token of each answer under the original model given its prompt,
    float64 [texts], NaN for an empty answer; None where it is not measured.
    """

    answers: tuple[str, ...]
    nll: np.ndarray | None = None

    @property
    def perplexities(self) -> np.ndarray:
        """exp(nll) of the answers that are not empty."""
        return np.array([]) if self.nll is None else np.exp(self.nll[np.isfinite(self.nll)])

    def diversities(self, n: int) -> np.ndarray:
        """n-gram diversity of the answers that have n words."""
        found = (ngram_diversity(answer, n) for answer in self.answers)
        return np.array([value for value in found if value is not None])

    @property
    def empty(self) -> int:
        return sum(not answer.strip() for answer in self.answers)


@dataclass(frozen=True)
class Analysis:
    """What is on disk about one row; what is not there is empty or None. plan: None for the uncompressed model.

    originals [E, H], slots [S, H]: mean outputs of the experts before and after, by layer. divergence: bits
    [sequences, positions]. distances: [pairs, 2] by layer, as stored and aligned (`harness.examine`). texts: by task.
    """

    row: Row
    plan: Plan | None = None
    originals: Mapping[int, np.ndarray] = field(default_factory=dict)
    slots: Mapping[int, np.ndarray] = field(default_factory=dict)
    divergence: np.ndarray | None = None
    distances: Mapping[int, np.ndarray] = field(default_factory=dict)
    texts: Mapping[str, Texts] = field(default_factory=dict)

    @property
    def merges(self) -> bool:
        return self.plan is not None and not self.plan.only_prunes

    @cached_property
    def distortions(self) -> dict[int, float]:
        """Manifold distortion of each layer whose mean outputs are there."""
        return {layer: manifold_distortion(self.originals[layer], left) for layer, left in self.slots.items()}


@dataclass(frozen=True)
class Subspace:
    """Two principal components. mean [H], axes [2, H] of length 1; explained [2]: their share of the variance."""

    mean: np.ndarray
    axes: np.ndarray
    explained: np.ndarray

    def project(self, points: np.ndarray) -> np.ndarray:
        """Coordinates [N, 2] of points [N, H]."""
        return (points - self.mean) @ self.axes.T


def pca(points: np.ndarray) -> Subspace:
    """The first two principal components of points [N, H], N and H at least 2: of the original experts of one layer
    (Fig. 1). The largest entry of each axis is positive, so that the same points always give the same picture.
    """
    points = np.asarray(points, float)
    mean = points.mean(0)
    _, singular, axes = np.linalg.svd(points - mean, full_matrices=False)
    variance = singular**2
    two = axes[:2]
    signs = np.sign(two[np.arange(2), np.abs(two).argmax(1)])
    return Subspace(mean, two * signs[:, None], variance[:2] / max(variance.sum(), 1e-300))


def angles(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """arccos(cos(f_i, g_j)) / pi, in [0, 1], float64 [E, S] for f [E, H] and g [S, H]; 1/2 where one is zero.

    By way of the lengths of sum and difference of the two directions: exact for equal ones, where arccos is not.
    """
    u, v = _directions(first), _directions(second)
    return 2 / math.pi * np.arctan2(cdist(u, v), cdist(u, -v))


def _directions(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, float)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def manifold_distortion(originals: np.ndarray, left: np.ndarray) -> float:
    """W_1 between the mean outputs of the original experts [E, H] and of those left [S, H], in [0, 1] (eq. 12): what
    the best transport between them costs at the price of `angles`, each set of total weight 1 in even shares.
    """
    cost = angles(originals, left)
    return by_assignment(cost) if math.lcm(*cost.shape) <= LARGEST_ASSIGNMENT else by_linear_program(cost)


def by_assignment(cost: np.ndarray) -> float:
    """Cost of the best transport between even shares, price [E, S]: every point split into so many that both sides have
    the least common multiple of E and S, of which each then goes to one (Birkhoff's theorem).
    """
    many = math.lcm(*cost.shape)
    split = cost.repeat(many // cost.shape[0], axis=0).repeat(many // cost.shape[1], axis=1)
    return float(split[linear_sum_assignment(split)].mean())


def by_linear_program(cost: np.ndarray) -> float:
    """The same for any sizes. Raises StageError if the solver does not end."""
    rows, columns = cost.shape
    leaves = sparse.kron(sparse.eye(rows), np.ones((1, columns)))
    arrives = sparse.kron(np.ones((1, rows)), sparse.eye(columns))
    shares = np.repeat([1 / rows, 1 / columns], [rows, columns])
    both = sparse.vstack([leaves, arrives]).tocsr()
    found = linprog(cost.ravel(), A_eq=both, b_eq=shares, method="highs")  # type: ignore[call-overload]
    if found.status != 0:
        raise StageError(f"Manifold distortion: the linear program was not solved: {found.message}")
    return float(found.fun)


def cluster_sizes(plan: LayerPlan) -> np.ndarray:
    """Old experts behind each slot, int64 [S]: its sources, and those whose router rows lead to it although they have
    no weight in it (they were never chosen).
    """
    members = [{source.expert for source in slot} for slot in plan.slots]
    for expert, slot in enumerate(plan.routes):
        if slot is not None:
            members[slot].add(expert)
    return np.array([len(experts) for experts in members])


def singleton_share(plan: Plan) -> dict[int, float]:
    """The share of each layer's clusters that hold one expert alone (Fig. A7a)."""
    return {layer: float((cluster_sizes(each) == 1).mean()) for layer, each in plan.layers.items()}


def ngram_diversity(text: str, n: int) -> float | None:
    """Different n-grams over n-grams of one text (Fig. 4a), in (0, 1]; None for a text of fewer than n words.

    Words are what whitespace separates, so that models of different tokenizers can be compared.
    """
    words = text.split()
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def windows(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The middles [W] of consecutive windows of positions, and the means in them [sequences, W] of values
    [sequences, P]. W is at most ``most``; windows are as even as P allows.
    """
    parts = np.array_split(np.arange(values.shape[1]), min(most, values.shape[1]))
    return np.array([part.mean() for part in parts]), np.stack([values[:, part].mean(1) for part in parts], axis=1)
