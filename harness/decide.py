"""How a method is asked: what it is given, and what its answer must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.plan import LayerPlan
from harness.stats import LayerStats, Stats
from methods import Method, SequentialMethod
from methods.allocations import Allocation, Budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from harness.calibrate import Batches


def decide(method: Method, stats: Stats, keep: Mapping[int, int]) -> dict[int, LayerPlan]:
    """The plan of every layer, from nothing but what the method declares.

    Raises StageError where a sum is not finite.
    """
    given = stats.only(method.needs)
    given.check_finite()
    return method.plan(given, keep)


def allocate(allocation: Allocation, method: Method, stats: Stats, budget: Budget) -> dict[int, int]:
    """How many experts each layer keeps, from nothing but what the allocation and the method declare.

    Raises StageError where a sum is not finite.
    """
    given = stats.only(allocation.needs | method.needs)
    given.check_finite()
    counts = allocation.keep(given, method, budget)
    assert sum(counts.values()) == budget.kept, "exactly what was asked for"
    assert all(
        min(budget.floor, budget.experts[layer]) <= count <= budget.experts[layer] for layer, count in counts.items()
    )
    return counts


def decide_in_sequence(
    method: SequentialMethod,
    model: PreTrainedModel,
    batches: Batches,
    extras: frozenset[str],
    routing: str,
    keep: Mapping[int, int],
    all_experts: int | None = None,
) -> dict[int, LayerPlan]:
    """As `decide`, each layer from statistics gathered behind the layers that are compressed already."""

    from harness.calibrate import calibrate_in_sequence

    def one(layer: int, stats: LayerStats) -> LayerPlan:
        return decide(method, Stats({layer: stats}), {layer: keep[layer]})[layer]

    return calibrate_in_sequence(model, batches, extras, routing, one, all_experts)
