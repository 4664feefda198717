"""One pass over the calibration tokens: every method's statistics, from what the model really did.

transformers routes every modern MoE block through one seam, ``ALL_EXPERTS_FUNCTIONS``: a function that receives the
experts module, its input, the selected expert ids and the gate weights the model multiplies with (renormalised,
scaled, sigmoid, correction bias, groups: all already applied). We register ours there for the length of the pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from harness.errors import StageError, UserError
from harness.stats import EXTRAS, LayerStats, Stats

PAIRS_AT_ONCE = 16_384  # (token, expert) pairs of an all-expert chunk: bounds its memory


def calibrate(
    model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]], extras: frozenset[str] = frozenset()
) -> Stats:
    """Gather the statistics of every MoE layer.

    batches: pairs of token ids and attention mask, both int64 [B, T]; masked tokens (0) count for nothing.
    extras: which of `harness.stats.EXTRAS` to gather besides the routed sums.
    Raises UserError if the architecture does not use the seam, StageError at the first layer whose experts' outputs
    are not finite.
    """
    observer = Observer(model, extras)
    with observer.attached(), torch.no_grad():
        for ids, mask in batches:
            observer.mask = mask.bool().flatten()
            model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    if not observer.layers:
        raise UserError(
            f"{type(model).__name__} does not route its experts through transformers' experts interface, so its "
            "experts cannot be observed. Architectures with fused experts modules of transformers 5 can."
        )
    return Stats({index: layer.finish() for index, layer in sorted(observer.layers.items())})


@dataclass
class Accumulator:
    """Running float64 sums of one layer, on the device of the model."""

    experts: int
    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def finish(self) -> LayerStats:
        return LayerStats(self.experts, self.tokens, {k: v.cpu().numpy() for k, v in self.sums.items()})


class Observer:
    """Stands in for the model's experts function and adds up what passes through it."""

    def __init__(self, model: PreTrainedModel, extras: frozenset[str]) -> None:
        assert extras <= set(EXTRAS), extras
        self.model = model
        self.extras = extras
        self.layers: dict[int, Accumulator] = {}
        self.mask: Tensor | None = None
        self.logits: dict[int, Tensor] = {}
        self.index_of = {module: layer_index(name) for name, module in model.named_modules()}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within this context the model's experts run through `forward` and its routers' logits are seen."""
        before = self.model.config._experts_implementation
        ALL_EXPERTS_FUNCTIONS.register("observed", self.forward)
        hooks = list(self._hook_routers()) if "logit_gram" in self.extras else []
        try:
            self._use("observed")
            yield
        finally:
            self._use(before)
            ALL_EXPERTS_FUNCTIONS._global_mapping.pop("observed", None)  # or it would keep the model in memory
            for hook in hooks:
                hook.remove()

    def _use(self, implementation: str) -> None:
        try:
            self.model.set_experts_implementation(implementation)
        except ValueError as error:
            raise UserError(f"The experts of {type(self.model).__name__} cannot be observed: {error}") from error

    def _hook_routers(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        recorder = (getattr(self.model, "_can_record_outputs", None) or {}).get("router_logits")
        if recorder is None:
            raise UserError(
                f"{type(self.model).__name__} does not say where its router logits are, which a chosen method needs "
                "(logit_gram). Choose a method that reads routed statistics only, such as reap."
            )
        target, position = getattr(recorder, "target_class", recorder), getattr(recorder, "index", 0)
        for module in self.model.modules():
            if isinstance(module, target):
                yield module.register_forward_hook(self._logit_hook(position))

    def _logit_hook(self, position: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            logits = output[position] if isinstance(output, tuple) else output
            self.logits[self.index_of[module]] = logits.reshape(-1, logits.shape[-1])

        return hook

    def forward(self, experts: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The experts function. hidden [N, H], index [N, k] expert ids, weight [N, k] gates; returns [N, H]."""
        outputs = routed_outputs(experts, hidden, index)
        self._observe(experts, hidden, index, weight, outputs)
        return (outputs * weight.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)

    def _observe(self, experts: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor, outputs: Tensor) -> None:
        layer = self.index_of[experts]
        assert self.mask is not None and len(self.mask) == len(hidden), "the experts see every token of the batch"
        mask = self.mask.to(hidden.device)
        here = self.layers.setdefault(layer, Accumulator(int(experts.num_experts)))  # type: ignore[arg-type]
        here.tokens += int(mask.sum())
        routed = routed_sums(index[mask], weight[mask], outputs[mask], here.experts)
        if not torch.isfinite(routed["gate_norm"]).all():
            raise StageError(f"Calibration: experts of layer {layer} gave outputs that are not finite.")
        for name, value in routed.items():
            here.add(name, value)
        if "all_output_sum" in self.extras:
            here.add("all_output_sum", all_output_sum(experts, hidden[mask], here.experts))
        if "logit_gram" in self.extras:
            logits = self.logits.pop(layer)[mask].double()
            here.add("logit_gram", logits.T @ logits)


def routed_outputs(experts: nn.Module, hidden: Tensor, index: Tensor) -> Tensor:
    """f_j(x) before the gate for every token and selected expert: [N, k, H].

    Every (token, expert) pair is given to transformers' own implementation as a token of its own with gate 1, so
    biases, gating functions and transposed layouts are the library's business.
    """
    tokens, k = index.shape
    pairs = hidden.repeat_interleave(k, dim=0)
    ones = torch.ones(tokens * k, 1, dtype=hidden.dtype, device=hidden.device)
    return grouped_mm_experts_forward(experts, pairs, index.reshape(-1, 1), ones).view(tokens, k, -1)


def routed_sums(index: Tensor, weight: Tensor, outputs: Tensor, experts: int) -> dict[str, Tensor]:
    """The sums of `harness.stats.ROUTED` for one batch, float64 [E] each."""
    norm = torch.linalg.vector_norm(outputs.float(), dim=-1).double()
    gate = weight.double()
    each = {
        "count": torch.ones_like(gate),
        "gate": gate,
        "norm": norm,
        "norm_sq": norm**2,
        "gate_norm": gate * norm,
        "gate_sq_norm_sq": (gate * norm) ** 2,
    }
    zeros = torch.zeros(experts, dtype=torch.float64, device=index.device)
    return {name: zeros.index_add(0, index.reshape(-1), value.reshape(-1)) for name, value in each.items()}


def all_output_sum(experts: nn.Module, hidden: Tensor, count: int) -> Tensor:
    """Sum over all tokens of every expert's output, float64 [E, H], a chunk of tokens at a time."""
    total = torch.zeros(count, hidden.shape[-1], dtype=torch.float64, device=hidden.device)
    for chunk in hidden.split(max(1, PAIRS_AT_ONCE // count)):
        every = torch.arange(count, device=hidden.device).expand(len(chunk), count)
        total += routed_outputs(experts, chunk, every).sum(dim=0, dtype=torch.float64)
    return total


def layer_index(module_name: str) -> int:
    """``model.layers.3.mlp.experts`` -> 3; -1 for modules outside the decoder layers."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", module_name + ".")
    return int(match[1]) if match else -1


def packed_batches(tokens: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split packed tokens [S, T] into batches for `calibrate`; packed sequences have no padding."""
    for start in range(0, len(tokens), batch_size):
        ids = torch.from_numpy(tokens[start : start + batch_size])
        yield ids, torch.ones_like(ids)
