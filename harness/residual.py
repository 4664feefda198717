"""The residual stream in front of each MoE block, seen by hooks, whatever the architecture calls its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.blocks import moe_blocks
from harness.errors import UserError
from harness.roles import layer_index


class ResidualHooks:
    """In a pre-norm decoder layer the MoE block's input is what a norm made of the residual stream: the norm is the
    module of the layer whose output the block receives, the stream what that module received.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.made: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: output and input of the module that ran last
        self.stream: dict[int, Tensor] = {}

    def attach(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        blocks = moe_blocks(self.model)
        for name, module in self.model.named_modules():
            layer = layer_index(name)
            if layer not in blocks or name.rpartition(".")[2] != str(layer):
                continue
            for child in module.children():
                if child is blocks[layer]:
                    yield child.register_forward_pre_hook(self._before_block(layer))
                else:
                    yield child.register_forward_hook(self._after_child(layer))

    def _after_child(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(output, Tensor):
                self.made[layer] = (output, args[0])

        return hook

    def _before_block(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            output, stream = self.made.pop(layer, (None, None))
            if output is None or stream is None or not args or args[0] is not output:
                raise UserError(
                    f"{type(self.model).__name__}: no norm of layer {layer} gives its MoE block its input, so the "
                    "residual stream is not known there. Choose a method that does not need it (gate_norm_turn)."
                )
            self.stream[layer] = stream.reshape(-1, stream.shape[-1])

        return hook
