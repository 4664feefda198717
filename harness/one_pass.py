"""One calibration pass over a text, in shards that several processes share: the whole model in memory, or layer by
layer where it does not fit.

Statistics are sums, so those of the text are the sum of those of its parts. A part is kept under the tokens it is
made of, and made by whichever process comes to it first.
"""

from __future__ import annotations

import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import stats
from harness.errors import StageError, UserError
from harness.loading import load
from harness.provenance import provenance
from harness.room import parked, taking_memory
from harness.spec import Cell
from harness.stats import Stats
from harness.store import Store, key, say
from harness.unfinished import Unfinished, forget, highest

if TYPE_CHECKING:
    from harness.pass_progress import PassProgress
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
    def stem(self) -> str:
        return key(**self.fields)

    @property
    def name(self) -> str:
        """File name of the sums."""
        return f"{self.stem}.safetensors"

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
        join = functools.partial(_joined, part, shards, store)
        _make(part, store, join if len(shards) > 1 else functools.partial(_gather, part, store))
    return stats.load(store.path("stats", part.name))


def _make(part: Part, store: Store, make: Callable[[], Stats]) -> None:
    """Put the sums of a part into the store, if they are not there; what led to them goes in any case."""
    if not part.is_made(store):
        _put(part, store, make)
    forget(store, part.stem)


def _put(part: Part, store: Store, make: Callable[[], Stats]) -> None:
    def write(path: Path) -> None:
        made = make()
        if missing := sorted(part.cell.model.experts.keys() - made.layers.keys()):
            raise StageError(f"{part.cell.model.name}: the pass over the tokens has gone by the experts of {missing}.")
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
            "peak_memory": functools.reduce(highest, (about["peak_memory"] for about in abouts)),
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
    from harness.memory import forget_peak, peak
    from harness.pass_progress import PassProgress

    forget_peak()
    start = time.perf_counter()
    with closing(PassProgress(part.name, part.ids.size)) as progress:
        layers, how, left = _observed(part, extras, store, progress)
    about = {
        **part.fields,
        "layers": how,
        "seconds": time.perf_counter() - start + (left.seconds if left else 0.0),
        "peak_memory": highest(left.peak if left else {}, peak()),
        "number_of_tokens": int(part.ids.size),
        "asked": sorted(part.cell.extras),
        **provenance(),
    }
    return Stats(layers, about)


def _observed(
    part: Part, extras: frozenset[str], store: Store, progress: PassProgress
) -> tuple[Any, str, Unfinished | None]:
    """The sums of each layer, how many of them were in memory at a time, and what the pass has gone on with."""
    from harness.calibrate import calibrate, calibrate_streamed, packed_batches
    from harness.streaming import open_streamed

    cell, text = part.cell, part.cell.calibration
    batches = list(packed_batches(part.ids, text.batch_size))
    with taking_memory():
        room = parked(cell.model, text.dtype, text.batch_tokens, cell.max_memory)
        if room is None:
            model = load(cell.model, text.dtype, cell.max_memory.gpus_left() if cell.max_memory.gpu else None)
        else:
            opened = open_streamed(cell.model, text.dtype)
    if room is None:
        made = calibrate(model, _shown(batches, progress), extras, cell.routing, part.all_experts)
        return made.layers, "all", None
    left = _left(part, extras, store)
    done = f", goes on: {len(left.layers)} layers are done" if left.layers else ""
    say("calibrate", part.name, f"layer by layer, {len(opened.layers)} layers{done}")
    with store.workspace(f"states-{left.name}") as folder:
        made = calibrate_streamed(
            opened, batches, extras, cell.routing, room.parking(folder), left, part.all_experts, progress
        )
    return made.layers, "one at a time", left


def _left(part: Part, extras: frozenset[str], store: Store) -> Unfinished:
    """What an interrupted pass that went layer by layer has left of a part, as this one would make it."""
    import torch

    how = key(
        extras=sorted(extras),
        batch_size=part.cell.calibration.batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        versions=[importlib.metadata.version(name) for name in ("torch", "compressed-tensors")],
    )
    return Unfinished(store, f"{part.stem}-{how}")


def _shown(batches: Sequence[Batch], progress: PassProgress) -> Iterator[Batch]:
    """The batches, each counted when the next is asked for."""
    for batch in batches:
        yield batch
        progress.advance(batch[0].numel())
