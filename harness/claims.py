"""What "REAP the Experts" (arXiv 2510.13999) claims, put to the test on the models and benchmarks of a sweep.

Each claim is a comparison that the sweep may hold the rows for; where it does not, that is said. A verdict is about
these rows and nothing else: it holds, it is contradicted, or no difference was found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from harness import tables
from harness.items import Values, matrix, rows_of
from harness.separation import p_value
from harness.significance import LEVEL, Difference, difference, holm
from harness.spec import Row

PRUNING, MERGING = ("Frequency", "EAN", "REAP"), ("HC-SMoE", "M-SMoE")
HOLDS, CONTRADICTED, OPEN = "holds", "contradicted", "no difference found"
MARGIN = 0.05  # a loss of up to 5 points still counts as competitive
METRICS = ("plus_pass@1", "acc_norm")  # the paper's, where a task has several


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
    done = tidy[tidy["status"] == "done"]
    found: list[Finding] = []
    for _, of_model in done.groupby("model", sort=False):
        rows = _Rows(of_model, known, kinds)
        generated = ("code", "generation")
        found += _family(
            "Pruning beats merging on generated answers at 50 %",
            [
                (where, rows.gap(where, PRUNING, MERGING))
                for where in rows.places(generated, (0.5,), (*PRUNING, *MERGING))
            ],
            "mean over Frequency, EAN, REAP minus mean over HC-SMoE, M-SMoE",
        )
        found += _competitive(rows)
        for other in ("Frequency", "EAN"):
            found += _family(
                f"REAP beats {other} on generated answers",
                [
                    (where, rows.gap(where, ("REAP",), (other,)))
                    for where in rows.places(generated, (0.25, 0.5), ("REAP", other))
                ],
                f"REAP minus {other}",
            )
        found += _calibration(of_model, known, kinds)
        found += _late_layers(of_model, distortions)
    return found


@dataclass(frozen=True)
class Place:
    """A column to look at: one task and metric at one ratio, on one calibration text."""

    model: str
    task: str
    metric: str
    ratio: float
    calibration: str

    def __str__(self) -> str:
        on = "" if self.calibration == "none" else f", calibrated on {self.calibration}"
        return f"{self.model}, {self.task} {self.metric}, {100 * self.ratio:.4g} %{on}"


@dataclass(frozen=True)
class _Rows:
    """The scored rows of one model."""

    tidy: pd.DataFrame
    known: Values
    kinds: Mapping[str, str]

    def places(self, kinds: Sequence[str], ratios: Iterable[float], labels: Sequence[str]) -> Iterator[Place]:
        """Where all these methods have scores."""
        for task, ratio in itertools.product(self.tidy["task"].unique(), ratios):
            if self.kinds.get(str(task)) not in kinds:
                continue
            here = self.tidy[(self.tidy["task"] == task) & (self.tidy["ratio"] == ratio)]
            for calibration, rows in here.groupby("calibration", sort=False):
                if set(labels) <= set(rows["label"]):
                    metric = main_metric(rows["metric"].unique())
                    yield Place(str(rows["model"].iloc[0]), str(task), metric, ratio, str(calibration))

    def gap(self, place: Place, first: Sequence[str], second: Sequence[str]) -> Difference | None:
        """Of the means over two groups of methods, item by item; None where seeds or items are missing."""
        groups = [self._mean(place, labels) for labels in (first, second)]
        if groups[0] is None or groups[1] is None or groups[0].shape != groups[1].shape:
            return None
        return difference(groups[0], groups[1])

    def _mean(self, place: Place, labels: Sequence[str]) -> np.ndarray | None:
        tidy = self.tidy[
            (self.tidy["ratio"] == place.ratio)
            & (self.tidy["calibration"] == place.calibration)
            & (self.tidy["task"] == place.task)
        ]
        parts = [
            matrix(self.known, rows_of(tidy[tidy["label"] == label]), place.task, place.metric) for label in labels
        ]
        if any(part is None or part.shape != (parts[0] if parts[0] is not None else part).shape for part in parts):
            return None
        return np.mean([part for part in parts if part is not None], axis=0)


def main_metric(metrics: Iterable[str]) -> str:
    """The one that the paper reports."""
    names = list(metrics)
    return next((name for name in METRICS if name in names), names[0])


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
        claim = "Merging (HC-SMoE) is competitive with REAP on multiple choice"
        found.append(Finding(claim, str(place), f"HC-SMoE minus REAP: {points(gap)}", test, "—", verdict))
    return found


def _calibration(tidy: pd.DataFrame, known: Values, kinds: Mapping[str, str]) -> list[Finding]:
    """Each method on code, calibrated on code, against the same method calibrated on each other text."""
    code = tidy[tidy["task"].map(kinds).eq("code") & (tidy["ratio"] == 0.5)]
    texts = [text for text in code["calibration"].unique() if text != "none"]
    own = [text for text in texts if "code" in str(text)]
    if len(own) != 1 or len(texts) < 2:
        return []
    gaps: list[tuple[object, Difference | None]] = []
    for (label, task), rows in code[code["calibration"] == own[0]].groupby(["label", "task"], sort=False):
        metric = main_metric(rows["metric"].unique())
        right = matrix(known, rows_of(rows), str(task), metric)
        for text in texts:
            others = code[(code["label"] == label) & (code["task"] == task) & (code["calibration"] == text)]
            wrong = matrix(known, rows_of(others), str(task), metric) if len(others) else None
            if text != own[0] and right is not None and wrong is not None and right.shape == wrong.shape:
                where = f"{rows['model'].iloc[0]}, {task} {metric}, {label} 50 %, {own[0]} against {text}"
                gaps.append((where, difference(right, wrong)))
    return _family("The wrong calibration text destroys code", gaps, "calibrated on code minus on the other text")


def _late_layers(tidy: pd.DataFrame, distortions: Mapping[Row, Mapping[int, float]]) -> list[Finding]:
    """By the manifold distortion of merged plans, as the paper draws it, and by their reconstruction error."""
    columns = [str(name) for name in tidy if str(name).startswith("reconstruction_layer_")]
    columns.sort(key=lambda name: int(name.rpartition("_")[2]))
    merged = tidy[tidy["label"].isin(MERGING)].drop_duplicates(tables.CELL)
    moved = [[*distortions[row].values()] for row in rows_of(merged) if distortions.get(row)]
    measures = {
        "manifold distortion": np.array(moved),
        "reconstruction error": merged[columns].dropna().to_numpy(float) if columns else np.empty((0, 0)),
    }
    return [
        _by_depth(str(merged["model"].iloc[0]), name, plans)
        for name, plans in measures.items()
        if plans.ndim == 2 and len(plans) and plans.shape[1] > 2
    ]


def _by_depth(model: str, name: str, plans: np.ndarray) -> Finding:
    """Spearman's correlation of depth with a number of each layer, float [plans, layers], the mean over plans; p from
    all (or 10,000 random) orders of the layers.
    """
    layers = plans.shape[1]
    found = _depth(plans, np.arange(layers))
    p = float(np.mean([_depth(plans, order) >= found - 1e-12 for order in _orders(layers)]))
    verdict = OPEN if min(p, 1 - p) >= LEVEL else (HOLDS if found > 0 else CONTRADICTED)
    words = f"mean rank correlation of depth and {name} {found:+.2f}"
    test = f"permutation of {layers} layers, one-sided, {len(plans)} plans"
    return Finding("Late layers collapse more under merging", f"{model}, {name}", words, test, p_value(p), verdict)


def _depth(errors: np.ndarray, depth: np.ndarray) -> float:
    return float(np.mean([spearmanr(depth, plan).statistic for plan in errors]))


def _orders(layers: int) -> Iterable[np.ndarray]:
    if layers <= 7:
        return (np.array(order) for order in itertools.permutations(range(layers)))
    rng = np.random.default_rng(0)
    return (rng.permutation(layers) for _ in range(10_000))


def table(found: Sequence[Finding]) -> pd.DataFrame:
    names = ["claim", "where", "found", "test", "p", "verdict"]
    return pd.DataFrame([[getattr(one, name) for name in names] for one in found], columns=names)
