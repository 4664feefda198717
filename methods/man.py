"""MAN, mean activation norm (Liu et al., arXiv 2606.15716)."""

from dataclasses import dataclass
from typing import ClassVar

from methods import SumScore


@dataclass(frozen=True)
class MAN(SumScore):
    """An expert whose output is small on average, over the tokens it sees, is little missed, however often chosen.

        S_j = (1 / N_j) * sum over x in X_j of ||f_j(x)||_2        (the scoring family at 1, 0, 1)

    Source: arXiv 2606.15716, which finds it (with MSAN) best when the calibration text is general, and worse than
    frequency-aware scores when text and tests share a domain. Key ``ean_mean`` in REAP's code.

    Where we differ: not known to; the paper was read in others' summaries.
    """

    b: ClassVar[int] = 1
    alpha: ClassVar[int] = 0
    beta: ClassVar[int] = 1
