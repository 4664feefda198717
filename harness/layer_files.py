"""Which tensors of a checkpoint each decoder layer is made of, and how they become its parameters.

transformers' own table of conversions says so (`transformers.core_model_loading`). Experts that files hold one by one,
as most do, are put straight into their places in the tensor that holds them all: nothing is there twice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictInfo

from harness.errors import StageError

_EXPERT = re.compile(r"\.(\d+)\.(?!.*\.\d+\.)")  # the last number that is a part of a name on its own


@dataclass
class Sources:
    """The tensors that a parameter is made of: their files by name, and their names by the pattern of the converter.

    converter: how they are joined; None where one tensor is the parameter.
    """

    files: dict[str, Path] = field(default_factory=dict)
    patterns: dict[str, list[str]] = field(default_factory=dict)
    converter: WeightConverter | None = None

    def add(self, name: str, file: Path, pattern: str | None, converters: Sequence[WeightConverter]) -> None:
        self.files[name] = file
        if pattern is not None:
            self.patterns.setdefault(pattern, []).append(name)
            self.converter = next(each for each in converters if pattern in each.source_patterns)

    @property
    def are_single_experts(self) -> bool:
        """Whether they are matrices of single experts, one below the other."""
        steps = self.converter.operations if self.converter is not None else []
        return [(type(step), getattr(step, "dim", None)) for step in steps] in (
            [(MergeModulelist, 0)],
            [(MergeModulelist, 0), (Concatenate, 1)],
        )


def by_layer(
    model: PreTrainedModel, layers: str, count: int, files: Sequence[str], load_config: Any, without: Collection[str]
) -> tuple[list[dict[str, Sources]], dict[str, Path]]:
    """The checkpoint's tensors: of each of ``count`` layers by parameter, and the others with their files.

    What a tensor is loaded into decides where it belongs. layers: name of the list of layers in the model. without:
    tensors that are not looked at.
    """
    found: list[dict[str, Sources]] = [{} for _ in range(count)]
    rest: dict[str, Path] = {}
    renamings = [entry for entry in load_config.weight_mapping or [] if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in load_config.weight_mapping or [] if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    for file in map(Path, files):
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name not in without]  # noqa: SIM118 - not a mapping
        for name in names:
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
            inside = re.match(rf"{re.escape(layers)}\.(\d+)\.", target if target in known else name)
            if inside and int(inside[1]) < count:
                found[int(inside[1])].setdefault(target, Sources()).add(name, file, pattern, converters)
            else:
                rest[name] = file
    return found, rest


def load(model: PreTrainedModel, names: Mapping[str, Path], load_config: Any) -> LoadStateDictInfo:
    """Fill the parameters that these tensors are for. Read, not mapped: what is mapped counts as resident memory.

    Raises StageError if they do not fit.
    """
    with ExitStack() as stack:
        opened = _opened(names.values(), stack)
        state = {name: opened[file].get_slice(name) for name, file in names.items()}
        info, _ = convert_and_load_state_dict_in_model(model, state, load_config)
    if info.conversion_errors or info.mismatched_keys:
        raise StageError(f"The checkpoint cannot be read: {info.conversion_errors or info.mismatched_keys}")
    return info


def load_parameter(model: PreTrainedModel, name: str, sources: Sources, load_config: Any) -> None:
    """Fill one parameter. Raises StageError if the tensors do not fit."""
    if sources.are_single_experts and load_config.hf_quantizer is None:
        owner, _, attribute = name.rpartition(".")
        joined = _joined(model.get_parameter(name), sources, model.device)
        setattr(model.get_submodule(owner), attribute, nn.Parameter(joined, requires_grad=False))
    else:
        load(model, sources.files, load_config)


def _joined(parameter: Tensor, sources: Sources, device: torch.device) -> Tensor:
    """[E, ...] of the shape and type of ``parameter``: each expert's matrices below one another."""
    assert sources.converter is not None
    joined = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    begin = 0
    with ExitStack() as stack:
        opened = _opened(sources.files.values(), stack)
        for pattern in sources.converter.source_patterns:
            names = sorted(sources.patterns[pattern], key=_expert)
            if [_expert(name) for name in names] != list(range(len(joined))):
                raise StageError(f"The checkpoint has {len(names)} of {len(joined)} experts that {pattern} names.")
            rows = 0
            for expert, name in enumerate(names):
                matrix = opened[sources.files[name]].get_tensor(name)
                rows = len(matrix)
                if tuple(matrix.shape[1:]) != tuple(joined.shape[2:]) or begin + rows > joined.shape[1]:
                    raise StageError(f"The checkpoint's {name} is {list(matrix.shape)}, which does not fit.")
                joined[expert, begin : begin + rows].copy_(matrix)
            begin += rows
    if begin != joined.shape[1]:
        raise StageError(
            f"The checkpoint's experts have {begin} of {joined.shape[1]} rows of {next(iter(sources.files))}."
        )
    return joined


def _opened(files: Any, stack: ExitStack) -> dict[Path, Any]:
    return {file: stack.enter_context(safe_open(file, framework="pt", backend="pread")) for file in set(files)}


def _expert(name: str) -> int:
    match = _EXPERT.search(name)
    assert match is not None, name
    return int(match[1])
