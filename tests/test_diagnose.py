"""The table of HodgeCover's diagnostics, on toy layers."""

from __future__ import annotations

import sys

import pytest

from harness import diagnose
from harness.decide import decide
from harness.plan import Plan
from tests.test_methods import make
from tests.toy import random_stats


def test_every_layer_has_its_controls_and_its_distance_from_reap() -> None:
    stats, keep = random_stats(3), dict.fromkeys(range(3), 6)
    for name, same in (("reap", True), ("hodgecover", False)):
        plan = Plan(decide(make(name, **({} if same else {"sal_norm": "sum"})), stats, keep))
        rows = list(diagnose.layers(stats, plan, "l2"))
        assert [row["layer"] for row in rows] == [0, 1, 2]
        spreads = [[float(end) for end in row["relabelled"].split(" to ")] for row in rows]
        assert all(low <= high for low, high in spreads)
        assert all(0 <= float(row["harmonic retained"]) <= 1 for row in rows)
        jaccard = [float(row["Jaccard with REAP"]) for row in rows]
        assert (jaccard == [1.0, 1.0, 1.0]) == same


def test_a_method_without_barriers_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["diagnose", "method=reap"])
    assert diagnose.main() == 2
    assert "reads no merge barriers" in capsys.readouterr().err
