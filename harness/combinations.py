"""What cannot work of a cell's parts together, known before any work from headers and settings alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from harness import checkpoint
from harness.errors import UserError
from harness.external import Server
from harness.hf import Transformers
from harness.plan import LayerPlan, Plan
from harness.rewrite import MERGEABLE, check_tables
from harness.roles import role
from harness.serve import VLLM
from harness.trial import trial_plan
from methods.allocations.uniform import Uniform

if TYPE_CHECKING:
    from harness.spec import Cell

LONGEST_NAME = 220  # bytes of a file's name in the store; systems take 255, and temporary names are longer


def check(cell: Cell) -> None:
    """Raise UserError for a method, allocation, recovery, text or server that does not go with the others."""
    _check_names(cell)
    _check_serve(cell.serve)
    _check_length(cell)
    if not cell.compresses:
        return
    if isinstance(cell.serve, Server):
        raise UserError(
            f"{cell.label} makes a model of its own, and {cell.serve.url} serves another. Use serve=vllm, "
            "or serve the compressed checkpoint yourself and score it there with method=none."
        )
    if "reconstruction" in cell.needs and not cell.calibration.held_out:
        raise UserError(f"{cell.label} needs held-out tokens. Set calibration.held_out to some sequences.")
    if not cell.keeps_experts:
        _check_counts(cell)
        _check_search(cell)
        _check_barriers(cell)
        _check_plans(cell)


def _check_length(cell: Cell) -> None:
    positions = cell.model.config.get("max_position_embeddings")
    reads = cell.calibrates or cell.measures_errors
    if reads and isinstance(positions, int) and cell.calibration.length > positions:
        raise UserError(
            f"calibration.length={cell.calibration.length} is longer than the {positions} positions that model "
            f"{cell.model.name!r} has: what it computes beyond them it never learnt. Largest usable: {positions}."
        )


def check_stock(cell: Cell) -> None:
    """Raise UserError where layers will keep different numbers of experts and no stock checkpoint can hold that."""
    if not _has_own_counts(cell) or len(cell.model.experts) < 2:
        return
    first = min(cell.model.experts)
    uneven = {layer: LayerPlan.prune(range(e - (layer == first)), e) for layer, e in cell.model.experts.items()}
    try:
        checkpoint.check_stock(cell.model, Plan(uneven))
    except UserError as error:
        raise UserError(
            f"{cell.label} gives each layer its own number of experts, and a stock checkpoint has one for all: this "
            "model's router has no bias by which smaller layers could be padded. Serve the plan itself (serve=vllm or "
            "serve=plan), or choose allocation=uniform and a method with one count for all."
        ) from error


def _has_own_counts(cell: Cell) -> bool:
    """Whether the layers may keep different numbers of experts."""
    total = getattr(cell.method, "counts", "layer") == "total"
    return cell.compresses and not cell.keeps_experts and (total or not isinstance(cell.allocation, Uniform))


def _check_names(cell: Cell) -> None:
    """Names become file names and rows of tables."""
    if not cell.model.name.strip() or not cell.calibration.name.strip():
        raise UserError(f"model.name={cell.model.name!r}, calibration.name={cell.calibration.name!r}: name both.")
    for task in cell.tasks:
        size = len(f"{cell.slug}-{task.name}".encode())
        if size > LONGEST_NAME or "/" in task.name:
            raise UserError(
                f"Results of {task.name!r} on {cell.model.name!r} would be kept under names of {size} bytes, and they "
                f"can take {LONGEST_NAME}, none of them a slash. Shorten model.name or the task's name."
            )


def _check_serve(serve: Any) -> None:
    if isinstance(serve, VLLM | Transformers):
        for name, value in vars(serve).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise UserError(f"serve.{name}={value} is not above 0.")
    if isinstance(serve, VLLM) and serve.gpu_memory_utilization > 1:
        raise UserError(f"serve.gpu_memory_utilization={serve.gpu_memory_utilization} is a share, at most 1.")
    if isinstance(serve, Server):
        _check_url(serve.url)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        unusable = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:  # a port or an IPv6 address that is none
        unusable = True
    if unusable:
        raise UserError(f"serve.url={url} is no address of a server. Give it as http://host:port, without /v1.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"serve.url names {parts.hostname} together with a password, a query or a fragment, and all of it would be "
            "kept in records. Give it as http://host:port."
        )


def _check_counts(cell: Cell) -> None:
    """Counts that two would decide, that are asked for before a layer was reached, or that nothing later can take."""
    if not _has_own_counts(cell):
        return
    if int(cell.model.config.get("n_group") or 1) > 1:
        raise UserError(
            f"{cell.label}: the router of {cell.model.name} chooses among groups of experts (n_group), which the "
            "counts of a search need not divide. Choose allocation=uniform and a method with one count for all."
        )
    if cell.recovery is not None:
        raise UserError(
            f"{cell.label}: recovery writes a stock checkpoint, which has one expert count for all layers, and "
            "here each layer gets its own. Leave recovery out, or choose allocation=uniform and another method."
        )
    if not cell.serve.reads_plans:
        check_stock(cell)
    if isinstance(cell.allocation, Uniform):
        return
    if getattr(cell.method, "counts", "layer") == "total":
        raise UserError(f"{cell.label}: this method shares out the experts itself. Choose allocation=uniform.")
    if cell.in_sequence or "reconstruction" in cell.method.needs:
        raise UserError(
            f"{cell.label}: an allocation asks for the plan of a layer at every count, which this method cannot "
            "give before it runs. Choose allocation=uniform, or a method that reads statistics alone."
        )
    cell.allocation.check(cell.method)


def _check_search(cell: Cell) -> None:
    """A search reads a part of the calibration text."""
    for group, part in (("method", cell.method), ("allocation", cell.allocation)):
        asked: int = getattr(part, "sequences", 0)
        if "search" in part.needs and asked > cell.calibration.sequences:
            raise UserError(
                f"{cell.label} searches on {group}.sequences={asked} sequences, and calibration "
                f"{cell.calibration.name!r} has {cell.calibration.sequences}. Lower the one or raise "
                "calibration.sequences."
            )


def _check_barriers(cell: Cell) -> None:
    if "pair_barrier.lm" not in cell.needs:
        return
    from harness.barriers import LARGEST_LM

    passes = sum(math.comb(count, 2) for count in cell.model.experts.values())
    if passes > LARGEST_LM:
        raise UserError(
            f"{cell.label}: mode=lm runs the whole model for each of {passes} pairs of experts, and at most "
            f"{LARGEST_LM} are allowed. Choose mode=logit_lens, which costs a small part of that."
        )


def _check_plans(cell: Cell) -> None:
    """What is done with a plan later, by the kind of plan that the method makes."""
    made = trial_plan(cell.method)
    if made is None:
        return
    if any(len(slot) > 1 for slot in made.slots) and (stored := next(_not_mergeable(cell), None)):
        raise UserError(
            f"{cell.label} averages experts, and those of {cell.model.name} are stored as {stored}. Take a checkpoint "
            f"in one of {', '.join(MERGEABLE)}, or a method that prunes."
        )
    check_tables(cell.model, Plan(dict.fromkeys(cell.model.experts, made)))
    check_plan = getattr(cell.recovery, "check_plan", None)
    if check_plan is not None:
        check_plan(Plan({0: made}))


def _not_mergeable(cell: Cell) -> Iterator[str]:
    for name, tensor in cell.model.tensors.items():
        if role(name, tensor.shape, cell.model.experts).kind in ("expert", "fused") and tensor.dtype not in MERGEABLE:
            yield tensor.dtype
