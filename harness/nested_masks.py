"""Masks that make a full-size sorted model compute what a smaller, nested one computes (`harness.nested`).

They prove that a slice is what was meant, and they may lie between 0 and 1 and carry gradients, which is how a budget
router learns where to cut (`harness.elastic_router`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from harness.blocks import moe_blocks
from harness.nested import AXES, Budget, check_budget, dims, refused, sizes
from harness.roles import layer_index


@dataclass(frozen=True)
class Masks:
    """A number in [0, 1] for each component: experts[layer] [E], width[layer] [F] (the same for all its experts),
    hidden [H], heads[layer] [K]. 0 and 1 make a slice; what lies between is for learning where to cut.
    """

    experts: Mapping[int, Tensor]
    width: Mapping[int, Tensor]
    hidden: Tensor
    heads: Mapping[int, Tensor]

    @classmethod
    def full(cls, model: PreTrainedModel) -> Masks:
        """1 for every component."""
        return cls.of(model, Budget("full"))

    @classmethod
    def of(cls, model: PreTrainedModel, budget: Budget) -> Masks:
        """The mask of a budget: 1 for the first components of each axis."""
        check_budget(model, budget)
        size = sizes(model)
        kept = budget.kept(size)
        first = {
            axis: (torch.arange(size[axis]) < kept[axis]).to(device=model.device, dtype=model.dtype) for axis in AXES
        }
        moe, every = list(moe_blocks(model)), range(model.config.num_hidden_layers)
        return cls(
            dict.fromkeys(moe, first["experts"]),
            dict.fromkeys(moe, first["width"]),
            first["hidden"],
            dict.fromkeys(every, first["heads"]),
        )


@contextmanager
def masked(model: PreTrainedModel, budget: Budget) -> Iterator[None]:
    """Within this context the full-size sorted model computes what its slice computes."""
    with masking(model, Masks.of(model, budget)):
        yield


@contextmanager
def masking(model: PreTrainedModel, masks: Masks) -> Iterator[None]:
    """Within this context the model computes under the masks:

    * experts: Theta' = Theta + log m on the router's logits, before top-k: an expert of mask 0 is never chosen;
    * width: m times each expert's hidden units (on the columns of down_proj, which is the same);
    * hidden: every norm's output is masked and its statistics are over active channels, so that nothing reads the
      others, whatever the residual stream holds there;
    * heads: m times what goes into the output projection.

    Gradients reach masks and weights.
    """
    dims(model)
    norms, outputs = hidden_norms(model), output_projections(model)
    bias = {id(block.gate.weight): _log(masks.experts[layer]) for layer, block in moe_blocks(model).items()}  # type: ignore[union-attr]
    with ExitStack() as stack:
        for norm in norms.values():
            stack.callback(norm.register_forward_hook(_active_norm(masks.hidden)).remove)
        for layer, output in outputs.items():
            stack.callback(output.register_forward_pre_hook(_scaled_heads(masks.heads[layer])).remove)
        for layer, block in moe_blocks(model).items():
            stack.callback(_scale_units(block.experts, masks.width[layer]))  # type: ignore[arg-type]
        stack.enter_context(_Biased(bias))
        yield


class _Biased(TorchFunctionMode):
    """Adds a bias to linear maps by these weights: routers have none of their own."""

    def __init__(self, bias: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.bias = bias

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        bias = self.bias.get(id(args[1])) if function is nn.functional.linear and len(args) > 1 else None
        return found if bias is None else found + bias.to(found)


def _log(mask: Tensor) -> Tensor:
    """log m, and -inf without a gradient at 0."""
    return torch.where(mask > 0, mask.clamp_min(torch.finfo(mask.dtype).tiny).log(), -math.inf)


def _active_norm(mask: Tensor) -> Callable[..., Tensor]:
    def hook(norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden = args[0].to(torch.promote_types(args[0].dtype, torch.float32))  # as the model's own norm does
        active = mask.to(hidden)
        variance = (hidden.square() * active).sum(-1, keepdim=True) / active.sum()
        scaled = hidden * torch.rsqrt(variance + norm.variance_epsilon) * active
        return norm.weight * scaled.to(args[0].dtype)

    return hook


def _scaled_heads(mask: Tensor) -> Callable[..., tuple[Tensor]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        apart = args[0].unflatten(-1, (len(mask), -1))
        return ((apart * mask.to(apart)[:, None]).flatten(-2),)

    return hook


def _scale_units(experts: nn.Module, mask: Tensor) -> Callable[[], None]:
    """Put down_proj times the mask in its place; returns what undoes it."""
    whole = experts._parameters.pop("down_proj")
    assert whole is not None
    experts.down_proj = whole * mask.to(whole)

    def undo() -> None:
        del experts.down_proj
        experts._parameters["down_proj"] = whole

    return undo


def hidden_norms(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The RMSNorms of the residual stream, by name. Raises UserError if they are of another kind."""
    found = {
        name: module
        for name, module in model.named_modules()
        if name == "model.norm" or name.endswith(("input_layernorm", "post_attention_layernorm"))
    }
    if not all(hasattr(norm, "variance_epsilon") for norm in found.values()):
        raise refused(model, "its norms are not RMSNorms")
    return found


def output_projections(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention's output projection of every layer, whose input is what the heads say, one after another."""
    return {layer_index(name): module for name, module in model.named_modules() if name.endswith("self_attn.o_proj")}
