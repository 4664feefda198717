"""Objects from configs: a mapping with ``_target_`` becomes the dataclass it names, checked field by field."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import OmegaConf

from harness.errors import UserError
from harness.models import ROOT

CONF = ROOT / "conf"


def shared(group: str, fields: Mapping[str, Any]) -> Any:
    """One object for all cells that ask for the same, so that its files are read and hashed once."""
    return _built(group, json.dumps(fields, sort_keys=True))


@functools.cache
def _built(group: str, fields: str) -> Any:
    return build(group, json.loads(fields))


def build(group: str, fields: Mapping[str, Any]) -> Any:
    """An object of the dataclass ``_target_``; a wrong class, parameter or type of value becomes one message."""
    try:
        kind = get_class(str(fields["_target_"]))
    except (HydraException, ImportError, KeyError, ValueError) as error:
        raise UserError(f"conf/{group}: there is no class {fields.get('_target_')}: {error}") from error
    given = {name: _value(group, value) for name, value in fields.items() if name != "_target_"}
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


def _value(group: str, value: Any) -> Any:
    """A value as a frozen dataclass holds it: lists as tuples, a mapping with ``_target_`` as the object it names."""
    if isinstance(value, Mapping) and "_target_" in value:
        return build(group, value)
    return tuple(value) if isinstance(value, list) else value


def _fits(value: object, annotation: str) -> bool:
    """Whether a value from YAML is of an annotated type such as ``int | None`` or ``tuple[str, ...]``."""
    kinds = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None), "tuple": tuple}
    names = [part.strip().split("[")[0] for part in annotation.split("|")]
    if isinstance(value, bool):
        return "bool" in names
    return any(_is_a(value, name, kinds.get(name)) for name in names)


def _is_a(value: object, name: str, kind: Any) -> bool:
    """Whether a value is of a plain type, or, for a type of our own, of a class of that name."""
    return isinstance(value, kind) if kind else any(base.__name__ == name for base in type(value).__mro__)


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
    if text.startswith("Error parsing override"):
        text += ". Give settings as name=value, for example method=reap ratio=0.25."
    if text.startswith("Could not override"):
        name = text.split("'")[1]
        text = f"There is no setting {name!r}. The groups are {', '.join(_groups())}; their files in conf/ list more."
    return text


def _groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir())
