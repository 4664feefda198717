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
            kind, bits, strategy = weights.type, weights.num_bits, weights.strategy  # texts, as the library keeps them
            if (kind, bits) == ("float", 8):
                known = strategy in ("channel", "tensor", "block")
            elif (kind, bits) == ("float", 4):
                known = strategy in ("group", "tensor_group")
            else:
                known = kind == "int" and strategy in ("group", "channel") and 32 % bits == 0
            if not known:
                raise UserError(
                    f"Its weights are {bits}-bit {kind} numbers with scales by {strategy}, which cannot be computed "
                    "with here: of compressed-tensors, integers with scales by group or channel can, FP8 by channel, "
                    "tensor or block, NVFP4 and MXFP4. It can be pruned as it is by a plan that was made of the model "
                    "in 16 bits."
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

    def bits(self, weight: str) -> int:
        """Of each number that is packed."""
        return int(self.scheme(weight).weights.num_bits)

    def unpack(self, weight: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight that is made of these parts by their endings, in some type of floating point."""
        scheme = self.scheme(weight)
        if scheme.weights.strategy == "block":
            return _of_blocks(parts, scheme)
        if scheme.weights.strategy == "tensor_group":
            return _nvfp4(parts, scheme)
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.config import CompressionFormat
        from torch import nn

        kind = CompressionFormat(scheme.format or infer_module_format(nn.Linear, scheme))
        compressor = BaseCompressor.get_value_from_registry(kind.value)
        named = {f"weight{ending}": part for ending, part in parts.items()}
        made: Tensor = compressor.decompress(named, scheme)["weight"]
        return made


def _of_blocks(parts: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """Blocks at the borders may be smaller, which the library's decompression does not see: it guesses their size."""
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    return dequantize(parts[""], parts["_scale"], args=scheme.weights)


def _nvfp4(parts: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """In float32, where the library's decompression rounds the scales to bfloat16 between."""
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    rows, columns = parts["_packed"].shape
    numbers = unpack_fp4_from_uint8(parts["_packed"], rows, 2 * columns, torch.float32)
    scale, of_all = parts["_scale"].float(), parts["_global_scale"]
    return dequantize(numbers, scale, args=scheme.weights, global_scale=of_all, dtype=torch.float32)


def _names(target: str, module: str) -> bool:
    return re.match(target[3:], module) is not None if target.startswith("re:") else target == module
