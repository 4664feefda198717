"""RCO, which experts go and how many of each layer, by descent on the budget's surface (arXiv 2605.00649)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from harness.errors import UserError
from harness.plan import LayerPlan
from harness.search import BATCH, Kept, Search
from harness.stats import Stats
from methods.budget_surface import Adam, Blocks, BudgetSurface, capped_top, retract, softmax
from methods.reap import REAP


class Choices(Protocol):
    """One option for each of G groups at an exact total cost, and what a choice leaves of the experts.

    ``blocks``: the budgets and the groups they are for. ``start``: logits [G, K] on their surfaces.
    """

    @property
    def blocks(self) -> Blocks: ...

    @property
    def start(self) -> np.ndarray: ...

    def best(self, values: np.ndarray) -> np.ndarray:
        """Option of each group, [G] int, with the largest sum of values [G, K] among those that meet the budgets."""

    def survival(self, choice: np.ndarray) -> dict[int, np.ndarray]:
        """1.0 for every expert that the choice keeps and 0.0 for the others, [E] per layer."""

    def slopes(self, by_survival: Mapping[int, np.ndarray]) -> np.ndarray:
        """Derivative of the loss by each option's probability, [G, K], from that by each expert's survival."""


@dataclass(frozen=True)
class Candidate:
    """The plan of a point: its survivors, after how many steps it was read off, and what deploying it loses (nats)."""

    kept: Mapping[int, list[int]]
    step: int
    deployed_kl: float

    def to_json(self) -> dict[str, Any]:
        kept = {str(layer): list(experts) for layer, experts in self.kept.items()}
        return {"kept": kept, "step": self.step, "deployed_kl": self.deployed_kl}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Candidate:
        kept = {int(layer): list(experts) for layer, experts in state["kept"].items()}
        return cls(kept, int(state["step"]), float(state["deployed_kl"]))


@dataclass(frozen=True)
class Progress:
    """All that the rest of a search depends on: the point, the noise to come, and the plans that matter so far."""

    adam: Adam
    rng: Mapping[str, Any]
    start: Candidate
    best: Candidate
    last: Candidate

    def to_json(self) -> dict[str, Any]:
        return {
            "rng": dict(self.rng),
            **{item.name: getattr(self, item.name).to_json() for item in fields(self) if item.name != "rng"},
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Progress:
        plans = {name: Candidate.from_json(state[name]) for name in ("start", "best", "last")}
        return cls(Adam.from_json(state["adam"]), state["rng"], **plans)


@dataclass(frozen=True)
class Descent:
    """Gradient descent over `Choices`: what `RCO` and the allocation `rco_counts` have in common."""

    seed: int
    sequences: int
    steps: int
    lr: float
    tau_start: float
    tau_end: float
    samples: int
    check_every: int

    def __post_init__(self) -> None:
        for name in ("sequences", "steps", "samples", "check_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is less than 1.")
        if not self.lr > 0:
            raise UserError(f"lr={self.lr} is not above 0.")
        if not self.tau_start >= self.tau_end > 0:
            raise UserError(f"tau_start={self.tau_start} and tau_end={self.tau_end}: start >= end > 0 is needed.")

    def descend(self, search: Search, choices: Choices, uniform: Kept) -> Mapping[int, list[int]]:
        """The survivors of each layer. An interrupted search goes on after its last whole step.

        Notes what the choice loses in the search and deployed (KL, nats per token), and beside it the plan
        ``uniform``, the plan of the starting point and that of the last one.
        """
        state = search.recall()
        now = Progress.from_json(state) if state else self._begin(search, choices)
        while now.adam.steps < self.steps:
            now = self._advance(now, search, choices)
            search.remember(now.to_json())
        search.note(
            search_kl=search_kl(search, now.best.kept),
            deployed_kl=now.best.deployed_kl,
            uniform_deployed_kl=search.divergence(uniform),
            start_deployed_kl=now.start.deployed_kl,
            last_deployed_kl=now.last.deployed_kl,
            chosen_step=now.best.step,
            budget=sum(search.experts[layer] - len(kept) for layer, kept in now.best.kept.items()),
            counts={str(layer): len(kept) for layer, kept in now.best.kept.items()},
        )
        return now.best.kept

    @property
    def searched_sequences(self) -> int:
        """Sequences through the model, about: a backward pass counts as two more."""
        return 3 * BATCH * self.samples * self.steps + self.sequences * (self.steps // self.check_every + 4)

    def temperature(self, step: int) -> float:
        """From ``tau_start`` at step 0 to ``tau_end`` at the last one, exponentially."""
        return float(self.tau_start * (self.tau_end / self.tau_start) ** (step / max(self.steps - 1, 1)))

    def _begin(self, search: Search, choices: Choices) -> Progress:
        start = self._candidate(choices.start, 0, search, choices)
        rng = np.random.default_rng(self.seed).bit_generator.state
        return Progress(Adam.at(choices.start), rng, start, start, start)

    def _advance(self, now: Progress, search: Search, choices: Choices) -> Progress:
        rng = np.random.default_rng()
        rng.bit_generator.state = now.rng
        gradient = self._gradient(now.adam, search, choices, rng)
        adam = now.adam.step(gradient, self.lr, choices.blocks)
        now = replace(now, adam=adam, rng=rng.bit_generator.state)
        if adam.steps % self.check_every and adam.steps < self.steps:
            return now
        last = self._candidate(adam.alpha, adam.steps, search, choices, now.last)
        return replace(now, last=last, best=min(now.best, last, key=lambda plan: plan.deployed_kl))

    def _gradient(self, adam: Adam, search: Search, choices: Choices, rng: np.random.Generator) -> np.ndarray:
        tau = self.temperature(adam.steps)
        total = np.zeros_like(adam.alpha)
        for noise, batch in self._draws(rng, adam.alpha.shape, search.batches):
            perturbed = (adam.alpha + noise) / tau
            _, by_survival = search.gradient(choices.survival(choices.best(perturbed)), batch)
            total += straight_through(choices.slopes(by_survival), perturbed, tau)
        return total / self.samples

    def _draws(
        self, rng: np.random.Generator, shape: tuple[int, ...], batches: int
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Noise and batch of each sample: the two of a pair have opposite noise on the same batch."""
        for start in range(0, self.samples, 2):
            batch = int(rng.integers(batches))
            for noise in antithetic_gumbel(rng, shape)[: self.samples - start]:
                yield noise, batch

    def _candidate(
        self, alpha: np.ndarray, step: int, search: Search, choices: Choices, before: Candidate | None = None
    ) -> Candidate:
        """The plan of a point, no noise added; measured unless it is that of the check before."""
        survival = choices.survival(choices.best(alpha))
        kept = {layer: np.flatnonzero(survives).tolist() for layer, survives in survival.items()}
        if before is not None and before.kept == kept:
            return replace(before, step=step)
        return Candidate(kept, step, float(search.divergence(kept)))


