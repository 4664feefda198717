"""One plan from a command line: a cell's, made or found in the store, or one in a file (``plan=<file>``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import plan as plans
from harness import stages
from harness.errors import UserError
from harness.plan import Plan
from harness.spec import Cell
from harness.store import Store
from harness.sweep import expand


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


def one_plan(arguments: Sequence[str], file: str | None) -> OnePlan:
    """The plan that is asked for. Raises UserError if several are, or the file's is none or another model's."""
    sweep = expand([*arguments, *(["method=none"] if file else [])])
    if len(sweep.cells) != 1:
        raise UserError(
            f"This command takes one plan, and {len(sweep.cells)} cells are asked for. Name one method, ratio."
        )
    (cell,) = sweep.cells
    cell.check()
    if file is None:
        given = stages.statistics(cell, sweep.store)
        made = stages.plan(cell, given, sweep.store)
        remade = stages.remade(cell, given, made, sweep.store)
        return OnePlan(cell, made, stages.plan_file(cell, sweep.store), sweep.store, True, remade)
    if any(argument.startswith("recovery=") for argument in arguments):
        raise UserError(
            "A plan in a file is taken as it is. Leave recovery out, or name the method instead of the file."
        )
    path = Path(file)
    try:
        made = plans.from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"plan={file} cannot be read: {error}. Plans of runs are in <store>/plans/.") from error
    made.validate(cell.model.experts, cell.model.top_k)
    return OnePlan(cell, made, path.resolve(), sweep.store, False)
