"""Calibration statistics: additive float64 sums per layer and expert, never means.

One calibration pass (`harness.calibrate`) fills them; every method and every ratio reads them. Because they are sums,
shards, machines and "512 more samples" are ``a + b``, and a mean of batch means cannot creep in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from harness.errors import StageError
from harness.plan import LayerPlan
from harness.search import Search

# Sums over the tokens routed to an expert, each of shape [E]. With g the gate the model really multiplied with, f(x)
# the expert's output before the gate and n = ||f(x)||_2.
ROUTED = (
    "count",  # number of tokens routed to the expert
    "gate",  # sum of g
    "norm",  # sum of n
    "norm_sq",  # sum of n^2
    "gate_norm",  # sum of g n
    "gate_sq_norm",  # sum of g^2 n
    "gate_sq_norm_sq",  # sum of g^2 n^2
    "output_max",  # not a sum: the largest |f(x)| of any token and channel
)
MAXIMA = frozenset({"output_max"})  # combined by the maximum where the others add

# Sums that cost more than the routed ones and are gathered only when a method needs them.
PAIRWISE = (  # [E, E]; the last three over the tokens routed to both experts of the pair
    "logit_gram",  # sum over all tokens of z z^T, z the router's raw logits
    "coactivation",  # number of tokens
    "gated_norm_gram",  # sum of g_i n_i g_j n_j
    "gated_output_gram",  # sum of g_i g_j <f_i(x), f_j(x)>
)
OF_OUTPUTS = (  # [E, H], routed or not: every expert runs on each of the first `calibration.all_expert_tokens` tokens
    "all_output_sum",  # sum of f_j(x)
    "all_gated_output_sum",  # sum of p_j f_j(x), p the softmax over all E raw logits
)
EXTRAS = (
    "gate_norm_turn",  # [E] sum of g n s, s = max(0, 1 - cos(u, u + r)), u the residual stream, r the routed output
    "logit_sum",  # [E] sum over all tokens of z
    *PAIRWISE,
    *OF_OUTPUTS,
)

# Sums over the entries of an expert's weight matrices (gate, up and down together), [E]: no text is needed for them.
WEIGHTS = ("weight_count", "weight_abs", "weight_sq")

# How much the output of a layer changes when experts are merged (`harness.barriers`), for each way of measuring it:
# ``pair_barrier.<mode>`` [E, E], ``triple_barrier.<mode>`` [T] and its ``triangles.<mode>`` [T, 3], expert indices.
BARRIER_MODES = ("logit_lens", "hidden_softmax", "l2", "lm")
BARRIER_SUMS = ("pair_barrier", "triangles", "triple_barrier")
BARRIERS = tuple(f"{name}.{mode}" for mode in BARRIER_MODES for name in BARRIER_SUMS)

# What a method may ask to be told besides: `Stats.error` and `Stats.search`.
MEASURES = ("reconstruction", "search")


@dataclass(frozen=True)
class LayerStats:
    """Sums of one MoE layer with ``experts`` routed experts over ``tokens`` unmasked tokens."""

    experts: int
    tokens: int = 0
    sums: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.sums:
            raise KeyError(
                f"statistic {name!r} was not gathered; there are {sorted(self.sums)}. "
                "A method must list what it reads in its `needs`."
            )
        return self.sums[name]

    def __add__(self, other: LayerStats) -> LayerStats:
        assert self.experts == other.experts, (self.experts, other.experts)
        assert self.sums.keys() == other.sums.keys(), (sorted(self.sums), sorted(other.sums))
        sums = {
            name: np.maximum(value, other.sums[name]) if name in MAXIMA else value + other.sums[name]
            for name, value in self.sums.items()
        }
        return LayerStats(self.experts, self.tokens + other.tokens, sums)

    def only(self, names: frozenset[str]) -> LayerStats:
        """The same layer with nothing but the named sums."""
        return LayerStats(self.experts, self.tokens, {name: self[name] for name in sorted(names)})

    def joined(self, other: LayerStats) -> LayerStats:
        """The sums of both, which have no name in common, of the same layer."""
        assert self.experts == other.experts and not self.sums.keys() & other.sums.keys()
        return LayerStats(self.experts, max(self.tokens, other.tokens), {**self.sums, **other.sums})


@dataclass(frozen=True)
class Stats:
    """Statistics of every MoE layer, by the layer's index in the model, and where they came from.

    error: the measured reconstruction error of a plan for one layer (`harness.reconstruct`), for methods that list
    "reconstruction" among their needs. search: the model pruned in many ways on so many sequences of the calibration
    text, for those that list "search".
    """

    layers: Mapping[int, LayerStats]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    error: Callable[[int, LayerPlan], float] | None = None
    search: Callable[[int], Search] | None = None

    def __add__(self, other: Stats) -> Stats:
        assert self.layers.keys() == other.layers.keys(), (sorted(self.layers), sorted(other.layers))
        layers = {index: layer + other.layers[index] for index, layer in self.layers.items()}
        return Stats(layers, {"parts": [dict(self.provenance), dict(other.provenance)]})

    @property
    def names(self) -> frozenset[str]:
        """Names of the sums every layer holds."""
        return frozenset.intersection(*(frozenset(layer.sums) for layer in self.layers.values()))

    def only(self, names: frozenset[str]) -> Stats:
        """What a method that declares ``needs = names`` is given: nothing else, so it can read nothing else."""
        sums = names - set(MEASURES)
        layers = {index: layer.only(sums) for index, layer in self.layers.items()}
        error = self.error if "reconstruction" in names else None
        return Stats(layers, self.provenance, error, self.search if "search" in names else None)

    def joined(self, other: Stats) -> Stats:
        """The sums of both, which have no name in common."""
        layers = {index: layer.joined(other.layers[index]) for index, layer in self.layers.items()}
        return Stats(layers, {**self.provenance, **other.provenance}, self.error or other.error, self.search)

    def check_finite(self) -> None:
        """Raise StageError at the first sum that is not finite: a ranking of NaN would be an arbitrary one."""
        for index, layer in self.layers.items():
            for name, value in layer.sums.items():
                if not np.isfinite(value).all():
                    raise StageError(f"Statistics: {name} of layer {index} is not finite. Calibrate again in float32.")


def nbytes(extras: Iterable[str], layers: Mapping[int, int], hidden: int) -> int:
    """Size of a calibration pass's sums: the routed ones and ``extras``, for layers of so many experts."""
    names = [*ROUTED, *extras]
    width = dict.fromkeys(OF_OUTPUTS, hidden)
    return 8 * sum(
        count * (count if name in PAIRWISE else width.get(name, 1)) for name in names for count in layers.values()
    )


