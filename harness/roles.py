"""What the tensors of a mixture-of-experts model are, by their names and shapes: experts, routers, everything else.

The same names stand in a checkpoint's files and in a model in memory, so one rule serves both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.tensors import Tensor

# Names under which config.json files spell the same two numbers.
EXPERT_COUNT = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")

EXTRA_HEADS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")  # how many, in config.json
EXPERT_WIDTH = ("moe_intermediate_size", "intermediate_size")  # hidden units of an expert: the first that is there


LAYER = re.compile(r"^(?P<block>(?:.*\.)?layers\.(?P<layer>\d+)\.)(?P<rest>.+)$")
_EXPERT = re.compile(r"^(?P<moe>.*?\.?)experts\.(?P<expert>\d+)\.(?P<part>.+)$")
_FUSED = re.compile(r"^.*?(?:experts\.|block_sparse_moe\.(?=(?:in|out)put_linear\.))(?P<part>[a-z].*)$")
_ROUTER = re.compile(
    r"(?:^|\.)(?:(?:gate|gate\.wg|router|router\.layer|router\.proj|moe_statics)\.(?:weight|bias|e_score_correction_bias)"
    r"|(?:expert|router|e_score_correction)_bias|router\.per_expert_scale)$"
)
TABLE = ".tid2eid"  # ending of a tensor that says which experts each token id goes to, where no router decides


@dataclass(frozen=True)
class Role:
    """What a tensor is to its MoE layer.

    kind: ``expert`` (one expert's matrix; ``expert`` and ``part`` name it), ``fused`` (all experts, first axis E),
    ``router`` (weights or bias with one row per expert), or ``other`` (copied as it is).
    """

    kind: str
    layer: int = -1
    expert: int = -1
    part: str = ""
    prefix: str = ""


def role(name: str, shape: Sequence[int], experts: Mapping[int, int]) -> Role:
    """Classify a tensor of a checkpoint, or a parameter in memory, by its name and shape.

    experts: expert count by MoE layer.
    """
    match = LAYER.match(name)
    if match is None or int(match["layer"]) not in experts:
        return Role("other")
    layer, rest = int(match["layer"]), match["rest"]
    if "shared_expert" in rest or "self_attn" in rest:
        return Role("other")
    if expert := _EXPERT.match(rest):
        prefix = f"{match['block']}{expert['moe']}experts."
        return Role("expert", layer, int(expert["expert"]), expert["part"], prefix)
    if (fused := _FUSED.match(rest)) and tuple(shape[:1]) == (experts[layer],):
        return Role("fused", layer, part=fused["part"])
    if _ROUTER.search(rest):
        return Role("router", layer, part=rest)
    return Role("other")


def list_of(match: re.Match[str]) -> str:
    """The list that a layer is in: what stands before its number."""
    return match["block"].removesuffix(f"{match['layer']}.")


def width_field(config: Mapping[str, Any]) -> str | None:
    """The field of config.json that says how many hidden units an expert has."""
    return next((name for name in EXPERT_WIDTH if isinstance(config.get(name), int)), None)


def layer_index(module_name: str) -> int:
    """``model.layers.3.mlp.experts`` -> 3; -1 for modules outside the decoder layers."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", module_name + ".")
    return int(match[1]) if match else -1


def experts_on_disk(folder_tensors: Mapping[str, Tensor], expected: int) -> dict[int, int]:
    """Experts per MoE layer, counted from tensor names (or the first axis of fused tensors of ``expected`` experts)."""
    found: dict[int, set[int]] = {}
    for name, tensor in folder_tensors.items():
        match = LAYER.match(name)
        if match is None or "shared_expert" in name:
            continue
        layer = int(match["layer"])
        if expert := _EXPERT.match(match["rest"]):
            found.setdefault(layer, set()).add(int(expert["expert"]))
        elif _FUSED.match(match["rest"]) and tensor.shape[:1] == (expected,):
            found.setdefault(layer, set()).update(range(expected))
    return {layer: len(indices) for layer, indices in sorted(found.items())}
