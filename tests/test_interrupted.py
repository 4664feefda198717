"""Ctrl-C ends a run with all it started, however it serves."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from harness.models import ROOT
from tests.runs import command, environment, temporary_files


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
