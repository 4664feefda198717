"""The peak of a stage is that stage's own."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from harness.memory import forget_peak, peak

MB = 2**20


def hold_and_free(size: int) -> None:
    """Memory straight from the system: an allocator may serve an array from what it never gave back."""
    with mmap.mmap(-1, size) as memory:
        for start in range(0, size, mmap.PAGESIZE):
            memory[start] = 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps no peak that can be reset")
def test_what_was_freed_before_does_not_count_and_what_was_freed_since_does() -> None:
    hold_and_free(200 * MB)
    forget_peak()
    before = peak()["ram"]
    hold_and_free(80 * MB)
    assert 70 * MB < peak()["ram"] - before < 120 * MB
