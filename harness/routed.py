"""What experts make of tokens, before the gate: computed once, expert after expert, at the cost of a plain forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear  # one matrix product for all experts

PAIRS_AT_ONCE = 16_384  # (token, expert) pairs of an all-expert chunk: bounds its memory
ROWS_AT_ONCE = 1024  # that a CPU's caches hold


@dataclass(frozen=True)
class Routed:
    """f_j(x) of each of N tokens and the k experts that it is given to.

    rows: [N k, H], in the order of experts. order: int64 [N k], the pair (n k + i) of each row. place: int64 [N, k],
    the row of each pair. length, most: ||f||_2 and the largest |f| of each row, [N k].
    """

    rows: Tensor
    order: Tensor
    place: Tensor
    length: Tensor
    most: Tensor

    @property
    def outputs(self) -> Tensor:
        """[N, k, H]."""
        return self.rows[self.place]

    @cached_property
    def norms(self) -> Tensor:
        """||f_j(x)||_2, float64 [N, k]."""
        return self.length.double()[self.place]

    @cached_property
    def largest(self) -> Tensor:
        """Largest |f_j(x)| of any channel, float64 [N, k]."""
        return self.most.double()[self.place]

    def mixed(self, weight: Tensor) -> Tensor:
        """What the MoE block gives on: the sum over the experts times their gates ``weight`` [N, k], [N, H]."""
        gates = weight.reshape(-1)[self.order].unsqueeze(-1)
        if self.rows.device.type != "cpu":
            return (self.rows * gates)[self.place].sum(dim=1)
        token = self.order // weight.shape[1]
        total = torch.zeros(len(weight), self.rows.shape[1], dtype=torch.float32)
        for rows, gate, to in zip(*(every.split(ROWS_AT_ONCE) for every in (self.rows, gates, token)), strict=True):
            total.index_add_(0, to, (rows * gate).float())
        return total

    def only(self, mask: Tensor | None) -> Routed:
        """Of the tokens where the mask [N] is true; of all without one."""
        return self if mask is None else replace(self, place=self.place[mask])


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
    token, factor = order // index.shape[1], None if scale is None else scale.reshape(-1)[order].unsqueeze(-1)
    if hidden.device.type == "cpu":
        found = _one_expert_after_the_other(experts, hidden, token, factor, ends.tolist())
    else:
        inner = hidden_units(experts, _times(hidden[token], factor), chosen, ends)
        bias = experts.down_proj_bias[chosen] if experts.has_bias else None
        rows = _grouped_linear(inner, experts.down_proj, ends, bias=bias, is_transposed=experts.is_transposed)
        found = rows, *_sizes(rows)
    return Routed(found[0], order, place.view(index.shape), *found[1:])


def _one_expert_after_the_other(
    experts: Any, hidden: Tensor, token: Tensor, factor: Tensor | None, ends: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their norms and largest numbers: on a CPU, whose caches hold what one expert computes and no more."""
    rows = hidden.new_empty(len(token), hidden.shape[1])
    length, most = torch.empty(len(token)), hidden.new_empty(len(token))
    for expert, (begin, end) in enumerate(pairwise((0, *ends))):
        if end > begin:
            part = slice(begin, end)
            given = _times(hidden[token[part]], None if factor is None else factor[part])
            rows[part] = _linear_of(experts, "down_proj", expert, _units_of(experts, expert, given))
            length[part], most[part] = _sizes(rows[part])
    return rows, length, most


def _units_of(experts: Any, expert: int, given: Tensor) -> Tensor:
    """What the expert's down projection is given."""
    return _activated(experts, _linear_of(experts, _first(experts), expert, given))


def _first(experts: Any) -> str:
    """Name of the matrix that tokens come to first."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _activated(experts: Any, found: Tensor) -> Tensor:
    return experts._apply_gate(found) if experts.has_gate else experts.act_fn(found)


def _linear_of(experts: Any, name: str, expert: int, given: Tensor) -> Tensor:
    matrix = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return nn.functional.linear(given, matrix.T if experts.is_transposed else matrix, bias)


def _times(rows: Tensor, factor: Tensor | None) -> Tensor:
    return rows if factor is None else rows * factor


def _sizes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Norms and largest numbers."""
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
    return norms, rows.abs().amax(dim=-1)  # ten times as fast as the norm of that name


def hidden_units(experts: Any, rows: Tensor, chosen: Tensor, ends: Tensor) -> Tensor:
    """What the down projection is given, [S, F], of rows [S, H] for the experts ``chosen`` [S], sorted; ``ends`` [E]
    says where the rows of each end.
    """
    name = _first(experts)
    bias = getattr(experts, f"{name}_bias")[chosen] if experts.has_bias else None
    found = _grouped_linear(rows, getattr(experts, name), ends, bias=bias, is_transposed=experts.is_transposed)
    return _activated(experts, found)


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
