"""Who is at which cell, and how far a sweep has come: what the claims and records of a store say. Loads no model."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import psutil

from harness.errors import DiskFullError, in_one_line
from harness.spec import Cell
from harness.store import LEASE_S, Store, key

SHARED = ("plan", "recover", "export", "serve")  # stages that a cell goes through once, whatever its tasks
DONE, RUNNING, FAILED, WAITING = STATES = ("done", "running", "failed", "waiting")


@dataclass(frozen=True)
class Holder:
    """The process that is at a cell. doing: ``preparing`` or ``scoring``. since: seconds of the epoch."""

    run: str
    host: str
    pid: int
    doing: str
    since: float


@contextmanager
def taken(cell: Cell, doing: str, run: str, store: Store) -> Iterator[bool]:
    """Hold a cell against other workers, if none does; whether it is held. Who holds it, and since when, can be seen.

    doing: ``preparing`` or ``scoring``. run: id of the run.
    """
    name = cell_name(cell)
    with store.claimed("cells", name) as held:
        if not held:
            yield False
            return
        holder = Holder(run, socket.gethostname(), os.getpid(), doing, time.time())
        with contextlib.suppress(DiskFullError):  # it is only shown
            store.write_json("running", f"{name}.json", asdict(holder))
        try:
            yield True
        finally:
            store.path("running", f"{name}.json").unlink(missing_ok=True)


def await_turn(cell: Cell, store: Store) -> None:
    """Wait until nobody holds the cell. A holder that is gone does not hold it (`Store.locked`)."""
    with store.locked("cells", cell_name(cell)):
        pass


@functools.cache  # its records' names take a while
def cell_name(cell: Cell) -> str:
    """Readable, and unique by what determines the cell's records."""
    return f"{cell.slug}-{key(records=[cell.record_name(task) for task in cell.tasks])}"


def holder_of(name: str, store: Store) -> Holder | None:
    """Who is at the cell of this name; None if nobody is, or one that is gone."""
    with contextlib.suppress(OSError, ValueError):
        found = Holder(**json.loads(store.path("running", f"{name}.json").read_text()))
        sign_of_life = store.path("locks", f"cells-{name}.lock").stat().st_mtime
        if found.host != socket.gethostname():
            return found if time.time() - sign_of_life < LEASE_S else None
        with contextlib.suppress(psutil.Error):  # a number may be given to another process later
            return found if psutil.Process(found.pid).create_time() <= found.since else None
    return None


def was_abandoned(cell: Cell, run: str, store: Store) -> bool:
    """Whether a worker of the run was at the cell and is gone without having left it."""
    name = cell_name(cell)
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(store.path("running", f"{name}.json").read_text())
        return found["run"] == run and holder_of(name, store) is None
    return False


@dataclass(frozen=True)
class CellState:
    """Where a cell stands. tasks: one of `STATES` for each of its tasks, by name. holder: who is at it.

    seconds: used for what is recorded, but for what other cells need as well. reasons: why tasks failed, by their name.
    kind: of cells that take about as long as this one.
    """

    cell: Cell
    tasks: dict[str, str]
    holder: Holder | None
    seconds: float
    reasons: dict[str, str]
    kind: str

    @property
    def state(self) -> str:
        """Of the whole cell: failed if a task is and no worker is at it, done if all are."""
        found = set(self.tasks.values())
        return next(state for state in (RUNNING, WAITING, FAILED, DONE) if state in found)

    @property
    def is_left(self) -> bool:
        """Whether it has not been tried."""
        return self.state in (RUNNING, WAITING)


