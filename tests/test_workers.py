"""Many workers, one store: each cell is done once, by one of them, and what a killed one held goes to another.

Here the stages are stood in for by sleeping, so that only the sharing is tested; tests/test_launchers.py has the rest.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event as EventType
from pathlib import Path
from typing import NoReturn

import pytest

from harness import gpus
from harness import run as flow
from harness.errors import StageError, UserError
from harness.launch import workers
from harness.progress import cell_name, holder_of, taken
from harness.spec import Cell
from harness.store import Store
from harness.sweep import expand

Start = Callable[..., BaseProcess]


def worker(folder: Path, cells: tuple[Cell, ...], seconds: float, ready: EventType) -> None:
    """Goes through `run_all`. Each stage notes that it ran; one method cannot be prepared; nothing gets a score."""

    def note(what: str, cell: Cell) -> None:
        with (folder / "notes").open("a") as file:
            file.write(f"{what} {cell.label}\n")

    def prepare(cell: Cell, store: Store) -> None:
        note("prepare", cell)
        time.sleep(0.1)
        if cell.label == "random":
            raise StageError("planted")

    def run(cell: Cell, store: Store, run_id: str) -> None:
        note("run", cell)
        time.sleep(seconds)
        for task in cell.tasks:
            store.write_json("records", cell.record_name(task), {"status": "failed", "run": run_id, "error": "planted"})
        note("ran", cell)

    flow.prepare, flow.run = prepare, run  # type: ignore[assignment]
    ready.wait(120)
    flow.run_all(cells, Store(folder / "store"), "run 1")


@pytest.fixture(scope="module")
def cells() -> tuple[Cell, ...]:
    found = expand(["method=none,frequency,ean,reap,random,man", "suite=tiny_sums", "ratio=0.25"]).cells
    assert pickle.loads(pickle.dumps(found)) == found, "launchers ship them"
    assert len({cell_name(cell) for cell in found}) == 6
    return found


@pytest.fixture
def start(tmp_path: Path, cells: tuple[Cell, ...]) -> Iterator[Start]:
    forks = multiprocessing.get_context("fork")  # all that is imported is there
    started: list[BaseProcess] = []

    def start(seconds: float, ready: EventType) -> BaseProcess:
        process = forks.Process(target=worker, args=(tmp_path, cells, seconds, ready))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def ready() -> EventType:
    return multiprocessing.get_context("fork").Event()


def notes(folder: Path) -> list[tuple[str, str]]:
    """What was done with which cell, in order."""
    file = folder / "notes"
    return [(what, label) for what, _, label in (line.partition(" ") for line in file.read_text().splitlines())]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def test_three_workers_do_each_cell_once_and_none_idles(
    tmp_path: Path, cells: tuple[Cell, ...], start: Start, ready: EventType
) -> None:
    running = [start(0.5, ready) for _ in range(3)]
    ready.set()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0, 0, 0]
    done = Counter(notes(tmp_path))
    labels = {cell.label for cell in cells}
    assert {label for what, label in done if what == "run"} == labels - {"random"}
    assert all(count == 1 for (what, _), count in done.items() if what == "run"), "a cell was done twice"
    assert done["prepare", "random"] == 1, "what failed is not tried again in the same run"
    order = [what for what, _ in notes(tmp_path) if what in ("run", "ran")]
    assert order != ["run", "ran"] * (len(cells) - 1), "one after the other"
    store = Store(tmp_path / "store")
    planted = store.read_json("records", next(c for c in cells if c.label == "random").record_name(cells[0].tasks[0]))
    assert planted and planted["status"] == "failed" and planted["error"] == "planted" and planted["run"] == "run 1"
    assert list((tmp_path / "store" / "running").iterdir()) == []


def test_the_next_run_tries_failures_again(
    tmp_path: Path, cells: tuple[Cell, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: Counter[str] = Counter()

    def fail(cell: Cell, store: Store) -> NoReturn:
        tried[cell.label] += 1
        raise StageError("planted")

    monkeypatch.setattr(flow, "prepare", fail)
    for run in ("run 1", "run 1", "run 2"):
        flow.run_all(cells, Store(tmp_path), run)
    assert set(tried.values()) == {2} and len(tried) == len(cells)


def test_what_a_killed_worker_held_is_taken_over_and_the_rest_is_not_repeated(
    tmp_path: Path, cells: tuple[Cell, ...], start: Start, ready: EventType
) -> None:
    ready.set()
    killed = start(3600, ready)
    wait_for(lambda: (tmp_path / "notes").exists() and any(what == "run" for what, _ in notes(tmp_path)))
    store = Store(tmp_path / "store")
    (held,) = (cell for cell in cells if holder_of(cell_name(cell), store))
    holder = holder_of(cell_name(held), store)
    assert holder and (holder.pid, holder.doing, holder.run) == (killed.pid, "scoring", "run 1")
    other = start(0, ready)
    wait_for(lambda: sum(what == "run" for what, _ in notes(tmp_path)) == len(cells) - 1)
    time.sleep(0.5)
    assert other.exitcode is None, "it waits for the one that is held"
    killed.kill()
    killed.join()
    other.join(120)
    assert other.exitcode == 0
    done = Counter(label for what, label in notes(tmp_path) if what == "run")
    assert done.pop(held.label) == 2 and set(done.values()) == {1}
    assert holder_of(cell_name(held), store) is None


def test_a_cell_that_is_held_is_left_alone(tmp_path: Path, cells: tuple[Cell, ...]) -> None:
    store = Store(tmp_path)
    with taken(cells[0], "scoring", "one", store) as mine:
        with taken(cells[0], "scoring", "two", store) as other:
            assert mine and not other
        found = holder_of(cell_name(cells[0]), store)
        assert found and (found.run, found.pid) == ("one", os.getpid()) and time.time() - found.since < 60
    with taken(cells[0], "scoring", "two", store) as other:
        assert other


def test_holders_elsewhere_are_believed_while_they_give_signs_of_life(tmp_path: Path, cells: tuple[Cell, ...]) -> None:
    store, name = Store(tmp_path), cell_name(cells[0])
    with taken(cells[0], "scoring", "one", store):
        file = store.path("running", f"{name}.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "host": "elsewhere", "pid": 2**22 + 1}))
        assert holder_of(name, store) is not None
        os.utime(store.path("locks", f"cells-{name}.lock"), (0, 0))
        assert holder_of(name, store) is None


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_hydras_flag_for_grids_is_taken_and_asks_for_no_workers(flag: str) -> None:
    assert workers([flag, "method=reap,ean"]) is None
    assert expand([flag, "method=reap,ean"]).cells == expand(["method=reap,ean"]).cells


def test_gpus_are_counted_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,9")
    assert gpus.visible() == ["3", "5", "7", "9"]
    found = workers(["workers=4"])
    assert found and (found.count, found.gpus, found.launcher, found.elsewhere) == (4, 1, "local", False)
    with pytest.raises(UserError, match=r"need 6 GPUs, and 4 can be seen here\. Possible: workers=2\."):
        workers(["workers=3", "gpus_per_worker=2"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = workers(["workers=3", "hydra/launcher=ray_cluster", "gpus_per_worker=2"])
    assert found and found.elsewhere and found.gpus == 2, "what a cluster has, it knows itself"
    assert workers(["workers=1", "method=reap,ean"]) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["workers=0"], "workers=0 is not a whole number from 1 up"),
        (["workers=two"], "workers=two is not a whole number"),
        (["workers=2", "gpus_per_worker=-1"], "gpus_per_worker=-1 is not a whole number from 0 up"),
        (["workers=2", "hydra/launcher=dask"], "hydra/launcher/dask.*Available options.*ray_local slurm submitit"),
        (["workers=2", "hydra/launcher=slurm"], "no sbatch on this machine"),
        (["workers=2", "hydra.launcher._target_=shutil.rmtree"], "no class shutil.rmtree|is no launcher"),
        (["hydra/launcher=local", "hydra.launcher._target_=pathlib.Path"], "is no launcher"),
        (
            ["hydra/launcher=local", "hydra.launcher._target_=hydra_plugins.hydra_moon_launcher.Moon"],
            "needs the package hydra-moon-launcher, which is not installed",
        ),
    ],
)
def test_what_cannot_be_launched_is_refused_in_one_message(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=words):
        workers(arguments)
