"""Nested models: weights sorted by importance, so that a smaller model is a prefix of the larger one on every axis.

The idea is Star Elastic's (arXiv 2605.07182): sort the components of each axis once, most important first. The full
model computes what it did before, and any budget is cut out as a prefix, without touching a value.

Axes: ``experts`` of each MoE layer; ``width``, the hidden units of each routed expert; ``hidden``, the channels of the
residual stream, which embedding, head, norms, routers, attention and experts share, so they have one order; ``heads``,
key-value heads with the query heads that read them. A budget keeps the same number in every layer: stock engines know
one expert count and one width.

A mask does what a slice does only if RMSNorm averages over the channels that are left ("active" statistics): averaging
over all of them, with zeros, gives other numbers. Everything here uses active statistics, and the manifest says so.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.blocks import moe_blocks
from harness.errors import UserError
from harness.roles import EXPERT_COUNT, layer_index, width_field

NORM_MODE = "active"
AXES = ("experts", "width", "hidden", "heads")

# The axes of every parameter that is known, dimension by dimension: (axis, how often it lies there one after another).
# "" is no axis. What follows a name's last dot-separated parts decides; a model with any other parameter is refused.
_FREE, _EXPERTS, _HIDDEN, _HEADS = ("", 1), ("experts", 1), ("hidden", 1), ("heads", 1)
_KNOWN: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = (
    (r"embed_tokens\.weight|lm_head\.weight", (_FREE, _HIDDEN)),
    (r"\.(?:input_layernorm|post_attention_layernorm)\.weight|^model\.norm\.weight", (_HIDDEN,)),
    (r"self_attn\.[qkv]_proj\.weight", (_HEADS, _HIDDEN)),
    (r"self_attn\.[qkv]_proj\.bias", (_HEADS,)),
    (r"self_attn\.o_proj\.weight", (_HIDDEN, _HEADS)),
    (r"self_attn\.o_proj\.bias", (_HIDDEN,)),
    (r"self_attn\.[qk]_norm\.weight", (_FREE,)),
    (r"mlp\.gate\.weight", (_EXPERTS, _HIDDEN)),
    (r"mlp\.experts\.gate_up_proj", (_EXPERTS, ("width", 2), _HIDDEN)),
    (r"mlp\.experts\.down_proj", (_EXPERTS, _HIDDEN, ("width", 1))),
    (r"mlp\.(?:shared_expert\.)?(?:gate_proj|up_proj)\.weight|shared_expert_gate\.weight", (_FREE, _HIDDEN)),
    (r"mlp\.(?:shared_expert\.)?down_proj\.weight", (_HIDDEN, _FREE)),
)


@dataclass(frozen=True)
class Dim:
    """One dimension of a parameter: ``before`` blocks of the axis' components, each ``after`` elements long."""

    axis: str
    before: int = 1
    after: int = 1


