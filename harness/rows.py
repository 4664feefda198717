"""The rows of tables and figures: how they are named, and which part of the tidy frame belongs to each.

The tidy frame is what `harness.report` makes of a sweep's records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from harness.spec import CALIBRATED, Row

NOT_RUN, FAILED = "—", "✗"
CELL = list(Row._fields)


def by_row(tidy: pd.DataFrame, names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """A table's rows by these names, each with its part of the tidy frame: all seeds, tasks and metrics."""
    columns = ["label" if name == "method" else name for name in names]
    for values, group in tidy.groupby(columns, sort=False):
        yield tuple(f"{v:.4g}" if name == "ratio" else str(v) for name, v in zip(names, values, strict=True)), group


def plan_names(tidy: pd.DataFrame) -> list[str]:
    """What names a plan: how a method was calibrated only where there are several ways to tell apart."""
    several = [column for column in CALIBRATED if len(set(tidy[column]) - {"none"}) > 1]
    return ["model", "method", *several, "ratio"]


def row_names(tidy: pd.DataFrame) -> list[str]:
    """What names a row of scores: the same, but for experiments that calibrate each task on a text of its own; their
    row holds the scores of several plans.
    """
    read = {column: tidy[tidy[column] != "none"] for column in CALIBRATED}
    each = ["model", "label", "ratio", "task"]
    several = [name for name, rows in read.items() if (rows.groupby(each)[name].nunique() > 1).any()]
    return ["model", "method", *several, "ratio"]


def complete(tidy: pd.DataFrame) -> pd.DataFrame:
    """What is finished of rows whose seeds have all finished a task: a mean over the others would be another number."""
    names = ["label" if name == "method" else name for name in plan_names(tidy)]
    finished = tidy["status"] == "done"
    return tidy[finished.groupby([tidy[name] for name in (*names, "task")]).transform("all")]


def first_seed(done: pd.DataFrame) -> pd.DataFrame:
    """A row's first seed, one line per task."""
    return done[done["seed"].isna() | (done["seed"] == done["seed"].min())].drop_duplicates("task")


def table_of(rows: dict[tuple[str, ...], dict[str, str]], names: list[str]) -> pd.DataFrame:
    """A table with these rows by their names: entries by the title of their column."""
    result = pd.DataFrame.from_dict(rows, orient="index")
    result.index = pd.MultiIndex.from_tuples(rows, names=names)
    return result
