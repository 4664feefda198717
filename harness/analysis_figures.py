"""Figures of the paper's analyses ("REAP the Experts", arXiv 2510.13999, Fig. 1, 2, 4, A5 and A7a), drawn from what is
on disk (`harness.analyse.load`) without a model.

Each takes the rows of one model that have what it shows, a format and a path. A line stands for a method, of which all
seeds are averaged; it has the colour and mark it has in the plot of the scores.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from harness.analyses import NGRAMS, Analysis, Texts, cluster_sizes, pca, singleton_share, windows
from harness.figures import Figure
from harness.plan import Plan
from harness.plot import named
from harness.significance import interval
from harness.spec import CALIBRATED, Row
from harness.store import say
from harness.sweep import Sweep

LINES = 10  # in a panel: more methods go on in the next
COLUMNS = 3  # panels side by side
WINDOWS = 16  # of positions: a point each
SHOWN = 3  # pruning methods, and as many merging methods, whose subspace is drawn
UNCOMPRESSED = "0.35"  # grey

Draw = Callable[[Sequence[Analysis], str, Path], None]


# Lines and panels.


@dataclass(frozen=True)
class Line:
    """A method (on one calibration set, where there are several) at one ratio, with all its seeds."""

    name: str
    place: int  # among the methods of the sweep
    seeds: tuple[Analysis, ...]

    @property
    def colour(self) -> str:
        return f"C{self.place % 10}"

    @property
    def dashes(self) -> str:
        return ("-", "--", ":")[self.place // 10 % 3]

    @property
    def hatch(self) -> str:
        return ("", "/////", ".....")[self.place // 10 % 3]

    @property
    def mark(self) -> str:
        return "osv^Dp*X"[self.place % 8]


@dataclass(frozen=True)
class Panel:
    title: str
    ratio: float
    lines: tuple[Line, ...]


def names(rows: Sequence[Row]) -> dict[Row, str]:
    """What a line is called: its method, and how it was calibrated where there are several ways to tell apart."""
    several = [column for column in CALIBRATED if len({getattr(row, column) for row in rows} - {"none"}) > 1]
    labels = named(pd.DataFrame(rows, columns=list(Row._fields)), several)["label"]
    return dict(zip(rows, labels, strict=True))


def lines(
    analyses: Sequence[Analysis], has: Callable[[Analysis], bool] = lambda _: True
) -> dict[float, tuple[Line, ...]]:
    """Compressed rows that have something, by ratio, in the order of the sweep."""
    compressed = [analysis for analysis in analyses if analysis.plan is not None]
    called = names([analysis.row for analysis in compressed])
    places = {name: place for place, name in enumerate(dict.fromkeys(called.values()))}
    found: dict[float, dict[str, list[Analysis]]] = {ratio: {} for ratio in sorted({a.row.ratio for a in compressed})}
    for analysis in filter(has, compressed):
        found[analysis.row.ratio].setdefault(called[analysis.row], []).append(analysis)
    return {
        ratio: tuple(Line(name, places[name], tuple(seeds)) for name, seeds in of_ratio.items())
        for ratio, of_ratio in found.items()
        if of_ratio
    }


def panels(analyses: Sequence[Analysis], has: Callable[[Analysis], bool], about: str = "") -> list[Panel]:
    """A panel for each ratio, or several where it has many lines."""
    return [
        Panel(f"{about}{100 * ratio:.4g} % removed", ratio, of_ratio[start : start + LINES])
        for ratio, of_ratio in lines(analyses, has).items()
        for start in range(0, len(of_ratio), LINES)
    ]


def _columns(shown: Sequence[Panel]) -> int:
    """Panels in a row: those of one ratio, if it has several; else a ratio each, so that every task begins a row."""
    several = max(Counter(panel.title for panel in shown).values())
    return min(COLUMNS, several if several > 1 else len({panel.ratio for panel in shown}))


@contextmanager
def _grid(
    number: int, columns: int, suffix: str, path: Path, height: float = 2.9, share: bool = True
) -> Iterator[tuple[Canvas, list[Axes]]]:
    """Axes for so many panels, in rows of ``columns``; written on leaving."""
    rows = -(-number // columns)
    size = (max(5.0, 3.5 * columns), height * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", sharey=share)
    axes = list(grid.flat)
    for unused in axes[number:]:
        unused.set_visible(False)
    yield figure, axes[:number]
    figure.savefig(path, format=suffix, dpi=150)
    plt.close(figure)


def _dress(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(across, fontsize=8)
    axes.set_ylabel(up, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)


def _legend(figure: Canvas, grid: Sequence[Axes], more: Sequence[Artist] = ()) -> None:
    """Each name once, below all panels."""
    known = {str(one.get_label()): one for one in more}
    for axes in grid:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(name, handle)
    widest = 0.6 + 0.065 * max(map(len, known))  # inches, of a mark and the longest name
    columns = max(1, min(len(known), int(figure.get_figwidth() / widest)))
    handles = list(known.values())
    figure.legend(handles, list(known), loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _box(axes: Axes, values: np.ndarray, at: float, width: float, colour: str, hatch: str, alpha: float = 0.8) -> None:
    drawn = axes.boxplot(
        [values],
        positions=[at],
        widths=0.85 * width,
        patch_artist=True,
        manage_ticks=False,
        medianprops={"color": "black", "linewidth": 1},
        flierprops={"marker": ".", "markersize": 2, "markerfacecolor": colour, "markeredgecolor": colour},
        boxprops={"facecolor": colour, "hatch": hatch, "linewidth": 0.5},
        whiskerprops={"linewidth": 0.6},
        capprops={"linewidth": 0.6},
    )
    for box in drawn["boxes"]:
        box.set_alpha(alpha)


# Figures.


def subspace(analyses: Sequence[Analysis], suffix: str, path: Path) -> None:
    """Fig. 1 and A5: mean outputs on two principal components of the original experts; a row for the first and the last
    MoE layer, a column for a plan; of each method the first seed, at the ratio next to one half.
    """
    _, shown = subspace_lines(analyses)
    layers = list(shown[0].seeds[0].slots)
    rows = list(dict.fromkeys((layers[0], layers[-1])))
    size = (max(5.0, 2.3 * len(shown)), 2.45 * len(rows) + 0.5)
    figure, grid = plt.subplots(
        len(rows), len(shown), figsize=size, squeeze=False, layout="constrained", sharex="row", sharey="row"
    )
    for row, layer in enumerate(rows):
        for column, line in enumerate(shown):
            _scatter(grid[row, column], line, layer, column == 0)
            if row == 0:
                grid[row, column].set_title(line.name, fontsize=9)
    handles = [
        Line2D([], [], linestyle="", marker="o", color="0.45", fillstyle="none", label="original expert"),
        Line2D([], [], linestyle="", marker="o", color="0.2", label="expert that is left"),
    ]
    _legend(figure, [], handles)
    figure.savefig(path, format=suffix, dpi=150)
    plt.close(figure)


def subspace_lines(analyses: Sequence[Analysis]) -> tuple[float, list[Line]]:
    """The ratio next to one half, and its first pruning and first merging methods."""
    by_ratio = lines(analyses, lambda analysis: bool(analysis.slots))
    ratio = min(by_ratio, key=lambda ratio: abs(ratio - 0.5))
    pruned = [line for line in by_ratio[ratio] if not line.seeds[0].merges]
    merged = [line for line in by_ratio[ratio] if line.seeds[0].merges]
    return ratio, pruned[:SHOWN] + merged[:SHOWN]


def _scatter(axes: Axes, line: Line, layer: int, is_first: bool) -> None:
    first = line.seeds[0]
    found = pca(first.originals[layer])
    before, after = found.project(first.originals[layer]), found.project(first.slots[layer])
    axes.scatter(after[:, 0], after[:, 1], s=15, color=line.colour, linewidths=0, zorder=3)
    axes.scatter(before[:, 0], before[:, 1], s=34, facecolors="none", edgecolors="0.45", linewidths=0.8)
    one, two = 100 * found.explained
    _dress(axes, "", f"PC 1 ({one:.0f} % of variance)", f"layer {layer}\nPC 2 ({two:.0f} %)" if is_first else "")
    axes.xaxis.set_major_locator(MaxNLocator(4))


def distortion(analyses: Sequence[Analysis], suffix: str, path: Path) -> None:
    """Fig. 2: manifold distortion by MoE layer."""
    shown = panels(analyses, lambda analysis: bool(analysis.slots))
    with _grid(len(shown), _columns(shown), suffix, path) as (figure, grid):
        for axes, panel in zip(grid, shown, strict=True):
            for line in panel.lines:
                found = [seed.distortions for seed in line.seeds]
                layers = list(found[0])
                values = [np.mean([one[layer] for one in found]) for layer in layers]
                axes.plot(
                    layers, values, line.dashes, marker=line.mark, markersize=4, color=line.colour, label=line.name
                )
            _dress(axes, panel.title, "layer", "manifold distortion, $W_1$")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        grid[0].set_ylim(bottom=0)  # of all panels, once all is drawn: it ends the scaling to what is
        _legend(figure, grid)


def clusters(analyses: Sequence[Analysis], suffix: str, path: Path) -> None:
    """Fig. A7a: the share of clusters of a single expert, and how large the clusters are that experts are in."""
    shown = panels(analyses, lambda analysis: analysis.merges)
    with _grid(2 * len(shown), 2, suffix, path, share=False) as (figure, grid):
        for place, panel in enumerate(shown):
            _singletons(grid[2 * place], panel)
            _sizes(grid[2 * place + 1], panel)


def _singletons(axes: Axes, panel: Panel) -> None:
    """A bar for the mean over layers and seeds, a dot for each."""
    rng = np.random.default_rng(0)  # spreads dots that lie on each other
    for place, line in enumerate(panel.lines):
        shares = np.array([share for seed in line.seeds for share in singleton_share(_plan(seed)).values()])
        axes.bar(place, shares.mean(), color=line.colour, alpha=0.75, width=0.7)
        axes.scatter(place + rng.uniform(-0.2, 0.2, len(shares)), shares, s=8, color="0.15", linewidths=0, zorder=3)
    _dress(axes, panel.title, "", "singleton clusters / clusters")
    _name_ticks(axes, [line.name for line in panel.lines])
    axes.set_ylim(0, 1.03)


def _sizes(axes: Axes, panel: Panel) -> None:
    for line in panel.lines:
        sizes = np.concatenate([cluster_sizes(layer) for seed in line.seeds for layer in _plan(seed).layers.values()])
        at = np.arange(1, sizes.max() + 1)
        share = [sizes[sizes >= size].sum() / sizes.sum() for size in at]
        axes.plot(at, share, color=line.colour, linestyle=line.dashes, marker=line.mark, markersize=3, label=line.name)
    _dress(axes, panel.title, "cluster size, experts", "experts in clusters this large\nor larger, share")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(0, 1.03)
    axes.legend(frameon=False, fontsize=7)


def _plan(analysis: Analysis) -> Plan:
    assert analysis.plan is not None, "lines stand for compressed rows"
    return analysis.plan


def _name_ticks(axes: Axes, called: Sequence[str]) -> None:
    axes.set_xticks(range(len(called)), called, rotation=35, ha="right", rotation_mode="anchor", fontsize=7)


def distances(analyses: Sequence[Analysis], suffix: str, path: Path) -> None:
    """Fig. 4d: distance in weights of merged experts from the weightiest of their cluster, over layers and seeds; pale:
    as they are stored, full: with the hidden units aligned.
    """
    shown = panels(analyses, lambda analysis: bool(analysis.distances))
    with _grid(len(shown), _columns(shown), suffix, path, height=3.2) as (figure, grid):
        for axes, panel in zip(grid, shown, strict=True):
            for place, line in enumerate(panel.lines):
                pairs = np.concatenate([pairs for seed in line.seeds for pairs in seed.distances.values()])
                _box(axes, pairs[:, 0], place - 0.18, 0.36, line.colour, line.hatch, alpha=0.3)
                _box(axes, pairs[:, 1], place + 0.18, 0.36, line.colour, line.hatch)
            _dress(axes, panel.title, "", "relative distance in weights")
            _name_ticks(axes, [line.name for line in panel.lines])
            axes.set_xlim(-0.6, len(panel.lines) - 0.4)
            axes.axhline(math.sqrt(2), color="0.35", linestyle="--", linewidth=0.9, label="unrelated, √2")
        kinds = [Patch(color="0.3", alpha=a, label=word) for a, word in ((0.3, "as stored"), (0.8, "aligned"))]
        _legend(figure, grid, kinds)


def divergence(analyses: Sequence[Analysis], suffix: str, path: Path) -> None:
    """Fig. 4c: Jensen-Shannon divergence by position, the mean over sequences (of all seeds) and its 95 % interval."""
    shown = panels(analyses, lambda analysis: analysis.divergence is not None)
    with _grid(len(shown), _columns(shown), suffix, path) as (figure, grid):
        for axes, panel in zip(grid, shown, strict=True):
            for line in panel.lines:
                known = [seed.divergence for seed in line.seeds if seed.divergence is not None]
                middles, values = windows(np.concatenate(known), WINDOWS)
                low, high = interval(values)
                mean = values.mean(0)
                axes.plot(middles, mean, color=line.colour, linestyle=line.dashes, linewidth=1.2, label=line.name)
                if len(values) > 1:
                    axes.fill_between(
                        middles, low.clip(0), high.clip(max=1), color=line.colour, alpha=0.15, linewidth=0
                    )
            _dress(axes, panel.title, "position, tokens", "divergence, bits")
        grid[0].set_ylim(bottom=0)
        _legend(figure, grid)


def diversity(analyses: Sequence[Analysis], suffix: str, path: Path) -> None:
    """Fig. 4a: n-gram diversity of the texts that each model wrote, a box for each; a row of panels for each task."""
    shown = _by_task(analyses, lambda texts: len(texts.diversities(NGRAMS[0])) > 0)
    with _grid(len(shown), _columns([panel for _, panel in shown]), suffix, path) as (figure, grid):
        for axes, (task, panel) in zip(grid, shown, strict=True):
            groups = _written(analyses, panel, task)
            width = 0.8 / len(groups)
            for place, (_, colour, hatch, texts) in enumerate(groups):
                for group, n in enumerate(NGRAMS):
                    values = np.concatenate([one.diversities(n) for one in texts])
                    _box(axes, values, group + (place + 0.5) * width - 0.4, width, colour, hatch)
            _dress(axes, panel.title, "", "different n-grams / n-grams")
            axes.set_xticks(range(len(NGRAMS)), [f"n = {n}" for n in NGRAMS])
            axes.set_xlim(-0.5, len(NGRAMS) - 0.5)
        looks = {name: look for task, panel in shown for name, *look, _ in _written(analyses, panel, task)}
        patches = [Patch(facecolor=c, edgecolor="0.1", hatch=h, alpha=0.8, label=n) for n, (c, h) in looks.items()]
        _legend(figure, [], patches)


def perplexity(analyses: Sequence[Analysis], suffix: str, path: Path) -> None:
    """Fig. 4b: perplexity under the original model of the texts that each model wrote, the original's own texts first;
    the line is the median. A row of panels for each task.
    """
    shown = _by_task(analyses, lambda texts: len(texts.perplexities) > 0)
    with _grid(len(shown), _columns([panel for _, panel in shown]), suffix, path, height=3.3) as (_, grid):
        for axes, (task, panel) in zip(grid, shown, strict=True):
            groups = _written(analyses, panel, task)
            for place, (_, colour, _, texts) in enumerate(groups):
                _violin(axes, np.concatenate([one.perplexities for one in texts]), place, colour)
            _dress(axes, panel.title, "", "cross-perplexity")
            _name_ticks(axes, [name for name, *_ in groups])
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.yaxis.set_major_formatter(lambda power, _: f"$10^{{{power:.0f}}}$")


def _violin(axes: Axes, values: np.ndarray, place: int, colour: str) -> None:
    """Of the logarithms: what is drawn on a logarithmic axis is the density there."""
    if not len(values):
        return
    drawn = axes.violinplot(np.log10(values), [place], widths=0.85, showmedians=True, showextrema=False)
    for body in drawn["bodies"]:  # type: ignore[attr-defined]
        body.set(facecolor=colour, edgecolor=colour, alpha=0.6)
    drawn["cmedians"].set(color="black", linewidth=1.2)


def _by_task(analyses: Sequence[Analysis], has: Callable[[Texts], bool]) -> list[tuple[str, Panel]]:
    """Panels of every task whose texts have something."""
    tasks = dict.fromkeys(name for analysis in analyses for name in analysis.texts)

    def shown(task: str) -> list[Panel]:
        return panels(analyses, lambda one: task in one.texts and has(one.texts[task]), f"{task}, ")

    return [(task, panel) for task in tasks for panel in shown(task)]


def _written(analyses: Sequence[Analysis], panel: Panel, task: str) -> list[tuple[str, str, str, list[Texts]]]:
    """Name, colour, hatch and texts of the original model, then of each line: of all its seeds."""
    own = [one.texts[task] for one in analyses if one.plan is None and task in one.texts]
    lines_of = [(x.name, x.colour, x.hatch, [seed.texts[task] for seed in x.seeds]) for x in panel.lines]
    return ([("uncompressed", UNCOMPRESSED, "", own)] if own else []) + lines_of


# All of them.


def all_figures(sweep: Sweep, loaded: Mapping[Row, Analysis]) -> Iterator[Figure]:
    """Every figure that there is data for, for each model; of the others it is said why not.

    loaded: of `harness.analyse.load`.
    """
    models = list(dict.fromkeys(row.model for row in loaded))
    texts = {(cell.model.name, cell.calibration.name): None for cell in sweep.cells if cell.compresses}
    for model in models:
        held_out = " or ".join(text for of_model, text in texts if of_model == model)
        rows = [analysis for row, analysis in loaded.items() if row.model == model]
        about = f", {model}" if len(models) > 1 else ""
        for candidate in _candidates(rows, held_out):
            title = candidate.title + about
            if candidate.has:
                yield Figure(title, candidate.caption(), functools.partial(candidate.draw, rows))
            else:
                say("skipped", title, candidate.otherwise)


@dataclass(frozen=True)
class _Candidate:
    """A figure, whether there is data for it, and what to say with it and without."""

    title: str
    draw: Draw
    has: bool
    caption: Callable[[], str]
    otherwise: str


def _candidates(rows: Sequence[Analysis], text: str) -> list[_Candidate]:
    examined, unexamined = any(row.slots for row in rows), "no plan was examined: python -m harness.analyse"
    unwritten = "no task of this sweep that has a score asks for a text"
    compressed = [row for row in rows if row.plan is not None]
    written = [texts for row in compressed for texts in row.texts.values()]
    return [
        _Candidate("Functional subspace", subspace, examined, lambda: _of_subspace(rows, text), unexamined),
        _Candidate("Manifold distortion", distortion, examined, lambda: _of_distortion(rows, text), unexamined),
        _Candidate(
            "Cluster sizes", clusters, any(row.merges for row in rows), lambda: _of_clusters(rows), "no plan merges"
        ),
        _Candidate(
            "Distance in weights",
            distances,
            any(row.distances for row in rows),
            lambda: _of_distances(rows),
            "no examined plan merges, or experts are no plain matrices",
        ),
        _Candidate("Divergence by position", divergence, examined, lambda: _of_divergence(rows, text), unexamined),
        _Candidate(
            "n-gram diversity",
            diversity,
            any(len(texts.diversities(NGRAMS[0])) for texts in written),
            lambda: _of_diversity(rows),
            unwritten,
        ),
        _Candidate(
            "Cross-perplexity",
            perplexity,
            any(len(texts.perplexities) for texts in written),
            lambda: _of_perplexity(rows),
            f"{unwritten}, or none was measured: python -m harness.analyse",
        ),
    ]


# Captions: what is shown, of how much, and what the paper's figure does otherwise.


def _of_subspace(rows: Sequence[Analysis], text: str) -> str:
    ratio, shown = subspace_lines(rows)
    others = len(lines(rows, lambda row: bool(row.slots))[ratio]) - len(shown)
    undrawn = f" ({others} more methods are not drawn)" if others else ""
    return (
        f"Mean outputs of experts over {_tokens(rows, text)}, routed to them or not, on the first two principal "
        f"components of the original experts of that layer, at {100 * ratio:.4g} % removed, first seed{undrawn}. A "
        "pruned expert leaves an empty ring. Fig. 1 of the paper draws frequency pruning, and a greedy pairwise mean "
        "with averaged routers; here every column is a plan of this sweep, on the inputs of the original model."
    )


def _of_distortion(rows: Sequence[Analysis], text: str) -> str:
    return (
        "1-Wasserstein distance between the mean outputs of the original experts and of those that are left, at the "
        "price of their angle over π (eq. 12; 0: the same directions, 1: opposite ones), solved exactly. Over "
        f"{_tokens(rows, text)}; {_seeds(rows)}. Fig. 2 of the paper shows the same on 32 x 2,048 tokens of C4; no "
        "code is published."
    )


def _of_clusters(rows: Sequence[Analysis]) -> str:
    return (
        "Left: share of a layer's clusters that hold one expert (bar: the mean; dots: layers and seeds). Right: share "
        f"of the experts that are in clusters of a size or larger, over all layers. Merging plans; {_seeds(rows)}. "
        "Fig. A7a of the paper shows the left half alone."
    )


def _of_distances(rows: Sequence[Analysis]) -> str:
    pairs = sum(len(pairs) for row in rows for pairs in row.distances.values())
    return (
        "||W - W_ref|| / ||W_ref||, the mean over gate, up and down, of each merged expert from the weightiest of its "
        f"cluster: as stored, and with hidden units in the order that brings them nearest; {pairs} pairs in all. √2 is "
        "the distance of unrelated matrices of one size. Fig. 4d of the paper also compares a base model with a tuned "
        "one, and singular vectors; no code is published."
    )


def _of_divergence(rows: Sequence[Analysis], text: str) -> str:
    return (
        "Jensen-Shannon divergence of the next-token distributions of original and compressed model, in bits, both "
        f"reading the same {_tokens(rows, text)}; mean over sequences (of all seeds) and its 95 % interval "
        f"(Student's t), positions in at most {WINDOWS} windows. Fig. 4c of the paper is measured on texts that each "
        "model goes on to write itself, so it holds the drift of the contexts too, and ends at 25 tokens."
    )


def _of_diversity(rows: Sequence[Analysis]) -> str:
    return (
        "Different n-grams over n-grams of each text, words being what whitespace separates; texts of fewer than n "
        f"words are left out. {_texts(rows)}. 1 is the most a text can have, and short texts come near it whatever "
        "they say. Fig. 4a of the paper: 100 prompts of evol-codealpaca, 256 tokens each."
    )


def _of_perplexity(rows: Sequence[Analysis]) -> str:
    empty = sum(texts.empty for row in rows for texts in row.texts.values())
    return (
        "exp(mean negative log-likelihood per token) under the original model of the texts that each model wrote, "
        f"given their prompts; line: median. {_texts(rows)}; {empty} empty ones in all are left out. In Fig. 4b of the "
        "paper texts are scored without their prompts."
    )


def _tokens(rows: Sequence[Analysis], text: str) -> str:
    known = next(row.divergence for row in rows if row.divergence is not None)
    return f"{len(known)} x {known.shape[1] + 1} held-out tokens ({text})"


def _seeds(rows: Sequence[Analysis]) -> str:
    many = len({row.row.seed for row in rows if row.plan is not None})
    return "one seed" if many == 1 else f"mean over {many} seeds"


def _texts(rows: Sequence[Analysis]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        for task, texts in row.texts.items():
            counts[task] = max(counts.get(task, 0), len(texts.answers))
    return "Texts of each model: " + ", ".join(f"the first {many} of {task}" for task, many in counts.items())
