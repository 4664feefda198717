"""From a plan to a normal Hugging Face checkpoint, and the checks before anyone serves it.

Tensors are streamed from the model's files to the checkpoint's (``harness/rewrite.py``); ``config.json`` is patched in
place, never written anew.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from harness import inventory, tensors
from harness.errors import UserError
from harness.models import Model
from harness.plan import Plan
from harness.rewrite import MERGEABLE, UNITS_FIRST, UNITS_LAST, Layout, Rewrite, is_bias
from harness.roles import EXPERT_COUNT, EXTRA_HEADS, layer_index, role, width_field
from harness.store import say
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

    One output file per input file, in the memory of one tensor plus one layer's merged experts. Multi-token-prediction
    heads are left out, and that is said: nothing tells which of their experts matter.
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
    if model.extra_heads:
        say("export", model.name, f"without the multi-token-prediction heads ({len(model.extra_heads)} tensors)")
    _patch_config(folder / "config.json", set(model.experts.values()), count, bool(model.extra_heads))
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
    """Config, tokenizer, chat template, licence: every small file but weights, their index and their checksums.

    Raises UserError for a file that is a link to somewhere else, such as this machine's secrets.
    """
    tensors.check_links(source)
    for file in sorted(source.iterdir()):
        weights = file.suffix in (".safetensors", *tensors.PICKLES)
        if file.is_file() and not weights and file.name not in (tensors.INDEX, tensors.CHECKSUMS):
            shutil.copy(file, target / file.name)


def _patch_config(file: Path, old: set[int], new: int, headless: bool) -> None:
    """Change the expert count in the text of config.json, under whichever names it stands, and nothing else; where
    multi-token-prediction heads were left out, their number too.
    """
    pattern = re.compile(r'("(?:' + "|".join(EXPERT_COUNT) + r')"\s*:\s*)(\d+)')

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}{new}" if int(match[2]) in old else match[0]

    text = file.read_text()
    patched = pattern.sub(replace, text)
    if headless:
        patched = re.sub(r'("(?:' + "|".join(EXTRA_HEADS) + r')"\s*:\s*)\d+', r"\g<1>0", patched)
    if patched != text:
        file.write_text(patched)


def verify(folder: Path, source: Model) -> None:
    """Raise UserError unless the checkpoint is whole: vLLM loads many broken ones silently and serves nonsense. A whole
    one gets its checksums, if it has none yet (`harness.inventory`); where it has them, they must be true.

    Checked: headers and file lengths; every tensor that is no expert's or router's as in ``source``; types as stored
    there; experts of each layer numbered 0..E-1 with the same parts and shapes; E as config.json says; routers and
    their biases of E rows; finite values.
    """
    written = source.elsewhere(folder)
    if written.experts.keys() != source.experts.keys():
        raise UserError(f"{folder} has experts in layers {sorted(written.experts)}, not in {sorted(source.experts)}.")
    _check_others(written, source)
    check_structure(written)
    _check_types(written, source)
    if (folder / tensors.CHECKSUMS).exists():
        inventory.check_unchanged(folder)
    else:
        inventory.write_checksums(folder)


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


@dataclass
class _Moe:
    """The tensors of one MoE layer in a checkpoint, by name: of each expert, by its parts; fused ones; routers."""

    experts: dict[int, dict[str, str]] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)
    routers: list[str] = field(default_factory=list)


def check_structure(model: Model) -> None:
    """Raise UserError unless experts, routers and config.json of a checkpoint fit together, or if it brings code that
    nobody has allowed. Reads headers only.
    """
    model.check_code()
    if not model.experts:
        return
    expected = dict.fromkeys({layer_index(name) for name in model.tensors} - {-1}, model.expert_count)
    layers = {layer: _Moe() for layer in expected}
    for name, tensor in model.tensors.items():
        here = role(name, tensor.shape, expected)
        if here.kind == "expert":
            layers[here.layer].experts.setdefault(here.expert, {})[here.part] = name
        elif here.kind == "fused":
            layers[here.layer].fused.append(name)
        elif here.kind == "router":
            layers[here.layer].routers.append(name)
    for layer, moe in layers.items():
        _check_experts(model, layer, moe)
        _check_routers(model, layer, moe)


def _check_experts(model: Model, layer: int, moe: _Moe) -> None:
    expected = model.expert_count
    if moe.routers and not (moe.experts or moe.fused):
        name = moe.routers[0]
        raise UserError(
            f"{model.tensors[name].file}: there is the router {name}, and there are no {expected} experts of layer "
            f"{layer}, as config.json has them."
        )
    if not moe.experts:
        return
    some = min(moe.experts)
    prefix = next(iter(moe.experts[some].values())).rpartition(f"experts.{some}.")[0] + "experts."
    near = model.tensors[next(iter(moe.experts[some].values()))].file
    for expert in range(expected):
        for part, name in moe.experts[some].items():
            here = moe.experts.get(expert, {}).get(part)
            if here is None:
                raise UserError(
                    f"{near}: tensor {prefix}{expert}.{part} is missing; config.json says that layer {layer} has "
                    f"{expected} experts, and the files hold some of {len(moe.experts)}."
                )
            if (found := model.tensors[here].shape) != (shape := model.tensors[name].shape):
                raise UserError(
                    f"{model.tensors[here].file}: tensor {here} has shape {found}, that of expert {some} {shape}."
                )
    for expert, parts in moe.experts.items():
        if more := sorted(set(parts) - set(moe.experts[some])):
            raise UserError(f"{near}: tensor {prefix}{some}.{more[0]} is missing; expert {expert} has one.")
        if expert >= expected:
            left = next(iter(parts.values()))
            raise UserError(
                f"{model.tensors[left].file}: tensor {left} is left over; config.json says that layer {layer} has "
                f"{expected} experts, numbered from 0."
            )


def _check_routers(model: Model, layer: int, moe: _Moe) -> None:
    expected = model.expert_count
    for name in moe.routers:
        tensor = model.tensors[name]
        if tensor.shape[:1] != (expected,) and tensor.shape != (1, expected):
            raise UserError(
                f"{tensor.file}: tensor {name} has shape {tensor.shape}, not one row for each of the {expected} "
                f"experts that config.json says layer {layer} has."
            )
    if (moe.experts or moe.fused) and not moe.routers:
        raise UserError(f"{model.folder}, layer {layer}: there is no router tensor.")


def _check_others(written: Model, source: Model) -> None:
    """Raise UserError unless what is no expert's or router's is there as in the source: name, type and shape."""
    before, after = (
        {name: tensor for name, tensor in model.tensors.items() if _kind(model, name, tensor) == "other"}
        for model in (source, written)
    )
    for name, old in before.items():
        if name not in after:
            raise UserError(f"{written.folder / old.file.name}: tensor {name} is missing, or has another shape.")
        _check_type(name, after[name], {old.dtype})
        if after[name].shape != old.shape:
            raise UserError(f"{after[name].file}: tensor {name} has shape {after[name].shape}, not {old.shape}.")
    if more := sorted(after.keys() - before.keys()):
        raise UserError(f"{after[more[0]].file}: tensor {more[0]} is left over; the original has none of this name.")


def _check_types(written: Model, source: Model) -> None:
    """Raise UserError unless experts and routers are stored in the types that the source stores them in: a bias that
    was cast to fewer bits chooses other experts.
    """
    known: dict[tuple[int, str, str], set[str]] = {}
    for name, tensor in source.tensors.items():
        here = role(name, tensor.shape, source.experts)
        known.setdefault((here.layer, here.kind, here.part), set()).add(tensor.dtype)
    for name, tensor in written.tensors.items():
        here = role(name, tensor.shape, written.experts)
        if here.kind != "other":
            _check_type(name, tensor, known.get((here.layer, here.kind, here.part), {"none"}))


def _check_type(name: str, tensor: Tensor, known: set[str]) -> None:
    if tensor.dtype not in known:
        raise UserError(f"{tensor.file}: tensor {name} is stored as {tensor.dtype}, the original's as {min(known)}.")


def _kind(model: Model, name: str, tensor: Tensor) -> str:
    return role(name, tensor.shape, model.experts).kind
