"""What kind of plans a method makes, known before any work: it is asked on random sums."""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from harness import stats
from harness.plan import LayerPlan
from harness.stats import LayerStats, Stats

if TYPE_CHECKING:
    from methods import Method

EXPERTS, KEPT = 8, 4


def trial_plan(method: Method) -> LayerPlan | None:
    """The method's plan of a layer of 8 experts of which 4 stay; None where it cannot be asked. Methods are pure, so
    this costs nothing but its own arithmetic. Those that search look for experts to prune and are not asked.
    """
    return None if "search" in method.needs else _asked(method)  # type: ignore[arg-type]  # frozen dataclasses


@functools.cache
def _asked(method: Method) -> LayerPlan | None:
    rng = np.random.default_rng(0)
    flat = {name: 1 + rng.random(EXPERTS) for name in (*stats.ROUTED, *stats.EXTRAS, *stats.WEIGHTS)}
    gram = {name: (rows := rng.random((EXPERTS, EXPERTS))) @ rows.T for name in stats.PAIRWISE}
    wide = {name: rng.random((EXPERTS, 4)) for name in stats.OF_OUTPUTS}
    shape = {"pair_barrier": (EXPERTS, EXPERTS), "triangles": (0, 3), "triple_barrier": (0,)}
    barriers = {name: np.zeros(shape[name.split(".")[0]]) for name in stats.BARRIERS}
    layer = LayerStats(EXPERTS, 100, {**flat, **gram, **wide, **barriers})
    with suppress(Exception):
        return method.plan(Stats({0: layer}, error=lambda layer, plan: 0.0), {0: KEPT})[0]
    return None
