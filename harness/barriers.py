"""Merge barriers: how far a MoE layer's output moves when two or three of its experts become one (HodgeCover's pass).

Merging is done in function space: with r_i the share of tokens routed to expert i, every member of a group G answers
with m(x) = sum over G of w_i f_i(x), w_i = r_i / sum over G of r. Routing and gates stay as they are, so the layer's
output y(x) changes by

    D(x) = sum over i in G of g_i(x) (m(x) - f_i(x)),        for a pair (g_j w_i - g_i w_j) (f_i - f_j)

which is 0 for tokens routed to no member: only the others are evaluated. A barrier is the mean over ALL tokens of how
far D moves the layer, by ``mode``:

* ``logit_lens``: KL(p || p') in nats, p = softmax(U norm(h)), h the residual stream after the layer, U and norm the
  model's own head and final norm, p' the same of h + D. Exact up to a vocabulary of 4,096; above it a lower bound, from
  the 256 likeliest tokens of p and one bucket for all others;
* ``hidden_softmax``: KL between the softmax over the channels of h and of h + D, in nats;
* ``l2``: ||D||^2;
* ``lm``: KL between the next-token distributions of the whole model without and with D in this layer. A forward pass
  for every group: the oracle for tiny models.

Source: HodgeCover, arXiv 2605.13997. Where in the model its KL is taken is not printed; its cost rules out ``lm``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from harness import routed
from harness.blocks import expert_counts, moe_blocks
from harness.calibrate import Batches, Observer
from harness.errors import StageError, UserError
from harness.roles import layer_index
from harness.stats import BARRIER_MODES, LayerStats, Stats

EXACT_VOCABULARY, LIKELIEST = 4096, 256
TOKENS = 2048  # of the calibration text; this and the next two are the paper's
TRIANGLES, SEED = 500, 42
LARGEST_LM = 5000  # pairs times layers
OUTPUTS_AT_ONCE = 1 << 25  # values of expert outputs held at a time
VALUES_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}  # values of shifted logits held at a time: cache, or memory
NEVER = 1e-12  # frequency below which a group's members count alike
UNLIKELY = 1e-3  # probability of a bucket whose mean shift is not to be trusted
STEEP = 10.0  # a shift of a logit from which on the sum is taken in logarithms

Divergence = Callable[[Tensor, Tensor], Tensor]  # (h [N, H], D [N, R, H]) -> [N, R], 0 where D is 0
Meter = Callable[["Seen", Tensor], np.ndarray]  # groups [G, s] of a layer -> the sum over tokens of each, [G]


@torch.no_grad()
def barriers(model: PreTrainedModel, batches: Batches, mode: str = "logit_lens") -> Stats:
    """``pair_barrier.<mode>`` [E, E], symmetric with a zero diagonal, ``triangles.<mode>`` [T, 3], ascending experts,
    and ``triple_barrier.<mode>`` [T] of every MoE layer, float64.

    batches: pairs of token ids and attention mask, both int64 [B, T]; masked tokens (0) count for nothing; ``TOKENS``
    of them are the paper's. Held in memory: two activations per token of every MoE layer, and one bounded chunk.
    Raises UserError for an unknown mode, a model too large for ``lm``, and an architecture that does not add its
    experts' output to the residual stream as it is or whose head is more than a norm and a matrix; StageError where a
    barrier is not finite.
    """
    if mode not in BARRIER_MODES:
        raise UserError(f"barriers: mode={mode} is not one of {', '.join(BARRIER_MODES)}.")
    batches = list(batches)
    tape = Tape(model)
    if mode == "lm":
        _check_affordable(model)
    layers = tape.record(batches)
    measure = tape.whole_model(batches) if mode == "lm" else _local(_divergence(model, batches, mode))
    return Stats({layer: _layer_stats(layer, seen, measure, mode) for layer, seen in sorted(layers.items())})


def _check_affordable(model: PreTrainedModel) -> None:
    counts = list(expert_counts(model).values())
    passes = sum(math.comb(count, 2) for count in counts)
    if passes > LARGEST_LM:
        raise UserError(
            f"barriers: mode=lm runs the whole model for each of {passes} pairs of experts, and at most {LARGEST_LM} "
            f"are allowed. Choose mode=logit_lens, which costs a small part of that, or a model with fewer experts."
        )


def _layer_stats(layer: int, seen: Seen, measure: Meter, mode: str) -> LayerStats:
    pairs = np.stack(np.triu_indices(seen.count, 1), axis=1)
    tokens = max(seen.tokens, 1)
    barrier = np.zeros((seen.count, seen.count))
    barrier[pairs[:, 0], pairs[:, 1]] = measure(seen, torch.from_numpy(pairs)) / tokens
    barrier += barrier.T
    triangles = low_triangles(barrier)
    triple = measure(seen, torch.from_numpy(triangles)) / tokens
    if not (np.isfinite(barrier).all() and np.isfinite(triple).all()):
        raise StageError(f"Barriers: merging experts of layer {layer} gives outputs that are not finite.")
    found = {"pair_barrier": barrier, "triangles": triangles.astype(np.float64), "triple_barrier": triple}
    return LayerStats(seen.count, seen.tokens, {f"{name}.{mode}": value for name, value in found.items()})


def low_triangles(barrier: np.ndarray) -> np.ndarray:
    """[T, 3] ascending experts, int64: triangles all of whose edges are at most the median barrier; if there are more
    than 500, a sample of as many, uniform without replacement, drawn by the paper's seed from their lexicographic list.
    """
    experts = len(barrier)
    upper = np.triu(np.ones_like(barrier, dtype=bool), 1)
    low = (barrier <= np.median(barrier[upper])) & upper if experts > 1 else upper
    found = [np.empty((0, 3), dtype=np.int64)]
    for first in range(experts):
        near = np.flatnonzero(low[first])
        second, third = np.nonzero(low[np.ix_(near, near)])
        found.append(np.stack([np.full(len(second), first), near[second], near[third]], axis=1))
    triangles = np.concatenate(found)
    if len(triangles) > TRIANGLES:
        chosen = np.random.default_rng(SEED).choice(len(triangles), TRIANGLES, replace=False)
        triangles = triangles[np.sort(chosen)]
    return triangles


@dataclass
class Seen:
    """What one MoE layer saw and gave. hidden [T, H] goes into its experts, index and gate [T, k] are the experts and
    gates used, stream [T, H] is the residual stream behind the layer; unmasked tokens only, in parts until `joined`.
    """

    experts: nn.Module
    parts: dict[str, list[Tensor]] = field(default_factory=lambda: {n: [] for n in ("hidden", "index", "gate")})
    stream: list[Tensor] = field(default_factory=list)

    @property
    def count(self) -> int:
        return int(self.experts.num_experts)  # type: ignore[arg-type]

    @property
    def tokens(self) -> int:
        return sum(len(part) for part in self.stream)

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, H], and over all experts: which were chosen [T, E] (bool), with which gates [T, E]."""
        hidden, index, gate = (torch.cat(parts) for parts in self.parts.values())
        dense = torch.zeros(len(index), self.count, dtype=gate.dtype, device=gate.device)
        return hidden, dense.bool().scatter(1, index, True), dense.scatter(1, index, gate)

    def shares(self, groups: Tensor) -> Tensor:
        """w [G, s]: each member's share in the tokens routed to its group [G, s]; equal ones if there are none."""
        index = torch.cat(self.parts["index"])
        counts = torch.bincount(index.flatten(), minlength=self.count).double()[groups.to(index.device)]
        total = counts.sum(dim=1, keepdim=True)
        return torch.where(total / max(self.tokens, 1) < NEVER, 1 / groups.shape[1], counts / total.clamp_min(1))


