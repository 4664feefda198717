"""Judge generated programs from within the harness: start the judge, give it programs, take its verdicts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from harness.errors import StageError
from harness.store import is_gone
from tasks.sandbox import FORMS, environment

JUDGE = Path(__file__).with_name("evalplus_judge.py")


def judge(
    dataset: str,
    problems: Path,
    programs: Mapping[str, str],
    workdir: Path,
    memory_gib: int = 4,
    timeout_s: float = 3600,
    form: str | None = None,
) -> dict[str, dict[str, str]]:
    """Verdicts of programs by task_id: solution, base and plus. See ``tasks/evalplus_judge.py``.

    form: how programs are isolated (``tasks.sandbox``), which changes no verdict; left out, the first that works.

    A program that was judged in this process before is not run again, unless it was out of time or killed: models that
    lost little write much the same.

    Raises StageError if the judge fails, takes longer than ``timeout_s`` or leaves a program without a verdict.
    """
    if (form := form or first_form()) is None:
        raise StageError("Generated programs cannot be isolated on this machine.")
    about = (dataset, hashlib.sha256(problems.read_bytes()).hexdigest(), memory_gib)
    known = {
        task_id: _judged[*about, task_id, code]
        for task_id, code in programs.items()
        if (*about, task_id, code) in _judged
    }
    new = {task_id: code for task_id, code in programs.items() if task_id not in known}
    verdicts = known | (_run(dataset, problems, new, workdir, memory_gib, timeout_s, form) if new else {})
    if missing := programs.keys() - verdicts.keys():
        raise StageError(f"The judge gave no verdict on {len(missing)} of {len(programs)} programs: {sorted(missing)}")
    for task_id, code in new.items():
        if {verdicts[task_id]["base"], verdicts[task_id]["plus"]} <= {"pass", "fail"}:
            _judged[*about, task_id, code] = verdicts[task_id]
    return verdicts


_judged: dict[tuple[str, str, int, str, str], dict[str, str]] = {}


def _run(
    dataset: str,
    problems: Path,
    programs: Mapping[str, str],
    workdir: Path,
    memory_gib: int,
    timeout_s: float,
    form: str,
) -> dict[str, dict[str, str]]:
    job = workdir / "programs.jsonl"
    job.write_text("".join(json.dumps({"task_id": task_id, "code": code}) + "\n" for task_id, code in programs.items()))
    done = _run_judge([form, dataset, str(problems.resolve()), str(job.resolve())], workdir, memory_gib, timeout_s)
    if done.returncode != 0:
        raise StageError(f"The judge of generated programs failed: {done.stderr[-2000:]}")
    return {row.pop("task_id"): row for row in map(json.loads, done.stdout.splitlines())}


def first_form() -> str | None:
    """The best way to isolate programs that works on this machine."""
    return next((form for form in FORMS if why_not(form) is None), None)


@cache
def why_not(form: str) -> str | None:
    """Why programs cannot be isolated in this form on this machine; None if they can. Tried once."""
    _sweep_out()
    with tempfile.TemporaryDirectory(prefix=f"{_here()}{os.getpid()}-") as folder:
        try:
            done = _run_judge([form], Path(folder), memory_gib=4, timeout_s=120)
        except StageError as error:
            return str(error)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or ["no message"])[-1]


def _sweep_out() -> None:
    """Remove folders of tries in which the whole harness was killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_here()}*-*"):
        if is_gone(left.name.removeprefix(_here()).partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)


def _here() -> str:
    """How names of such folders begin; another for each machine, and for each container that numbers processes anew."""
    namespace = Path("/proc/self/ns/pid")
    about = f"{socket.gethostname()} {namespace.stat().st_ino if namespace.exists() else 0}"
    return f"judge-{hashlib.sha256(about.encode()).hexdigest()[:8]}-"


def _run_judge(
    arguments: list[str], workdir: Path, memory_gib: int, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    reader, writer = os.pipe()  # the judge ends when our end closes, however we end
    try:
        return subprocess.run(
            [sys.executable, "-P", str(JUDGE), *arguments],
            stdin=reader,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**environment(str(workdir)), "EVALPLUS_MAX_MEMORY_BYTES": str(memory_gib * 2**30)},
        )
    except subprocess.TimeoutExpired as error:
        raise StageError(f"The judge of generated programs was not done after {timeout_s} s.") from error
    finally:
        os.close(reader)
        os.close(writer)
