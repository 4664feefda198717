"""A disk that is full: said with what was needed, nothing half-written is kept, and it goes on once there is space.

The disk is a tmpfs of a few hundred KiB, which needs the right to mount one.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from harness.errors import DiskFullError
from harness.store import Store
from tests.runs import bench, results, temporary_files

KIB = 1024
OPTIONS = ["method=reap", "suite=tiny_sums", "serve=hf"]
STAGES = ("tokens", "stats", "plans", "errors", "references", "samples", "scores", "records", "tables", "figures")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def resize(disk: Path, nbytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={nbytes}", disk], check=True)


def test_what_cannot_fit_is_refused_before_the_work(disk: Path) -> None:
    calls = []
    with pytest.raises(DiskFullError, match=r"stats in .* needs 1\.00 MiB and 1\.00 MiB of reserve, and 0\.2. MiB are"):
        Store(disk).once("stats", "a", calls.append, 2**20)
    assert not calls and list(disk.rglob("*.lock")) == []


@pytest.mark.parametrize("folder", [False, True])
def test_what_did_not_fit_is_not_there_and_can_be_made_later(disk: Path, folder: bool) -> None:
    store = Store(disk)

    def make(path: Path) -> None:
        if folder:
            path.mkdir()
            path = path / "part"
        path.write_bytes(bytes(300 * KIB))

    with pytest.raises(DiskFullError, match="stats in .* free some space and give the same command again"):
        store.once("stats", "a", make)
    assert [path for path in disk.rglob("*") if path.is_file()] == []
    resize(disk, 2**20)
    assert store.once("stats", "a", make).exists()


def test_what_a_library_says_in_words_of_its_own_is_understood(disk: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    with pytest.raises(DiskFullError):
        Store(disk).put("stats", "a", lambda path: save_file({"x": np.zeros(2**16)}, path))
    with pytest.raises(ZeroDivisionError):
        Store(disk).put("stats", "a", lambda path: print(1 / 0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    done = bench(store, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return store


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_full_in_any_stage_nothing_is_lost_and_the_same_command_ends_it(disk: Path, finished: Path, stage: str) -> None:
    """Everything before this stage is there, and only a few KiB are free when it begins."""
    resize(disk, 64 * 2**20)
    for before in STAGES[: STAGES.index(stage)]:
        shutil.copytree(finished / before, disk / before)
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 8 * KIB))
    done = bench(disk, *OPTIONS)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and "The disk is full" in done.stderr + done.stdout
    assert temporary_files(disk) == []
    assert not list((disk / "records").glob("*")) or stage in ("tables", "figures")
    filler.unlink()
    again = bench(disk, *OPTIONS)
    assert again.returncode == 0, again.stderr
    pd.testing.assert_frame_equal(results(disk), results(finished))
