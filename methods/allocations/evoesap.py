"""EvoESAP, how many experts of each layer go, by evolution (Liu et al., arXiv 2603.06003)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.search import Search
from harness.stats import Stats
from harness.trial import trial_plan
from methods import LayerMethod, Method
from methods.allocations import Budget, check_prunes, largest_remainder, orders

Counts = tuple[int, ...]  # experts dropped of each layer


@dataclass(frozen=True)
class Feasible:
    """All plans that drop ``total`` experts, none more of a layer than its capacity: counted, and in an order."""

    capacity: Counts
    total: int

    @cached_property
    def ways(self) -> list[list[int]]:
        """[layers + 1][total + 1]: in how many ways the layers from here on can drop so many."""
        table = [[1] + [0] * self.total]
        for most in reversed(self.capacity):
            after, row, window = table[0], [], 0
            for number in range(self.total + 1):
                window += after[number] - (after[number - most - 1] if number > most else 0)
                row.append(window)
            table.insert(0, row)
        return table

    @property
    def number(self) -> int:
        return self.ways[0][self.total]

    def plan(self, index: int) -> Counts:
        """The plan at this place, 0 <= index < number, by the first layer's count, then by the next's."""
        counts, left = [], self.total
        for after in self.ways[1:]:
            count = 0
            while index >= after[left - count]:
                index -= after[left - count]
                count += 1
            counts.append(count)
            left -= count
        return tuple(counts)

    def random(self, rng: np.random.Generator) -> Counts:
        """A plan drawn uniformly; numbers of plans exceed 64 bits."""
        size = self.number.bit_length() // 8 + 8
        return self.plan(int.from_bytes(rng.bytes(size), "little") % self.number)


def shapes(layers: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Depth profiles, [layers] each: how much is dropped at each depth relative to the uniform plan."""
    depth = np.arange(layers)
    middle = np.minimum(depth, layers - 1 - depth)
    half, quarter = layers // 2, max(1, layers // 4)
    yield np.ones(layers)
    yield rng.random(layers)
    yield depth + 1.0  # up
    yield layers - 1.0 * depth  # down
    yield middle + 1.0  # mid
    yield middle.max() - middle + 1.0  # mid-neg
    yield 0.7**depth  # front-heavy
    yield 1.3**depth  # back-heavy
    yield np.where(depth < half, 3.0, 1.0)  # block-early
    yield np.where(depth >= half, 3.0, 1.0)  # block-late
    yield np.where(depth < quarter, 3.0, 1.0)  # the first quarter
    yield np.where(depth >= layers - quarter, 3.0, 1.0)  # the last quarter
    yield np.where(depth % 2, 1.0, 2.0)  # alt
    yield np.minimum(depth, half) + 1.0  # deep-flat


