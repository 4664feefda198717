"""What is read ahead is what comes next, all of it once; and whoever does not need it any more does not wait for it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import read_ahead, streaming
from harness.models import Model
from harness.parking import Parking
from harness.tensors import Tensor
from tests.conftest import token_batches


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(from, to) of each piece that was read."""
    found: list[tuple[int, int]] = []
    read = os.preadv

    def noted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        found.append((offset, offset + read(descriptor, buffers, offset)))
        return found[-1][1] - offset

    monkeypatch.setattr(os, "preadv", noted)
    return found


def tensor(file: Path, start: int, end: int) -> Tensor:
    return Tensor(file, "U8", (end - start,), start, end)


def is_ended() -> bool:
    return all(thread.name != "read-ahead" for thread in threading.enumerate())


def waited_for(reads: list[tuple[int, int]], count: int) -> None:
    until = time.monotonic() + 30
    while len(reads) < count and time.monotonic() < until:
        time.sleep(0.01)


def test_every_byte_once_in_pieces(tmp_path: Path, reads: list[tuple[int, int]], monkeypatch) -> None:
    monkeypatch.setattr(read_ahead, "PIECE", 1000)
    file = tmp_path / "weights"
    file.write_bytes(bytes(5000))
    with read_ahead.reading_ahead([tensor(file, 100, 2350), tensor(file, 4000, 5000)]):
        waited_for(reads, 4)
    assert reads == [(100, 1100), (1100, 2100), (2100, 2350), (4000, 5000)] and is_ended()


def test_it_ends_when_it_is_not_needed_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "PIECE", 1)
    begun = threading.Event()

    def slow(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        begun.set()
        time.sleep(0.01)
        return 1

    monkeypatch.setattr(os, "preadv", slow)
    file = tmp_path / "weights"
    file.write_bytes(bytes(10))
    with read_ahead.reading_ahead([tensor(file, 0, 10**6)]):
        assert begun.wait(30)
    assert is_ended()


def test_not_where_it_would_push_itself_out_of_memory(
    tmp_path: Path, reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead.psutil, "virtual_memory", lambda: SimpleNamespace(available=1999))
    file = tmp_path / "weights"
    file.write_bytes(bytes(1000))
    with read_ahead.reading_ahead([tensor(file, 0, 1000)]):
        assert is_ended()
    assert reads == []


def test_a_file_that_is_gone_is_left_to_who_needs_it(tmp_path: Path) -> None:
    with read_ahead.reading_ahead([tensor(tmp_path / "none", 0, 10)]):
        pass
    assert is_ended()


def test_while_a_layer_is_computed_the_next_is_read(
    qwen_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []
    opened = streaming.open_streamed(qwen_model, "auto")
    name_of = {found: name for name, found in qwen_model.tensors.items()}

    @contextmanager
    def noted(tensors: Sequence[Tensor]) -> Iterator[None]:
        asked.append({name_of[each] for each in tensors})
        yield

    monkeypatch.setattr(streaming, "reading_ahead", noted)
    passes = streaming.Passes(opened, token_batches(), Parking(0, 0, tmp_path))
    layers = [*passes.layers(lambda batch: None)]
    next_ones = [{name for name in name_of.values() if f".layers.{index + 1}." in name} for index in layers]
    assert asked == next_ones and all(asked[:-1]) and not asked[-1]
