"""From a plan to a normal Hugging Face checkpoint, and the checks before anyone serves it.

Export is a streaming rewrite of safetensors by name: kept tensors pass through bit for bit, dropped ones are left out,
merged ones are averaged in float32. ``config.json`` is patched in place, never written anew.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import tensors
from harness.errors import UserError
from harness.models import EXPERT_COUNT, Model, Role, role
from harness.plan import LayerPlan, Plan, Source
from harness.tensors import Entry, Tensor

if TYPE_CHECKING:
    import torch


# Plain floating-point types of safetensors, by torch's names. Other types pass through as bytes.
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
MERGEABLE = ("BF16", "F16", "F32")

# An expert's matrices by where its hidden units are: the rows of gate and up, the columns of down.
UNITS_FIRST = ("gate_proj.weight", "up_proj.weight", "w1.weight", "w3.weight")
UNITS_LAST = ("down_proj.weight", "w2.weight")


@dataclass(frozen=True)
class Size:
    """What a plan leaves of a model. Three different numbers, because merged experts are copied in a stock checkpoint:

    experts: written per layer in the checkpoint (one per router row). distinct: different experts per layer, mean
    over layers; both 0 for a dense model. parameters, bytes: of the checkpoint as written. distinct_bytes: were each
    distinct expert stored once.
    """

    experts: int
    distinct: float
    parameters: int
    bytes: int
    distinct_bytes: int


def measure(model: Model, plan: Plan) -> Size:
    """The size of the checkpoint `export` would write, from headers only."""
    parameters = written = distinct = 0
    for name, tensor in model.tensors.items():
        here = role(name, tensor.shape, model.experts)
        layer = plan.layers.get(here.layer)
        share, distinct_share = 1.0, 1.0
        if layer is not None and here.kind != "other":
            share = len(layer.kept_rows) / len(layer.routes)
            distinct_share = share if here.kind == "router" else len(layer.slots) / len(layer.routes)
        parameters += round(tensor.elements * share)
        written += round(tensor.nbytes * share)
        distinct += round(tensor.nbytes * distinct_share)
    slots = list(plan.distinct_experts().values())
    return Size(written_experts(plan), sum(slots) / max(1, len(slots)), parameters, written, distinct)


def written_experts(plan: Plan) -> int:
    """The one expert count of a stock checkpoint, 0 for a dense model. Raises UserError if layers differ."""
    counts = set(plan.written_experts().values()) or {0}
    if len(counts) != 1:
        raise UserError(
            f"The plan leaves between {min(counts)} and {max(counts)} router rows per layer, and a stock checkpoint "
            "has one expert count for all layers. Use a method or allocation with the same count in each layer."
        )
    return counts.pop()


def export(model: Model, plan: Plan, folder: Path) -> None:
    """Write the compressed model into the empty folder: tensors, patched config, tokenizer and whatever else lay there.

    One output file per input file, in the memory of one tensor plus one layer's merged experts.
    """
    plan.validate(model.experts, model.top_k)
    if any(layer.align for layer in plan.layers.values()):
        check_alignable(model)
    count = written_experts(plan)
    writer = _Writer(model, plan)
    names: dict[str, str] = {}
    for file in dict.fromkeys(tensor.file for tensor in model.tensors.values()):
        jobs = [job for name, tensor in model.tensors.items() if tensor.file == file for job in writer.jobs(name)]
        if jobs:
            tensors.write(folder / file.name, [job.entry for job in jobs], writer.contents(jobs))
        names |= {job.entry.name: file.name for job in jobs}
    _copy_rest(model.folder, folder)
    _patch_config(folder / "config.json", set(model.experts.values()), count)
    if (model.folder / tensors.INDEX).exists():
        total = sum(tensor.nbytes for tensor in tensors_of(folder))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (folder / tensors.INDEX).write_text(json.dumps(index, indent=2))


def tensors_of(folder: Path) -> list[Tensor]:
    return [tensor for file in sorted(folder.glob("*.safetensors")) for tensor in tensors.read_header(file).values()]


@dataclass(frozen=True)
class _Job:
    """One tensor to write: its header, and the old tensor(s) it is made of."""

    entry: Entry
    source: str
    role: Role


class _Writer:
    """Turns old tensors into new ones by the plan."""

    def __init__(self, model: Model, plan: Plan) -> None:
        self.model = model
        self.plan = plan
        self.merged: dict[tuple[int, str], bytes] = {}  # of the layer being written: (slot, part) -> bytes
        self.orders: dict[int, torch.Tensor] = {}  # of its experts that are aligned to another's hidden units
        self.merged_layer = -1

    def jobs(self, name: str) -> list[_Job]:
        """The new tensors that stand where tensor ``name`` stood: one, or none if its expert is dropped."""
        tensor = self.model.tensors[name]
        here = role(name, tensor.shape, self.model.experts)
        layer = self.plan.layers.get(here.layer)
        if layer is None or here.kind == "other":
            return [_Job(Entry(name, tensor.dtype, tensor.shape, tensor.nbytes), name, Role("other"))]
        if here.kind == "expert":
            if layer.routes[here.expert] is None:
                return []
            new = f"{here.prefix}{layer.kept_rows.index(here.expert)}.{here.part}"
            return [_Job(Entry(new, tensor.dtype, tensor.shape, tensor.nbytes), name, here)]
        rows, count = len(layer.kept_rows), len(layer.routes)
        shape = (rows, *tensor.shape[1:]) if tensor.shape[0] == count else (1, rows)
        return [_Job(Entry(name, tensor.dtype, shape, tensor.nbytes // count * rows), name, here)]

    def contents(self, jobs: list[_Job]) -> Iterator[bytes]:
        for job in jobs:
            tensor, layer = self.model.tensors[job.source], self.plan.layers.get(job.role.layer)
            if layer is None or job.role.kind == "other":
                yield tensor.read()
            elif job.role.kind == "expert":
                yield self._expert(layer, job.role)
            else:
                yield self._rows(layer, job.role, tensor)

    def _expert(self, layer: LayerPlan, here: Role) -> bytes:
        slot = layer.routes[here.expert]
        assert slot is not None
        sources = layer.slots[slot]
        tensor_of = {s.expert: self.model.tensors[f"{here.prefix}{s.expert}.{here.part}"] for s in sources}
        if len(sources) == 1:
            return tensor_of[sources[0].expert].read()
        if self.merged_layer != here.layer:
            self.merged, self.merged_layer = {}, here.layer
            self.orders = self._unit_orders(layer, here.prefix) if layer.align else {}
        if (slot, here.part) not in self.merged:
            parts = [(self._ordered(tensor_of[s.expert], s.expert, here.part), s.weight) for s in sources]
            dtype = tensor_of[sources[0].expert].dtype
            self.merged[slot, here.part] = weighted_mean(parts, dtype)
        return self.merged[slot, here.part]

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

    def _rows(self, layer: LayerPlan, here: Role, tensor: Tensor) -> bytes:
        rowwise = Tensor(tensor.file, tensor.dtype, (len(layer.routes),), tensor.start, tensor.end)
        if here.kind == "router":
            return rowwise.read_rows(layer.kept_rows)
        slots = [layer.slots[layer.routes[row]] for row in layer.kept_rows]  # type: ignore[index]
        return b"".join(_mix_rows(rowwise, sources) for sources in slots)


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


def _matrix(tensor: Tensor) -> torch.Tensor:
    return decoded(tensor.read(), tensor.dtype).reshape(tensor.shape)


def decoded(data: bytes, dtype: str) -> torch.Tensor:
    """Raw bytes of one of the types in FLOATS as a flat tensor."""
    import torch

    return torch.frombuffer(bytearray(data), dtype=getattr(torch, FLOATS[dtype]))


def _copy_rest(source: Path, target: Path) -> None:
    """Config, tokenizer, chat template, licence: every small file but weights and their index."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt", ".pth") and file.name != tensors.INDEX:
            shutil.copy(file, target / file.name)


