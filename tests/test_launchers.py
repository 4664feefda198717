"""Workers that Hydra's launchers really start: the records are those of a plain run, whatever happens to workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest

from harness.models import ROOT
from tests.runs import belongs, bench, command, environment, results, temporary_files

pytestmark = pytest.mark.slow

QUICK = ["method=none,reap,ean", "suite=tiny_sums", "limit=4", "calibration.sequences=8", "calibration.held_out=2"]
BY_HF = [*QUICK, "serve=hf"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("plain")
    done = bench(store, *BY_HF)
    assert done.returncode == 0, done.stderr
    return store


def same(store: Path, plain: Path) -> None:
    """Tables and records are those of the plain run, apart from times, and all of one run."""
    pd.testing.assert_frame_equal(results(store), results(plain))
    found, before = records(store), records(plain)
    times = {"run", "seconds", "provenance", "served", "peak_memory"}
    assert found.keys() == before.keys() and len(found) == 3
    for name, record in found.items():
        assert without(record, times) == without(before[name], times)
    assert len({record["run"] for record in found.values()}) == 1


def records(store: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in (store / "records").iterdir()}


def without(record: dict, names: set[str]) -> dict:
    return {name: value for name, value in record.items() if name not in names}


def of_store(store: Path) -> list[psutil.Process]:
    """Processes of runs in this store."""
    return [process for process in psutil.process_iter() if belongs(process, store)]


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)


@contextlib.contextmanager
def started(store: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command(store, *more),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(store),
    )
    try:
        yield process
    finally:
        for left in of_store(store):
            with contextlib.suppress(psutil.Error):
                left.kill()


@pytest.mark.parametrize("launcher", ["local", "submitit", "ray_local"])
def test_two_workers_give_the_records_of_a_plain_run(launcher: str, plain: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    here = sorted(path.name for path in ROOT.iterdir())
    start = time.monotonic()
    done = bench(store, *BY_HF, "workers=2", f"hydra/launcher={launcher}")
    print(f"{launcher}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    assert done.returncode == 0, done.stderr
    same(store, plain)
    lines = done.stderr.splitlines()
    assert sum(" score " in line for line in lines) == 3, "a cell was scored twice"
    assert {line[:3] for line in lines if " score " in line} <= {"[0]", "[1]"}
    assert any(line.startswith("summary") and "3 cells: 3 done, 0 failed, 0 cached" in line for line in lines)
    assert sorted(path.name for path in ROOT.iterdir()) == here, "Hydra leaves nothing where the command is given"
    wait_for(lambda: not of_store(store), 60)
    left = [path for path in temporary_files(store) if "ray" not in str(path)]
    assert left == []


def test_two_engines_of_vllm_give_the_records_of_one(tmp_path: Path) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    for store, more in ((alone, []), (both, ["workers=2"])):
        start = time.monotonic()
        done = bench(store, *QUICK, "serve.dtype=float32", *more)
        print(f"{store.name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
        assert done.returncode == 0, done.stderr
    same(both, alone)
    wait_for(lambda: not of_store(both), 60)
    assert temporary_files(both) == []


@pytest.mark.parametrize("launcher", ["local", "submitit"])
def test_a_worker_that_is_killed_costs_nothing_but_time(launcher: str, plain: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with started(store, *BY_HF, "workers=2", f"hydra/launcher={launcher}") as process:
        wait_for(lambda: any("scoring" in path.read_text() for path in (store / "running").glob("*.json")))
        holder = json.loads(next(iter((store / "running").glob("*.json"))).read_text())
        os.kill(holder["pid"], signal.SIGKILL)
        output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    same(store, plain)
    assert any(line.startswith("failed     worker") for line in errors.splitlines()), errors
    assert list((store / "running").glob("*.json")) == []


def test_a_cell_whose_workers_die_again_and_again_becomes_a_failed_record(tmp_path: Path) -> None:
    """Whoever holds it is killed, until none is started any more. How many that takes is not known: a sibling may hold
    it for a moment before joblib ends it, too.
    """
    store = tmp_path / "store"

    def kill_the_holder() -> None:
        with contextlib.suppress(IndexError, OSError, ValueError):
            holder = json.loads(list((store / "running").glob("*.json"))[0].read_text())
            os.kill(holder["pid"], signal.SIGKILL)

    with started(store, *BY_HF, "method=none", "workers=2") as process:
        wait_for(lambda: kill_the_holder() or process.poll() is not None)
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in errors, errors
    (record,) = records(store).values()
    assert record["status"] == "failed" and record["stage"] == "worker" and "3 workers died" in record["error"]
    assert "metrics" not in record and "✗" in output
    assert "1 cells: 0 done, 1 failed" in errors and "retry" in errors


@pytest.mark.parametrize("launcher", ["local", "submitit", "ray_local"])
def test_ctrl_c_ends_all_workers_and_their_servers(launcher: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with started(store, *BY_HF, "workers=2", f"hydra/launcher={launcher}") as process:
        wait_for(lambda: any("scoring" in path.read_text() for path in (store / "running").glob("*.json")))
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        print(f"{launcher}: ended after {time.monotonic() - start:.1f} s", file=sys.stderr)
        assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
        wait_for(lambda: not of_store(store), 30)
    assert list((store / "running").glob("*.json")) == []


@pytest.mark.parametrize("launcher", ["local", "submitit"])
def test_workers_end_with_the_process_that_launched_them(launcher: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with started(store, *BY_HF, "workers=2", f"hydra/launcher={launcher}") as process:
        wait_for(lambda: any("scoring" in path.read_text() for path in (store / "running").glob("*.json")))
        process.kill()
        process.wait()
        wait_for(lambda: not of_store(store), 60)


def test_each_worker_sees_gpus_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the servers find in their environment; there need be no GPU for that."""
    store = tmp_path / "store"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    seen = set()

    def looked() -> bool:
        for process in of_store(store):
            with contextlib.suppress(psutil.Error):
                if "harness.hf_server" in process.cmdline():
                    seen.add(process.environ()["CUDA_VISIBLE_DEVICES"])
        return len(seen) == 2

    with started(store, *BY_HF, "workers=2", "gpus_per_worker=2"):
        wait_for(looked)
    assert seen == {"4,5", "6,7"}
