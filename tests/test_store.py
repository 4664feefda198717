"""The store: made once, never half-written, keyed by what determines the content."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from harness.store import Store, key, remove


def test_is_made_once(tmp_path: Path) -> None:
    store, calls = Store(tmp_path), []

    def make(path: Path) -> None:
        calls.append(path)
        path.write_text("made")

    for _ in range(2):
        assert store.once("stats", "a.txt", make).read_text() == "made"
    assert len(calls) == 1
    store.put("stats", "a.txt", make)
    assert len(calls) == 2


@pytest.mark.parametrize("folder", [False, True])
def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, folder: bool) -> None:
    store = Store(tmp_path)

    def break_off(path: Path) -> None:
        if folder:
            path.mkdir()
            path = path / "half"
        path.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        store.once("plans", "x", break_off)
    assert list((tmp_path / "plans").iterdir()) == []
    store.write_text("plans", "y", "good")
    with pytest.raises(RuntimeError):
        store.put("plans", "y", break_off)
    assert [p.name for p in (tmp_path / "plans").iterdir()] == ["y"]
    assert (tmp_path / "plans" / "y").read_text() == "good"


def _make_slowly(root: Path) -> None:
    def make(path: Path) -> None:
        with (root / "calls").open("a") as file:
            file.write(f"{os.getpid()}\n")
        path.write_text("half")
        time.sleep(1)
        path.write_text("whole")

    Store(root).once("stats", "one", make)


def test_two_workers_on_one_key_do_the_work_once(tmp_path: Path) -> None:
    workers = [multiprocessing.get_context("fork").Process(target=_make_slowly, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert len((tmp_path / "calls").read_text().split()) == 1
    assert (tmp_path / "stats" / "one").read_text() == "whole"


def test_killed_in_the_middle_it_is_simply_made_again(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=_make_slowly, args=(tmp_path,))
    worker.start()
    while not (tmp_path / "calls").exists():
        time.sleep(0.02)
    time.sleep(0.2)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(30)
    assert not (tmp_path / "stats" / "one").exists(), "what was half-written is not there to be read"
    _make_slowly(tmp_path)
    assert (tmp_path / "stats" / "one").read_text() == "whole"


def test_half_of_a_deleted_folder_is_never_found_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints" / "x"
    folder.mkdir(parents=True)
    (folder / "shard").write_text("weights")
    monkeypatch.setattr("shutil.rmtree", lambda path: None)  # killed before it deletes anything
    remove(folder)
    assert not folder.exists()


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        store.write_json("records", "r.json", {"value": float("nan")})
    assert store.read_json("records", "r.json") is None
    store.write_json("records", "r.json", {"value": 0.5})
    assert json.loads((tmp_path / "records" / "r.json").read_text()) == store.read_json("records", "r.json")


def test_keys_depend_on_content_and_not_on_order() -> None:
    assert key(a=1, b=[1, 2]) == key(b=[1, 2], a=1)
    assert key(a=1) != key(a=2) != key(b=2)


def test_markers_that_a_killed_takeover_left_aside_are_swept_out(tmp_path: Path) -> None:
    """If neither who took over nor who was taken over from runs any more, on this machine."""
    store = Store(tmp_path)
    with store.locked("a", "b"):
        (lock,) = tmp_path.glob("locks/*.lock")
        marker = lock.read_text()
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = marker.replace(f"pid={os.getpid()}", f"pid={gone.pid}")
    foreign = dead.replace("host=", "host=elsewhere-")
    cases = {
        f"x.lock.break.{gone.pid}.0a": (dead, False),
        f"x.lock.restore.{gone.pid}.0b": (dead, False),
        f"x.lock.break.{os.getpid()}.0c": (dead, True),
        f"x.lock.break.{gone.pid}.0d": (marker, True),
        f"x.lock.break.{gone.pid}.0e": (foreign, True),
        f"x.lock.break.{gone.pid}.0f": ("", True),
        "x.lock": (dead, True),
    }
    for name, (content, _) in cases.items():
        (tmp_path / "locks" / name).write_text(content)
    store.sweep_out()
    assert {path.name for path in tmp_path.glob("locks/*")} == {name for name, (_, stays) in cases.items() if stays}
