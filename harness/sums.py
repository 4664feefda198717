"""What one batch adds to the calibration statistics: from tensors of one layer to the sums of `harness.stats`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward

PAIRS_AT_ONCE = 16_384  # (token, expert) pairs of an all-expert chunk: bounds its memory


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
    """The sums of `harness.stats.ROUTED`, float64 [E] each. index, weight [N, k]; outputs [N, k, H]."""
    gate, norm = weight.double(), norms(outputs)
    each = {
        "count": torch.ones_like(gate),
        "gate": gate,
        "norm": norm,
        "norm_sq": norm**2,
        "gate_norm": gate * norm,
        "gate_sq_norm": gate**2 * norm,
        "gate_sq_norm_sq": (gate * norm) ** 2,
    }
    sums = {name: per_expert(index, value, experts) for name, value in each.items()}
    largest = outputs.abs().amax(dim=-1).double()
    zeros = torch.zeros(experts, dtype=torch.float64, device=index.device)
    return {**sums, "output_max": zeros.scatter_reduce(0, index.reshape(-1), largest.reshape(-1), "amax")}


def norms(outputs: Tensor) -> Tensor:
    """||f_j(x)||_2, float64 [N, k]."""
    return torch.linalg.vector_norm(outputs.float(), dim=-1).double()


def per_expert(index: Tensor, value: Tensor, experts: int) -> Tensor:
    """Add up ``value`` [N, k] by the expert that ``index`` [N, k] names: [E]."""
    zeros = torch.zeros(experts, dtype=torch.float64, device=index.device)
    return zeros.index_add(0, index.reshape(-1), value.reshape(-1))


def per_pair(index: Tensor, value: Tensor, experts: int) -> Tensor:
    """Add up ``value`` [N, k, k] by the two experts that ``index`` [N, k] names: [E, E]."""
    pairs = index.unsqueeze(2) * experts + index.unsqueeze(1)
    return per_expert(pairs, value, experts * experts).view(experts, experts)


def coactivation(index: Tensor, experts: int) -> Tensor:
    """Number of tokens routed to both experts of each pair; the diagonal is the count."""
    tokens, k = index.shape
    return per_pair(index, torch.ones(tokens, k, k, dtype=torch.float64, device=index.device), experts)


def gated_norm_gram(index: Tensor, weight: Tensor, outputs: Tensor, experts: int) -> Tensor:
    """Sum of a_i a_j with a = g ||f||_2, over the tokens routed to both."""
    gated = weight.double() * norms(outputs)
    return per_pair(index, gated.unsqueeze(2) * gated.unsqueeze(1), experts)


def gated_output_gram(index: Tensor, weight: Tensor, outputs: Tensor, experts: int) -> Tensor:
    """Sum of <g_i f_i, g_j f_j> over the tokens routed to both."""
    gated = weight.float().unsqueeze(-1) * outputs.float()
    return per_pair(index, (gated @ gated.transpose(1, 2)).double(), experts)


def gate_norm_turn(index: Tensor, weight: Tensor, outputs: Tensor, residual: Tensor, experts: int) -> Tensor:
    """Sum of g n s, s = max(0, 1 - cos(u, u + r)); residual [N, H] is u, r the gated sum of the routed outputs."""
    stream = residual.float()
    after = stream + (weight.float().unsqueeze(-1) * outputs.float()).sum(dim=1)
    turn = (1 - torch.cosine_similarity(stream, after, dim=-1)).clamp_min(0).double()
    return per_expert(index, weight.double() * norms(outputs) * turn.unsqueeze(1), experts)


def all_output_sums(experts: nn.Module, hidden: Tensor, gate: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """Over all tokens, float64 [E, H]: the sum of every expert's output, and the same weighted by ``gate`` [N, E]
    (zeros without one). A chunk of tokens at a time.
    """
    plain = torch.zeros(count, hidden.shape[-1], dtype=torch.float64, device=hidden.device)
    gated = torch.zeros_like(plain)
    size = max(1, PAIRS_AT_ONCE // count)
    for start in range(0, len(hidden), size):
        chunk = hidden[start : start + size]
        every = torch.arange(count, device=hidden.device).expand(len(chunk), count)
        outputs = routed_outputs(experts, chunk, every)
        plain += outputs.sum(dim=0, dtype=torch.float64)
        if gate is not None:
            weighted = gate[start : start + size].float().unsqueeze(-1) * outputs.float()
            gated += weighted.sum(dim=0, dtype=torch.float64)
    return plain, gated


def paper_routing(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Experts and gates [N, k] as REAP's published code takes them from any router: the top-k of the raw logits [N, E]
    and the softmax over all E, divided by its sum over the top-k only where ``renormalise``.
    """
    index = logits.topk(top_k, dim=-1).indices
    weight = logits.float().softmax(dim=-1).gather(1, index)
    return index, weight / weight.sum(dim=-1, keepdim=True) if renormalise else weight
