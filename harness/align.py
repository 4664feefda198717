"""Hidden units of one expert matched to another's. Their order changes nothing one expert computes, only a mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from harness.plan import LayerPlan


def unit_order(reference: Sequence[Tensor], member: Sequence[Tensor]) -> Tensor:
    """The order [m] of ``member``'s hidden units that brings each nearest to the reference's unit in the same place.

    Both are lists of matrices with one row per hidden unit (gate, up and the transposed down projection). The order
    minimises the summed squared distance of rows over all matrices, found exactly (Hungarian method): the weight
    matching of M-SMoE (arXiv 2310.01334) and of REAP's code, there cast to float16.
    """
    likeness = sum(a.float() @ b.float().T for a, b in zip(reference, member, strict=True))
    assert isinstance(likeness, Tensor)
    _, columns = linear_sum_assignment(likeness.cpu().double().numpy(), maximize=True)
    return torch.from_numpy(columns).to(member[0].device)


def unit_orders(plan: LayerPlan, parts: Callable[[int], Sequence[Tensor]]) -> dict[int, Tensor]:
    """For every expert that is merged into a weightier one, the order of its hidden units that matches the other's.

    parts: the matrices of an expert, as `unit_order` takes them.
    """
    return {
        source.expert: unit_order(parts(reference), parts(source.expert)) for reference, source in plan.aligned_pairs()
    }
