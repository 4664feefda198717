"""How much hidden units, channels and heads are used: one pass over the text, for the order of a nested model.

Star Elastic's activation scores (arXiv 2605.07182; before it Minitron's width pruning, arXiv
2407.14679), sums over every unmasked token:

* hidden units of an expert: F_i = sum |act(gate) * up|_i over the tokens routed to the expert. The paper's experts have
  no gate matrix, and it takes |X W_up|_i; with a gate we take what down_proj reads, which is the unit's activation.
* channels of the residual stream: F_i = sum |norm(X)|_i over the norms of all layers and the last one.
* heads: sum ||Attn_h||_2, what the head says before the output projection; a key-value head counts the sum of the query
  heads that read it, because these go with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.calibrate import Batches
from harness.nested import NestedOrder, descending, dims, head_size, sizes
from harness.nested_masks import hidden_norms, output_projections
from harness.roles import layer_index
from harness.seam import experts_run_through


@dataclass(frozen=True)
class Importance:
    """Float64 sums. units[layer]: [E, F]. hidden: [H]. heads[layer]: [K], key-value heads."""

    units: dict[int, np.ndarray]
    hidden: np.ndarray
    heads: dict[int, np.ndarray]

    def order(self, experts: dict[int, np.ndarray]) -> NestedOrder:
        """Every axis by descending importance; the experts' order ([E] per layer) is a method's."""
        return NestedOrder(
            experts=experts,
            units={layer: descending(sums) for layer, sums in self.units.items()},
            hidden=descending(self.hidden),
            heads={layer: descending(sums) for layer, sums in self.heads.items()},
        )


@torch.no_grad()
def importance(model: PreTrainedModel, batches: Batches) -> Importance:
    """Run the model over batches of token ids and mask (int64 [B, T]); masked tokens (0) count for nothing.

    Raises UserError for a layout that `harness.nested` does not know.
    """
    dims(model)
    watch = _Watch(model)
    with ExitStack() as stack:
        stack.enter_context(experts_run_through(model, watch.experts))
        for norm in hidden_norms(model).values():
            stack.callback(norm.register_forward_hook(watch.norm).remove)
        for layer, output in output_projections(model).items():
            stack.callback(output.register_forward_pre_hook(watch.attention(layer)).remove)
        for ids, mask in batches:
            watch.mask = mask.bool().flatten().to(model.device)
            model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    return watch.found()


@dataclass
class _Watch:
    """What passes by, added up on the model's device. mask: which tokens of the batch count, [N]."""

    model: PreTrainedModel
    mask: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool))
    units: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)
    hidden: Tensor | float = 0.0

    def __post_init__(self) -> None:
        self.size = sizes(self.model)
        self.layer_of = {module: layer_index(name) for name, module in self.model.named_modules()}

    def found(self) -> Importance:
        assert isinstance(self.hidden, Tensor), "no batch was seen"
        return Importance(
            {layer: sums.cpu().numpy() for layer, sums in sorted(self.units.items())},
            self.hidden.cpu().numpy(),
            {layer: sums.cpu().numpy() for layer, sums in sorted(self.heads.items())},
        )

    def norm(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        counted = output.flatten(0, -2)[self.mask.to(output.device)]
        self.hidden = self.hidden + counted.abs().sum(0, dtype=torch.float64)

    def attention(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            said = args[0].flatten(0, -2)[self.mask.to(args[0].device)]  # [N, query heads x head size]
            by_head = said.unflatten(-1, (self.size["heads"], -1, head_size(self.model))).double()
            norms = torch.linalg.vector_norm(by_head, dim=-1).sum(dim=(0, 2))
            self.heads[layer] = self.heads[layer] + norms if layer in self.heads else norms

        return hook

    def experts(self, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The experts function: hidden [N, H], index and weight [N, k]; returns [N, H]."""
        layer, output = self.layer_of[module], torch.zeros_like(hidden)
        if layer not in self.units:
            shape = (self.size["experts"], self.size["width"])
            self.units[layer] = torch.zeros(shape, dtype=torch.float64, device=hidden.device)
        for expert in index.unique().tolist():
            token, place = (index == expert).nonzero(as_tuple=True)
            gate, up = nn.functional.linear(hidden[token], module.gate_up_proj[expert]).chunk(2, dim=-1)  # type: ignore[index]
            inner = module.act_fn(gate) * up  # type: ignore[operator]
            self.units[layer][expert] += inner[self.mask.to(inner.device)[token]].abs().sum(0, dtype=torch.float64)
            said = nn.functional.linear(inner, module.down_proj[expert]) * weight[token, place, None]  # type: ignore[index]
            output.index_add_(0, token, said.to(output.dtype))
        return output
