"""A model's tensors after a plan, as a stream: kept ones bit for bit, dropped ones left out, merged ones averaged.

The same stream becomes a checkpoint on disk (``harness/checkpoint.py``) or goes straight into an engine
(``harness/plan_loader.py``). It reads safetensors by name and shape, in the memory of one tensor plus one layer's
merged experts, and knows no model class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError
from harness.models import Model
from harness.plan import LayerPlan, Plan, Source
from harness.roles import TABLE, Role, layer_index, role
from harness.tensors import Entry, Tensor

if TYPE_CHECKING:
    import torch

# Plain floating-point types of safetensors, by torch's names. Other types pass through as bytes.
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
MERGEABLE = ("BF16", "F16", "F32")

# An expert's matrices by where its hidden units are: the rows of gate and up, the columns of down.
UNITS_FIRST = ("gate_proj.weight", "up_proj.weight", "w1.weight", "w3.weight")
UNITS_LAST = ("down_proj.weight", "w2.weight")

CLOSED = -1e9  # router bias of an expert that must never be chosen: finite, so that nothing computes inf - inf


@dataclass(frozen=True)
class Layout:
    """How one layer's experts and router rows are stored.

    experts: for each new expert, the old expert in whose place it is written, and its slot in the plan.
    rows: for each new router row, the old row; None for a row that must never be chosen.
    """

    experts: tuple[tuple[int, int], ...]
    rows: tuple[int | None, ...]

    @classmethod
    def stock(cls, layer: LayerPlan, count: int) -> Layout:
        """One expert per router row, as every engine knows it: merged slots are copied to each of their rows, and up to
        ``count`` there are copies of the first expert behind closed rows.
        """
        kept = layer.kept_rows
        padding = count - len(kept)
        experts = [(row, layer.routes[row]) for row in (*kept, *[kept[0]] * padding)]
        return cls(tuple(experts), (*kept, *[None] * padding))  # type: ignore[arg-type]

    @cached_property
    def places(self) -> dict[int, list[tuple[int, int]]]:
        """For an old expert: the new experts written in its place, with their slots."""
        places: dict[int, list[tuple[int, int]]] = {}
        for new, (home, slot) in enumerate(self.experts):
            places.setdefault(home, []).append((new, slot))
        return places

    @classmethod
    def slots(cls, layer: LayerPlan) -> Layout:
        """Each distinct expert once, behind the plan's router rows; whoever serves it maps rows to slots."""
        return cls(tuple((sources[0].expert, slot) for slot, sources in enumerate(layer.slots)), layer.kept_rows)


@dataclass(frozen=True)
class Job:
    """One tensor to make: its header, and the old tensor it stands for. slot: of an expert's tensor."""

    entry: Entry
    source: str
    role: Role
    slot: int = -1


