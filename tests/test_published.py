"""The published numbers are the paper's, fit together as it says, and are compared with ours by its definitions."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest

from harness import published
from harness.models import ROOT
from harness.published import BENCHMARKS, CHOICE, UNPUBLISHED, compare, reference
from harness.rows import FAILED, NOT_RUN
from tests.conftest import needs_shared

COLUMNS = ("paper_version", "table", "model", "method", "ratio", "calibration", "benchmark", "metric", "value", "std")
SMALL = ("ernie_4_5_21b", "qwen3_30b_a3b", "mixtral_8x7b", "llama_4_scout", "glm_4_5_air")
LARGE = ("qwen3_coder_480b", "kimi_k2")


def text(file: Any) -> pd.DataFrame:
    return pd.read_csv(file, dtype=str, keep_default_na=False)


# ---- the numbers


def test_every_number_is_as_printed_to_the_digit() -> None:
    printed = text(needs_shared("reference/reap_tables.csv"))
    pd.testing.assert_frame_equal(text(published.REFERENCE)[list(COLUMNS)], printed[list(COLUMNS)])
    assert len(printed) == 2028


def test_our_names_are_names_of_ours() -> None:
    rows = reference()
    stems = {
        folder: {path.stem for path in (ROOT / "conf" / folder).glob("*.yaml")} for folder in ("model", "calibration")
    }
    assert set(rows["our_model"]) == {"", *SMALL, *LARGE} <= {"", *stems["model"]}
    assert set(rows["our_calibration"]) - {""} <= stems["calibration"]
    labels = {
        line[7:].strip()
        for path in (ROOT / "conf/method").glob("*.yaml")
        for line in path.open()
        if line[:6] == "label:"
    }
    assert set(rows["our_method"]) - {""} == labels & {"uncompressed", "M-SMoE", "HC-SMoE", "Frequency", "EAN", "REAP"}
    assert rows.groupby("our_model")["model"].nunique().drop("").eq(1).all()


def loss(models: tuple[str, ...], benchmark: str, method: str, ratio: float, table: str) -> float:
    """Mean over models of the points lost."""
    rows = reference().query("paper_version == 'v2' and table == @table and benchmark == @benchmark")
    values = rows.set_index(["our_model", "our_method", "ratio"])["value"]
    return 100 * sum(values[m, "uncompressed", 0.0] - values[m, method, ratio] for m in models) / len(models)


HEADLINES = [
    # models, benchmark, table, method: points lost at 25 and 50 %
    (SMALL, "Code Avg", "A7", "REAP", 1.90, 6.90),
    (SMALL, "Code Avg", "A7", "EAN", 2.28, 10.26),
    (SMALL, "Code Avg", "A7", "Frequency", 3.04, 16.04),
    (SMALL, "Code Avg", "A7", "HC-SMoE", 5.56, 20.82),
    (SMALL, "Code Avg", "A7", "M-SMoE", 5.66, 24.32),
    (SMALL, "MC Avg", "A6", "REAP", 4.48, 13.36),
    (SMALL, "MC Avg", "A6", "HC-SMoE", 4.36, 13.20),
    (SMALL, "MC Avg", "A6", "EAN", 6.58, 14.66),
    (SMALL, "MC Avg", "A6", "Frequency", 7.04, 15.66),
    (SMALL, "MC Avg", "A6", "M-SMoE", 10.92, 21.72),
    (LARGE, "Code Avg", "3", "REAP", 0.15, 1.20),
    (LARGE, "Code Avg", "3", "EAN", 3.25, 10.00),
    (LARGE, "Code Avg", "3", "Frequency", 23.35, 60.05),
    (("qwen3_30b_a3b", "glm_4_5_air"), "Math Avg", "2", "REAP", 0.10, 2.75),
    (("qwen3_30b_a3b", "glm_4_5_air"), "Math Avg", "2", "EAN", 0.15, 4.80),
    (("qwen3_30b_a3b", "glm_4_5_air"), "Math Avg", "2", "Frequency", 0.55, 14.55),
    (("qwen3_30b_a3b", "glm_4_5_air"), "Math Avg", "2", "HC-SMoE", 2.25, 17.05),
    (("qwen3_30b_a3b", "glm_4_5_air"), "Math Avg", "2", "M-SMoE", 0.95, 23.65),
]


@pytest.mark.parametrize(("models", "benchmark", "table", "method", "quarter", "half"), HEADLINES)
def test_the_papers_headline_averages(models, benchmark, table, method, quarter, half) -> None:
    assert loss(models, benchmark, method, 0.25, table) == pytest.approx(quarter, abs=0.006)
    assert loss(models, benchmark, method, 0.5, table) == pytest.approx(half, abs=0.006)


def test_tool_use_at_half_the_experts() -> None:
    for method, points in (("REAP", 5.90), ("EAN", 6.20), ("Frequency", 47.05)):
        assert loss(LARGE, "BFCLv3 Overall", method, 0.5, "3") == pytest.approx(points, abs=0.006)


def test_every_average_is_that_of_its_parts_but_for_one_printed_cell() -> None:
    """The one cell is an Eval+, which the Code Avg beside it takes along. v1 prints no parts of its Eval+: they are
    those of v2's Table A7.
    """
    rows = reference()
    rows = rows[rows["table"].isin(published.TABLES)]
    values = {
        (row.paper_version, row.model, row.method, row.ratio, row.calibration, row.benchmark, row.table): row.value
        for row in rows.itertuples()
    }

    def part(name: str, row: Any) -> float | None:
        places = [(row.paper_version, row.table), *(("v2", table) for table in ("A7", "A6", "2", "3"))]
        found = (values.get((v, row.model, row.method, row.ratio, row.calibration, name, t)) for v, t in places)
        return next((value for value in found if value is not None), None)

    wrong, checked = [], 0
    for row in rows.itertuples():
        names = published.AVERAGES[row.paper_version].get(row.benchmark)
        if names is None:
            continue
        parts = [part(name, row) for name in names]
        if None in parts:  # Table A8 prints no parts of Eval+
            assert (row.table, row.benchmark) == ("A8", "Eval+")
            continue
        checked += 1
        if abs(sum(parts) / len(parts) - row.value) > 0.0016:
            wrong.append((row.table, row.our_model, row.method, row.ratio, row.benchmark))
    assert checked > 350
    assert wrong == [("A7", "mixtral_8x7b", "M-SMoE", 0.5, name) for name in ("Eval+", "Code Avg")]


# ---- the comparison


def line(task: str, metric: str | None, value: float = math.nan, **more: Any) -> dict[str, Any]:
    """A row of the tidy frame: Qwen3-30B under REAP at 50 %, one seed."""
    cell = {"model": "qwen3_30b_a3b", "label": "REAP", "calibration": "evol_codealpaca", "routing": "actual"}
    row = {**cell, "ratio": 0.5, "seed": 42, "task": task, "metric": metric, "value": value, "stderr": 0.03, "n": 164}
    return {**row, "status": "done" if metric else "not run", **more}


def one(rows: list[dict[str, Any]], benchmark: str, version: str = "v2") -> pd.Series:
    found = compare(pd.DataFrame(rows), version).set_index("benchmark")
    return found.loc[benchmark]


def printed(benchmark: str, table: str = "A7", **where: Any) -> pd.Series:
    cell = {"our_model": "qwen3_30b_a3b", "our_method": "REAP", "ratio": 0.5, "table": table, **where}
    rows = reference()
    (found,) = [
        row for _, row in rows.iterrows() if row["benchmark"] == benchmark and all(row[k] == v for k, v in cell.items())
    ]
    return found


def test_a_number_within_both_errors_is_inside_and_one_just_beyond_is_not() -> None:
    paper = printed("HumanEval+")
    error = math.hypot(0.03, paper["std"])
    assert paper["std"] > 0
    for sign in (-1, 1):
        for share, verdict in ((0.99, "inside"), (1.01, "outside")):
            ours = paper["value"] + sign * share * 1.96 * error
            found = one([line("humaneval", "plus_pass@1", ours)], "HumanEval+")
            assert found["verdict"] == verdict
            assert found["difference"] == pytest.approx(sign * share * 196 * error)
            assert (found["version"], found["table"], found["error"]) == ("v2", "A7", pytest.approx(100 * error))


def test_without_a_printed_deviation_the_published_value_has_its_binomial_error_on_our_items() -> None:
    rows = [line("winogrande", "acc", 0.7, model="glm_4_5_air", n=400, stderr=0.02)]
    p = printed("WinoGrande", "A6", our_model="glm_4_5_air")["value"]
    assert one(rows, "WinoGrande")["error"] == pytest.approx(100 * math.sqrt(0.02**2 + p * (1 - p) / 400))


def test_more_seeds_shrink_the_error_between_seeds_but_not_over_items() -> None:
    values = (0.70, 0.72, 0.77)
    rows = [line("humaneval", "plus_pass@1", value, seed=seed) for seed, value in enumerate(values)]
    found = one(rows, "HumanEval+")
    assert found["seeds"] == 3 and found["ours"] == pytest.approx(73.0)
    assert found["ours_error"] == pytest.approx(100 * math.sqrt(0.03**2 + pd.Series(values).var() / 3))
    same = one([line("humaneval", "plus_pass@1", 0.7, seed=seed) for seed in range(50)], "HumanEval+")
    assert same["ours_error"] == pytest.approx(3.0)


def test_averages_follow_the_versions_definition() -> None:
    large = {"model": "kimi_k2", "calibration": "agentic"}
    values = {("humaneval", "base"): 0.9, ("humaneval", "plus"): 0.8, ("mbpp", "base"): 0.7, ("mbpp", "plus"): 0.4}
    rows = [line(task, f"{kind}_pass@1", value, **large) for (task, kind), value in values.items()]
    v2, v1 = one(rows, "Eval+"), one(rows, "Eval+", "v1")
    assert v2["ours"] == pytest.approx(60.0) and v1["ours"] == pytest.approx(70.0)
    assert v2["ours_error"] == pytest.approx(100 * 0.03 / math.sqrt(2))
    assert v2["published"] == 100 * printed("Eval+", "A7", our_model="kimi_k2")["value"]
    assert v1["published"] == 100 * printed("Eval+", "3", our_model="kimi_k2", paper_version="v1")["value"]
    assert v1["published"] > v2["published"]


def test_an_average_of_seeds_is_taken_before_their_deviation() -> None:
    """Benchmarks that rise and fall against each other leave an average that does not move."""
    rows = [
        line(task, "plus_pass@1", value, seed=seed)
        for seed, pair in enumerate(((0.5, 0.7), (0.7, 0.5)))
        for task, value in zip(("humaneval", "mbpp"), pair, strict=True)
    ]
    assert one(rows, "Eval+")["ours_error"] == pytest.approx(100 * 0.03 / math.sqrt(2))
    assert one(rows, "HumanEval+")["ours_error"] > 10


def test_nothing_is_averaged_over_what_is_missing() -> None:
    done = [line(task, metric, 0.5) for (task, metric), name in BENCHMARKS.items() if name in CHOICE]
    assert one(done, "MC Avg")["ours"] == pytest.approx(50.0)
    for absent, mark in ((line("rte", None), NOT_RUN), (line("rte", None, status="failed"), FAILED)):
        rows = [row for row in done if row["task"] != "rte"]
        found = one([*rows, absent], "MC Avg")
        assert math.isnan(found["ours"]) and found["verdict"] == found["status"] == mark
        assert one([*rows, absent], "RTE")["status"] == mark
        assert math.isnan(one(rows, "MC Avg")["ours"]), "not even asked for"
    second = [{**row, "seed": 11} for row in done if row["task"] != "rte"]
    assert one([*done, *second], "MC Avg")["status"] == NOT_RUN, "one seed has no RTE at all"
    code = [line("humaneval", "plus_pass@1", 0.5), line("mbpp", "plus_pass@1", 0.5)]
    assert one(code, "Code Avg")["status"] == NOT_RUN, "LiveCodeBench is not offered"


def test_what_the_paper_does_not_print_is_said_so() -> None:
    row = line("humaneval", "plus_pass@1", 0.5)
    for change in (
        {"model": "tiny"},
        {"calibration": "tulu_math"},
        {"ratio": 0.375},
        {"label": "random"},
        {"label": "REAP + super experts"},
    ):
        found = one([{**row, **change}], "HumanEval+")
        assert found["verdict"] == UNPUBLISHED and found["ours"] == 50.0
    assert one([line("tiny_sums", "exact_match", 0.5, model="tiny")], "tiny_sums exact_match")["verdict"] == UNPUBLISHED
    assert one([line("tiny_sums", None, model="tiny")], "tiny_sums")["status"] == NOT_RUN


def test_the_calibration_text_chooses_the_table() -> None:
    row = line("boolq", "acc", 0.7)
    assert one([row], "BoolQ")["table"] == "A6"
    assert one([{**row, "calibration": "c4"}], "BoolQ")["table"] == "A8"
    plain = {"label": "uncompressed", "calibration": "none", "ratio": 0.0, "seed": None}
    found = one([{**row, **plain}], "BoolQ")
    assert found["published"] == 100 * printed("BoolQ", "A6", our_method="uncompressed", ratio=0.0)["value"]


def test_a_methods_options_are_compared_with_the_method() -> None:
    row = line("boolq", "acc", 0.7, label="M-SMoE (align=weights)")
    assert one([row], "BoolQ")["published"] == 100 * printed("BoolQ", "A6", our_method="M-SMoE")["value"]


def test_the_text_has_the_papers_shape_then_every_line_and_the_count() -> None:
    rows = [
        line("humaneval", "plus_pass@1", printed("HumanEval+")["value"]),
        line("mbpp", "plus_pass@1", 0.0),
        line("gsm8k", "exact_match:flexible-extract", printed("GSM8K", "2")["value"], calibration="tulu_math"),
        line("tiny_sums", "exact_match", 0.5, model="tiny", calibration="tiny"),
    ]
    said = published.text(pd.DataFrame(rows))
    shape, lines, count, legend = said.split("\n\n")
    assert "HumanEval+" in shape.splitlines()[0] and "GSM8K" in shape.splitlines()[0]
    assert sum("qwen3_30b_a3b" in row for row in shape.splitlines()) == 1, "benchmarks of two texts share a row"
    assert UNPUBLISHED in lines and NOT_RUN in lines and "(v2, Table A7)" in lines
    assert count == "2 of 4 compared numbers lie inside."
    assert "1.96" in legend
