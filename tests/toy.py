"""Toy MoE layers of plain arrays, token by token: what statistics, scores and errors are checked against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness.plan import LayerPlan
from harness.stats import EXTRAS, ROUTED, WEIGHTS, LayerStats, Stats

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
        }
        assert set(sums) == {*ROUTED, *EXTRAS, *WEIGHTS}, "plant every statistic there is"
        return LayerStats(self.experts, len(self.logits), sums)

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

    return Stats({index: layer.stats() for index, layer in layers.items()}, error=error)


def toy_layers(seed: int, experts: int = 12, layers: int = 3) -> dict[int, ToyLayer]:
    return {layer: toy_layer(np.random.default_rng([seed, layer]), experts) for layer in range(layers)}


def random_stats(seed: int, experts: int = 12, layers: int = 3) -> Stats:
    return stats_of(toy_layers(seed, experts, layers))
