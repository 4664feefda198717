"""Runs of the command line in a store of their own, and what they must not leave behind."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import psutil

from harness.models import ROOT

SWEEP = ["method=none,reap,hc_smoe", "ratio=0.5", "limit=6", "calibration.sequences=8"]
TIMES = [f"seconds_{stage}" for stage in ("calibrate", "plan", "reconstruct", "export", "serve", "score")]


def command(store: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "harness.run", *SWEEP, f"store={store}", *more]


@functools.cache
def temporary(store: Path) -> Path:
    """A folder for the temporary files of runs in this store; with a short path, because sockets need one."""
    folder = Path(tempfile.mkdtemp(prefix="flow-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def environment(store: Path) -> dict[str, str]:
    """Ours, with a folder for temporary files that the test can look into; torch's cache, which later runs use, is not
    in it.
    """
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "torchinductor-tests"))
    return {**os.environ, "TMPDIR": str(temporary(store)), "TORCHINDUCTOR_CACHE_DIR": cache}


def temporary_files(store: Path) -> list[Path]:
    """What a run left behind that no later one uses: in the folder for temporary files, and in the store."""
    found = [*temporary(store).rglob("*"), *store.glob("work/*"), *store.glob("checkpoints/*")]
    return [*found, *(path for path in store.glob("*/.*"))]


def bench(store: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(store, *more), cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment(store)
    )


def results(store: Path) -> pd.DataFrame:
    """What must not depend on when and in how many pieces a sweep was run: not times and memory, and not which plan a
    new engine was started for.
    """
    table = pd.read_csv(store / "tables" / "run.csv")
    return table.drop(columns=[*TIMES, *(name for name in table if name.startswith(("served_", "peak_")))])


def servers(store: Path) -> list[psutil.Process]:
    """Processes of runs in this store that vLLM servers are forked from, and the servers."""
    found = [p for p in psutil.process_iter(["cmdline"]) if any("vllm_host.py" in a for a in p.info["cmdline"] or [])]
    return [process for process in found if belongs(process, store)]


def belongs(process: psutil.Process, store: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("TMPDIR", "").startswith(str(temporary(store)))
    return False
