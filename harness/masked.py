"""A model in memory with some of its experts out of the way, for the length of a search's forward pass.

`pruned` is what a pruned checkpoint computes, without copying a weight: routers have the kept rows only, and what they
choose is mapped to the old experts. `surviving` is what a search by gradient looks at: gates times a survival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import grouped_mm_experts_forward

from harness.blocks import moe_blocks
from harness.roles import EXPERT_COUNT, layer_index, role
from harness.seam import experts_run_through
from harness.search import Kept

Experts = Callable[[int, nn.Module, Tensor, Tensor, Tensor], Tensor]  # layer, module, hidden, chosen experts, gates


@contextmanager
def pruned(model: PreTrainedModel, kept: Kept) -> Iterator[None]:
    """Tokens are routed among these experts only. The model is as it was afterwards, also after an error."""
    rows: dict[int, Tensor] = {}
    restore: list[Callable[[], None]] = []
    try:
        for layer, block in moe_blocks(model).items():
            experts = int(block.experts.num_experts)  # type: ignore[union-attr, arg-type]
            if layer in kept and len(kept[layer]) < experts:
                rows[layer] = torch.tensor(sorted(kept[layer]), device=next(block.parameters()).device)
                restore += _narrow_router(block, layer, rows[layer], experts)

        def forward(layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            chosen = rows[layer][index] if layer in rows else index
            return grouped_mm_experts_forward(module, hidden, chosen, weight)

        with _experts_function(model, forward):
            yield
    finally:
        for undo in reversed(restore):
            undo()


@contextmanager
def surviving(model: PreTrainedModel, survival: Mapping[int, Tensor]) -> Iterator[None]:
    """The gate of every expert that the router selects is multiplied by its survival ([E] per layer): nothing is routed
    anew or normalised, and gradients reach the survivals.
    """

    def forward(layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        gates = weight * survival[layer].to(weight)[index] if layer in survival else weight
        return grouped_mm_experts_forward(module, hidden, index, gates)

    with _experts_function(model, forward):
        yield


@contextmanager
def _experts_function(model: PreTrainedModel, function: Experts) -> Iterator[None]:
    layer_of = {module: layer_index(name) for name, module in model.named_modules() if name.endswith(".experts")}

    def forward(module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return function(layer_of[module], module, hidden, index, weight)

    with experts_run_through(model, forward):
        yield


def _narrow_router(block: nn.Module, layer: int, rows: Tensor, experts: int) -> list[Callable[[], None]]:
    """Give the router these rows only; returns what undoes it."""
    undo: list[Callable[[], None]] = []
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if role(f"layers.{layer}.block.{name}", tensor.shape, {layer: experts}).kind == "router":
            narrow = tensor.detach().index_select(0 if tensor.shape[0] == experts else 1, rows)
            undo.append(_exchange(block, name, tensor, narrow))
    assert undo, f"{type(block).__name__} of layer {layer} has no router that is known as one"
    inner = set(block.experts.modules())  # type: ignore[union-attr]
    for module in block.modules():
        for count in EXPERT_COUNT:
            if module not in inner and getattr(module, count, None) == experts:
                setattr(module, count, len(rows))
                undo.append(lambda module=module, count=count: setattr(module, count, experts))  # type: ignore[misc]
    return undo


def _exchange(block: nn.Module, name: str, old: Tensor, new: Tensor) -> Callable[[], None]:
    owner, _, attribute = name.rpartition(".")
    module = block.get_submodule(owner)
    if attribute not in module._parameters:
        setattr(module, attribute, new)
        return lambda: setattr(module, attribute, old)
    module._parameters[attribute] = nn.Parameter(new, requires_grad=False)

    def undo() -> None:
        module._parameters[attribute] = old  # type: ignore[assignment]

    return undo
