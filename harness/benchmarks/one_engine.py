"""How long the demo's sweep takes with a server per checkpoint, and with one engine for all: one run, one machine.

python -m harness.benchmarks.one_engine [overrides, such as limit=40]

Four ways, each in a store of its own, with the same client and tasks: a new vLLM server for each exported checkpoint,
as one would by hand (vLLM is imported anew each time); ``serve=checkpoint``, which forks it from a process that has;
``serve=plan``, which forks it too but writes no checkpoint; and the default, one engine that is turned from plan to
plan. Scores are compared to the last digit. Prints seconds and the most that was on disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.errors import StageError
from harness.models import ROOT
from harness.provenance import provenance

COLD = "harness.benchmarks.cold_server"  # run.py, but with a server process that imports vLLM itself
WAYS = {
    "new server for each checkpoint": (COLD, "serve=checkpoint"),
    "serve=checkpoint (forked)": ("harness.run", "serve=checkpoint"),
    "serve=plan": ("harness.run", "serve=plan"),
    "one engine (serve=vllm)": ("harness.run", "serve=vllm"),
}


@dataclass(frozen=True)
class Took:
    """seconds: of the whole command. serve, score: of these stages. tensor_bytes, disk_bytes: most at any time."""

    seconds: float
    serve: float
    score: float
    tensor_bytes: int
    disk_bytes: int


def run(module: str, serve: str, store: Path, overrides: Sequence[str]) -> Took:
    """The sweep in an empty store. Raises StageError if it does not end well."""
    peak = [0, 0]
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(store, peak, over))
    watch.start()
    start = time.perf_counter()
    command = [sys.executable, "-m", module, "sweep=demo", serve, f"store={store}", *overrides]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"}
        )
        seconds = time.perf_counter() - start
    finally:
        over.set()
        watch.join()
    if done.returncode:
        words = done.stdout[-2000:] + done.stderr[-2000:]
        raise StageError(f"{' '.join(command)} ended with {done.returncode}: {words}")
    rows = pd.read_csv(store / "tables" / "demo.csv").drop_duplicates(["label", "ratio", "task"])
    plans = rows.drop_duplicates(["label", "ratio"])
    return Took(seconds, plans["seconds_serve"].sum(), rows["seconds_score"].sum(), peak[0], peak[1])


def _watch(store: Path, peak: list[int], over: threading.Event) -> None:
    """Note the most that tensor files of checkpoints, and all files of the store, take on disk."""
    while not over.wait(0.05):
        sizes: dict[Path, int] = {}
        for file in store.rglob("*"):
            try:
                sizes[file] = file.stat().st_size if file.is_file() else 0
            except OSError:  # gone meanwhile
                continue
        tensors = sum(
            size for file, size in sizes.items() if "checkpoints" in file.parts and ".safetensors" in file.name
        )
        peak[:] = [max(peak[0], tensors), max(peak[1], sum(sizes.values()))]


def scores(store: Path) -> pd.DataFrame:
    columns = ["label", "ratio", "task", "metric", "value", "stderr", "n"]
    return pd.read_csv(store / "tables" / "demo.csv", float_precision="round_trip")[columns]


def main() -> int:
    overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        took = {way: run(*how, Path(folder) / str(i), overrides) for i, (way, how) in enumerate(WAYS.items())}
        first, *others = [scores(Path(folder) / str(i)) for i in range(len(WAYS))]
    fast = took["one engine (serve=vllm)"].seconds
    rows = [
        {
            "way": way,
            "seconds": f"{t.seconds:.1f}",
            "times one engine": f"{t.seconds / fast:.2f}",
            "serve s": f"{t.serve:.1f}",
            "score s": f"{t.score:.1f}",
            "MB of checkpoints at most": f"{t.tensor_bytes / 1e6:.1f}",
            "MB on disk at most": f"{t.disk_bytes / 1e6:.1f}",
        }
        for way, t in took.items()
    ]
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))
    same = [way for way, other in zip([*WAYS][1:], others, strict=True) if other.equals(first)]
    print(f"\nScores equal to the first way's, to the last digit ({len(first)} numbers): {', '.join(same) or 'none'}.")
    print(json.dumps(provenance()))
    return 0 if len(same) == len(others) else 1


if __name__ == "__main__":
    sys.exit(main())
