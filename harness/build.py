"""Objects from configs: a mapping with ``_target_`` becomes the dataclass it names, checked field by field."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from harness.errors import UserError
from harness.models import ROOT

CONF = ROOT / "conf"
PACKAGES = ("harness", "methods", "tasks")  # whose classes a ``_target_`` may name
# What an object of each group can do: by this a class that belongs to another group is told.
GROUPS = {
    "model": "load",
    "calibration": "tokens",
    "method": "plan",
    "protect": "plan",
    "allocation": "keep",
    "recovery": "remake",
    "suite": "items",
    "serve": "check_plan",
}
MOST_SEED = 2**32 - 1  # what every generator of random numbers takes


def shared(group: str, fields: Mapping[str, Any]) -> Any:
    """One object for all cells that ask for the same, so that its files are read and hashed once."""
    check_mapping(group, fields)
    return _built(group, json.dumps(fields, sort_keys=True))


@functools.cache
def _built(group: str, fields: str) -> Any:
    return build(group, json.loads(fields))


def build(group: str, fields: Mapping[str, Any]) -> Any:
    """An object of the dataclass ``_target_``; a wrong class, parameter or type of value becomes one message."""
    check_mapping(group, fields)
    built = _object(group, fields)
    if not callable(getattr(built, GROUPS[group], None)):
        raise UserError(
            f"{group}: {fields['_target_']} is no {group}: it has no {GROUPS[group]}(). See the files in conf/{group}/."
        )
    return built


def check_mapping(group: str, fields: Any) -> None:
    """Raise UserError unless this is what an option of the group says."""
    if not isinstance(fields, Mapping) or "_target_" not in fields:
        possible = ", ".join(sorted(file.stem for file in (CONF / group).glob("*.yaml")))
        raise UserError(f"{group}={fields} names no {group}. There are {possible}; their files are in conf/{group}/.")


def _object(group: str, fields: Mapping[str, Any]) -> Any:
    kind = _class(group, str(fields["_target_"]))
    given = {name: _value(group, value) for name, value in fields.items() if name != "_target_"}
    types = {field.name: getattr(field.type, "__name__", str(field.type)) for field in dataclasses.fields(kind)}
    for name, value in given.items():
        if name not in types:
            possible = ", ".join(types) or "none"
            raise UserError(f"{group}: {kind.__name__} has no parameter {name!r}. Its parameters are: {possible}.")
        if not _fits(value, types[name]):
            raise UserError(f"{group}: {name}={value} is not of the type {types[name]} that {kind.__name__} needs.")
        if name == "seed":
            check_seed(f"{group}.seed", value)
    try:
        return kind(**given)
    except TypeError as error:  # a parameter is missing
        raise UserError(f"conf/{group}: {error}") from error


def _class(group: str, target: str) -> Any:
    """The dataclass of this name, of the project: importing a module runs it, so no other is touched."""
    if target.split(".")[0] not in PACKAGES:
        raise UserError(
            f"{group}: _target_={target} is not of this project. Name a dataclass of {', '.join(PACKAGES)}, as the "
            f"files in conf/{group}/ do."
        )
    module, _, name = target.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"conf/{group}: there is no class {target}: {error}.") from error
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        raise UserError(f"conf/{group}: {target} is no dataclass, so nothing can be made of it.")
    return kind


def check_seed(name: str, seed: object) -> int:
    """The seed. Raises UserError unless it is one that every generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MOST_SEED:
        raise UserError(f"{name}={seed} is not a whole number from 0 to {MOST_SEED}.")
    return seed


def _value(group: str, value: Any) -> Any:
    """A value as a frozen dataclass holds it: lists as tuples, a mapping with ``_target_`` as the object it names."""
    if isinstance(value, Mapping) and "_target_" in value:
        return _object(group, value)
    return tuple(_value(group, part) for part in value) if isinstance(value, list) else value


def _fits(value: object, annotation: str) -> bool:
    """Whether a value from YAML is of an annotated type such as ``int | None`` or ``tuple[str, ...]``."""
    return any(_is_a(value, part.strip()) for part in annotation.split("|"))


def _is_a(value: object, annotation: str) -> bool:
    """Whether a value is of a plain type, a tuple of such, or, for a type of our own, of a class of that name."""
    kinds = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}
    name, _, parts = annotation.rstrip("]").partition("[")
    if name == "tuple":
        return isinstance(value, tuple) and all(_is_a(part, parts.split(",")[0]) for part in value)
    if isinstance(value, bool):
        return name == "bool"
    if name in kinds:
        return isinstance(value, kinds[name])  # type: ignore[arg-type]
    return any(base.__name__ == name for base in type(value).__mro__)


def option(group: str, name: str) -> dict[str, Any]:
    """What conf/<group>/<name>.yaml says, its defaults list followed and nothing interpolated; empty if there is none.

    Of Hydra's defaults lists it knows what options use: another option of the group, and ``/group@key: option``.
    """
    file = CONF / group / f"{name}.yaml"
    fields: dict[str, Any] = dict(OmegaConf.to_container(OmegaConf.load(file))) if file.exists() else {}  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for entry in fields.pop("defaults", ["_self_"]):
        if entry == "_self_":
            continue
        if isinstance(entry, str):
            found |= option(group, entry)
        else:
            ((place, chosen),) = entry.items()
            source, _, key = place.lstrip("/").partition("@")
            found[key] = option(source, chosen)
    return dict(OmegaConf.to_container(OmegaConf.merge(found, fields)))  # type: ignore[arg-type]


def one_message(error: Exception) -> str:
    """Hydra's message in one line, without its decoration; it already lists the available options."""
    decoration = ("provider=", "object_type=", "reference_type=", "Config search path", "See https", "Set the env")
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(decoration))
    text = re.sub(r"full_key: (\S+)", r"(at \1)", text)
    text = re.sub(r"^Error parsing override '.*?' ", "", text)
    if text.startswith("Could not override"):
        name = text.split("'")[1]
        text = f"There is no setting {name!r}. The groups are {', '.join(_groups())}; their files in conf/ list more."
    return text


def _groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
