"""The stages of one cell, each found in the store or made there. `harness/run.py` strings them together."""

from __future__ import annotations

import gc
import gzip
import hashlib
import json
import secrets
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import checkpoint, stats
from harness import plan as plans
from harness.decide import decide, decide_in_sequence
from harness.errors import StageError, UserError
from harness.plan import LayerPlan, Plan
from harness.provenance import provenance
from harness.spec import SCORE_SCHEMA, STATS_SCHEMA, Cell, method_identity
from harness.stats import LayerStats, Stats
from harness.store import Store, key, remove, say
from methods import SequentialMethod
from tasks import LLM, Score, Task

if TYPE_CHECKING:
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
    if cell.method.needs & set(stats.WEIGHTS):
        found = found.joined(_weight_sums(cell, store))
    if cell.in_sequence:  # gathers its own, layer by layer, when it plans
        number = cell.calibration.sequences * cell.calibration.length
        return replace(found, provenance={"number_of_tokens": number})
    return found.joined(_calibration_sums(cell, store)) if cell.calibrates else found


def _weight_sums(cell: Cell, store: Store) -> Stats:
    from harness.weights import weight_sums

    name = key(model=cell.model.digest, schema=STATS_SCHEMA) + ".safetensors"
    return stats.load(store.once("weights", name, lambda path: stats.save(weight_sums(cell.model), path)))


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
        own = cell.method.needs & set(stats.EXTRAS)
        if own == cell.extras:
            raise
        return _calibrate(cell, ids, own | known, fields)


