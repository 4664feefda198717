"""Training a compressed model to say what the original says: losses, schedules and the loop.

Source: SlimQwen (arXiv 2605.08738): L = (1 - l) L_LM + l L_KD, and the same again for multi-token heads. Logits are
[..., V], ids int64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from harness.blocks import expert_counts
from harness.errors import StageError
from harness.models import Model
from harness.roles import role
from harness.seam import hook_routers, use

BETAS, CLIP = (0.9, 0.95), 1.0  # of AdamW, which decays no weight here; the largest norm of a gradient
MTP = (0.3, 0.1)  # weight of the multi-token heads' loss, first and last
LAST = 20  # steps that the reported training losses are the mean of
FLOPS = "6 * active student parameters * tokens + 2 * active teacher parameters * tokens"


@dataclass(frozen=True)
class Recipe:
    """How a student is trained.

    objective: kd, (1 - l) LM + l KD with l from ``kd_start`` to ``kd_end``, linear in the steps; or lm, l = 0
    throughout: the control that sees the same tokens and no teacher. epochs: how often each sequence is seen, in an
    order drawn by ``seed``. learning_rate: reached after ``warmup`` steps, then a cosine down to
    ``final_learning_rate``. balance: weight of the load-balance loss; 0 leaves it out. teacher_tokens: of the teacher's
    distribution the so many likeliest tokens and the rest as one; null or 0 is the whole vocabulary.
    """

    objective: str
    epochs: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float
    warmup: int
    kd_start: float
    kd_end: float
    balance: float
    teacher_tokens: int | None
    seed: int

    def kd_weight(self, step: int, steps: int) -> float:
        """l of step 0..steps-1."""
        if self.objective == "lm":
            return 0.0
        return self.kd_start + (self.kd_end - self.kd_start) * step / max(1, steps - 1)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0..steps-1."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return cosine(step - self.warmup, steps - self.warmup, self.learning_rate, self.final_learning_rate)

    def batches(self, ids: np.ndarray) -> list[Tensor]:
        """Batches [<= batch_size, T] of all epochs over the sequences [S, T]; only the last may be smaller."""
        draw = np.random.default_rng(self.seed)
        order = np.concatenate([draw.permutation(len(ids)) for _ in range(self.epochs)])
        return [
            torch.from_numpy(ids[order[start : start + self.batch_size]])
            for start in range(0, len(order), self.batch_size)
        ]


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """``first`` at step 0, ``last`` at step steps-1, half a cosine between them."""
    share = min(1.0, step / max(1, steps - 1))
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


# Losses, in nats per prediction.


def soft_cross_entropy(logits: Tensor, wanted: Tensor, tokens: int | None = None) -> Tensor:
    """-sum_v q(v) log p(v), q = softmax(wanted), mean over all positions: KL(q || p) + H(q).

    tokens: both distributions coarsened to the teacher's so many likeliest tokens and the sum of all others. Its KL is
    0 where p = q and never above the whole vocabulary's.
    """
    if tokens and tokens < logits.shape[-1]:
        ids = wanted.topk(tokens, dim=-1).indices
        p, q = coarsened(logits, ids), coarsened(wanted, ids)
    else:
        p, q = logits.log_softmax(-1), wanted.log_softmax(-1)
    return -(q.exp() * p).sum(-1).mean()


def coarsened(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [..., K + 1] of the tokens ``ids`` [..., K] and of all others together."""
    total = logits.logsumexp(-1, keepdim=True)
    others = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), others], dim=-1) - total


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL(q || p) at every position, over the whole vocabulary."""
    p, q = logits.log_softmax(-1), wanted.log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def balance_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Mean over layers of E sum_e (share of choices of e)(mean probability of e): 1 when the surviving experts are
    used alike (Switch Transformer, eq. 4). router_logits: [tokens, E] of each layer, E the experts that are left.

    Choices are the top-k of the logits and probabilities their softmax, also for routers that choose otherwise.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.softmax(-1)
        chosen = probabilities.topk(top_k, dim=-1).indices
        share = torch.zeros_like(probabilities).scatter(-1, chosen, 1 / top_k).mean(0)
        losses.append(probabilities.shape[-1] * (share * probabilities.mean(0)).sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def mtp_terms(
    student: nn.Module, teacher: nn.Module, hidden: tuple[Tensor, Tensor], ids: Tensor, kd: float, beta: float
) -> Tensor:
    """beta * ((1 - l) L_MTP-LM + l L_MTP-KD) for models that expose ``mtp_logits(hidden, ids)`` [B, T-2, V], what they
    say at each position about the token after the next; zero for those that do not. hidden: the last hidden states
    [B, T, H] of student and teacher.

    transformers drops the weights of multi-token heads, so no model that it loads has this today.
    """
    if not hasattr(student, "mtp_logits") or beta == 0:
        return hidden[0].new_zeros(())
    said = student.mtp_logits(hidden[0], ids)  # type: ignore[operator]
    with torch.no_grad():
        wanted = teacher.mtp_logits(hidden[1], ids)  # type: ignore[operator]
    return beta * ((1 - kd) * cross_entropy(said, ids[:, 2:]) + kd * soft_cross_entropy(said, wanted))


# The loop.


@contextmanager
def router_logits(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within this context, the list of every router's logits [tokens, E] of the last forward passes; clear it."""
    seen: list[Tensor] = []
    needed_by = "the load-balance loss needs. Set recovery.balance=0."
    hooks = list(hook_routers(model, lambda _, logits: seen.append(logits), needed_by))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def trainable(model: Model) -> PreTrainedModel:
    """The model in memory in float32, its experts computed in one grouped product, which trains fast on a CPU too."""
    loaded = model.load("float32")
    use(loaded, "grouped_mm")
    return loaded


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
    recipe: Recipe,
    top_k: int,
    first: int,
    steps: int,
) -> dict[str, float]:
    """Train whatever of the student requires a gradient, one step per batch; the steps are ``first`` and following of
    ``steps``, by which all schedules go. Dropout stays off. Returns the mean losses of the last steps.

    Both models stay in memory, each where `Model.load` put it: on the CPU, or spread over the GPUs layer by layer
    (accelerate's device map), one of which works at a time. Larger models would need sharded training (FSDP), which is
    not built here.
    Raises StageError at the first loss that is not finite.
    """
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=BETAS, weight_decay=0.0)
    seen: list[dict[str, Tensor]] = []
    with _maybe_router_logits(student, recipe) as routed:
        for step, ids in enumerate(tqdm(batches, "recover", leave=False), first):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step, steps)
            terms = _losses(student, teacher, ids, recipe, top_k, (step, steps), routed)
            if not torch.isfinite(terms["total"]):
                raise StageError(f"Recovery: the loss of step {step} is not finite. Lower recovery.learning_rate.")
            terms["total"].backward()
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            seen = [*seen, {name: value.detach() for name, value in terms.items()}][-LAST:]
    return {name: float(np.mean([float(terms[name]) for terms in seen])) for name in seen[0]}


