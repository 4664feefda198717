"""Wanda (arXiv 2306.11695) on the experts that a plan leaves: the second half of "HodgeCover + Wanda"."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import grouped_mm_experts_forward

from harness.blocks import compress, moe_blocks
from harness.calibrate import Batches, packed_batches
from harness.data import Calibration
from harness.errors import UserError
from harness.models import Model
from harness.packing import packed
from harness.plan import Plan
from harness.remake import Remaking, check_even, check_no_copies, check_plain, save
from harness.seam import experts_run_through

if TYPE_CHECKING:
    from methods import Method

FEW = 32  # tokens, below which an expert's own input norms are not trusted


@dataclass(frozen=True)
class Wanda:
    """Of the experts that stay, the weights that matter least for their inputs become zero. Nothing is trained.

    In each row i of the gate, up and down matrices (b weights W_ij) all but the round((1 - r2) b) largest of

        |W_ij| * ||X_j||_2

    become zero, X_j the input channel j over the tokens routed to that expert: the hidden state for gate and up,
    act(gate) * up for down. Ties: the lower j stays.

    Options: ``share`` r2, or ``total`` r_tot, the share of all expert weights to be gone or zero, of which the plan
    has already dropped r1: r2 = max(0, (r_tot - r1) / (1 - r1)). One of the two; the other is null. ``text``: what the
    norms are taken on.

    Source: Wanda, arXiv 2306.11695; with experts dropped first (r1 = 0.20) HodgeCover, arXiv 2605.13997.

    Where we differ: the norms of all layers come from one pass of the model under the plan, before any weight is zero;
    Wanda goes from layer to layer. An expert with fewer than 32 tokens takes its layer's norms, the sum over all
    experts. Zeros are scattered and save no memory in a dense checkpoint: the report says sparsity, never bytes.
    """

    share: float | None
    total: float | None
    text: Calibration
    ignores_plan: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.share is None) == (self.total is None):
            raise UserError(f"recovery.share={self.share} and recovery.total={self.total}: set one of them, not both.")
        given = self.share if self.share is not None else self.total
        if given is None or not 0 <= given < 1:
            raise UserError(f"recovery: {given} is no share of weights to make zero. Give one from 0 up, below 1.")

    @property
    def forward_tokens(self) -> int:
        return self.text.length * (self.text.sequences + 4 * self.text.held_out)

    def check(self, model: Model, method: Method) -> None:
        model.check_compressible()
        check_plain(model)
        self.text.check()

    def check_plan(self, plan: Plan) -> None:
        """Raise UserError for plans whose checkpoint could not be pruned as what it is."""
        check_even(plan)
        check_no_copies(plan, "Wanda")

    def share_after(self, plan: Plan) -> float:
        """r2, the share of each row that becomes zero under this plan."""
        if self.share is not None:
            return self.share
        assert self.total is not None
        dropped = dropped_share(plan)
        return max(0.0, (self.total - dropped) / (1 - dropped))

    def remake(self, given: Remaking, folder: Path) -> dict[str, Any]:
        """Report: r1, r2, the share of zeros in the experts' matrices, the experts with few tokens, tokens, seconds."""
        start = time.perf_counter()
        self.check_plan(given.plan)
        share = self.share_after(given.plan)
        ids, _ = packed(self.text, given.model, given.store)
        model = given.model.load("float32")
        compress(model, given.plan.layers)
        norms = input_norms(model, packed_batches(ids, self.text.batch_size))
        for layer, block in moe_blocks(model).items():
            prune(block.experts, norms[layer], share)  # type: ignore[arg-type]
        save(model, given.model, given.plan, folder)
        return {
            "dropped": dropped_share(given.plan),
            "share": share,
            "sparsity": sparsity(model),
            "few_tokens": {layer: few for layer, seen in norms.items() if (few := seen.few)},
            "tokens": int(ids.size),
            "seconds": time.perf_counter() - start,
        }


def dropped_share(plan: Plan) -> float:
    """r1: the share of the routed experts that the plan leaves out."""
    return 1 - sum(plan.distinct_experts().values()) / sum(len(layer.routes) for layer in plan.layers.values())


