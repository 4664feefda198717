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
from harness.plan import Plan
from harness.progress import Progress
from harness.shown import shown, summary
from harness.spec import Cell
from harness.stats import Stats
from harness.store import Store, say
from harness.sweep import Sweep
from harness.turns import take_turns


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
    """Take each cell to its records, or to the record of why it has none; others may be at the same cells."""
    take_turns(cells, store, run_id, prepare, run)


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
