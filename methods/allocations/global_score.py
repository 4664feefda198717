"""Global score: one ranking of all experts of the model."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.errors import UserError
from harness.stats import Stats
from methods import Method, ScoreMethod, mean_over
from methods.allocations import Budget
from methods.budget_surface import capped_top


@dataclass(frozen=True)
class GlobalScore:
    """The experts with the lowest score of the whole model go, wherever they are.

        drop = argmin over D of sum over (l, j) in D of S_lj / Z_l,    |D| = B,    at most E_l - top_k of layer l

    with S the method's score. Greedy from below, skipping full layers, is exactly that minimum.

    Options: ``normalise`` none (Z_l = 1), sum (of the layer's scores) or max (of the layer's scores); a layer whose
    scores are all 0 goes first.

    Source: our own, a control: scores that were made to compare experts of one layer need not compare layers, and a
    search over counts should beat this.

    Where we differ: nothing to differ from. Only for methods that prune by a score of single experts.
    """

    normalise: str
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.normalise not in ("none", "sum", "max"):
            raise UserError(f"allocation.normalise={self.normalise} is not one of none, sum, max.")

    def check(self, method: Method) -> None:
        if not isinstance(method, ScoreMethod):
            raise UserError(
                f"{type(method).__name__} gives no score of single experts, by which allocation=global_score ranks "
                "them. Choose allocation=uniform or a method that does, such as reap."
            )

    def keep(self, stats: Stats, method: Method, budget: Budget) -> dict[int, int]:
        self.check(method)
        assert isinstance(method, ScoreMethod)
        if budget.dropped > (most := sum(budget.capacity.values())):
            raise UserError(
                f"{budget.dropped} experts are to go, but with the router's top-k left in each layer only {most} can. "
                "Lower the ratio."
            )
        given = stats.only(method.needs).layers
        layers = list(budget.experts)
        scores = np.concatenate([self.normalised(method.score(given[layer])) for layer in layers])
        ties = np.concatenate([method.second_score(given[layer]) for layer in layers])
        place = np.repeat(layers, [budget.experts[layer] for layer in layers])
        dropped = capped_top(budget.dropped, place, budget.capacity, -scores, -ties)
        return {layer: int((~dropped[place == layer]).sum()) for layer in layers}

    def normalised(self, score: np.ndarray) -> np.ndarray:
        """A layer's score [E] over its sum or largest entry."""
        if self.normalise == "none":
            return score
        return mean_over(score, np.full(len(score), score.sum() if self.normalise == "sum" else score.max()))
