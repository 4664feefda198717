"""The flow, for one cell of a comparison. Start here.

model + text --calibrate--> Stats --method--> Plan [--recover--> weights] --serve--> URL --score--> records

python -m harness.run method=reap ratio=0.25           one cell
python -m harness.run sweep=demo                       a grid of cells; the same command again resumes
python -m harness.run method=reap,ean ratio=0.25,0.5 seed=0,1,2
"""

from __future__ import annotations

import logging
import sys

from harness import bill, report, scoring, stages
from harness.commandline import checked, refuse_politely
from harness.plan import Plan
from harness.spec import Cell
from harness.stats import Stats
from harness.store import Store, say
from harness.sweep import Sweep


def prepare(cell: Cell, store: Store) -> tuple[Stats, Plan]:
    """Everything that needs the model in this process."""
    given = stages.statistics(cell, store)
    made = stages.plan(cell, given, store)
    stages.remade(cell, given, made, store)
    stages.reconstruct(cell, made, store)
    stages.reference(cell, made, store)
    return given, made


def run(cell: Cell, store: Store, problem: Exception | None = None) -> None:
    """Take one cell from the model to its records; what the store holds already is not done again.

    problem: why it could not be prepared, where that has been tried.
    """
    if scoring.all_done(cell, store):
        return say("record", cell.slug, "cached")
    given = made = None
    errors: dict[str, str] = {}
    with scoring.noting(errors, cell.tasks):
        if problem is not None:
            raise problem
        given, made = prepare(cell, store)
        missing = [task for task in cell.tasks if not scoring.scored(cell, made, task, store)]
        if missing:
            with scoring.noting(errors, missing), scoring.serving(cell, made, store) as serving:
                for task in missing:
                    with scoring.noting(errors, [task]):
                        scoring.score(cell, made, task, serving, store)
    for task in cell.tasks:
        scoring.record(cell, given, made, task, errors.get(task.name), store)


def run_all(sweep: Sweep) -> None:
    """Prepare every cell before the first engine takes the memory, then take each to its records, or to the record of
    why it could not be prepared.
    """
    cells = sweep.together()
    problems: dict[Cell, Exception] = {}
    for cell in cells:
        if not scoring.all_done(cell, sweep.store):
            try:
                prepare(cell, sweep.store)
            except Exception as problem:
                problems[cell] = problem
    for cell in cells:
        run(cell, sweep.store, problems.get(cell))


@refuse_politely
def main() -> int:
    """Check every cell that is asked for, run them, print their table."""
    asked = sys.argv[1:]
    sweep = checked(asked)
    if sweep.dry_run:
        return bill.show(sweep)
    keep_chatter(sweep.store)
    run_all(sweep)
    return report.show(sweep, asked)


def keep_chatter(store: Store) -> None:
    """What libraries log goes to a file: our own progress lines say more."""
    file = store.path("logs", "run.log")
    file.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=file, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")


if __name__ == "__main__":
    sys.exit(main())
