"""From model and text to the plan: the stages of one cell, each found in the store or made there."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import plan as plans
from harness import stats
from harness.decide import allocate, decide, decide_in_sequence
from harness.errors import UserError
from harness.models import Model
from harness.plan import LayerPlan, Plan
from harness.provenance import provenance
from harness.spec import BARRIER_SCHEMA, ERRORS_SCHEMA, STATS_SCHEMA, Cell, method_identity
from harness.stats import LayerStats, Stats
from harness.store import Store, key, say
from methods import SequentialMethod
from methods.allocations import Budget

if TYPE_CHECKING:
    from harness.model_search import ModelSearch
    from harness.probe import Expected
    from harness.reconstruct import Reconstruction


def tokens(cell: Cell, store: Store) -> np.ndarray:
    """Packed calibration tokens [sequences, length], for statistics."""
    return _all_tokens(cell, store)[: cell.calibration.sequences]


def held_out_tokens(cell: Cell, store: Store) -> np.ndarray:
    """Tokens [held_out, length] of the same kind of text that no statistic sees."""
    return _all_tokens(cell, store)[cell.calibration.sequences :]


def _all_tokens(cell: Cell, store: Store) -> np.ndarray:
    from safetensors.numpy import load_file, save_file

    name = cell.tokens_name
    path = store.once("tokens", name, lambda path: save_file({"tokens": cell.calibration.tokens(cell.model)}, path))
    return load_file(path)["tokens"]


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
            made = _gather(cell, ids, frozenset(known), fields)
            store.put("stats", name, lambda path: stats.save(made, path))
            say("calibrate", name, f"{made.provenance['seconds']:.1f} s, {ids.size} tokens")
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
        return {layer: LayerPlan.identity(count) for layer, count in cell.model.experts.items()}
    if isinstance(cell.method, SequentialMethod):
        from harness.calibrate import packed_batches

        ids = tokens(cell, store)
        batches = list(packed_batches(ids, cell.calibration.batch_size))
        model = cell.model.load(cell.calibration.dtype)
        own = cell.method.needs & set(stats.EXTRAS)
        return decide_in_sequence(cell.method, model, batches, own, cell.routing, cell.keep)
    if "reconstruction" in cell.needs:
        given = replace(given, error=_reconstruction(cell, store).error)
    if "search" in cell.needs:
        given = replace(given, search=lambda sequences: _search(cell, sequences, searches, store))
    budget = Budget(cell.model.experts, cell.keep, cell.model.top_k)
    return decide(cell.method, given, allocate(cell.allocation, cell.method, given, budget))


def _search(cell: Cell, sequences: int, searches: dict[int, ModelSearch], store: Store) -> ModelSearch:
    """The model on the first sequences of the calibration text; what an interrupted search left is found again."""
    from harness.model_search import ModelSearch

    ids = tokens(cell, store)
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


def _reconstruction(cell: Cell, store: Store) -> Reconstruction:
    from harness.calibrate import packed_batches
    from harness.reconstruct import Reconstruction

    ids = held_out_tokens(cell, store)
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

    store.once("remade", folder.name, make)
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
            model, plan = Model("remade", str(remade_folder(cell, made, store))), Plan({})
        found = expected(model.load("auto"), plan, probe_tokens(str(model.folder)))
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
        errors = _reconstruction(cell, store).errors(made.layers)
    except Exception as problem:  # whatever it is, the model can still be scored
        return say("failed", f"reconstruct {cell.slug}", f"{type(problem).__name__}: {problem}")
    seconds = time.perf_counter() - start
    text = {"calibration": cell.calibration.name, "tokens": cell.calibration.held_out * cell.calibration.length}
    store.write_json("errors", name, {"layers": errors, **text, "seconds": seconds, "provenance": provenance()})
    say("reconstruct", cell.slug, f"{seconds:.1f} s, error {np.mean(list(errors.values())):.4f}")
