"""One calibration pass over a text, in shards that several processes share: the whole model in memory, or layer by
layer where it does not fit.

Statistics are sums, so those of the text are the sum of those of its parts. A part is kept under the tokens it is
made of, and made by whichever process comes to it first.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import stats
from harness.errors import UserError
from harness.loading import load
from harness.provenance import provenance
from harness.room import parked, taking_memory
from harness.spec import Cell
from harness.stats import Stats
from harness.store import Store, key, say
from harness.unfinished import Unfinished

if TYPE_CHECKING:
    from tqdm import tqdm

    from harness.streaming import Batch


@dataclass(frozen=True)
class Part:
    """Sequences of a cell's calibration text, int64 [S, T]. all_experts: of its tokens, the first so many go through
    every expert, where a method asks for that.
    """

    cell: Cell
    ids: np.ndarray
    all_experts: int

    @cached_property
    def fields(self) -> dict[str, Any]:
        """What determines the sums."""
        fields = self.cell.observed(self.ids)
        return fields if self.all_experts == self.ids.size else {**fields, "all_experts": self.all_experts}

    @cached_property
    def name(self) -> str:
        """File name of the sums."""
        return key(**self.fields) + ".safetensors"

    def known(self, store: Store) -> frozenset[str]:
        """Extra statistics that the store has of it; empty too where it has none at all."""
        path = store.path("stats", self.name)
        return stats.held(path)[0] & set(stats.EXTRAS) if path.exists() else frozenset()

    def is_made(self, store: Store) -> bool:
        """Whether the store has all that is asked of it, as far as the model can give it."""
        path = store.path("stats", self.name)
        if not path.exists():
            return False
        names, about = stats.held(path)
        return self.cell.needs & set(stats.EXTRAS) <= names and self.cell.extras <= names | set(about.get("asked", ()))

    def shards(self, store: Store) -> list[Part]:
        """Parts of about the same size, asked for what the store has of the whole too. Batches, and the tokens that all
        experts run on, are those of the whole.
        """
        cell = replace(self.cell, collect=self.cell.collect | self.known(store))
        parts, before = [], 0
        size = cell.calibration.batch_size
        borders = [
            size * batches[0] for batches in np.array_split(range(-(-len(self.ids) // size)), cell.calibration.shards)
        ]
        for ids in np.split(self.ids, borders[1:]):
            parts.append(Part(cell, ids, min(max(0, self.all_experts - before), ids.size)))
            before += ids.size
        return parts


def whole(cell: Cell, ids: np.ndarray) -> Part:
    """The pass over all of the cell's calibration tokens."""
    return Part(cell, ids, min(ids.size, cell.calibration.all_expert_tokens))


def sums(part: Part, store: Store) -> Stats:
    """The statistics, from the store or made there. Many processes may ask at once: they share the shards."""
    shards = part.shards(store)
    if len(shards) > 1 and not part.is_made(store):
        for shard in shards:
            with store.claimed("stats", shard.name) as mine:
                if mine:
                    _make(shard, store, functools.partial(_gather, shard, store))
        # What is still missing, others have claimed. Who is gone is replaced.
        for shard in shards:
            with store.locked("stats", shard.name):
                _make(shard, store, functools.partial(_gather, shard, store))
    with store.locked("stats", part.name):
        if part.is_made(store):
            say("calibrate", part.name, "cached")
        else:
            join = functools.partial(_joined, part, shards, store)
            _make(part, store, join if len(shards) > 1 else functools.partial(_gather, part, store))
    return stats.load(store.path("stats", part.name))


def _make(part: Part, store: Store, make: Callable[[], Stats]) -> None:
    """Put the sums of a part into the store, if they are not there."""
    if part.is_made(store):
        return

    def write(path: Path) -> None:
        made = make()
        stats.save(made, path)
        say("calibrate", part.name, f"{made.provenance['seconds']:.1f} s, {part.ids.size} tokens")

    sizes = part.cell.model.experts, part.cell.model.config["hidden_size"]
    store.put("stats", part.name, write, stats.nbytes(part.cell.extras | part.known(store), *sizes))


def _joined(part: Part, shards: Sequence[Part], store: Store) -> Stats:
    """The sum of the shards."""
    found = [stats.load(store.path("stats", shard.name)) for shard in shards]
    names = frozenset.intersection(*(each.names for each in found))
    total = functools.reduce(Stats.__add__, (each.only(names) for each in found))
    abouts = [each.provenance for each in found]
    return replace(
        total,
        provenance={
            **part.fields,
            "seconds": sum(about["seconds"] for about in abouts),
            "peak_memory": {
                what: max(about["peak_memory"][what] for about in abouts) for what in abouts[0]["peak_memory"]
            },
            "number_of_tokens": int(part.ids.size),
            "shards": len(shards),
            "asked": sorted(part.cell.extras),
            **provenance(),
        },
    )


def _gather(part: Part, store: Store) -> Stats:
    """One pass for all methods of the sweep; if the model cannot give what another asks for, for this one alone.

    What an earlier pass has gathered besides is gathered again, so that nothing is lost.
    """
    cell, known = part.cell, part.known(store)
    try:
        return _calibrate(part, cell.extras | known, store)
    except UserError:
        own = cell.needs & set(stats.EXTRAS)
        if own == cell.extras:
            raise
        return _calibrate(part, own | known, store)


def _calibrate(part: Part, extras: frozenset[str], store: Store) -> Stats:
    from tqdm import tqdm

    from harness.memory import forget_peak, peak

    forget_peak()
    start = time.perf_counter()
    with tqdm(desc="calibrate", total=part.ids.size, unit=" tokens", unit_scale=True, leave=False) as bar:
        layers, how = _observed(part, extras, store, bar)
    about = {
        **part.fields,
        **how,
        "seconds": time.perf_counter() - start,
        "peak_memory": peak(),
        "number_of_tokens": int(part.ids.size),
        "asked": sorted(part.cell.extras),
        **provenance(),
    }
    return Stats(layers, about)


def _observed(part: Part, extras: frozenset[str], store: Store, bar: tqdm) -> tuple[Any, dict[str, Any]]:
    """The sums of each layer, and how the model was in memory."""
    from harness.calibrate import calibrate, calibrate_streamed, packed_batches
    from harness.streaming import open_streamed

    cell, text = part.cell, part.cell.calibration
    batches = list(packed_batches(part.ids, text.batch_size))
    with taking_memory():
        room = parked(cell.model, text.dtype, text.batch_size * text.length, cell.max_memory)
        if room is None:
            model = load(cell.model, text.dtype, cell.max_memory.gpus_left() if cell.max_memory.gpu else None)
        else:
            opened = open_streamed(cell.model, text.dtype)
    if room is None:
        made = calibrate(model, _shown(batches, bar), extras, cell.routing, part.all_experts)
        return made.layers, {"layers": "all"}
    name = key(**part.fields, extras=sorted(extras), batch_size=text.batch_size)
    unfinished = Unfinished(store, name)
    with store.workspace(f"states-{name}") as folder:
        made = calibrate_streamed(
            opened, batches, extras, cell.routing, room.parking(folder), unfinished, part.all_experts, bar.update
        )
    unfinished.forget()
    return made.layers, {"layers": "one at a time"}


def _shown(batches: Sequence[Batch], bar: tqdm) -> Iterator[Batch]:
    """The batches, each on the bar when the next is asked for."""
    for batch in batches:
        yield batch
        bar.update(batch[0].numel())
