"""The depth cut: a checkpoint with fewer decoder blocks, the others as they are.

Blocks that stay are numbered anew from 0, and config.json says so wherever it speaks of blocks: their count, their
kinds (``layer_types``), which are dense (``mlp_only_layers``, ``decoder_sparse_step``, ``first_k_dense_replace``).
The cache of a block that stays keeps its layout; there are only fewer of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from harness import checkpoint, tensors
from harness.blocks import moe_blocks
from harness.errors import UserError
from harness.models import Model
from harness.plan import Plan
from harness.tensors import Entry, Tensor

_BLOCK = re.compile(r"^(?P<stack>(?:.*\.)?layers\.)(?P<block>\d+)(?P<rest>\..+)$")
_SPARSE = ("decoder_sparse_step", "mlp_only_layers")


def blocks_of(model: Model) -> int:
    """Decoder blocks, as config.json counts them."""
    found = [int(match["block"]) for name in model.tensors if (match := _BLOCK.match(name))]
    return int(model.config.get("num_hidden_layers", max(found) + 1))


def check_cut(model: Model, blocks: Sequence[int]) -> None:
    """Raise UserError unless these blocks alone still make a mixture-of-experts model of one stack."""
    if not set(blocks) & set(model.experts):
        raise UserError(
            f"A depth cut to blocks {list(blocks)} of {blocks_of(model)} leaves none with experts (those are "
            f"{sorted(model.experts)}). Drop fewer."
        )
    stacks = {match["stack"] for name in model.tensors if (match := _BLOCK.match(name))}
    if len(stacks) != 1:
        raise UserError(
            f"model {model.name!r} has several stacks of blocks ({sorted(stacks)}): its depth cannot be cut."
        )


def kinds(model: Model) -> set[str]:
    """The kinds of attention that the model's blocks have; empty where its config does not tell."""
    config = AutoConfig.from_pretrained(model.folder, local_files_only=True, trust_remote_code=False).get_text_config()
    return set(getattr(config, "layer_types", None) or ())


