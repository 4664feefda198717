"""Low-rank adapters (LoRA, arXiv 2106.09685) on the experts of a model in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from harness.blocks import moe_blocks


class LowRank(nn.Module):
    """W_e + B_e A_e for every expert's matrix in a fused tensor W [E, m, n], with A [E, r, n] and B [E, m, r].

    B starts at zero, so nothing changes at first; A is drawn with variance 1 / n. The paper's scale alpha / r is 1.
    The sum is made anew in each forward pass: as much memory again as the experts of one layer take.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        experts, rows, columns = weight.shape
        like = {"dtype": weight.dtype, "device": weight.device}
        self.a = nn.Parameter(torch.randn(experts, rank, columns, **like) * columns**-0.5)  # type: ignore[call-overload]
        self.b = nn.Parameter(torch.zeros(experts, rows, rank, **like))  # type: ignore[call-overload]

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def attach(model: PreTrainedModel, rank: int) -> None:
    """Give every fused matrix of the experts (biases not) an adapter that can be trained; the matrices cannot."""
    for experts in _experts(model):
        for name, weight in list(experts.named_parameters(recurse=False)):
            if weight.dim() == 3:
                weight.requires_grad_(False)
                parametrize.register_parametrization(experts, name, LowRank(weight, rank))


def merge(model: PreTrainedModel) -> None:
    """Add the adapters to the matrices and remove them."""
    for experts in _experts(model):
        for name in list(getattr(experts, "parametrizations", {})):
            parametrize.remove_parametrizations(experts, name, leave_parametrized=True)


def _experts(model: PreTrainedModel) -> Iterator[nn.Module]:
    for block in moe_blocks(model).values():
        yield block.experts  # type: ignore[misc]
