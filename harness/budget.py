"""How many experts a ratio leaves in each layer: the rounding, once, and what is not possible, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.errors import UserError


def keep_count(experts: int, ratio: float) -> int:
    """``keep = E - floor(E * ratio)``: the published pruning counts round the number dropped down."""
    return experts - int(experts * ratio + 1e-9)


def uniform(experts: Mapping[int, int], ratio: float) -> dict[int, int]:
    """The same ratio in every layer."""
    return {layer: keep_count(count, ratio) for layer, count in experts.items()}


def check_ratio(ratio: object) -> float:
    """The ratio as a float in [0, 1). Raises UserError for anything else."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise UserError(f"ratio={ratio} is not a number. Give the share of experts to remove, from 0 up to below 1.")
    if not 0 <= ratio < 1:
        raise UserError(
            f"ratio={ratio} would remove {ratio:.0%} of the experts. Give the share to remove, from 0 up to below 1, "
            "such as 0.25."
        )
    return float(ratio)


def check_keep(
    keep: Mapping[int, int], experts: Mapping[int, int], ratio: float, config: Mapping[str, Any], top_k: int
) -> None:
    """Raise UserError if the model cannot route with these counts; the message names the largest usable ratio."""
    groups = int(config.get("n_group") or 1)
    top_groups = int(config.get("topk_group") or groups)
    for layer, count in keep.items():
        reason = _impossible(count, top_k, groups, top_groups)
        if reason is not None:
            usable = [k for k in range(1, experts[layer] + 1) if _impossible(k, top_k, groups, top_groups) is None]
            best = 1 - min(usable, default=experts[layer]) / experts[layer]
            raise UserError(
                f"ratio={ratio:g} keeps {count} of {experts[layer]} experts per layer, {reason}. "
                f"Largest usable ratio for this model: {best:.4g}."
            )


def _impossible(keep: int, top_k: int, groups: int, top_groups: int) -> str | None:
    if keep < top_k:
        return f"fewer than the {top_k} each token is routed to (top_k)"
    if groups > 1 and keep % groups:
        return f"which the router's {groups} groups (n_group) do not divide"
    if groups > 1 and keep // groups < 2:
        return f"less than 2 in each of the router's {groups} groups, whose score is a top-2"
    if groups > 1 and keep // groups * top_groups < top_k:
        return f"so the {top_groups} groups a token may use hold fewer than its top_k of {top_k}"
    return None