def output_change(outputs: Tensor, gate: Tensor, share: Tensor) -> Tensor:
    """D [..., H] from the members' outputs [..., s, H], gates and shares [..., s]: written in differences of outputs,
    so that merging equal experts changes exactly nothing.
    """
    factor = share * gate.sum(dim=-1, keepdim=True) - gate
    change = torch.zeros_like(outputs[..., 0, :])
    for member in range(1, gate.shape[-1]):
        change.addcmul_(factor[..., member, None], outputs[..., member, :] - outputs[..., 0, :])
    return change


def _local(divergence: Divergence) -> Meter:
    """A meter that looks at one layer and the tokens that each group touches."""

    def measure(seen: Seen, groups: Tensor) -> np.ndarray:
        stream = torch.cat(seen.stream)
        hidden, chosen, gates = seen.joined()
        device, kind = hidden.device, torch.promote_types(hidden.dtype, torch.float32)
        groups, share = groups.to(device), seen.shares(groups).to(kind)
        width = getattr(divergence, "width", stream.shape[1])
        total = torch.zeros(len(groups), dtype=torch.float64, device=device)
        for rows, outputs in _all_outputs(seen.experts, hidden, seen.count) if len(groups) else ():
            touched = chosen[rows][:, groups].any(dim=-1)
            for part in _in_chunks(touched.sum(dim=1), width):
                most = int(touched[part[0]].sum())
                which = touched[part].int().topk(most, dim=1).indices  # [N, R]; of those not touched D is 0
                members = groups[which]
                change = output_change(
                    _picked(outputs[part].to(kind), members),
                    _picked(gates[rows[part]].to(kind), members),
                    share[which],
                )
                value = divergence(stream[rows[part]].to(kind), change).to(device)
                total.index_add_(0, which.flatten(), value.double().flatten())
        return total.cpu().numpy()

    return measure


