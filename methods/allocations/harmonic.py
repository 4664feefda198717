"""Harmonic allocation: layers whose barriers no potential explains lose fewer experts (HodgeCover's alternative)."""

from dataclasses import dataclass

from harness.errors import UserError
from harness.stats import BARRIER_MODES, Stats
from methods import Method
from methods.allocations import Budget, largest_remainder
from methods.hodge import barrier_sums, harmonic_share
from methods.hodgecover import by_saliency
from methods.reap import REAP


@dataclass(frozen=True)
class Harmonic:
    """Layer l loses

        d_l = R s_l / sum of s,    s_l = max(1 - rho_l, floor)

    of the R experts that are to go, rho_l the harmonic share of its merge barriers (`methods.hodge`), rounded by the
    largest remainder; a layer never keeps fewer than the router's top-k, and what it cannot lose the others do.

    Options: ``mode``, how barriers are measured; ``floor``, the least weight of a layer.

    Source: HodgeCover (Zhong et al., arXiv 2605.13997), where no table uses it.

    Where we differ: edges are directed by REAP's score, as in `methods.hodgecover`, so that the numbering of experts
    does not matter. The paper gives neither the floor nor the rounding.
    """

    mode: str
    floor: float

    def __post_init__(self) -> None:
        if self.mode not in BARRIER_MODES:
            raise UserError(f"allocation.mode={self.mode} is not one of {', '.join(BARRIER_MODES)}.")
        if not 0 < self.floor <= 1:
            raise UserError(f"allocation.floor={self.floor} is not above 0 and at most 1.")

    @property
    def needs(self) -> frozenset[str]:
        return REAP().needs | {"count", *barrier_sums(self.mode)}

    def check(self, method: Method) -> None:
        """Goes with every method: its counts come from the barriers alone."""

    def keep(self, stats: Stats, method: Method, budget: Budget) -> dict[int, int]:
        layers = {layer: by_saliency(stats.layers[layer], self.mode) for layer in budget.experts}
        weights = {
            layer: max(1 - harmonic_share(barriers.space, barriers.edge_barrier), self.floor)
            for layer, barriers in layers.items()
        }
        dropped = largest_remainder(weights, budget.capacity, budget.dropped)
        return {layer: count - dropped[layer] for layer, count in budget.experts.items()}
