"""Our numbers beside those that "REAP the Experts" (arXiv 2510.13999) prints, with what chance allows between them.

The published numbers lie in ``results/reference/reap.csv``; its README says what they are. All values here are in
points (hundredths).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from harness.models import ROOT
from harness.rows import FAILED, NOT_RUN, plan_names

REFERENCE = ROOT / "results" / "reference" / "reap.csv"
UNPUBLISHED = "no published number"
TABLES = ("A6", "A7", "A8", "2", "3")  # that hold benchmark scores of methods; where several do, the most detailed
Z = 1.96  # 95 % of a normal distribution

# The paper's benchmarks by our task and metric: acc_norm for ARC, HellaSwag and OpenBookQA, acc for the rest.
BENCHMARKS: Mapping[tuple[str, str], str] = {
    ("humaneval", "base_pass@1"): "HumanEval",
    ("humaneval", "plus_pass@1"): "HumanEval+",
    ("mbpp", "base_pass@1"): "MBPP",
    ("mbpp", "plus_pass@1"): "MBPP+",
    ("gsm8k", "exact_match:flexible-extract"): "GSM8K",
    ("math500", "math_verify"): "MATH-500",
    ("arc_challenge", "acc_norm"): "ARC-c",
    ("arc_easy", "acc_norm"): "ARC-e",
    ("boolq", "acc"): "BoolQ",
    ("hellaswag", "acc_norm"): "HellaSwag",
    ("mmlu", "acc"): "MMLU",
    ("openbookqa", "acc_norm"): "OBQA",
    ("rte", "acc"): "RTE",
    ("winogrande", "acc"): "WinoGrande",
}
CHOICE = ("ARC-c", "ARC-e", "BoolQ", "HellaSwag", "MMLU", "OBQA", "RTE", "WinoGrande")

# Averages by the version of the paper that prints them so: plain means of their parts.
AVERAGES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "v2": {
        "Eval+": ("HumanEval+", "MBPP+"),
        "Code Avg": ("Eval+", "LiveCodeBench"),
        "Math Avg": ("GSM8K", "MATH-500"),
        "MC Avg": CHOICE,
    },
    "v1": {
        "Eval+": ("HumanEval", "HumanEval+", "MBPP", "MBPP+"),
        "Code Avg": ("Eval+", "LiveCodeBench"),
        "MC Avg": CHOICE,
    },
}


@dataclass(frozen=True)
class Measured:
    """A benchmark or an average of several as we measured it, in points.

    value: mean over seeds. error: of that mean. squares: the sum over parts of weight^2 / items, for the binomial error
    that a printed number without a standard deviation is given.
    """

    value: float
    error: float
    seeds: int
    squares: float


@functools.cache
def reference() -> pd.DataFrame:
    """Every published number, one per row; ratio, value and std as numbers, empty texts as ""."""
    text = pd.read_csv(REFERENCE, dtype=str, keep_default_na=False)
    return text.assign(**{name: pd.to_numeric(text[name]) for name in ("ratio", "value", "std")})


def compare(tidy: pd.DataFrame, version: str = "v2") -> pd.DataFrame:
    """One line for each model, method, calibration, ratio and benchmark of ours, averages included.

    tidy: `harness.report.frame`. version: the paper's (``v1`` printed Table 3 only). Columns:

    * ``ours``, ``ours_error``, ``seeds``: mean over seeds, and sqrt(i^2 + d^2 / k) with i the standard error over
      items (its root mean square over seeds: the same items are asked every time, so more seeds do not shrink it) and
      d the standard deviation over the k seeds, 0 for one. An average of benchmarks is taken of each seed before that.
    * ``status``: "" where ours is a number, "—" where a seed or a part of an average was not run, "✗" where it failed.
    * ``published``, ``std``, ``version``, ``table``: as printed.
    * ``difference``: ours - published. ``error``: sqrt(ours_error^2 + p^2), p the printed standard deviation or, where
      none is printed, the binomial error of the published value on our items.
    * ``verdict``: inside or outside 1.96 errors, "no published number", or the status.
    """
    tidy = tidy.reindex(columns=tidy.columns.union(["value", "stderr", "n", "routing"], sort=False))
    cells = ["model", "label", "calibration", "routing", "ratio"]
    lines = [
        {**dict(zip(cells, names, strict=True)), **line}
        for names, group in tidy.groupby(cells, sort=False, dropna=False)
        for line in _lines(dict(zip(cells, names, strict=True)), group, version)
    ]
    return pd.DataFrame(lines).rename(columns={"label": "method"})


def _lines(cell: Mapping[str, object], group: pd.DataFrame, version: str) -> Iterator[dict[str, object]]:
    """The benchmarks of one cell, its seeds together, then the averages that any of them is part of."""
    marks = {name: mark for task, rows in group.groupby("task", sort=False) for name, mark in _marks(str(task), rows)}
    for name in [*marks, *(name for name in AVERAGES[version] if set(_weights(name, version)) & set(marks))]:
        weights = _weights(name, version)
        missing = {mark for part in weights if (mark := marks.get(part, NOT_RUN))}
        ours = None if missing else _measured(group, weights)
        status = "" if ours else FAILED if FAILED in missing else NOT_RUN
        yield {"benchmark": name, **_beside(ours, status, _printed(cell, name, version))}


def _marks(task: str, rows: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Names of a task's benchmarks, and why they have no number: "" where every seed has one."""
    failed, absent = (rows["status"] == "failed").any(), (rows["status"] == "not run").any()
    mark = FAILED if failed else NOT_RUN if absent else ""
    mapped = [name for (known, _), name in BENCHMARKS.items() if known == task]
    found = [_benchmark(task, metric) for metric in rows["metric"].dropna().unique()]
    for name in dict.fromkeys([*found, *mapped] or [task]):
        yield name, mark or ("" if name in found else NOT_RUN)


