"""From model to plan and error through the store, on the embedded model: every way of asking a method."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from harness import gather, scoring, stages
from harness.errors import StageError, UserError
from harness.spec import Cell
from harness.stats import EXTRAS
from harness.store import Store
from harness.sweep import expand

TEXT = ["calibration.sequences=4", "calibration.held_out=2", "ratio=0.5"]


def cells(store: Path, *overrides: str) -> dict[str, Cell]:
    return {cell.label: cell for cell in expand([*TEXT, f"store={store}", *overrides]).cells}


def planned(cell: Cell, store: Store):
    given = gather.statistics(cell, store)
    made = stages.plan(cell, given, store)
    stages.reconstruct(cell, made, store)
    return made


@pytest.mark.parametrize(
    "overrides",
    [["method=ream"], ["method=hybrid"], ["method=aimer"], ["method=reap", "protect=super_experts"], ["method=random"]],
    ids=lambda overrides: " ".join(overrides),
)
def test_a_plan_and_its_errors_are_made_once_and_found_again(overrides: list[str], tmp_path: Path, capsys) -> None:
    (cell,) = cells(tmp_path, *overrides).values()
    store = Store(tmp_path)
    first = planned(cell, store)
    assert set(first.distinct_experts().values()) == {16}
    found = json.loads(store.path("errors", cell.errors_name).read_text())
    assert set(found["layers"]) == {"0", "1", "2", "3"} and found["tokens"] == 512
    assert all(0 < error < 2 for error in found["layers"].values())
    before = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and "locks" not in str(path)
    }
    capsys.readouterr()
    assert planned(cell, store).layers == first.layers
    after = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and "locks" not in str(path)
    }
    assert after == before, "nothing is made twice"


def test_one_pass_serves_all_methods(tmp_path: Path) -> None:
    """The first of a sweep's cells gathers what every method of it reads; the others find it."""
    store = Store(tmp_path)
    sweep = expand([*TEXT, f"store={tmp_path}", "method=reap,hope,frozen_gate,easy_ep,hc_smoe,m_smoe,partial_preserve"])
    arguments = f"collect=[{','.join(sweep.extras)}]"
    everyone = cells(tmp_path, "method=reap,hope,frozen_gate,easy_ep,hc_smoe,m_smoe,partial_preserve", arguments)
    for cell in everyone.values():
        planned(cell, store)
    assert len(list((tmp_path / "stats").glob("*.safetensors"))) == 1
    made = {
        json.loads(path.read_text())["provenance"]["statistics"]["seconds"] for path in (tmp_path / "plans").iterdir()
    }
    assert len(made) == 1, "the same pass stands behind every plan"


def test_what_the_model_cannot_give_fails_only_the_method_that_needs_it(tmp_path: Path, monkeypatch) -> None:
    from harness.residual import ResidualHooks

    def refuse(self):
        raise UserError("no norm gives the block its input")

    monkeypatch.setattr(ResidualHooks, "attach", refuse)
    store = Store(tmp_path)
    both = cells(tmp_path, "method=reap,easy_ep", "collect=[gate_norm_turn]")
    with pytest.raises(UserError, match="no norm"):
        planned(both["EASY-EP"], store)
    planned(both["REAP"], store)


def test_an_error_that_cannot_be_measured_costs_no_plan_and_is_tried_again(tmp_path: Path, monkeypatch, capsys) -> None:
    (cell,) = cells(tmp_path, "method=reap").values()
    store = Store(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(stages, "_reconstruction", lambda *_: (_ for _ in ()).throw(MemoryError("not enough")))
        made = planned(cell, store)
    assert "MemoryError: not enough" in capsys.readouterr().err
    assert not store.path("errors", cell.errors_name).exists()
    assert not scoring.is_done(cell, cell.tasks[0], store)
    stages.reconstruct(cell, made, store)
    assert store.path("errors", cell.errors_name).exists()


def test_a_failure_does_not_replace_a_finished_record(tmp_path: Path) -> None:
    """Also where only the plan's error is missing, and the cell is gone through again."""
    (cell,) = cells(tmp_path, "method=reap").values()
    store, task = Store(tmp_path), cell.tasks[0]
    store.write_json("records", cell.record_name(task), {"status": "done", "metrics": {}})
    assert scoring.has_score(cell, task, store) and not scoring.is_done(cell, task, store)
    scoring.record(cell, None, None, task, scoring.Failure("plan", "no memory", None), store, run="")
    assert scoring.has_score(cell, task, store)


def test_statistics_that_are_not_finite_make_no_plan(tmp_path: Path) -> None:
    (cell,) = cells(tmp_path, "method=reap").values()
    given = gather.statistics(cell, Store(tmp_path))
    given.layers[2].sums["gate_norm"][7] = np.inf
    with pytest.raises(StageError, match="gate_norm of layer 2"):
        stages.plan(cell, given, Store(tmp_path))
    assert not list((tmp_path / "plans").glob("*.json")) if (tmp_path / "plans").exists() else True


def test_errors_do_not_depend_on_how_statistics_were_routed(tmp_path: Path) -> None:
    names = {
        cell.errors_name for cell in expand([*TEXT, f"store={tmp_path}", "method=random", "routing=actual,paper"]).cells
    }
    assert len(names) == 1
    calibrations = expand([*TEXT, f"store={tmp_path}", "method=hybrid", "calibration=tiny,tiny_code"]).cells
    assert len({cell.errors_name for cell in calibrations}) == 2


def test_a_method_that_only_measures_is_identified_by_its_text(tmp_path: Path) -> None:
    parts = ["method=hybrid", "method.prune._target_=methods.aimer.AIMER"]
    parts += ["method.merge.importance._target_=methods.aimer.AIMER", "method.merge.similarity=logits"]
    one, other = expand([*TEXT, f"store={tmp_path}", *parts, "calibration=tiny,tiny_code"]).cells
    assert one.identity() != other.identity()


def test_a_sequence_gathers_its_own_statistics_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    (cell,) = cells(tmp_path, "method=ream", f"collect=[{','.join(sorted(EXTRAS))}]").values()
    asked = []
    monkeypatch.setattr(
        stages, "decide_in_sequence", lambda method, model, batches, extras, *_: asked.append(extras) or {}
    )
    with pytest.raises(UserError):  # the empty plan fits no model
        planned(cell, Store(tmp_path))
    assert asked == [{"all_gated_output_sum", "logit_gram"}], "REAM's own"
