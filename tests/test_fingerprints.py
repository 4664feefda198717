"""A large file of a model is read once, and again when anything of it has changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness import fingerprints, inventory
from harness.errors import UserError
from harness.inventory import Fingerprint


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    seen: list[str] = []

    def noted(file: Path) -> Fingerprint:
        seen.append(file.name)
        return inventory.read(file)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "LARGE", 1000)
    monkeypatch.setattr(fingerprints, "read", noted)
    return seen


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two large ones and a small one."""
    made = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "config.json")]
    for index, file in enumerate(made[:2]):
        save_file({"weight": np.full(1000, index, np.float32)}, file)
    made[2].write_text("{}")
    return made


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED_NS", -1)


def test_large_files_are_read_once(files: list[Path], reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    first = fingerprints.of_files(files, "model")
    assert first == {file.name: inventory.read(file) for file in files} and list(first) == [file.name for file in files]
    assert fingerprints.of_files(files, "model") == first
    assert sorted(reads) == ["a.safetensors", "b.safetensors", "config.json", "config.json"]


def test_a_changed_byte_is_seen_though_size_and_time_are_set_back(
    files: list[Path], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    before, about = fingerprints.of_files(files, "model"), files[0].stat()
    with files[0].open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x01")
    os.utime(files[0], ns=(about.st_atime_ns, about.st_mtime_ns))
    assert files[0].stat().st_mtime_ns == about.st_mtime_ns
    after = fingerprints.of_files(files, "model")
    assert after["a.safetensors"] != before["a.safetensors"] and reads.count("a.safetensors") == 2
    files[1].replace(files[0])
    assert fingerprints.of_files(files[:1], "model")["a.safetensors"] == before["b.safetensors"]


def test_a_file_of_this_moment_is_not_remembered(files: list[Path], reads: list[str]) -> None:
    """It may change again within the same tick of the clock."""
    for file in files:
        os.utime(file)
    assert time.time_ns() - files[0].stat().st_ctime_ns < fingerprints.SETTLED_NS
    for _ in range(2):
        fingerprints.of_files(files[:1], "model")
    assert reads == ["a.safetensors"] * 2


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"sha256": 1, "else": 2}'])
def test_what_cannot_be_read_of_it_is_found_again(
    content: str, files: list[Path], reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    first = fingerprints.of_files(files, "model")
    for place in (tmp_path / "cache").rglob("*.json"):
        place.write_text(content)
    assert fingerprints.of_files(files, "model") == first and len(reads) == 6


def test_a_place_that_cannot_be_written_changes_nothing(
    files: list[Path], reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    (tmp_path / "cache").write_text("a file")
    assert fingerprints.of_files(files, "model") == fingerprints.of_files(files, "model")
    assert len(reads) == 6


def test_a_user_without_a_home_has_no_place_for_it_and_needs_none(
    files: list[Path], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    settle(monkeypatch)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert fingerprints.of_files(files, "model") == fingerprints.of_files(files, "model")


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    files: list[Path], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(file: Path) -> Fingerprint:
        found = inventory.read(file)
        os.utime(file)
        return found

    settle(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(fingerprints, "read", changing)
        fingerprints.of_files(files[:1], "model")
    fingerprints.of_files(files[:1], "model")
    assert reads == ["a.safetensors"]


def test_a_file_that_is_cut_short_is_named(files: list[Path], reads: list[str]) -> None:
    files[1].write_bytes(files[1].read_bytes()[:-100])
    with pytest.raises(UserError, match=r"b\.safetensors"):
        fingerprints.of_files(files, "model")
