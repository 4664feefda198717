"""Which differences of a sweep are more than chance: tables of `harness.significance` over its items.

Each row against the uncompressed model, all rows of one column being one family of tests (Holm); and, for one model and
ratio, the best row against every other, which alone makes a number bold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.items import Values, matrix, rows_of
from harness.rows import NOT_RUN, by_row, row_names
from harness.significance import LEVEL, Difference, difference, holm, interval

NO_DIFFERENCE = "no difference found"


@dataclass(frozen=True)
class Column:
    """One metric of one task of one model: values [seeds, items] by the table's row name, and its better direction."""

    model: str
    task: str
    metric: str
    higher_is_better: bool
    base: np.ndarray | None
    rows: dict[tuple[str, ...], np.ndarray]
    ratios: dict[tuple[str, ...], float]


def columns(tidy: pd.DataFrame, known: Values) -> Iterator[Column]:
    """Every column whose items are known, for each model."""
    done = tidy[tidy["status"] == "done"]
    for names, part in done.groupby(["model", "task", "metric"], sort=False):
        model, task, metric = map(str, names)
        rows: dict[tuple[str, ...], np.ndarray] = {}
        ratios: dict[tuple[str, ...], float] = {}
        base = None
        here = tidy[(tidy["model"] == model) & (tidy["task"] == task)]
        for name, group in by_row(here, row_names(tidy)):
            found = matrix(known, rows_of(group), task, metric)
            if found is None:
                continue
            if (group["ratio"] == 0).all():
                base = found
            else:
                rows[name], ratios[name] = found, float(group["ratio"].iloc[0])
        yield Column(model, task, metric, bool(part["higher_is_better"].iloc[0]), base, rows, ratios)


def against_uncompressed(tidy: pd.DataFrame, known: Values) -> pd.DataFrame:
    """One line per row, task and metric: the paired difference from the uncompressed model, and what to make of it."""
    lines = []
    for column in columns(tidy, known):
        base = column.base
        if base is None or not column.rows:
            continue
        found = {name: difference(values, base) for name, values in column.rows.items() if _alike(values, base)}
        corrected = holm([one.p for one in found.values()])
        for (name, one), p in zip(found.items(), corrected, strict=True):
            lines.append((*name, f"{column.task} {column.metric}", *_cells(one, p, column.higher_is_better)))
    head = ["task", "difference, points (95 %)", "lost", "won", "n", "p", "test", "verdict"]
    return pd.DataFrame(lines, columns=[*row_names(tidy), *head])


def _alike(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether they can be compared: the same items; the same number of seeds, or one side without."""
    return first.shape[1] == second.shape[1] and (len(first) == len(second) or 1 in (len(first), len(second)))


def _cells(one: Difference, p: float, higher_is_better: bool) -> tuple[str, ...]:
    verdict = NO_DIFFERENCE
    if p < LEVEL:
        verdict = "better" if (one.mean > 0) == higher_is_better else "worse"
    lost, won = (NOT_RUN if value is None else str(value) for value in (one.lost, one.won))
    reach = f"{100 * one.mean:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})"
    return reach, lost, won, str(one.n), p_value(p), one.test, verdict


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def over_seeds(tidy: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % interval over seeds, in points, of every row, task and metric whose seeds all have scores."""
    lines = []
    done = tidy[(tidy["status"] == "done") & (tidy["ratio"] > 0)]
    for (task, metric), part in done.groupby(["task", "metric"], sort=False):
        asked = tidy[tidy["task"] == task]
        wanted = {name: group["seed"].nunique() for name, group in by_row(asked, row_names(tidy))}
        for name, group in by_row(part, row_names(tidy)):
            if len(group) == wanted[name] > 1:
                low, high = interval(group["value"].tolist())
                reach = f"{100 * group['value'].mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"
                lines.append((*name, f"{task} {metric}", reach, str(len(group))))
    return pd.DataFrame(lines, columns=[*row_names(tidy), "task", "mean, points (95 % over seeds)", "seeds"])


def best(tidy: pd.DataFrame, known: Values) -> set[tuple[tuple[str, ...], str, str]]:
    """(row, task, metric) of every row that is better than each other row of its model and ratio, by more than chance
    (Holm over those comparisons). Where the first is not separated from the second, nobody is best.
    """
    found = set()
    for column in columns(tidy, known):
        for ratio in set(column.ratios.values()):
            names = [name for name in column.rows if column.ratios[name] == ratio]
            winner = _winner({name: column.rows[name] for name in names}, column.higher_is_better)
            if winner is not None:
                found.add((winner, column.task, column.metric))
    return found


def _winner(rows: dict[tuple[str, ...], np.ndarray], higher_is_better: bool) -> tuple[str, ...] | None:
    if len(rows) < 2:
        return None
    sign = 1 if higher_is_better else -1
    first, *others = sorted(rows, key=lambda name: -sign * rows[name].mean())
    if not all(_alike(rows[first], rows[other]) for other in others):
        return None
    gaps = [difference(rows[first], rows[other]) for other in others]
    separated = all(p < LEVEL for p in holm([gap.p for gap in gaps]))
    return first if separated and all(sign * gap.mean > 0 for gap in gaps) else None
