"""What stands under a sweep's tables: how to read them, how far errors foretell scores, time, and who made them."""

from __future__ import annotations

import math

import pandas as pd

from harness.cost_tables import stage_times
from harness.rows import CELL, FAILED, NOT_RUN
from harness.tables import is_by_ratio


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


def made_by(done: pd.DataFrame) -> str:
    """Commits, machines and versions of the records of these rows."""
    return ", ".join(_distinct(done, column) for column in ("commit", "machine", "versions"))


def _distinct(tidy: pd.DataFrame, column: str) -> str:
    return ", ".join(str(value) for value in tidy[column].dropna().unique()) if column in tidy else "none"
