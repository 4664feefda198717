"""How far a sweep has come, whoever works on it: ./bench status sweep=demo [watch=<seconds>]"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.commandline import refuse_politely
from harness.errors import UserError
from harness.progress import STATES, CellState, Holder, Progress, in_words, time_left
from harness.sweep import Sweep, expand

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

WIDTH = 160  # characters, where the output is no terminal
COLOURS = {"done": "green", "running": "cyan", "failed": "red", "waiting": "dim"}


@refuse_politely
def main() -> int:
    """Print where every cell of the sweep stands; with ``watch`` again and again, until nothing is left or Ctrl-C."""
    from rich.console import Console

    watch, arguments = _watch(sys.argv[1:])
    sweep = expand(arguments)
    progress = Progress(sweep.cells, sweep.store)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if watch is None:
        console.print(shown(sweep, progress.look()))
    else:
        _keep_showing(sweep, progress, console, watch)
    return 0


def _watch(arguments: Sequence[str]) -> tuple[float | None, list[str]]:
    """Seconds between two looks, None for one look alone, and the other arguments."""
    given = [argument for argument in arguments if argument.startswith("watch=")]
    rest = [argument for argument in arguments if argument not in given]
    if not given:
        return None, rest
    try:
        seconds = float(given[-1].removeprefix("watch="))
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise UserError(f"{given[-1]}: give the seconds between two looks at the sweep, for example watch=5.")
    return seconds, rest


def _keep_showing(sweep: Sweep, progress: Progress, console: Console, seconds: float) -> None:
    from rich.live import Live

    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            states = progress.look()
            live.update(shown(sweep, states), refresh=True)
            if not any(state.is_left for state in states):
                return
            time.sleep(seconds)


def shown(sweep: Sweep, states: Sequence[CellState]) -> Group:
    """The table, what failed and why, and how much is left."""
    from rich.console import Group
    from rich.text import Text

    failed = [
        Text(f"{state.cell.slug} on {task}: {reason}", "red")
        for state in states
        for task, reason in state.reasons.items()
    ]
    return Group(_table(states), *failed, Text(told(sweep, states)))


def _table(states: Sequence[CellState]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    tasks = list(dict.fromkeys(task for state in states for task in state.tasks))
    table = Table("cell", *tasks, "seconds", "by", box=box.SIMPLE_HEAD)
    for state in states:
        found = [state.tasks.get(task, "") for task in tasks]
        seconds = f"{state.seconds:.0f}" if state.seconds else ""
        by = _by(state.holder) if state.holder else ""
        table.add_row(state.cell.slug, *(Text(word, COLOURS.get(word, "")) for word in found), seconds, by)
    return table


def _by(holder: Holder) -> str:
    began = time.strftime("%d %b %H:%M", time.localtime(holder.since))
    return f"{holder.host} {holder.pid}, {holder.doing} since {began}"


def told(sweep: Sweep, states: Sequence[CellState]) -> str:
    """Cells and records by state, seconds used, and time left."""
    cells = Counter(state.state for state in states)
    records = Counter(word for state in states for word in state.tasks.values())
    workers = len({(state.holder.host, state.holder.pid) for state in states if state.holder})
    used = sum(state.seconds for state in states)
    running = "" if workers else " for one worker; none is running"
    gathering = sweep.store.held("stats")
    return (
        f"{sweep.name} in {sweep.store.root}\n"
        f"{len(states)} cells: {_listed(cells)}\n"
        f"{records.total()} records: {_listed(records)}\n"
        f"{in_words(used)} used, {time_left(states, workers, time.time())}{running}"
        + (f"\n{gathering} gathering statistics" if gathering else "")
    )


def _listed(found: Counter[str]) -> str:
    return ", ".join(f"{found[state]} {state}" for state in STATES if found[state])


if __name__ == "__main__":
    sys.exit(main())