def _benchmark(task: str, metric: object) -> str:
    """The paper's name of a metric of ours, or our own."""
    return BENCHMARKS.get((task, str(metric)), f"{task} {metric}")


def _weights(name: str, version: str) -> dict[str, float]:
    """The benchmarks that an average is made of, with their weights; a benchmark itself has weight 1."""
    parts = AVERAGES[version].get(name)
    if parts is None:
        return {name: 1.0}
    return {leaf: weight / len(parts) for part in parts for leaf, weight in _weights(part, version).items()}


def _measured(group: pd.DataFrame, weights: Mapping[str, float]) -> Measured | None:
    """The weighted sum of benchmarks; None unless each has a number for every seed of the cell."""
    done = group[group["metric"].notna()]
    names = [_benchmark(*pair) for pair in zip(done["task"], done["metric"], strict=True)]
    done = done.assign(benchmark=names, seed=done["seed"].fillna(-1)).drop_duplicates(["benchmark", "seed"])
    weight = pd.Series(weights)
    values, errors, items = (
        done.pivot(index="seed", columns="benchmark", values=name).reindex(columns=list(weights))
        for name in ("value", "stderr", "n")
    )
    if values.isna().to_numpy().any():
        return None
    scores, seeds = (values * weight).sum(axis=1), len(values)
    within = float((errors * weight).pow(2).sum(axis=1).mean())
    between = float(scores.var(ddof=1)) / seeds if seeds > 1 else 0.0
    squares = float((weight.pow(2) / items).sum(axis=1).mean())
    return Measured(100 * float(scores.mean()), 100 * math.sqrt(within + between), seeds, squares)


def _printed(cell: Mapping[str, object], benchmark: str, version: str) -> pd.Series | None:
    """The paper's row for this cell; of several tables, the most detailed one's. Options of a method (in brackets in
    its label) do not matter: they are variants of what the paper calls by that name. What a method was combined with
    (" + " in its label: an allocation, a recovery, protected experts) does: the paper has none of these.
    """
    rows = reference()
    compressed = float(str(cell["ratio"])) > 0
    wanted = (
        (rows["paper_version"] == version)
        & (rows["our_model"] == cell["model"])
        & (rows["our_method"] == (str(cell["label"]).split(" (")[0] if " + " not in str(cell["label"]) else ""))
        & ((rows["ratio"] - float(str(cell["ratio"]))).abs() < 1e-9)
        & (rows["our_calibration"] == (cell["calibration"] if compressed else ""))
        & (rows["benchmark"] == benchmark)
        & rows["table"].isin(TABLES)
    )
    found = rows[wanted]
    if found.empty:
        return None
    return found.iloc[found["table"].map(TABLES.index).argsort(kind="stable").iloc[0]]


