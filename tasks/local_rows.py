"""Rows of benchmarks in local files, looked at before a model is asked anything: one bad row would cost the run."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError

KINDS = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a mapping"}


def rows(label: str, file: Path) -> list[dict[str, Any]]:
    """Every row of a file of JSON lines. Raises UserError, naming the line, unless each is a JSON object."""
    found: list[dict[str, Any]] = []
    try:
        lines = file.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{label}: {file} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{label}: {file}, line {number} is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise UserError(f"{label}: {file}, line {number} is {kind(row)}, not a JSON object.")
        found.append(row)
    if not found:
        raise UserError(f"{label}: {file} holds no row, so there is nothing to ask.")
    return found


def check_alike(label: str, file: Path, given: Sequence[Mapping[str, Any]], fields: Collection[str]) -> None:
    """Raise UserError unless each of these fields is of one kind in all rows, and in none of them missing or null. A
    field that no row has is none of theirs.
    """
    for field in sorted(fields):
        kinds = [kind(row.get(field)) for row in given]
        first = next((known for known in kinds if known != "nothing"), None)
        for number, found in enumerate(kinds, 1):
            if first is not None and found != first:
                raise UserError(f"{label}: {file}, row {number}: {field} is {found}, and {first} in others.")


def kind(value: Any) -> str:
    """What a value of JSON is, in words."""
    return KINDS.get(type(value), "nothing")
