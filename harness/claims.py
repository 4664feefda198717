"""What "REAP the Experts" (arXiv 2510.13999) claims, put to the test on the models and benchmarks of a sweep.

Each claim is a comparison that the sweep may hold the rows for; where it does not, that is said. A verdict is about
these rows and nothing else: it holds, it is contradicted, no difference was found or, where it says that two are much
the same, it is undecided.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from harness.items import Values, matrix, rows_of
from harness.published import BENCHMARKS
from harness.rows import CELL, NOT_RUN
from harness.separation import p_value
from harness.significance import LEVEL, Difference, difference, holm
from harness.spec import Row

PRUNING, MERGING = ("Frequency", "EAN", "REAP"), ("HC-SMoE", "M-SMoE")
HOLDS, CONTRADICTED, OPEN = "holds", "contradicted", "no difference found"
MARGIN = 0.05  # a loss of up to 5 points still counts as competitive
METRICS = ("plus_pass@1", "acc_norm")  # the paper's, where a task has several
EXACT = 7  # layers whose orders are all tried

PRUNING_WINS = "Pruning beats merging on generated answers at 50 %"
COMPETITIVE = "Merging (HC-SMoE) is competitive with REAP on multiple choice"
OVER_FREQUENCY, OVER_EAN = (f"REAP beats {other} on generated answers" for other in ("Frequency", "EAN"))
WRONG_TEXT = "The wrong calibration text destroys code"
LATE_LAYERS = "Late layers collapse more under merging"
CLAIMS = {  # and the rows that a test of each needs
    PRUNING_WINS: "all five methods of the paper at 50 % on a generating task, calibrated alike",
    COMPETITIVE: "HC-SMoE and REAP on a multiple-choice task",
    OVER_FREQUENCY: "REAP and Frequency on a generating task",
    OVER_EAN: "REAP and EAN on a generating task",
    WRONG_TEXT: "one method at 50 % on code, calibrated on code and on another text (sweep=domains)",
    LATE_LAYERS: "HC-SMoE or M-SMoE plans of three or more layers with reconstruction errors or analyses",
}


@dataclass(frozen=True)
class Finding:
    """claim: the paper's. where: model, task, ratio. found: numbers. test: how p came about, n with it."""

    claim: str
    where: str
    found: str
    test: str
    p: str
    verdict: str


def findings(
    tidy: pd.DataFrame, known: Values, kinds: Mapping[str, str], distortions: Mapping[Row, Mapping[int, float]]
) -> list[Finding]:
    """Every claim on every model. kinds: of tasks, "code", "generation" or "multiple choice" (`tasks.Task.kind`).
    distortions: of each layer (`harness.analyse`), where they were measured.
    """
    found: list[Finding] = []
    for model, of_model in tidy.groupby("model", sort=False):
        here = [*_of_model(_Rows(of_model, known, kinds)), *_late_layers(of_model, distortions)]
        tested = {finding.claim for finding in here}
        found += [*here, *(_untested(claim, str(model)) for claim in CLAIMS if claim not in tested)]
    return found


def _of_model(rows: _Rows) -> Iterator[Finding]:
    generated = ("code", "generation")
    yield from _family(
        PRUNING_WINS,
        [(where, rows.gap(where, PRUNING, MERGING)) for where in rows.places(generated, (0.5,), (*PRUNING, *MERGING))],
        "mean over Frequency, EAN, REAP minus mean over HC-SMoE, M-SMoE",
    )
    yield from _competitive(rows)
    for claim, other in ((OVER_FREQUENCY, "Frequency"), (OVER_EAN, "EAN")):
        places = rows.places(generated, (0.25, 0.5), ("REAP", other))
        gaps = [(where, rows.gap(where, ("REAP",), (other,))) for where in places]
        yield from _family(claim, gaps, f"REAP minus {other}")
    yield from _calibration(rows)


def _untested(claim: str, model: str) -> Finding:
    return Finding(claim, model, f"not tested: it needs {CLAIMS[claim]}", NOT_RUN, NOT_RUN, "not tested")


