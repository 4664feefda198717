"""Figures of a sweep beside the plot of its scores, each a pure function of records and plans on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from harness import plan as plans
from harness import stages
from harness.plan import LayerPlan, Plan
from harness.plot import colours as colours_of
from harness.plot import named
from harness.rows import CELL, by_row, complete, first_seed, plan_names, row_names
from harness.sweep import Sweep

MAPS = 24  # plans whose experts are drawn: more cannot be told apart on a page
STAGES = ("calibrate", "barriers", "plan", "recover", "reconstruct", "export", "serve", "score")


class Figure(NamedTuple):
    """title and caption: words. draw: writes it in a format (png, pdf) to a path."""

    title: str
    caption: str
    draw: Callable[[str, Path], None]


def of_sweep(sweep: Sweep, tidy: pd.DataFrame) -> Iterator[Figure]:
    """Those that the sweep has something to show in."""
    done = complete(named(tidy, plan_names(tidy)))
    compressed = done[done["ratio"] > 0]
    if "reconstruction" in compressed and compressed["reconstruction"].notna().any():
        yield Figure(
            "Reconstruction error by layer",
            "Squared error of each MoE block's output over its squared size on held-out calibration tokens, routed "
            "anew; the mean over seeds.",
            lambda suffix, path: _errors_by_layer(compressed, suffix, path),
        )
    if found := _plans(sweep):
        yield Figure(
            "What each method kept",
            "A square for every expert (across) of every MoE layer (down): kept bit for bit, merged with others, or "
            f"dropped. First seed{f', the first {MAPS} plans' if len(found) > MAPS else ''}.",
            lambda suffix, path: _kept(dict(list(found.items())[:MAPS]), suffix, path),
        )
    if len(compressed):
        yield Figure(
            "Cost",
            "Seconds of each stage until a row had its scores, of one seed; calibration is shared by the methods that "
            "read the same statistics and shown in full for each of them.",
            lambda suffix, path: _cost(done, suffix, path),
        )
        yield Figure(
            "Score against size",
            "Score and bytes of the distinct weights that each row leaves. Every model of the sweep has its own marks: "
            "a quantised checkpoint as a second model shows quantisation beside pruning.",
            lambda suffix, path: _by_size(done, suffix, path),
        )
    whole = complete(tidy)
    if "calibration" in row_names(tidy) and tidy["routing"].nunique() <= 2:  # "none" and one way
        yield Figure(
            "Effect of the calibration text",
            "Score in points by calibration text, the mean over seeds; grey: the text is not read or it was not run.",
            lambda suffix, path: _by_calibration(whole[whole["ratio"] > 0], suffix, path),
        )


def _save(figure: Canvas, suffix: str, path: Path) -> None:
    figure.savefig(path, format=suffix, dpi=130)
    plt.close(figure)


def _errors_by_layer(compressed: pd.DataFrame, suffix: str, path: Path) -> None:
    layers = [str(name) for name in compressed if str(name).startswith("reconstruction_layer_")]
    numbers = [int(name.rpartition("_")[2]) for name in layers]
    panels = list(compressed[["model", "ratio"]].drop_duplicates().itertuples(index=False, name=None))
    figure, grid = _grid(len(panels))
    colours = colours_of(compressed)
    for axes, (model, ratio) in zip(grid, panels, strict=False):
        here = compressed[(compressed["model"] == model) & (compressed["ratio"] == ratio)].drop_duplicates(CELL)
        for label, rows in here.groupby("label", sort=False):
            values = rows[layers].mean()
            axes.plot(numbers, values, marker="o", markersize=3.5, label=label, color=colours[str(label)])
        axes.set_title(f"{model}, {100 * ratio:.4g} % removed", fontsize=10)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("relative squared error")
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
    _legend(figure, grid[0])
    _save(figure, suffix, path)


def _grid(panels: int) -> tuple[Canvas, list[Axes]]:
    """Axes for so many panels, at most three in a row."""
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.3 * rows), squeeze=False, layout="constrained")
    for axes in list(grid.flat)[panels:]:
        axes.set_visible(False)
    return figure, list(grid.flat)


def _legend(figure: Canvas, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 7), frameon=False, fontsize=9)


def _plans(sweep: Sweep) -> dict[str, Plan]:
    """Plans of compressed cells that are in the store, by the words that name their row; the first seed's."""
    found: dict[str, Plan] = {}
    for cell in sweep.cells:
        on = f" on {cell.calibration.name}" if cell.calibrates else ""
        on += f" routing {cell.routing}" if on and cell.routing != "actual" else ""
        name = f"{cell.label}, {100 * cell.ratio:.4g} %{on}"
        if not cell.compresses or cell.recovery is not None or name in found:
            continue
        file = stages.plan_file(cell, sweep.store)
        if file.exists():
            found[name] = plans.from_json(file.read_text())
    calibrations = {name.rpartition(" on ")[2] for name in found if " on " in name}
    return {name.rpartition(" on ")[0] or name if len(calibrations) < 2 else name: plan for name, plan in found.items()}


DROPPED, MERGED, KEPT = 0, 1, 2


