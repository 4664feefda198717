"""Only the statistics of a sweep, no plans and no scores: ./bench calibrate sweep=demo calibration.shards=8

Started several times, each with a GPU of its own (CUDA_VISIBLE_DEVICES) or as the tasks of a SLURM array, the processes
share the shards through the store: each takes one that nobody is at, and whoever is last adds them up.
"""

from __future__ import annotations

import sys

from harness import gather
from harness.commandline import before_work, check_room, check_texts, check_whole_models, refuse_politely, texts_of
from harness.errors import UserError
from harness.interrupt import interruptible, leave
from harness.sweep import expand


@refuse_politely
def main() -> int:
    """Gather whatever the sweep's methods read."""
    sweep = expand(sys.argv[1:])
    if sweep.dry_run:
        raise UserError("dry_run=true: this command has no bill. ./bench run with the same settings has one.")
    cells = [cell for cell in sweep.together() if cell.needs and not cell.in_sequence]
    if not cells:
        raise UserError("No method of these reads statistics that could be gathered. Choose one, as method=reap.")
    with before_work():
        sweep.check()
        check_whole_models(cells)
        check_texts(texts_of(cells), sweep.store)
        check_room(cells, sweep.store)
    sweep.store.sweep_out()
    with interruptible():
        for cell in cells:
            gather.statistics(cell, sweep.store)
    return 0


if __name__ == "__main__":
    leave(main())