def _patch_config(file: Path, old: set[int], new: int) -> None:
    """Change the expert count in the text of config.json, under whichever names it stands, and nothing else."""
    pattern = re.compile(r'("(?:' + "|".join(EXPERT_COUNT) + r')"\s*:\s*)(\d+)')

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}{new}" if int(match[2]) in old else match[0]

    text = file.read_text()
    patched = pattern.sub(replace, text)
    if patched != text:
        file.write_text(patched)


def verify(folder: Path, source: Model) -> None:
    """Raise UserError unless the checkpoint is whole: vLLM loads many broken ones silently and serves nonsense.

    Checked: headers and file lengths; every tensor that is no expert's or router's as in ``source``; experts of
    each layer numbered 0..E-1 with the same parts and shapes; E as config.json says; routers of E rows; finite values.
    """
    written = Model(folder.name, str(folder))
    if written.experts.keys() != source.experts.keys():
        raise UserError(f"{folder} has experts in layers {sorted(written.experts)}, not in {sorted(source.experts)}.")
    if (missing := _others(source) - _others(written)) or (missing := _others(written) - _others(source)):
        raise UserError(f"{folder}: tensors differ from the original's in name or shape: {sorted(missing)[:5]}.")
    check_structure(written)
    for name, tensor in written.tensors.items():
        if not _finite(tensor):
            raise UserError(f"{tensor.file}: tensor {name} holds values that are not finite.")


