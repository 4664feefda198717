"""What a served model must say: log-probabilities of a short text from transformers, the plan carried out in memory.

A second implementation of the model and of the plan. What the engine gets wrong by more than rounding (a swap that
mixes plans, a kernel, an architecture that this build of vLLM computes otherwise) shows before anything is scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from harness.blocks import compress
from harness.errors import StageError
from harness.plan import Plan
from harness.probe import Expected


@torch.no_grad()
def expected(model: PreTrainedModel, plan: Plan, ids: Sequence[int]) -> Expected:
    """What the model says of these tokens under the plan, computed in float32, and how much rounding changes it.

    model: with its weights as they are stored. It is changed. Raises StageError if one is not finite.
    """
    compress(model, plan.layers)
    rounded = log_probs(model, ids)
    exact = log_probs(model.float(), ids)
    if not np.isfinite([*rounded, *exact]).all():
        raise StageError("Reference: in transformers, too, a known text gets log-probabilities that are not finite.")
    return Expected(tuple(exact), float(np.abs(np.subtract(rounded, exact)).mean()))


@torch.no_grad()
def log_probs(model: PreTrainedModel, ids: Sequence[int]) -> list[float]:
    """Log-probability of each token but the first, given those before it, in nats."""
    tokens = torch.tensor([list(ids)], device=model.device)
    found = model(input_ids=tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return found.gather(1, tokens[0, 1:, None].to(found.device))[:, 0].tolist()
