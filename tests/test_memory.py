"""The peak of a stage is that stage's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.memory import forget_peak, peak

MB = 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps no peak that can be reset")
def test_what_was_freed_before_does_not_count_and_what_was_freed_since_does() -> None:
    large = np.ones(200 * MB // 8)
    del large
    forget_peak()
    before = peak()["ram"]
    small = np.ones(80 * MB // 8)
    del small
    assert 70 * MB < peak()["ram"] - before < 120 * MB
