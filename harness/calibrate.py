"""One pass over the calibration tokens: every method's statistics, from what the model really did.

transformers routes every modern MoE block through one seam (`harness.seam`): a function that receives the experts
module, its input, the selected expert ids and the gate weights the model multiplies with (renormalised, scaled,
sigmoid, correction bias, groups: all already applied). Ours stands there for the length of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from harness import routed, sums
from harness.blocks import compress_block, moe_blocks
from harness.errors import UserError
from harness.finite import Finite
from harness.parking import Parking
from harness.pass_progress import PassProgress
from harness.plan import LayerPlan
from harness.residual import ResidualHooks
from harness.roles import layer_index
from harness.routed import Routed
from harness.seam import experts_run_through, hook_routers, trunk
from harness.stats import EXTRAS, MAXIMA, LayerStats, Stats
from harness.store import say
from harness.streaming import Batch, Passes, Streamed, are_whole
from harness.unfinished import Unfinished

Batches = Iterable[Batch]


def calibrate(
    model: PreTrainedModel,
    batches: Batches,
    extras: frozenset[str] = frozenset(),
    routing: str = "actual",
    all_experts: int | None = None,
) -> Stats:
    """Gather the statistics of every MoE layer.

    batches: pairs of token ids and attention mask, both int64 [B, T]; masked tokens (0) count for nothing.
    extras: which of `harness.stats.EXTRAS` to gather besides the routed sums.
    routing: ``actual``, the experts and gates the model really used, or ``paper``, those that REAP's published code
    takes instead (`harness.sums.paper_routing`).
    all_experts: how many of the tokens, the first, go through every expert where extras ask for that; None: all.
    Raises UserError if the architecture does not use the seam, StageError at the first layer where something is not
    finite: what comes in, the router's logits or gates, the experts' outputs; and for what comes out of the last.
    """
    observer = Observer(model, extras, routing, all_experts=all_experts)
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
    all_experts: int | None = None,
) -> dict[int, LayerPlan]:
    """Layer by layer: observe a layer behind the layers already compressed, ``decide`` its plan, compress it in memory.

    The model is changed. Costs one forward up to each layer: half as many full passes as there are layers.
    """
    batches = list(batches)
    plans: dict[int, LayerPlan] = {}
    for layer, block in moe_blocks(model).items():
        observer = Observer(model, extras, routing, only=layer, all_experts=all_experts)
        observer.watch(batches)
        if layer not in observer.layers:
            raise _unobservable(model)
        plans[layer] = decide(layer, observer.layers[layer].finish())
        compress_block(block, layer, plans[layer])
    return plans


def calibrate_streamed(
    streamed: Streamed,
    batches: Sequence[Batch],
    extras: frozenset[str],
    routing: str,
    parking: Parking,
    unfinished: Unfinished,
    all_experts: int | None = None,
    progress: PassProgress | None = None,
) -> Stats:
    """As `calibrate`, with the same sums to the last bit, of a model whose layers are read from disk one at a time.

    unfinished: what an interrupted pass has left; it is gone on with. progress: told of each batch in each layer, how
    many tokens through the whole model that comes to.
    """
    observer = Observer(streamed.model, extras, routing, known=unfinished.layers, all_experts=all_experts)
    passes = Passes(streamed, batches, parking)
    start, states = unfinished.states()
    before = {layer for layer in moe_blocks(streamed.model) if layer < start}
    if states is not None and (before - unfinished.layers.keys() or not are_whole(states)):
        say(
            "calibrate", unfinished.name, "what was kept of it is damaged or not all there: it begins again from tokens"
        )
        start, states = 0, None
    share = 1 / len(streamed.layers)
    if progress is not None:
        progress.begin_at(start * share * sum(ids.numel() for ids, _ in batches))

    def entering(batch: Batch) -> None:
        observer.expect(batch)
        if progress is not None:
            progress.advance(share * batch[0].numel())

    with observer.attached():
        for index in passes.layers(entering, start, states):
            observer.finite.check()
            if (seen := observer.layers.pop(index, None)) is not None:
                unfinished.keep(index, seen.finish())
            if index + 1 < len(streamed.layers):
                unfinished.save(index + 1, passes.nbytes, passes.save)
    if not unfinished.layers:
        raise _unobservable(streamed.model)
    return Stats(dict(sorted(unfinished.layers.items())))


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

    only: the one layer to observe; the pass ends there. known: layers that are not observed. all_experts: how many
    tokens go through every expert; None: all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        extras: frozenset[str],
        routing: str = "actual",
        only: int | None = None,
        known: Collection[int] = (),
        all_experts: int | None = None,
    ) -> None:
        assert extras <= set(EXTRAS), extras
        assert routing in ("actual", "paper"), routing
        self.model = model
        self.extras = extras
        self.routing = routing
        self.only = only
        self.known = known
        self.all_experts = all_experts
        self.renormalise = bool(getattr(model.config.get_text_config(), "norm_topk_prob", False))  # as published
        self.layers: dict[int, Accumulator] = {}
        self.mask: Tensor | None = None
        self.logits: dict[int, Tensor] = {}
        self.index_of = {module: layer_index(name) for name, module in model.named_modules()}
        self.residual = ResidualHooks(model)
        self.finite = Finite()
        self.checked: set[int] = set()  # layers whose logits have been looked at

    @property
    def reads_logits(self) -> bool:
        return self.routing == "paper" or bool(self.extras & {"logit_sum", "logit_gram", "all_gated_output_sum"})

    def watch(self, batches: Batches) -> None:
        """Run the model over the batches and add up."""
        with self.attached(), torch.no_grad():
            for ids, mask in batches:
                self.expect((ids, mask))
                device = self.model.device
                try:
                    # No logits: what is behind the layers is needed by no sum, and costs as much as some layers.
                    found = trunk(self.model)(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
                    self._check_last(found.last_hidden_state)
                except _LayerSeen:
                    pass
                self.finite.check()

    def _check_last(self, hidden: Tensor) -> None:
        """hidden: [B, T, H] behind the last layer and the final norm."""
        assert self.mask is not None
        kept = hidden.flatten(0, 1)[self.mask.to(hidden.device)]
        self.finite.note("behind the last layer", {"the hidden states": kept})

    def expect(self, batch: Batch) -> None:
        """This is the batch that comes next."""
        self.mask = batch[1].bool().flatten()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within this context the model's experts run through `forward` and its routers' logits are seen."""
        hooks = list(self._hook_routers()) if self.reads_logits else []
        hooks += list(self.residual.attach()) if "gate_norm_turn" in self.extras else []
        head = self.model.get_output_embeddings()
        if head is not None:  # not run, as nothing reads the logits
            self.finite.note("behind the last layer", {"the weights of the output head": head.weight})
        try:
            with experts_run_through(self.model, self.forward, gated_inputs=True):
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
        scale = None
        if getattr(experts, "gates_inputs", False):  # nothing multiplies the outputs then
            scale, weight = weight, torch.ones_like(weight)
        made = routed.run(experts, hidden, index, scale)
        if layer not in self.known and self.only in (None, layer):
            self._observe(Seen(layer, experts, hidden, index, weight, made))
            if self.only == layer:
                raise _LayerSeen
        return made.mixed(weight).to(hidden.dtype)

    def _observe(self, all_tokens: Seen) -> None:
        """Add up one batch of one layer, its unmasked tokens alone."""
        assert self.mask is not None and len(self.mask) == len(all_tokens.hidden), "experts see every token of a batch"
        mask = None if self.mask.all() else self.mask.to(all_tokens.hidden.device)
        seen = all_tokens.only(mask)
        here = self.layers.setdefault(seen.layer, Accumulator(seen.count))
        here.tokens += len(seen.hidden)
        logits = self._logits_of(seen.layer, mask)
        if self.routing == "paper":
            seen = seen.rerouted(*sums.paper_routing(_known(logits), seen.index.shape[1], self.renormalise))
        index, weight, norm, count = seen.index, seen.weight, seen.made.norms, seen.count
        found = sums.routed_sums(index, weight, norm, seen.made.largest, count)
        self._flag(seen, logits, found)
        here.add(found)
        extra: dict[str, Callable[[], Tensor]] = {
            "coactivation": lambda: sums.coactivation(index, count),
            "gated_norm_gram": lambda: sums.gated_norm_gram(index, weight, norm, count),
            "gated_output_gram": lambda: sums.gated_output_gram(index, weight, seen.made.outputs, count),
            "gate_norm_turn": lambda: sums.gate_norm_turn(
                index, weight, seen.made.outputs, self._residual(seen.layer, mask), count
            ),
            "logit_sum": lambda: _known(logits).double().sum(dim=0),
            "logit_gram": lambda: _known(logits).double().T @ _known(logits).double(),
        }
        here.add({name: extra[name]() for name in self.extras & extra.keys()})
        self._observe_all_experts(here, seen, logits)

    def _logits_of(self, layer: int, mask: Tensor | None) -> Tensor | None:
        """The router's logits of the unmasked tokens, [N, E], where they are read."""
        if not self.reads_logits:
            return None
        if layer not in self.logits:
            raise UserError(
                f"{type(self.model).__name__}, layer {layer}: its router has no logits that are known as such, which "
                "routing=paper and some methods need. Choose routing=actual and a method that reads routed statistics."
            )
        logits = _masked(self.logits.pop(layer), mask)
        if layer not in self.checked:
            self.checked.add(layer)
            _refuse_probabilities(logits, f"{type(self.model).__name__}, layer {layer}")
        return logits

    def _residual(self, layer: int, mask: Tensor | None) -> Tensor:
        return _masked(self.residual.stream.pop(layer), mask)

    def _flag(self, seen: Seen, logits: Tensor | None, found: Mapping[str, Tensor]) -> None:
        """Note whether all is finite. It is looked at behind the batch: each look waits for the device."""
        values = {
            "the hidden states that come to the experts": seen.hidden,
            "the router's logits": None if logits is None else logits.masked_fill(logits == -torch.inf, 0),  # barred
            "the router's gates": seen.weight,
            "the experts' outputs": seen.made.largest,
            "the experts' gates and norms": found["gate_sq_norm_sq"],
        }
        self.finite.note(f"layer {seen.layer}", {name: value for name, value in values.items() if value is not None})

    def _observe_all_experts(self, here: Accumulator, seen: Seen, logits: Tensor | None) -> None:
        wanted = self.extras & {"all_output_sum", "all_gated_output_sum"}
        if wanted:
            before = here.tokens - len(seen.hidden)
            left = None if self.all_experts is None else max(0, self.all_experts - before)
            if left == 0 and wanted <= here.sums.keys():  # nothing more is asked, and to add it up costs as much
                return
            gate = _known(logits)[:left].float().softmax(dim=-1) if "all_gated_output_sum" in wanted else None
            plain, gated = routed.sums_over_tokens(seen.experts, seen.hidden[:left], gate)
            found = {"all_output_sum": plain, "all_gated_output_sum": gated}
            here.add({name: found[name] for name in wanted})


