"""The plan: what becomes of every expert. A few KB of JSON; the checkpoint made from it is a disposable cache.

One schema covers pruning, merging and both at once. A layer has *slots*, the distinct experts that remain, each a
weighted mean of old experts, and *routes*, which tell every old router row what its gate now multiplies:

* pruning: one slot per kept expert (a bit-exact copy), dropped experts route to ``None`` and lose their router row;
* merging: one slot per cluster, every old expert routes to its cluster's slot, so members' gates add up;
* absorbing: one slot per centre, made of the centre and what it absorbs; only the centres' router rows stay.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import UserError

SCHEMA = 1
LARGEST = 64 * 2**20  # bytes of a plan's file; one of a few KB is usual, one of 60 layers of 384 experts has 1.5 MB


@dataclass(frozen=True)
class Source:
    """An old expert and its share in a slot."""

    expert: int
    weight: float = 1.0


@dataclass(frozen=True)
class LayerPlan:
    """``slots[s]``: the old experts whose weighted mean (weights sum to 1) is the new expert s.
    ``routes[i]``: the slot that old expert i's gate goes to, or None if its router row is removed. ``align``: before
    they are averaged, the sources' hidden units are permuted to match those of the slot's weightiest source.
    """

    slots: tuple[tuple[Source, ...], ...]
    routes: tuple[int | None, ...]
    align: bool = False

    def __post_init__(self) -> None:
        experts = len(self.routes)
        assert all(slot for slot in self.slots), "a slot without a source"
        assert all(0 <= source.expert < experts for slot in self.slots for source in slot), "a source out of range"
        assert all(source.weight >= 0 for slot in self.slots for source in slot), "a negative share"
        assert all(len({source.expert for source in slot}) == len(slot) for slot in self.slots), "a source twice"
        assert all(abs(sum(source.weight for source in slot) - 1) < 1e-6 for slot in self.slots), "weights sum to 1"
        used = {route for route in self.routes if route is not None}
        assert used == set(range(len(self.slots))), "every slot has a router row and every route has a slot"

    @classmethod
    def identity(cls, experts: int) -> LayerPlan:
        return cls.prune(range(experts), experts)

    @classmethod
    def prune(cls, kept: Iterable[int], experts: int) -> LayerPlan:
        """Keep these experts, in their old order, bit for bit; remove the others and their router rows."""
        ordered = sorted({int(expert) for expert in kept})  # JSON knows no numpy integers
        slot_of = {expert: slot for slot, expert in enumerate(ordered)}
        return cls(
            slots=tuple((Source(expert),) for expert in ordered),
            routes=tuple(slot_of.get(expert) for expert in range(experts)),
        )

    @classmethod
    def merge(cls, clusters: Iterable[Sequence[int]], weights: Sequence[float], align: bool = False) -> LayerPlan:
        """Every cluster becomes one slot, the mean of its members weighted by ``weights[expert]`` (plain mean if these
        are all 0 in a cluster, so a never-routed cluster does not become an all-zero expert).
        """
        ordered = sorted((sorted(cluster) for cluster in clusters), key=lambda cluster: cluster[0])
        slot_of = {expert: slot for slot, cluster in enumerate(ordered) for expert in cluster}
        return cls(
            slots=tuple(_weighted(cluster, weights) for cluster in ordered),
            routes=tuple(slot_of[expert] for expert in range(len(weights))),
            align=align and len(ordered) < len(weights),
        )

    @classmethod
    def absorb(cls, groups: Mapping[int, Sequence[int]], weights: Sequence[float], align: bool = False) -> LayerPlan:
        """``groups[centre]``: the experts that the centre becomes the weighted mean of, itself among them. A centre
        alone is copied bit for bit. Only the centres' router rows stay, so a stock checkpoint really shrinks, and
        tokens that chose an absorbed expert are routed anew.
        """
        centres = sorted(int(centre) for centre in groups)
        assert all(centre in groups[centre] for centre in centres), "a centre is part of its own group"
        slot_of = {centre: slot for slot, centre in enumerate(centres)}
        return cls(
            slots=tuple(_weighted(sorted(groups[centre]), weights) for centre in centres),
            routes=tuple(slot_of.get(expert) for expert in range(len(weights))),
            align=align and len(centres) < len(weights),
        )

    @property
    def kept_rows(self) -> tuple[int, ...]:
        """Old experts whose router row stays, ascending. A stock checkpoint holds one expert per kept row."""
        return tuple(expert for expert, slot in enumerate(self.routes) if slot is not None)

    def aligned_pairs(self) -> Iterator[tuple[int, Source]]:
        """(the slot's weightiest expert, another source of the slot) wherever hidden units are to be matched."""
        for sources in self.slots if self.align else ():
            reference = max(sources, key=lambda source: source.weight)
            yield from ((reference.expert, source) for source in sources if source is not reference)

    @property
    def is_identity(self) -> bool:
        return self == LayerPlan.identity(len(self.routes))

    @property
    def only_prunes(self) -> bool:
        """Whether every expert that stays is what it was."""
        return self == LayerPlan.prune(self.kept_rows, len(self.routes))


def _weighted(cluster: Sequence[int], weights: Sequence[float]) -> tuple[Source, ...]:
    total = sum(float(weights[expert]) for expert in cluster)
    if total <= 0:
        return tuple(Source(expert, 1 / len(cluster)) for expert in cluster)
    return tuple(Source(expert, float(weights[expert]) / total) for expert in cluster if weights[expert] > 0)


@dataclass(frozen=True)
class Plan:
    """What becomes of every MoE layer, by the layer's index in the model, and how it was decided."""

    layers: Mapping[int, LayerPlan]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def identity(cls, experts: Mapping[int, int]) -> Plan:
        """Every expert of layers of so many stays as it is."""
        return cls({layer: LayerPlan.identity(count) for layer, count in experts.items()})

    @property
    def is_identity(self) -> bool:
        return all(layer.is_identity for layer in self.layers.values())

    @property
    def only_prunes(self) -> bool:
        return all(layer.only_prunes for layer in self.layers.values())

    @property
    def digest(self) -> str:
        """Hash of what the plan does, not of how it was found: equal plans make equal checkpoints."""
        return hashlib.sha256(json.dumps(_layers_to_json(self.layers)).encode()).hexdigest()

    def distinct_experts(self) -> dict[int, int]:
        """Distinct experts per layer: what a server that stores each slot once would hold."""
        return {index: len(layer.slots) for index, layer in self.layers.items()}

    def written_experts(self) -> dict[int, int]:
        """Experts per layer in a stock checkpoint: one per router row, merged slots copied to every member's row."""
        return {index: len(layer.kept_rows) for index, layer in self.layers.items()}

    def validate(self, experts: Mapping[int, int], top_k: int) -> None:
        """Raise UserError if the plan does not fit a model with these experts per layer and this top-k."""
        if self.layers.keys() != experts.keys():
            raise UserError(
                f"The plan is for MoE layers {sorted(self.layers)}, but the model's are {sorted(experts)}. "
                "It was made for another model."
            )
        for index, layer in self.layers.items():
            if len(layer.routes) != experts[index]:
                raise UserError(
                    f"The plan routes {len(layer.routes)} experts in layer {index}, but the model has "
                    f"{experts[index]} there. It was made for another model."
                )
            if len(layer.kept_rows) < top_k:
                raise UserError(
                    f"The plan leaves {len(layer.kept_rows)} experts in layer {index}, fewer than the {top_k} each "
                    "token is routed to (top_k). Plan again with a smaller ratio."
                )


def to_json(plan: Plan) -> str:
    document = {"schema": SCHEMA, "layers": _layers_to_json(plan.layers), "provenance": dict(plan.provenance)}
    return json.dumps(document, indent=1)


def read(file: Path) -> Plan:
    """The plan in a file. Raises UserError if it cannot be read or is none."""
    try:
        if not file.is_file():
            raise UserError(f"{file} cannot be read: there is no such file. Plans of runs are in <store>/plans/.")
        if (size := file.stat().st_size) > LARGEST:
            raise UserError(f"{file} is no plan: it has {size:,} bytes, and a plan at most {LARGEST:,}.")
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}. Plans of runs are in <store>/plans/.") from error
    return from_json(text)