@dataclass(frozen=True)
class Budget:
    """How many components of each axis a nested model keeps; None keeps all."""

    name: str
    experts: int | None = None
    width: int | None = None
    hidden: int | None = None
    heads: int | None = None

    def kept(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Components that are left of each axis."""
        return {axis: getattr(self, axis) if getattr(self, axis) is not None else sizes[axis] for axis in AXES}


@dataclass(frozen=True)
class NestedOrder:
    """Permutations, most important first, int64. experts[layer]: [E]. units[layer]: [E, F], of the expert that has that
    index before sorting. hidden: [H]. heads[layer]: [K], key-value heads.
    """

    experts: Mapping[int, np.ndarray]
    units: Mapping[int, np.ndarray]
    hidden: np.ndarray
    heads: Mapping[int, np.ndarray]

    @classmethod
    def identity(cls, model: PreTrainedModel) -> NestedOrder:
        """The order in which the model's components lie."""
        size, moe = sizes(model), list(moe_blocks(model))
        units = np.tile(np.arange(size["width"]), (size["experts"], 1))
        return cls(
            experts={layer: np.arange(size["experts"]) for layer in moe},
            units={layer: units for layer in moe},
            hidden=np.arange(size["hidden"]),
            heads={layer: np.arange(size["heads"]) for layer in range(model.config.num_hidden_layers)},
        )

    def digests(self) -> dict[str, str]:
        """A hash of each axis' order, for the manifest."""
        parts = {"experts": self.experts, "width": self.units, "hidden": {0: self.hidden}, "heads": self.heads}
        return {axis: _digest(orders) for axis, orders in parts.items()}


def _digest(orders: Mapping[int, np.ndarray]) -> str:
    text = b"".join(np.ascontiguousarray(orders[layer], dtype="<i8").tobytes() for layer in sorted(orders))
    return hashlib.sha256(text).hexdigest()


def descending(importance: np.ndarray) -> np.ndarray:
    """The order of the last axis from the highest importance down; of equal ones the lowest index first."""
    return np.argsort(-importance, axis=-1, kind="stable")


def expert_order(kept: Mapping[int, Sequence[int]]) -> np.ndarray:
    """The order [E] behind nested sets of kept experts: ``kept[count]`` for every count from some least one to E.

    The first are those of the smallest set, by index; then, count by count, the one that joins. Raises UserError if a
    set does not hold the smaller ones.
    """
    order: list[int] = []
    for count in sorted(kept):
        joined = sorted(set(kept[count]) - set(order))
        if len(order) + len(joined) != count or len(set(kept[count])) != count:
            raise UserError(
                f"The experts kept at {count} do not hold those kept at a smaller count, so no order of the experts "
                "gives both as prefixes. Choose a method whose plans nest, such as reap."
            )
        order += joined
    return np.array(order, dtype=np.int64)


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """Components of each axis: experts and width of the MoE layers, hidden channels, key-value heads.

    Raises UserError for a model without fused experts of plain gate, up and down matrices.
    """
    blocks = moe_blocks(model)
    shapes = {_expert_shape(model, block.experts) for block in blocks.values()}  # type: ignore[arg-type]
    if len(shapes) != 1:
        raise refused(model, f"its MoE layers have experts of the shapes {sorted(shapes) or 'none'}, not of one")
    experts, hidden, width = shapes.pop()
    return {"experts": experts, "width": width, "hidden": hidden, "heads": model.config.num_key_value_heads}


def _expert_shape(model: PreTrainedModel, experts: nn.Module) -> tuple[int, ...]:
    """[E, H, F] of a layer's experts."""
    down, gate_up = getattr(experts, "down_proj", None), getattr(experts, "gate_up_proj", None)
    if down is None or gate_up is None or getattr(experts, "is_transposed", False):
        raise refused(model, "its experts are not one gate_up_proj [E, 2F, H] and one down_proj [E, H, F]")
    return tuple(down.shape)


def refused(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"{type(model).__name__} cannot be sorted and sliced: {reason}. Models laid out as Qwen3-MoE, Qwen2-MoE or "
        "Mixtral can."
    )


def dims(model: PreTrainedModel) -> dict[str, tuple[Dim, ...]]:
    """Every parameter by name, with the axes of its dimensions. Tied parameters are there once.

    Raises UserError for a model that has a parameter or a stored buffer that is not known.
    """
    size = {**sizes(model), "": 1}
    found = {name: _dims(model, name, tensor.shape, size) for name, tensor in model.named_parameters()}
    if unknown := sorted(
        set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ):
        raise refused(model, f"it stores {unknown[0]}, which is not known")
    return found


def _dims(model: PreTrainedModel, name: str, shape: Sequence[int], size: Mapping[str, int]) -> tuple[Dim, ...]:
    axes = next((axes for pattern, axes in _KNOWN if re.search(pattern, name)), None)
    if axes is None or len(axes) != len(shape):
        raise refused(model, f"its parameter {name} {tuple(shape)} is not known")
    found = []
    for (axis, before), length in zip(axes, shape, strict=True):
        after, rest = divmod(length, before * size[axis])
        whole = axis in ("", "heads") or after == 1  # a head is many rows, an expert, unit or channel one
        if rest or not whole:
            raise refused(model, f"its parameter {name} {tuple(shape)} does not hold {size[axis]} {axis}")
        found.append(Dim(axis, before, after))
    if "_norm.weight" in name and shape[0] != head_size(model):
        raise refused(model, f"{name} normalises all heads together, so fewer heads would have other statistics")
    return tuple(found)


def head_size(model: PreTrainedModel) -> int:
    """Channels of one attention head."""
    attention = next(module for name, module in model.named_modules() if name.endswith(".self_attn"))
    return int(attention.head_dim)


@torch.no_grad()
def sort_model(model: PreTrainedModel, order: NestedOrder) -> None:
    """Permute the weights in place, in memory: component i of each axis becomes what was ``order[i]``. The model's
    output does not change. Raises UserError for a layout that is not known.
    """
    known = dims(model)
    for name, parameter in model.named_parameters():
        value, layer = parameter.data, layer_index(name)
        for place, dim in enumerate(known[name]):
            if dim.axis:
                value = _sorted(value, place, dim, order, layer)
        parameter.copy_(value)


def _sorted(value: Tensor, place: int, dim: Dim, order: NestedOrder, layer: int) -> Tensor:
    apart = value.unflatten(place, (dim.before, -1, dim.after))
    if dim.axis == "width":  # each expert has an order of its own, by its index after sorting
        rows = torch.from_numpy(order.units[layer][order.experts[layer]]).to(value.device)
        rows = rows.view(len(rows), *[1] * place, rows.shape[1], *[1] * (apart.dim() - place - 2))
        return torch.take_along_dim(apart, rows, dim=place + 1).flatten(place, place + 2)
    whole = {"experts": order.experts, "hidden": {layer: order.hidden}, "heads": order.heads}[dim.axis][layer]
    rows = torch.from_numpy(whole).to(value.device)
    return apart.index_select(place + 1, rows).flatten(place, place + 2)


def check_budget(model: PreTrainedModel, budget: Budget) -> None:
    """Raise UserError if the model has not so many components, or a token would be routed to more experts than left."""
    size, top_k = sizes(model), int(model.config.num_experts_per_tok)
    for axis, count in budget.kept(size).items():
        least = top_k if axis == "experts" else 1
        if not least <= count <= size[axis]:
            raise UserError(
                f"budget {budget.name!r} keeps {count} {axis} of {size[axis]}. Possible are {least} to {size[axis]}"
                f"{' (each token is routed to that many, top_k)' if axis == 'experts' and least > 1 else ''}."
            )


def views(model: PreTrainedModel, budget: Budget) -> dict[str, Tensor]:
    """The sorted model's parameters cut to the budget, by name: prefixes, through which gradients reach the whole."""
    check_budget(model, budget)
    kept = budget.kept(sizes(model))
    return {name: _prefix(parameter, dims, kept) for (name, parameter), dims in _with_dims(model)}


def _with_dims(model: PreTrainedModel) -> Iterator[tuple[tuple[str, nn.Parameter], tuple[Dim, ...]]]:
    known = dims(model)
    return ((item, known[item[0]]) for item in model.named_parameters())


def _prefix(value: Tensor, known: tuple[Dim, ...], kept: Mapping[str, int]) -> Tensor:
    for place, dim in enumerate(known):
        if dim.axis and value.shape[place] != dim.before * kept[dim.axis] * dim.after:
            apart = value.unflatten(place, (dim.before, -1, dim.after))
            value = apart.narrow(place + 1, 0, kept[dim.axis]).flatten(place, place + 2)
    return value.contiguous()


def skeleton(model: PreTrainedModel, budget: Budget) -> PreTrainedModel:
    """A model of the budget's size whose parameters are on the meta device, its buffers real: what `views` fit into."""
    check_budget(model, budget)
    with torch.device("meta"):
        small = type(model)(sliced_config(model, budget))
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        setattr(small.get_submodule(owner), attribute, buffer)
    small.set_experts_implementation(model.config._experts_implementation)
    return small.train(model.training)


def slice_model(model: PreTrainedModel, budget: Budget) -> PreTrainedModel:
    """The first components of each axis of a sorted model, as a model of its own with a config of its own."""
    small = skeleton(model, budget)
    small.load_state_dict({n: t.detach().clone() for n, t in views(model, budget).items()}, strict=False, assign=True)
    small.tie_weights()
    assert not any(parameter.is_meta for parameter in small.parameters())
    return small


def sliced_config(model: PreTrainedModel, budget: Budget) -> Any:
    """The model's config with the budget's counts, in whichever fields it has them."""
    size, config = sizes(model), copy.deepcopy(model.config)
    kept = budget.kept(size)
    for name in EXPERT_COUNT:
        if getattr(config, name, None) == size["experts"]:
            setattr(config, name, kept["experts"])
    setattr(config, known_width_field(vars(config)), kept["width"])
    config.head_dim = head_size(model)  # a config may leave it to be hidden size over heads, which it was
    config.hidden_size = kept["hidden"]
    config.num_attention_heads = config.num_attention_heads // size["heads"] * kept["heads"]
    config.num_key_value_heads = kept["heads"]
    return config


def known_width_field(config: Mapping[str, Any]) -> str:
    """As `harness.models.width_field`, of a layout that is known to have one."""
    field = width_field(config)
    assert field is not None
    return field


@dataclass(frozen=True)
class Term:
    """What one parameter adds to a model's size: ``coefficient`` times the sizes of ``axes``. layer: -1 outside layers.
    routed: its first axis is the experts, of which a token uses top-k.
    """

    layer: int
    coefficient: int
    axes: tuple[str, ...]
    routed: bool


def terms(model: PreTrainedModel) -> tuple[Term, ...]:
    """The parameter count as a polynomial of the axes' sizes: tied parameters count once."""
    found = []
    for (name, parameter), known in _with_dims(model):
        axes = tuple(dim.axis for dim in known if dim.axis)
        plain = [length for length, dim in zip(parameter.shape, known, strict=True) if not dim.axis]
        blocks = [dim.before * dim.after for dim in known if dim.axis]
        routed = ".experts." in name
        found.append(Term(layer_index(name), math.prod(plain) * math.prod(blocks), axes, routed))
    return tuple(found)


def parameters(model: PreTrainedModel, budget: Budget) -> tuple[int, int]:
    """(total, active) parameters at a budget; active: with top-k of each layer's experts, embedding and head whole."""
    kept, top_k = budget.kept(sizes(model)), int(model.config.num_experts_per_tok)
    total = active = 0
    for term in terms(model):
        count = term.coefficient * math.prod(kept[axis] for axis in term.axes)
        total += count
        active += count // kept["experts"] * top_k if term.routed else count
    return total, active


def manifest(model: PreTrainedModel, order: NestedOrder, budgets: Sequence[Budget], parent: str) -> dict[str, Any]:
    """What a sorted checkpoint is, as JSON: which orders, which budgets of how many parameters, of which parent."""
    counts = [parameters(model, budget) for budget in budgets]
    return {
        "nested": True,
        "norm_mode": NORM_MODE,
        "parent": parent,
        "sizes": sizes(model),
        "orders": order.digests(),
        "budgets": [
            {**asdict(budget), "parameters": total, "active_parameters": active}
            for budget, (total, active) in zip(budgets, counts, strict=True)
        ],
    }
