"""Gated energy: the sum of squared gated output norms (Liu et al., arXiv 2606.15716)."""

from dataclasses import dataclass
from typing import ClassVar

from methods import SumScore


@dataclass(frozen=True)
class GatedEnergy(SumScore):
    """The squared error of dropping an expert alone, with all other gates left as they are.

        S_j = sum over x in X_j of g_j(x)^2 * ||f_j(x)||_2^2        (the scoring family at 0, 2, 2)

    Source: arXiv 2606.15716. It is the diagonal of the matrix that `frozen_gate` minimises over.

    Where we differ: not known to; the paper was read in others' summaries.
    """

    b: ClassVar[int] = 0
    alpha: ClassVar[int] = 2
    beta: ClassVar[int] = 2
