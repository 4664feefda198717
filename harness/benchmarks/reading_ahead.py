"""What it saves to read the next layer while one is computed, where the files are not in the system's file cache.

python -m harness.benchmarks.reading_ahead                # one processor computes, another is free to read
python -m harness.benchmarks.reading_ahead --threads 2    # all that this machine has compute

A random checkpoint is calibrated layer by layer, in turn with and without, `--rounds` times over. Before each pass its
files are put out of the cache, as they would be of a model that is larger than memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from harness import streaming
from harness.benchmarks import random_checkpoint
from harness.benchmarks.random_checkpoint import Size
from harness.calibrate import calibrate_streamed, packed_batches
from harness.models import Model
from harness.parking import Parking
from harness.store import Store
from harness.unfinished import Unfinished


def forget(folder: Path) -> None:
    """Put the folder's files out of the cache."""
    os.sync()  # what is not on the disk yet would stay
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(model: Model, batches: list[streaming.Batch], is_ahead: bool) -> float:
    """Of one pass."""
    forget(model.folder)
    without = mock.patch.object(streaming, "reading_ahead", lambda tensors: contextlib.nullcontext())
    with tempfile.TemporaryDirectory() as folder, contextlib.nullcontext() if is_ahead else without:
        start = time.perf_counter()
        opened = streaming.open_streamed(model, "auto")
        unfinished = Unfinished(Store(Path(folder)), "x")
        calibrate_streamed(opened, batches, frozenset(), "actual", Parking(np.inf, 0, Path(folder)), unfinished)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 2048, "threads": 1, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    size = Size(layers=15, hidden=1024, experts=64, width=1024, top_k=8)
    ids = np.random.default_rng(0).integers(0, size.vocabulary, (asked.tokens // 512, 512))
    with tempfile.TemporaryDirectory() as folder:
        total = random_checkpoint.write(Path(folder), size)
        model, batches = Model("random", folder), list(packed_batches(ids, 2))
        pairs = [tuple(seconds(model, batches, is_ahead) for is_ahead in (False, True)) for _ in range(asked.rounds)]
    before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(ahead / plain for plain, ahead in pairs)
    print(
        f"{total / 1e9:.2f} GB, {ids.size} tokens, {asked.threads} thread(s) computing: {before:.1f} s, "
        f"{after:.1f} s with the next layer read ahead: {ratio:.2f} (median of {asked.rounds} rounds)."
    )


if __name__ == "__main__":
    main()
