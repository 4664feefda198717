"""From a plan to a normal Hugging Face checkpoint, and the checks before anyone serves it.

Tensors are streamed from the model's files to the checkpoint's (``harness/rewrite.py``); ``config.json`` is patched in
place, never written anew.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness import tensors
from harness.errors import UserError
from harness.models import EXPERT_COUNT, Model, role, width_field
from harness.plan import Plan
from harness.rewrite import FLOATS, MERGEABLE, UNITS_FIRST, UNITS_LAST, Layout, Rewrite, decoded, is_bias
from harness.tensors import Tensor


@dataclass(frozen=True)
class Size:
    """What a plan leaves of a model. Three different numbers, because merged experts are copied in a stock checkpoint:

    experts: per layer in a stock checkpoint, one for each router row. distinct: different experts per layer. Both are
    means over layers, 0 for a dense model. parameters, bytes: of that checkpoint (without the padding of layers that
    are smaller than others). distinct_bytes: were each distinct expert stored once, as our engine does.
    """

    experts: float
    distinct: float
    parameters: int
    bytes: int
    distinct_bytes: int


def measure(model: Model, plan: Plan) -> Size:
    """The size of the model under the plan, from headers only."""
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
    rows, slots = plan.written_experts().values(), plan.distinct_experts().values()
    layers = max(1, len(plan.layers))
    return Size(sum(rows) / layers, sum(slots) / layers, parameters, written, distinct)


def check_stock(model: Model, plan: Plan) -> None:
    """Raise UserError if a stock checkpoint cannot hold the plan: it has one expert count for all layers.

    Where the router has a bias, smaller layers are padded with experts that it never chooses; not where it chooses
    among groups of experts, which padding would change.
    """
    counts = set(plan.written_experts().values())
    if len(counts) < 2:
        return
    uneven = f"The plan leaves between {min(counts)} and {max(counts)} router rows per layer"
    possible = "Serve the plan itself (serve=vllm or serve=plan), or use the same count in each layer."
    if int(model.config.get("n_group") or 1) > 1:
        raise UserError(f"{uneven}, and padding would change the router's groups (n_group). {possible}")
    roles = [role(name, tensor.shape, model.experts) for name, tensor in model.tensors.items()]
    biased = {here.layer for here in roles if here.kind == "router" and is_bias(here)}
    if biased != set(model.experts):
        raise UserError(
            f"{uneven}. A stock checkpoint has one expert count for all layers, and can be padded only where the "
            f"router has a bias, which this model's has not. {possible}"
        )


def export(model: Model, plan: Plan, folder: Path) -> None:
    """Write the compressed model into the empty folder: tensors, patched config, tokenizer and whatever else lay there.

    One output file per input file, in the memory of one tensor plus one layer's merged experts.
    """
    plan.validate(model.experts, model.top_k)
    if any(layer.align for layer in plan.layers.values()):
        check_alignable(model)
    check_stock(model, plan)
    count = max(plan.written_experts().values(), default=0)
    rewrite = Rewrite(model, plan, {index: Layout.stock(layer, count) for index, layer in plan.layers.items()})
    names: dict[str, str] = {}
    for file, jobs in rewrite.files.items():
        if jobs:
            tensors.write(folder / file.name, [job.entry for job in jobs], rewrite.contents(jobs))
        names |= {job.entry.name: file.name for job in jobs}
    copy_rest(model.folder, folder)
    _patch_config(folder / "config.json", set(model.experts.values()), count)
    if (model.folder / tensors.INDEX).exists():
        total = sum(tensor.nbytes for tensor in tensors_of(folder))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (folder / tensors.INDEX).write_text(json.dumps(index, indent=2))


def differs_in_experts_only(folder: Path, model: Model) -> bool:
    """Whether a checkpoint has the model's config but for the number and width of its experts."""
    changed = {*EXPERT_COUNT, width_field(model.config)}
    configs = (Model(folder.name, str(folder)).config, model.config)
    before, after = ({name: value for name, value in config.items() if name not in changed} for config in configs)
    return before == after


def tensors_of(folder: Path) -> list[Tensor]:
    return [tensor for file in sorted(folder.glob("*.safetensors")) for tensor in tensors.read_header(file).values()]


def copy_rest(source: Path, target: Path) -> None:
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
