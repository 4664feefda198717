"""Llama-4, whose experts are the only ones that do not go through transformers' experts interface: led through it.

It multiplies an expert's input by the gate, not its output, and runs every expert on every token with gates of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def blocks(model: PreTrainedModel) -> list[Any]:
    """Its MoE blocks; none of other architectures. Told by name: to import the class costs every start two seconds."""
    return [module for module in model.modules() if type(module).__name__ == "Llama4TextMoe"]


@contextmanager
def led_through(
    model: PreTrainedModel, function: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Within this context its blocks are computed by ``function``, which is told by ``gates_inputs`` of the experts
    module what the gates multiply.
    """
    found = blocks(model)
    for block in found:
        _describe(block.experts)
        block.forward = _forward(block, function)
    try:
        yield
    finally:
        for block in found:
            del block.forward


def _describe(experts: Any) -> None:
    """What the interface says of other architectures' experts."""
    experts.has_gate, experts.has_bias, experts.is_transposed, experts.gates_inputs = True, False, True, True
    experts._apply_gate = lambda gate_up: _product(experts, gate_up)


def _product(experts: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * experts.act_fn(gate)


def _forward(block: Any, function: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden_states.reshape(-1, block.hidden_dim)
        scores, logits = block.router(hidden)
        weight, index = scores.topk(block.top_k, dim=-1)  # 0 for all others
        return block.shared_expert(hidden) + function(block.experts, hidden, index, weight), logits

    return forward