def _all_outputs(experts: nn.Module, hidden: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows [N], every expert's outputs [N, E, H] of these rows of ``hidden`` [T, H])."""
    every = torch.arange(count, device=hidden.device)
    for rows in torch.arange(len(hidden), device=hidden.device).split(
        max(1, OUTPUTS_AT_ONCE // (count * hidden.shape[1]))
    ):
        yield rows, routed.run(experts, hidden[rows], every.expand(len(rows), count)).outputs


def _picked(values: Tensor, members: Tensor) -> Tensor:
    """[N, R, s, ...] of ``values`` [N, E, ...]: those of the experts ``members`` [N, R, s] of each token."""
    start = torch.arange(len(values), device=values.device)[:, None, None] * values.shape[1]
    picked = values.flatten(0, 1).index_select(0, (start + members).flatten())
    return picked.view(*members.shape, *values.shape[2:])


def _in_chunks(counts: Tensor, width: int) -> Iterator[Tensor]:
    """The tokens that touch any group, those that touch most first, in chunks for each of which ``width`` values for
    every token and group stay within bounds. counts [N]: groups that each token touches.
    """
    order = counts.argsort(descending=True, stable=True)
    order = order[counts[order] > 0]
    while len(order):
        size = max(1, VALUES_AT_ONCE[counts.device.type] // (int(counts[order[0]]) * width))
        yield order[:size]
        order = order[size:]


def _divergence(model: PreTrainedModel, batches: list[tuple[Tensor, Tensor]], mode: str) -> Divergence:
    if mode == "l2":
        return lambda stream, change: change.square().sum(dim=-1)
    if mode == "hidden_softmax":
        return hidden_divergence
    lens = LogitLens.of(model)
    lens.check(model, batches[0])
    return lens


def hidden_divergence(stream: Tensor, change: Tensor) -> Tensor:
    """KL between the softmax over channels of h [N, H] and of h + D, D [N, R, H]."""
    logp = stream.log_softmax(dim=-1)
    mean = (change @ logp.exp().unsqueeze(-1)).squeeze(-1)
    return tilted_divergence(logp, change, mean, exact=True)


@dataclass(frozen=True)
class LogitLens:
    """The model's final norm and head, read at a layer. weight [V, H], bias [V] or None, in float32 at least.

    exact: the divergence over the whole vocabulary, not the lower bound from the likeliest ``LIKELIEST`` tokens.
    """

    norm: nn.Module
    weight: Tensor
    bias: Tensor | None
    exact: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> LogitLens:
        """Raises UserError if the model does not say where its final norm and head are."""
        head, norm = model.get_output_embeddings(), getattr(model.get_decoder(), "norm", None)
        if not isinstance(getattr(head, "weight", None), Tensor) or not isinstance(norm, nn.Module):
            raise UserError(f"{type(model).__name__}: {_UNREADABLE}")
        kind = torch.promote_types(head.weight.dtype, torch.float32)
        bias = getattr(head, "bias", None)
        return cls(
            norm=copy.deepcopy(norm).to(kind),
            weight=head.weight.detach().to(kind),
            bias=None if bias is None else bias.detach().to(kind),
            exact=len(head.weight) <= EXACT_VOCABULARY,
        )

    @cached_property
    def columns(self) -> Tensor:
        """The weight as [H, V], laid out for the product that takes most of the time."""
        return self.weight.T.contiguous()

    @property
    def width(self) -> int:
        """Values in memory per group and token."""
        return max(self.weight.shape[1], len(self.weight) if self.exact else LIKELIEST)

    def check(self, model: PreTrainedModel, batch: tuple[Tensor, Tensor]) -> None:
        """Raise UserError unless norm and head make the model's own logits of what the norm receives."""
        received: list[Tensor] = []
        hook = model.get_decoder().norm.register_forward_pre_hook(lambda module, args: received.append(args[0]))
        ids, mask = (part.to(model.device) for part in batch)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.to(self.weight)
        hook.remove()
        if not received or not _close(self.logits(received[-1].to(self.weight)), logits):
            raise UserError(f"{type(model).__name__}: {_UNREADABLE}")

    def logits(self, stream: Tensor) -> Tensor:
        return functional.linear(self.norm(stream), self.weight, self.bias)

    def __call__(self, stream: Tensor, change: Tensor) -> Tensor:
        """KL(p || p') [N, R] from h [N, H] and D [N, R, H]; a logit's shift is U (norm(h + D) - norm(h))."""
        stream, change = stream.to(self.weight), change.to(self.weight)
        logp = self.logits(stream).log_softmax(dim=-1)
        moved = self.norm(stream.unsqueeze(1) + change) - self.norm(stream).unsqueeze(1)
        mean = (moved @ (logp.exp() @ self.weight).unsqueeze(-1)).squeeze(-1)
        if self.exact:
            return tilted_divergence(logp, moved @ self.columns, mean, exact=True)
        logp, likeliest = logp.topk(LIKELIEST, dim=-1)
        return tilted_divergence(logp, moved @ self.weight[likeliest].transpose(1, 2), mean, exact=False)


_UNREADABLE = (
    "its logits are not made by a final norm `norm` and an output matrix alone, so mode=logit_lens cannot read its "
    "layers. Choose mode=hidden_softmax or mode=l2."
)


def tilted_divergence(logp: Tensor, shift: Tensor, mean: Tensor, exact: bool) -> Tensor:
    """KL(p || p') = log E_p[exp(s - E_p s)] in nats, [N, R], where p' is proportional to p exp(s).

    logp [N, A]: log p of some outcomes, of all if ``exact``. shift [N, R, A]: their s, overwritten. mean [N, R]: E_p s
    over ALL outcomes. The outcomes left out become one bucket with their mean shift, known from ``mean``: by Jensen's
    inequality a lower bound. (Where they are so unlikely that rounding could decide, its shift is no higher than the
    highest other.)
    Written so that no difference of nearly equal numbers is taken: shifts of 1e-4 give divergences of 1e-8.
    """
    shift.sub_(mean.unsqueeze(-1))
    if not exact:
        logp, shift = _with_tail(logp, shift)
    p, highest = logp.exp().unsqueeze(-1), shift.amax(dim=-1)
    excess = (torch.expm1(shift).sub_(shift) @ p).squeeze(-1)  # sum of p (e^s - 1 - s)
    if not exact:
        excess = excess + (shift @ p).squeeze(-1).clamp_max(0)  # 0 unless the bucket's shift was cut
    found = torch.log1p(excess.clamp_min(0))  # where a shift is steep it may overflow, and is done again
    token, row = torch.nonzero(highest > STEEP, as_tuple=True)
    found[token, row] = torch.logsumexp(logp[token] + shift[token, row], dim=-1).clamp_min(0)
    return found


def _with_tail(logp: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    tail = (1 - logp.exp().sum(dim=-1)).clamp_min(torch.finfo(logp.dtype).tiny)
    balance = -(shift @ logp.exp().unsqueeze(-1)).squeeze(-1) / tail.unsqueeze(-1)
    bucket = torch.where(tail.unsqueeze(-1) < UNLIKELY, torch.minimum(balance, shift.amax(dim=-1)), balance)
    return torch.cat([logp, tail.log().unsqueeze(-1)], dim=-1), torch.cat([shift, bucket.unsqueeze(-1)], dim=-1)


def _close(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).norm() <= 0.02 * second.norm())  # bfloat16 rounds by 0.004


class Tape(Observer):
    """Stands in for the model's experts function: it notes what passes through and can add to one layer's output."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model, frozenset())
        self.seen: dict[int, Seen] = {}
        self.noting = False
        self.added: tuple[int, Callable[[Tensor, Tensor, Tensor], Tensor]] | None = None

    def forward(self, experts: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The experts function. hidden [N, H], index [N, k] expert ids, weight [N, k] gates; returns [N, H]."""
        layer = self.index_of[experts]
        output = routed.run(experts, hidden, index).mixed(weight)
        if self.noting and self.added is None:
            assert self.mask is not None and len(self.mask) == len(hidden), "the experts see every token of the batch"
            here, mask = self.seen.setdefault(layer, Seen(experts)), self.mask.to(hidden.device)
            for name, value in (("hidden", hidden), ("index", index), ("gate", weight)):
                here.parts[name].append(value[mask])
        if self.added is not None and self.added[0] == layer:
            output = output + self.added[1](hidden, index, weight)
        return output.to(hidden.dtype)

    def record(self, batches: list[tuple[Tensor, Tensor]]) -> dict[int, Seen]:
        """Run the model over the batches and note what every MoE layer saw and gave."""
        hooks = list(self._hook_layers())
        try:
            self.noting = True
            for _ in self._logits(batches):
                pass
        finally:
            self.noting = False
            for hook in hooks:
                hook.remove()
        if not self.seen or any(sum(map(len, seen.parts["index"])) != seen.tokens for seen in self.seen.values()):
            raise UserError(
                f"{type(self.model).__name__} does not route its experts through transformers' experts interface in "
                "decoder layers, so barriers between them cannot be measured. Choose a method that needs none."
            )
        return self.seen

    def _logits(self, batches: list[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """The model's logits [N, V] of each batch, unmasked tokens only."""
        with self.attached():
            for ids, mask in batches:
                self.mask = mask.bool().flatten()
                device = self.model.device
                output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
                yield output.logits.flatten(0, 1)[self.mask.to(output.logits.device)]

    def _hook_layers(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        blocks = moe_blocks(self.model)
        for name, module in self.model.named_modules():
            layer = layer_index(name)
            if layer in blocks and name.rpartition(".")[2] == str(layer):
                yield module.register_forward_hook(self._after_layer(layer), with_kwargs=True)

    def _after_layer(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple[Tensor, ...]) -> None:
            if self.added is not None or layer not in self.seen:
                return
            assert self.mask is not None
            stream, here = _tensor(output).flatten(0, -2), self.seen[layer]
            if not torch.isfinite(stream).all():
                raise StageError(f"Barriers: the output of layer {layer} is not finite. Load the model in float32.")
            if not here.stream:
                self._check_added(layer, lambda: _tensor(module(*args, **kwargs)).flatten(0, -2), stream)
            here.stream.append(stream[self.mask.to(stream.device)])

        return hook

    def _check_added(self, layer: int, again: Callable[[], Tensor], stream: Tensor) -> None:
        """Raise UserError unless the layer adds its experts' output to the residual stream as it is: run again with
        its own output added to that of its experts, it must give twice as much.
        """
        added = self.seen[layer].parts["hidden"][0].shape[1] == stream.shape[1]
        if added:
            self.added = layer, lambda hidden, index, weight: stream.to(hidden.device)
            added = _close(again(), 2 * stream)
            self.added = None
        if not added:
            raise UserError(
                f"{type(self.model).__name__}: layer {layer} scales or normalises its experts' output before it adds "
                "it to the residual stream, which the barriers' closed form does not know. Choose another method."
            )

    def whole_model(self, batches: list[tuple[Tensor, Tensor]]) -> Meter:
        """A meter that runs the whole model for every group."""
        before = [logits.double().log_softmax(dim=-1) for logits in self._logits(batches)]
        layer_of = {id(seen.experts): layer for layer, seen in self.seen.items()}

        def measure(seen: Seen, groups: Tensor) -> np.ndarray:
            found = []
            for group, share in zip(groups, seen.shares(groups), strict=True):
                self.added = layer_of[id(seen.experts)], _merging(seen.experts, group, share)
                after = (logits.double().log_softmax(dim=-1) for logits in self._logits(batches))
                found.append(sum(float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True)))
                self.added = None
            return np.array(found)

        return measure


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _merging(experts: nn.Module, group: Tensor, share: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """D [N, H] of one group [s] with these shares [s], from the experts function's arguments."""

    def change(hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        members = group.to(index.device)
        outputs = routed.run(experts, hidden, members.expand(len(hidden), len(members))).outputs
        gate = (weight.unsqueeze(-1) * (index.unsqueeze(-1) == members)).sum(dim=1)
        return output_change(outputs, gate, share.to(gate).expand_as(gate))

    return change
