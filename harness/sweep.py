"""The cells of a whole command line, one or a grid as Hydra's sweeper makes it, checked before any runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from harness.build import CONF, one_message
from harness.errors import UserError
from harness.spec import Cell, cell_of, method_identity
from harness.store import Store
from tasks import Task


@dataclass(frozen=True)
class Sweep:
    """Every cell that a command line asks for: one, or a grid.

    absent: benchmarks that belong to what is
    asked for and are not offered here, with the reason. dry_run: whether only the bill is wanted.
    """

    name: str
    cells: tuple[Cell, ...]
    store: Store
    absent: Mapping[str, str] = field(default_factory=dict)
    dry_run: bool = False

    @property
    def extras(self) -> list[str]:
        """Extra statistics that some cell needs: gathered in the one pass that all share."""
        return sorted(frozenset().union(*(cell.extras for cell in self.cells if not cell.in_sequence)))

    def together(self) -> list[Cell]:
        """The cells, each of which gathers what any of them needs."""
        return [replace(cell, collect=frozenset(self.extras)) for cell in self.cells]

    def check(self) -> None:
        """Raise UserError, before any work, for everything that cannot work. What cells share is looked at once."""
        for cell in self.cells:
            cell.check()
        reading = (cell for cell in self.cells if cell.calibrates or cell.measures_errors)
        for calibration in dict.fromkeys(cell.calibration for cell in reading):
            calibration.check()
        for task in dict.fromkeys(task for cell in self.cells for task in cell.tasks):
            task.check()


def expand(overrides: Sequence[str]) -> Sweep:
    """Compose every cell of the command line, without running any. Raises UserError."""
    arguments = [argument for argument in overrides if argument not in ("-m", "--multirun")]
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        raise UserError(f"Unknown option {flags[0]}. Give settings as name=value, for example method=reap ratio=0.25.")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            first = compose("config", overrides=_single(arguments), return_hydra_config=True)
            params = [f"{name}={value}" for name, value in (first.hydra.sweeper.params or {}).items()]
            parsed = OverridesParser.create().parse_overrides([*params, *arguments])
            grid = itertools.chain.from_iterable(BasicSweeper.split_arguments(parsed, None))
            configs = [compose("config", overrides=list(job)) for job in grid]
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group that is set to null
        raise UserError(one_message(error)) from error
    choices = first.hydra.runtime.choices
    name = choices.get("experiment") or choices.get("sweep") or "run"
    absent = {benchmark: reason for config in configs for benchmark, reason in config.absent.items()}
    cells = tuple(cell_of(config) for config in configs if config.suite.tasks or not config.absent)
    dry_run = _dry_run(configs[0])
    if not cells and not dry_run:
        reasons = " ".join(f"{benchmark}: {reason}." for benchmark, reason in absent.items())
        raise UserError(f"There is nothing to score here. {reasons}")
    _check_rows(cells)
    return Sweep(name, cells, Store(Path(configs[0].store)), absent, dry_run)


def _dry_run(config: DictConfig) -> bool:
    if not isinstance(config.dry_run, bool):
        raise UserError(f"dry_run={config.dry_run} is neither true nor false.")
    return config.dry_run


def _check_rows(cells: Sequence[Cell]) -> None:
    """Raise UserError if cells that differ would share a row of the table, where they would be mixed up."""
    rows: dict[tuple, tuple] = {}
    for cell in cells:
        for task in cell.tasks:
            row, settings = (*cell.row, task.name), _settings(cell, task)
            if rows.setdefault(row, settings) != settings:
                raise UserError(
                    f"Two cells of this sweep would share the table row {', '.join(map(str, row))} though they differ. "
                    "Sweep over method, ratio, seed, or models and calibrations with names of their own; run anything "
                    "else on its own."
                )


def _settings(cell: Cell, task: Task) -> tuple:
    """What was asked for, as far as it can change a score. Reads no file: neither model nor text need be here yet."""
    text = replace(cell.calibration, batch_size=1) if cell.calibrates else None
    parts = (cell.allocation, cell.recovery)
    method = None if cell.keeps_experts else method_identity(cell.method)
    return cell.model, method, cell.ratio, parts, text, task, cell.serve.identity()


def _single(arguments: Sequence[str]) -> list[str]:
    """The command line with the first value of each sweep (``method=a,b``): enough for a sweep file's parameters."""
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    return [
        f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        if override.is_sweep_override()
        else given
        for given, override in zip(arguments, parsed, strict=True)
    ]
