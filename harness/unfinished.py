"""What a calibration that goes layer by layer has found so far, in the store: killed, it is gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from harness import stats
from harness.errors import DiskFullError
from harness.stats import LayerStats, Stats
from harness.store import Store, remove, say

KIND = "unfinished"
SHARE = 0.05  # of the time, that may go into saving hidden states


class _MoreThanStates(Exception):  # noqa: N818 - not an error
    """What comes to the next layer is more than hidden states can hold."""


class Unfinished:
    """The layers that are done, and the hidden states in front of one of them, of one calibration.

    name: of the calibration; it determines the sums and how the tokens are split into batches.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.layers: dict[int, LayerStats] = {}
        self.seconds, self.peak = 0.0, dict[str, int]()  # of the processes before this one
        for path in self._paths("layer"):
            with suppress(SafetensorError, OSError, KeyError, ValueError):  # damaged: it is observed again
                self._take(stats.load(path))
        self._since = self._saved_at = time.monotonic()
        self._saving = 0.0

    def _take(self, found: Stats) -> None:
        self.layers |= found.layers
        self.seconds += found.provenance["seconds"]
        self.peak = highest(self.peak, found.provenance["peak_memory"])

    def _paths(self, what: str) -> list[Path]:
        return sorted(self.store.path(KIND, "").glob(f"{self.name}-{what}-*"))

    def keep(self, layer: int, found: LayerStats) -> None:
        """A layer is done."""
        from harness.memory import peak

        self.layers[layer] = found
        now = time.monotonic()
        about: dict[str, Any] = {"seconds": now - self._since, "peak_memory": peak()}
        self._since = now
        name = f"{self.name}-layer-{layer:04}.safetensors"
        self.store.put(KIND, name, lambda path: stats.save(Stats({layer: found}, about), path))

    def states(self) -> tuple[int, Path | None]:
        """The layer to begin with, and the folder of what comes to it; the first, from tokens, without one."""
        kept = self._paths("states")
        return (int(kept[-1].name.rpartition("-")[2]), kept[-1]) if kept else (0, None)

    def save(self, layer: int, nbytes: int, write: Callable[[Path], bool]) -> None:
        """Keep what comes to this layer, if that takes no more than `SHARE` of the time."""
        start = time.monotonic()
        if (start - self._saved_at) * SHARE < self._saving:
            return
        before = self._paths("states")

        def make(path: Path) -> None:
            path.mkdir()
            if not write(path):
                raise _MoreThanStates

        try:
            self.store.put(KIND, f"{self.name}-states-{layer:04}", make, nbytes)
        except (DiskFullError, _MoreThanStates) as problem:
            why = "this model hands on more than them" if isinstance(problem, _MoreThanStates) else "the disk is full"
            begins = "where the last were kept" if before else "from tokens"
            say("calibrate", self.name, f"hidden states are not kept: {why}. Killed, it begins again {begins}")
            self._saving = float("inf")
            return
        for path in before:
            remove(path)
        self._saved_at = time.monotonic()
        self._saving = self._saved_at - start


def forget(store: Store, name: str) -> None:
    """Remove what is kept of all calibrations whose names begin so: their sums are in the store.

    Hidden states first: killed in between, layers without them are of use, and they without layers would lead astray.
    """
    for what in ("states", "layer"):
        for path in store.path(KIND, "").glob(f"{name}*-{what}-*"):
            remove(path)


def highest(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """The larger of each of two processes' peaks, of which one may have seen no GPU."""
    return {what: max(one.get(what, 0), other.get(what, 0)) for what in {**one, **other}}
