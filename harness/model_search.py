"""A search's questions (`harness.search`), answered by a real model on search text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness.blocks import expert_counts
from harness.errors import StageError
from harness.masked import pruned, surviving
from harness.search import BATCH, Kept

WHOLE = 4096  # vocabularies up to this size are compared token by token
LARGEST = 256  # of larger ones the original's most probable tokens, and the rest as one


class Reference(NamedTuple):
    """The original model's distribution at every position of a batch of N positions: log-probabilities [N, K] of the
    tokens ``ids`` [N, K] (None: of the whole vocabulary) and of all others together, ``tail`` [N, 1].
    """

    log_probs: Tensor
    ids: Tensor | None
    tail: Tensor | None

    @property
    def joined(self) -> Tensor:
        return self.log_probs if self.tail is None else torch.cat([self.log_probs, self.tail], dim=1)

    def of(self, log_probs: Tensor) -> Tensor:
        """Another model's log-probabilities [N, V] over the same tokens and tail."""
        if self.ids is None:
            return log_probs
        found = log_probs.gather(1, self.ids)
        return torch.cat([found, log_remainder(found)], dim=1)


def reference(log_probs: Tensor, largest: int = LARGEST, whole: int = WHOLE) -> Reference:
    """Of log_probs [N, V]. The largest K and a tail make the acceptance an upper and the divergence a lower bound."""
    if log_probs.shape[1] <= whole:
        return Reference(log_probs, None, None)
    found = log_probs.topk(largest, dim=1)
    return Reference(found.values, found.indices, log_remainder(found.values))


def log_remainder(log_probs: Tensor) -> Tensor:
    """log(1 - sum of the probabilities) [N, 1] of log_probs [N, K], bounded below where rounding leaves nothing."""
    return (1 - log_probs.exp().sum(dim=1, keepdim=True)).clamp_min(1e-12).log()


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """sum_v min(p(v), q(v)) [N] = 1 - TV(p, q), of log-probabilities [N, K] (EvoESAP, arXiv 2603.06003)."""
    return torch.minimum(p, q).exp().sum(dim=1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) [N] in nats, of log-probabilities [N, K]."""
    return (p.exp() * (p - q)).sum(dim=1)


@dataclass
class Spent:
    """evaluations: plans that were measured. gradients: batches that were differentiated. tokens: forwarded in all, the
    original's own once in each run. seconds: of all runs, as far as their states were kept.
    """

    evaluations: int = 0
    gradients: int = 0
    tokens: int = 0
    seconds: float = 0.0


class ModelSearch:
    """`harness.search.Search` of a model on tokens [S, T].

    top_k: of its router. read, write: the state's place, a JSON document or None. The model's weights are not trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: np.ndarray,
        top_k: int,
        read: Callable[[], dict[str, Any] | None],
        write: Callable[[dict[str, Any]], object],
    ) -> None:
        self.model = model.requires_grad_(False)
        self.top_k = top_k
        self.experts = expert_counts(model)
        self.parts = [torch.from_numpy(tokens[start : start + BATCH]) for start in range(0, len(tokens), BATCH)]
        self.spent = Spent()
        self._clock = time.perf_counter()
        self.notes: dict[str, Any] = {}
        self._read, self._write = read, write

    @property
    def batches(self) -> int:
        return len(self.parts)

    @cached_property
    def original(self) -> list[Reference]:
        with torch.no_grad():
            return [reference(self._log_probs(part)) for part in self.parts]

    def acceptance(self, kept: Kept) -> float:
        return min(1.0, self._mean(acceptance, kept))  # sums of rounded probabilities may exceed it in the last digit

    def divergence(self, kept: Kept) -> float:
        return self._mean(divergence, kept)

    @torch.no_grad()
    def _mean(self, measure: Callable[[Tensor, Tensor], Tensor], kept: Kept) -> float:
        original = self.original
        with pruned(self.model, kept):
            found = [
                measure(known.joined, known.of(self._log_probs(part)))
                for part, known in zip(self.parts, original, strict=True)
            ]
        self.spent.evaluations += 1
        return self._finite(torch.cat(found).double().mean())

    def gradient(self, survival: Mapping[int, np.ndarray], batch: int) -> tuple[float, dict[int, np.ndarray]]:
        part, known = self.parts[batch % len(self.parts)], self.original[batch % len(self.parts)]
        shares = {
            layer: torch.tensor(value, dtype=torch.float32, device=self.model.device, requires_grad=True)
            for layer, value in survival.items()
        }
        with torch.enable_grad(), surviving(self.model, shares):
            loss = divergence(known.joined, known.of(self._log_probs(part))).mean()
            found = torch.autograd.grad(loss, list(shares.values()))
        self.spent.gradients += 1
        gradients = {layer: value.double().cpu().numpy() for layer, value in zip(shares, found, strict=True)}
        return self._finite(loss.detach()), gradients

    def _log_probs(self, part: Tensor) -> Tensor:
        """Of every next token at every position, float32 [N, V]."""
        self.spent.tokens += part.numel()
        logits = self.model(input_ids=part.to(self.model.device), use_cache=False).logits
        return logits.flatten(0, 1).float().log_softmax(dim=-1)

    def _finite(self, value: Tensor) -> float:
        if not torch.isfinite(value):
            raise StageError("Search: the model's distributions are not finite. Calibrate in float32.")
        return float(value)

    def recall(self) -> dict[str, Any] | None:
        found = self._read()
        if found is None:
            return None
        self.spent, self.notes = Spent(**found["spent"]), found["notes"]
        return found["state"]

    def remember(self, state: Mapping[str, Any]) -> None:
        self._write({"state": dict(state), **self.record()})

    def note(self, **facts: Any) -> None:
        self.notes |= facts

    def record(self) -> dict[str, Any]:
        """What the plan says of its search."""
        now = time.perf_counter()
        self.spent.seconds, self._clock = self.spent.seconds + now - self._clock, now
        return {"spent": asdict(self.spent), "notes": self.notes}
