"""From statistics to the weights that are served: a cell's stages, each found in the store or made there."""

from __future__ import annotations

import importlib.metadata
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import checkpoint, gather, stats
from harness import plan as plans
from harness.decide import allocate, decide, decide_in_sequence
from harness.errors import UserError
from harness.plan import LayerPlan, Plan
from harness.provenance import provenance
from harness.room import parked
from harness.spec import ERRORS_SCHEMA, Cell, method_identity
from harness.stats import Stats
from harness.store import Store, key, say
from methods import SequentialMethod
from methods.allocations import Budget

if TYPE_CHECKING:
    from harness.model_search import ModelSearch
    from harness.probe import Expected
    from harness.reconstruct import Reconstruction


def plan_file(cell: Cell, store: Store) -> Path:
    """Where the cell's plan is kept."""
    return store.path("plans", f"{cell.plan_slug}-{key(**cell.identity())}.json")


def plan(cell: Cell, given: Stats, store: Store) -> Plan:
    """What becomes of every expert, validated against the model."""
    name = plan_file(cell, store).name

    def make(path: Path) -> None:
        start = time.perf_counter()
        searches: dict[int, ModelSearch] = {}
        layers = _decide(cell, given, searches, store)
        about = {
            "model": cell.model.name,
            "method": method_identity(cell.method),
            "label": cell.label,
            "ratio": cell.ratio,
            "seed": cell.seed,
            "statistics": dict(given.provenance),
            "seconds": time.perf_counter() - start,
        }
        for search in searches.values():  # at most one; of an interrupted one the seconds of all its runs
            about |= {"search": search.record(), "seconds": max(time.perf_counter() - start, search.spent.seconds)}
        path.write_text(plans.to_json(Plan(layers, about)))

    cached = store.path("plans", name).exists()
    made = plans.from_json(store.once("plans", name, make).read_text())
    made.validate(cell.model.experts, cell.model.top_k)
    say("plan", name, "cached" if cached else f"{made.provenance['seconds']:.2f} s")
    return made


def _decide(cell: Cell, given: Stats, searches: dict[int, ModelSearch], store: Store) -> dict[int, LayerPlan]:
    """The method's answer. Most read statistics alone; some need the model, which is loaded for them.

    searches: those that were begun, by how many sequences they search on.
    """
    if cell.keeps_experts:
        return dict(Plan.identity(cell.model.experts).layers)
    if isinstance(cell.method, SequentialMethod):
        from harness.calibrate import packed_batches

        ids = gather.tokens(cell, store)
        batches = list(packed_batches(ids, cell.calibration.batch_size))
        model = cell.model.load(cell.calibration.dtype)
        own = cell.method.needs & set(stats.EXTRAS)
        return decide_in_sequence(
            cell.method, model, batches, own, cell.routing, cell.keep, cell.calibration.all_expert_tokens
        )
    if "reconstruction" in cell.needs:
        given = replace(given, error=_reconstruction(cell, store).error)
    if "search" in cell.needs:
        given = replace(given, search=lambda sequences: _search(cell, sequences, searches, store))
    budget = Budget(cell.model.experts, cell.keep, cell.model.top_k)
    return decide(cell.method, given, allocate(cell.allocation, cell.method, given, budget))


def _search(cell: Cell, sequences: int, searches: dict[int, ModelSearch], store: Store) -> ModelSearch:
    """The model on the first sequences of the calibration text; what an interrupted search left is found again."""
    from harness.model_search import ModelSearch

    ids = gather.tokens(cell, store)
    if not 1 <= sequences <= len(ids):
        raise UserError(
            f"{cell.label} searches on {sequences} sequences, and calibration {cell.calibration.name!r} has {len(ids)}."
        )
    assert searches.keys() <= {sequences}, "one search, one state"
    if sequences not in searches:
        name = plan_file(cell, store).name
        searches[sequences] = ModelSearch(
            cell.model.load(cell.calibration.dtype),
            ids[:sequences],
            cell.model.top_k,
            lambda: store.read_json("searches", name),
            lambda state: store.write_json("searches", name, state),
        )
    return searches[sequences]


