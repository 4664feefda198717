"""Layer reconstruction error: how far a plan moves the output of each MoE block, on tokens that are in no sum.

For one layer, with Y the block's output on held-out calibration tokens (shared experts included) and Y' that of the
block after the plan, tokens routed anew, both fed the original model's hidden states:

    error = || Y' - Y ||^2 / || Y ||^2        (squared Frobenius norms over tokens and channels)

0 for an unchanged layer, 1 for one that says nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.blocks import compress_block, moe_blocks
from harness.calibrate import Batch, Batches
from harness.errors import StageError
from harness.parking import Parking
from harness.plan import LayerPlan
from harness.streaming import Passes, Streamed

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
        parts = self.inputs[layer].split(TOKENS_AT_ONCE)
        return _relative(layer, ((_output(block, tokens), _output(compressed, tokens)) for tokens in parts))


def streamed_errors(
    streamed: Streamed, batches: Sequence[Batch], plans: Mapping[int, LayerPlan], parking: Parking
) -> dict[int, float]:
    """As `Reconstruction.errors`, to the last bit, of a model whose layers are read from disk one at a time. The model
    is used up: its layers are compressed in place.
    """
    blocks = moe_blocks(streamed.model)
    passes = Passes(streamed, batches, parking)
    errors: dict[int, float] = {}
    with _noted(blocks) as seen:
        for index in passes.layers(lambda batch: None):
            if index in blocks:
                inputs = _unmasked(seen.pop(index), [mask for _, mask in batches])
                errors[index] = _error_in_place(blocks[index], index, plans[index], inputs)
    return errors


@torch.no_grad()
def _error_in_place(block: nn.Module, layer: int, plan: LayerPlan, inputs: Tensor) -> float:
    if plan.is_identity:
        return 0.0
    parts = inputs.split(TOKENS_AT_ONCE)
    before = [_output(block, tokens) for tokens in parts]
    compress_block(block, layer, plan)
    return _relative(layer, ((one, _output(block, tokens)) for one, tokens in zip(before, parts, strict=True)))


def _relative(layer: int, outputs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Of outputs before and after, [N, H] each, part by part."""
    difference = size = 0.0
    for before, after in outputs:
        difference += float((after.double() - before.double()).square().sum())
        size += float(before.double().square().sum())
    if not 0 <= difference / max(size, 1e-300) < float("inf"):
        raise StageError(f"Reconstruction: layer {layer} gives outputs that are not finite.")
    return difference / max(size, 1e-300)


def block_inputs(model: PreTrainedModel, blocks: Mapping[int, nn.Module], batches: Batches) -> dict[int, Tensor]:
    """Hidden states [tokens, H] that enter each block; masked tokens are left out."""
    masks = []
    with _noted(blocks) as seen, torch.no_grad():
        for ids, mask in batches:
            masks.append(mask)
            model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    return {layer: _unmasked(parts, masks) for layer, parts in seen.items()}


def _unmasked(parts: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    kept = [hidden[mask.bool().flatten().to(hidden.device)] for hidden, mask in zip(parts, masks, strict=True)]
    return torch.cat(kept)


@contextmanager
def _noted(blocks: Mapping[int, nn.Module]) -> Iterator[dict[int, list[Tensor]]]:
    """Within this context, what enters each block: hidden states [B T, H], batch after batch."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in blocks}

    def note(layer: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Tensor, ...], given: dict[str, Tensor]) -> None:
            hidden = args[0] if args else next(iter(given.values()))
            if layer in seen:  # what was taken out is no longer noted
                seen[layer].append(hidden.flatten(0, -2))

        return hook

    hooks = [block.register_forward_pre_hook(note(layer), with_kwargs=True) for layer, block in blocks.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _output(block: nn.Module, tokens: Tensor) -> Tensor:
    """What the block makes of tokens [N, H]: [N, H], in the model's type."""
    output = block(tokens.unsqueeze(0))
    hidden = output[0] if isinstance(output, tuple) else output
    return hidden.reshape(tokens.shape)
