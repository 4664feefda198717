"""One pass over the calibration tokens: every method's statistics, from what the model really did.

transformers routes every modern MoE block through one seam (`harness.seam`): a function that receives the experts
module, its input, the selected expert ids and the gate weights the model multiplies with (renormalised, scaled,
sigmoid, correction bias, groups: all already applied). Ours stands there for the length of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from harness import sums
from harness.blocks import compress_block, moe_blocks
from harness.errors import StageError, UserError
from harness.models import layer_index
from harness.plan import LayerPlan
from harness.residual import ResidualHooks
from harness.seam import experts_run_through, hook_routers
from harness.stats import EXTRAS, MAXIMA, LayerStats, Stats

Batches = Iterable[tuple[Tensor, Tensor]]  # token ids and attention mask, both int64 [B, T]


def calibrate(
    model: PreTrainedModel, batches: Batches, extras: frozenset[str] = frozenset(), routing: str = "actual"
) -> Stats:
    """Gather the statistics of every MoE layer.

    batches: pairs of token ids and attention mask, both int64 [B, T]; masked tokens (0) count for nothing.
    extras: which of `harness.stats.EXTRAS` to gather besides the routed sums.
    routing: ``actual``, the experts and gates the model really used, or ``paper``, those that REAP's published code
    takes instead (`harness.sums.paper_routing`).
    Raises UserError if the architecture does not use the seam, StageError at the first layer where something is not
    finite: what comes in, the router's logits or gates, the experts' outputs; and for the model's own logits.
    """
    observer = Observer(model, extras, routing)
    observer.watch(batches)
    if not observer.layers:
        raise _unobservable(model)
    return Stats({index: layer.finish() for index, layer in sorted(observer.layers.items())})


def calibrate_in_sequence(
    model: PreTrainedModel,
    batches: Batches,
    extras: frozenset[str],
    routing: str,
    decide: Callable[[int, LayerStats], LayerPlan],
) -> dict[int, LayerPlan]:
    """Layer by layer: observe a layer behind the layers already compressed, ``decide`` its plan, compress it in memory.

    The model is changed. Costs one forward up to each layer: half as many full passes as there are layers.
    """
    batches = list(batches)
    plans: dict[int, LayerPlan] = {}
    for layer, block in moe_blocks(model).items():
        observer = Observer(model, extras, routing, only=layer)
        observer.watch(batches)
        if layer not in observer.layers:
            raise _unobservable(model)
        plans[layer] = decide(layer, observer.layers[layer].finish())
        compress_block(block, layer, plans[layer])
    return plans


def _unobservable(model: PreTrainedModel) -> UserError:
    return UserError(
        f"{type(model).__name__} does not route its experts through transformers' experts interface, so its experts "
        "cannot be observed. Architectures with fused experts modules of transformers 5 can."
    )


@dataclass
class Accumulator:
    """Running float64 sums of one layer, on the device of the model."""

    experts: int
    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            combine = torch.maximum if name in MAXIMA else torch.add
            self.sums[name] = combine(self.sums[name], value) if name in self.sums else value

    def finish(self) -> LayerStats:
        return LayerStats(self.experts, self.tokens, {k: v.cpu().numpy() for k, v in self.sums.items()})


class _LayerSeen(Exception):  # noqa: N818 - not an error
    """The layer that was to be observed has been; the rest of the forward pass is not needed."""


class Observer:
    """Stands in for the model's experts function and adds up what passes through it.

    only: the one layer to observe; the pass ends there.
    """

    def __init__(
        self, model: PreTrainedModel, extras: frozenset[str], routing: str = "actual", only: int | None = None
    ) -> None:
        assert extras <= set(EXTRAS), extras
        assert routing in ("actual", "paper"), routing
        self.model = model
        self.extras = extras
        self.routing = routing
        self.only = only
        self.renormalise = bool(getattr(model.config.get_text_config(), "norm_topk_prob", False))  # as published
        self.layers: dict[int, Accumulator] = {}
        self.mask: Tensor | None = None
        self.logits: dict[int, Tensor] = {}
        self.index_of = {module: layer_index(name) for name, module in model.named_modules()}
        self.residual = ResidualHooks(model)

    @property
    def reads_logits(self) -> bool:
        return self.routing == "paper" or bool(self.extras & {"logit_sum", "logit_gram", "all_gated_output_sum"})

    def watch(self, batches: Batches) -> None:
        """Run the model over the batches and add up."""
        with self.attached(), torch.no_grad():
            for ids, mask in batches:
                self.mask = mask.bool().flatten()
                device = self.model.device
                try:
                    found = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
                except _LayerSeen:
                    continue
                if not found.logits.isfinite().all(dim=-1).flatten().cpu()[self.mask].all():
                    raise _not_finite("behind the last layer", "the logits")

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within this context the model's experts run through `forward` and its routers' logits are seen."""
        hooks = list(self._hook_routers()) if self.reads_logits else []
        hooks += list(self.residual.attach()) if "gate_norm_turn" in self.extras else []
        try:
            with experts_run_through(self.model, self.forward):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook_routers(self) -> Iterator[RemovableHandle]:
        def note(router: nn.Module, logits: Tensor) -> None:
            self.logits[self.index_of[router]] = logits

        needed_by = (
            "routing=paper and some methods need. Choose routing=actual and a method that reads routed statistics "
            "only, such as reap."
        )
        return hook_routers(self.model, note, needed_by)

    def forward(self, experts: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The experts function. hidden [N, H], index [N, k] expert ids, weight [N, k] gates; returns [N, H]."""
        layer = self.index_of[experts]
        outputs = sums.routed_outputs(experts, hidden, index)
        if self.only is None or self.only == layer:
            assert self.mask is not None and len(self.mask) == len(hidden), "the experts see every token of the batch"
            mask = self.mask.to(hidden.device)
            logits = self.logits.pop(layer)[mask] if self.reads_logits else None
            routed: tuple[Tensor, ...] = (index[mask], weight[mask], outputs[mask])
            if self.routing == "paper":
                assert logits is not None
                routed = self._as_published(experts, hidden[mask], logits, index.shape[1])
            self._observe(experts, hidden[mask], mask, routed, logits)
            if self.only == layer:
                raise _LayerSeen
        return (outputs * weight.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)

    def _as_published(self, experts: nn.Module, hidden: Tensor, logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
        index, weight = sums.paper_routing(logits, top_k, self.renormalise)
        return index, weight, sums.routed_outputs(experts, hidden, index)

    def _observe(
        self, experts: nn.Module, hidden: Tensor, mask: Tensor, routed: tuple[Tensor, ...], logits: Tensor | None
    ) -> None:
        """Add up one batch of one layer; every tensor but ``mask`` holds unmasked tokens only."""
        index, weight, outputs = routed
        layer, count = self.index_of[experts], int(experts.num_experts)  # type: ignore[arg-type]
        here = self.layers.setdefault(layer, Accumulator(count))
        here.tokens += len(hidden)
        values = {
            "the hidden states that come to the experts": hidden,
            "the router's logits": None if logits is None else logits.masked_fill(logits == -torch.inf, 0),  # barred
            "the router's gates": weight,
            "the experts' outputs": outputs,
        }
        _check_finite(f"layer {layer}", {name: value for name, value in values.items() if value is not None})
        found = sums.routed_sums(index, weight, outputs, count)
        _check_finite(f"layer {layer}", {"the experts' gates and norms": found["gate_sq_norm_sq"]})
        here.add(found)
        extra: dict[str, Callable[[], Tensor]] = {
            "coactivation": lambda: sums.coactivation(index, count),
            "gated_norm_gram": lambda: sums.gated_norm_gram(index, weight, outputs, count),
            "gated_output_gram": lambda: sums.gated_output_gram(index, weight, outputs, count),
            "gate_norm_turn": lambda: sums.gate_norm_turn(
                index, weight, outputs, self.residual.pop(layer, mask), count
            ),
            "logit_sum": lambda: _known(logits).double().sum(dim=0),
            "logit_gram": lambda: _known(logits).double().T @ _known(logits).double(),
        }
        here.add({name: extra[name]() for name in self.extras & extra.keys()})
        self._observe_all_experts(here, experts, hidden, logits)

    def _observe_all_experts(
        self, here: Accumulator, experts: nn.Module, hidden: Tensor, logits: Tensor | None
    ) -> None:
        wanted = self.extras & {"all_output_sum", "all_gated_output_sum"}
        if wanted:
            gate = _known(logits).float().softmax(dim=-1) if "all_gated_output_sum" in wanted else None
            plain, gated = sums.all_output_sums(experts, hidden, gate, here.experts)
            found = {"all_output_sum": plain, "all_gated_output_sum": gated}
            here.add({name: found[name] for name in wanted})


def _check_finite(where: str, values: Mapping[str, Tensor]) -> None:
    """Raise StageError for the first of these tensors that holds NaN or infinity; an earlier one spoils the later."""
    are = torch.stack([value.isfinite().all() for value in values.values()]).tolist()  # one wait for the device
    for name, is_finite in zip(values, are, strict=True):
        if not is_finite:
            raise _not_finite(where, name)


def _not_finite(where: str, what: str) -> StageError:
    return StageError(
        f"Calibration stopped: {where}, {what} are not all finite (there is NaN or infinity). The weights are damaged, "
        "or values overflow in this type: check the files, or calibrate in float32 (calibration.dtype=float32)."
    )


def _known(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits


def packed_batches(tokens: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split packed tokens [S, T] into batches for `calibrate`; packed sequences have no padding."""
    for start in range(0, len(tokens), batch_size):
        ids = torch.from_numpy(tokens[start : start + batch_size])
        yield ids, torch.ones_like(ids)
