"""Tables and plot are pure functions of records: nothing is averaged over, nothing invented."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness import plot, report, scoring, tables
from harness.cost_tables import STAGES, costs, errors
from harness.footer import agreement, footer
from harness.rows import FAILED, NOT_RUN
from harness.spec import Cell, Row
from harness.store import Store
from harness.sweep import Sweep
from tasks import Item


@dataclass(frozen=True)
class FakeTask:
    name: str
    kind: str = "generation"

    def items(self, samples: Sequence[Mapping[str, Any]]) -> list[Item]:
        return [
            Item(f"{self.name}/{i}", f"problem {i}", row["text"], "42", {"acc": row["acc"]})
            for i, row in enumerate(samples)
        ]


@dataclass(frozen=True)
class FakeModel:
    name: str = "toy"


@dataclass(frozen=True)
class FakeCalibration:
    name: str = "tiny"


@dataclass(frozen=True)
class FakeCell:
    """Only what the report reads of a cell."""

    label: str
    ratio: float
    seed: int = 0
    tasks: tuple[FakeTask, ...] = (FakeTask("sums"), FakeTask("facts"))
    model: FakeModel = field(default_factory=FakeModel)
    calibration: FakeCalibration = field(default_factory=FakeCalibration)
    routing: str = "actual"
    recovery: None = None

    @property
    def calibrates(self) -> bool:
        return self.compresses and self.label != "random"

    @property
    def measures_errors(self) -> bool:
        return self.compresses

    @property
    def errors_name(self) -> str:
        return f"{self.model.name}-{self.label}-{self.ratio}-{self.seed}.json"

    @property
    def compresses(self) -> bool:
        return self.ratio > 0

    @property
    def slug(self) -> str:
        return f"{self.model.name}-{self.label}-{self.ratio}-{self.seed}"

    @property
    def plan_slug(self) -> str:
        return self.slug

    def identity(self) -> dict[str, Any]:
        return {"slug": self.slug}

    @property
    def row(self) -> Row:
        return Cell.row.fget(self)  # type: ignore[attr-defined]

    def record_name(self, task: FakeTask) -> str:
        on = f"{self.calibration.name}-{self.routing}" if self.calibrates else ""
        seed = self.seed if self.compresses else 0
        return f"{self.model.name}-{self.label}-{on}-{self.ratio}-{seed}-{task.name}.json"


def write_record(store: Store, cell: FakeCell, task: FakeTask, value: float | None, **more: Any) -> None:
    record = {
        "status": "failed" if value is None else "done",
        "error": "Traceback\nStageError: the server died" if value is None else None,
        "original": {"parameters": 100, "bytes": 8_000_000},
        "size": {"experts": 6, "distinct": 6.0, "parameters": 75, "bytes": 6_000_000, "distinct_bytes": 6_000_000},
        "seconds": dict.fromkeys(STAGES, 1.25),
        "provenance": {"commit": "abc", "changed": False, "versions": {"torch": "2"}, "processor": "cpu", "cores": 2},
    }
    if value is not None:
        record["score"] = f"{cell.record_name(task)}-score.json"
        record["metrics"] = {"acc": {"value": value, "stderr": 0.02, "n": 300, "higher_is_better": True}}
    store.write_json("records", cell.record_name(task), {**record, **more})


def write_items(store: Store, cell: FakeCell, task: FakeTask, worth: Sequence[float], text: str = "an answer") -> None:
    """A record, and the samples behind it."""
    write_record(store, cell, task, float(np.mean(worth)))
    name = scoring._samples_name(f"{cell.record_name(task)}-score.json")
    rows = [{"acc": value, "text": f"{text} {i}"} for i, value in enumerate(worth)]
    store.put("samples", name, lambda path: scoring._write_samples(path, rows))


def sweep_of(tmp_path: Path, cells: list[FakeCell]) -> Sweep:
    return Sweep("toy", tuple(cells), Store(tmp_path))  # type: ignore[arg-type]


def filled(tmp_path: Path) -> Sweep:
    """Uncompressed; REAP done; EAN: one task failed, one never run."""
    base, reap, ean = FakeCell("uncompressed", 0.0), FakeCell("REAP", 0.25), FakeCell("EAN", 0.25)
    sweep = sweep_of(tmp_path, [base, reap, ean])
    for task, value in zip(base.tasks, (0.9, 0.8), strict=True):
        write_record(sweep.store, base, task, value)
    for task, value in zip(reap.tasks, (0.85, 0.81), strict=True):
        write_record(sweep.store, reap, task, value)
    write_record(sweep.store, ean, ean.tasks[0], None)
    return sweep


def test_scores_show_value_error_and_difference(tmp_path: Path) -> None:
    table = tables.scores(report.frame(filled(tmp_path)))
    assert table.loc[("toy", "uncompressed", "0"), "sums acc (n=300)"] == "90.0 ± 2.0"
    assert table.loc[("toy", "REAP", "0.25"), "sums acc (n=300)"] == "85.0 ± 2.0 (-5.0)"
    assert table.loc[("toy", "REAP", "0.25"), "facts acc (n=300)"] == "81.0 ± 2.0 (+1.0)"


def test_failed_and_absent_cells_are_shown_as_such(tmp_path: Path) -> None:
    sweep = filled(tmp_path)
    table = tables.scores(report.frame(sweep))
    assert table.loc[("toy", "EAN", "0.25")].tolist() == [FAILED, NOT_RUN]
    assert tables.failures(report.frame(sweep)) == ["✗ EAN ratio=0.25 sums: StageError: the server died"]


def test_seeds_are_averaged_only_when_all_are_there(tmp_path: Path) -> None:
    cells = [FakeCell("REAP", 0.5, seed, (FakeTask("sums"),)) for seed in range(3)]
    sweep = sweep_of(tmp_path, cells)
    for cell, value in zip(cells, (0.5, 0.6, 0.7), strict=True):
        write_record(sweep.store, cell, cell.tasks[0], value)
    assert tables.scores(report.frame(sweep)).iloc[0, 0] == "60.0 ± 10.0"
    write_record(sweep.store, cells[1], cells[1].tasks[0], None)
    assert tables.scores(report.frame(sweep)).iloc[0, 0] == "✗ 1 of 3 seeds"
    (tmp_path / "records" / cells[1].record_name(cells[1].tasks[0])).unlink()
    assert tables.scores(report.frame(sweep)).iloc[0, 0] == "— 1 of 3 seeds"


def test_the_uncompressed_model_appears_once_however_the_grid_repeats_it(tmp_path: Path) -> None:
    cells = [FakeCell("uncompressed", 0.0, seed, (FakeTask("sums"),)) for seed in range(3)]
    sweep = sweep_of(tmp_path, cells)
    write_record(sweep.store, cells[0], cells[0].tasks[0], 0.9)
    assert len(report.frame(sweep)) == 1


def test_every_model_is_compared_with_its_own_baseline(tmp_path: Path) -> None:
    task = (FakeTask("sums"),)
    rows = (("uncompressed", 0.0), ("REAP", 0.25))
    cells = [FakeCell(label, ratio, 0, task, FakeModel(name)) for name in "ab" for label, ratio in rows]
    sweep = sweep_of(tmp_path, cells)
    for cell, value in zip(cells, (0.9, 0.8, 0.5, 0.2), strict=True):
        write_record(sweep.store, cell, task[0], value)
    assert tables.scores(report.frame(sweep)).iloc[:, 0].to_dict() == {
        ("a", "uncompressed", "0"): "90.0 ± 2.0",
        ("a", "REAP", "0.25"): "80.0 ± 2.0 (-10.0)",
        ("b", "uncompressed", "0"): "50.0 ± 2.0",
        ("b", "REAP", "0.25"): "20.0 ± 2.0 (-30.0)",
    }


def test_a_sweep_over_calibration_sets_has_a_column_for_them(tmp_path: Path) -> None:
    task = (FakeTask("sums"),)
    sets = [FakeCalibration("code"), FakeCalibration("facts")]
    cells = [FakeCell(label, 0.5, 0, task, calibration=on) for label in ("REAP", "random") for on in sets]
    sweep = sweep_of(tmp_path, [FakeCell("uncompressed", 0.0, 0, task), *cells])
    for cell, value in zip(sweep.cells, (0.9, 0.5, 0.2, 0.1, 0.1), strict=True):
        write_record(sweep.store, cell, cell.tasks[0], value)  # type: ignore[arg-type]
    table = tables.scores(report.frame(sweep))
    assert table.index.names == ["model", "method", "calibration", "ratio"]
    assert table.iloc[:, 0].to_dict() == {
        ("toy", "uncompressed", "none", "0"): "90.0 ± 2.0",
        ("toy", "REAP", "code", "0.5"): "50.0 ± 2.0 (-40.0)",
        ("toy", "REAP", "facts", "0.5"): "20.0 ± 2.0 (-70.0)",
        ("toy", "random", "none", "0.5"): "10.0 ± 2.0 (-80.0)",
    }
    assert len(costs(report.frame(sweep))) == 4
    assert set(plot._lines(report.frame(sweep))) == {"uncompressed", "REAP on code", "REAP on facts", "random"}


def test_the_plot_draws_a_point_only_when_all_its_seeds_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [FakeCell("REAP", ratio, seed, (FakeTask("sums"),)) for ratio in (0.25, 0.5) for seed in range(2)]
    sweep = sweep_of(tmp_path, cells)
    for cell, value in zip(cells, (0.5, None, 0.6, 0.7), strict=True):
        write_record(sweep.store, cell, cell.tasks[0], value)
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda axes, rows, labels: drawn.append(rows))
    plot.plot(report.frame(sweep), "png", tmp_path / "plot.png")
    assert [set(rows["ratio"]) for rows in drawn] == [{0.5}]


def test_nothing_run_at_all_is_a_table_of_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = sweep_of(tmp_path, [FakeCell("REAP", 0.25)])
    assert report.show(sweep, []) == 0
    assert "| toy | REAP | 0.25 | —" in re.sub(r" +", " ", capsys.readouterr().out)


def test_files_are_written_and_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = filled(tmp_path)
    assert report.show(sweep, ["sweep=toy"]) == 1, "a failed cell makes the exit status 1"
    printed = capsys.readouterr().out
    for kind, suffix in [
        ("tables", "md"),
        ("tables", "csv"),
        ("tables", "tex"),
        ("figures", "png"),
        ("figures", "pdf"),
        ("pages", "html"),
    ]:
        path = tmp_path / kind / f"toy.{suffix}"
        assert path.stat().st_size > 200
        assert str(path) in printed
    tidy = pd.read_csv(tmp_path / "tables" / "toy.csv")
    assert set(tidy["status"]) == {"done", "failed", "not run"}
    assert tidy[tidy["status"] != "done"]["value"].isna().all()
    latex = (tmp_path / "tables" / "toy.tex").read_text()
    assert r"\toprule" in latex and r"$\pm$" in latex and "✗" not in latex


def test_costs_name_what_a_size_counts(tmp_path: Path) -> None:
    row = costs(report.frame(filled(tmp_path))).loc[("toy", "REAP", "0.25")]
    assert row["experts written per layer"] == "6"
    assert row["MB before"] == "8.00" and row["MB written"] == "6.00"
    assert row["score s"] == "2.5", "summed over the two tasks"


def write_errors(store: Store, cell: FakeCell, *layers: float) -> None:
    store.write_json("errors", cell.errors_name, {"layers": dict(enumerate(layers)), "seconds": 2.0})


def test_errors_are_shown_for_each_layer_and_averaged_over_seeds(tmp_path: Path) -> None:
    cells = [FakeCell("uncompressed", 0.0), *(FakeCell("REAP", 0.25, seed) for seed in (0, 1)), FakeCell("EAN", 0.25)]
    sweep = sweep_of(tmp_path, cells)
    for cell in cells:
        for task in cell.tasks:
            write_record(sweep.store, cell, task, 0.5)
    write_errors(sweep.store, cells[1], 0.1, 0.3)
    write_errors(sweep.store, cells[2], 0.2, 0.6)
    table = errors(report.frame(sweep))
    assert table.index.tolist() == [("toy", "REAP", "0.25")], "nothing is said where nothing was measured"
    assert table.iloc[0].to_dict() == {"mean error": "0.3000", "layer 0": "0.1500", "layer 1": "0.4500"}
    write_record(sweep.store, cells[2], cells[2].tasks[0], None)
    assert errors(report.frame(sweep)).iloc[0, 0] == "0.3000", "a seed counts once, whatever it has scored"


def by_ratio_sweep(tmp_path: Path) -> Sweep:
    """Two methods at three ratios: the larger the error, the lower the score; one cell failed."""
    ratios = (0.125, 0.25, 0.5)
    cells = [FakeCell("uncompressed", 0.0), *(FakeCell(label, ratio) for label in ("REAP", "EAN") for ratio in ratios)]
    sweep = sweep_of(tmp_path, cells)
    for place, cell in enumerate(cells):
        for task in cell.tasks:
            value = 1 - 0.1 * place if (cell.label, cell.ratio, task.name) != ("EAN", 0.25, "facts") else None
            write_record(sweep.store, cell, task, value)
        if cell.compresses:
            write_errors(sweep.store, cell, 0.01 * place)
    return sweep


def test_many_ratios_stand_side_by_side(tmp_path: Path) -> None:
    made = tables.all_of(report.frame(by_ratio_sweep(tmp_path)))
    assert list(made) == [
        "sums acc (n=300); uncompressed 100.0 ± 2.0",
        "facts acc (n=300); uncompressed 100.0 ± 2.0",
        "mean reconstruction error of the layers",
    ]
    sums, facts, wrong = made.values()
    assert sums.columns.tolist() == ["0.125", "0.25", "0.5"]
    assert sums.loc[("toy", "REAP")].tolist() == ["90.0 ± 2.0", "80.0 ± 2.0", "70.0 ± 2.0"]
    assert facts.loc[("toy", "EAN")].tolist() == ["60.0 ± 2.0", FAILED, "40.0 ± 2.0"]
    assert wrong.loc[("toy", "EAN")].tolist() == ["0.0400", "0.0500", "0.0600"]
    assert sums.index.tolist() == [("toy", "REAP"), ("toy", "EAN")], "in the order of the sweep"
    text = tables.text(made)
    assert all(f"**{title}**\n\n| model" in text for title in made), "each says what it shows"
    assert "MB written" not in footer(report.frame(by_ratio_sweep(tmp_path)))


def test_the_error_is_compared_with_the_score_within_each_ratio(tmp_path: Path) -> None:
    assert "sums acc -1.00" in agreement(report.frame(by_ratio_sweep(tmp_path)))
    assert agreement(report.frame(filled(tmp_path / "few"))) == ""


def test_models_are_not_mixed_when_errors_are_compared_with_scores(tmp_path: Path) -> None:
    """Within each model the larger error goes with the lower score; pooled, the strong model would hide it."""
    cells, sweep = [], sweep_of(tmp_path, [])
    for model, base in (("weak", 0.1), ("strong", 0.9)):
        for place, label in enumerate(("REAP", "EAN", "MAN")):
            for ratio in (0.125, 0.25, 0.5):
                cell = FakeCell(label, ratio, model=FakeModel(model), tasks=(FakeTask("sums"),))
                cells.append(cell)
                write_record(sweep.store, cell, cell.tasks[0], base - 0.01 * place)
                write_errors(sweep.store, cell, base + 0.01 * place)
    tidy = report.frame(sweep_of(tmp_path, cells))
    assert "sums acc -1.00" in agreement(tidy)
    assert agreement(tidy.assign(value=0.5)) == "", "of equal scores no order can be told"


def test_an_experiment_that_calibrates_for_each_task_has_one_row_for_its_scores(tmp_path: Path) -> None:
    """Code calibrated on code, facts on facts: one row of scores, but two plans with sizes of their own."""
    pairs = [(FakeTask("code"), FakeCalibration("code")), (FakeTask("facts"), FakeCalibration("facts"))]
    cells = [FakeCell("REAP", 0.5, 0, (task,), calibration=on) for task, on in pairs]
    sweep = sweep_of(tmp_path, cells)
    for cell, value in zip(cells, (0.5, 0.2), strict=True):
        write_record(sweep.store, cell, cell.tasks[0], value)
    tidy = report.frame(sweep)
    assert tables.scores(tidy).to_dict("index") == {
        ("toy", "REAP", "0.5"): {"code acc (n=300)": "50.0 ± 2.0", "facts acc (n=300)": "20.0 ± 2.0"}
    }
    assert costs(tidy).index.tolist() == [("toy", "REAP", "code", "0.5"), ("toy", "REAP", "facts", "0.5")]
