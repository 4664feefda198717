"""One cell of a comparison, typed and checked, from Hydra's config; and the cells of a whole sweep."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import methods
from harness import budget, checkpoint
from harness.data import Calibration
from harness.errors import UserError
from harness.models import ROOT, Model
from harness.serve import VLLM, Server
from harness.stats import EXTRAS, ROUTED
from harness.store import Store, key
from methods import Method
from methods.none import NoCompression
from tasks import Task

CONF = ROOT / "conf"

# Raise one when a change of our code changes what it stands for; what was made before is then made anew.
STATS_SCHEMA = 1  # the sums of harness/calibrate.py
SCORE_SCHEMA = 1  # the checkpoint of harness/checkpoint.py, and scores of tasks/


@dataclass(frozen=True)
class Cell:
    """A model compressed by a method at a ratio, and how it is scored. Nothing is loaded or run yet."""

    model: Model
    calibration: Calibration
    method: Method
    label: str
    ratio: float
    seed: int
    tasks: tuple[Task, ...]
    serve: VLLM | Server
    collect: frozenset[str] = frozenset()
    keep_checkpoints: bool = False

    @property
    def calibrates(self) -> bool:
        """Whether the method reads statistics at all."""
        return bool(self.method.needs)

    @property
    def extras(self) -> frozenset[str]:
        """Extra statistics the calibration pass must gather."""
        return (self.method.needs | self.collect) & set(EXTRAS)

    @property
    def compresses(self) -> bool:
        return not isinstance(self.method, NoCompression)

    @cached_property
    def keep(self) -> dict[int, int]:
        """Experts kept in each layer (distinct experts left, for merging)."""
        return budget.uniform(self.model.experts, self.ratio)

    def identity(self) -> dict[str, Any]:
        """What determines the plan. Uncompressed, nothing but the model does; without calibration, no text does."""
        identity: dict[str, Any] = {
            "model": self.model.digest,
            "method": method_identity(self.method),
        }
        if self.compresses:
            identity["keep"] = sorted(self.keep.items())
        if self.calibrates:
            identity["calibration"] = {**self.calibration.identity(), **self.observed_how()}
        return identity

    def observed_how(self) -> dict[str, Any]:
        """What determines the sums besides model and tokens."""
        return {
            "dtype": self.calibration.dtype,
            "transformers": importlib.metadata.version("transformers"),
            "schema": STATS_SCHEMA,
        }

    def record_name(self, task: Task) -> str:
        """File name of the record of this cell on one task: readable, and unique by what determines it."""
        fields = {"task": dict(task.identity()), "serve": dict(self.serve.identity()), "schema": SCORE_SCHEMA}
        digest = key(cell=self.identity(), **fields)
        return f"{self.slug}-{task.name}-{digest}.json"

    @property
    def slug(self) -> str:
        parts = [self.model.name, self.label]
        parts += [f"r{self.ratio:.4g}", f"s{self.seed}"] if self.compresses else []
        return "-".join(parts).lower().replace("/", "_").replace(" ", "_")

    @property
    def row(self) -> dict[str, Any]:
        """What names the cell in tables; the cells of a sweep that differ must differ here."""
        return {
            "model": self.model.name,
            "label": self.label,
            "calibration": self.calibration.name if self.calibrates else "none",
            "ratio": self.ratio,
            "seed": self.seed if self.compresses else None,
        }

    def check(self) -> None:
        """Raise UserError, before any work, for what cannot work of this model, method and ratio together."""
        if self.compresses:
            self.model.check_compressible()
        checkpoint.check_structure(self.model)
        self.model.check_tokenizer()
        if not self.tasks:
            raise UserError("The suite has no tasks, so there is nothing to score. Choose one of conf/suite/.")
        if self.compresses and isinstance(self.serve, Server):
            raise UserError(
                f"{self.label} makes a model of its own, and {self.serve.url} serves another. Use serve=vllm, "
                "or serve the compressed checkpoint yourself and score it there with method=none."
            )
        if self.compresses:
            budget.check_keep(self.keep, self.model.experts, self.ratio, self.model.config, self.model.top_k)
        unknown = (self.method.needs | self.collect) - set(ROUTED) - set(EXTRAS)
        if unknown:
            raise UserError(
                f"{self.label} needs statistics nobody gathers: {sorted(unknown)}. "
                f"There are {', '.join(ROUTED + EXTRAS)}."
            )


def method_identity(method: Method) -> dict[str, Any]:
    """The method's class, parameters and the source they run: an edited formula makes a new plan."""
    kind = type(method)
    source = inspect.getsource(inspect.getmodule(kind) or kind) + inspect.getsource(methods)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "parameters": dataclasses.asdict(method),  # type: ignore[call-overload]
        "source": hashlib.sha256(source.encode()).hexdigest(),
    }


