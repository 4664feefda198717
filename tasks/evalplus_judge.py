"""Judge generated programs with EvalPlus's own sanitiser and checker, out of reach of everything else.

``tasks.evalplus_code`` runs this file inside new user, network, process and mount namespaces (``SANDBOX``): no network
from the start, no process of the host in sight. It then makes all files read-only and gives every program its own
process namespace and its own small scratch space, so that nothing of one program outlives or reaches another.

    evalplus_judge.py DATASET PROBLEMS PROGRAMS

PROGRAMS is JSON lines of task_id and code. Standard output gets one JSON line per program, in the order of their ends:
task_id, solution (sanitised), base and plus: ``pass``, ``fail``, ``timeout`` or ``killed``. Exit status 0 means
that all were judged. Without arguments it only tries the sandbox out. When standard input closes, everything ends.

EvalPlus's ``evaluate`` is not used: it hangs when a checked program kills its worker, and trusts old result files.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import selectors
import signal
import struct
import sys
import time
import traceback
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

SANDBOX = (
    *("unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid", "--mount"),
    *("--fork", "--kill-child", "--mount-proc"),
)
PROGRAM_SECONDS = 180  # EvalPlus gives each of the two test suites at most 62
SCRATCH = "/dev/shm"  # a folder that is there anyway: a kill leaves none of ours
SCRATCH_BYTES = 256 * 2**20
FILE_BYTES = SCRATCH_BYTES
PROCESSES = 256

CLONE_NEWNS, CLONE_NEWPID = 0x20000, 0x20000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
CAPABILITY_VERSION_3 = 0x20080522

Program = dict[str, str]  # task_id, code
Judge = Callable[[Program], dict[str, str]]  # to solution, base, plus

libc = ctypes.CDLL(None, use_errno=True)


def main(arguments: list[str]) -> None:
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    make_files_read_only()
    mount_scratch()
    if arguments:
        dataset, problems_file, programs_file = arguments
        judge = _judge(dataset, problems_file)
        programs = [json.loads(line) for line in Path(programs_file).read_text().splitlines()]
    else:
        judge, programs = (lambda program: {}), [{"task_id": "trial", "code": ""}]
    gc.freeze()
    run_all(programs, judge, results)


def _judge(dataset: str, problems_file: str) -> Judge:
    """A function from a program to its verdicts."""
    os.environ["HUMANEVAL_OVERRIDE_PATH" if dataset == "humaneval" else "MBPP_OVERRIDE_PATH"] = problems_file
    # evalplus.data imports this large library for another benchmark; every fork would carry it along.
    sys.modules["datasets"] = types.SimpleNamespace(load_dataset=None)  # type: ignore[assignment]
    from evalplus import evaluate
    from evalplus.data import get_human_eval_plus, get_mbpp_plus
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
    from evalplus.sanitize import sanitize

    # Its cache of expected outputs is keyed by problem set and can take gigabytes. Computing them is quick.
    evaluate.pickle = types.SimpleNamespace(dump=lambda value, file: None)

    problems = get_human_eval_plus() if dataset == "humaneval" else get_mbpp_plus()
    only_not_none = MBPP_OUTPUT_NOT_NONE_TASKS if dataset == "mbpp" else []

    def judge(program: Program) -> dict[str, str]:
        task_id = program["task_id"]
        problem = problems[task_id]
        expected = evaluate.get_groundtruth({task_id: problem}, "unused", only_not_none)[task_id]
        solution, base, plus = "", "fail", "fail"
        with contextlib.suppress(Exception):  # text that is hardly Python, for example nested too deeply to parse
            solution = sanitize(program["code"], problem["entry_point"])
            found = evaluate.check_correctness(dataset, 0, problem, solution, expected, fast_check=True)
            base, plus = found["base"][0], found["plus"][0]
        return {"solution": solution, "base": base, "plus": plus}

    return judge


@dataclass
class Running:
    """A program that is being judged. verdict: where its verdict can be read; deadline: in monotonic time."""

    program: Program
    pid: int
    verdict: int
    deadline: float
    received: bytes = b""


def run_all(programs: list[Program], judge: Judge, results: TextIO) -> None:
    """Judge all programs, as many at a time as there are cores, and print a line for each."""
    waiting = deque(programs)
    running: dict[int, Running] = {}
    slots = len(os.sched_getaffinity(0))
    with selectors.DefaultSelector() as ready:
        ready.register(0, selectors.EVENT_READ)
        while waiting or running:
            while waiting and len(running) < slots:
                one = start(waiting.popleft(), judge)
                running[one.verdict] = one
                ready.register(one.verdict, selectors.EVENT_READ)
            for one in _ended(ready, running):
                ready.unregister(one.verdict)
                del running[one.verdict]
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
    """Solution and verdicts of a program that ended, after everything it started was killed."""
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


def start(program: Program, judge: Judge) -> Running:
    """Judge a program in process and mount namespaces of its own: killing its first process kills all it started.

    The verdict is JSON, {"error": ...} if not the program but the judge failed.
    """
    verdict, answer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(answer)
        return Running(program, pid, verdict, time.monotonic() + PROGRAM_SECONDS)
    try:
        _call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL)
        os.closerange(3, answer)  # above all the results: a program must not write any
        os.closerange(answer + 1, os.sysconf("SC_OPEN_MAX"))
        _call(libc.unshare, CLONE_NEWPID | CLONE_NEWNS)
        mount_scratch()
        drop_privileges()
        child = os.fork()
        if child == 0:
            _call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL)
            _answer(program, judge, answer)
        os.close(answer)
        os.waitpid(child, 0)
    except BaseException:
        with contextlib.suppress(OSError):
            os.write(answer, json.dumps({"error": traceback.format_exc()}).encode())
    finally:
        os._exit(0)


def _answer(program: Program, judge: Judge, answer: int) -> NoReturn:
    """First process of its namespace: when it exits, the kernel kills whatever the program left behind."""
    os.register_at_fork(after_in_child=lambda: os.close(answer))  # the program must not write its own verdict
    try:
        for descriptor in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
        os.chdir(SCRATCH)
        limit_resources()
        outcome = judge(program)
    except BaseException:
        outcome = {"error": traceback.format_exc()}
    with os.fdopen(answer, "w") as file:
        file.write(json.dumps(outcome))
    os._exit(0)


def make_files_read_only() -> None:
    """Every mounted file system, recursively. Needs Linux 5.12."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    _call(libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes))


def mount_scratch() -> None:
    """Empty and limited space where programs (and semaphores) may write; seen from this mount namespace only."""
    _call(libc.mount, b"tmpfs", SCRATCH.encode(), b"tmpfs", 0, f"size={SCRATCH_BYTES},mode=700".encode())


def drop_privileges() -> None:
    """Give up every capability, for good, and hide this process's memory from others of the same user."""
    _call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails past the kernel's last one
    _call(libc.capset, struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))
    _call(libc.prctl, PR_SET_DUMPABLE, 0, 0, 0, 0)


def limit_resources() -> None:
    memory = int(os.environ["EVALPLUS_MAX_MEMORY_BYTES"])  # EvalPlus sets the same limit again for the program
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


if __name__ == "__main__":
    main(sys.argv[1:])