def fates(layer: LayerPlan) -> np.ndarray:
    """What becomes of each expert, int [E]: 2 kept bit for bit, 1 part of a mean, 0 in no slot."""
    fate = np.full(len(layer.routes), DROPPED)
    for slot in layer.slots:
        for source in slot:
            fate[source.expert] = KEPT if len(slot) == 1 else MERGED
    return fate


def _kept(found: Mapping[str, Plan], suffix: str, path: Path) -> None:
    maps = {name: np.stack([fates(layer) for _, layer in sorted(plan.layers.items())]) for name, plan in found.items()}
    layers, experts = max(array.shape for array in maps.values())
    columns = 2 if experts <= 64 else 1
    rows = -(-len(maps) // columns)
    size = (columns * max(4.2, 0.07 * experts), rows * (0.5 + max(0.35, 0.085 * layers)) + 0.6)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    colours = ["#e3e6ea", "#e39a2d", "#2b6cb0"]
    for axes, (name, array) in zip(grid.flat, maps.items(), strict=False):
        squares = {"cmap": ListedColormap(colours), "vmin": 0, "vmax": 2, "edgecolors": "white", "linewidth": 0.3}
        axes.pcolormesh(array, **squares)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=8, loc="left")
        layers_shown = np.arange(0, len(array), max(1, len(array) // 8))
        axes.set_yticks(layers_shown + 0.5, layers_shown)
        axes.tick_params(which="both", length=0, labelsize=7)
    for axes in list(grid.flat)[len(maps) :]:
        axes.set_visible(False)
    names = [Patch(color=colours[fate], label=word) for fate, word in ((2, "kept"), (1, "merged"), (0, "dropped"))]
    figure.legend(handles=names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _save(figure, suffix, path)


def _cost(done: pd.DataFrame, suffix: str, path: Path) -> None:
    names, seconds = [], []
    for name, group in by_row(done, plan_names(done)):
        first = first_seed(group)
        row = first.iloc[0]
        of_stages = [float(row.get(f"seconds_{stage}", 0.0)) for stage in STAGES[:-1]]
        names.append(" ".join(name[1:]) if done["model"].nunique() == 1 else " ".join(name))
        seconds.append([*(0.0 if np.isnan(value) else value for value in of_stages), first["seconds_score"].sum()])
    bars = np.array(seconds)
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(names) + 1.2), layout="constrained")
    left = np.zeros(len(names))
    for stage, widths in zip(STAGES, bars.T, strict=True):
        axes.barh(names, widths, left=left, label=stage, height=0.7)
        left += widths
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.25)
    axes.legend(frameon=False, fontsize=8, ncols=len(STAGES), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, suffix, path)


def _by_size(done: pd.DataFrame, suffix: str, path: Path) -> None:
    panels = list(done[["task", "metric"]].drop_duplicates().itertuples(index=False, name=None))
    figure, grid = _grid(len(panels))
    colours, marks = colours_of(done), dict(zip(done["model"].unique(), "osv^Dp*X" * 9, strict=False))
    for axes, (task, metric) in zip(grid, panels, strict=False):
        here = done[(done["task"] == task) & (done["metric"] == metric)]
        for (model, label), rows in here.groupby(["model", "label"], sort=False):
            means = rows.groupby("ratio")[["size_distinct_bytes", "value"]].mean()
            axes.plot(
                means["size_distinct_bytes"] / 1e6,
                100 * means["value"],
                marker=marks[model],
                markersize=5,
                linewidth=0.8,
                color=colours[str(label)],
                label=f"{label}" if len(marks) == 1 else f"{model} {label}",
            )
        axes.set_title(f"{task} {metric}", fontsize=10)
        axes.set_xlabel("MB of distinct weights")
        axes.set_ylabel("score, points")
        axes.grid(alpha=0.25)
    _legend(figure, grid[0])
    _save(figure, suffix, path)


def _by_calibration(compressed: pd.DataFrame, suffix: str, path: Path) -> None:
    panels = list(compressed[["ratio", "task", "metric"]].drop_duplicates().itertuples(index=False, name=None))
    figure, grid = _grid(len(panels))
    texts = [text for text in compressed["calibration"].unique() if text != "none"]
    for axes, (ratio, task, metric) in zip(grid, panels, strict=False):
        names = ("ratio", "task", "metric")
        chosen = np.logical_and.reduce([compressed[n] == v for n, v in zip(names, (ratio, task, metric), strict=True)])
        table = 100 * compressed[chosen].pivot_table("value", "label", "calibration", sort=False).reindex(columns=texts)
        table = table.dropna(how="all")
        colours = plt.get_cmap("viridis").with_extremes(bad="0.9")
        axes.imshow(np.ma.masked_invalid(table), cmap=colours, vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(len(texts)), texts, rotation=30, ha="right", fontsize=8)
        axes.set_yticks(range(len(table)), table.index, fontsize=8)
        for (row, column), value in np.ndenumerate(table.to_numpy()):
            if not np.isnan(value):
                shade = "white" if value < 60 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=shade)
        axes.set_title(f"{task} {metric}, {100 * ratio:.4g} %", fontsize=9)
    _save(figure, suffix, path)
