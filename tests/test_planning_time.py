"""What planning costs at the size of Qwen3-30B-A3B: 48 layers of 128 experts, five ratios.

./bench test -m slow -s tests/test_planning_time.py
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from harness.decide import decide
from harness.stats import MEASURES, LayerStats, Stats
from methods import SequentialMethod
from tests.test_methods import NAMES, make
from tests.toy import toy_layer

LAYERS, EXPERTS, HIDDEN = 48, 128, 2048
RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625)
NEEDS_WEIGHTS = ("hybrid", "rco", "ream")


def large_stats() -> Stats:
    """Consistent sums of small toy layers, the outputs' sums stretched to the model's width."""
    layers = {}
    for index in range(LAYERS):
        rng = np.random.default_rng(index)
        sums = dict(toy_layer(rng, experts=EXPERTS, tokens=400).stats().sums)
        stretch = rng.normal(size=(20, HIDDEN))
        sums |= {name: sums[name] @ stretch for name in ("all_output_sum", "all_gated_output_sum")}
        layers[index] = LayerStats(EXPERTS, 400, sums)
    return Stats(layers)


def test_the_methods_that_need_weights_are_those_that_are_left_out() -> None:
    methods = {name: make(name) for name in NAMES}
    needing = [name for name, m in methods.items() if isinstance(m, SequentialMethod) or m.needs & set(MEASURES)]
    assert tuple(needing) == NEEDS_WEIGHTS


@pytest.mark.slow
def test_all_methods_at_five_ratios_are_planned_within_a_minute() -> None:
    stats, seconds = large_stats(), {}
    for name in (name for name in NAMES if name not in NEEDS_WEIGHTS):
        start = time.perf_counter()
        for ratio in RATIOS:
            plans = decide(make(name), stats, dict.fromkeys(stats.layers, EXPERTS - int(EXPERTS * ratio)))
            assert len(plans) == LAYERS
        seconds[name] = time.perf_counter() - start
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{name:18} {value:6.2f} s")
    print(f"{'all':18} {sum(seconds.values()):6.2f} s; not among them, as they need the weights: {NEEDS_WEIGHTS}")
    assert sum(seconds.values()) < 60
