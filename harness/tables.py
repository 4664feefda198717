"""Tables of a sweep: pure functions of the tidy frame that `harness.report` makes of its records.

A cell without a record shows "—", a failed one "✗"; neither is ever averaged over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import pandas as pd

from harness.spec import CALIBRATED, Row

NOT_RUN, FAILED = "—", "✗"
CELL = list(Row._fields)
SPEED = ("prompt_tokens", "generated_tokens", "seconds")
DEGENERATE = ("empty", "length_capped", "looping")
EFFORT = {  # columns of the tidy frame: their title and format
    "search_evaluations": ("plans measured", ".0f"),
    "search_gradients": ("batches differentiated", ".0f"),
    "search_tokens": ("search tokens", ",.0f"),
    "seconds_plan": ("plan s", ".1f"),
    "recovery_tokens": ("recovery tokens", ",.0f"),
    "recovery_seconds": ("recovery s", ".1f"),
    "recovery_kl_before": ("held-out KL before", ".4f"),
    "recovery_kl_after": ("after", ".4f"),
}
STAGES = ("calibrate", "barriers", "plan", "recover", "export", "serve", "score")


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


Best = Collection[tuple[tuple[str, ...], str, str]]  # rows, tasks and metrics (`harness.separation.best`)


def complete(tidy: pd.DataFrame) -> pd.DataFrame:
    """What is finished of rows whose seeds have all finished a task: a mean over the others would be another number."""
    names = ["label" if name == "method" else name for name in plan_names(tidy)]
    finished = tidy["status"] == "done"
    return tidy[finished.groupby([tidy[name] for name in (*names, "task")]).transform("all")]


def scores(tidy: pd.DataFrame, best: Best = ()) -> pd.DataFrame:
    """One row per method, ratio and (if there are several) calibration set, one column per task and metric:
    ``value ± standard error (difference)`` in points; the value in bold (Markdown's ``**``) for those in ``best``.

    With several seeds the value is their mean and ± their standard deviation. The difference is from the uncompressed
    model's value on the same task.
    """
    columns = [(task, metric) for task in tidy["task"].unique() for metric in _known_metrics(tidy, task)]
    return _table(
        {
            name: {
                _title(tidy, task, metric): _entry(tidy, group, task, metric, (name, task, metric) in best)
                for task, metric in columns
            }
            for name, group in by_row(tidy, row_names(tidy))
        },
        row_names(tidy),
    )


def _table(rows: dict[tuple[str, ...], dict[str, str]], names: list[str]) -> pd.DataFrame:
    result = pd.DataFrame.from_dict(rows, orient="index")
    result.index = pd.MultiIndex.from_tuples(rows, names=names)
    return result


def _known_metrics(tidy: pd.DataFrame, task: str) -> list[str | None]:
    known = tidy[(tidy["task"] == task) & tidy["metric"].notna()]["metric"].unique().tolist()
    return known or [None]


def _title(tidy: pd.DataFrame, task: str, metric: str | None) -> str:
    if metric is None:
        return task
    numbers = tidy[(tidy["task"] == task) & (tidy["metric"] == metric)]["n"].dropna().unique()
    return f"{task} {metric} (n={', '.join(f'{n:.0f}' for n in numbers)})"


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


def costs(tidy: pd.DataFrame) -> pd.DataFrame:
    """What each row's model holds, and the seconds its stages took (of one seed; scoring summed over tasks)."""
    return _of_one_seed(tidy, _cost)


def _of_one_seed(tidy: pd.DataFrame, describe: Callable[[pd.DataFrame], dict[str, str]]) -> pd.DataFrame:
    """A table of what ``describe`` says of each row's first seed, one line per task."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for name, group in by_row(tidy, plan_names(tidy)):
        rows[name] = describe(first_seed(group[group["status"] == "done"]))
    return _table(rows, plan_names(tidy)).fillna(NOT_RUN)


def first_seed(done: pd.DataFrame) -> pd.DataFrame:
    """A row's first seed, one line per task."""
    return done[done["seed"].isna() | (done["seed"] == done["seed"].min())].drop_duplicates("task")


def _cost(rows: pd.DataFrame) -> dict[str, str]:
    if rows.empty:
        return {}
    row = rows.iloc[0]
    return {
        "experts written per layer": f"{row['size_experts']:g}",
        "distinct": f"{row['size_distinct']:.4g}",
        "MB before": f"{row['original_bytes'] / 1e6:.2f}",
        "MB written": f"{row['size_bytes'] / 1e6:.2f}",
        "MB distinct": f"{row['size_distinct_bytes'] / 1e6:.2f}",
        **{f"{stage} s": f"{row[f'seconds_{stage}']:.1f}" for stage in STAGES[:-1] if _took(rows, stage)},
        "score s": f"{rows['seconds_score'].sum():.1f}",
        "calibrate peak MB": _number(
            row.reindex(["peak_gpu", "peak_ram"]).dropna().head(1).sum(min_count=1), 1e-6, ".0f"
        ),
    }


def effort(tidy: pd.DataFrame) -> pd.DataFrame:
    """What each row's search and recovery took besides calibration; of seeds, their mean. Nothing if there are none."""
    done = complete(tidy)
    known = [column for column in EFFORT if column in done and done[column].notna().any()]
    if known in ([], ["seconds_plan"]):
        return pd.DataFrame()
    rows = {
        name: {EFFORT[column][0]: _mean_of(group.drop_duplicates(CELL), column) for column in known}
        for name, group in by_row(done, plan_names(tidy))
    }
    return _table(rows, plan_names(tidy))


def _mean_of(rows: pd.DataFrame, column: str) -> str:
    return _number(rows[column].astype(float).mean(), 1, EFFORT[column][1])


def _took(rows: pd.DataFrame, stage: str) -> bool:
    """Whether a stage is to be shown; barriers and recovery only where some row has them."""
    usual = stage not in ("barriers", "recover")
    return usual or float(rows.get(f"seconds_{stage}", pd.Series([0.0])).sum()) > 0


def serving(tidy: pd.DataFrame) -> pd.DataFrame:
    """How each row was served, in what memory and how fast, and how many answers of all its tasks are degenerate (of
    one seed). Rows whose routers were only masked have neither size nor speed.
    """
    return _of_one_seed(tidy, _serving)


def _serving(rows: pd.DataFrame) -> dict[str, str]:
    if rows.empty or "served_how" not in rows:
        return {}
    measured = rows.reindex(columns=[f"served_{name}" for name in SPEED]).sum(min_count=1)
    tokens, generated, seconds = measured
    first = rows["served_first_token_s"].mean() if "served_first_token_s" in rows else math.nan
    counts = {name: rows[f"count_{name}"].sum() for name in DEGENERATE if f"count_{name}" in rows}
    return {
        "served by": ", ".join(dict.fromkeys(rows["served_how"].dropna())),
        "MB in memory": _number(rows["served_weight_bytes"].iloc[0], 1e-6, ".2f"),
        "tokens/s": _number((tokens + generated) / seconds, 1, ".0f"),
        "generated/s": _number(generated / seconds, 1, ".0f"),
        "first token ms": _number(first, 1e3, ".0f"),
        **{name.replace("_", " "): f"{value:.0f}" for name, value in counts.items()},
    }


def _number(value: float | None, factor: float, form: str) -> str:
    return NOT_RUN if value is None or math.isnan(value) else f"{value * factor:{form}}"


def errors(tidy: pd.DataFrame) -> pd.DataFrame:
    """Reconstruction error of each compressed row: the mean over layers, and each layer's own; of seeds, their mean."""
    layers = [str(column) for column in tidy if str(column).startswith("reconstruction_layer_")]
    titles = {
        "reconstruction": "mean error",
        **{column: column.replace("reconstruction_layer_", "layer ") for column in layers},
    }
    rows = {
        name: {title: f"{group.drop_duplicates(CELL)[column].mean():.4f}" for column, title in titles.items()}
        for name, group in by_row(tidy, plan_names(tidy))
        if "reconstruction" in tidy and group["reconstruction"].notna().all()
    }
    return _table(rows, plan_names(tidy)) if rows else pd.DataFrame()


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
    return {title + _uncompressed(whole, title): _by_ratio(column) for title, column in columns.items()}


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


def agreement(tidy: pd.DataFrame) -> str:
    """How well the reconstruction error of a row foretells its scores: Spearman's rank correlation over the compressed
    rows of one model and ratio, the mean over these. -1: the larger the error, the lower the score, without exception.
    """
    done = tidy[(tidy["status"] == "done") & (tidy["ratio"] > 0)]
    if "reconstruction" not in done or not is_by_ratio(tidy):
        return ""
    parts = []
    for (task, metric), rows in done.groupby(["task", "metric"], sort=False):
        means = rows.groupby([name for name in CELL if name != "seed"])[["reconstruction", "value"]].mean()
        found = [_rank_correlation(group) for _, group in means.groupby(["model", "ratio"])]
        if known := [value for value in found if not math.isnan(value)]:
            parts.append(f"{task} {metric} {sum(known) / len(known):+.2f}")
    if not parts:
        return ""
    return "Rank correlation of the reconstruction error with the score, within a ratio: " + ", ".join(parts) + "."


def _rank_correlation(group: pd.DataFrame) -> float:
    """NaN where all scores are equal, and no order can be told."""
    if group["value"].nunique() < 2 or group["reconstruction"].nunique() < 2:
        return math.nan
    return float(group["reconstruction"].corr(group["value"], method="spearman"))


def footer(tidy: pd.DataFrame) -> str:
    done = tidy[tidy["status"] == "done"]
    records = len(done.drop_duplicates([*CELL, "task"]))
    scores_line = (
        "Scores in points ± standard error over the n items (± standard deviation where a row averages several seeds)"
    )
    cells_line = f"{NOT_RUN} not run, {FAILED} failed."
    if is_by_ratio(tidy):
        scores_line += "; a column for each share of the experts removed."
    else:
        scores_line += "; in brackets the difference from the uncompressed model."
        cells_line += (
            " Merged experts are copied to every router row a stock checkpoint needs: 'MB written' is that checkpoint, "
            "'MB distinct' what it would be if each distinct expert were stored once."
        )
    errors_line = (
        "Reconstruction error: squared error of a MoE block's output over its squared size, on held-out calibration "
        "tokens, routed anew."
    )
    bold_line = (
        "Bold: better than every other row of its model and ratio on the same items by more than chance (5 %, paired, "
        "corrected after Holm); where none is bold, no best was found."
    )
    lines = [
        scores_line,
        bold_line,
        cells_line,
        errors_line,
        agreement(tidy),
        stage_times(tidy),
        f"{records} records; {made_by(done)}.",
    ]
    return "\n".join(line for line in lines if line)


def stage_times(tidy: pd.DataFrame) -> str:
    """Seconds of each stage over the whole sweep: calibration once per pass, serving once per plan."""
    done = tidy[tidy["status"] == "done"].drop_duplicates([*CELL, "task"])
    if done.empty:
        return "No stage has run."
    plans = done.drop_duplicates(CELL)
    seconds = {
        "calibrate": sum(plans["seconds_calibrate"].unique()),
        **{
            stage: plans[f"seconds_{stage}"].sum()
            for stage in ("barriers", "plan", "recover", "reconstruct", "export", "serve")
            if f"seconds_{stage}" in plans and _took(plans, stage)
        },
        "score": done["seconds_score"].sum(),
    }
    return "Seconds in all: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()) + "."


def made_by(done: pd.DataFrame) -> str:
    """Commits, machines and versions of the records of these rows."""
    return ", ".join(_distinct(done, column) for column in ("commit", "machine", "versions"))


def _distinct(tidy: pd.DataFrame, column: str) -> str:
    return ", ".join(str(value) for value in tidy[column].dropna().unique()) if column in tidy else "none"


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