@dataclass(frozen=True)
class Place:
    """A column to look at: one task and metric at one ratio, calibrated in one way."""

    model: str
    task: str
    metric: str
    ratio: float
    calibration: str
    routing: str

    def __str__(self) -> str:
        on = "" if self.calibration == "none" else f", calibrated on {self.calibration}"
        on += "" if self.routing in ("none", "actual") else f", routing={self.routing}"
        return f"{self.model}, {self.task} {self.metric}, {100 * self.ratio:.4g} %{on}"


@dataclass(frozen=True)
class _Rows:
    """The rows of one model, finished or not."""

    tidy: pd.DataFrame
    known: Values
    kinds: Mapping[str, str]

    def places(self, kinds: Sequence[str], ratios: Iterable[float], labels: Sequence[str]) -> Iterator[Place]:
        """Where all these methods have scores."""
        for task, ratio in itertools.product(self.tidy["task"].unique(), ratios):
            if self.kinds.get(str(task)) not in kinds:
                continue
            here = self.tidy[(self.tidy["task"] == task) & (self.tidy["ratio"] == ratio)]
            for (calibration, routing), rows in here.groupby(["calibration", "routing"], sort=False):
                metrics = rows["metric"].dropna().unique()
                if set(labels) <= set(rows["label"]) and len(metrics):
                    metric, model = main_metric(str(task), metrics), str(rows["model"].iloc[0])
                    yield Place(model, str(task), metric, ratio, str(calibration), str(routing))

    def gap(self, place: Place, first: Sequence[str], second: Sequence[str]) -> Difference | None:
        """Of the means over two groups of methods, item by item; None where seeds or items are missing."""
        return paired([self.values(place, label) for label in first], [self.values(place, label) for label in second])

    def values(self, place: Place, label: str) -> Seeded | None:
        """A method's; None unless every seed that was asked for has every item."""
        names = ("ratio", "calibration", "routing", "task")
        here = np.logical_and.reduce([self.tidy[name] == getattr(place, name) for name in names])
        rows = rows_of(self.tidy[here & (self.tidy["label"] == label)])
        found = matrix(self.known, rows, place.task, place.metric)
        return None if found is None else Seeded(tuple(row.seed for row in rows), found)


@dataclass(frozen=True)
class Seeded:
    """Values [seeds, items], and which seeds."""

    seeds: tuple[int | None, ...]
    values: np.ndarray


def paired(first: Sequence[Seeded | None], second: Sequence[Seeded | None]) -> Difference | None:
    """Difference of the means over two groups; None unless all are there, with the same seeds and items."""
    known = [[one for one in group if one is not None] for group in (first, second)]
    alike = len({(one.seeds, one.values.shape) for group in known for one in group}) == 1
    if not alike or [len(group) for group in known] != [len(first), len(second)]:
        return None
    return difference(*(np.mean([one.values for one in group], axis=0) for group in known))


def main_metric(task: str, metrics: Iterable[str]) -> str:
    """The one that the paper reports, where it asks this task; else one that it would report."""
    names = [str(name) for name in metrics]
    published = [name for name in names if (task, name) in BENCHMARKS] or names
    return next((name for name in METRICS if name in published), published[0])


def _family(claim: str, gaps: Sequence[tuple[object, Difference | None]], what: str) -> list[Finding]:
    """One-sided reading of two-sided tests, corrected over the places."""
    known = [(where, gap) for where, gap in gaps if gap is not None]
    corrected = holm([gap.p for _, gap in known])
    return [
        Finding(claim, str(where), f"{what}: {points(gap)}", _test(gap), p_value(p), _verdict(gap, p))
        for (where, gap), p in zip(known, corrected, strict=True)
    ]


def _verdict(gap: Difference, p: float) -> str:
    if p >= LEVEL:
        return OPEN
    return HOLDS if gap.mean > 0 else CONTRADICTED


def points(gap: Difference) -> str:
    return f"{100 * gap.mean:+.1f} points ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"


def _test(gap: Difference) -> str:
    seeds = f", {gap.seeds} seeds" if gap.seeds > 1 else ""
    return f"{gap.test}, n = {gap.n}{seeds}"