@dataclass(frozen=True)
class Evolution:
    """Where a search stands: the fitness of every plan tried, the plans to score next, the best fitness of every
    generation scored, and the random choices to come.
    """

    fitness: Mapping[Counts, float]
    population: tuple[Counts, ...]
    history: tuple[float, ...]
    rng: Mapping[str, Any]

    @property
    def best(self) -> Counts:
        """The fittest plan ever tried; of equal ones the first."""
        return max(self.fitness, key=lambda counts: self.fitness[counts])

    def to_json(self) -> dict[str, Any]:
        return {
            "fitness": [[list(counts), value] for counts, value in self.fitness.items()],
            "population": [list(counts) for counts in self.population],
            "history": list(self.history),
            "rng": dict(self.rng),
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Evolution:
        fitness = {tuple(counts): float(value) for counts, value in state["fitness"]}
        return cls(
            fitness, tuple(tuple(counts) for counts in state["population"]), tuple(state["history"]), state["rng"]
        )


@dataclass(frozen=True)
class EvoESAP:
    """The order in which a layer's experts go is kept; how many go of each is evolved, B in all.

    The fitness of a plan r, r_l experts dropped of layer l, is the rate at which speculative decoding would accept
    what the pruned model drafts, from one forward pass without decoding,

        ESAP(r) = mean over positions of sum over v of min(p(v), q_r(v)) = 1 - TV(p, q_r)

    with p the original's and q_r the pruned model's distribution of the next token. The first population has a plan for
    every depth profile (uniform, random, up, down, mid, mid-neg, 0.7^i, 1.3^i, early and late halves and quarters,
    alternating, deep-flat), by largest remainders, as far as it has room, and random plans. In each generation the
    fittest ``elites`` stay, and each child is a random one of them after min(U{1..T}, U{1..T}) level switches, T =
    ``max_switches``: up to ``max_step`` experts fewer go from one layer, as many more from another. The best plan ever
    scored is taken.

    Options: ``order``, the method whose order the search uses (none: the cell's own); ``sequences`` of calibration text
    to score on; ``population``; ``elites``; ``generations``; ``max_step``; ``max_switches``; ``attempts`` at switches
    of one child, of which infeasible ones fail; ``seed``.

    Source: arXiv 2603.06003 and its published code (ZongfangLiu/EvoESAP), of which the abstract, the code and its
    read-me were read.

    Where we differ: every position of the text is scored, and answers are not told apart from prompts. The depth of the
    two-level profiles (3 : 1, alternating 2 : 1) and the slope of up, down, mid and deep-flat are ours. Plans of the
    first population are distinct, random ones uniform over all feasible plans, and all feasible plans where there are
    no more than ``population``. Equal plans count once among the elites.
    """

    seed: int
    order: LayerMethod | None
    sequences: int
    population: int
    elites: int
    generations: int
    max_step: int
    max_switches: int
    attempts: int

    def __post_init__(self) -> None:
        for name in ("sequences", "population", "elites", "generations", "max_step", "max_switches", "attempts"):
            if getattr(self, name) < 1:
                raise UserError(f"allocation.{name}={getattr(self, name)} is less than 1.")
        if self.elites > self.population:
            raise UserError(
                f"allocation.elites={self.elites} is more than allocation.population={self.population}, of which they "
                "are a part."
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"search"}) | (self.order.needs if self.order else frozenset())

    @property
    def searched_sequences(self) -> int:
        """Sequences through the model, at most."""
        return self.sequences * (self.population + (self.generations - 1) * (self.population - self.elites) + 1)

    def check(self, method: Method) -> None:
        ordered = self.order or method
        check_prunes(ordered, trial_plan(ordered))

    def keep(self, stats: Stats, method: Method, budget: Budget) -> dict[int, int]:
        kept = orders(stats, self.order or method, budget.experts, budget.floor)
        assert stats.search is not None, "it is among the needs"
        search = stats.search(self.sequences)

        def score(counts: Counts) -> float:
            return float(search.acceptance({layer: kept[layer][left] for layer, left in _left(budget, counts).items()}))

        uniform = _split(budget, np.ones(len(budget.experts)))
        found = self._evolved(search, budget, score)
        search.note(
            fitness=found.fitness[found.best],
            uniform_fitness=found.fitness[uniform],
            best_per_generation=list(found.history),
            budget=budget.dropped,
            counts={str(layer): left for layer, left in _left(budget, found.best).items()},
        )
        return _left(budget, found.best)

    def _evolved(self, search: Search, budget: Budget, score: Callable[[Counts], float]) -> Evolution:
        """An interrupted search goes on after its last whole generation."""
        state = search.recall()
        now = Evolution.from_json(state) if state else self._begin(budget)
        while len(now.history) < self.generations:
            now = self._generation(now, tuple(budget.capacity.values()), score)
            search.remember(now.to_json())
        return now

    def _begin(self, budget: Budget) -> Evolution:
        rng = np.random.default_rng(self.seed)
        return Evolution({}, self.first_population(budget, rng), (), rng.bit_generator.state)

    def first_population(self, budget: Budget, rng: np.random.Generator) -> tuple[Counts, ...]:
        """Distinct plans, the uniform one first. Raises UserError if no plan is feasible."""
        plans = [_split(budget, shape) for shape in shapes(len(budget.experts), rng)]
        feasible = Feasible(tuple(budget.capacity.values()), budget.dropped)
        if feasible.number <= self.population:
            return tuple(dict.fromkeys([*plans, *(feasible.plan(index) for index in range(feasible.number))]))
        distinct = dict.fromkeys(plans)
        while len(distinct) < self.population:
            distinct[feasible.random(rng)] = None
        return tuple(distinct)[: self.population]

    def _generation(self, now: Evolution, capacity: Counts, score: Callable[[Counts], float]) -> Evolution:
        """Score the population, keep the elites and fill up with their children."""
        rng = np.random.default_rng()
        rng.bit_generator.state = now.rng
        fitness = dict(now.fitness)
        for counts in now.population:
            if counts not in fitness:
                fitness[counts] = score(counts)
        ranked = sorted(dict.fromkeys(now.population), key=lambda counts: -fitness[counts])
        elites = ranked[: self.elites]
        parents = rng.integers(len(elites), size=self.population - len(elites))
        children = [self.child(elites[parent], capacity, rng) for parent in parents]
        history = (*now.history, fitness[ranked[0]])
        return Evolution(fitness, (*elites, *children), history, rng.bit_generator.state)

    def child(self, parent: Counts, capacity: Counts, rng: np.random.Generator) -> Counts:
        """The parent after a few level switches: the same total, every count between 0 and its capacity."""
        counts = list(parent)
        switches = int(rng.integers(1, self.max_switches + 1, size=2).min())
        for _ in range(self.attempts):
            switches -= self._switch(counts, capacity, rng)
            if not switches:
                break
        return tuple(counts)

    def _switch(self, counts: list[int], capacity: Counts, rng: np.random.Generator) -> bool:
        """Move some of what is dropped from one layer to another; whether that was possible."""
        sources = [layer for layer, count in enumerate(counts) if count > 0]
        targets = [layer for layer, count in enumerate(counts) if count < capacity[layer]]
        if not sources or not targets:
            return False
        source, target = sources[rng.integers(len(sources))], targets[rng.integers(len(targets))]
        step = int(rng.integers(1, self.max_step + 1))
        if source == target or step > counts[source] or step > capacity[target] - counts[target]:
            return False
        counts[source] -= step
        counts[target] += step
        return True


def _left(budget: Budget, counts: Counts) -> dict[int, int]:
    """Experts kept of each layer."""
    return {layer: experts - count for (layer, experts), count in zip(budget.experts.items(), counts, strict=True)}


def _split(budget: Budget, shape: np.ndarray) -> Counts:
    """The budget in proportion to a depth profile times the uniform plan, within capacities."""
    uniform = [budget.experts[layer] - budget.uniform[layer] for layer in budget.experts]
    weights = dict(zip(budget.experts, (shape * uniform).tolist(), strict=True))
    return tuple(largest_remainder(weights, budget.capacity, budget.dropped).values())
