"""One plan from a command line: a cell's, made or found in the store, or one in a file (``plan=<file>``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import gather, stages
from harness import plan as plans
from harness.commandline import before_work, check_texts, check_whole_models, texts_of
from harness.errors import UserError
from harness.plan import Plan
from harness.spec import Cell
from harness.store import Store
from harness.sweep import expand

DECIDING = ("recovery", "method", "protect", "allocation", "system", "ratio")  # settings that a plan has behind it


@dataclass(frozen=True)
class OnePlan:
    """cell: the model, and how the plan was found, if ``is_cells``. file: holds the plan. remade: the checkpoint that
    the cell's recovery made of it, where it has one.
    """

    cell: Cell
    plan: Plan
    file: Path
    store: Store
    is_cells: bool
    remade: Path | None = None


def split(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The command's own options (``name=value`` for these names), and what is left for Hydra."""
    options = dict(a.split("=", 1) for a in arguments if a.split("=", 1)[0] in names and "=" in a)
    return options, [a for a in arguments if a.split("=", 1)[0] not in options]


def one_plan(arguments: Sequence[str], file: str | None, check: Callable[[Cell], None] = lambda cell: None) -> OnePlan:
    """The plan that is asked for. Raises UserError if several are, or the file's is none or another model's.

    check: what else must hold of the cell before any work. Raises UserError.
    """
    if file is not None:
        _check_taken_as_it_is(arguments)
    sweep = expand([*arguments, *(["method=none"] if file is not None else [])])
    if sweep.dry_run:
        raise UserError("dry_run=true: this command has no bill. ./bench run with the same settings has one.")
    if len(sweep.cells) != 1:
        raise UserError(
            f"This command takes one plan, and {len(sweep.cells)} cells are asked for. Name one method, ratio."
        )
    (cell,) = sweep.cells
    with before_work():
        cell.check()
        check(cell)
        if file is not None:
            return _from_file(cell, file, sweep.store)
        check_whole_models([cell])
        if cell.calibrates:
            cell.calibration.check()
        if cell.calibrates or cell.recovery is not None:
            check_texts(texts_of([cell]), sweep.store)
    given = gather.statistics(cell, sweep.store)
    made = stages.plan(cell, given, sweep.store)
    remade = stages.remade(cell, given, made, sweep.store)
    return OnePlan(cell, made, stages.plan_file(cell, sweep.store), sweep.store, True, remade)


def _check_taken_as_it_is(arguments: Sequence[str]) -> None:
    asked = {re.split(r"[.=@]", argument.lstrip("+"))[0] for argument in arguments}
    if setting := next((name for name in DECIDING if name in asked), None):
        raise UserError(
            f"A plan in a file is taken as it is. Leave {setting} out, or name the method instead of the file."
        )


def _from_file(cell: Cell, file: str, store: Store) -> OnePlan:
    path = Path(file)
    try:
        made = plans.read(path)
        made.validate(cell.model.experts, cell.model.top_k)
    except UserError as error:
        raise UserError(f"plan={file}: {error}") from error
    return OnePlan(cell, made, path.resolve(), store, False)
