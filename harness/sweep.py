"""The cells of a whole command line, one or a grid as Hydra's sweeper makes it, checked before any runs."""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.build import CONF, one_message
from harness.errors import UserError
from harness.overrides import chooses_a_file, parsed, sets_a_value
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
    arguments, first = _without_flags(overrides), first_config(tuple(overrides))
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            params = [f"{name}={value}" for name, value in (first.hydra.sweeper.params or {}).items()]
            asked = parsed([*params, *arguments])
            configs = [first]
            if any(override.is_sweep_override() for override in asked) or params:
                configs = _composed(itertools.chain.from_iterable(BasicSweeper.split_arguments(asked, None)))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(one_message(error)) from error
    choices = first.hydra.runtime.choices
    try:
        return _sweep(choices.get("experiment") or choices.get("sweep") or "run", configs)
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration does not resolve: {one_message(error)}") from error


def _composed(grid: Iterable[Sequence[str]]) -> list[DictConfig]:
    """The config of each cell. Settings that choose files of conf/ are composed; where cells differ in values alone,
    these are set in copies, as Hydra sets them behind a composition, which takes twenty times as long.
    """
    found, compositions = [], dict[tuple[str, ...], DictConfig]()
    for job in grid:
        asked = parsed(job)
        values = [override for override in asked if sets_a_value(override)]
        if len(values) + sum(chooses_a_file(override) for override in asked) < len(asked):  # adds to the config
            values = []
        files = tuple(str(override.input_line) for override in asked if override not in values)
        if files not in compositions:
            compositions[files] = compose("config", overrides=list(files))
        found.append(copy.deepcopy(compositions[files]))
        ConfigLoaderImpl._apply_overrides_to_config(values, found[-1])
    return found


def _sweep(name: str, configs: Sequence[DictConfig]) -> Sweep:
    absent = {benchmark: reason for config in configs for benchmark, reason in _absent(config).items()}
    cells = tuple(
        cell_of(config) for config in configs if not _absent(config) or OmegaConf.select(config, "suite.tasks")
    )
    dry_run = _dry_run(configs[0])
    if not cells and not dry_run:
        reasons = " ".join(f"{benchmark}: {reason}." for benchmark, reason in absent.items())
        raise UserError(f"There is nothing to score here. {reasons}")
    _check_rows(cells)
    return Sweep(name, cells, _store(configs), absent, dry_run)


def _dry_run(config: DictConfig) -> bool:
    if not isinstance(config.dry_run, bool):
        raise UserError(f"dry_run={config.dry_run} is neither true nor false.")
    return config.dry_run


def _absent(config: DictConfig) -> Mapping[str, str]:
    if not isinstance(config.absent, Mapping):
        raise UserError(f"absent={config.absent} is no list of benchmarks with the reason why they are not offered.")
    return config.absent


def _store(configs: Sequence[DictConfig]) -> Store:
    """Where results are to be kept. Raises UserError where no folder is or can be made."""
    given = configs[0].store
    if any(config.store != given for config in configs):
        raise UserError(f"store={given} and others: the cells of a sweep share one store. Name one folder.")
    if not isinstance(given, str) or not given.strip():
        raise UserError(f"store={given} names no folder. Name one, as store=results.")
    root = Path(given)
    try:
        nearest = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    except OSError as error:
        raise UserError(f"store={given} cannot be a folder: {error.strerror}.") from error
    if not nearest.is_dir():
        raise UserError(f"store={given}: {nearest} is a file, so there can be no folder. Name another.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"store={given}: nothing may be written in {nearest}. Name another folder.")
    return Store(root)


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
    text = replace(cell.calibration, batch_size=1, shards=1) if cell.calibrates else None
    parts = (cell.allocation, cell.recovery)
    method = None if cell.keeps_experts else method_identity(cell.method)
    return cell.model, method, cell.ratio, parts, text, task, cell.serve.identity()


@functools.lru_cache(maxsize=1)
def first_config(overrides: tuple[str, ...]) -> DictConfig:
    """The config of a command line's first cell, Hydra's own part included. Raises UserError."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            first = _first_values(_without_flags(overrides))
            return compose("config", overrides=first, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(one_message(error)) from error


def _without_flags(overrides: Sequence[str]) -> list[str]:
    """Hydra's own command lines ask for a grid by a flag; here commas do."""
    return [argument for argument in overrides if argument not in ("-m", "--multirun")]


def _first_values(arguments: Sequence[str]) -> list[str]:
    """The command line with the first value of each sweep (``method=a,b``): enough for a sweep file's parameters."""
    return [
        f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        if override.is_sweep_override()
        else given
        for given, override in zip(arguments, parsed(arguments), strict=True)
    ]
