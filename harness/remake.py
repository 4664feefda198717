"""Remakes: new weights for a compressed model, written as an ordinary checkpoint.

Exporting a plan copies and averages what the original model holds. A remake goes on from there: it trains the
compressed model (`harness.recovery`) or sets more of its weights to zero (`harness.wanda`). What it writes has the
names, shapes and stored types of the plan's export, so it is verified, served and scored like one.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness import checkpoint, tensors
from harness.data import Calibration
from harness.errors import StageError, UserError
from harness.models import Model
from harness.plan import Plan
from harness.rewrite import FLOATS, MERGEABLE
from harness.roles import role
from harness.stats import Stats
from harness.store import Store
from harness.tensors import Entry, Tensor

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from methods import Method

SCHEMA = 2  # raise it when a change of our code changes the weights that a remake makes


@dataclass(frozen=True)
class Remaking:
    """What a remake is given. model: the original. plan: what becomes of its experts, as ``method`` says at ``ratio``.
    stats: of the calibration text. store: for what several cells share.
    """

    model: Model
    plan: Plan
    stats: Stats
    ratio: float
    method: Method
    store: Store


class Remake(Protocol):
    @property
    def text(self) -> Calibration:
        """What it trains or measures on."""

    @property
    def ignores_plan(self) -> bool:
        """Whether the cell's plan stays the identity, because the remake itself says what becomes of the experts."""

    @property
    def forward_tokens(self) -> int:
        """Tokens through the model, about: a backward pass counts as two more."""

    def check(self, model: Model, method: Method) -> None:
        """Raise UserError, before any work, for what cannot work of this model and method."""

    def remake(self, given: Remaking, folder: Path) -> dict[str, Any]:
        """Write the checkpoint into the empty folder. Returns a report of JSON values: tokens, seconds, losses."""


def identity(remake: Remake) -> dict[str, Any]:
    """What determines the weights besides model and plan: the class, its options, and the text by its contents."""
    kind = type(remake)
    options = {field.name: getattr(remake, field.name) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "options": {name: _identity(value) for name, value in options.items()},
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "schema": SCHEMA,
    }


def _identity(option: Any) -> Any:
    if isinstance(option, Calibration):
        return {**option.identity(), "held_out": option.held_out}
    if dataclasses.is_dataclass(option) and not isinstance(option, type):
        return dataclasses.asdict(option)
    return option


def check_plain(model: Model) -> None:
    """Raise UserError unless experts and routers are stored as plain floating-point numbers."""
    for name, tensor in model.tensors.items():
        plain = role(name, tensor.shape, model.experts).kind == "other" or tensor.dtype in MERGEABLE
        if not plain or "quantization_config" in model.config:
            raise UserError(
                f"model {model.name!r} is stored in a quantised type ({name}: {tensor.dtype}), whose weights cannot be "
                f"trained or changed one by one. Take a checkpoint in one of {', '.join(MERGEABLE)}, or leave recovery "
                "out."
            )


def check_even(plan: Plan) -> None:
    """Raise UserError unless a stock checkpoint holds the plan without padding: as many router rows in each layer."""
    counts = set(plan.written_experts().values())
    if len(counts) > 1:
        raise UserError(
            f"The plan leaves between {min(counts)} and {max(counts)} router rows per layer, and recovery writes a "
            "stock checkpoint, which has one count for all. Use allocation=uniform, or leave recovery out."
        )


def check_no_copies(plan: Plan, what: str) -> None:
    """Raise UserError if merged experts would be copied to several router rows: changed one by one, copies differ."""
    if plan.written_experts() != plan.distinct_experts():
        raise UserError(
            f"The plan keeps more router rows than distinct experts, so merged experts are copied to each of their "
            f"rows. {what} would change each copy in its own way and the model would no longer be the smaller one. "
            "Choose a method that prunes or absorbs (partial_preserve), or recovery=router."
        )


def save(trained: PreTrainedModel, original: Model, plan: Plan, folder: Path) -> None:
    """Write a model in memory into the empty folder, under the names, shapes and stored types of the plan's export.

    trained: ``original`` loaded by transformers, compressed by ``plan`` (`harness.blocks.compress`) and changed since.
    Weights that did not change come out as the export has them, bit for bit. Config and tokenizer are the export's.
    Raises StageError if transformers does not give the weights back under the names they were stored by.
    """
    checkpoint.export(original, plan, folder)
    exported = Model(folder.name, str(folder)).tensors
    values = on_disk(trained)
    _check_inventory(exported, values)
    for file, old in tensors.by_file(exported).items():
        entries = [Entry(name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in old.items()]
        partial = file.with_name(f".partial-{file.name}")
        tensors.write(partial, entries, _contents(old, values))
        partial.replace(file)
    checkpoint.verify(folder, original)


def on_disk(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a model in memory as its checkpoint names and splits them: transformers' own conversion, which
    fuses experts when it loads them, reversed.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, model.state_dict())


def _check_inventory(exported: Mapping[str, Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Every weight in memory has its place on disk. (The disk may hold more, which transformers does not load; tied
    weights are in memory under two names.)
    """
    places: dict[int, bool] = {}
    for name, value in values.items():
        here = name in exported
        if here and tuple(value.shape) != exported[name].shape:
            raise StageError(f"{name} has shape {tuple(value.shape)} in memory and {exported[name].shape} on disk.")
        places[value.data_ptr()] = places.get(value.data_ptr(), False) or here
    if lost := [name for name, value in values.items() if not places[value.data_ptr()]]:
        raise StageError(f"transformers names weights that the checkpoint does not hold: {lost[:5]}.")


def _contents(exported: Mapping[str, Tensor], values: Mapping[str, torch.Tensor]) -> Iterator[bytes]:
    import torch

    for name, tensor in exported.items():
        if name not in values or tensor.dtype not in FLOATS:
            yield tensor.read()
        else:
            value = values[name].detach().to("cpu", getattr(torch, FLOATS[tensor.dtype]))
            yield value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
