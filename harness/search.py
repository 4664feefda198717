"""What a search over plans may ask of the model, without seeing it.

Methods and allocations that search list ``search`` among their needs and call ``stats.search(sequences)``.
`harness.model_search` answers from a real model; tests answer from arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

BATCH = 4  # sequences of search text at a time, as RCO's published code takes them

Kept = Mapping[int, Sequence[int]]  # experts that stay, by layer: the others are masked before the router's top-k


class Search(Protocol):
    """A model, search text, and a place for the search's state. ``experts``: of each MoE layer. ``top_k``: experts each
    token is routed to, the least a layer may keep. ``batches``: number of batches of the search text.
    """

    @property
    def experts(self) -> Mapping[int, int]: ...

    @property
    def top_k(self) -> int: ...

    @property
    def batches(self) -> int: ...

    def acceptance(self, kept: Kept) -> float:
        """ESAP of the model pruned to these experts, in [0, 1]: the mean over the text's positions of
        sum_v min(p(v), q(v)), p the original's and q the pruned model's distribution of the next token; tokens are
        routed anew. The higher the closer.
        """

    def divergence(self, kept: Kept) -> float:
        """KL(p || q) of the same two distributions, nats per token: what deployment would lose."""

    def gradient(self, survival: Mapping[int, np.ndarray], batch: int) -> tuple[float, dict[int, np.ndarray]]:
        """KL(p || q) on one batch of the text, where q multiplies the gate of every expert that the original router
        selected by its survival ([E] per layer, float64), without routing anew or normalising; and its derivative by
        each survival, [E] per layer, 0 for experts that no token of the batch was routed to.
        """

    def recall(self) -> dict[str, Any] | None:
        """The state that an interrupted search left; None at the start."""

    def remember(self, state: Mapping[str, Any]) -> None:
        """Keep this state (JSON), whole or not at all, with what has been spent so far."""

    def note(self, **facts: Any) -> None:
        """Facts for the plan's record, such as the fitness of the uniform plan beside that found."""