def cell_of(config: DictConfig) -> Cell:
    """Build the cell that a composed config describes. Raises UserError for values that make no sense."""
    try:
        fields = dict(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration does not resolve: {_one_message(error)}") from error
    method = dict(fields["method"])
    label = method.pop("label", None) or method.get("_target_", "?").split(".")[-1]
    ratio = budget.check_ratio(fields["ratio"])
    seed = _whole_number(fields["seed"])
    built = _build("method", method)
    return Cell(
        model=_shared("model", fields["model"]),
        calibration=_build("calibration", fields["calibration"]),
        method=built,
        label=label,
        ratio=0.0 if isinstance(built, NoCompression) else ratio,
        seed=seed,
        tasks=tuple(_shared("suite", task) for task in fields["suite"]["tasks"]),
        serve=_build("serve", fields["serve"]),
        collect=frozenset(fields["collect"]),
        keep_checkpoints=_yes_or_no("keep_checkpoints", fields["keep_checkpoints"]),
    )


def _yes_or_no(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{name}={value} is neither true nor false.")
    return value


def _whole_number(seed: object) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed={seed} is not a whole number from 0 up.")
    return seed


def _shared(group: str, fields: Mapping[str, Any]) -> Any:
    """One object for all cells that ask for the same, so that its files are read and hashed once."""
    return _built(group, json.dumps(fields, sort_keys=True))


@functools.cache
def _built(group: str, fields: str) -> Any:
    return _build(group, json.loads(fields))


def _build(group: str, fields: Mapping[str, Any]) -> Any:
    """An object of the dataclass ``_target_``; a wrong class, parameter or type of value becomes one message."""
    try:
        kind = get_class(str(fields["_target_"]))
    except (HydraException, ImportError, KeyError, ValueError) as error:
        raise UserError(f"conf/{group}: there is no class {fields.get('_target_')}: {error}") from error
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    del given["_target_"]
    types = {field.name: getattr(field.type, "__name__", str(field.type)) for field in dataclasses.fields(kind)}
    for name, value in given.items():
        if name not in types:
            possible = ", ".join(types) or "none"
            raise UserError(f"{group}: {kind.__name__} has no parameter {name!r}. Its parameters are: {possible}.")
        if not _fits(value, types[name]):
            raise UserError(f"{group}: {name}={value} is not of the type {types[name]} that {kind.__name__} needs.")
    try:
        return kind(**given)
    except TypeError as error:  # a parameter is missing
        raise UserError(f"conf/{group}: {error}") from error


def _fits(value: object, annotation: str) -> bool:
    """Whether a value from YAML is of an annotated type such as ``int | None`` or ``tuple[str, ...]``."""
    kinds = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None), "tuple": tuple}
    names = [part.strip().split("[")[0] for part in annotation.split("|")]
    if isinstance(value, bool):
        return "bool" in names
    return any(isinstance(value, kinds.get(name, object)) for name in names)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Sweep:
    """Every cell that a command line asks for: one, or the grid of a multirun."""

    name: str
    cells: tuple[Cell, ...]
    store: Store
    is_grid: bool = True  # whether a setting has several values, which Hydra must be told

    @property
    def extras(self) -> list[str]:
        """Extra statistics that some cell needs: gathered in the one pass that all share."""
        return sorted(frozenset().union(*(cell.extras for cell in self.cells)))

    def check(self) -> None:
        """Raise UserError, before any work, for everything that cannot work. What cells share is looked at once."""
        for cell in self.cells:
            cell.check()
        for calibration in dict.fromkeys(cell.calibration for cell in self.cells if cell.calibrates):
            calibration.check()
        for task in dict.fromkeys(task for cell in self.cells for task in cell.tasks):
            task.check()


def expand(overrides: Sequence[str]) -> Sweep:
    """Compose every cell of the command line, as Hydra will, without running any. Raises UserError."""
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
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_message(error)) from error
    name = first.hydra.runtime.choices.get("sweep") or "run"
    cells = tuple(cell_of(config) for config in configs)
    _check_rows(cells)
    is_grid = any(override.is_sweep_override() for override in parsed)
    return Sweep(name, cells, Store(Path(configs[0].store)), is_grid)


def _check_rows(cells: Sequence[Cell]) -> None:
    """Raise UserError if cells that differ would share a row of the table, where they would be mixed up."""
    rows: dict[tuple, Cell] = {}
    for cell in cells:
        for task in cell.tasks:
            row = (*cell.row.values(), task.name)
            if rows.setdefault(row, cell).record_name(task) != cell.record_name(task):
                raise UserError(
                    f"Two cells of this sweep would share the table row {', '.join(map(str, row))} though they differ. "
                    "Sweep over method, ratio, seed, or models and calibrations with names of their own; run anything "
                    "else on its own."
                )


def _single(arguments: Sequence[str]) -> list[str]:
    """The command line without its sweeps (``method=a,b``): enough to find a sweep file's parameters."""
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    return [argument for argument, override in zip(arguments, parsed, strict=True) if not override.is_sweep_override()]


def _one_message(error: Exception) -> str:
    """Hydra's message in one line, without its decoration; it already lists the available options."""
    decoration = ("provider=", "object_type=", "reference_type=", "Config search path", "See https", "Set the env")
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(decoration))
    text = re.sub(r"full_key: (\S+)", r"(at \1)", text)
    if text.startswith("Error parsing override"):
        text += ". Give settings as name=value, for example method=reap ratio=0.25."
    if text.startswith("Could not override"):
        name = text.split("'")[1]
        text = f"There is no setting {name!r}. The groups are {', '.join(_groups())}; their files in conf/ list more."
    return text


def _groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())
