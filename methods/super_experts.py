"""Super experts kept out of reach of any score (arXiv 2507.23279)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.plan import LayerPlan
from harness.stats import Stats
from methods import ScoreMethod, highest, one_of, within


@dataclass(frozen=True)
class ProtectSuperExperts:
    """A few experts write huge activations that later layers rely on; whatever a score says, these are kept.

    Over all experts of the first ``layers`` of the model's MoE layers (at least one), with m_j the largest |f_j(x)| of
    any routed token and channel, expert j is super if

        m_j > the ``quantile`` of all m    and    m_j > ``share`` * max m.

    Super experts come first in their layer's ranking; the score decides the rest, and among them if a layer has more
    than it may keep. Any score of this collection can be ``method``.

    Options: ``over`` early (default) or all, as REAP's code does: both thresholds over the experts of all layers, of
    which only those of the early layers are then protected.

    Source: arXiv 2507.23279 (99.5 %, a tenth of the maximum, the first 75 % of the layers).

    Where we differ: REAP's code takes the largest signed entry where the paper and we take the largest absolute one.
    """

    method: ScoreMethod
    quantile: float
    share: float
    layers: float
    over: str
    nested: ClassVar[bool] = True
    aligns: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("quantile", "share", "layers"):
            within(name, getattr(self, name), 0, 1)
        one_of("over", self.over, ("early", "all"))

    @property
    def needs(self) -> frozenset[str]:
        return self.method.needs | {"output_max"}

    def plan(self, stats: Stats, keep: Mapping[int, int]) -> dict[int, LayerPlan]:
        protected = self.super_experts(stats)
        return {
            index: LayerPlan.prune(
                highest(keep[index], protected[index], self.method.score(layer), self.method.second_score(layer)),
                layer.experts,
            )
            for index, layer in stats.layers.items()
        }

    def super_experts(self, stats: Stats) -> dict[int, np.ndarray]:
        """Indicator [E] of the super experts of each layer, 0.0 or 1.0."""
        early = sorted(stats.layers)[: max(1, int(len(stats.layers) * self.layers + 1e-9))]
        counted = early if self.over == "early" else stats.layers
        largest = np.concatenate([stats.layers[index]["output_max"] for index in counted])
        threshold = max(float(np.quantile(largest, self.quantile)), self.share * float(largest.max()))
        return {
            index: (layer["output_max"] > threshold).astype(float) * (index in early)
            for index, layer in stats.layers.items()
        }
