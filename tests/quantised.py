"""Tiny checkpoints quantised as released ones are, from a random checkpoint in full precision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 32  # rows and columns that share a scale; 128 in released checkpoints
UNEVEN = 48
FP8_MAX = 448.0
# The sixteen values of MXFP4 (E2M1), by their code.
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def to_fp8(source: Path, target: Path) -> Path:
    """Linear layers but router and head in E4M3, with a float32 scale per block, as DeepSeek-V3 and Qwen3-FP8 ship."""
    tensors = load_file(source / "model.safetensors")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") and tensor.dim() == 2:
            found[name], found[f"{name}_scale_inv"] = _fp8(tensor)
        else:
            found[name] = tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
    quantisation = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head"],
    }
    return _write(source, target, found, quantisation)


def to_mxfp4(source: Path, target: Path) -> Path:
    """A gpt-oss' experts in blocks of 32 numbers of 4 bits with an 8-bit exponent: [E, rows, blocks, 16]."""
    tensors = load_file(source / "model.safetensors")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[f"{name}_blocks"], found[f"{name}_scales"] = _mxfp4(tensor.transpose(1, 2))
        else:
            found[name] = tensor.bfloat16()
    ignored = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _write(source, target, found, {"quant_method": "mxfp4", "modules_to_not_convert": ignored})


def to_w4a16(source: Path, target: Path) -> Path:
    """Linear layers but router and head in 4 bits, eight to an int32, with a bfloat16 scale for each 32 of a row: the
    format of compressed-tensors that Kimi-K2's W4A16 checkpoint has.
    """
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return _compressed(source, target, _packed, "pack-quantized", weights)


def to_fp8_rows(source: Path, target: Path) -> Path:
    """Linear layers but router and head in E4M3, with a scale per row: compressed-tensors' FP8-dynamic."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    return _compressed(source, target, _fp8_rows, "float-quantized", weights)


def to_int8_rows(source: Path, target: Path) -> Path:
    """Linear layers but router and head in 8-bit integers, with a scale per row: compressed-tensors' W8A8."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    return _compressed(source, target, _int8_rows, "int-quantized", weights)


def to_fp8_blocks(source: Path, target: Path) -> Path:
    """Linear layers but router and head in E4M3, with a scale per block: compressed-tensors' FP8-block. Of blocks as
    large as none of the matrices, what the border leaves is smaller.
    """
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block"}
    return _compressed(source, target, _fp8_blocks, "float-quantized", weights | {"block_structure": [UNEVEN, UNEVEN]})


def to_nvfp4(source: Path, target: Path) -> Path:
    """Linear layers but router and head in 4 bits, two to a byte, with an FP8 scale for each 16 of a row and a float32
    for all; and, as released ones have, what scales what comes in.
    """
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    return _compressed(source, target, _nvfp4, "nvfp4-pack-quantized", weights)


def to_packed_mxfp4(source: Path, target: Path) -> Path:
    """Linear layers but router and head in 4 bits, two to a byte, with an 8-bit exponent for each 32 of a row."""
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    return _compressed(source, target, _packed_mxfp4, "mxfp4-pack-quantized", weights)


def _compressed(
    source: Path,
    target: Path,
    compress: Callable[[Tensor], dict[str, Tensor]],
    format_name: str,
    weights: dict[str, object],
) -> Path:
    found: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight") and tensor.dim() == 2:
            found |= {f"{name}{ending}": part for ending, part in compress(tensor).items()}
            if weights["strategy"] == "tensor_group":
                found[name.replace(".weight", ".input_global_scale")] = torch.tensor([300.0])
        else:
            found[name] = tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
    group = {"targets": ["Linear"], "weights": weights, "format": format_name}
    if weights["num_bits"] == 8:  # as released: what comes in is quantised too, which in 16 bits it is not
        rows = {name: value for name, value in weights.items() if name != "block_structure"}
        group["input_activations"] = {**rows, "strategy": "token", "dynamic": True}
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*_with_mqa$"],
    }
    return _write(source, target, found, quantisation)


def _packed(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    groups = weight.view(rows, columns // 32, 32).float()
    scale = (groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 7.5).bfloat16()
    codes = ((groups / scale.float()).round().clamp(-8, 7) + 8).view(rows, columns // 8, 8).long()
    packed = (codes << 4 * torch.arange(8)).sum(dim=-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    return {"_packed": packed, "_scale": scale.squeeze(-1), "_shape": torch.tensor([rows, columns])}


def _fp8_rows(weight: Tensor) -> dict[str, Tensor]:
    scale = (weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / FP8_MAX).bfloat16()
    return {"": (weight / scale.float()).to(torch.float8_e4m3fn), "_scale": scale}


def _fp8_blocks(weight: Tensor) -> dict[str, Tensor]:
    blocks = [-(-size // UNEVEN) for size in weight.shape]
    scale = torch.empty(blocks)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(blocks[0]):
        for column in range(blocks[1]):
            block = tuple(slice(UNEVEN * at, UNEVEN * (at + 1)) for at in (row, column))
            scale[row, column] = weight[block].abs().amax().clamp_min(1e-12) / FP8_MAX
            codes[block] = (weight[block] / scale[row, column]).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scale}


def _nvfp4(weight: Tensor) -> dict[str, Tensor]:
    of_all = FP8_MAX * 6 / weight.abs().amax()
    groups = weight.float().unflatten(1, (-1, 16))
    scale = (groups.abs().amax(dim=-1) / 6 * of_all).to(torch.float8_e4m3fn)
    codes = ((groups / (scale.float() / of_all).unsqueeze(-1)).unsqueeze(-1) - FP4).abs().argmin(dim=-1).flatten(1)
    return {"_packed": _in_bytes(codes), "_scale": scale, "_global_scale": of_all.view(1)}


def _packed_mxfp4(weight: Tensor) -> dict[str, Tensor]:
    packed, exponent = _mxfp4(weight.unsqueeze(0))
    return {"_packed": packed[0].flatten(1), "_scale": exponent[0]}


def _in_bytes(codes: Tensor) -> Tensor:
    """Codes of 4 bits, two neighbours to a byte."""
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _int8_rows(weight: Tensor) -> dict[str, Tensor]:
    scale = (weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127).bfloat16()
    return {"": (weight / scale.float()).round().clamp(-128, 127).to(torch.int8), "_scale": scale}


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp_min(1e-12) / FP8_MAX
    return (blocks / scale).view(rows, columns).to(torch.float8_e4m3fn), scale[:, 0, :, 0].float()


def _mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    experts, rows, columns = weight.shape
    blocks = weight.reshape(experts, rows, columns // 32, 32).float()
    exponent = (blocks.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 6).log2().ceil()
    codes = ((blocks / 2**exponent).unsqueeze(-1) - FP4).abs().argmin(dim=-1)
    return _in_bytes(codes), (exponent.squeeze(-1) + 127).to(torch.uint8)


def _write(source: Path, target: Path, tensors: dict[str, Tensor], quantisation: dict[str, object]) -> Path:
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target / file.name)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config |= {"quantization_config": quantisation, "dtype": "bfloat16"}
    config.get("text_config", {})["dtype"] = "bfloat16"
    (target / "config.json").write_text(json.dumps(config))
    return target