@dataclass(frozen=True)
class Seen:
    """What passed through the experts of a layer. hidden [N, H], index [N, k], weight [N, k]; made: the outputs."""

    layer: int
    experts: nn.Module
    hidden: Tensor
    index: Tensor
    weight: Tensor
    made: Routed

    @property
    def count(self) -> int:
        """Experts of the layer."""
        return int(self.experts.num_experts)  # type: ignore[arg-type]

    def only(self, mask: Tensor | None) -> Seen:
        """The tokens where the mask [N] is true; all without one."""
        if mask is None:
            return self
        hidden, index, weight = (values[mask] for values in (self.hidden, self.index, self.weight))
        return replace(self, hidden=hidden, index=index, weight=weight, made=self.made.only(mask))

    def rerouted(self, index: Tensor, weight: Tensor) -> Seen:
        """The same tokens given to other experts."""
        return replace(self, index=index, weight=weight, made=routed.run(self.experts, self.hidden, index))


def _refuse_probabilities(logits: Tensor, where: str) -> None:
    """Raise UserError for [N, E] that are no logits: some routers have what softmax made of them recorded."""
    if len(logits) and (logits >= 0).all() and ((logits.float().sum(dim=-1) - 1).abs() < 1e-3).all():
        raise UserError(
            f"{where}: what transformers records as the router's logits are probabilities, so statistics of logits "
            "would be wrong. Choose routing=actual and a method that reads routed statistics only, such as reap."
        )


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values[mask]


def _known(logits: Tensor | None) -> Tensor:
    assert logits is not None
    return logits


def packed_batches(tokens: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Split packed tokens [S, T] into batches for `calibrate`; packed sequences have no padding."""
    for start in range(0, len(tokens), batch_size):
        ids = torch.from_numpy(tokens[start : start + batch_size])
        yield ids, torch.ones_like(ids)
