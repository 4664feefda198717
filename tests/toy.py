"""Toy MoE layers of plain arrays, token by token: what statistics, scores and errors are checked against."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness.plan import LayerPlan
from harness.search import Kept
from harness.stats import BARRIER_MODES, BARRIERS, EXTRAS, ROUTED, WEIGHTS, LayerStats, Stats

TOP_K = 3


@dataclass(frozen=True)
class ToyLayer:
    """logits [T, E], outputs [T, E, H] (f_j of every token), residual [T, H], weights [E, m].

    Gates are the softmax over the top-k.
    """

    logits: np.ndarray
    outputs: np.ndarray
    residual: np.ndarray
    weights: np.ndarray

    @cached_property
    def chosen(self) -> np.ndarray:
        """[T, k] experts of each token."""
        return np.argsort(-self.logits, axis=1)[:, :TOP_K]

    @cached_property
    def gates(self) -> np.ndarray:
        """[T, E], 0 for experts that were not chosen."""
        gates = np.zeros_like(self.logits)
        for token, experts in enumerate(self.chosen):
            exponentials = np.exp(self.logits[token, experts])
            gates[token, experts] = exponentials / exponentials.sum()
        return gates

    @cached_property
    def gated(self) -> np.ndarray:
        """[T, E, H], g_j f_j."""
        return self.gates[:, :, None] * self.outputs

    @property
    def experts(self) -> int:
        return self.logits.shape[1]

    def renamed(self, order: np.ndarray) -> ToyLayer:
        """The layer whose expert ``order[j]`` is now called j."""
        return ToyLayer(self.logits[:, order], self.outputs[:, order], self.residual, self.weights[order])

    def stats(self) -> LayerStats:
        on = (self.gates > 0).astype(float)
        norm = np.linalg.norm(self.outputs, axis=2) * on
        gated = self.gates[:, :, None] * self.outputs
        after = self.residual + gated.sum(axis=1)
        cosine = (self.residual * after).sum(1) / np.linalg.norm(self.residual, axis=1) / np.linalg.norm(after, axis=1)
        softmax = np.exp(self.logits) / np.exp(self.logits).sum(axis=1, keepdims=True)
        strength = self.gates * norm
        sums = {
            "count": on.sum(0),
            "gate": self.gates.sum(0),
            "norm": norm.sum(0),
            "norm_sq": (norm**2).sum(0),
            "gate_norm": strength.sum(0),
            "gate_sq_norm": (self.gates * strength).sum(0),
            "gate_sq_norm_sq": (strength**2).sum(0),
            "output_max": (np.abs(self.outputs).max(axis=2) * on).max(0),
            "gate_norm_turn": (strength * np.maximum(0, 1 - cosine)[:, None]).sum(0),
            "logit_sum": self.logits.sum(0),
            "logit_gram": self.logits.T @ self.logits,
            "coactivation": on.T @ on,
            "gated_norm_gram": strength.T @ strength,
            "gated_output_gram": np.einsum("tih,tjh->ij", gated, gated),
            "all_output_sum": self.outputs.sum(0),
            "all_gated_output_sum": (softmax[:, :, None] * self.outputs).sum(0),
            "weight_count": np.full(self.experts, float(self.weights.shape[1])),
            "weight_abs": np.abs(self.weights).sum(1),
            "weight_sq": (self.weights**2).sum(1),
            **self.barriers(),
        }
        assert set(sums) == {*ROUTED, *EXTRAS, *WEIGHTS, *BARRIERS}, "plant every statistic there is"
        return LayerStats(self.experts, len(self.logits), sums)

    def barriers(self) -> dict[str, np.ndarray]:
        """By how much merging two or three experts changes the output (mean square); the same for every mode."""
        count = (self.gates > 0).sum(0).astype(float)
        share = count[:, None] / np.maximum(count[:, None] + count, 1)  # of i in the pair i, j
        gate = self.gates[:, None, :] * share - self.gates[:, :, None] * share.T
        square = (self.outputs**2).sum(2)
        apart = square[:, :, None] + square[:, None, :] - 2 * self.outputs @ self.outputs.transpose(0, 2, 1)
        pair = (gate**2 * np.maximum(apart, 0)).mean(0)
        edges = pair[np.triu_indices(self.experts, 1)]
        low = pair <= np.quantile(edges, 0.3)  # few triangles are enough, and quick
        possible = itertools.combinations(range(self.experts), 3) if self.experts < 20 else ()  # of more, too many
        triangles = [t for t in possible if low[np.ix_(t, t)].all()]
        triples = np.array([self._barrier(list(triangle)) for triangle in triangles])
        found = {
            "pair_barrier": pair,
            "triangles": np.array(triangles, float).reshape(-1, 3),
            "triple_barrier": triples,
        }
        return {f"{name}.{mode}": value.copy() for name, value in found.items() for mode in BARRIER_MODES}

    def _barrier(self, group: list[int]) -> float:
        share = (self.gates[:, group] > 0).sum(0) / max(1, (self.gates[:, group] > 0).sum())
        merged = np.einsum("e,teh->th", share, self.outputs[:, group])
        change = (self.gates[:, group, None] * (merged[:, None] - self.outputs[:, group])).sum(1)
        return float((change**2).sum() / len(self.logits))

    def output(self, plan: LayerPlan) -> np.ndarray:
        """The layer's output [T, H] under a plan, tokens routed anew; a merged expert says the mean of its sources."""
        rows = list(plan.kept_rows)
        said = np.stack([_said(self.outputs, plan, row) for row in rows], axis=1)
        return _gated(replace(self, logits=self.logits[:, rows], outputs=said))

    def error(self, plan: LayerPlan) -> float:
        before = _gated(self)
        return float(((self.output(plan) - before) ** 2).sum() / (before**2).sum())


