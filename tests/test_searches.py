"""Searches as stages of a run: killed, they go on where they were and end as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import gather, stages
from harness.errors import UserError
from harness.models import ROOT
from harness.plan import Plan
from harness.store import Store
from harness.sweep import expand

SMALL = ["ratio=0.5", "calibration.sequences=8", "calibration.held_out=0"]
SEARCHES = {
    "EvoESAP": [
        *("system=evoesap", "allocation.population=5", "allocation.generations=5", "allocation.sequences=4"),
        *("allocation.elites=2",),
    ],
    "RCO": ["system=rco", "method.steps=8", "method.samples=2", "method.sequences=4", "method.check_every=3"],
}


def arguments(name: str, store: Path) -> list[str]:
    return [*SEARCHES[name], *SMALL, f"store={store}"]


def planned(name: str, store: Path) -> Plan:
    (cell,) = expand(arguments(name, store)).cells
    return stages.plan(cell, gather.statistics(cell, Store(store)), Store(store))


@pytest.mark.parametrize("name", ["EvoESAP", pytest.param("RCO", marks=pytest.mark.slow)])
def test_a_killed_search_ends_as_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = [sys.executable, "-m", "harness.run", *arguments(name, broken)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    states: set[str] = set()
    while len(states) < 3 and process.poll() is None and time.monotonic() < deadline:
        states |= {path.read_text() for path in broken.glob("searches/[!.]*.json")}
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(states) >= 3 and not list(broken.glob("plans/[!.]*.json")), "it was killed while it searched"
    resumed, uninterrupted = planned(name, broken), planned(name, whole)
    assert resumed.layers == uninterrupted.layers
    assert sum(resumed.written_experts().values()) == 64
    search = uninterrupted.provenance["search"]
    assert resumed.provenance["search"]["notes"] == search["notes"]
    assert search["spent"]["evaluations"] > 0 and search["spent"]["tokens"] > 0
    assert resumed.provenance["search"]["spent"]["evaluations"] == search["spent"]["evaluations"], "none counts twice"
    states = {json.dumps(json.loads(path.read_text())["state"]) for path in broken.glob("searches/*.json")}
    assert len(states) == 1, "one search, one state"


def test_more_text_than_there_is_cannot_be_searched_on(tmp_path: Path) -> None:
    (cell,) = expand([*arguments("EvoESAP", tmp_path), "allocation.sequences=9"]).cells
    with pytest.raises(UserError, match="searches on 9 sequences, and calibration 'tiny' has 8"):
        stages.plan(cell, gather.statistics(cell, Store(tmp_path)), Store(tmp_path))


def test_what_merges_cannot_be_masked(tmp_path: Path) -> None:
    (cell,) = expand(
        ["method=hc_smoe", "allocation=evoesap", *SMALL, "allocation.sequences=4", f"store={tmp_path}"]
    ).cells
    with pytest.raises(UserError, match="HCSMoE merges experts"):
        stages.plan(cell, gather.statistics(cell, Store(tmp_path)), Store(tmp_path))


def test_counts_that_two_would_decide_are_refused() -> None:
    for asked, reason in (
        (["method=rco", "allocation=evoesap"], "shares out the experts itself"),
        (["method=ream", "allocation=global_score"], "cannot give before it runs"),
        (["method=hybrid", "allocation=evoesap"], "cannot give before it runs"),
        (["method=rco", "recovery=router"], "one expert count for all layers"),
        (["method=reap", "allocation=evoesap", "recovery=all"], "one expert count for all layers"),
    ):
        (cell,) = expand(asked).cells
        with pytest.raises(UserError, match=reason):
            cell.check()
