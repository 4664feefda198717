"""The one place through which transformers routes every fused experts module, taken over for a while.

``ALL_EXPERTS_FUNCTIONS`` maps names to functions of (experts module, hidden [N, H], chosen experts [N, k], gates
[N, k]) -> [N, H]. Whoever wants to see or change what experts do registers one there, and gives the place back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from harness import llama4
from harness.errors import UserError

NAME = "taken_over"
ExpertsFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@contextmanager
def experts_run_through(
    model: PreTrainedModel, function: ExpertsFunction, gated_inputs: bool = False
) -> Iterator[None]:
    """Within this context the model's experts are computed by ``function``; afterwards as before, also after an error.

    gated_inputs: whether it heeds ``gates_inputs`` of the experts module: that the gates multiply what goes into the
    experts, not what comes out, as in Llama-4.

    Raises UserError if the architecture does not use the seam.
    """
    if gated_inputs and llama4.blocks(model):
        with llama4.led_through(model, function):
            yield
        return
    before = model.config._experts_implementation
    ALL_EXPERTS_FUNCTIONS.register(NAME, function)
    try:
        use(model, NAME)
        yield
    finally:
        use(model, before)
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop(NAME, None)  # or it would keep the model in memory


def hook_routers(
    model: PreTrainedModel, note: Callable[[nn.Module, Tensor], None], needed_by: str
) -> Iterator[RemovableHandle]:
    """Hooks that call ``note`` with each router and its raw logits [tokens, E].

    needed_by: who needs them and what else can be done, the end of the message. Raises UserError if the model does not
    say where they are.
    """
    said = (getattr(part, "_can_record_outputs", None) or {} for part in (model, trunk(model), decoder(model)))
    recorder = next((known["router_logits"] for known in said if "router_logits" in known), None)
    if recorder is None:
        raise UserError(f"{type(model).__name__} does not say where its router logits are, which {needed_by}")
    target, position = getattr(recorder, "target_class", recorder), getattr(recorder, "index", 0)
    called = getattr(recorder, "layer_name", None)  # where the class alone does not say it: Jamba's is any linear layer

    def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        logits = output[position] if isinstance(output, tuple) else output
        note(module, logits.reshape(-1, logits.shape[-1]))

    for name, module in model.named_modules():
        if isinstance(module, target) and (called is None or f".{called}." in f".{name}."):
            yield _scorer(module).register_forward_hook(hook)


def _scorer(router: nn.Module) -> nn.Module:
    """What makes a router's raw logits: its linear layer, where it has one; what it gives itself may be probabilities,
    as in Gemma 4.
    """
    linear = [part for part in router.modules() if isinstance(part, nn.Linear)]
    return linear[0] if len(linear) == 1 else router


def trunk(model: PreTrainedModel) -> nn.Module:
    """All of it but the output head: from token ids to the last hidden states."""
    inner = model.base_model if model.base_model is not model else model.model  # Llama-4 gives itself
    assert isinstance(inner, nn.Module)
    return inner


def decoder(model: PreTrainedModel) -> nn.Module:
    """The part of it that reads text: in a model that also sees or hears, one of several."""
    return next((part for part in (model.get_decoder(), trunk(model)) if hasattr(part, "layers")), model)


def use(model: PreTrainedModel, implementation: str) -> None:
    """Compute the model's experts by this registered implementation, such as ``grouped_mm``. Raises UserError."""
    try:
        model.set_experts_implementation(implementation)
    except ValueError as error:
        raise UserError(
            f"The experts of {type(model).__name__} do not go through transformers' experts interface, so they can be "
            f"neither observed nor trained here: {error}"
        ) from error
