"""Layer reconstruction error: how far a plan moves the output of each MoE block, on tokens that are in no sum.

For one layer, with Y the block's output on held-out calibration tokens (shared experts included) and Y' that of the
block after the plan, tokens routed anew, both fed the original model's hidden states:

    error = || Y' - Y ||^2 / || Y ||^2        (squared Frobenius norms over tokens and channels)

0 for an unchanged layer, 1 for one that says nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.blocks import compress_block, moe_blocks
from harness.calibrate import Batches
from harness.errors import StageError
from harness.plan import LayerPlan

TOKENS_AT_ONCE = 4096


class Reconstruction:
    """The MoE blocks of a model, and what goes into each of them on held-out tokens."""

    def __init__(self, model: PreTrainedModel, batches: Batches) -> None:
        self.blocks = moe_blocks(model)
        self.inputs = block_inputs(model, self.blocks, batches)
        self.known: dict[tuple[int, LayerPlan], float] = {}

    def error(self, layer: int, plan: LayerPlan) -> float:
        """The relative squared error of one layer under its plan. Raises StageError if it is not finite."""
        if (layer, plan) not in self.known:
            self.known[layer, plan] = 0.0 if plan.is_identity else self._measure(layer, plan)
        return self.known[layer, plan]

    def errors(self, plans: Mapping[int, LayerPlan]) -> dict[int, float]:
        return {layer: self.error(layer, plan) for layer, plan in plans.items()}

    @torch.no_grad()
    def _measure(self, layer: int, plan: LayerPlan) -> float:
        block = self.blocks[layer]
        compressed = copy.deepcopy(block)
        compress_block(compressed, layer, plan)
        difference = size = 0.0
        for tokens in self.inputs[layer].split(TOKENS_AT_ONCE):
            before, after = (_output(which, tokens) for which in (block, compressed))
            difference += float((after - before).square().sum())
            size += float(before.square().sum())
        if not 0 <= difference / max(size, 1e-300) < float("inf"):
            raise StageError(f"Reconstruction: layer {layer} gives outputs that are not finite.")
        return difference / max(size, 1e-300)


def block_inputs(model: PreTrainedModel, blocks: Mapping[int, nn.Module], batches: Batches) -> dict[int, Tensor]:
    """Hidden states [tokens, H] that enter each block; masked tokens are left out."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in blocks}

    def note(layer: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Tensor, ...], given: dict[str, Tensor]) -> None:
            hidden = args[0] if args else next(iter(given.values()))
            seen[layer].append(hidden.flatten(0, -2))

        return hook

    hooks = [block.register_forward_pre_hook(note(layer), with_kwargs=True) for layer, block in blocks.items()]
    try:
        with torch.no_grad():
            masks = []
            for ids, mask in batches:
                masks.append(mask.bool().flatten())
                model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        layer: torch.cat([hidden[mask.to(hidden.device)] for hidden, mask in zip(parts, masks, strict=True)])
        for layer, parts in seen.items()
    }


def _output(block: nn.Module, tokens: Tensor) -> Tensor:
    """What the block makes of tokens [N, H], float64 [N, H]."""
    output = block(tokens.unsqueeze(0))
    hidden = output[0] if isinstance(output, tuple) else output
    return hidden.reshape(tokens.shape).double()
