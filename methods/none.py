"""No compression: the line every other method is measured against."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from harness.plan import LayerPlan
from harness.stats import Stats


@dataclass(frozen=True)
class NoCompression:
    """Keeps every expert, whatever the ratio; the exported tensors equal the original's byte for byte."""

    nested: ClassVar[bool] = True
    aligns: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def plan(self, stats: Stats, keep: Mapping[int, int]) -> dict[int, LayerPlan]:
        return {index: LayerPlan.identity(layer.experts) for index, layer in stats.layers.items()}