class Rewrite:
    """The tensors of a model under a plan, in the given layouts."""

    def __init__(self, model: Model, plan: Plan, layouts: Mapping[int, Layout]) -> None:
        self.model = model
        self.plan = plan
        self.layouts = layouts
        self.merged: dict[tuple[int, str], bytes] = {}  # of the layer being made: (slot, part) -> bytes
        self.orders: dict[int, torch.Tensor] = {}  # of its experts that are aligned to another's hidden units
        self.merged_layer = -1
        check_tables(model, plan)

    @cached_property
    def files(self) -> dict[Path, list[Job]]:
        """What becomes of each file of the model, in the order of its tensors."""
        jobs: dict[Path, list[Job]] = {}
        for name, tensor in self.model.tensors.items():
            jobs.setdefault(tensor.file, []).extend(self._jobs(name, tensor))
        return jobs

    def contents(self, jobs: list[Job]) -> Iterator[bytes]:
        """The bytes of each tensor, made when its turn comes."""
        return map(self.content, jobs)

    def content(self, job: Job) -> bytes:
        tensor = self.model.tensors[job.source]
        if job.role.kind == "other":
            return tensor.read()
        layer = self.plan.layers[job.role.layer]
        if job.role.kind == "expert":
            return self._expert(layer, job)
        rowwise = Tensor(tensor.file, tensor.dtype, (len(layer.routes),), tensor.start, tensor.end)
        if job.role.kind == "router":
            return b"".join(_router_row(rowwise, row, job.role) for row in self.layouts[job.role.layer].rows)
        return b"".join(_mix_rows(rowwise, layer.slots[slot]) for _, slot in self.layouts[job.role.layer].experts)

    def _jobs(self, name: str, tensor: Tensor) -> list[Job]:
        """The new tensors that stand where ``name`` stood: usually one, none if its expert is dropped."""
        here = role(name, tensor.shape, self.model.experts)
        if here.kind == "other" or here.layer not in self.plan.layers:
            return [Job(Entry(name, tensor.dtype, tensor.shape, tensor.nbytes), name, Role("other"))]
        layout = self.layouts[here.layer]
        if here.kind == "expert":
            return [
                Job(Entry(f"{here.prefix}{new}.{here.part}", tensor.dtype, tensor.shape, tensor.nbytes), name, here, to)
                for new, to in layout.places.get(here.expert, [])
            ]
        old = len(self.plan.layers[here.layer].routes)
        new = len(layout.rows if here.kind == "router" else layout.experts)
        shape = (new, *tensor.shape[1:]) if tensor.shape[0] == old else (1, new)
        return [Job(Entry(name, tensor.dtype, shape, tensor.nbytes // old * new), name, here)]

    def _expert(self, layer: LayerPlan, job: Job) -> bytes:
        here, sources = job.role, layer.slots[job.slot]
        tensor_of = {s.expert: self.model.tensors[f"{here.prefix}{s.expert}.{here.part}"] for s in sources}
        if len(sources) == 1:
            return tensor_of[sources[0].expert].read()
        if self.merged_layer != here.layer:
            self.merged, self.merged_layer = {}, here.layer
            self.orders = self._unit_orders(layer, here.prefix) if layer.align else {}
        if (job.slot, here.part) not in self.merged:
            parts = [(self._ordered(tensor_of[s.expert], s.expert, here.part), s.weight) for s in sources]
            dtype = tensor_of[sources[0].expert].dtype
            self.merged[job.slot, here.part] = weighted_mean(parts, dtype)
        return self.merged[job.slot, here.part]

    def _unit_orders(self, layer: LayerPlan, prefix: str) -> dict[int, torch.Tensor]:
        from harness.align import unit_orders  # torch and scipy, which only this needs

        return unit_orders(layer, lambda expert: self._units(prefix, expert))

    def _units(self, prefix: str, expert: int) -> list[torch.Tensor]:
        """An expert's matrices with one row per hidden unit."""
        parts = {part: self.model.tensors.get(f"{prefix}{expert}.{part}") for part in (*UNITS_FIRST, *UNITS_LAST)}
        present = {part: tensor for part, tensor in parts.items() if tensor is not None}
        return [_matrix(tensor) if part in UNITS_FIRST else _matrix(tensor).T for part, tensor in present.items()]

    def _ordered(self, tensor: Tensor, expert: int, part: str) -> bytes:
        """An expert's matrix, its hidden units in the order that the plan's alignment asks for."""
        order = self.orders.get(expert)
        if order is None:
            return tensor.read()
        matrix = _matrix(tensor)
        ordered = matrix[order] if part in UNITS_FIRST else matrix[:, order]
        return _encoded(ordered)


def check_tables(model: Model, plan: Plan) -> None:
    """Raise UserError if the plan drops experts of a layer that sends tokens to them by a table of token ids."""
    for name in model.tensors:
        if not name.endswith(TABLE):
            continue
        layer = layer_index(name)
        if layer in plan.layers and None in plan.layers[layer].routes:
            raise UserError(
                f"Layer {layer} of {model.name} sends each token to its experts by a table of token ids "
                f"({name}), as DeepSeek-V4 does in its first layers, and the plan drops some of them. Which experts "
                "those tokens should go to instead, no method says. Choose one that merges experts and keeps their "
                "router rows, such as method=m_smoe."
            )


def _router_row(tensor: Tensor, row: int | None, here: Role) -> bytes:
    if row is not None:
        return tensor.read_rows([row])
    size = tensor.nbytes // tensor.shape[0]
    return _closed(tensor.dtype) if is_bias(here) else bytes(size)


def is_bias(router: Role) -> bool:
    """Whether a router's tensor is added to its logits or scores, one number per expert."""
    return router.part.endswith("bias")


def _mix_rows(tensor: Tensor, sources: tuple[Source, ...]) -> bytes:
    if len(sources) == 1:
        return tensor.read_rows([sources[0].expert])
    return weighted_mean([(tensor.read_rows([s.expert]), s.weight) for s in sources], tensor.dtype)


def weighted_mean(parts: list[tuple[bytes, float]], dtype: str) -> bytes:
    """Mean of equally long raw tensors with weights that sum to 1, added up in float32 and cast back once."""
    import torch

    if dtype not in MERGEABLE:
        raise UserError(
            f"Experts stored as {dtype} cannot be averaged. Merge a checkpoint in one of {', '.join(MERGEABLE)}, or "
            "prune this one."
        )
    total = torch.zeros(())
    for data, weight in parts:
        values = decoded(data, dtype)
        total = total + weight * values.float()
    return _encoded(total.to(values.dtype))


def _encoded(values: torch.Tensor) -> bytes:
    import torch

    return values.contiguous().view(torch.uint8).numpy().tobytes()


def _closed(dtype: str) -> bytes:
    """The bias of a row that must never be chosen, in a type that may not reach as far (float16)."""
    import torch

    kind = getattr(torch, FLOATS[dtype])
    return _encoded(torch.tensor([max(CLOSED, torch.finfo(kind).min)], dtype=kind))


def _matrix(tensor: Tensor) -> torch.Tensor:
    return decoded(tensor.read(), tensor.dtype).reshape(tensor.shape)


def decoded(data: bytes, dtype: str) -> torch.Tensor:
    """Raw bytes of one of the types in FLOATS as a flat tensor."""
    import torch

    return torch.frombuffer(bytearray(data), dtype=getattr(torch, FLOATS[dtype]))
