"""What a calibration that goes layer by layer has found so far, in the store: killed, it is gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from harness import stats
from harness.errors import DiskFullError
from harness.stats import LayerStats, Stats
from harness.store import Store, remove, say

KIND = "unfinished"
SHARE = 0.05  # of the time, that may go into saving hidden states


class Unfinished:
    """The layers that are done, and the hidden states in front of one of them, of one calibration.

    name: of the calibration; it determines the sums and how the tokens are split into batches.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.layers: dict[int, LayerStats] = {}
        for path in self._paths("layer"):
            self.layers |= stats.load(path).layers
        self._saved_at, self._seconds = time.monotonic(), 0.0

    def _paths(self, what: str) -> list[Path]:
        return sorted(self.store.path(KIND, "").glob(f"{self.name}-{what}-*"))

    def keep(self, layer: int, found: LayerStats) -> None:
        """A layer is done."""
        self.layers[layer] = found
        name = f"{self.name}-layer-{layer:04}.safetensors"
        self.store.put(KIND, name, lambda path: stats.save(Stats({layer: found}), path))

    def states(self) -> tuple[int, Path | None]:
        """The layer to begin with, and the folder of what comes to it; the first, from tokens, without one."""
        kept = self._paths("states")
        return (int(kept[-1].name.rpartition("-")[2]), kept[-1]) if kept else (0, None)

    def save(self, layer: int, nbytes: int, write: Callable[[Path], bool]) -> None:
        """Keep what comes to this layer, if that takes no more than `SHARE` of the time."""
        start = time.monotonic()
        if (start - self._saved_at) * SHARE < self._seconds:
            return
        before = self._paths("states")
        can_be_saved = True

        def make(path: Path) -> None:
            nonlocal can_be_saved
            path.mkdir()
            can_be_saved = write(path)

        try:
            made = self.store.put(KIND, f"{self.name}-states-{layer:04}", make, nbytes)
        except DiskFullError:
            say("calibrate", self.name, "hidden states are not kept: the disk is too full")
            can_be_saved = False
        else:
            for path in [*before, *([] if can_be_saved else [made])]:
                remove(path)
        self._saved_at = time.monotonic()
        self._seconds = self._saved_at - start if can_be_saved else float("inf")

    def forget(self) -> None:
        """It is finished."""
        for path in [*self._paths("layer"), *self._paths("states")]:
            remove(path)