def _said(outputs: np.ndarray, plan: LayerPlan, row: int) -> np.ndarray:
    sources = plan.slots[plan.routes[row]]  # type: ignore[index]
    return sum(source.weight * outputs[:, source.expert] for source in sources)  # type: ignore[return-value]


def _gated(layer: ToyLayer) -> np.ndarray:
    return (layer.gates[:, :, None] * layer.outputs).sum(axis=1)


def toy_layer(rng: np.random.Generator, experts: int = 12, tokens: int = 160, hidden: int = 20) -> ToyLayer:
    """Experts of different popularity, strength and direction, each chosen by some token."""
    size = rng.uniform(0.5, 3, experts)[None, :, None]
    direction = rng.normal(size=(1, experts, hidden))
    logits = rng.normal(size=(tokens, experts)) @ rng.normal(size=(experts, experts)) / 2 + rng.normal(size=experts)
    logits[np.arange(experts), np.arange(experts)] += 20
    return ToyLayer(
        logits=logits,
        outputs=size * (rng.normal(size=(tokens, experts, hidden)) + direction),
        residual=rng.normal(size=(tokens, hidden)),
        weights=rng.standard_t(5, size=(experts, 200)) * rng.uniform(0.5, 2, experts)[:, None],
    )


def stats_of(layers: dict[int, ToyLayer]) -> Stats:
    def error(index: int, plan: LayerPlan) -> float:
        return layers[index].error(plan)

    found = {index: layer.stats() for index, layer in layers.items()}
    return Stats(found, error=error, search=lambda sequences: ToySearch(layers))


@dataclass
class ToySearch:
    """`harness.search.Search` of toy layers side by side: what a plan loses is the sum of the layers' errors."""

    layers: Mapping[int, ToyLayer]
    top_k: int = 1
    batches: int = 1

    @property
    def experts(self) -> dict[int, int]:
        return {index: layer.experts for index, layer in self.layers.items()}

    def divergence(self, kept: Kept) -> float:
        plans = {index: LayerPlan.prune(kept[index], layer.experts) for index, layer in self.layers.items()}
        return sum(layer.error(plans[index]) for index, layer in self.layers.items())

    def acceptance(self, kept: Kept) -> float:
        return float(np.exp(-self.divergence(kept)))

    def gradient(self, survival: Mapping[int, np.ndarray], batch: int) -> tuple[float, dict[int, np.ndarray]]:
        """Of || sum_i (1 - s_i) g_i f_i ||^2 / || Y ||^2, routing frozen."""
        loss, found = 0.0, {}
        for index, layer in self.layers.items():
            gated = layer.gated
            missing = np.einsum("e,teh->th", 1 - survival[index], gated)
            size = (gated.sum(1) ** 2).sum()
            loss += float((missing**2).sum() / size)
            found[index] = -2 * np.einsum("teh,th->e", gated, missing) / size
        return loss, found

    def recall(self) -> dict[str, object] | None:
        return None

    def remember(self, state: Mapping[str, object]) -> None:
        """Nobody resumes a toy."""

    def note(self, **facts: object) -> None:
        """Nor reads of it."""


def toy_layers(seed: int, experts: int = 12, layers: int = 3) -> dict[int, ToyLayer]:
    return {layer: toy_layer(np.random.default_rng([seed, layer]), experts) for layer in range(layers)}


def random_stats(seed: int, experts: int = 12, layers: int = 3) -> Stats:
    return stats_of(toy_layers(seed, experts, layers))
