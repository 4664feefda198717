"""The cells of a run, each done once, by any number of workers that share a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from harness import scoring, stages
from harness.plan import from_json
from harness.progress import await_turn, taken
from harness.serve import release
from harness.spec import Cell
from harness.store import Store

Prepare = Callable[[Cell, Store], object]  # `harness.run.prepare`
Run = Callable[[Cell, Store, str], object]  # `harness.run.run`


def take_turns(cells: Iterable[Cell], store: Store, run_id: str, prepare: Prepare, run: Run) -> None:
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
                        _try_to_prepare(cell, store, run_id, prepare)
                        prepared.add(cell)
        tried = set()
        for cell in waiting:
            with taken(cell, "scoring", run_id, store) as mine:
                if mine and cell in prepared:
                    if not _was_tried(cell, store, run_id):
                        run(cell, store, run_id)
                    tried.add(cell)
        waiting = [cell for cell in waiting if cell not in tried]
        if waiting and not tried:
            await_turn(waiting[0], store)


def _try_to_prepare(cell: Cell, store: Store, run_id: str, prepare: Prepare) -> None:
    """Prepare a cell; if that fails, its records say so, and it is not tried a second time."""
    if _was_tried(cell, store, run_id):
        return
    if not _is_prepared(cell, store):
        release()  # an engine that is kept from another cell: its worker is gone that was to prepare this one
    failures: dict[str, scoring.Failure] = {}
    with scoring.noting(failures, cell.tasks):
        prepare(cell, store)
    for task in cell.tasks if failures else ():
        scoring.record(cell, None, None, task, failures[task.name], store, run_id)


def _is_prepared(cell: Cell, store: Store) -> bool:
    """Whether the plan, what recovery makes of it and its errors are there."""
    file = stages.plan_file(cell, store)
    if not file.exists() or (cell.measures_errors and not store.path("errors", cell.errors_name).exists()):
        return False
    return cell.recovery is None or stages.remade_folder(cell, from_json(file.read_text()), store).exists()


def _was_tried(cell: Cell, store: Store, run_id: str) -> bool:
    """Whether nothing is left to do for a cell in this run: all is done, or its records are of this run."""
    records = (store.read_json("records", cell.record_name(task)) for task in cell.tasks)
    return scoring.all_done(cell, store) or all(found and found.get("run") == run_id for found in records)
