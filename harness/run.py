"""The flow, for one cell of a comparison. Start here.

model + text --calibrate--> Stats --method--> Plan [--recover--> weights] --serve--> URL --score--> records

python -m harness.run method=reap ratio=0.25           one cell
python -m harness.run sweep=demo                       a grid of cells; the same command again resumes
python -m harness.run method=reap,ean ratio=0.25,0.5 seed=0,1,2
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Sequence

from harness import bill, gather, launch, report, scoring, stages
from harness.commandline import checked, refuse_politely
from harness.errors import during
from harness.host import without_secrets
from harness.interrupt import interruptible, leave
from harness.plan import Plan, from_json
from harness.progress import Progress, await_turn, taken
from harness.serve import release
from harness.shown import shown, summary
from harness.spec import Cell
from harness.stats import Stats
from harness.store import Store, say
from harness.sweep import Sweep


def prepare(cell: Cell, store: Store) -> tuple[Stats, Plan]:
    """Everything that needs the model in this process."""
    with during("calibrate"):
        given = gather.statistics(cell, store)
    with during("plan"):
        made = stages.plan(cell, given, store)
    with during("recover"):
        stages.remade(cell, given, made, store)
    stages.reconstruct(cell, made, store)
    stages.reference(cell, made, store)
    return given, made


def run(cell: Cell, store: Store, run_id: str = "") -> None:
    """Take one cell from the model to its records; what the store holds already is not done again.

    run_id: of the run that this is part of, for its records.
    """
    if scoring.all_done(cell, store):
        return say("record", cell.slug, "cached")
    given = made = None
    failures: dict[str, scoring.Failure] = {}
    with scoring.noting(failures, cell.tasks):
        given, made = prepare(cell, store)
        missing = [task for task in cell.tasks if not scoring.scored(cell, made, task, store)]
        if missing:
            with scoring.noting(failures, missing), scoring.serving(cell, made, store) as serving:
                for task in missing:
                    with scoring.noting(failures, [task]):
                        scoring.score(cell, made, task, serving, store)
    for task in cell.tasks:
        scoring.record(cell, given, made, task, failures.get(task.name), store, run_id)


def run_all(cells: Iterable[Cell], store: Store, run_id: str) -> None:
    """Prepare every cell before the first engine takes the memory, then take each to its records, or to the record of
    why it has none.

    Any number of workers may do this with the same cells at once: a cell that another is at is left to it, and looked
    at again when nothing else is left.
    """
    waiting = list(cells)
    prepared: set[Cell] = set()
    while waiting:
        for cell in waiting:
            if cell not in prepared:
                with taken(cell, "preparing", run_id, store) as mine:
                    if mine:
                        try_to_prepare(cell, store, run_id)
                        prepared.add(cell)
        tried = set()
        for cell in waiting:
            with taken(cell, "scoring", run_id, store) as mine:
                if mine and cell in prepared:
                    if not was_tried(cell, store, run_id):
                        run(cell, store, run_id)
                    tried.add(cell)
        waiting = [cell for cell in waiting if cell not in tried]
        if waiting and not tried:
            await_turn(waiting[0], store)


def try_to_prepare(cell: Cell, store: Store, run_id: str) -> None:
    """Prepare a cell; if that fails, its records say so, and it is not tried a second time."""
    if was_tried(cell, store, run_id):
        return
    if not is_prepared(cell, store):
        release()  # an engine that is kept from another cell: its worker is gone that was to prepare this one
    failures: dict[str, scoring.Failure] = {}
    with scoring.noting(failures, cell.tasks):
        prepare(cell, store)
    for task in cell.tasks if failures else ():
        scoring.record(cell, None, None, task, failures[task.name], store, run_id)


def is_prepared(cell: Cell, store: Store) -> bool:
    """Whether the plan, what recovery makes of it and its errors are there."""
    file = stages.plan_file(cell, store)
    if not file.exists() or (cell.measures_errors and not store.path("errors", cell.errors_name).exists()):
        return False
    return cell.recovery is None or stages.remade_folder(cell, from_json(file.read_text()), store).exists()


def was_tried(cell: Cell, store: Store, run_id: str) -> bool:
    """Whether nothing is left to do for a cell in this run: all is done, or its records are of this run."""
    records = (store.read_json("records", cell.record_name(task)) for task in cell.tasks)
    return scoring.all_done(cell, store) or all(found and found.get("run") == run_id for found in records)


@refuse_politely
def main() -> int:
    """Check every cell that is asked for, run them, print their table."""
    asked = sys.argv[1:]
    workers = launch.workers(asked)
    sweep = checked(asked, launch.servers_here(workers))
    if sweep.dry_run:
        return bill.show(sweep)
    with interruptible():
        return carry_out(sweep, workers, asked)


def carry_out(sweep: Sweep, workers: launch.Workers | None, asked: Sequence[str]) -> int:
    """Run every cell of which anything is left to do, here or by workers, and report. Returns the exit status.

    asked: the command line.
    """
    start, store, run_id = time.monotonic(), sweep.store, launch.new_run()
    keep_chatter(store)
    store.sweep_out()
    cells = list(dict.fromkeys(sweep.together()))
    waiting = [cell for cell in cells if not scoring.all_done(cell, store)]
    for cell in cells:
        if cell not in waiting:
            say("record", cell.slug, "cached")
    progress = Progress(cells, store, run_id)
    with shown(progress, workers.count if workers else 1):
        if workers is None:
            run_all(waiting, store, run_id)
        else:
            launch.launch(workers, waiting, store, run_id)
    status = report.show(sweep, asked)
    summary(progress.look(), len(cells) - len(waiting), time.monotonic() - start, asked)
    return status


def keep_chatter(store: Store) -> None:
    """What libraries log goes to a file: our own progress lines say more."""
    file = store.path("logs", "run.log")
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file)
    handler.setFormatter(WithoutSecrets("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class WithoutSecrets(logging.Formatter):
    """What this process's environment holds in secret does not go into its log."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


if __name__ == "__main__":
    leave(main())