def save(stats: Stats, path: Path) -> None:
    """Write safetensors: one float64 tensor per layer and sum, the provenance as JSON in the header."""
    tensors = {
        f"{index}.{name}": np.ascontiguousarray(value, dtype=np.float64)
        for index, layer in stats.layers.items()
        for name, value in layer.sums.items()
    }
    shape = {index: {"experts": layer.experts, "tokens": layer.tokens} for index, layer in stats.layers.items()}
    save_file(
        tensors,
        path,
        metadata={"layers": json.dumps(shape), "provenance": json.dumps(dict(stats.provenance))},
    )


def held(path: Path) -> tuple[frozenset[str], dict[str, Any]]:
    """Names of the sums that every layer of a file of `save` holds, and the provenance; reads the header only."""
    with safe_open(path, framework="numpy") as file:
        names: dict[str, set[str]] = {}
        for key in file.keys():  # noqa: SIM118 - not a mapping
            index, name = key.split(".", 1)
            names.setdefault(index, set()).add(name)
        provenance = json.loads(file.metadata()["provenance"])
    return frozenset(set.intersection(*names.values()) if names else ()), provenance


def load(path: Path) -> Stats:
    """Read what `save` wrote."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        sums: dict[int, dict[str, np.ndarray]] = {}
        for key in file.keys():  # noqa: SIM118 - not a mapping
            index, name = key.split(".", 1)
            sums.setdefault(int(index), {})[name] = file.get_tensor(key)
    layers = {
        int(index): LayerStats(shape["experts"], shape["tokens"], sums.get(int(index), {}))
        for index, shape in json.loads(metadata["layers"]).items()
    }
    return Stats(layers, json.loads(metadata["provenance"]))