def _beside(ours: Measured | None, status: str, printed: pd.Series | None) -> dict[str, object]:
    line: dict[str, object] = {"ours": math.nan, "ours_error": math.nan, "seeds": 0, "status": status}
    if ours is not None:
        line |= {"ours": ours.value, "ours_error": ours.error, "seeds": ours.seeds}
    if printed is None:
        return {**line, "verdict": UNPUBLISHED}
    value, std = 100 * float(printed["value"]), 100 * float(printed["std"])
    line |= {"published": value, "std": std, "version": printed["paper_version"], "table": printed["table"]}
    if ours is None:
        return {**line, "verdict": status}
    spread = std if math.isfinite(std) else math.sqrt(value * (100 - value) * ours.squares)
    difference, error = ours.value - value, math.hypot(ours.error, spread)
    verdict = "inside" if abs(difference) <= Z * error else "outside"
    return {**line, "difference": difference, "error": error, "verdict": verdict}


def text(tidy: pd.DataFrame, version: str = "v2") -> str:
    """Our table in the paper's shape, the comparison line by line, how many agree, and how to read it; in Markdown."""
    found = compare(tidy, version)
    names = plan_names(found)[:-1]  # the ratio is shown in a column of its own
    rows = [{name: str(row[name]) for name in names} | _shown(row) for _, row in found.iterrows()]
    table = str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))
    compared = found[found["verdict"].isin(["inside", "outside"])]
    inside = (compared["verdict"] == "inside").sum()
    count = f"{inside} of {len(compared)} compared numbers lie inside." if len(compared) else ""
    return "\n\n".join(part for part in (_in_shape(found), table, count, LEGEND) if part)


def _in_shape(found: pd.DataFrame) -> str:
    """A row for each model, method and ratio, a column for each benchmark; how it was calibrated only where a benchmark
    was scored after several ways.
    """
    shown = found.assign(
        ratio=[f"{ratio:.4g}" for ratio in found["ratio"]],
        ours=[
            _pm(*pair) or mark for *pair, mark in zip(found["ours"], found["ours_error"], found["status"], strict=True)
        ],
    )
    names = ["model", "method", "ratio"]
    if shown.duplicated([*names, "benchmark"]).any():
        names[2:2] = ["calibration", "routing"]
    order = shown[names].drop_duplicates()
    table = shown.pivot(index=names, columns="benchmark", values="ours")[list(dict.fromkeys(shown["benchmark"]))]
    table = table.loc[list(order.itertuples(index=False, name=None))].fillna("")
    return str(table.reset_index().to_markdown(index=False, disable_numparse=True))


LEGEND = (
    'Points. Ours: mean over seeds ± its error (over items, and between seeds); published: "REAP the Experts", arXiv '
    "2510.13999, ± the standard deviation it prints. In brackets after the difference, its error: both errors, or, if "
    "none is printed, ours and the binomial one of the published value on our items. Inside: within 1.96 errors. "
    f"{NOT_RUN} not run, {FAILED} failed: an average is only taken when all its parts are there."
)


def _shown(row: pd.Series) -> dict[str, str]:
    several = f" ({row['seeds']} seeds)" if row["seeds"] > 1 else ""
    published = _pm(row.get("published"), row.get("std"))
    return {
        "ratio": f"{row['ratio']:.4g}",
        "benchmark": str(row["benchmark"]),
        "ours": (_pm(row["ours"], row["ours_error"]) or str(row["status"])) + several,
        "published": f"{published} ({row['version']}, Table {row['table']})" if published else "",
        "difference": f"{row['difference']:+.1f} (±{row['error']:.1f})" if _is_number(row.get("difference")) else "",
        "verdict": str(row["verdict"]),
    }


def _pm(value: object, error: object) -> str:
    if not _is_number(value):
        return ""
    return f"{value:.1f} ± {error:.1f}" if _is_number(error) else f"{value:.1f}"


def _is_number(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
