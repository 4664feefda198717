"""What experts make of tokens, before the gate: computed once, expert after expert, at the cost of a plain forward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import _grouped_linear  # one matrix product for all experts, on CPUs too

PAIRS_AT_ONCE = 16_384  # (token, expert) pairs of an all-expert chunk: bounds its memory


@dataclass(frozen=True)
class Routed:
    """f_j(x) of each of N tokens and the k experts that it is given to.

    rows: [N k, H], in the order of experts. order: int64 [N k], the pair (n k + i) of each row. place: int64 [N, k],
    the row of each pair.
    """

    rows: Tensor
    order: Tensor
    place: Tensor

    @property
    def outputs(self) -> Tensor:
        """[N, k, H]."""
        return self.rows[self.place]

    @cached_property
    def norms(self) -> Tensor:
        """||f_j(x)||_2, float64 [N, k]."""
        return torch.linalg.vector_norm(self.rows, dim=-1, dtype=torch.float32).double()[self.place]

    @cached_property
    def largest(self) -> Tensor:
        """Largest |f_j(x)| of any channel, float64 [N, k]."""
        return torch.linalg.vector_norm(self.rows, ord=torch.inf, dim=-1).double()[self.place]

    def mixed(self, weight: Tensor) -> Tensor:
        """What the MoE block gives on: the sum over the experts times their gates ``weight`` [N, k], [N, H]."""
        weighted = self.rows * weight.reshape(-1)[self.order].unsqueeze(-1)
        return weighted[self.place].sum(dim=1)

    def only(self, mask: Tensor | None) -> Routed:
        """Of the tokens where the mask [N] is true; of all without one."""
        return self if mask is None else Routed(self.rows, self.order, self.place[mask])


def run(experts: Any, hidden: Tensor, index: Tensor, scale: Tensor | None = None) -> Routed:
    """Give the tokens ``hidden`` [N, H] to the experts that ``index`` [N, k] names, times ``scale`` [N, k] where given.

    The experts are a module of transformers that goes through its experts interface (`harness.seam`): biases, gating
    functions and transposed layouts are as that has them.
    """
    chosen, order = index.reshape(-1).sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    every = torch.arange(experts.num_experts, device=chosen.device)
    ends = torch.searchsorted(chosen, every, right=True, out_int32=True)
    rows = hidden[order // index.shape[1]]
    if scale is not None:
        rows = rows * scale.reshape(-1)[order].unsqueeze(-1)
    inner = hidden_units(experts, rows, chosen, ends)
    bias = experts.down_proj_bias[chosen] if experts.has_bias else None
    outputs = _grouped_linear(inner, experts.down_proj, ends, bias=bias, is_transposed=experts.is_transposed)
    return Routed(outputs, order, place.view(index.shape))


def hidden_units(experts: Any, rows: Tensor, chosen: Tensor, ends: Tensor) -> Tensor:
    """What the down projection is given, [S, F], of rows [S, H] for the experts ``chosen`` [S], sorted; ``ends`` [E]
    says where the rows of each end.
    """
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    bias = getattr(experts, f"{name}_bias")[chosen] if experts.has_bias else None
    found = _grouped_linear(rows, getattr(experts, name), ends, bias=bias, is_transposed=experts.is_transposed)
    return experts._apply_gate(found) if experts.has_gate else experts.act_fn(found)


def sums_over_tokens(experts: Any, hidden: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Over all tokens [N, H], float64 [E, H]: the sum of every expert's output, and the same weighted by ``gate``
    [N, E] (zeros without one).

    The down projection is linear, so it is given sums of hidden units: one row for each expert instead of one for each
    token. A chunk of tokens at a time.
    """
    count = int(experts.num_experts)
    device, size = hidden.device, max(1, PAIRS_AT_ONCE // count)
    plain = gated = torch.zeros(count, 1, dtype=torch.float64, device=device)
    for chunk, share in zip(hidden.split(size), _split(gate, len(hidden), size), strict=True):
        every = torch.arange(count, device=device)
        ends = ((every + 1) * len(chunk)).int()
        found = hidden_units(experts, chunk.repeat(count, 1), every.repeat_interleave(len(chunk)), ends)
        units = found.view(count, len(chunk), found.shape[-1])
        plain = plain + units.sum(dim=1, dtype=torch.float64)
        if share is not None:
            gated = gated + torch.bmm(share.T.float().unsqueeze(1), units.float()).squeeze(1).double()
    tokens = torch.full((count,), len(hidden), dtype=torch.float64, device=device)
    outputs = _projected(experts, plain, tokens)
    return outputs, torch.zeros_like(outputs) if gate is None else _projected(experts, gated, gate.double().sum(dim=0))


def _split(gate: Tensor | None, length: int, size: int) -> tuple[Tensor | None, ...]:
    return tuple(gate.split(size)) if gate is not None else (None,) * max(1, -(-length // size))


def _projected(experts: Any, units: Tensor, weight: Tensor) -> Tensor:
    """Down projections, float64 [E, H], of one row [F] for each expert; ``weight`` [E] of its bias."""
    rows = []
    for expert, row in enumerate(units):
        matrix = experts.down_proj[expert].double()
        rows.append(row @ matrix if experts.is_transposed else matrix @ row)
    found = torch.stack(rows)
    return found + weight.unsqueeze(1) * experts.down_proj_bias.double() if experts.has_bias else found
