"""What a model in memory says of a plan, as "REAP the Experts" (arXiv 2510.13999) asks: where the mean outputs of the
experts lie (Fig. 1 and 2), how far apart merged experts were (4d), how far the next-token distributions move (4c), and
how the original model likes a compressed one's texts (4b).

The model itself never changes: blocks are copied, compressed, and take the originals' place for one forward pass.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from harness.align import unit_order
from harness.blocks import compress_block, moe_blocks
from harness.calibrate import Batches
from harness.errors import StageError, UserError
from harness.plan import LayerPlan
from harness.reconstruct import block_inputs
from harness.routed import sums_over_tokens

TOKENS_AT_ONCE = 2048  # of texts: bounds their logits, each as wide as the vocabulary
POSITIONS_AT_ONCE = 256  # of two distributions over the vocabulary


# Mean outputs of experts.


def expert_inputs(model: PreTrainedModel, batches: Batches) -> dict[int, Tensor]:
    """Hidden states [tokens, H] that enter the experts of each MoE layer; masked tokens are left out."""
    return block_inputs(model, {layer: _experts(block) for layer, block in moe_blocks(model).items()}, batches)


def expert_means(model: PreTrainedModel, inputs: Mapping[int, Tensor]) -> dict[int, np.ndarray]:
    """Mean of f_j(x) over ALL tokens x of the inputs, routed to expert j or not, float32 [E, H] by layer.

    Raises StageError if one is not finite.
    """
    return {layer: _means(layer, _experts(block), inputs[layer]) for layer, block in moe_blocks(model).items()}


def slot_means(
    model: PreTrainedModel, inputs: Mapping[int, Tensor], layers: Mapping[int, LayerPlan]
) -> dict[int, np.ndarray]:
    """The same of every distinct expert that a plan leaves, float32 [S, H] by layer, in the order of its slots, on the
    same inputs: those of the original model.
    """
    found = {}
    for layer, block in moe_blocks(model).items():
        alone = _one_row_each(layers[layer])
        slots = [slot for slot in alone.routes if slot is not None]
        means = _means(layer, _experts(compressed(block, layer, alone)), inputs[layer])
        found[layer] = means[np.argsort(slots)]
    return found


def compressed(block: nn.Module, layer: int, plan: LayerPlan) -> nn.Module:
    """A copy of a MoE block with its plan carried out."""
    copied = copy.deepcopy(block)
    compress_block(copied, layer, plan)
    return copied


def _one_row_each(plan: LayerPlan) -> LayerPlan:
    """The plan with one router row for each slot, so that a merged expert is computed once."""
    first: dict[int | None, int] = {}
    for row in plan.kept_rows:
        first.setdefault(plan.routes[row], row)
    return replace(plan, routes=tuple(s if first.get(s) == row else None for row, s in enumerate(plan.routes)))


@torch.no_grad()
def _means(layer: int, experts: nn.Module, hidden: Tensor) -> np.ndarray:
    total, _ = sums_over_tokens(experts, hidden, None)
    means = (total / len(hidden)).float().cpu().numpy()
    if not np.isfinite(means).all():
        raise StageError(f"Mean outputs: experts of layer {layer} gave outputs that are not finite.")
    return means


def _experts(block: nn.Module) -> nn.Module:
    return block.get_submodule("experts")


# Distance in weights.


@torch.no_grad()
def weight_distances(model: PreTrainedModel, layers: Mapping[int, LayerPlan]) -> dict[int, np.ndarray]:
    """How far merged experts were from the weightiest of their slot, float32 [pairs, 2] by layer; layers that merge
    nothing are left out.

    ||W_i - W_ref|| / ||W_ref|| (Frobenius norms), the mean over gate, up and down: first with hidden units as they are
    stored, then with those of expert i in the order that brings them nearest (`harness.align.unit_order`).
    Raises UserError for experts that are no plain matrices.
    """
    found = {}
    for layer, block in moe_blocks(model).items():
        pairs = list(replace(layers[layer], align=True).aligned_pairs())
        if pairs:
            parts = _matrices(_experts(block))
            distances = [_distances(parts(reference), parts(source.expert)) for reference, source in pairs]
            found[layer] = np.array(distances, np.float32)
    return found


def _matrices(experts: nn.Module) -> Callable[[int], list[Tensor]]:
    """Gate, up and transposed down projection of an expert, one row for each hidden unit."""
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    plain = not (getattr(experts, "is_transposed", False) or getattr(experts, "has_bias", False))
    if gate_up is None or down is None or not plain:
        raise UserError(
            f"{type(experts).__name__} does not hold plain gate, up and down matrices, so distances of its experts in "
            "weights are not measured."
        )
    width = down.shape[2]

    def parts(expert: int) -> list[Tensor]:
        matrices = (gate_up[expert, :width], gate_up[expert, width:], down[expert].T)
        return [matrix.float() for matrix in matrices]

    return parts


def _distances(reference: list[Tensor], member: list[Tensor]) -> tuple[float, float]:
    order = unit_order(reference, member)
    return _relative(reference, member), _relative(reference, [matrix[order] for matrix in member])


def _relative(reference: list[Tensor], member: list[Tensor]) -> float:
    parts = [float((a - b).norm() / a.norm().clamp_min(1e-30)) for a, b in zip(reference, member, strict=True)]
    return sum(parts) / len(parts)


# Divergence of predictions.


@torch.no_grad()
def divergences(model: PreTrainedModel, layers: Mapping[int, LayerPlan], ids: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of the original's and the compressed model's next-token distributions, in bits (0:
    alike, 1: no token in common), float32 [sequences, length - 1]; position t has read t + 1 tokens.

    ids: int64 [sequences, length]. Both models read the same tokens (teacher-forced). The published code compares texts
    that each model goes on to write itself: after the first token that differs, the contexts differ too, and its curve
    mixes divergence with that drift. Raises StageError if one is not finite.
    """
    blocks = moe_blocks(model)
    changed = {layer: compressed(blocks[layer], layer, p) for layer, p in layers.items() if not p.is_identity}
    found = []
    for sequence in torch.from_numpy(ids):  # one at a time: two of its tensors of logits are held at once
        before = _logits(model, sequence)
        with _in_place(model, changed):
            found.append(_jensen_shannon(before, _logits(model, sequence)))
    result = torch.stack(found).cpu().numpy()
    if not np.isfinite(result).all():
        raise StageError("Divergence: a next-token distribution is not finite.")
    return result


