"""What one batch adds to the calibration statistics: from tensors of one layer to the sums of `harness.stats`."""

from __future__ import annotations

import torch
from torch import Tensor


def routed_sums(index: Tensor, weight: Tensor, norm: Tensor, largest: Tensor, experts: int) -> dict[str, Tensor]:
    """The sums of `harness.stats.ROUTED`, float64 [E] each. index, weight [N, k]; norm, largest: of the experts'
    outputs, float64 [N, k].
    """
    gate = weight.double()
    each = {
        "count": torch.ones_like(gate),
        "gate": gate,
        "norm": norm,
        "norm_sq": norm**2,
        "gate_norm": gate * norm,
        "gate_sq_norm": gate**2 * norm,
        "gate_sq_norm_sq": (gate * norm) ** 2,
    }
    added = per_expert(index, torch.stack(list(each.values()), dim=-1), experts).T
    sums = dict(zip(each, added, strict=True))
    zeros = torch.zeros(experts, dtype=torch.float64, device=index.device)
    return {**sums, "output_max": zeros.scatter_reduce(0, index.reshape(-1), largest.reshape(-1), "amax")}


def per_expert(index: Tensor, value: Tensor, experts: int) -> Tensor:
    """Add up ``value`` [N, k, ...] by the expert that ``index`` [N, k] names: [E, ...].

    In an order that is always the same: `index_add` on a GPU adds as it comes.
    """
    rest = value.shape[index.dim() :]
    zeros = torch.zeros(experts, *rest, dtype=torch.float64, device=index.device)
    return zeros.index_put((index.reshape(-1),), value.reshape(-1, *rest), accumulate=True)


def per_pair(index: Tensor, value: Tensor, experts: int) -> Tensor:
    """Add up ``value`` [N, k, k] by the two experts that ``index`` [N, k] names: [E, E]."""
    pairs = index.unsqueeze(2) * experts + index.unsqueeze(1)
    return per_expert(pairs, value, experts * experts).view(experts, experts)


def coactivation(index: Tensor, experts: int) -> Tensor:
    """Number of tokens routed to both experts of each pair; the diagonal is the count."""
    tokens, k = index.shape
    return per_pair(index, torch.ones(tokens, k, k, dtype=torch.float64, device=index.device), experts)


def gated_norm_gram(index: Tensor, weight: Tensor, norm: Tensor, experts: int) -> Tensor:
    """Sum of a_i a_j with a = g ||f||_2, over the tokens routed to both."""
    gated = weight.double() * norm
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
    norm = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32).double()
    return per_expert(index, weight.double() * norm * turn.unsqueeze(1), experts)


def paper_routing(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Experts and gates [N, k] as REAP's published code takes them from any router: the top-k of the raw logits [N, E]
    and the softmax over all E, divided by its sum over the top-k only where ``renormalise``.
    """
    index = logits.topk(top_k, dim=-1).indices
    weight = logits.float().softmax(dim=-1).gather(1, index)
    return index, weight / weight.sum(dim=-1, keepdim=True) if renormalise else weight
