"""What a run shows on standard error while it goes on, and when it has ended."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from harness.progress import DONE, FAILED, RUNNING, CellState, Progress, counts, in_words, time_left
from harness.store import say

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LOOK_S = 1.0  # between two looks at the store


@contextmanager
def shown(progress: Progress, workers: int) -> Iterator[None]:
    """While a run goes on: a bar that stays below what is printed, on a terminal; else a line for cells that finish."""
    ended = threading.Event()
    show = _on_terminal if sys.stderr.isatty() else _in_lines
    thread = threading.Thread(target=show, args=(progress, workers, ended), daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10 * LOOK_S)


def _looks(progress: Progress, ended: threading.Event) -> Iterator[list[CellState]]:
    """Now and again, and once more when it has ended."""
    while not ended.is_set():
        yield progress.look()
        ended.wait(LOOK_S)
    yield progress.look()


def _in_lines(progress: Progress, workers: int, ended: threading.Event) -> None:
    before = None
    for states in _looks(progress, ended):
        tried = _tried(states)
        if before is not None and tried > before:
            say("progress", _counted(states), str(time_left(states, workers, time.time())))
        before = tried


def _on_terminal(progress: Progress, workers: int, ended: threading.Event) -> None:
    with _bar() as bar:
        task = bar.add_task("", total=len(progress.cells), told="")
        for states in _looks(progress, ended):
            running = counts(states)[RUNNING]
            told = f"{_counted(states)}, {running} running, {time_left(states, workers, time.time())}"
            bar.update(task, completed=_tried(states), told=told)


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    told = TextColumn("{task.fields[told]}")
    columns = (TextColumn("progress  "), BarColumn(20), told, TimeElapsedColumn())
    return Bar(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)


def _tried(states: Sequence[CellState]) -> int:
    return counts(states)[DONE] + counts(states)[FAILED]


def _counted(states: Sequence[CellState]) -> str:
    failed = counts(states)[FAILED]
    return f"{_tried(states)} of {len(states)} cells" + (f", {failed} failed" if failed else "")


def summary(states: Sequence[CellState], cached: int, seconds: float, arguments: Sequence[str]) -> None:
    """How a run ended. cached: cells of which nothing was left to do. arguments: the command line that asked for it."""
    found = counts(states)
    left = len(states) - found[DONE] - found[FAILED]
    said = [f"{found[DONE] - cached} done", f"{found[FAILED]} failed", f"{cached} cached"]
    said += [f"{left} not tried"] if left else []
    say("summary", f"{len(states)} cells: {', '.join(said)}", in_words(seconds))
    for state in states:
        for reason in dict.fromkeys(state.reasons.values()):
            tasks = ", ".join(task for task, why in state.reasons.items() if why == reason)
            say("failed", f"{state.cell.slug} on {tasks}", reason)
    if found[FAILED] or left:
        say("retry", shlex.join(["./bench", "run", *arguments]), "tries what has no score again, and nothing else")