def from_json(text: str) -> Plan:
    """Raises UserError if the text is no plan of this schema, and nothing but that."""
    try:
        document = json.loads(text, object_pairs_hook=_once)
        _check_kind(document, dict, "a plan")
        _check_kind(document["schema"], int, "schema")
        if document["schema"] != SCHEMA:
            raise UserError(f"The plan has schema {document['schema']}; this version reads schema {SCHEMA}.")
        if unknown := document.keys() - {"schema", "layers", "provenance"}:
            raise ValueError(f"a plan has no {sorted(unknown)}")
        _check_kind(document["layers"], dict, "layers")
        _check_provenance(document["provenance"])
        layers = {_layer_index(index): _layer(layer) for index, layer in document["layers"].items()}
        return Plan(layers, document["provenance"])
    except (ValueError, KeyError, TypeError, AssertionError, OverflowError, RecursionError) as error:
        raise UserError(
            f"This is not a readable plan: {error!r}. One in <store>/plans/ is made again when it is deleted."
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON. Raises ValueError for a name that is there twice, of which one would silently count."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _check_kind(value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """Raise TypeError for a value of another JSON type: True is no number here."""
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise TypeError(f"{what} is {type(value).__name__}")


def _check_provenance(about: Any) -> None:
    """Model cards and logs quote these."""
    _check_kind(about, dict, "provenance")
    for name in ("ratio", "seconds"):
        _check_kind(about.get(name, 0), (int, float), f"provenance.{name}")
        if not math.isfinite(about.get(name, 0)):
            raise ValueError(f"provenance.{name} is not finite")
    _check_kind(about.get("label", ""), str, "provenance.label")


def _layer_index(text: str) -> int:
    if text != str(int(text)):
        raise ValueError(f"layer {text!r}")
    return int(text)


def _layer(layer: Any) -> LayerPlan:
    _check_kind(layer, dict, "a layer")
    if unknown := layer.keys() - {"slots", "routes", "align"}:
        raise ValueError(f"a layer has no {sorted(unknown)}")
    for route in layer["routes"]:
        if route is not None:
            _check_kind(route, int, "a route")
    align = layer.get("align", False)
    _check_kind(align, bool, "align")
    slots = tuple(tuple(_source(*pair) for pair in slot) for slot in layer["slots"])
    return LayerPlan(slots, tuple(layer["routes"]), align)


def _source(expert: Any, weight: Any) -> Source:
    _check_kind(expert, int, "an expert")
    _check_kind(weight, (int, float), "a share")
    return Source(expert, float(weight))


def _layers_to_json(layers: Mapping[int, LayerPlan]) -> dict[str, Any]:
    return {
        str(index): {
            "slots": [[[source.expert, source.weight] for source in slot] for slot in layer.slots],
            "routes": list(layer.routes),
            **({"align": True} if layer.align else {}),
        }
        for index, layer in sorted(layers.items())
    }
