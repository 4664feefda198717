"""The flow, for one cell of a comparison. Start here.

model + text --calibrate--> Stats --method--> Plan --export--> checkpoint --serve--> URL --score--> records

python -m harness.run method=reap ratio=0.25           one cell
python -m harness.run sweep=demo                       a grid of cells; the same command again resumes
python -m harness.run method=reap,ean ratio=0.25,0.5 seed=0,1,2
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from harness import report, scoring, stages
from harness.commandline import checked, refuse_politely
from harness.spec import Cell, cell_of
from harness.store import Store, say


def run(cell: Cell, store: Store) -> None:
    """Take one cell from the model to its records; what the store holds already is not done again."""
    if all(scoring.is_done(cell, task, store) for task in cell.tasks):
        return say("record", cell.slug, "cached")
    given = made = None
    errors: dict[str, str] = {}
    with scoring.noting(errors, cell.tasks):
        given = stages.statistics(cell, store)
        made = stages.plan(cell, given, store)
        stages.reconstruct(cell, made, store)
        missing = [task for task in cell.tasks if not scoring.scored(cell, made, task, store)]
        if missing:
            with scoring.noting(errors, missing), scoring.serving(cell, made, store) as served:
                for task in missing:
                    with scoring.noting(errors, [task]):
                        scoring.score(cell, made, task, served, store)
    for task in cell.tasks:
        scoring.record(cell, given, made, task, errors.get(task.name), store)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def run_config(config: DictConfig) -> None:
    run(cell_of(config), Store(Path(config.store)))


@refuse_politely
def main() -> int:
    """Check every cell that is asked for, run them, print their table."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars would fill a log file
    sweep, arguments = checked(sys.argv[1:])
    sys.argv[1:] = arguments
    run_config()
    return report.show(sweep)


if __name__ == "__main__":
    sys.exit(main())
