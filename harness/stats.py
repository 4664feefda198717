"""Calibration statistics: additive float64 sums per layer and expert, never means.

One calibration pass (`harness.calibrate`) fills them; every method and every ratio reads them. Because they are sums,
shards, machines and "512 more samples" are ``a + b``, and a mean of batch means cannot creep in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

# Sums over the tokens routed to an expert, each of shape [E]. With g the gate the model really multiplied with and
# n = ||f(x)||_2 the norm of the expert's output before the gate.
ROUTED = (
    "count",  # number of tokens routed to the expert
    "gate",  # sum of g
    "norm",  # sum of n
    "norm_sq",  # sum of n^2
    "gate_norm",  # sum of g n
    "gate_sq_norm_sq",  # sum of g^2 n^2
)

# Sums that cost more than the routed ones and are gathered only when a method needs them.
EXTRAS = (
    "logit_gram",  # [E, E] sum over all tokens of z z^T, z the router's raw logits
    "all_output_sum",  # [E, H] sum over all tokens, routed or not, of every expert's output f_j(x)
)


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
        sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        return LayerStats(self.experts, self.tokens + other.tokens, sums)

    def only(self, names: frozenset[str]) -> LayerStats:
        """The same layer with nothing but the named sums."""
        return LayerStats(self.experts, self.tokens, {name: self[name] for name in sorted(names)})


@dataclass(frozen=True)
class Stats:
    """Statistics of every MoE layer, by the layer's index in the model, and where they came from."""

    layers: Mapping[int, LayerStats]
    provenance: Mapping[str, Any] = field(default_factory=dict)

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
        return Stats({index: layer.only(names) for index, layer in self.layers.items()}, self.provenance)


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
