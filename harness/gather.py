"""The statistics of a cell, each found in the store or gathered there: from the text, the weights and merged pairs."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from harness import stats
from harness.errors import UserError
from harness.packing import packed
from harness.provenance import provenance
from harness.spec import BARRIER_SCHEMA, STATS_SCHEMA, Cell
from harness.stats import LayerStats, Stats
from harness.store import Store, key, say


def tokens(cell: Cell, store: Store) -> np.ndarray:
    """Packed calibration tokens [sequences, length], for statistics."""
    return packed(cell.calibration, cell.model, store)[0]


def held_out_tokens(cell: Cell, store: Store) -> np.ndarray:
    """Tokens [held_out, length] of the same kind of text that no statistic sees."""
    return packed(cell.calibration, cell.model, store)[1]


def observed(cell: Cell, ids: np.ndarray) -> dict[str, Any]:
    """What determines whatever a pass of the model over these tokens finds: the fields of its key."""
    return {"model": cell.model.digest, "tokens": hashlib.sha256(ids.tobytes()).hexdigest(), **cell.observed_how()}


def statistics(cell: Cell, store: Store) -> Stats:
    """Every sum the method needs, of the calibration text and of the weights; at the least the layers' sizes."""
    found = Stats({layer: LayerStats(experts) for layer, experts in cell.model.experts.items()})
    if cell.needs & set(stats.WEIGHTS):
        found = found.joined(_weight_sums(cell, store))
    for mode in stats.BARRIER_MODES:
        if cell.needs & {f"{name}.{mode}" for name in stats.BARRIER_SUMS}:
            found = found.joined(_barrier_sums(cell, mode, store))
    if cell.in_sequence:  # gathers its own, layer by layer, when it plans
        number = cell.calibration.sequences * cell.calibration.length
        return replace(found, provenance={"number_of_tokens": number})
    return found.joined(_calibration_sums(cell, store)) if cell.calibrates else found


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
    name = key(**{**observed(cell, ids), "schema": BARRIER_SCHEMA, "mode": mode}) + ".safetensors"

    def make(path: Path) -> None:
        start = time.perf_counter()
        model = cell.model.load(cell.calibration.dtype)
        made = barriers(model, packed_batches(ids, cell.calibration.batch_size), mode)
        seconds = time.perf_counter() - start
        stats.save(replace(made, provenance={"seconds_barriers": seconds}), path)
        say("barriers", name, f"{seconds:.1f} s, {ids.size} tokens, {mode}")

    return stats.load(store.once("barriers", name, make))


def _calibration_sums(cell: Cell, store: Store) -> Stats:
    ids = tokens(cell, store)
    fields = observed(cell, ids)
    name = key(**fields) + ".safetensors"
    path = store.path("stats", name)
    with store.locked("stats", name):
        known = stats.load(path).names & set(stats.EXTRAS) if path.exists() else frozenset()
        if path.exists() and cell.extras <= known:
            say("calibrate", name, "cached")
        else:

            def make(path: Path) -> None:
                made = _gather(cell, ids, frozenset(known), fields)
                stats.save(made, path)
                say("calibrate", name, f"{made.provenance['seconds']:.1f} s, {ids.size} tokens")

            sizes = cell.model.experts, cell.model.config["hidden_size"]
            store.put("stats", name, make, stats.nbytes(cell.extras | known, *sizes))
    return stats.load(path)


def _gather(cell: Cell, ids: np.ndarray, known: frozenset[str], fields: dict[str, Any]) -> Stats:
    """One pass for all methods of the sweep; if the model cannot give what another asks for, for this one alone.

    known: extras that an earlier pass has gathered, which are gathered again so that nothing is lost.
    """
    try:
        return _calibrate(cell, ids, cell.extras | known, fields)
    except UserError:
        own = cell.needs & set(stats.EXTRAS)
        if own == cell.extras:
            raise
        return _calibrate(cell, ids, own | known, fields)


def _calibrate(cell: Cell, ids: np.ndarray, extras: frozenset[str], fields: dict[str, Any]) -> Stats:
    from tqdm import tqdm

    from harness.calibrate import calibrate, packed_batches
    from harness.memory import forget_peak, peak

    forget_peak()
    start = time.perf_counter()
    model = cell.model.load(cell.calibration.dtype)
    batch_size = cell.calibration.batch_size
    batches = tqdm(packed_batches(ids, batch_size), "calibrate", -(-len(ids) // batch_size), leave=False)
    made = calibrate(model, batches, extras, cell.routing)
    about = {
        **fields,
        "seconds": time.perf_counter() - start,
        "peak_memory": peak(),
        "number_of_tokens": int(ids.size),
        **provenance(),
    }
    return Stats(made.layers, about)