def by_influence(model: PreTrainedModel, ids: np.ndarray, batch_size: int) -> list[int]:
    """The blocks by rising influence 1 - E cos(x, y) of their input x and output y, [H] each, over the tokens of the
    sequences [S, T] (ShortGPT, arXiv 2403.03853). Equal ones: the last first.
    """
    found = [module for name, module in model.named_modules() if re.fullmatch(r"(?:.*\.)?layers\.\d+", name)]
    cosine = np.zeros(len(found))

    def note(block: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
            before = args[0] if args else given["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine[block] += float(torch.cosine_similarity(before, after, dim=-1).double().sum())

        return hook

    hooks = [module.register_forward_hook(note(block), with_kwargs=True) for block, module in enumerate(found)]
    try:
        with torch.no_grad():
            for start in range(0, len(ids), batch_size):
                batch = torch.from_numpy(ids[start : start + batch_size])
                model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return sorted(range(len(found)), key=lambda block: (-cosine[block], -block))


def cut(model: Model, blocks: Sequence[int], folder: Path) -> Model:
    """Write the checkpoint that has only these blocks, ascending, into a new folder. Raises UserError if config.json
    cannot be made to say what it needs to.
    """
    check_cut(model, blocks)
    folder.mkdir(parents=True)
    names: dict[str, str] = {}
    for file, kept in _kept(model, blocks).items():
        entries = [Entry(name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in kept.items()]
        tensors.write(folder / file.name, entries, (tensor.read() for tensor in kept.values()))
        names |= dict.fromkeys(kept, file.name)
    checkpoint.copy_rest(model.folder, folder)
    if (model.folder / tensors.INDEX).exists():
        index = {"metadata": {}, "weight_map": dict(sorted(names.items()))}
        (folder / tensors.INDEX).write_text(json.dumps(index, indent=2))
    config = folder / "config.json"
    config.write_text(patched(config.read_text(), changes(model, blocks)))
    written = Model(model.name, str(folder))
    _check(written, len(blocks))
    return written


def renumbered(name: str, blocks: Sequence[int]) -> str | None:
    """A tensor's name after the cut; None if its block is gone."""
    match = _BLOCK.match(name)
    if match is None:
        return name
    old = int(match["block"])
    return f"{match['stack']}{blocks.index(old)}{match['rest']}" if old in blocks else None


def plan_of(plan: Plan, blocks: Sequence[int]) -> Plan:
    """The plan of the blocks that stay, under their new numbers."""
    layers = {new: plan.layers[old] for new, old in enumerate(blocks) if old in plan.layers}
    return Plan(layers, plan.provenance)


def weights_of(state: Mapping[str, torch.Tensor], blocks: Sequence[int]) -> dict[str, torch.Tensor]:
    """A model's weights in memory, of the blocks that stay, under their new names."""
    return {new: value for name, value in state.items() if (new := renumbered(name, blocks)) is not None}


def _kept(model: Model, blocks: Sequence[int]) -> dict[Path, dict[str, Tensor]]:
    """The tensors that stay, by the file they are in, under their new names."""
    names = ((renumbered(name, blocks), tensor) for name, tensor in model.tensors.items())
    return tensors.by_file({new: tensor for new, tensor in names if new is not None})


def changes(model: Model, blocks: Sequence[int]) -> dict[str, Any]:
    """The fields of config.json that the cut changes, with their new values."""
    config, total = model.config, blocks_of(model)
    new: dict[str, Any] = {"num_hidden_layers": len(blocks)}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == total and name not in _SPARSE and re.search("layer|block", name):
            new[name] = [value[block] for block in blocks]  # one entry per block
        if isinstance(value, str) and len(value) == total and name.endswith("_pattern"):
            new[name] = "".join(value[block] for block in blocks)  # one letter per block
    for name in ("first_k_dense_replace", "moe_layer_start_index", "max_window_layers"):  # numbers of leading blocks
        if isinstance(config.get(name), int):
            new[name] = sum(block < config[name] for block in blocks)
    if isinstance(config.get("moe_layer_end_index"), int) and config["moe_layer_end_index"] >= 0:
        new["moe_layer_end_index"] = sum(block <= config["moe_layer_end_index"] for block in blocks) - 1
    new |= _sparse_blocks(model, blocks)
    return {name: value for name, value in new.items() if config.get(name) != value}


def _sparse_blocks(model: Model, blocks: Sequence[int]) -> dict[str, Any]:
    """Which blocks are dense, where config.json says it by a step and a list. Where blocks get other numbers the step
    would pick others: then the list alone says it.
    """
    listed = model.config.get("mlp_only_layers") or []
    if list(blocks) == list(range(len(blocks))):
        return {"mlp_only_layers": [block for block in listed if block < len(blocks)]} if listed else {}
    if not any(name in model.config for name in _SPARSE):
        return {}
    dense = [new for new, old in enumerate(blocks) if old not in model.experts]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def patched(text: str, fields: Mapping[str, Any]) -> str:
    """config.json with these fields changed in its text, and nothing else."""
    for name, value in fields.items():
        pattern = re.compile(rf'("{name}"\s*:\s*)(\[[^\[\]]*\]|"[^"]*"|-?\d+)')
        if len(pattern.findall(text)) != 1:
            raise UserError(f"A depth cut must set {name}={value} in config.json, which does not have it exactly once.")
        text = pattern.sub(lambda match: match[1] + json.dumps(value), text)  # noqa: B023 - used at once
    return text


def _check(written: Model, count: int) -> None:
    """The checkpoint is whole, and transformers builds just these blocks from its config, with experts in the same."""
    checkpoint.check_structure(written)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(written.folder, local_files_only=True, trust_remote_code=False)
        empty = AutoModelForCausalLM.from_config(config)
    found = set(moe_blocks(empty))
    if blocks_of(written) != count or found != set(written.experts):
        raise UserError(
            f"After the depth cut, config.json leads transformers to experts in blocks {sorted(found)}, and the "
            f"weights have them in {sorted(written.experts)}. This architecture's depth cannot be cut yet."
        )