def search_kl(search: Search, kept: Kept) -> float:
    """The search's own loss of a plan, over all batches: gates of the removed experts set to 0, no token routed anew.
    It is not what deployment loses; both are recorded.
    """
    survival = {layer: np.isin(np.arange(count), kept[layer]).astype(float) for layer, count in search.experts.items()}
    return float(np.mean([search.gradient(survival, batch)[0] for batch in range(search.batches)]))


def antithetic_gumbel(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of Gumbel noise that vary against each other: of u and of 1 - u. With two options only their
    difference matters, which is logistic and symmetric, so there the second is the first turned round.
    """
    u = rng.random(shape).clip(1e-12, 1 - 1e-12)
    noise = -np.log(-np.log(u))
    return noise, -noise if shape[-1] == 2 else -np.log(-np.log(1 - u))


def straight_through(slopes: np.ndarray, perturbed: np.ndarray, tau: float) -> np.ndarray:
    """dLoss/dalpha [G, K] where the hard choice is taken to move as p = softmax(perturbed), perturbed = (alpha +
    noise) / tau: p_k (slope_k - <p, slope>) / tau. Two options, keep and prune, of slopes d and 0: +-d p_keep p_prune /
    tau.
    """
    p = softmax(perturbed)
    return p * (slopes - (p * slopes).sum(axis=1, keepdims=True)) / tau


@dataclass(frozen=True)
class Pruning:
    """Every expert of the layers listed is a group of its own: option 0 keeps it, option 1 prunes it at a cost of 1.

    experts, capacity: of each layer, how many there are and how many can go. importance: [E] per listed layer, in
    [0, 1]. budgets: how many go of which listed layers together; layers in the same order.
    """

    experts: Mapping[int, int]
    capacity: Mapping[int, int]
    importance: Mapping[int, np.ndarray]
    budgets: tuple[tuple[tuple[int, ...], int], ...]
    spread: float

    @cached_property
    def layer(self) -> np.ndarray:
        """The layer of each group, [G]."""
        return np.repeat(list(self.importance), [self.experts[layer] for layer in self.importance])

    @cached_property
    def blocks(self) -> Blocks:
        blocks, begin = [], 0
        for layers, budget in self.budgets:
            size = sum(self.experts[layer] for layer in layers)
            blocks.append((slice(begin, begin + size), BudgetSurface(np.tile([0.0, 1.0], (size, 1)), budget)))
            begin += size
        return tuple(blocks)

    @cached_property
    def start(self) -> np.ndarray:
        """alpha_prune = log(f / (1 - f)) + spread (1/2 - importance), f the share that goes; alpha_keep = 0."""
        alpha = np.zeros((len(self.layer), 2))
        alpha[:, 1] = self.spread * (0.5 - np.concatenate(list(self.importance.values())))
        for rows, surface in self.blocks:
            share = surface.budget / (rows.stop - rows.start)
            alpha[rows, 1] += np.log(share / (1 - share))
        return retract(alpha, self.blocks)

    def best(self, values: np.ndarray) -> np.ndarray:
        choice = np.zeros(len(values), dtype=np.int64)
        for rows, surface in self.blocks:
            gain = values[rows, 1] - values[rows, 0]
            choice[rows] = capped_top(int(surface.budget), self.layer[rows], self.capacity, gain)
        return choice

    def survival(self, choice: np.ndarray) -> dict[int, np.ndarray]:
        listed = {layer: 1.0 - choice[self.layer == layer] for layer in self.importance}
        return {layer: listed.get(layer, np.ones(count)) for layer, count in self.experts.items()}

    def slopes(self, by_survival: Mapping[int, np.ndarray]) -> np.ndarray:
        keep = np.concatenate([by_survival[layer] for layer in self.importance])
        return np.stack([keep, np.zeros_like(keep)], axis=1)


@dataclass(frozen=True)
class RCO(Descent):
    """Which experts go, and how many of each layer, by gradient descent that never leaves the model's budget.

    Expert i has the logits alpha_i = (keep, prune) and costs (0, 1). Where B experts go, alpha moves on the surface

        C(alpha) = sum over i of softmax(alpha_i)_prune = B

    by Adam: gradient projected on the tangent space, step, retraction alpha + t c onto C = B, first moment transported.
    Each sample adds Gumbel noise, removes the B experts with the largest (alpha_prune - alpha_keep + noise) / tau, no
    layer more than E - top_k, and differentiates KL(original || pruned) on one batch of text straight through, as if
    survival were softmax((alpha + noise) / tau)_keep. The plan is alpha's top B without noise.

    Options: ``steps`` of Adam at ``lr``; ``tau_start`` and ``tau_end``, the temperature's ends (exponential);
    ``samples`` a step, in pairs of opposite noise; ``spread`` of the start, alpha_prune = log(f / (1 - f)) + spread
    (1/2 - s), f the share that goes and s REAP's score scaled to [0, 1] in its layer (0: no start but f);
    ``check_every`` so many steps alpha's plan is measured as deployed, tokens routed anew; ``per_layer``: every layer
    has its own budget, so that only which experts go is searched; ``sequences`` of calibration text to search on;
    ``seed`` of noise and batches. The ratio's counts are spent as a total, and layers differ.

    Source: arXiv 2605.00649 and its published code (IST-DASLab/RCO), of which the abstract, the code and its read-me
    were read.

    Where we differ: of the plans measured, those of the start and of the last step among them, the one with the lowest
    deployed KL is taken, as the search multiplies gates by 0 where a deployed model routes anew; the code takes the
    last. No layer falls below top_k, where the code fails at the end. A pair shares its batch. The retraction is exact
    to 1e-9 (0.05 there), the start is REAP's score (summed gates there), and the KL is over the whole vocabulary or has
    a tail, so that it is 0 for equal models (there the original's top 20, renormalised).
    """

    spread: float
    per_layer: bool
    counts: ClassVar[str] = "total"  # the sum of ``keep`` is what is spent; other methods keep each layer's own
    nested: ClassVar[bool] = False
    aligns: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = REAP.needs | {"search"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spread < 0:
            raise UserError(f"spread={self.spread} is below 0: the experts that REAP values would go first.")

    def plan(self, stats: Stats, keep: Mapping[int, int]) -> dict[int, LayerPlan]:
        experts = {layer: here.experts for layer, here in stats.layers.items()}
        if all(keep[layer] == count for layer, count in experts.items()):
            return {layer: LayerPlan.identity(count) for layer, count in experts.items()}
        assert stats.search is not None, "it is among the needs"
        search = stats.search(self.sequences)
        scores = {layer: REAP().score(here) for layer, here in stats.layers.items()}
        choices = self._choices(scores, keep, search.top_k)
        uniform = {layer: here.kept_rows for layer, here in REAP().plan(stats, keep).items()}
        kept = self.descend(search, choices, uniform)
        return {layer: LayerPlan.prune(kept[layer], count) for layer, count in experts.items()}

    def _choices(self, scores: Mapping[int, np.ndarray], keep: Mapping[int, int], top_k: int) -> Pruning:
        """Raises UserError if a budget is more than its layers can lose."""
        experts = {layer: len(score) for layer, score in scores.items()}
        capacity = {layer: max(0, count - top_k) for layer, count in experts.items()}
        drop = {layer: experts[layer] - keep[layer] for layer in experts}
        budgets: tuple[tuple[tuple[int, ...], int], ...]
        if self.per_layer:
            budgets = tuple(((layer,), number) for layer, number in drop.items() if number)
        else:
            budgets = ((tuple(layer for layer in experts if capacity[layer]), sum(drop.values())),)
        for layers, number in budgets:
            if number > (most := sum(capacity[layer] for layer in layers)):
                raise UserError(
                    f"{number} experts are to go from {len(layers)} layers, but with the router's top-{top_k} left in "
                    f"each of them only {most} can. Lower the ratio."
                )
        importance = {layer: scaled(scores[layer]) for layers, _ in budgets for layer in layers}
        return Pruning(experts, capacity, importance, budgets, self.spread)


def scaled(score: np.ndarray) -> np.ndarray:
    """A layer's score from 0 for its lowest to 1 for its highest; 1/2 for all where all are equal."""
    low, high = float(score.min()), float(score.max())
    return (score - low) / (high - low) if high > low else np.full(len(score), 0.5)
