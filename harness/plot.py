"""The plot of a sweep: score against ratio, one line per method, the uncompressed model's line drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from harness.rows import complete, row_names
from harness.spec import CALIBRATED


def plot(tidy: pd.DataFrame, suffix: str, path: Path) -> None:
    """One panel per model, task and metric from the tidy frame of `harness.report.frame`, written as ``suffix``.

    A line is a method (on one calibration set, where there are several). A point stands for all its seeds or is not
    drawn.
    """
    done = complete(tidy).assign(label=lambda rows: _lines(tidy)[rows.index])
    tidy = tidy.assign(label=_lines(tidy))
    panels = list(done[["model", "task", "metric"]].drop_duplicates().itertuples(index=False, name=None))
    labels = [label for label in tidy["label"].unique() if (tidy[tidy["label"] == label]["ratio"] > 0).any()]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    for axes, (model, task, metric) in zip(grid.flat, panels, strict=False):
        here = (done["model"] == model) & (done["task"] == task) & (done["metric"] == metric)
        draw(axes, done[here], labels)
        axes.set_title(f"{model}: {task} {metric}", fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    handles, names = grid.flat[0].get_legend_handles_labels()
    entry = 0.55 + 0.07 * max(map(len, names), default=0)  # inches that the longest name takes, with its line
    beside = max(1, min(len(names), 7, int(4.2 * columns / entry)))
    figure.legend(handles, names, loc="outside lower center", ncols=beside, frameon=False, fontsize=9)
    figure.savefig(path, format=suffix, dpi=150)
    plt.close(figure)


def _lines(tidy: pd.DataFrame) -> pd.Series:
    return named(tidy, row_names(tidy))["label"]


def named(tidy: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Labels that also say how a plan was calibrated, as far as that is among these names."""
    labels = tidy["label"]
    for column, word in zip(CALIBRATED, ("on", "routing"), strict=True):
        if column in names:
            labels = labels.where(tidy[column] == "none", labels + f" {word} " + tidy[column])
    return tidy.assign(label=labels)


def colours(tidy: pd.DataFrame) -> dict[str, str]:
    """The same colour for a method in every figure of a sweep; grey for the uncompressed model."""
    labels = tidy[["label", "ratio"]].groupby("label", sort=False)["ratio"].max()
    compressed = [str(label) for label, ratio in labels.items() if ratio > 0]
    whole = {str(label): "0.3" for label in labels.index}
    return whole | {label: f"C{position % 10}" for position, label in enumerate(compressed)}


def draw(axes: Axes, rows: pd.DataFrame, labels: list[str]) -> None:
    """Score in points against the share of experts removed; error bars as in the table. More lines than there are
    colours go on with dashes.
    """
    for position, label in enumerate(labels):
        of_label = rows[rows["label"] == label].sort_values("ratio")
        if of_label.empty:
            continue
        groups = of_label.groupby("ratio")
        spread = groups["value"].std(ddof=1).fillna(groups["stderr"].first())
        axes.errorbar(
            100 * groups["ratio"].first(),
            100 * groups["value"].mean(),
            yerr=100 * spread,
            label=label,
            color=f"C{position % 10}",
            linestyle=["-", "--", ":"][position // 10 % 3],
            marker="osv^Dp*X"[position % 8],
            markersize=5,
            capsize=2,
            linewidth=1.3,
        )
    uncompressed = rows[rows["ratio"] == 0]
    if len(uncompressed):
        axes.axhline(
            100 * uncompressed["value"].iloc[0],
            color="0.3",
            linestyle="--",
            linewidth=1,
            label="uncompressed",
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("experts removed, %")
    axes.set_ylabel("score, points")
    axes.grid(alpha=0.25)
