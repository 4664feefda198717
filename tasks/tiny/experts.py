"""A mixture-of-experts forward for training on a CPU, registered with transformers as "cpu_sorted".

It computes what transformers' own experts functions compute, but sorts the (token, expert) pairs, keeps each expert's
work in cache and recomputes nothing but the activation in the backward pass.

    from tasks.tiny.experts import register
    register(); model.set_experts_implementation("cpu_sorted")
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "cpu_sorted"


class SortedExperts(torch.autograd.Function):
    """y[s] = down[e] (silu(gate[e] x[s]) * up[e] x[s]) for pairs s sorted by expert e.

    x [S, H], gate_up [E, 2I, H], down [E, H, I], ends [E]: the row where each expert's pairs end.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, ends: list[int]) -> Tensor:
        inner = x.new_empty(len(x), gate_up.shape[1])
        y = x.new_empty(len(x), down.shape[1])
        start = 0
        for e, end in enumerate(ends):
            if end > start:
                torch.mm(x[start:end], gate_up[e].T, out=inner[start:end])
                gate, up = inner[start:end].chunk(2, dim=-1)
                torch.mm(functional.silu(gate) * up, down[e].T, out=y[start:end])
            start = end
        ctx.save_for_backward(x, inner, gate_up, down)
        ctx.ends = ends
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, inner, gate_up, down = ctx.saved_tensors
        dx = torch.empty_like(x)
        d_gate_up = torch.zeros_like(gate_up)
        d_down = torch.zeros_like(down)
        start = 0
        for e, end in enumerate(ctx.ends):
            if end > start:
                gate, up = inner[start:end].chunk(2, dim=-1)
                sig = torch.sigmoid(gate)
                act = gate * sig
                dh = dy[start:end] @ down[e]
                d_down[e] = dy[start:end].T @ (act * up)
                d_inner = torch.cat([dh * up * (sig + act * (1 - sig)), dh * act], dim=-1)
                torch.mm(d_inner, gate_up[e], out=dx[start:end])
                d_gate_up[e] = d_inner.T @ x[start:end]
            start = end
        return dx, d_gate_up, d_down, None


def sorted_experts_forward(self: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """x [T, H], top_k_index and top_k_weights [T, k] -> [T, H]; `self` is the fused experts module."""
    tokens, k = top_k_index.shape
    order = torch.argsort(top_k_index.reshape(-1), stable=True)
    ends = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts).cumsum(0).tolist()
    y = SortedExperts.apply(x[order // k], self.gate_up_proj, self.down_proj, ends)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    y = y[back].view(tokens, k, -1)
    return torch.einsum("tkh,tk->th", y, top_k_weights.to(y.dtype))


def register() -> str:
    """Make the function known to transformers; returns the name for `set_experts_implementation`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts_forward)
    return NAME
