"""A slice of a sorted checkpoint on disk: prefixes of its tensors, streamed, with a patched config.

The checkpoint is one that `harness.nested` has sorted; what is cut here equals `harness.nested.slice_model` in memory.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np

from harness import checkpoint, tensors
from harness.errors import UserError
from harness.models import Model
from harness.nested import Budget, known_width_field
from harness.plan import LayerPlan, Plan
from harness.rewrite import UNITS_FIRST, UNITS_LAST
from harness.roles import role
from harness.tensors import Entry, Tensor


def check_cuttable(model: Model) -> None:
    """Raise UserError unless each expert's matrices are tensors of their own, gate, up and down."""
    for name, tensor in model.tensors.items():
        here = role(name, tensor.shape, model.experts)
        if here.kind == "fused" or (here.kind == "expert" and here.part not in (*UNITS_FIRST, *UNITS_LAST)):
            raise UserError(
                f"{name} is no plain gate, up or down matrix of one expert, so no hidden units can be cut off it. Use "
                "recovery.axis=experts."
            )


def cut(parent: Model, here: Budget, folder: Path) -> None:
    """Write the slice of a sorted checkpoint, in experts or width, into the empty folder: an ordinary checkpoint."""
    assert here.hidden is None and here.heads is None, "on disk, experts and their width can be cut"
    keep = {layer: here.experts or count for layer, count in parent.experts.items()}
    plan = Plan({layer: LayerPlan.prune(range(keep[layer]), count) for layer, count in parent.experts.items()})
    checkpoint.export(parent, plan, folder)
    if here.width is not None:
        _narrow(Model(folder.name, str(folder)), here.width)
    checkpoint.verify(folder, parent)


def _narrow(model: Model, width: int) -> None:
    """Cut every expert of a checkpoint to its first hidden units, file by file, in place."""
    for file, old in tensors.by_file(model.tensors).items():
        parts = {name: role(name, tensor.shape, model.experts).part for name, tensor in old.items()}
        entries = [_narrowed(name, tensor, parts[name], width) for name, tensor in old.items()]
        partial = file.with_name(f".partial-{file.name}")
        tensors.write(partial, entries, (_prefix(tensor, parts[name], width) for name, tensor in old.items()))
        partial.replace(file)
    _patch_config(model, width)
    _patch_index(model.folder)


def _narrowed(name: str, tensor: Tensor, part: str, width: int) -> Entry:
    """The header of a tensor with this many hidden units."""
    shape = tensor.shape
    if part in UNITS_FIRST:
        shape = (width, shape[1])
    elif part in UNITS_LAST:
        shape = (shape[0], width)
    return Entry(name, tensor.dtype, shape, tensor.nbytes // tensor.elements * math.prod(shape))


def _prefix(tensor: Tensor, part: str, width: int) -> bytes:
    """Its bytes: the first rows of gate and up, the first columns of down, all of any other."""
    if part in UNITS_FIRST:
        return tensor.read(0, tensor.nbytes // tensor.shape[0] * width)
    if part in UNITS_LAST:
        rows = np.frombuffer(tensor.read(), np.uint8).reshape(tensor.shape[0], -1)
        return rows[:, : rows.shape[1] // tensor.shape[1] * width].tobytes()
    return tensor.read()


def _patch_config(model: Model, width: int) -> None:
    """Change the width in the text of config.json, and nothing else."""
    field = known_width_field(model.config)
    file = model.folder / "config.json"
    patched, times = re.subn(rf'("{field}"\s*:\s*)\d+', rf"\g<1>{width}", file.read_text())
    assert times == 1, f"config.json says {field} {times} times"
    file.write_text(patched)


def _patch_index(folder: Path) -> None:
    """The index, if there is one, says how large the weights are in all."""
    file = folder / tensors.INDEX
    if file.exists():
        index = json.loads(file.read_text())
        index["metadata"]["total_size"] = sum(tensor.nbytes for tensor in checkpoint.tensors_of(folder))
        file.write_text(json.dumps(index, indent=2))
