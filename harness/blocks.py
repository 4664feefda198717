"""MoE blocks of a model in memory: where they are, and a plan carried out on one of them.

The same as exporting the plan and loading the checkpoint (a test compares the two), for one layer and without the disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.align import unit_orders
from harness.errors import UserError
from harness.plan import LayerPlan, Source
from harness.roles import EXPERT_COUNT, layer_index, role


def moe_blocks(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The module that holds router and experts, by layer index: the parent of each fused experts module."""
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if name.endswith(".experts") and hasattr(module, "num_experts") and layer_index(name) >= 0:
            found[layer_index(name)] = model.get_submodule(name.rpartition(".")[0])
    return dict(sorted(found.items()))


def expert_counts(model: PreTrainedModel) -> dict[int, int]:
    """Experts of each MoE layer."""
    return {layer: int(block.experts.num_experts) for layer, block in moe_blocks(model).items()}  # type: ignore[union-attr, arg-type]


def compress(model: PreTrainedModel, layers: Mapping[int, LayerPlan]) -> None:
    """Carry a plan out on a model in memory, whose weights are in the type they are stored in, so that merged experts
    are rounded as an export rounds them. Layers without a plan of their own stay as they are.
    """
    for layer, block in moe_blocks(model).items():
        if layer in layers and not layers[layer].is_identity:
            compress_block(block, layer, layers[layer])


@torch.no_grad()
def compress_block(block: nn.Module, layer: int, plan: LayerPlan) -> None:
    """Carry out the plan of one layer on its block: experts dropped or mixed, router rows selected, counts changed."""
    experts = len(plan.routes)
    orders = _unit_orders(block.experts, plan) if plan.align else {}  # type: ignore[arg-type]
    tensors = [*block.named_parameters(), *block.named_buffers()]
    routers = 0
    for name, tensor in tensors:
        kind = role(f"layers.{layer}.block.{name}", tensor.shape, {layer: experts}).kind
        if kind == "fused":
            _replace(block, name, _mixed(tensor, plan, name.rpartition(".")[2], orders))
        elif kind == "router":
            rows = torch.tensor(plan.kept_rows, device=tensor.device)
            _replace(block, name, tensor.index_select(0 if tensor.shape[0] == experts else 1, rows))
            routers += 1
    assert routers, f"{type(block).__name__} of layer {layer} has no router that is known as one"
    for module in block.modules():
        for count in EXPERT_COUNT:
            if getattr(module, count, None) == experts:
                setattr(module, count, len(plan.kept_rows))


def _replace(block: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = block.get_submodule(owner)
    if attribute in module._parameters:
        setattr(module, attribute, nn.Parameter(value, requires_grad=False))
    else:
        setattr(module, attribute, value)


def _mixed(tensor: Tensor, plan: LayerPlan, part: str, orders: dict[int, Tensor]) -> Tensor:
    """The new rows [rows, ...] of a fused tensor [E, ...]: one per kept router row, its slot's weighted mean."""
    slots = [_mean(tensor, sources, part, orders) for sources in plan.slots]
    return torch.stack([slots[plan.routes[row]] for row in plan.kept_rows])  # type: ignore[index]


def _mean(tensor: Tensor, sources: Sequence[Source], part: str, orders: dict[int, Tensor]) -> Tensor:
    if len(sources) == 1:
        return tensor[sources[0].expert]
    total = torch.zeros_like(tensor[0], dtype=torch.float32)
    for source in sources:
        total += source.weight * _ordered(tensor[source.expert], part, orders.get(source.expert)).float()
    return total.to(tensor.dtype)


def _ordered(matrix: Tensor, part: str, order: Tensor | None) -> Tensor:
    """An expert's matrix with its hidden units in another order."""
    if order is None:
        return matrix
    if part == "down_proj":
        return matrix[:, order]
    assert part == "gate_up_proj", part
    return matrix[torch.cat([order, order + len(order)])]


def _unit_orders(experts: nn.Module, plan: LayerPlan) -> dict[int, Tensor]:
    """For every expert that is merged into a weightier one: the order of its hidden units that matches the other's."""
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if (
        gate_up is None
        or down is None
        or getattr(experts, "is_transposed", False)
        or getattr(experts, "has_bias", False)
    ):
        raise UserError(
            f"Hidden units of {type(experts).__name__} cannot be aligned: its experts are not plain gate, up and down "
            "matrices. Merge without alignment."
        )
    width = down.shape[2]

    def parts(expert: int) -> list[Tensor]:
        return [gate_up[expert, :width], gate_up[expert, width:], down[expert].T]

    return unit_orders(plan, parts)
