"""kill -9 at random moments of a sweep: the same command again ends with the table of an uninterrupted run.

Row 1 and 3 of docs/faults.md. Minutes; the quick tests of the same promises are test_store.py and test_searches.py.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from safetensors import safe_open

from harness.models import ROOT
from tests.runs import bench, command, environment, results, servers, temporary_files

pytestmark = pytest.mark.slow
KILLS, STORES = 20, 4
MADE_ONCE = ("tokens", "stats", "plans", "errors", "references", "scores", "samples")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The store of an uninterrupted run, and its seconds."""
    store = tmp_path_factory.mktemp("store")
    start = time.monotonic()
    done = bench(store)
    assert done.returncode == 0, done.stderr
    return store, time.monotonic() - start


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("number", range(STORES))
def test_the_final_table_is_that_of_an_uninterrupted_run(
    finished: tuple[Path, float], tmp_path: Path, number: int
) -> None:
    """Each of the stores is killed several times on its way, anywhere between the first stage and the last."""
    whole, seconds = finished
    store, moments = tmp_path / "store", random.Random(number)
    for _ in range(KILLS // STORES):
        kept = made(store)
        killed_after(store, moments.uniform(0.1, 0.9) * seconds)
        assert made(store).items() >= kept.items(), "what was finished is neither lost nor made again"
        assert_readable(store)
    kept = made(store)
    done = bench(store)
    assert done.returncode == 0, done.stderr
    assert made(store).items() >= kept.items()
    pd.testing.assert_frame_equal(results(store), results(whole))
    assert {name.relative_to(store) for name in made(store)} == {name.relative_to(whole) for name in made(whole)}
    assert temporary_files(store) == [] and list(store.glob("locks/*")) == []


def killed_after(store: Path, seconds: float) -> None:
    """A run that is killed after so many seconds, or ends before; whatever it started is gone soon."""
    run = subprocess.Popen(
        command(store), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(store)
    )
    try:
        run.wait(seconds)
    except subprocess.TimeoutExpired:
        children = psutil.Process(run.pid).children(recursive=True)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        assert psutil.wait_procs(children, timeout=60)[1] == []
    assert servers(store) == []


def made(store: Path) -> dict[Path, int]:
    """Everything that is made once, with the moment it was."""
    return {path: path.stat().st_mtime_ns for kind in MADE_ONCE for path in store.glob(f"{kind}/[!.]*")}


def assert_readable(store: Path) -> None:
    """Nothing that can be found by its name is half-written."""
    for path in store.glob("*/[!.]*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, "numpy") as file:
                assert all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118
        elif path.suffix == ".gz":
            with gzip.open(path, "rt") as file:
                assert [json.loads(line) for line in file]