class Progress:
    """How far a sweep has come. run: id of the run that counts; failures of others wait to be tried again. Without
    one, they are failures.
    """

    def __init__(self, cells: Iterable[Cell], store: Store, run: str | None = None) -> None:
        self.cells = list(dict.fromkeys(cells))
        self.store = store
        self.run = run
        self._read: dict[str, tuple[int, dict[str, Any]]] = {}

    @cached_property
    def _names(self) -> list[tuple[Cell, str, dict[str, str], str]]:
        """Each cell with its name, its records' and its kind: all that takes time to find out."""
        found = []
        for cell in self.cells:
            records = {task.name: cell.record_name(task) for task in cell.tasks}
            recovery = type(cell.recovery).__name__
            what = {"model": cell.model.digest, "serve": dict(cell.serve.identity()), "recovery": recovery}
            found.append((cell, cell_name(cell), records, key(tasks=list(records), **what)))
        return found

    def look(self) -> list[CellState]:
        """Where every cell stands now."""
        return [self._state(*named) for named in self._names]

    def left(self) -> list[Cell]:
        """Cells that have not been tried."""
        return [state.cell for state in self.look() if state.is_left]

    def running(self) -> bool:
        """Whether a worker of the run is at a cell."""
        return any(state.holder is not None and state.holder.run == self.run for state in self.look())

    def _state(self, cell: Cell, name: str, records: dict[str, str], kind: str) -> CellState:
        holder = holder_of(name, self.store)
        found = {task: self._record(record) for task, record in records.items()}
        done = [record for record in found.values() if record and record["status"] == DONE]
        tasks, reasons = {}, {}
        for task, record in found.items():
            tasks[task] = self._task_state(record, holder)
            if record and tasks[task] == FAILED:
                reasons[task] = f"{record.get('stage') or 'failed'}: {in_one_line(record['error'])}"
        return CellState(cell, tasks, holder, _seconds(done), reasons, kind)

    def _task_state(self, record: dict[str, Any] | None, holder: Holder | None) -> str:
        if record and record["status"] == DONE:
            return DONE
        if holder is not None:
            return RUNNING
        return FAILED if record and self.run in (None, record.get("run")) else WAITING

    def _record(self, name: str) -> dict[str, Any] | None:
        """The record of this name, read again only if it has changed."""
        try:
            moment = self.store.path("records", name).stat().st_mtime_ns
        except OSError:
            return None
        if name not in self._read or self._read[name][0] != moment:
            self._read[name] = (moment, self.store.read_json("records", name) or {})
        return self._read[name][1]


def _seconds(records: Sequence[dict[str, Any]]) -> float:
    """That a cell took: scoring each task, and once what comes before."""
    spent = [record["seconds"] for record in records]
    once = sum(max((seconds.get(stage, 0.0) for seconds in spent), default=0.0) for stage in SHARED)
    return once + sum(seconds.get("score", 0.0) for seconds in spent)


def counts(states: Sequence[CellState]) -> Counter[str]:
    """Cells by their state."""
    return Counter(state.state for state in states)


@dataclass(frozen=True)
class TimeLeft:
    """Seconds until every cell has been tried, as far as finished ones of the same kind tell; None if none does.

    untold: cells that are left of kinds of which none is finished: they come on top.
    """

    seconds: float | None
    untold: int

    def __str__(self) -> str:
        if self.seconds is None:
            return "time left unknown" if self.untold else "nothing left"
        about = f"about {in_words(self.seconds)} left"
        return f"at least {about.removeprefix('about ')}" if self.untold else about


def time_left(states: Sequence[CellState], workers: int, now: float) -> TimeLeft:
    """From the mean seconds of finished cells, shared out among workers. now: seconds of the epoch."""
    spent: dict[str, list[float]] = {}
    for state in states:
        if state.state == DONE:
            spent.setdefault(state.kind, []).append(state.seconds)
    left = [state for state in states if state.is_left]
    told = [
        max(0.0, statistics.mean(spent[state.kind]) - (now - state.holder.since if state.holder else 0.0))
        for state in left
        if state.kind in spent
    ]
    if not told:
        return TimeLeft(None, len(left))
    return TimeLeft(max(sum(told) / max(1, workers), *told), len(left) - len(told))


def in_words(seconds: float) -> str:
    """A duration as people say it: 8 s, 43 min, 3 h 10 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
