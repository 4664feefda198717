"""Judge generated programs with EvalPlus's own sanitiser and checker, without running them here.

    evalplus_judge.py FORM DATASET PROBLEMS PROGRAMS

FORM is how programs are isolated (``tasks.sandbox``). PROGRAMS is JSON lines of task_id and code. Standard output gets
one JSON line per program, in the order of their ends: task_id, solution (sanitised), base and plus: ``pass``, ``fail``,
``timeout``, or ``killed`` if its process (or the worker that judged it) ended before it had answered. Exit status 0
means that all were judged. With FORM alone, the sandbox is tried out. When standard input closes, everything ends.

EvalPlus's ``evaluate`` is not used: it hangs when a checked program kills its worker, and trusts old result files.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import selectors
import signal
import sys
import time
import traceback
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, by an interpreter that adds no folder

from tasks import sandbox as sandboxes
from tasks.confinement import die_with_parent
from tasks.evalplus_check import Check
from tasks.sandbox import Sandbox, SandboxError

PROGRAM_SECONDS = 240  # EvalPlus gives each of the two test suites at most 62

Program = dict[str, str]  # task_id, code
Judge = Callable[[Program, int], dict[str, str]]  # with a slot of its own, to solution, base, plus


def main(arguments: list[str]) -> None:
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    form, *rest = arguments
    sandbox = sandboxes.start(form, int(os.environ["EVALPLUS_MAX_MEMORY_BYTES"]))
    if not rest:
        return sandbox.try_out()
    dataset, problems_file, programs_file = rest
    judge = _judge(dataset, problems_file, sandbox)
    gc.freeze()
    run_all([json.loads(line) for line in Path(programs_file).read_text().splitlines()], judge, results)


def _judge(dataset: str, problems_file: str, sandbox: Sandbox) -> Judge:
    """A function from a program to its verdicts."""
    os.environ["HUMANEVAL_OVERRIDE_PATH" if dataset == "humaneval" else "MBPP_OVERRIDE_PATH"] = problems_file
    # evalplus.data imports this large library for another benchmark; every fork would carry it along.
    sys.modules["datasets"] = types.SimpleNamespace(load_dataset=None)  # type: ignore[assignment]
    import evalplus.eval
    import evalplus.gen.util  # noqa: F401  (before anything forks: each worker would load them again)
    from evalplus.data import get_human_eval_plus, get_mbpp_plus
    from evalplus.sanitize import sanitize

    problems = get_human_eval_plus() if dataset == "humaneval" else get_mbpp_plus()

    def judge(program: Program, slot: int) -> dict[str, str]:
        problem = problems[program["task_id"]]
        solution = ""
        with contextlib.suppress(Exception):  # text that is hardly Python, for example nested too deeply to parse
            solution = sanitize(program["code"], problem["entry_point"])
        if not solution.strip():
            return {"solution": solution, "base": "fail", "plus": "fail"}
        check = Check(dataset, problem, solution, sandbox, slot)
        return {"solution": solution, "base": check.status("base"), "plus": check.status("plus")}

    return judge


@dataclass
class Running:
    """A program that is being judged. verdict: where its verdict can be read; deadline: in monotonic time."""

    program: Program
    slot: int
    pid: int
    verdict: int
    deadline: float
    received: bytes = b""


def run_all(programs: list[Program], judge: Judge, results: TextIO) -> None:
    """Judge all programs, as many at a time as there are cores, and print a line for each."""
    waiting = deque(programs)
    running: dict[int, Running] = {}
    slots = set(range(len(os.sched_getaffinity(0))))
    with selectors.DefaultSelector() as ready:
        ready.register(0, selectors.EVENT_READ)
        while waiting or running:
            while waiting and slots:
                one = start(waiting.popleft(), judge, slots.pop())
                running[one.verdict] = one
                ready.register(one.verdict, selectors.EVENT_READ)
            for one in _ended(ready, running):
                ready.unregister(one.verdict)
                del running[one.verdict]
                slots.add(one.slot)
                print(json.dumps({"task_id": one.program["task_id"], **_outcome(one)}), file=results)


def _ended(ready: selectors.BaseSelector, running: dict[int, Running]) -> list[Running]:
    """Wait until something happens; programs with a verdict, without hope of one, or out of time."""
    ended = []
    for event, _ in ready.select(timeout=1.0):
        if event.fd == 0:
            sys.exit("The harness is gone.")
        received = os.read(event.fd, 1 << 16)
        running[event.fd].received += received
        if not received:
            ended.append(running[event.fd])
    return ended or [one for one in running.values() if time.monotonic() > one.deadline]


def _outcome(one: Running) -> dict[str, str]:
    """Solution and verdicts of a program whose worker ended, or is ended now, and its sandbox with it."""
    os.kill(one.pid, signal.SIGKILL)
    os.waitpid(one.pid, 0)
    os.close(one.verdict)
    try:
        outcome = json.loads(one.received)
    except ValueError:
        status = "timeout" if time.monotonic() > one.deadline else "killed"
        return {"solution": "", "base": status, "plus": status}
    if "error" in outcome:
        sys.exit(f"{one.program['task_id']}: {outcome['error']}")
    return outcome


def start(program: Program, judge: Judge, slot: int) -> Running:
    """Judge a program in a worker, a process of ours that may be killed without loss of another's verdict.

    The verdict is JSON, {"error": ...} if not the program but the judge failed.
    """
    verdict, answer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(answer)
        return Running(program, slot, pid, verdict, time.monotonic() + PROGRAM_SECONDS)
    try:
        die_with_parent()
        _limit_memory()  # to parse what a model wrote, and to read what a program returned
        outcome = judge(program, slot)
    except BaseException:
        outcome = {"error": traceback.format_exc()}
    _finish(answer, outcome)


def _finish(answer: int, outcome: dict[str, str]) -> NoReturn:
    with os.fdopen(answer, "w") as file:
        file.write(json.dumps(outcome))
    os._exit(0)


def _limit_memory() -> None:
    memory = int(os.environ["EVALPLUS_MAX_MEMORY_BYTES"])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SandboxError as error:
        sys.exit(str(error))
