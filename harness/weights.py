"""Statistics of the weights alone: sums over the entries of each expert's matrices, read from disk one at a time."""

from __future__ import annotations

import numpy as np

from harness.errors import UserError
from harness.models import Model
from harness.rewrite import MERGEABLE, decoded
from harness.roles import role
from harness.stats import WEIGHTS, LayerStats, Stats
from harness.tensors import Tensor


def weight_sums(model: Model) -> Stats:
    """`harness.stats.WEIGHTS` of every MoE layer, float64 [E]; biases do not count.

    Raises UserError for experts that are not stored as plain floating-point numbers.
    """
    sums = {layer: {name: np.zeros(count) for name in WEIGHTS} for layer, count in model.experts.items()}
    for name, tensor in model.tensors.items():
        here = role(name, tensor.shape, model.experts)
        if here.kind == "expert" and len(tensor.shape) == 2:
            _add(sums[here.layer], [here.expert], tensor, name)
        elif here.kind == "fused" and len(tensor.shape) == 3:
            _add(sums[here.layer], range(tensor.shape[0]), tensor, name)
    return Stats({layer: LayerStats(count, 0, sums[layer]) for layer, count in model.experts.items()})


def _add(sums: dict[str, np.ndarray], experts: list[int] | range, tensor: Tensor, name: str) -> None:
    if tensor.dtype not in MERGEABLE:
        raise UserError(
            f"{name} is stored as {tensor.dtype}; scores of the weights need one of {', '.join(MERGEABLE)}. "
            "Choose a method that reads calibration statistics, such as reap."
        )
    size = tensor.nbytes // len(experts)
    for place, expert in enumerate(experts):
        values = decoded(tensor.read(place * size, (place + 1) * size), tensor.dtype).double()
        sums["weight_count"][expert] += values.numel()
        sums["weight_abs"][expert] += float(values.abs().sum())
        sums["weight_sq"][expert] += float(values.square().sum())