def check_alignable(model: Model) -> None:
    """Raise UserError unless every expert is stored as gate, up and down matrices of its own, in plain numbers."""
    for name, tensor in model.tensors.items():
        here = role(name, tensor.shape, model.experts)
        plain = here.part in (*UNITS_FIRST, *UNITS_LAST) and tensor.dtype in MERGEABLE
        if here.kind == "fused" or (here.kind == "expert" and not plain):
            raise UserError(
                f"Hidden units cannot be aligned: {name} ({tensor.dtype}) is no plain gate, up or down matrix of one "
                "expert. Choose a method that does not align, such as m_smoe with method.align=null."
            )


def check_structure(model: Model) -> None:
    """Raise UserError unless experts, routers and config.json of a checkpoint fit together. Reads headers only."""
    parts: dict[int, dict[int, dict[str, tuple[int, ...]]]] = {layer: {} for layer in model.experts}
    routers: dict[int, dict[str, tuple[int, ...]]] = {layer: {} for layer in model.experts}
    expected = {layer: model.expert_count for layer in model.experts}
    for name, tensor in model.tensors.items():
        here = role(name, tensor.shape, expected)
        if here.kind == "expert":
            parts[here.layer].setdefault(here.expert, {})[here.part] = tensor.shape
        elif here.kind == "router":
            routers[here.layer][name] = tensor.shape
    for layer, count in model.experts.items():
        _check_layer(f"{model.folder}, layer {layer}", count, model.expert_count, parts[layer], routers[layer])


def _check_layer(
    where: str,
    count: int,
    expected: int,
    parts: Mapping[int, Mapping[str, tuple[int, ...]]],
    routers: Mapping[str, tuple[int, ...]],
) -> None:
    """``parts``: shapes of each expert's tensors, empty where experts are fused; ``routers``: of the router's."""
    if count != expected:
        raise UserError(f"{where}: there are {count} experts, config.json says {expected}.")
    for name, shape in routers.items():
        if shape[:1] != (expected,) and shape != (1, expected):
            raise UserError(f"{where}: {name} has shape {shape}, not one row for each of {expected} experts.")
    if parts and sorted(parts) != list(range(expected)):
        raise UserError(f"{where}: experts are numbered {sorted(parts)}, not 0 to {expected - 1}.")
    for expert, shapes in parts.items():
        if shapes != parts[0]:
            raise UserError(f"{where}: expert {expert} has tensors {shapes}, expert 0 has {parts[0]}.")
    if not routers:
        raise UserError(f"{where}: there is no router tensor.")


def _others(model: Model) -> set[tuple[str, tuple[int, ...]]]:
    return {
        (name, tensor.shape)
        for name, tensor in model.tensors.items()
        if role(name, tensor.shape, model.experts).kind == "other"
    }


def _finite(tensor: Tensor) -> bool:
    if tensor.dtype not in FLOATS or tensor.elements == 0:
        return True
    return bool(decoded(tensor.read(), tensor.dtype).isfinite().all())