def _errors(cell: Cell, made: Plan, store: Store) -> dict[int, float]:
    """Reconstruction errors of a plan, by layer: in memory, or layer by layer where the model does not fit."""
    from harness.calibrate import packed_batches
    from harness.reconstruct import streamed_errors
    from harness.streaming import open_streamed

    text = cell.calibration
    room = parked(cell.model, text.dtype, text.batch_tokens, cell.max_memory)
    if room is None:
        return _reconstruction(cell, store).errors(made.layers)
    batches = list(packed_batches(gather.held_out_tokens(cell, store), text.batch_size))
    with store.workspace(f"states-{made.digest[:16]}") as folder:
        return streamed_errors(open_streamed(cell.model, text.dtype), batches, made.layers, room.parking(folder))


def _reconstruction(cell: Cell, store: Store) -> Reconstruction:
    from harness.calibrate import packed_batches
    from harness.reconstruct import Reconstruction

    ids = gather.held_out_tokens(cell, store)
    model = cell.model.load(cell.calibration.dtype)
    return Reconstruction(model, packed_batches(ids, cell.calibration.batch_size))


REPORT = "remake.json"  # beside the weights


def remade(cell: Cell, given: Stats, made: Plan, store: Store) -> Path | None:
    """The checkpoint that the cell's recovery makes of the plan; None where the plan itself is served."""
    if cell.recovery is None:
        return None
    folder = remade_folder(cell, made, store)
    cached = folder.exists()

    def make(path: Path) -> None:
        from harness.remake import Remaking

        assert cell.recovery is not None
        path.mkdir()
        start = time.perf_counter()
        asked = Remaking(cell.model, made, given, cell.ratio, cell.method, store)
        report = cell.recovery.remake(asked, path)
        (path / REPORT).write_text(json.dumps({"seconds": time.perf_counter() - start, **report}, allow_nan=False))

    store.once("remade", folder.name, make, checkpoint.measure(cell.model, made).bytes)
    report = remake_report(folder)
    say("recover", cell.slug, "cached" if cached else f"{report['seconds']:.1f} s, {report.get('tokens', 0)} tokens")
    return folder


def remake_report(folder: Path) -> dict[str, Any]:
    """What was done to make these weights: tokens, seconds, losses."""
    return dict(json.loads((folder / REPORT).read_text()))


def remade_folder(cell: Cell, made: Plan, store: Store) -> Path:
    return store.path("remade", key(model=cell.model.digest, plan=made.digest, **cell.remake_identity()))


_without_reference: set[str] = set()  # tried in this process: loading the model again would fail again


def reference(cell: Cell, made: Plan, store: Store) -> Expected | None:
    """Log-probabilities that the served model must give a known text; None if transformers cannot compute them here."""
    from harness.probe import PROBE, Expected, probe_tokens

    versions = {"transformers": importlib.metadata.version("transformers"), "schema": ERRORS_SCHEMA}
    what = {"model": cell.model.digest, "plan": made.digest, **cell.remake_identity()}
    name = key(**what, text=PROBE, noise=True, **versions) + ".json"
    known = store.read_json("references", name)
    if known is not None:
        return Expected(tuple(known["log_probs"]), known["noise"])
    if name in _without_reference:
        return None
    try:
        from harness.reference import expected

        model, plan = cell.model, made
        if cell.recovery is not None:
            model, plan = cell.model.elsewhere(remade_folder(cell, made, store)), Plan({})
        found = expected(model.load("auto"), plan, probe_tokens(str(model.folder), cell.model.runs_code))
    except Exception as problem:  # too little memory, or a model that transformers does not know
        _without_reference.add(name)
        words = f"{type(problem).__name__}: {problem}. It is served without comparison."
        say("failed", f"reference {cell.slug}", words)
        return None
    store.write_json("references", name, asdict(found))
    return found


def reconstruct(cell: Cell, made: Plan, store: Store) -> None:
    """Measure the reconstruction error of every layer under the plan on held-out tokens, and keep it. A failure is
    said, and tried again by the next run; no score depends on it.
    """
    name = cell.errors_name
    if not cell.measures_errors or store.path("errors", name).exists():
        return
    start = time.perf_counter()
    try:
        errors = _errors(cell, made, store)
    except Exception as problem:  # whatever it is, the model can still be scored
        return say("failed", f"reconstruct {cell.slug}", f"{type(problem).__name__}: {problem}")
    seconds = time.perf_counter() - start
    text = {"calibration": cell.calibration.name, "tokens": cell.calibration.held_out * cell.calibration.length}
    store.write_json("errors", name, {"layers": errors, **text, "seconds": seconds, "provenance": provenance()})
    say("reconstruct", cell.slug, f"{seconds:.1f} s, error {np.mean(list(errors.values())):.4f}")
