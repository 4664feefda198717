"""MSAN, mean squared activation norm (Liu et al., arXiv 2606.15716)."""

from dataclasses import dataclass
from typing import ClassVar

from methods import SumScore


@dataclass(frozen=True)
class MSAN(SumScore):
    """As MAN with squared norms, so that rare large outputs weigh more.

        S_j = (1 / N_j) * sum over x in X_j of ||f_j(x)||_2^2        (the scoring family at 1, 0, 2)

    Source: arXiv 2606.15716.

    Where we differ: not known to; the paper was read in others' summaries.
    """

    b: ClassVar[int] = 1
    alpha: ClassVar[int] = 0
    beta: ClassVar[int] = 2
