"""The whole flow through the real vLLM, lm-eval and EvalPlus, on the embedded model and a taste of its tasks."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import psutil
import pytest

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
    """Ours, with a folder for temporary files that the test can look into."""
    return {**os.environ, "TMPDIR": str(temporary(store))}


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


def our_servers() -> list[psutil.Process]:
    """Processes that vLLM servers are forked from, and the servers; but for those of this test process itself."""
    own = set(psutil.Process().children(recursive=True))
    found = [p for p in psutil.process_iter(["cmdline"]) if any("vllm_host.py" in a for a in p.info["cmdline"] or [])]
    return [process for process in found if process not in own]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    store = tmp_path_factory.mktemp("store")
    return store, bench(store)


def test_ends_with_a_table_a_plot_and_complete_records(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    store, done = finished
    assert done.returncode == 0, done.stderr
    for word in ("tiny_sums exact_match (n=6)", "tiny_facts acc_norm", "tiny_code plus_pass@1", "run.csv", "run.png"):
        assert word in done.stdout
    records = [json.loads(path.read_text()) for path in (store / "records").iterdir()]
    assert len(records) == 9
    for record in records:
        assert record["status"] == "done" and record["error"] is None
        assert all(metric["n"] == 6 and 0 <= metric["value"] <= 1 for metric in record["metrics"].values())
        assert set(record["seconds"]) == {"calibrate", "plan", "export", "serve", "score"}
        assert record["provenance"]["versions"]["transformers"]
        assert record["task"] in ("tiny_sums", "tiny_facts", "tiny_code")
        assert record["calibration_tokens"] == (8 * 256 if record["label"] != "uncompressed" else 0)
        assert record["served_by"]["engine"] == "vllm"
    size = {record["label"]: record["size"] for record in records}
    assert size["REAP"]["experts"] == 16 and size["REAP"]["bytes"] < 0.6 * size["uncompressed"]["bytes"]
    assert size["HC-SMoE"]["experts"] == 32 and size["HC-SMoE"]["distinct"] == 16
    assert len(list((store / "samples").iterdir())) == 9


def test_leaves_no_checkpoint_and_no_process(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    store, _ = finished
    assert not list(store.rglob("checkpoints/*")), "plans are served from the original files"
    assert our_servers() == []
    assert temporary_files(store) == []


def test_the_same_command_again_is_cached_and_prints_the_same(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    store, done = finished
    start = time.monotonic()
    again = bench(store)
    assert time.monotonic() - start < 20
    assert again.stdout == done.stdout
    lines = again.stderr.splitlines()
    assert len(lines) == 3 and all(line.endswith("cached") for line in lines)


def test_a_new_method_uses_the_statistics_that_are_there(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(finished[0], store)
    done = bench(store, "method=ean")
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("calibrate") and line.endswith("cached") for line in done.stderr.splitlines())


def test_killed_half_way_it_finishes_without_repeating_anything(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    process = subprocess.Popen(
        command(store), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(store)
    )
    deadline = time.monotonic() + 300
    while len(list(store.glob("scores/*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for kind in ("stats", "scores") for path in (store / kind).iterdir()}
    assert len(kept) >= 5
    done = bench(store)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == moment for path, moment in kept.items()), "finished work was repeated"
    pd.testing.assert_frame_equal(results(store), results(finished[0]))
    assert temporary_files(store) == [], "the second run takes away what the kill left"


@pytest.mark.parametrize("how", ["vllm", "checkpoint", "hf"])
def test_ctrl_c_ends_it_cleanly(tmp_path: Path, how: str) -> None:
    store = tmp_path / "store"
    process = subprocess.Popen(
        command(store, f"serve={how}", "method=reap"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(store),
    )
    assert process.stderr
    assert any(line.startswith("serve ") for line in iter(process.stderr.readline, "")), "it never served"
    running = psutil.Process(process.pid).children(recursive=True)
    ports = ports_of(running)
    assert running and ports, "a server is up and being scored"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and "interrupted" in errors
    assert psutil.wait_procs(running, timeout=20)[1] == []
    assert not ports & ports_of(psutil.process_iter())
    assert temporary_files(store) == []


def ports_of(processes: Iterable[psutil.Process]) -> set[int]:
    """Where these listen."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return found


def test_a_cell_that_fails_becomes_a_failed_record_and_the_others_go_on(tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = bench(store, "method=none", "serve.extra_args=[--no-such-argument]")
    assert done.returncode == 1
    assert "✗" in done.stdout and "no-such-argument" in done.stdout
    records = [json.loads(path.read_text()) for path in (store / "records").iterdir()]
    assert {record["status"] for record in records} == {"failed"} and len(records) == 3
    assert not any("metrics" in record for record in records)
    assert our_servers() == [] and temporary_files(store) == []