def _calibrate(cell: Cell, ids: np.ndarray, extras: frozenset[str], fields: dict[str, Any]) -> Stats:
    from tqdm import tqdm

    from harness.calibrate import calibrate, packed_batches

    start = time.perf_counter()
    model = cell.model.load(cell.calibration.dtype)
    batch_size = cell.calibration.batch_size
    batches = tqdm(packed_batches(ids, batch_size), "calibrate", -(-len(ids) // batch_size), leave=False)
    made = calibrate(model, batches, extras, cell.routing)
    about = {
        **fields,
        "seconds": time.perf_counter() - start,
        "number_of_tokens": int(ids.size),
        **provenance(),
    }
    return Stats(made.layers, about)


def plan(cell: Cell, given: Stats, store: Store) -> Plan:
    """What becomes of every expert, validated against the model."""
    name = f"{cell.slug}-{key(**cell.identity())}.json"

    def make(path: Path) -> None:
        start = time.perf_counter()
        layers = _decide(cell, given, store)
        about = {
            "model": cell.model.name,
            "method": method_identity(cell.method),
            "label": cell.label,
            "ratio": cell.ratio,
            "seed": cell.seed,
            "statistics": dict(given.provenance),
            "seconds": time.perf_counter() - start,
        }
        path.write_text(plans.to_json(Plan(layers, about)))

    cached = store.path("plans", name).exists()
    made = plans.from_json(store.once("plans", name, make).read_text())
    made.validate(cell.model.experts, cell.model.top_k)
    checkpoint.written_experts(made)
    say("plan", name, "cached" if cached else f"{made.provenance['seconds']:.2f} s")
    return made


def _decide(cell: Cell, given: Stats, store: Store) -> dict[int, LayerPlan]:
    """The method's answer. Most read statistics alone; some need the model, which is loaded for them."""
    if isinstance(cell.method, SequentialMethod):
        from harness.calibrate import packed_batches

        ids = tokens(cell, store)
        batches = list(packed_batches(ids, cell.calibration.batch_size))
        model = cell.model.load(cell.calibration.dtype)
        own = cell.method.needs & set(stats.EXTRAS)
        return decide_in_sequence(cell.method, model, batches, own, cell.routing, cell.keep)
    if cell.method.needs & set(stats.MEASURES):
        given = replace(given, error=_reconstruction(cell, store).error)
    return decide(cell.method, given, cell.keep)


def _reconstruction(cell: Cell, store: Store) -> Reconstruction:
    from harness.calibrate import packed_batches
    from harness.reconstruct import Reconstruction

    ids = held_out_tokens(cell, store)
    model = cell.model.load(cell.calibration.dtype)
    return Reconstruction(model, packed_batches(ids, cell.calibration.batch_size))


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


@dataclass
class Serving:
    """A plan that is being served, and what it took."""

    llm: LLM
    seconds: dict[str, float]


@contextmanager
def serving(cell: Cell, made: Plan, store: Store) -> Iterator[Serving]:
    """The compressed model at a URL. Uncompressed, the original folder is served; else a checkpoint is written,
    checked, and deleted afterwards unless ``keep_checkpoints``.
    """
    seconds = {"export": 0.0}
    with _folder(cell, made, store, seconds) as folder:
        log = store.path("logs", f"{cell.slug}-{made.digest[:16]}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        give_back_memory()
        name = f"{cell.slug}-{secrets.token_hex(4)}"  # so that no other run's server can be taken for ours
        with cell.serve.serve(folder, name, log) as llm:
            seconds["serve"] = time.perf_counter() - start
            say("serve", cell.slug, f"{seconds['serve']:.1f} s")
            yield Serving(llm, seconds)


def give_back_memory() -> None:
    """Of models this process had loaded, before a server on the same GPU asks how much is free."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _folder(cell: Cell, made: Plan, store: Store, seconds: dict[str, float]) -> Iterator[Path]:
    if made.is_identity:
        yield cell.model.folder
        return
    name = key(model=cell.model.digest, plan=made.digest)

    def make(path: Path) -> None:
        path.mkdir()
        checkpoint.export(cell.model, made, path)
        checkpoint.verify(path, cell.model)

    start = time.perf_counter()
    with store.locked("serving", name):
        if store.path("checkpoints", name).exists():  # kept from an earlier run: it may have been damaged since
            checkpoint.verify(store.path("checkpoints", name), cell.model)
        folder = store.once("checkpoints", name, make)
        seconds["export"] = time.perf_counter() - start
        say("export", name, f"{seconds['export']:.1f} s")
        try:
            yield folder
        finally:
            if not cell.keep_checkpoints:
                remove(folder)


def score_name(cell: Cell, made: Plan, task: Task) -> str:
    """Name of the score of these weights on this task, whatever method found the plan."""
    weights = key(model=cell.model.digest, plan="identity" if made.is_identity else made.digest)
    fields = {"task": dict(task.identity()), "serve": dict(cell.serve.identity()), "schema": SCORE_SCHEMA}
    return key(weights=weights, **fields) + ".json"


def score(cell: Cell, made: Plan, task: Task, served: Serving, store: Store) -> None:
    """Score the served model on one task and keep the score and every sample. Raises StageError."""
    name = score_name(cell, made, task)
    with store.locked("scores", name):
        if not scored(cell, made, task, store):  # nobody else did it while we waited
            _score(cell, name, task, served, store)


def _score(cell: Cell, name: str, task: Task, served: Serving, store: Store) -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="score-") as work:
        found = task.score(served.llm, Path(work))
    seconds = {**served.seconds, "score": time.perf_counter() - start}
    _check_score(task, found)
    store.put("samples", _samples_name(name), lambda path: _write_samples(path, found.samples))
    document = {
        "metrics": {metric: asdict(value) for metric, value in found.metrics.items()},
        "counts": dict(found.counts),
        "seconds": seconds,
        "task_identity": dict(task.identity()),
        "served_by": dict(cell.serve.identity()),
        "provenance": provenance(),
    }
    store.write_json("scores", name, document)
    values = ", ".join(f"{metric} {value.value:.3f}" for metric, value in found.metrics.items())
    say("score", f"{cell.slug} {task.name}", f"{seconds['score']:.1f} s  {values}")


def scored(cell: Cell, made: Plan, task: Task, store: Store) -> bool:
    return store.path("scores", score_name(cell, made, task)).exists()


def is_done(cell: Cell, task: Task, store: Store) -> bool:
    """Whether nothing is left to do: there is a score, and the plan's errors are known. Failures are tried again."""
    measured = not cell.measures_errors or store.path("errors", cell.errors_name).exists()
    return measured and has_score(cell, task, store)


def has_score(cell: Cell, task: Task, store: Store) -> bool:
    """Whether this cell's record on this task holds a score."""
    found = store.read_json("records", cell.record_name(task))
    return found is not None and found["status"] == "done"


@contextmanager
def noting(errors: dict[str, str], tasks: Iterable[Task]) -> Iterator[None]:
    """Turn a failure inside this context into the reason why these tasks have no score; the sweep goes on."""
    try:
        yield
    except (StageError, UserError) as problem:
        reason = str(problem)
    except Exception:  # a bug of ours or of a library's: kept in full
        reason = traceback.format_exc()
    else:
        return
    for task in tasks:
        errors.setdefault(task.name, reason)
    say("failed", ", ".join(task.name for task in tasks), reason.strip().splitlines()[-1])


def _check_score(task: Task, found: Score) -> None:
    if not found.metrics:
        raise StageError(f"{task.name} gave no metric at all.")
    for name, metric in found.metrics.items():
        if not np.isfinite([metric.value, metric.stderr]).all() or metric.n < 1:
            raise StageError(f"{task.name}: {name} is {metric.value} ± {metric.stderr} on {metric.n} items.")


def _samples_name(score: str) -> str:
    return score.replace(".json", ".jsonl.gz")


def _write_samples(path: Path, samples: Sequence[Any]) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples)


def samples(cell: Cell, task: Task, store: Store) -> list[dict[str, Any]]:
    """Every item behind the cell's record on this task. Raises StageError if there is no score."""
    found = store.read_json("records", cell.record_name(task))
    if found is None or found["status"] != "done":
        raise StageError(f"{task.name} has no score: {found['error'] if found else 'it was not run'}")
    with gzip.open(store.path("samples", _samples_name(found["score"])), "rt") as file:
        return [json.loads(line) for line in file]


def record(cell: Cell, given: Stats | None, made: Plan | None, task: Task, error: str | None, store: Store) -> None:
    """One JSON for one cell on one task: what was asked, what it is made of, and either its score or why it failed."""
    document: dict[str, Any] = {
        "status": "failed" if error else "done",
        **cell.row._asdict(),
        "method": type(cell.method).__module__.removeprefix("methods."),
        "task": task.name,
        "cell": cell.identity(),
        "original": {"parameters": cell.model.parameters, "bytes": cell.model.nbytes},
        "error": error,
    }
    if given is not None and made is not None:
        document["plan"] = made.digest
        document["calibration_tokens"] = given.provenance.get("number_of_tokens", 0)
        document["size"] = asdict(checkpoint.measure(cell.model, made))
        document["seconds"] = {
            "calibrate": given.provenance.get("seconds", 0.0),
            "plan": made.provenance["seconds"],
        }
        if not error:
            name = score_name(cell, made, task)
            found = store.read_json("scores", name)
            assert found is not None, f"{task.name} neither failed nor has a score"
            document["seconds"] |= found.pop("seconds")
            document |= found | {"score": name}
    if not (error and has_score(cell, task, store)):  # another run may have finished what failed here
        store.write_json("records", cell.record_name(task), document)
