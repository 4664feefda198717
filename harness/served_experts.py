"""Which experts a running engine really holds, from its tensors, and whether these are the plan's.

vLLM loads a checkpoint with missing or left-over experts without a word, and an engine that turns from plan to plan
could keep the last one's. So each worker counts (`count_experts`), and what it finds is compared with the plan before
anything is scored (`check_experts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import StageError
from harness.plan import LayerPlan, Plan
from harness.roles import layer_index, role

if TYPE_CHECKING:
    from torch import nn


def count_experts(model: nn.Module, layer: int, runner: Any) -> dict[str, Any]:
    """Of one MoE layer of a model as vLLM builds it. runner: the layer's MoE module there.

    stored: experts that this worker holds, the first axis of its largest tensor. sharded: whether other workers hold
    others. rows: of the router; None where it is not known as one. barred: rows that a mask closes.
    """
    largest = max(runner.routed_experts.parameters(), key=lambda tensor: tensor.numel())
    rows = set(_router_rows(model, layer))
    assert len(rows) <= 1, f"the routers of layer {layer} have {sorted(rows)} rows"
    closed = getattr(runner.router, "closed", None)
    return {
        "stored": int(largest.shape[0]),
        "sharded": bool(runner.routed_experts.use_ep),
        "rows": next(iter(rows), None),
        "barred": [] if closed is None else closed.isneginf().nonzero().flatten().tolist(),
    }


def _router_rows(model: nn.Module, layer: int) -> Iterator[int]:
    for place, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False) if layer_index(place) == layer else ():
            if role(f"{place}.{name}", (), {layer: 0}).kind != "router":
                continue
            if name.endswith("bias"):
                yield int(tensor.shape[-1])
            else:  # on CPUs vLLM packs a router's weights elsewhere and leaves an empty tensor in their place
                yield int(tensor.shape[0] or module.output_size)


def check_experts(found: Sequence[Mapping[str, Mapping[str, Any]]], plan: Plan, masked: bool) -> None:
    """Raise StageError unless what is served has the experts that the plan leaves, in every MoE layer.

    found: what each worker says of its layers (`count_experts`, by layer). masked: whether all
    experts are there and the routers are barred from those that the plan drops.
    """
    assert plan.only_prunes or not masked, "a mask cannot merge"
    layers: dict[int, list[Mapping[str, Any]]] = {}
    for worker in found:
        for name, here in worker.items():
            layers.setdefault(int(name), []).append(here)
    if layers.keys() != plan.layers.keys():
        raise StageError(
            f"The server holds experts in layers {sorted(layers)}, and the plan's are {sorted(plan.layers)}."
        )
    for layer, parts in layers.items():
        _check_experts_of(layer, parts, plan.layers[layer], masked)


def _check_experts_of(layer: int, parts: Sequence[Mapping[str, Any]], plan: LayerPlan, masked: bool) -> None:
    total = len(plan.routes)
    rows, slots = (total, total) if masked else (len(plan.kept_rows), len(plan.slots))
    barred = sorted(set(range(total)) - set(plan.kept_rows)) if masked else []
    stored = sum(part["stored"] for part in parts) if parts[0]["sharded"] else parts[0]["stored"]
    for part in parts:
        known = rows if part["rows"] is None else part["rows"]
        served = {"router rows": known, "experts": stored, "barred from": list(part["barred"])}
        expected = {"router rows": rows, "experts": slots, "barred from": barred}
        for what, value in expected.items():
            if served[what] != value:
                raise StageError(
                    f"What is served is not the plan: layer {layer} has {what} {served[what]} there, and by the plan "
                    f"{value}. Nothing is scored."
                )
