"""Where no terminal is, a long pass says how far it has come."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from harness import pass_progress
from harness.pass_progress import PassProgress


def test_a_line_a_minute_with_the_speed_of_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(pass_progress, "time", SimpleNamespace(monotonic=itertools.count(0, 30).__next__))
    progress = PassProgress("pass", 10_000)
    progress.begin_at(6_000)
    for _ in range(4):
        progress.advance(600)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines] == [
        "72%, 20 tokens/s, 02:20 left",
        "84%, 20 tokens/s, 01:20 left",
    ]
