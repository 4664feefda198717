"""One cell of a comparison, typed and checked, from Hydra's config."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import methods
from harness import budget, checkpoint, combinations, remake
from harness.build import CONF, GROUPS, build, check_mapping, check_seed, one_message, option, shared
from harness.data import Calibration
from harness.errors import UserError
from harness.external import Server
from harness.hf import Transformers
from harness.models import Model
from harness.remake import Remake
from harness.room import MaxMemory
from harness.serve import VLLM
from harness.stats import BARRIERS, EXTRAS, MEASURES, OF_OUTPUTS, ROUTED, WEIGHTS
from harness.store import key
from methods import Method, SequentialMethod
from methods.allocations import Allocation
from methods.allocations.uniform import Uniform
from methods.none import NoCompression
from tasks import Task

# Raise one when a change of our code changes what it stands for; what was made before is then made anew.
STATS_SCHEMA = 6  # the sums of harness/sums.py, routed.py and weights.py, and how calibrate.py gathers them
ERRORS_SCHEMA = 1  # the errors of harness/reconstruct.py, and the blocks in memory of blocks.py and align.py
SEARCH_SCHEMA = 1  # the answers of harness/model_search.py, masked.py and search.py
BARRIER_SCHEMA = 2  # the sums of harness/barriers.py
SCORE_SCHEMA = 1  # the checkpoint of harness/checkpoint.py, and scores of tasks/


class Row(NamedTuple):
    """What names a cell in records and tables: the cells of a sweep that differ must differ here."""

    model: str
    label: str
    calibration: str  # "none" where the method reads no calibration statistics
    routing: str  # which experts and gates these saw, likewise
    ratio: float
    seed: int | None  # None for the uncompressed model, which no seed changes


CALIBRATED = ("calibration", "routing")  # of Row, what says how a method was calibrated


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
    serve: VLLM | Transformers | Server
    routing: str = "actual"
    collect: frozenset[str] = frozenset()
    keep_checkpoints: bool = False
    allocation: Allocation = Uniform()  # how the layers share what the ratio leaves
    recovery: Remake | None = None  # what makes new weights of the plan's model
    max_memory: MaxMemory = MaxMemory()  # what calibration may take

    @property
    def needs(self) -> frozenset[str]:
        """Names of all that decides the plan (`harness.stats`)."""
        return frozenset() if self.keeps_experts else self.method.needs | self.allocation.needs

    @property
    def keeps_experts(self) -> bool:
        """Whether all experts stay and the recovery makes the model smaller; the method is not asked."""
        return self.recovery is not None and self.recovery.ignores_plan

    @property
    def calibrates(self) -> bool:
        """Whether the method reads statistics of the calibration text."""
        return bool(self.needs & {*ROUTED, *EXTRAS, *BARRIERS, "search"})

    @property
    def extras(self) -> frozenset[str]:
        """Extra statistics the calibration pass must gather."""
        return (self.needs | self.collect) & set(EXTRAS)

    @property
    def in_sequence(self) -> bool:
        """Whether the method gathers its statistics itself, layer after layer."""
        return isinstance(self.method, SequentialMethod)

    @property
    def loads_the_model(self) -> bool:
        """Whether the plan, or what is made of it, needs the whole model in memory."""
        whole = {*BARRIERS, *MEASURES}
        return bool(self.in_sequence or self.needs & whole or self.recovery is not None)

    @property
    def compresses(self) -> bool:
        return not isinstance(self.method, NoCompression)

    @cached_property
    def keep(self) -> dict[int, int]:
        """Experts that the ratio leaves in each layer (distinct experts, for merging). An allocation that is not
        uniform shares out their sum.
        """
        return budget.uniform(self.model.experts, self.ratio)

    def identity(self) -> dict[str, Any]:
        """What determines the plan. Uncompressed, nothing but the model does; without calibration, no text does."""
        if self.keeps_experts:
            return {"model": self.model.digest, "method": "keeps all experts"}
        identity: dict[str, Any] = {
            "model": self.model.digest,
            "method": method_identity(self.method),
        }
        if self.compresses:
            identity["keep"] = sorted(self.keep.items())
        if self.calibrates:
            identity["calibration"] = {**self.calibration.identity(), **self.observed_how()}
            if self.needs & set(OF_OUTPUTS) and self.calibration.all_expert_tokens < self.calibration.tokens_in_all:
                identity["calibration"]["all_experts"] = self.calibration.all_expert_tokens
        if self.needs & set(WEIGHTS):
            identity["weights"] = STATS_SCHEMA
        if "reconstruction" in self.needs:
            identity["measured"] = self._measured_how()
        if not isinstance(self.allocation, Uniform):
            identity["allocation"] = method_identity(self.allocation)
        if "search" in self.needs:
            identity["searched"] = SEARCH_SCHEMA
        if self.needs & set(BARRIERS):
            identity["barriers"] = BARRIER_SCHEMA
        return identity

    def remake_identity(self) -> dict[str, Any]:
        """What determines the weights besides model and plan; nothing where the plan's own are served."""
        if self.recovery is None:
            return {}
        asked = {"cell": self.identity(), "ratio": self.ratio, "seed": self.seed}
        return {"recovery": {**remake.identity(self.recovery), **asked}}

    def observed(self, ids: np.ndarray) -> dict[str, Any]:
        """What determines whatever a pass of the model over these tokens [S, T] finds: the fields of its key. Cut to
        another length, the same tokens see other neighbours.
        """
        tokens = hashlib.sha256(ids.tobytes()).hexdigest()
        return {"model": self.model.digest, "tokens": tokens, "shape": list(ids.shape), **self.observed_how()}

    def observed_how(self) -> dict[str, Any]:
        """What determines the sums besides model and tokens."""
        return {
            "dtype": self.calibration.dtype,
            "routing": self.routing,
            "transformers": importlib.metadata.version("transformers"),
            "schema": STATS_SCHEMA,
        }

    @property
    def tokens_name(self) -> str:
        """File name of the calibration tokens, those held out included."""
        return self.calibration.tokens_name(self.model)

    @property
    def measures_errors(self) -> bool:
        """Whether the plan's reconstruction error is measured: it changes experts, whose weights stay what the plan
        makes them, and tokens are held out.
        """
        return bool(self.compresses and self.calibration.held_out and self.recovery is None)

    @property
    def errors_name(self) -> str:
        """File name of the reconstruction errors of this cell's plan on its calibration set's held-out tokens."""
        return key(plan=self.identity(), **self._measured_how()) + ".json"

    def _measured_how(self) -> dict[str, Any]:
        """What determines reconstruction errors besides model and plan."""
        return {
            "held_out": self.tokens_name,
            "dtype": self.calibration.dtype,
            "transformers": importlib.metadata.version("transformers"),
            "schema": ERRORS_SCHEMA,
        }

    def record_name(self, task: Task) -> str:
        """File name of the record of this cell on one task: readable, and unique by what determines it."""
        fields = {"task": dict(task.identity()), "serve": dict(self.serve.identity()), "schema": SCORE_SCHEMA}
        digest = key(cell=self.identity(), **self.remake_identity(), **fields)
        return f"{self.slug}-{task.name}-{digest}.json"

    @property
    def slug(self) -> str:
        parts = [self.model.name, self.label[:80]]  # a file name has its limits
        parts += [f"r{self.ratio:.4g}", f"s{self.seed}"] if self.compresses else []
        return re.sub(r"[^\w.-]+", "_", "-".join(parts).lower()).strip("_")

    @property
    def plan_slug(self) -> str:
        """As `slug`, without what comes after the plan: cells that differ in recovery share one."""
        method = type(self.method).__module__.rpartition(".")[2]
        parts = [self.model.name, "whole" if self.keeps_experts else method]
        parts += [f"r{self.ratio:.4g}", f"s{self.seed}"] if self.compresses and not self.keeps_experts else []
        return re.sub(r"[^\w.-]+", "_", "-".join(parts).lower()).strip("_")

    @property
    def row(self) -> Row:
        return Row(
            model=self.model.name,
            label=self.label,
            calibration=self.calibration.name if self.calibrates else "none",
            routing=self.routing if self.calibrates else "none",
            ratio=self.ratio,
            seed=self.seed if self.compresses else None,
        )

    def check(self) -> None:
        """Raise UserError, before any work, for what cannot work of this model, method and ratio together."""
        if self.compresses:
            self.model.check_compressible()
        checkpoint.check_structure(self.model)
        if self.method.aligns:
            checkpoint.check_alignable(self.model)
        self.model.check_tokenizer()
        self.serve.check_model(self.model)
        if not self.tasks:
            raise UserError("The suite has no tasks, so there is nothing to score. Choose one of conf/suite/.")
        combinations.check(self)
        if self.recovery is not None:
            self.recovery.check(self.model, self.method)
        if self.compresses and not self.keeps_experts:
            budget.check_keep(self.keep, self.model.experts, self.ratio, self.model.config, self.model.top_k)
        known = (*ROUTED, *EXTRAS, *WEIGHTS, *BARRIERS, *MEASURES)
        unknown = (self.needs - set(known)) | (self.collect - {*ROUTED, *EXTRAS})
        if unknown:
            raise UserError(
                f"{self.label} needs statistics nobody gathers: {sorted(unknown)}. There are {', '.join(known)}."
            )


