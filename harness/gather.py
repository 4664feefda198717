"""The statistics of a cell, each found in the store or gathered there: from the text, the weights and merged pairs."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from harness import one_pass, stats
from harness.packing import packed
from harness.spec import BARRIER_SCHEMA, STATS_SCHEMA, Cell
from harness.stats import LayerStats, Stats
from harness.store import Store, key, say


def tokens(cell: Cell, store: Store) -> np.ndarray:
    """Packed calibration tokens [sequences, length], for statistics."""
    return packed(cell.calibration, cell.model, store)[0]


def held_out_tokens(cell: Cell, store: Store) -> np.ndarray:
    """Tokens [held_out, length] of the same kind of text that no statistic sees."""
    return packed(cell.calibration, cell.model, store)[1]


def is_made(cell: Cell, store: Store) -> bool:
    """Whether the store has what a pass over the cell's calibration text finds."""
    has_tokens = store.path("tokens", cell.tokens_name).exists()
    return has_tokens and one_pass.whole(cell, tokens(cell, store)).is_made(store)


def statistics(cell: Cell, store: Store) -> Stats:
    """Every sum the method needs, of the calibration text and of the weights; at the least the layers' sizes."""
    found = Stats({layer: LayerStats(experts) for layer, experts in cell.model.experts.items()})
    if cell.needs & set(stats.WEIGHTS):
        found = found.joined(_weight_sums(cell, store))
    for mode in stats.BARRIER_MODES:
        if cell.needs & {f"{name}.{mode}" for name in stats.BARRIER_SUMS}:
            found = found.joined(_barrier_sums(cell, mode, store))
    if cell.in_sequence:  # gathers its own, layer by layer, when it plans
        return replace(found, provenance={"number_of_tokens": cell.calibration.tokens_in_all})
    return found.joined(one_pass.sums(one_pass.whole(cell, tokens(cell, store)), store)) if cell.calibrates else found


def _weight_sums(cell: Cell, store: Store) -> Stats:
    from harness.weights import weight_sums

    name = key(model=cell.model.digest, schema=STATS_SCHEMA) + ".safetensors"
    return stats.load(store.once("weights", name, lambda path: stats.save(weight_sums(cell.model), path)))


def _barrier_sums(cell: Cell, mode: str, store: Store) -> Stats:
    """On the first of the calibration tokens: merging in pairs costs a model's evaluation for each pair."""
    from harness.barriers import TOKENS, barriers
    from harness.calibrate import packed_batches

    ids = tokens(cell, store)
    ids = ids[: max(1, TOKENS // ids.shape[1])]
    name = key(**{**cell.observed(ids), "schema": BARRIER_SCHEMA, "mode": mode}) + ".safetensors"

    def make(path: Path) -> None:
        start = time.perf_counter()
        model = cell.model.load(cell.calibration.dtype)
        made = barriers(model, packed_batches(ids, cell.calibration.batch_size), mode)
        seconds = time.perf_counter() - start
        stats.save(replace(made, provenance={"seconds_barriers": seconds}), path)
        say("barriers", name, f"{seconds:.1f} s, {ids.size} tokens, {mode}")

    return stats.load(store.once("barriers", name, make))
