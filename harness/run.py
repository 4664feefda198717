"""The flow, for one cell of a comparison. Start here.

model + text --calibrate--> Stats --method--> Plan --serve--> URL --score--> records

python -m harness.run method=reap ratio=0.25           one cell
python -m harness.run sweep=demo                       a grid of cells; the same command again resumes
python -m harness.run method=reap,ean ratio=0.25,0.5 seed=0,1,2
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import hydra
from omegaconf import DictConfig

from harness import bill, report, scoring, stages
from harness.commandline import checked, refuse_politely
from harness.plan import Plan
from harness.spec import Cell, cell_of
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


def run(cell: Cell, store: Store) -> None:
    """Take one cell from the model to its records; what the store holds already is not done again."""
    if scoring.all_done(cell, store):
        return say("record", cell.slug, "cached")
    given = made = None
    errors: dict[str, str] = {}
    with scoring.noting(errors, cell.tasks):
        given, made = prepare(cell, store)
        missing = [task for task in cell.tasks if not scoring.scored(cell, made, task, store)]
        if missing:
            with scoring.noting(errors, missing), scoring.serving(cell, made, store) as serving:
                for task in missing:
                    with scoring.noting(errors, [task]):
                        scoring.score(cell, made, task, serving, store)
    for task in cell.tasks:
        scoring.record(cell, given, made, task, errors.get(task.name), store)


def prepare_all(sweep: Sweep) -> None:
    """Plan every cell before the first engine takes the memory. What fails here fails again in its cell, for good."""
    for cell in sweep.cells:
        if not scoring.all_done(cell, sweep.store):
            with contextlib.suppress(Exception):
                prepare(replace(cell, collect=frozenset(sweep.extras)), sweep.store)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def run_config(config: DictConfig) -> None:
    cell = cell_of(config)
    if cell.tasks:  # a domain whose benchmarks are not offered has none
        run(cell, Store(Path(config.store)))


@refuse_politely
def main() -> int:
    """Check every cell that is asked for, run them, print their table."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars would fill a log file
    asked = sys.argv[1:]
    sweep, arguments = checked(asked)
    if sweep.dry_run:
        return bill.show(sweep)
    sys.argv[1:] = arguments
    prepare_all(sweep)
    run_config()
    return report.show(sweep, asked)


if __name__ == "__main__":
    sys.exit(main())
