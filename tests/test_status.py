"""./bench status and the progress of a run: counts are those of the records, and no time is made up."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pty
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from harness import status
from harness.errors import UserError
from harness.models import ROOT
from harness.progress import CellState, Holder, Progress, TimeLeft, in_words, taken, time_left
from harness.shown import shown, summary
from harness.spec import Cell
from harness.store import Store, say
from harness.sweep import expand

ASKED = ["method=none,frequency,ean,reap", "suite=tiny_sums,tiny_facts", "ratio=0.25"]
SECONDS = {"calibrate": 1000.0, "plan": 1.0, "recover": 2.0, "export": 3.0, "serve": 4.0, "score": 10.0}


@pytest.fixture(scope="module")
def cells() -> tuple[Cell, ...]:
    return expand(ASKED).cells


def plant(store: Store, cell: Cell, status: str, **more: object) -> None:
    for task in cell.tasks:
        error = "Traceback:\n  somewhere\nValueError: planted" if status == "failed" else None
        document = {"status": status, "seconds": SECONDS, "error": error, "run": "one", "stage": "serve", **more}
        store.write_json("records", cell.record_name(task), document)


@pytest.fixture
def store(tmp_path: Path, cells: tuple[Cell, ...]) -> Store:
    """Three cells done, one failed, the others waiting."""
    store = Store(tmp_path / "store")
    for cell in cells[:3]:
        plant(store, cell, "done")
    plant(store, cells[3], "failed")
    return store


def test_counts_are_those_of_the_records(store: Store, cells: tuple[Cell, ...]) -> None:
    progress = Progress(cells, store)
    states = progress.look()
    assert [state.state for state in states] == ["done"] * 3 + ["failed"] + ["waiting"] * 4
    found = Counter(word for state in states for word in state.tasks.values())
    assert found == Counter(done=3, failed=1, waiting=4)
    assert states[3].reasons == {cells[3].tasks[0].name: "serve: ValueError: planted"}
    assert [state.seconds for state in states] == [20.0] * 3 + [0.0] * 5, "calibration is not one cell's"
    with taken(cells[4], "scoring", "two", store):
        assert progress.look()[4].state == "running"
        assert progress.look()[4].holder.pid == os.getpid()  # type: ignore[union-attr]
    plant(store, cells[4], "done")
    assert Counter(state.state for state in progress.look()) == Counter(done=4, failed=1, waiting=3)


def test_a_failure_of_another_run_waits_to_be_tried_again(store: Store, cells: tuple[Cell, ...]) -> None:
    assert Progress(cells, store, "one").look()[3].state == "failed"
    assert Progress(cells, store, "two").look()[3].state == "waiting"
    assert Progress(cells, store, "two").left() == list(cells[3:])


def states_of(cell: Cell, *given: tuple[str, str, float, float | None]) -> list[CellState]:
    """Of state, kind, seconds and, where somebody is at it, when he began."""
    return [
        CellState(cell, {"t": state}, Holder("r", "h", 1, "scoring", since) if since else None, seconds, {}, kind)
        for state, kind, seconds, since in given
    ]


def test_time_left_is_the_mean_of_finished_cells_of_the_kind_over_the_workers(cells: tuple[Cell, ...]) -> None:
    some = [("done", "a", 10.0, None), ("done", "a", 30.0, None), ("failed", "a", 999.0, None)]
    waiting = [("waiting", "a", 0.0, None)] * 6
    running = [("running", "a", 0.0, 1000.0)]
    assert time_left(states_of(cells[0], *some, *waiting), 1, 1005.0) == TimeLeft(120.0, 0)
    assert time_left(states_of(cells[0], *some, *waiting), 2, 1005.0) == TimeLeft(60.0, 0)
    assert time_left(states_of(cells[0], *some, *waiting, *running), 1, 1005.0) == TimeLeft(135.0, 0)
    assert time_left(states_of(cells[0], *some, *running), 1, 5000.0) == TimeLeft(0.0, 0)
    assert time_left(states_of(cells[0], *some, *waiting), 100, 0.0) == TimeLeft(20.0, 0), "no quicker than one cell"


def test_what_nothing_tells_is_unknown(cells: tuple[Cell, ...]) -> None:
    waiting = [("waiting", "a", 0.0, None), ("waiting", "b", 0.0, None)]
    assert str(time_left(states_of(cells[0], *waiting), 1, 0.0)) == "time left unknown"
    done = [("done", "a", 60.0, None)]
    assert str(time_left(states_of(cells[0], *waiting, *done), 1, 0.0)) == "at least 60 s left"
    assert str(time_left(states_of(cells[0], *done), 1, 0.0)) == "nothing left"
    assert [in_words(s) for s in (8.2, 99, 2580, 11_400)] == ["8 s", "99 s", "43 min", "3 h 10 min"]


def test_a_line_for_every_cell_that_finishes_where_there_is_no_terminal(
    store: Store, cells: tuple[Cell, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(cells, store, "one")
    with shown(progress, 1):
        time.sleep(1.5)
        for cell in cells[4:6]:
            plant(store, cell, "done")
            time.sleep(1.5)
    lines = [re.split(r"  +", line) for line in capfd.readouterr().err.splitlines()]
    assert lines[0] == ["progress", "5 of 8 cells, 1 failed", lines[0][2]]
    assert lines[-1][1] == "6 of 8 cells, 1 failed" and re.fullmatch(r"(about|at least) \d+ s left", lines[-1][2])


def test_the_summary_says_what_failed_why_and_how_to_try_again(
    store: Store, cells: tuple[Cell, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    summary(Progress(cells, store, "one").look(), 2, 100, ["sweep=demo", "model.path=/a b"])
    lines = [re.split(r"  +", line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == ["summary", "8 cells: 1 done, 1 failed, 2 cached, 4 not tried 2 min"]
    assert lines[1] == ["failed", f"{cells[3].slug} on {cells[3].tasks[0].name}", "serve: ValueError: planted"]
    assert lines[2][0] == "retry" and lines[2][1].startswith("./bench run sweep=demo 'model.path=/a b'")


def test_the_command_prints_one_table_without_torch(store: Store, cells: tuple[Cell, ...]) -> None:
    program = (
        "import sys; from harness import status; status.main();"
        "sys.exit('torch was loaded' if 'torch' in sys.modules else 0)"
    )
    with taken(cells[4], "scoring", "two", store):
        command = [sys.executable, "-c", program, *ASKED, f"store={store.root}"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    for line in (
        "8 cells: 3 done, 1 running, 1 failed, 3 waiting",
        "8 records: 3 done, 1 running, 1 failed, 3 waiting",
    ):
        assert line in found.stdout.splitlines()
    assert f"{os.getpid()}, scoring since" in found.stdout and "serve: ValueError: planted" in found.stdout
    assert "60 s used, about" in found.stdout
    assert not (store.root / "locks").exists() or list((store.root / "locks").iterdir()) == [], (
        "looking changes nothing"
    )


def test_processes_that_gather_statistics_are_counted(store: Store, cells: tuple[Cell, ...]) -> None:
    """Also those of ./bench calibrate, which is at no cell; one that was killed counts until its lease is over."""
    asked = status.Sweep("asked", cells, store)

    def said() -> str:
        return status.told(asked, Progress(cells, store).look())

    with store.locked("stats", "one"), store.locked("stats", "two"), store.locked("plans", "three"):
        assert said().endswith("none is running\n2 gathering statistics")
        os.utime(store.path("locks", "stats-one.lock"), (0, 0))
        assert said().endswith("\n1 gathering statistics")
    assert "gathering" not in said()


def test_watching_ends_when_nothing_is_left(store: Store, cells: tuple[Cell, ...], monkeypatch, capsys) -> None:
    for cell in cells[3:]:
        plant(store, cell, "done")
    monkeypatch.setattr(sys, "argv", ["status", *ASKED, f"store={store.root}", "watch=0.2"])
    assert status.main() == 0
    assert "8 cells: 8 done\n" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["watch=", "watch=soon", "watch=0", "watch=-1", "watch=nan", "watch=inf"])
def test_how_often_to_look_is_a_number_of_seconds(given: str) -> None:
    with pytest.raises(UserError, match="give the seconds between two looks"):
        status._watch([given])


def test_on_a_terminal_the_bar_stays_below_what_is_printed(
    store: Store, cells: tuple[Cell, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a real terminal: every line that is said is there whole, on a line of its own."""

    def go_on(terminal: int) -> None:
        sys.stderr = os.fdopen(terminal, "w")
        with shown(Progress(cells, store, "one"), 1):
            for number in range(4):
                say("stage", "of a cell", f"line {number}")
                time.sleep(0.3)

    ours, theirs = pty.openpty()
    monkeypatch.setenv("COLUMNS", "160")
    process = multiprocessing.get_context("fork").Process(target=go_on, args=(theirs,))
    process.start()
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # its end is closed
        while found := os.read(ours, 65536):
            text += found
    process.join(60)
    assert process.exitcode == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode()).replace("\r", "\n")
    lines = [line.strip() for line in plain.splitlines()]
    assert [line.split()[-1] for line in lines if line.startswith("stage")] == ["0", "1", "2", "3"]
    assert any("4 of 8 cells, 1 failed, 0 running" in line for line in lines)


def test_of_equal_cells_there_is_one(cells: tuple[Cell, ...], tmp_path: Path) -> None:
    assert len(Progress([cells[0], replace(cells[0]), cells[1]], Store(tmp_path)).look()) == 2
