"""A budget router: how much of each axis a nested model keeps, learned instead of given.

    pi = W_2 LeakyReLU(W_1 onehot(b) + b_1) + b_2           logits over the possible sizes of an axis, of budget b
    P  = softmax((kappa log_softmax(pi) + g) / tau)         g Gumbel noise; tau 1 -> 0.05, kappa 1 -> 10, linear
    I  = sum_i P_i 1[rank < c_i]                            soft mask over the components sorted by importance
    L  = KL(teacher || student under I) + lambda |C - target| / target

with C the parameter count as a polynomial of the expected sizes sum_i P_i c_i. After training the likeliest size of
each axis is taken. The router sees no text: it learns which shape suits each budget, and costs nothing when serving.

Source: Star Elastic, arXiv 2605.07182 (masks of mode 2); the router's inside is Nemotron Elastic's, arXiv 2511.16664.

Where we differ: the paper's second term is |C - target|, which we divide by the target, so that lambda = 1 means the
same for models of any size. C counts parameters (total or active), not memory or latency. Depth is no axis here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.distill import soft_cross_entropy
from harness.nested import Budget, Term, check_budget, sizes, terms
from harness.nested_masks import Masks, masking

HIDDEN = 256  # channels inside the router
TAU, KAPPA = (1.0, 0.05), (1.0, 10.0)  # first and last

Sizes = Callable[[str, int], Tensor | int]  # axis and layer (-1: outside the layers) -> components that are kept


@dataclass(frozen=True)
class Choice:
    """What is chosen on one axis. sizes: how many components may stay. full: how many there are. layers: those that
    choose for themselves (heterogeneous); none: one choice for all (homogeneous), as stock engines need.
    """

    axis: str
    sizes: tuple[int, ...]
    full: int
    layers: tuple[int, ...] = ()

    def row(self, layer: int) -> int:
        """Which row of the choices is this layer's."""
        return self.layers.index(layer) if self.layers else 0


class BudgetRouter(nn.Module):
    """One small network per axis, from the number of a budget to logits over the axis' sizes."""

    def __init__(self, choices: Sequence[Choice], budgets: int) -> None:
        super().__init__()
        self.choices, self.budgets = tuple(choices), budgets
        self.maps = nn.ModuleDict({choice.axis: _network(budgets, choice) for choice in choices})

    def logits(self, budget: int) -> dict[str, Tensor]:
        """pi of each axis, [rows, sizes]."""
        first = next(self.parameters())
        onehot = torch.zeros(self.budgets, dtype=first.dtype, device=first.device)
        onehot[budget] = 1
        return {c.axis: self.maps[c.axis](onehot).view(-1, len(c.sizes)) for c in self.choices}

    @torch.no_grad()
    def chosen(self, budget: int) -> dict[str, tuple[int, ...]]:
        """The likeliest size of each axis, for each of its rows."""
        best = {axis: logits.argmax(-1).tolist() for axis, logits in self.logits(budget).items()}
        return {choice.axis: tuple(choice.sizes[place] for place in best[choice.axis]) for choice in self.choices}


def _network(budgets: int, choice: Choice) -> nn.Sequential:
    outputs = max(1, len(choice.layers)) * len(choice.sizes)
    return nn.Sequential(nn.Linear(budgets, HIDDEN), nn.LeakyReLU(), nn.Linear(HIDDEN, outputs))


def anneal(step: int, steps: int, ends: tuple[float, float]) -> float:
    """Linear from the first of ``ends`` at step 0 to the last at step steps-1."""
    return ends[0] + (ends[1] - ends[0]) * step / max(1, steps - 1)


def gumbel(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """-log(-log(U)), U uniform: float64."""
    uniform = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    return -(-uniform.clamp_min(1e-300).log()).clamp_min(1e-300).log()


def probabilities(logits: Tensor, noise: Tensor, kappa: float, tau: float) -> Tensor:
    """P [rows, sizes] of logits pi and Gumbel noise of that shape."""
    return ((kappa * logits.log_softmax(-1) + noise.to(logits)) / tau).softmax(-1)


def soft_mask(chances: Tensor, choice: Choice) -> Tensor:
    """I [rows, full] of P [rows, sizes]: 1 for components that every likely size keeps, most important first."""
    rank = torch.arange(choice.full, device=chances.device)
    kept = rank < torch.tensor(choice.sizes, device=chances.device)[:, None]
    return chances @ kept.to(chances)


def soft_masks(whole: Masks, choices: Sequence[Choice], chances: Mapping[str, Tensor]) -> Masks:
    """The masks of the axes that are chosen; the others stay as in ``whole``."""
    found: dict[str, Any] = {}
    for choice in choices:
        mask, layers = soft_mask(chances[choice.axis], choice), getattr(whole, choice.axis)
        by_layer = choice.axis != "hidden"
        found[choice.axis] = {layer: mask[choice.row(layer)] for layer in layers} if by_layer else mask[0]
    return replace(whole, **found)


def expected_sizes(choices: Sequence[Choice], chances: Mapping[str, Tensor], full: Mapping[str, int]) -> Sizes:
    """sum_i P_i c_i of the axes that are chosen, ``full`` of the others."""
    known = {choice.axis: (choice, chances[choice.axis] @ _sizes(choice, chances)) for choice in choices}

    def size(axis: str, layer: int) -> Tensor | int:
        if axis not in known:
            return full[axis]
        choice, found = known[axis]
        return found[choice.row(layer)]

    return size


def _sizes(choice: Choice, chances: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor(choice.sizes).to(chances[choice.axis])


def cost(of: Sequence[Term], size: Sizes, top_k: int | None = None) -> Tensor:
    """The parameter count at these sizes; with ``top_k``, of the experts that one token uses."""
    total = torch.zeros((), dtype=torch.float64)
    for term in of:
        count: Tensor | float = float(term.coefficient)
        for axis in term.axes:
            active = term.routed and axis == "experts" and top_k is not None
            count = count * (top_k if active else size(axis, term.layer))  # type: ignore[operator]
        total = total + count
    return total


def cost_loss(found: Tensor, target: float, weight: float = 1.0) -> Tensor:
    """lambda |C - target| / target."""
    return weight * (found - target).abs() / target


def learn(
    router: BudgetRouter,
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    targets: Sequence[float],
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train the router alone, the sorted model frozen and its own teacher. One budget, drawn evenly, and one batch of
    token ids [B, T] per step. targets: the parameter count of each budget. Raises UserError for a size that the model
    cannot have.
    """
    for choice in router.choices:
        for count in choice.sizes:
            check_budget(model, Budget(choice.axis, **{choice.axis: count}))
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(router.parameters(), lr=learning_rate, weight_decay=0.0)
    whole, polynomial, full = Masks.full(model), terms(model), sizes(model)
    model.requires_grad_(False)
    for step in range(steps):
        ids = batches[step % len(batches)].to(model.device)
        budget = int(torch.randint(router.budgets, (), generator=draw))
        kappa, tau = anneal(step, steps, KAPPA), anneal(step, steps, TAU)
        chances = {
            axis: probabilities(logits, gumbel(logits.shape, draw), kappa, tau)
            for axis, logits in router.logits(budget).items()
        }
        with torch.no_grad():
            wanted = model(input_ids=ids, use_cache=False).logits
        with masking(model, soft_masks(whole, router.choices, chances)):
            said = model(input_ids=ids, use_cache=False).logits
        found = cost(polynomial, expected_sizes(router.choices, chances, full))
        loss = soft_cross_entropy(said, wanted) + cost_loss(found, targets[budget])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