def _competitive(rows: _Rows) -> list[Finding]:
    """Not worse than REAP by more than the margin: its interval says so, or says the contrary, or neither."""
    found = []
    for place in rows.places(("multiple choice",), (0.25, 0.5), ("REAP", "HC-SMoE")):
        gap = rows.gap(place, ("HC-SMoE",), ("REAP",))
        if gap is None:
            continue
        verdict = "undecided"
        if gap.low > -MARGIN:
            verdict = HOLDS
        elif gap.high < -MARGIN:
            verdict = CONTRADICTED
        test = f"95 % interval against a margin of {100 * MARGIN:.0f} points, n = {gap.n}"
        found.append(Finding(COMPETITIVE, str(place), f"HC-SMoE minus REAP: {points(gap)}", test, "—", verdict))
    return found


def _calibration(rows: _Rows) -> list[Finding]:
    """Each method on code, calibrated on code, against the same method calibrated on each other text."""
    labels = dict.fromkeys(rows.tidy["label"])
    places = dict.fromkeys(place for label in labels for place in rows.places(("code",), (0.5,), (label,)))
    right = [place for place in places if "code" in place.calibration]
    wrong = [place for place in places if "code" not in place.calibration]
    gaps = [
        (f"{one}, {label}, against {other.calibration}", paired([rows.values(one, label)], [rows.values(other, label)]))
        for one, other, label in itertools.product(right, wrong, labels)
        if replace(other, calibration=one.calibration) == one
    ]
    return _family(WRONG_TEXT, gaps, "calibrated on code minus on the other text")


def _late_layers(tidy: pd.DataFrame, distortions: Mapping[Row, Mapping[int, float]]) -> list[Finding]:
    """By the manifold distortion of merged plans, as the paper draws it, and by their reconstruction error."""
    columns = [str(name) for name in tidy if str(name).startswith("reconstruction_layer_")]
    columns.sort(key=lambda name: int(name.rpartition("_")[2]))
    merged = tidy[tidy["label"].isin(MERGING)].drop_duplicates(CELL)
    moved = [[*distortions[row].values()] for row in rows_of(merged) if distortions.get(row)]
    measures = {
        "manifold distortion": np.array(moved),
        "reconstruction error": merged[columns].dropna().to_numpy(float) if columns else np.empty((0, 0)),
    }
    known = {name: plans for name, plans in measures.items() if plans.ndim == 2 and len(plans) and plans.shape[1] > 2}
    tests = {name: _by_depth(plans) for name, plans in known.items()}
    corrected = holm([p for _, p in tests.values()])
    return [
        Finding(
            LATE_LAYERS,
            f"{merged['model'].iloc[0]}, {name}",
            f"mean rank correlation of depth and {name} {correlation:+.2f}",
            f"permutation of {known[name].shape[1]} layers, {len(known[name])} plans",
            p_value(p),
            OPEN if p >= LEVEL else HOLDS if correlation > 0 else CONTRADICTED,
        )
        for (name, (correlation, _)), p in zip(tests.items(), corrected, strict=True)
    ]


def _by_depth(plans: np.ndarray) -> tuple[float, float]:
    """Spearman's correlation of depth with a number of each layer, float [plans, layers], the mean over plans; and its
    two-sided p, from all (or 10,000 random) orders of the layers.
    """
    layers = plans.shape[1]
    found = _depth(plans, np.arange(layers))
    reached = [abs(_depth(plans, order)) >= abs(found) - 1e-12 for order in _orders(layers)]
    return found, float(np.mean([True, *reached] if layers > EXACT else reached))


def _depth(plans: np.ndarray, depth: np.ndarray) -> float:
    """0 of a plan whose layers are all alike."""
    return float(np.mean([spearmanr(depth, plan).statistic if np.ptp(plan) else 0.0 for plan in plans]))


def _orders(layers: int) -> Iterable[np.ndarray]:
    if layers <= EXACT:
        return (np.array(order) for order in itertools.permutations(range(layers)))
    rng = np.random.default_rng(0)
    return (rng.permutation(layers) for _ in range(10_000))


def table(found: Sequence[Finding]) -> pd.DataFrame:
    names = ["claim", "where", "found", "test", "p", "verdict"]
    return pd.DataFrame([[getattr(one, name) for name in names] for one in found], columns=names)
