"""One of several workers, wherever a launcher has started it (``harness/launch.py``)."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from harness.commandline import check_servers
from harness.interrupt import STATUS, leave
from harness.spec import Cell
from harness.store import Store, say

LOOK_S = 0.5  # between two looks whether to stop
STOP = "stop"  # name of the file, beside a run's logs, that ends all its workers


@dataclass(frozen=True)
class Assignment:
    """What a worker is told. cells: all there are. folder: to work in. logs: folder of the run's logs. parent: pid and
    start of the launching process. gpus: of each worker, where the launcher does not see to them. checks: whether the
    machine must be looked at first, because it may be another one.
    """

    cells: tuple[Cell, ...]
    store: Store
    run: str
    folder: str
    logs: Path
    parent: tuple[int, float]
    gpus: tuple[str, ...]
    checks: bool


def work(assignment: Assignment, config: DictConfig) -> None:
    """What a worker does, wherever a launcher has started it."""
    from harness.run import keep_chatter, run_all
    from harness.serve import release

    os.chdir(assignment.folder)
    number = HydraConfig.get().job.num
    if assignment.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = assignment.gpus[number]
    orphaned = False
    with _written_to(assignment.logs / f"worker-{number}.log"):
        keep_chatter(assignment.store)
        try:
            with _stoppable(assignment) as is_orphan:
                if assignment.checks:
                    check_servers(assignment.cells)
                run_all(assignment.cells, assignment.store, assignment.run)
        except KeyboardInterrupt:
            orphaned = is_orphan()
            say("stopped", f"worker {number}", "what is finished is kept")
        finally:
            release()
    if orphaned:  # nobody is left that would end this process
        leave(STATUS)


@contextmanager
def _written_to(log: Path) -> Iterator[None]:
    """In here all that this process and those it starts print goes to the log."""
    before = [os.dup(1), os.dup(2)]
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, descriptor in zip((1, 2), before, strict=True):
            os.dup2(descriptor, stream)
            os.close(descriptor)


@contextmanager
def _stoppable(assignment: Assignment) -> Iterator[Callable[[], bool]]:
    """In here there is a KeyboardInterrupt when the run is stopped, or when the process that launched it is gone and
    this one descends from it: jobs of a cluster outlive it. Gives a function that says whether it is gone so.
    """
    with contextlib.suppress(OSError):  # already so
        os.setsid()  # out of reach of the terminal's Ctrl-C
    parent = next((p for p in psutil.Process().parents() if (p.pid, p.create_time()) == assignment.parent), None)
    ended, main = threading.Event(), threading.get_ident()

    def is_orphan() -> bool:
        return parent is not None and not _lives(parent)

    def watch() -> None:
        while not ended.wait(LOOK_S):
            if (assignment.logs / STOP).exists() or is_orphan():
                signal.pthread_kill(main, signal.SIGINT)
                return

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        threading.Thread(target=watch, daemon=True, name="stop").start()
        yield is_orphan
    finally:
        ended.set()


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
