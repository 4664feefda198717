"""Which tensors of a checkpoint each decoder layer is made of, and how they become its parameters.

transformers' own table of conversions says so (`transformers.core_model_loading`). Experts that files hold one by one,
as most do, are put straight into their places in the tensor that holds them all: nothing is there twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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

from harness.compressed import Compression, parts_of
from harness.errors import StageError
from harness.rewrite import FLOATS
from harness.tensors import Tensor as StoredTensor

_EXPERT = re.compile(r"\.(\d+)\.(?!.*\.\d+\.)")  # the last number that is a part of a name on its own


class Files:
    """A checkpoint's tensors by the names that transformers expects, each whatever a file holds of it.

    tensors: those of the files. Read, not mapped: what is mapped counts as resident memory.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], compression: Compression | None) -> None:
        self.tensors, self.compression = tensors, compression
        self.parts = {name: {"": name} for name in tensors}
        if compression is not None:  # whatever lies beside a plain weight, that is no quantised one
            self.parts = {
                name: {"": name} if name in tensors and tensors[name].dtype in FLOATS else parts
                for name, parts in parts_of(tensors).items()
            }

    def stored(self, name: str) -> list[StoredTensor]:
        """What the tensor is made of."""
        return [self.tensors[part] for part in self.parts[name].values()]

    @contextmanager
    def reading(self, names: Iterable[str]) -> Iterator[Callable[[str], Any]]:
        """In here a function gives each of these: a tensor, or a slice of a file that becomes one when it is needed."""
        with ExitStack() as stack:
            files = {tensor.file for name in names for tensor in self.stored(name)}
            opened = {file: stack.enter_context(safe_open(file, framework="pt", backend="pread")) for file in files}

            def read(name: str) -> Any:
                parts = self.parts[name]
                if parts.keys() == {""}:
                    return opened[self.tensors[name].file].get_slice(name)
                assert self.compression is not None
                found = {ending: opened[self.tensors[part].file].get_tensor(part) for ending, part in parts.items()}
                return self.compression.unpack(name, found)

            yield read


@dataclass
class Sources:
    """The tensors that a parameter is made of, and the same by the pattern of the converter.

    converter: how they are joined; None where one tensor is the parameter.
    """

    names: list[str] = field(default_factory=list)
    patterns: dict[str, list[str]] = field(default_factory=dict)
    converter: WeightConverter | None = None

    def add(self, name: str, pattern: str | None, converters: Sequence[WeightConverter]) -> None:
        self.names.append(name)
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
    model: PreTrainedModel, layers: str, count: int, files: Files, load_config: Any
) -> tuple[list[dict[str, Sources]], list[str]]:
    """The checkpoint's tensors: of each of ``count`` layers by parameter, and the others.

    What a tensor is loaded into decides where it belongs. layers: name of the list of layers in the model.
    """
    found: list[dict[str, Sources]] = [{} for _ in range(count)]
    rest: list[str] = []
    renamings = [entry for entry in load_config.weight_mapping or [] if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in load_config.weight_mapping or [] if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    for name in files.parts:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        inside = re.match(rf"{re.escape(layers)}\.(\d+)\.", target if target in known else name)
        if inside and int(inside[1]) < count and (target in known or pattern is not None):
            found[int(inside[1])].setdefault(target, Sources()).add(name, pattern, converters)
        else:
            rest.append(name)
    return found, rest


def load(model: PreTrainedModel, files: Files, names: Sequence[str], load_config: Any) -> LoadStateDictInfo:
    """Fill the parameters that these tensors are for. Raises StageError if they do not fit."""
    with files.reading(names) as read:
        state = {name: read(name) for name in names}
        info, _ = convert_and_load_state_dict_in_model(model, state, load_config)
    if info.conversion_errors or info.mismatched_keys:
        raise StageError(f"The checkpoint cannot be read: {info.conversion_errors or info.mismatched_keys}")
    return info


def load_parameter(model: PreTrainedModel, files: Files, name: str, sources: Sources, load_config: Any) -> None:
    """Fill one parameter. Raises StageError if the tensors do not fit."""
    if sources.are_single_experts and load_config.hf_quantizer is None:
        owner, _, attribute = name.rpartition(".")
        joined = _joined(model.get_parameter(name), files, sources, model.device)
        setattr(model.get_submodule(owner), attribute, nn.Parameter(joined, requires_grad=False))
    else:
        load(model, files, sources.names, load_config)


def _joined(parameter: Tensor, files: Files, sources: Sources, device: torch.device) -> Tensor:
    """[E, ...] of the shape and type of ``parameter``: each expert's matrices below one another."""
    assert sources.converter is not None
    joined = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    begin = 0
    with files.reading(sources.names) as read:
        for pattern in sources.converter.source_patterns:
            names = sorted(sources.patterns[pattern], key=_expert)
            if [_expert(name) for name in names] != list(range(len(joined))):
                raise StageError(f"The checkpoint has {len(names)} of {len(joined)} experts that {pattern} names.")
            rows = 0
            for expert, name in enumerate(names):
                matrix = read(name)[...]
                rows = len(matrix)
                if tuple(matrix.shape[1:]) != tuple(joined.shape[2:]) or begin + rows > joined.shape[1]:
                    raise StageError(f"The checkpoint's {name} is {list(matrix.shape)}, which does not fit.")
                joined[expert, begin : begin + rows].copy_(matrix)
            begin += rows
    if begin != joined.shape[1]:
        raise StageError(f"The checkpoint's experts have {begin} of {joined.shape[1]} rows of {sources.names[0]}.")
    return joined


def _expert(name: str) -> int:
    match = _EXPERT.search(name)
    assert match is not None, name
    return int(match[1])
