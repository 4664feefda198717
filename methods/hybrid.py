"""Hybrid: prune the layers where merging collapses, merge those where it is safe."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from harness.errors import UserError
from harness.plan import LayerPlan
from harness.stats import Stats
from methods import LayerMethod, SequentialMethod


@dataclass(frozen=True)
class Hybrid:
    """Every layer takes the plan that reconstructs its output better on held-out calibration tokens.

        plan_l = argmin over {prune_l, merge_l} of  || Y'_l - Y_l ||^2 / || Y_l ||^2

    with Y_l the MoE block's output on held-out tokens and Y'_l that of the block compressed by either method, tokens
    routed anew. By construction no layer's error is larger than that of ``prune`` or of ``merge`` alone.

    Options: ``prune`` and ``merge``, any two methods that decide each layer on its own (by default REAP and partial
    preservation). Both must leave the same number of router rows, or no stock server takes a mixture of them: HC-SMoE,
    which keeps every row, can be measured against pruning here, but its mixtures are refused at export.

    Source: our own, after the discussion of REAP, arXiv 2510.13999: merging loses where the router's
    independent control of experts matters, and that differs by layer.

    Where we differ: nothing to differ from. The choice is made by the error of each layer alone, on the original
    model's hidden states; how errors add up over layers is not looked at. Equal errors: pruned. The error in its tables
    is that of the tokens it chose by, so it is the smaller of two and not an error on unseen text.
    """

    prune: LayerMethod
    merge: LayerMethod
    nested: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for part in (self.prune, self.merge):
            if isinstance(part, SequentialMethod):
                raise UserError(f"{type(part).__name__} decides layers in sequence; a hybrid needs each on its own.")

    @property
    def aligns(self) -> bool:
        return self.prune.aligns or self.merge.aligns

    @property
    def needs(self) -> frozenset[str]:
        return self.prune.needs | self.merge.needs | {"reconstruction"}

    def plan(self, stats: Stats, keep: Mapping[int, int]) -> dict[int, LayerPlan]:
        error = stats.error
        assert error is not None, "it is among the needs"
        pruned = self.prune.plan(stats.only(self.prune.needs), keep)
        merged = self.merge.plan(stats.only(self.merge.needs), keep)
        return {
            index: pruned[index] if error(index, pruned[index]) <= error(index, merged[index]) else merged[index]
            for index in pruned
        }
