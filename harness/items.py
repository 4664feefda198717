"""Scores item by item: what every seed of every row of a sweep is worth on every problem of every benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from harness import scoring
from harness.errors import StageError
from harness.spec import Row
from harness.sweep import Sweep
from tasks import Item

Items = Mapping[tuple[Row, str], Sequence[Item]]  # by cell and task
Values = Mapping[tuple[Row, str, str], Mapping[str, float]]  # by cell, task and metric: worth of each item, by its id


def read(sweep: Sweep) -> Items:
    """Of every cell that has a score, in the order of the sweep. Cells whose samples were deleted are left out."""
    found: dict[tuple[Row, str], Sequence[Item]] = {}
    for cell in sweep.cells:
        for task in cell.tasks:
            if (cell.row, task.name) in found:
                continue
            try:
                found[cell.row, task.name] = task.items(scoring.samples(cell, task, sweep.store))
            except (StageError, OSError):
                continue
    return found


def values(known: Items) -> Values:
    found: dict[tuple[Row, str, str], dict[str, float]] = {}
    for (row, task), items in known.items():
        for item in items:
            for metric, value in item.values.items():
                found.setdefault((row, task, metric), {})[item.id] = value
    return found


def rows_of(group: pd.DataFrame) -> list[Row]:
    """The cells of a part of the tidy frame, seed by seed."""
    seeds: list[dict[Any, Any]] = group[[*Row._fields]].drop_duplicates().sort_values("seed").to_dict("records")
    return [Row(**{**row, "seed": None if pd.isna(row["seed"]) else int(row["seed"])}) for row in seeds]


def matrix(known: Values, rows: Sequence[Row], task: str, metric: str) -> np.ndarray | None:
    """Values [seeds, items], items in the order of their ids; None unless every seed has all of them."""
    parts = [known.get((row, task, metric)) for row in rows]
    if not parts or any(part is None or part.keys() != (parts[0] or {}).keys() for part in parts):
        return None
    return np.array([[part[item] for item in sorted(part)] for part in parts if part is not None])