def sparsity(model: PreTrainedModel) -> float:
    """The share of zeros in the experts' matrices."""
    experts = [block.experts for block in moe_blocks(model).values()]
    matrices = [matrix for fused in experts for _, matrix in _matrices(fused)]  # type: ignore[arg-type]
    return float(sum((matrix == 0).sum() for matrix in matrices) / sum(matrix.numel() for matrix in matrices))


@dataclass
class InputNorms:
    """Sums over the tokens routed to each expert of one layer, float64: tokens [E], the squares of its input channels
    [E, H] and of its hidden units [E, I].
    """

    tokens: Tensor
    inputs: Tensor
    units: Tensor

    @property
    def few(self) -> list[int]:
        """Experts that too few tokens were routed to."""
        return torch.nonzero(self.tokens < FEW).flatten().tolist()

    def of(self, part: str) -> Tensor:
        """||X_j||_2 [E, H] of ``gate_up_proj``, [E, I] of ``down_proj``: the layer's where an expert saw few tokens."""
        squares = self.units if part == "down_proj" else self.inputs
        return torch.where((self.tokens < FEW).unsqueeze(1), squares.sum(0), squares).sqrt()


def input_norms(model: PreTrainedModel, batches: Batches) -> dict[int, InputNorms]:
    """The sums of every MoE layer, over batches without padding. Raises UserError where experts have no gate matrix or
    do not go through transformers' experts interface.
    """
    watch = _Watch({block.experts: layer for layer, block in moe_blocks(model).items()})  # type: ignore[misc]
    with experts_run_through(model, watch.forward), torch.no_grad():
        for ids, _ in batches:
            model(input_ids=ids.to(model.device), use_cache=False)
    return watch.seen


@dataclass
class _Watch:
    layer_of: dict[nn.Module, int]
    seen: dict[int, InputNorms] = field(default_factory=dict)

    def forward(self, experts: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The experts function: transformers' own, which sorts (token, expert) pairs by expert before it multiplies."""
        if not getattr(experts, "has_gate", True):
            raise UserError(f"{type(experts).__name__} has no gate matrix; Wanda is for gate, up and down.")
        units: list[Tensor] = []
        gated: Callable[[Tensor], Tensor] = experts._apply_gate  # type: ignore[assignment]

        def note(product: Tensor) -> Tensor:
            units.append(gated(product))
            return units[0]

        experts._apply_gate = note  # type: ignore[assignment]
        try:
            output = grouped_mm_experts_forward(experts, hidden, index, weight)
        finally:
            del experts._apply_gate
        self._add(experts, hidden, index, units[0])
        return output

    def _add(self, experts: nn.Module, hidden: Tensor, index: Tensor, units: Tensor) -> None:
        count = int(experts.num_experts)  # type: ignore[arg-type]
        expert = index.reshape(-1)
        rows = hidden.repeat_interleave(index.shape[1], dim=0)
        found = InputNorms(
            torch.bincount(expert, minlength=count),
            _squares(rows, expert, count),
            _squares(units, expert.sort().values, count),
        )
        layer = self.layer_of[experts]
        if layer in self.seen:
            seen = self.seen[layer]
            found = InputNorms(*(getattr(seen, name) + getattr(found, name) for name in ("tokens", "inputs", "units")))
        self.seen[layer] = found


def _squares(rows: Tensor, expert: Tensor, count: int) -> Tensor:
    """Sums of the squares of rows [N, C] by expert [N]: float64 [E, C]."""
    zeros = torch.zeros(count, rows.shape[1], dtype=torch.float64, device=rows.device)
    return zeros.index_add(0, expert, rows.double().square())


@torch.no_grad()
def prune(experts: nn.Module, norms: InputNorms, share: float) -> None:
    """Set the share of each row of the fused matrices to zero that matters least."""
    for name, matrix in _matrices(experts):
        rows = matrix.transpose(1, 2) if experts.is_transposed else matrix  # [E, out, in], a view
        rows.masked_fill_(~largest(rows.abs() * norms.of(name).unsqueeze(1), share), 0)


def largest(importance: Tensor, share: float) -> Tensor:
    """Mask of the round((1 - share) b) largest of each row [..., b]; of equal ones the first."""
    keep = round((1 - share) * importance.shape[-1])
    order = importance.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return torch.zeros_like(importance, dtype=torch.bool).scatter(-1, order, True)


def _matrices(experts: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return [(name, weight) for name, weight in experts.named_parameters(recurse=False) if weight.dim() == 3]