@contextmanager
def _maybe_router_logits(model: PreTrainedModel, recipe: Recipe) -> Iterator[list[Tensor]]:
    if not recipe.balance:
        yield []
        return
    with router_logits(model) as seen:
        yield seen


def _losses(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Tensor,
    recipe: Recipe,
    top_k: int,
    when: tuple[int, int],
    routed: list[Tensor],
) -> dict[str, Tensor]:
    """The terms of one batch's loss, and their weighted sum ``total``."""
    routed.clear()
    logits, hidden = _said(student, ids)
    ids = ids.to(logits.device)
    kd = recipe.kd_weight(*when)
    terms = {"lm": cross_entropy(logits[:, :-1], ids[:, 1:])}
    total = (1 - kd) * terms["lm"]
    if recipe.objective == "kd":
        with torch.no_grad():
            wanted, their_hidden = _said(teacher, ids)
        terms["kd"] = soft_cross_entropy(logits[:, :-1], wanted[:, :-1].to(logits.device), recipe.teacher_tokens)
        total = total + kd * terms["kd"]
        if hidden is not None and their_hidden is not None:
            terms["mtp"] = mtp_terms(student, teacher, (hidden, their_hidden), ids, kd, cosine(*when, *MTP))
            total = total + terms["mtp"]
    if recipe.balance:
        terms["balance"] = balance_loss(routed, top_k)
        total = total + recipe.balance * terms["balance"].to(total.device)
    return {**terms, "total": total}


def _said(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits [B, T, V], and the last hidden states if the model has multi-token heads."""
    deeper = hasattr(model, "mtp_logits")
    output = model(input_ids=ids.to(model.device), use_cache=False, output_hidden_states=deeper)
    return output.logits, output.hidden_states[-1] if deeper else None


@torch.no_grad()
def held_out(student: PreTrainedModel, teacher: PreTrainedModel, ids: np.ndarray, batch_size: int) -> dict[str, float]:
    """On sequences [S, T]: ``kl``, KL(teacher || student) over the whole vocabulary, and ``ce``, the student's
    cross-entropy; nats per predicted token.
    """
    kl = ce = 0.0
    for start in range(0, len(ids), batch_size):
        batch = torch.from_numpy(ids[start : start + batch_size])
        logits, wanted = (_said(model, batch)[0][:, :-1] for model in (student, teacher))
        kl += float(divergence(logits, wanted.to(logits.device)).double().sum())
        ce += float(cross_entropy(logits, batch[:, 1:].to(logits.device)).double()) * batch[:, 1:].numel()
    predictions = ids[:, 1:].size
    return {"kl": kl / predictions, "ce": ce / predictions}


def flops(student: int, teacher: int, tokens: int) -> int:
    """The usual estimate of what training cost, `FLOPS`, from active parameters (0 of a teacher that did not run)."""
    return 6 * student * tokens + 2 * teacher * tokens


def active_parameters(model: PreTrainedModel, top_k: int) -> int:
    """Parameters that a token is multiplied with: all but the experts it is not routed to and the input embedding
    (unless that is the output layer too).
    """
    experts = expert_counts(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = embedding.weight if head is None or head.weight is not embedding.weight else None
    active = 0
    for name, parameter in model.named_parameters():
        here = role(name, parameter.shape, experts)
        if here.kind == "fused":
            active += parameter.numel() * top_k // experts[here.layer]
        elif parameter is not looked_up:
            active += parameter.numel()
    return active
