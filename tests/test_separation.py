"""Which differences a sweep's tables call real: planted ones are found, equal rows are not told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from harness import claims, items, report, separation, tables
from harness.sweep import Sweep
from tests.test_report import FakeCalibration, FakeCell, FakeTask, sweep_of, write_errors, write_items, write_record

TASK = FakeTask("sums")
CODE, FACTS = FakeTask("code", "code"), FakeTask("facts", "multiple choice")


def planted(rng: np.random.Generator, right: float, n: int = 200) -> list[float]:
    return (rng.random(n) < right).astype(float).tolist()


def filled(folder: Path, rows: dict[tuple[str, float], float], task: FakeTask = TASK, seeds: int = 1) -> Sweep:
    """A sweep whose rows get each item right with this probability, items and seeds drawn apart."""
    rng = np.random.default_rng(5)
    cells = [FakeCell(label, ratio, s, (task,)) for label, ratio in rows for s in range(seeds if ratio else 1)]
    sweep = sweep_of(folder, cells)
    for cell in cells:
        write_items(sweep.store, cell, task, planted(rng, rows[cell.label, cell.ratio]))
    return sweep


def test_each_row_is_compared_with_the_uncompressed_model(tmp_path: Path) -> None:
    sweep = filled(tmp_path, {("uncompressed", 0.0): 0.8, ("REAP", 0.5): 0.4, ("EAN", 0.5): 0.8})
    table = separation.against_uncompressed(report.frame(sweep), items.values(items.read(sweep))).set_index("method")
    assert table["verdict"].to_dict() == {"REAP": "worse", "EAN": separation.NO_DIFFERENCE}
    assert table.loc["REAP", "test"] == "McNemar" and table.loc["REAP", "n"] == "200"
    worth = items.values(items.read(sweep))
    base, reap = (list(worth[cell.row, "sums", "acc"].values()) for cell in sweep.cells[:2])
    lost = sum(b == 1 and r == 0 for b, r in zip(base, reap, strict=True))
    assert table.loc["REAP", "lost"] == str(lost)


def test_the_best_is_bold_only_where_it_is_separated_from_every_other(tmp_path: Path) -> None:
    rows = {("uncompressed", 0.0): 0.9, ("REAP", 0.5): 0.8, ("EAN", 0.5): 0.4, ("Frequency", 0.5): 0.3}
    sweep = filled(tmp_path / "apart", rows)
    tidy = report.frame(sweep)
    best = separation.best(tidy, items.values(items.read(sweep)))
    assert best == {(("toy", "REAP", "0.5"), "sums", "acc")}
    column = tables.scores(tidy, best).iloc[:, 0]
    assert column.loc[("toy", "REAP", "0.5")].startswith("**") and column.str.contains(r"\*\*").sum() == 1
    assert r"\textbf{" in tables.latex(tables.scores(tidy, best), "scores")
    close = filled(tmp_path / "close", {**rows, ("EAN", 0.5): 0.8})
    assert separation.best(report.frame(close), items.values(items.read(close))) == set()


def test_seeds_are_paired_and_a_missing_one_is_not_compared(tmp_path: Path) -> None:
    sweep = filled(tmp_path, {("uncompressed", 0.0): 0.8, ("REAP", 0.5): 0.4}, seeds=3)
    table = separation.against_uncompressed(report.frame(sweep), items.values(items.read(sweep)))
    assert table["test"].tolist() == ["t over items and seeds"] and table["verdict"].tolist() == ["worse"]
    write_record(sweep.store, sweep.cells[2], TASK, None)  # type: ignore[arg-type]
    assert separation.against_uncompressed(report.frame(sweep), items.values(items.read(sweep))).empty


def test_the_interval_over_seeds_needs_every_seed(tmp_path: Path) -> None:
    cells = [FakeCell("REAP", 0.5, seed, (TASK,)) for seed in range(3)]
    sweep = sweep_of(tmp_path, cells)
    for cell, value in zip(cells, (0.5, 0.6, 0.7), strict=True):
        write_record(sweep.store, cell, TASK, value)
    row = separation.over_seeds(report.frame(sweep)).iloc[0]
    assert row["mean, points (95 % over seeds)"] == "60.0 (35.2 to 84.8)" and row["seeds"] == "3"
    write_record(sweep.store, cells[1], TASK, None)
    assert separation.over_seeds(report.frame(sweep)).empty


def test_rows_without_samples_are_left_out_not_guessed(tmp_path: Path) -> None:
    sweep = filled(tmp_path, {("uncompressed", 0.0): 0.8, ("REAP", 0.5): 0.4})
    for file in (tmp_path / "samples").iterdir():
        file.unlink()
    tidy = report.frame(sweep)
    assert separation.against_uncompressed(tidy, items.values(items.read(sweep))).empty
    assert separation.best(tidy, items.values(items.read(sweep))) == set()


def found(sweep: Sweep) -> pd.DataFrame:
    kinds = {task.name: task.kind for cell in sweep.cells for task in cell.tasks}
    return claims.table(claims.findings(report.frame(sweep), items.values(items.read(sweep)), kinds, {}))


FIVE = ("Frequency", "EAN", "REAP", "HC-SMoE", "M-SMoE")


def test_planted_truths_are_told(tmp_path: Path) -> None:
    """Pruning far ahead, REAP ahead of frequency alone, merging as good on multiple choice."""
    rows = {("uncompressed", 0.0): 0.9} | dict(
        zip([(label, 0.5) for label in FIVE], (0.5, 0.8, 0.8, 0.2, 0.1), strict=True)
    )
    verdicts = found(filled(tmp_path / "code", rows, CODE)).set_index("claim")["verdict"]
    assert verdicts["Pruning beats merging on generated answers at 50 %"] == claims.HOLDS
    assert verdicts["REAP beats Frequency on generated answers"] == claims.HOLDS
    assert verdicts["REAP beats EAN on generated answers"] == claims.OPEN
    untested = verdicts[verdicts == "not tested"].index
    assert set(untested) == {claims.COMPETITIVE, claims.WRONG_TEXT, claims.LATE_LAYERS}, "and that is said"
    turned = {(label, ratio): 1 - value for (label, ratio), value in rows.items()}
    verdicts = found(filled(tmp_path / "turned", turned, CODE)).set_index("claim")["verdict"]
    assert verdicts["Pruning beats merging on generated answers at 50 %"] == claims.CONTRADICTED


def test_rows_that_miss_a_seed_are_not_compared_nor_routings_taken_for_seeds(tmp_path: Path) -> None:
    rows = {("REAP", 0.5): 0.9, ("Frequency", 0.5): 0.2}
    sweep = filled(tmp_path / "seeds", rows, CODE, seeds=2)
    assert found(sweep).set_index("claim").loc[claims.OVER_FREQUENCY, "verdict"] == claims.HOLDS
    write_record(sweep.store, sweep.cells[1], CODE, None)  # REAP's second seed
    write_record(sweep.store, sweep.cells[2], CODE, None)  # Frequency's first
    assert found(sweep).set_index("claim").loc[claims.OVER_FREQUENCY, "verdict"] == "not tested"

    rng = np.random.default_rng(0)
    cells = [FakeCell(label, 0.5, 0, (CODE,), routing=way) for label, _ in rows for way in ("actual", "paper")]
    both = sweep_of(tmp_path / "routings", cells)
    for cell in cells:
        write_items(both.store, cell, CODE, planted(rng, rows[cell.label, 0.5]))
    lines = found(both)
    lines = lines[lines["claim"] == claims.OVER_FREQUENCY]
    assert lines["test"].tolist() == ["McNemar, n = 200"] * 2
    assert [("routing=paper" in where) for where in lines["where"]] == [False, True]


def test_the_papers_metric_is_looked_at() -> None:
    assert claims.main_metric("gsm8k", ["exact_match:strict-match", "exact_match:flexible-extract"]).endswith("extract")
    assert claims.main_metric("arc_easy", ["acc", "acc_norm"]) == "acc_norm"
    assert claims.main_metric("boolq", ["acc", "acc_norm"]) == "acc"
    assert claims.main_metric("tiny_code", ["base_pass@1", "plus_pass@1"]) == "plus_pass@1"


def test_competitive_means_within_a_margin(tmp_path: Path) -> None:
    claim = "Merging (HC-SMoE) is competitive with REAP on multiple choice"
    for hc, verdict in ((0.85, claims.HOLDS), (0.3, claims.CONTRADICTED), (0.68, "undecided")):
        sweep = filled(tmp_path / str(hc), {("REAP", 0.5): 0.7, ("HC-SMoE", 0.5): hc}, FACTS)
        assert found(sweep).set_index("claim").loc[claim, "verdict"] == verdict


def test_the_wrong_calibration_text_is_compared_with_the_right_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    cells = [FakeCell("REAP", 0.5, 0, (CODE,), calibration=FakeCalibration(on)) for on in ("tiny_code", "tiny_facts")]
    sweep = sweep_of(tmp_path, cells)
    for cell, right in zip(cells, (0.8, 0.1), strict=True):
        write_items(sweep.store, cell, CODE, planted(rng, right))
    row = found(sweep).set_index("claim").loc["The wrong calibration text destroys code"]
    assert row["verdict"] == claims.HOLDS and "calibrated on tiny_code, REAP, against tiny_facts" in row["where"]


def test_late_layers_are_judged_by_an_exact_permutation(tmp_path: Path) -> None:
    claim = "Late layers collapse more under merging"
    layers = (0.1, 0.2, 0.3, 0.4, 0.5)
    for name, values, verdict in (
        ("up", layers, claims.HOLDS),
        ("down", layers[::-1], claims.CONTRADICTED),
        ("mixed", (0.3, 0.1, 0.5, 0.2, 0.4), claims.OPEN),
    ):
        cells = [FakeCell(label, 0.5, 0, (CODE,)) for label in ("HC-SMoE", "M-SMoE")]
        sweep = sweep_of(tmp_path / name, cells)
        for cell in cells:
            write_record(sweep.store, cell, CODE, 0.5)
            write_errors(sweep.store, cell, *values)
        row = found(sweep).set_index("claim").loc[claim]
        assert row["verdict"] == verdict, name
        distortions = {cell.row: dict(enumerate(layers)) for cell in cells}
        kinds = {CODE.name: CODE.kind}
        both = claims.findings(report.frame(sweep), items.values(items.read(sweep)), kinds, distortions)
        assert [one.verdict for one in both if one.claim == claim] == [claims.HOLDS, verdict]
    assert "5 layers" in row["test"]
