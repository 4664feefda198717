"""Ctrl-C ends a run with all it started, however it serves."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from harness.interrupt import GRACE_S
from harness.models import ROOT
from tests.runs import command, environment, temporary_files


@pytest.mark.parametrize("how", ["vllm", *(pytest.param(how, marks=pytest.mark.slow) for how in ("checkpoint", "hf"))])
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


@pytest.mark.parametrize(
    "times, how",
    [(2, "hf"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, "hf"), (1, "vllm"), (2, "vllm")))],
)
def test_while_a_server_starts_the_first_ends_it_soon_and_the_second_at_once(
    tmp_path: Path, times: int, how: str
) -> None:
    store = tmp_path / "store"
    process = subprocess.Popen(
        command(store, f"serve={how}", "method=none", "suite=tiny_sums"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(store),
    )
    ours = psutil.Process(process.pid)
    deadline = time.monotonic() + 120
    while not any(
        "_server" in " ".join(child.cmdline()) or "_host" in " ".join(child.cmdline()) for child in alive(ours)
    ):
        assert process.poll() is None and time.monotonic() < deadline, "it never started a server"
        time.sleep(0.05)
    running = ours.children(recursive=True)
    start = time.monotonic()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, errors = process.communicate(timeout=60)
    took = time.monotonic() - start
    by_signal = -signal.SIGINT if times == 2 else 130  # where the interpreter is being taken apart; shells say 130
    assert process.returncode in (130, by_signal) and "Traceback" not in errors
    assert took < (GRACE_S + 5 if times == 1 else 3), f"{took:.1f} s"
    assert psutil.wait_procs(running, timeout=5)[1] == []
    if times == 1:
        assert temporary_files(store) == []


def alive(process: psutil.Process) -> list[psutil.Process]:
    """Its children that have not become zombies."""
    return [child for child in process.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def ports_of(processes: Iterable[psutil.Process]) -> set[int]:
    """Where these listen."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return found