@contextmanager
def _in_place(model: PreTrainedModel, blocks: Mapping[int, nn.Module]) -> Iterator[None]:
    """Within this context the model computes with these blocks instead of its own."""
    own = moe_blocks(model)
    names = {module: name for name, module in model.named_modules()}
    try:
        for layer, block in blocks.items():
            model.set_submodule(names[own[layer]], block)
        yield
    finally:
        for layer in blocks:
            model.set_submodule(names[own[layer]], own[layer])


def _logits(model: PreTrainedModel, sequence: Tensor) -> Tensor:
    """Logits [length - 1, V] after each token but the last."""
    return model(input_ids=sequence[None].to(model.device), use_cache=False).logits[0, :-1]


def _jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """In bits, float32 [N], of the distributions that two tensors of logits [N, V] stand for."""
    chunks = zip(first.split(POSITIONS_AT_ONCE), second.split(POSITIONS_AT_ONCE), strict=True)
    return torch.cat([_chunk_divergence(a, b) for a, b in chunks])


def _chunk_divergence(first: Tensor, second: Tensor) -> Tensor:
    lowest = torch.finfo(torch.float32).min / 4  # of a token that cannot come: 0 * -inf is no number
    p, q = (logits.float().log_softmax(-1).clamp_min(lowest) for logits in (first, second.to(first.device)))
    middle = torch.logaddexp(p, q) - math.log(2)
    nats = (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2
    return (nats / math.log(2)).clamp(0, 1)  # rounding alone leaves this interval; what is no number stays none


# Cross-perplexity.


@dataclass(frozen=True)
class Continuation:
    """A text as token ids; those from ``start`` on answer what stands before."""

    ids: tuple[int, ...]
    start: int


def continuation(tokenizer: Any, prompt: str, answer: str) -> Continuation:
    """A prompt and its answer, tokenised as one text. A token that joins the end of the prompt with the beginning of
    the answer counts to the answer. It begins as the tokenizer begins texts.
    """
    first = tokenizer("a").input_ids[:1]
    begin = first if first == [tokenizer.bos_token_id] else []
    asked, whole = (begin + tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, prompt + answer))
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(asked, whole, strict=False))
    return Continuation(tuple(whole), sum(1 for _ in shared))


@torch.no_grad()
def mean_nll(model: PreTrainedModel, texts: Sequence[Continuation]) -> np.ndarray:
    """Mean negative log-likelihood of each answer given its prompt, in nats per token, float64 [texts]; NaN where no
    token has one before it. The exponential of the original model's is the cross-perplexity of another model's text.

    The published code scores texts without their prompts, so that what was asked counts as a surprise of the answer.
    Raises StageError if one is not finite.
    """
    found = np.full(len(texts), np.nan)
    starts = [max(1, text.start) for text in texts]
    scored = [place for place, text in enumerate(texts) if starts[place] < len(text.ids)]
    for places in _batches(scored, [len(text.ids) for text in texts]):
        logits = _padded_logits(model, [texts[place].ids for place in places])
        for place, row in zip(places, logits, strict=True):
            ids, start = texts[place].ids, starts[place]
            wanted = torch.tensor(ids[start:], device=row.device)
            found[place] = float(nn.functional.cross_entropy(row[start - 1 : len(ids) - 1].float(), wanted))
    if not np.isfinite(found[scored]).all():
        raise StageError("Cross-perplexity: a text has a likelihood that is not finite.")
    return found


def _batches(places: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Texts of like length, so many together that padded they hold at most `TOKENS_AT_ONCE`."""
    batch: list[int] = []
    for place in sorted(places, key=lambda place: lengths[place]):
        if batch and lengths[place] * (len(batch) + 1) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _padded_logits(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """Logits [texts, longest, V]; padding stands behind the texts, where no token of theirs sees it."""
    rows = [torch.tensor(text, device=model.device) for text in texts]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
