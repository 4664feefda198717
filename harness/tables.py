"""Tables of a sweep's scores: pure functions of the tidy frame that `harness.report` makes of its records.

A cell without a record shows "—", a failed one "✗"; neither is ever averaged over.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import pandas as pd

from harness.cost_tables import costs, effort, errors, serving
from harness.rows import FAILED, NOT_RUN, by_row, row_names, table_of

Best = Collection[tuple[tuple[str, ...], str, str]]  # rows, tasks and metrics (`harness.separation.best`)


def scores(tidy: pd.DataFrame, best: Best = ()) -> pd.DataFrame:
    """One row per method, ratio and (if there are several) calibration set, one column per task and metric:
    ``value ± standard error (difference)`` in points; the value in bold (Markdown's ``**``) for those in ``best``.

    With several seeds the value is their mean and ± their standard deviation. The difference is from the uncompressed
    model's value on the same task.
    """
    columns = [(task, metric) for task in tidy["task"].unique() for metric in _known_metrics(tidy, task)]
    return table_of(
        {
            name: {
                _title(tidy, task, metric): _entry(tidy, group, task, metric, (name, task, metric) in best)
                for task, metric in columns
            }
            for name, group in by_row(tidy, row_names(tidy))
        },
        row_names(tidy),
    )


def _known_metrics(tidy: pd.DataFrame, task: str) -> list[str | None]:
    known = tidy[(tidy["task"] == task) & tidy["metric"].notna()]["metric"].unique().tolist()
    return known or [None]


def _title(tidy: pd.DataFrame, task: str, metric: str | None) -> str:
    if metric is None:
        return task
    rows = tidy[(tidy["task"] == task) & (tidy["metric"] == metric)]
    numbers = rows["n"].dropna().unique()
    whole = rows["whole"].max() if "whole" in rows else 0
    part = f" of {whole:.0f}" if whole and whole > numbers.min() else ""
    return f"{task} {metric} (n={', '.join(f'{n:.0f}' for n in numbers)}{part})"


def _entry(tidy: pd.DataFrame, group: pd.DataFrame, task: str, metric: str | None, is_best: bool) -> str:
    here = group[group["task"] == task]
    seeds = here["seed"].nunique(dropna=False)
    failed, absent = here[here["status"] == "failed"], here[here["status"] == "not run"]
    if len(failed) or len(absent) or metric is None:
        mark = FAILED if len(failed) else NOT_RUN
        missing = pd.concat([failed, absent])["seed"].nunique(dropna=False)
        return mark if seeds == 1 else f"{mark} {missing} of {seeds} seeds"
    values = here[here["metric"] == metric]
    spread = values["stderr"].iloc[0] if len(values) == 1 else values["value"].std(ddof=1)
    text = f"{100 * values['value'].mean():.1f} ± {100 * spread:.1f}"
    text = f"**{text}**" if is_best else text
    base = _baseline(tidy[tidy["model"] == group["model"].iloc[0]], task, metric)
    if base is None or (group["ratio"] == 0).all():
        return text
    return f"{text} ({100 * (values['value'].mean() - base):+.1f})"


def _baseline(tidy: pd.DataFrame, task: str, metric: str) -> float | None:
    rows = tidy[(tidy["ratio"] == 0) & (tidy["task"] == task) & (tidy["metric"] == metric)]
    return float(rows["value"].iloc[0]) if len(rows) else None


def all_of(tidy: pd.DataFrame, best: Best = ()) -> dict[str, pd.DataFrame]:
    """The tables of a sweep by what they show: a row for every cell or, of many ratios, a column for every ratio."""
    shown, wrong = scores(tidy, best), errors(tidy)
    if not is_by_ratio(tidy):
        made = {
            "scores": shown,
            "costs": costs(tidy),
            "search and recovery": effort(tidy),
            "serving": serving(tidy),
            "errors": wrong,
        }
        return {name: table for name, table in made.items() if len(table)}
    whole = shown[shown.index.get_level_values("ratio") == "0"]
    columns = {str(title): shown[title].drop(whole.index) for title in shown}
    if len(wrong):
        columns["mean reconstruction error of the layers"] = wrong["mean error"]
    made = {title + _uncompressed(whole, title): _by_ratio(column) for title, column in columns.items()}
    took = effort(tidy)
    return made | ({"search and recovery": took} if len(took) else {})


def is_by_ratio(tidy: pd.DataFrame) -> bool:
    """Whether there are so many ratios that tables have a column for each."""
    return len(set(tidy["ratio"]) - {0}) > 2


def _by_ratio(column: pd.Series) -> pd.DataFrame:
    """One column of a table, its ratios side by side. What a cell loses is said by the uncompressed row alone."""
    values = column.str.replace(r" \(.*\)$", "", regex=True)
    order = dict.fromkeys(name[:-1] for name in column.index)  # rows as they were; the ratio is the last name
    table = values.unstack("ratio").loc[list(order)].fillna(NOT_RUN)
    return table[sorted(table, key=lambda ratio: float(str(ratio)))]


def _uncompressed(whole: pd.DataFrame, title: str) -> str:
    """What the uncompressed model scores there, for a title; of several models, each by its name."""
    if title not in whole or whole.empty:
        return ""
    values = dict(zip(whole.index.get_level_values("model"), whole[title], strict=True))
    return "; uncompressed " + ", ".join(f"{m} {v}" if len(values) > 1 else v for m, v in values.items())


def failures(tidy: pd.DataFrame) -> list[str]:
    """One line for each failed cell: what failed and the last line of why."""
    failed = tidy[tidy["status"] == "failed"]
    return [
        f"{FAILED} {row['label']} ratio={row['ratio']:.4g} {row['task']}: {str(row['error']).strip().splitlines()[-1]}"
        for _, row in failed.iterrows()
    ]


def text(made: Mapping[str, pd.DataFrame]) -> str:
    """The tables in Markdown; those by ratio each under what it shows."""
    if "scores" in made:
        return "\n\n".join(map(markdown, made.values()))
    return "\n\n".join(f"**{title}**\n\n{markdown(table)}" for title, table in made.items())


def markdown(table: pd.DataFrame) -> str:
    return str(table.reset_index().to_markdown(index=False, disable_numparse=True))


def latex(table: pd.DataFrame, caption: str) -> str:
    """booktabs, without the index, with the signs LaTeX spells differently."""
    written = table.to_latex(index=False, escape=True, caption=caption.replace("_", r"\_"))
    for sign, spelling in {"±": r"$\pm$", NOT_RUN: "--", FAILED: r"$\times$"}.items():
        written = written.replace(sign, spelling)
    return re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", written)
