"""Tables of what rows cost: sizes and seconds, search and recovery, serving, and errors of reconstruction."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd

from harness import phases
from harness.rows import CELL, NOT_RUN, by_row, complete, first_seed, plan_names, table_of

SPEED = ("prompt_tokens", "generated_tokens", "seconds")
DEGENERATE = ("empty", "length_capped", "looping", *phases.COUNTS)
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


def costs(tidy: pd.DataFrame) -> pd.DataFrame:
    """What each row's model holds, and the seconds its stages took (of one seed; scoring summed over tasks)."""
    return _of_one_seed(tidy, _cost)


def _of_one_seed(tidy: pd.DataFrame, describe: Callable[[pd.DataFrame], dict[str, str]]) -> pd.DataFrame:
    """A table of what ``describe`` says of each row's first seed, one line per task."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for name, group in by_row(tidy, plan_names(tidy)):
        rows[name] = describe(first_seed(group[group["status"] == "done"]))
    return table_of(rows, plan_names(tidy)).fillna(NOT_RUN)


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
        **{f"{stage} s": f"{row[f'seconds_{stage}']:.1f}" for stage in STAGES[:-1] if _is_shown(rows, stage)},
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
    return table_of(rows, plan_names(tidy))


def _mean_of(rows: pd.DataFrame, column: str) -> str:
    return _number(rows[column].astype(float).mean(), 1, EFFORT[column][1])


def _is_shown(rows: pd.DataFrame, stage: str) -> bool:
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
    return table_of(rows, plan_names(tidy)) if rows else pd.DataFrame()


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
            if f"seconds_{stage}" in plans and _is_shown(plans, stage)
        },
        "score": done["seconds_score"].sum(),
    }
    return "Seconds in all: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()) + "."