def method_identity(method: Method | Allocation) -> dict[str, Any]:
    """The class, parameters and the source they run: an edited formula makes a new plan."""
    kind = type(method)
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    source = "".join(inspect.getsource(module) for module in _modules(inspect.getmodule(kind) or methods))
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "parameters": {
            name: method_identity(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
            for name, value in values.items()
        },
        "source": hashlib.sha256(source.encode()).hexdigest(),
    }


def _modules(module: ModuleType) -> list[ModuleType]:
    """A method's module and the modules of ``methods`` that it takes anything from, in an order of their own."""
    found = {module.__name__: module}
    waiting = [module]
    while waiting:
        for value in vars(waiting.pop()).values():
            name = getattr(value, "__module__", None) or ""
            if name.split(".")[0] == methods.__name__ and name not in found:
                found[name] = sys.modules[name]
                waiting.append(found[name])
    return [found[name] for name in sorted(found)]


def cell_of(config: DictConfig) -> Cell:
    """Build the cell that a composed config describes. Raises UserError for values that make no sense."""
    try:
        own = OmegaConf.masked_copy(config, [str(name) for name in config if name != "hydra"])
        fields = dict(OmegaConf.to_container(own, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration does not resolve: {one_message(error)}") from error
    _check_fields(fields)
    ratio = budget.check_ratio(fields["ratio"])
    seed = check_seed("seed", fields["seed"])
    built, label = _method(fields["method"], fields["protect"])
    compresses = not isinstance(built, NoCompression)
    allocation, shares = _part("allocation", fields["allocation"] if compresses else _option("allocation", "uniform"))
    recovery, remakes = _part("recovery", fields["recovery"] if compresses else None)
    if not compresses and (fields["recovery"] or {}).get("drop_layers"):
        raise UserError("recovery.drop_layers goes with a method that compresses; method=none is the model as it is.")
    return Cell(
        model=shared("model", fields["model"]),
        calibration=build("calibration", fields["calibration"]),
        method=built,
        label=_label(label, "" if isinstance(allocation, Uniform) else shares, recovery, remakes),
        ratio=ratio if compresses else 0.0,
        seed=seed,
        tasks=tuple(shared("suite", task) for task in _tasks(fields["suite"])),
        serve=build("serve", fields["serve"]),
        routing=_routing(fields["routing"]),
        collect=_names("collect", fields["collect"]),
        keep_checkpoints=_yes_or_no("keep_checkpoints", fields["keep_checkpoints"]),
        allocation=allocation,
        recovery=recovery,
        max_memory=_max_memory(fields["max_memory"]),
    )


def _check_fields(fields: dict[str, Any]) -> None:
    """Raise UserError for settings that nothing reads, and for numbers that no part could take. A group that was set to
    null is null, as one that may be left out is.
    """
    known = _settings_of_a_cell()
    if unknown := fields.keys() - known:
        raise UserError(
            f"Nothing would read the setting {', '.join(map(repr, sorted(map(str, unknown))))}. "
            f"There are {', '.join(sorted(known))}."
        )
    for group in GROUPS:
        fields.setdefault(group, None)
    for name in ("method", "allocation", "protect", "recovery"):
        if fields[name] is not None or name in ("method", "allocation"):
            check_mapping(name, fields[name])
        label = (fields[name] or {}).get("label")
        if label is not None and not isinstance(label, str):
            raise UserError(f"{name}.label={label} is no text for a table.")
    for name, value in _leaves(fields):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value} is not a finite number.")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"{name}={value} is too large a number: nothing here takes one beyond 64 bits.")


@functools.cache
def _settings_of_a_cell() -> frozenset[str]:
    """What conf/config.yaml has, and the groups whose options are one part of a cell."""
    own = set(map(str, OmegaConf.load(CONF / "config.yaml"))) - {"defaults"}
    return frozenset(own | set(GROUPS))


def _leaves(value: Any, within: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value of nested mappings and lists, with its name as one would set it."""
    if isinstance(value, Mapping | list):
        for name, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(part, f"{within}.{name}" if within else str(name))
    else:
        yield within, value


def _tasks(suite: Any) -> list[Any]:
    if not isinstance(suite, Mapping) or suite.keys() != {"tasks"} or not isinstance(suite["tasks"], list):
        raise UserError(f"suite={suite} is no suite: it has one setting, tasks, a list. Choose one of conf/suite/.")
    return suite["tasks"]


def _names(setting: str, value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{setting}={value} is no list of names, such as [logit_gram].")
    return frozenset(value)


def _method(fields: Mapping[str, Any], protect: Mapping[str, Any] | None) -> tuple[Any, str]:
    """The method and its label; protected, where that is asked for and there is something to protect from."""
    method = {name: value for name, value in fields.items() if name != "label"}
    label = str(fields.get("label") or method.get("_target_", "?").split(".")[-1])
    usual = _usual("method", method)
    if label == usual.get("label"):
        label += _changes(method, usual)
    built = build("method", method)
    if not protect or isinstance(built, NoCompression):
        return built, label
    switched = build("protect", {**protect, "method": method})
    return switched, f"{label} + super experts{_changes(protect, _usual('protect', protect))}"


def _label(method: str, shares: str, recovery: Remake | None, remakes: str) -> str:
    """A row is called by all that makes its model: the recovery alone, where that does not ask the method."""
    if recovery is not None and recovery.ignores_plan:
        return remakes.removeprefix(" + ")
    return method + shares + remakes


def _part(group: str, fields: Mapping[str, Any] | None) -> tuple[Any, str]:
    """An object of a group that goes with a method, and what it adds to the label; nothing where it is left out."""
    if not fields:
        return None, ""
    usual = next((usual for usual in _options(group) if usual.get("label") == fields.get("label")), {})
    named = {name: value for name, value in fields.items() if name != "label"}
    label = fields.get("label") or str(named.get("_target_", "?")).split(".")[-1]
    return build(group, named), f" + {label}{_changes(named, usual)}"


@functools.cache
def _options(group: str) -> list[Mapping[str, Any]]:
    return [_option(group, file.stem) for file in sorted((CONF / group).glob("*.yaml"))]


def _changes(given: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """Every parameter that is not as the YAML in conf/ has it, for a label."""
    changed = list(_differences(given, usual))
    return f" ({', '.join(changed)})" if changed else ""


def _differences(given: Mapping[str, Any], usual: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for name, value in given.items():
        before = usual.get(name)
        if name in ("_target_", "label", "seed") or (name in usual and before == value):
            continue
        if not isinstance(value, Mapping):
            yield f"{within}{name}={value}"
        elif isinstance(before, Mapping) and before.get("_target_") == value.get("_target_"):
            yield from _differences(value, before, f"{within}{name}.")
        else:  # another object: its class, and its parameters where they are not as its own YAML has them
            yield f"{within}{name}={str(value.get('_target_')).split('.')[-1]}"
            yield from _differences(value, _usual("method", value), f"{within}{name}.")


def _usual(group: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """What conf/<group>/ has for the class that ``_target_`` names: methods.reap.REAP is in reap.yaml."""
    module = str(fields.get("_target_", "")).rpartition(".")[0]
    return _option(group, module.rpartition(".")[2])


@functools.cache
def _option(group: str, name: str) -> Mapping[str, Any]:
    return option(group, name)


def _routing(value: object) -> str:
    if not isinstance(value, str) or value not in ("actual", "paper"):
        raise UserError(f"routing={value} is not one of actual, paper.")
    return str(value)


def _max_memory(value: object) -> MaxMemory:
    if not isinstance(value, Mapping) or not value.keys() <= {"ram", "gpu"}:
        raise UserError(f"max_memory={value} is not known: there are max_memory.ram and max_memory.gpu, in GiB.")
    return MaxMemory(**value)


def _yes_or_no(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{name}={value} is neither true nor false.")
    return value
