"""EAN, expert activation norm (Jaiswal et al., "Finding Fantastic Experts in MoEs", arXiv 2504.05586)."""

from dataclasses import dataclass
from typing import ClassVar

from methods import SumScore


@dataclass(frozen=True)
class EAN(SumScore):
    """An expert whose outputs are small, summed over the tokens it sees, is little missed.

        S_j = sum over x in X_j of ||f_j(x)||_2        (f_j before the gate; the scoring family at 0, 0, 1)

    Source: arXiv 2504.05586 as restated in REAP, arXiv 2510.13999, eq. 13: the *sum* of norms.

    Where we differ: not from eq. 13. Some ports call the mean EAN; here that is `man`.
    """

    b: ClassVar[int] = 0
    alpha: ClassVar[int] = 0
    beta: ClassVar[int] = 1
