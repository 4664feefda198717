"""A program run so ends when its standard input does, also while it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from harness.models import ROOT


def started(module: str, folder: Path) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(module)
    return subprocess.Popen(
        [sys.executable, "-m", "harness.ends_with_input", "program", "one", "two"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


def test_it_runs_as_a_program_with_its_arguments(tmp_path: Path) -> None:
    process = started("import sys; print(__name__, sys.argv[1:]); sys.exit(3)", tmp_path)
    assert process.stdout and process.stdout.read() == "__main__ ['one', 'two']\n"
    assert process.wait(30) == 3


def test_it_ends_while_it_imports(tmp_path: Path) -> None:
    process = started("print('begun', flush=True); import time; time.sleep(600)", tmp_path)
    assert process.stdout and process.stdout.readline() == "begun\n"
    assert process.stdin
    process.stdin.close()
    assert process.wait(30) == 0
