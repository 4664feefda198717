"""Weights that the compressed-tensors library has packed: several tensors in a file are one in the model.

``up_proj.weight_packed``, ``.weight_scale`` and ``.weight_shape`` are ``up_proj.weight``, as are an FP8 ``.weight`` and
its ``.weight_scale``. What they stand for is computed by the library itself, one weight at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from harness.errors import UserError

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from torch import Tensor

METHOD = "compressed-tensors"  # as config.json calls it
BESIDE = ("_scale", "_shape", "_zero_point", "_g_idx", "_global_scale")  # endings of what belongs to a packed weight
_PART = re.compile(rf"^(?P<weight>.+\.weight)(?P<ending>_packed|{'|'.join(BESIDE)})?$")


def parts_of(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The tensors of a checkpoint by the name that the model has for them: of each, its parts by their endings; one
    with the ending "" is the tensor itself.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        match = _PART.match(name)
        weight, ending = (match["weight"], match["ending"] or "") if match else (name, "")
        found.setdefault(weight, {})[ending] = name
    return found


class Compression:
    """How the weights of a checkpoint are packed. given: ``quantization_config`` of its config.json."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given

    @cached_property
    def schemes(self) -> tuple[QuantizationScheme, ...]:
        """Raises UserError if they are not as this version of the library has them."""
        from compressed_tensors.quantization import QuantizationConfig

        known = {name: value for name, value in self.given.items() if name in QuantizationConfig.model_fields}
        try:
            config = QuantizationConfig.model_validate(known)
        except ValueError as error:
            raise UserError(f"config.json's quantization_config is none of compressed-tensors: {error}") from error
        found = tuple(scheme for scheme in config.config_groups.values() if scheme.weights is not None)
        for scheme in found:
            scheme.format = scheme.format or config.format
        return found

    def check(self) -> None:
        """Raise UserError for what the library would not unpack as it was packed."""
        for scheme in self.schemes:
            weights = scheme.weights
            assert weights is not None
            kind, strategy = weights.type, weights.strategy  # strings, as the library keeps them
            packed = kind == "int" and strategy in ("group", "channel") and 32 % weights.num_bits == 0
            rows = kind == "float" and weights.num_bits == 8 and strategy in ("channel", "tensor")
            if not packed and not rows:
                raise UserError(
                    f"Its weights are {weights.num_bits}-bit {kind} numbers with scales by {strategy}, which cannot be "
                    "computed with here: of compressed-tensors, integers with scales by group or channel can, and FP8 "
                    "by channel or tensor. It can be pruned as it is by a plan that was made of the model in 16 bits."
                )

    def scheme(self, weight: str) -> QuantizationScheme:
        """The one whose targets name a weight's module, else the one for linear layers in general."""
        module = weight.removesuffix(".weight")
        for scheme in self.schemes:
            if any(_names(target, module) for target in scheme.targets):
                return scheme
        for scheme in self.schemes:
            if "Linear" in scheme.targets:
                return scheme
        raise UserError(f"config.json's quantization_config does not say how {weight} is packed.")

    def numbers(self, weight: str) -> int:
        """In each int32 of its packed tensor."""
        return 32 // self.scheme(weight).weights.num_bits

    def unpack(self, weight: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight that is made of these parts by their endings, in the type of its scales."""
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.config import CompressionFormat
        from torch import nn

        scheme = self.scheme(weight)
        kind = CompressionFormat(scheme.format or infer_module_format(nn.Linear, scheme))
        compressor = BaseCompressor.get_value_from_registry(kind.value)
        named = {f"weight{ending}": part for ending, part in parts.items()}
        made: Tensor = compressor.decompress(named, scheme)["weight"]
        return made


def _names(target: str, module: str) -> bool:
    return re.match(target[3:], module) is not None if target.startswith("re:") else target == module
