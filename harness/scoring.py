"""From the plan to the record: a cell is served and scored, and what comes of it is kept."""

from __future__ import annotations

import gc
import gzip
import json
import secrets
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness import checkpoint, inventory, phases, stages, throughput
from harness.errors import StageError, UserError, during, in_one_line, log_tail_of, stage_of
from harness.host import without_secrets
from harness.plan import Plan
from harness.provenance import provenance
from harness.served import Served, Weights, in_words
from harness.spec import SCORE_SCHEMA, Cell
from harness.stats import Stats
from harness.store import Store, key, remove, say
from harness.thinking import ThinkThenAnswer
from tasks import Score, Task


@dataclass
class Serving:
    """A plan that is being served, and what it took."""

    served: Served
    seconds: dict[str, float]


@dataclass(frozen=True)
class Failure:
    """Why a task has no score. stage: that broke. error: the message, or the whole traceback of what nobody foresaw.
    log_tail: last lines of the server's log, where a server was involved. No text holds a secret of the environment.
    """

    stage: str
    error: str
    log_tail: str | None

    @classmethod
    def of(cls, problem: Exception) -> Failure:
        known = isinstance(problem, StageError | UserError)
        words = str(problem) if known else "".join(traceback.format_exception(problem))
        return cls(stage_of(problem) or "prepare", without_secrets(words.strip()), log_tail_of(problem))

    @property
    def happened(self) -> str:
        return in_one_line(self.error)


@contextmanager
def serving(cell: Cell, made: Plan, store: Store) -> Iterator[Serving]:
    """The compressed model at a URL: the plan itself where the server reads plans, else a checkpoint, which is written,
    checked, and deleted afterwards unless ``keep_checkpoints``.
    """
    with during("serve"):
        cell.serve.check_plan(cell.model, made)
    seconds = {"export": 0.0}
    with _weights(cell, made, store, seconds) as weights:
        log = store.path("logs", f"{cell.slug}-{made.digest[:16]}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        give_back_memory()
        name = f"{cell.slug}-{secrets.token_hex(4)}"  # so that no other run's server can be taken for ours
        with during("serve"), cell.serve.serve(weights, name, log) as served:
            seconds["serve"] = time.perf_counter() - start
            say("serve", cell.slug, f"{seconds['serve']:.1f} s, {served.how}{in_words(served.changed_settings)}")
            yield Serving(served, seconds)


def give_back_memory() -> None:
    """Of models this process had loaded, before a server on the same GPU asks how much is free."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _weights(cell: Cell, made: Plan, store: Store, seconds: dict[str, float]) -> Iterator[Weights]:
    expected, original = stages.reference(cell, made, store), _original(cell, store)
    if cell.recovery is not None:
        folder = stages.remade_folder(cell, made, store)
        inventory.check_unchanged(folder)
        base = cell.model.folder if checkpoint.differs_in_experts_only(folder, cell.model) else None
        yield Weights(folder, expected=expected, base=base, original=original, runs_code=cell.model.runs_code)
        return
    if cell.serve.reads_plans:
        file, runs_code = stages.plan_file(cell, store), cell.model.runs_code
        yield Weights(cell.model.folder, made, file, expected, original=original, runs_code=runs_code)
        return
    if made.is_identity:
        yield Weights(cell.model.folder, expected=expected, runs_code=cell.model.runs_code)
        return
    name = key(model=cell.model.digest, plan=made.digest)

    def make(path: Path) -> None:
        path.mkdir()
        checkpoint.export(cell.model, made, path)
        checkpoint.verify(path, cell.model)

    start = time.perf_counter()
    with during("export"), store.locked("serving", name):
        if store.path("checkpoints", name).exists():  # kept from an earlier run: it may have been damaged since
            inventory.check_unchanged(store.path("checkpoints", name))  # it was verified before it got its checksums
        folder = store.once("checkpoints", name, make, checkpoint.measure(cell.model, made).bytes)
        seconds["export"] = time.perf_counter() - start
        say("export", name, f"{seconds['export']:.1f} s")
        try:
            yield Weights(folder, expected=expected, runs_code=cell.model.runs_code)
        finally:
            if not cell.keep_checkpoints:
                remove(folder)


def _original(cell: Cell, store: Store) -> Weights | None:
    """The uncompressed model, where it is served beside the compressed one."""
    if not isinstance(cell.serve, ThinkThenAnswer):
        return None
    whole = stages.reference(replace(cell, recovery=None), Plan.identity(cell.model.experts), store)
    return Weights(cell.model.folder, expected=whole, runs_code=cell.model.runs_code)


def score_name(cell: Cell, made: Plan, task: Task) -> str:
    """Name of the score of these weights on this task, whatever method found the plan."""
    plan = "identity" if made.is_identity else made.digest
    weights = key(model=cell.model.digest, plan=plan, **cell.remake_identity())
    fields = {"task": dict(task.identity()), "serve": dict(cell.serve.identity()), "schema": SCORE_SCHEMA}
    return key(weights=weights, **fields) + ".json"


def score(cell: Cell, made: Plan, task: Task, serving: Serving, store: Store) -> None:
    """Score the served model on one task and keep the score and every sample. Raises StageError."""
    name = score_name(cell, made, task)
    with during("score"), store.locked("scores", name):
        if not scored(cell, made, task, store):  # nobody else did it while we waited
            _score(cell, name, task, serving, store)


def _score(cell: Cell, name: str, task: Task, serving: Serving, store: Store) -> None:
    start = time.perf_counter()
    served = serving.served
    before = throughput.metrics(served.llm.url)
    with store.workspace(name) as work, served.watch.blamed() if served.watch else nullcontext():
        found = task.score(served.llm, work)
    after = throughput.metrics(served.llm.url)
    speed = throughput.between(throughput.counters(before), throughput.counters(after), found.answering_s)
    thought = phases.counts(before)
    thoughts = {name: n - thought[name] for name, n in phases.counts(after).items() if name in thought}
    seconds = {**serving.seconds, "score": time.perf_counter() - start}
    _check_score(task, found)
    store.put("samples", _samples_name(name), lambda path: _write_samples(path, found.samples))
    document = {
        "metrics": {metric: asdict(value) for metric, value in found.metrics.items()},
        "counts": {**found.counts, **thoughts},
        "whole": found.whole,
        "seconds": seconds,
        "task_identity": dict(task.identity()),
        "served_by": dict(cell.serve.identity()),
        "served": {
            **{name: getattr(served, name) for name in ("how", "weight_bytes", "difference", "changed_settings")},
            "throughput": None if served.how == "mask" else speed,  # all experts are still there
        },
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


def all_done(cell: Cell, store: Store) -> bool:
    """Whether nothing is left to do on any task."""
    return all(is_done(cell, task, store) for task in cell.tasks)


def has_score(cell: Cell, task: Task, store: Store) -> bool:
    """Whether this cell's record on this task holds a score."""
    found = store.read_json("records", cell.record_name(task))
    return found is not None and found["status"] == "done"


@contextmanager
def noting(failures: dict[str, Failure], tasks: Iterable[Task]) -> Iterator[None]:
    """Turn a failure inside this context into the reason why these tasks have no score; the sweep goes on."""
    try:
        yield
    except Exception as problem:
        failure = Failure.of(problem)
        for task in tasks:
            failures.setdefault(task.name, failure)
        say("failed", ", ".join(task.name for task in tasks), f"{failure.stage}: {failure.happened}")


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


def _size(cell: Cell, made: Plan, store: Store) -> checkpoint.Size:
    """What is served: the plan, or the checkpoint that was made of it."""
    size = checkpoint.measure(cell.model, made)
    folder = stages.remade_folder(cell, made, store)
    if cell.recovery is None or not folder.exists():
        return size
    found = checkpoint.tensors_of(folder)
    nbytes = sum(tensor.nbytes for tensor in found)
    parameters = sum(tensor.elements for tensor in found)  # copies of merged experts are experts of their own now
    return replace(size, distinct=size.experts, parameters=parameters, bytes=nbytes, distinct_bytes=nbytes)


def _remade(cell: Cell, made: Plan, store: Store) -> dict[str, Any]:
    """What it took to make the weights anew, if they were and it succeeded."""
    folder = stages.remade_folder(cell, made, store)
    return {"recovery": stages.remake_report(folder)} if cell.recovery and folder.exists() else {}


def record(
    cell: Cell, given: Stats | None, made: Plan | None, task: Task, failure: Failure | None, store: Store, run: str
) -> None:
    """One JSON for one cell on one task: what was asked, what it is made of, and either its score or why it failed.

    run: id of the run that says so. Raises DiskFullError if not even this can be written.
    """
    facts: dict[str, Any] = {}
    try:
        with during("record"):
            if given is not None and made is not None:
                facts = _made_of(cell, given, made, store)
                if failure is None:
                    _add_score(facts, score_name(cell, made, task), store)
    except Exception as problem:  # of a folder that was damaged meanwhile: neither a number, nor the end of the sweep
        failure = failure or Failure.of(problem)
    if failure and has_score(cell, task, store):  # another run may have finished what failed here
        return
    document: dict[str, Any] = {
        "status": "failed" if failure else "done",
        **cell.row._asdict(),
        "method": type(cell.method).__module__.removeprefix("methods."),
        "task": task.name,
        "run": run,
        "cell": cell.identity(),
        "original": {"parameters": cell.model.parameters, "bytes": cell.model.nbytes},
        "error": None,
        **facts,
    }
    if failure:
        asked = f"{cell.slug} on {task.name}"
        document |= {**asdict(failure), "reason": f"{asked}: {failure.stage} failed. {failure.happened}"}
    store.write_json("records", cell.record_name(task), document)


def _made_of(cell: Cell, given: Stats, made: Plan, store: Store) -> dict[str, Any]:
    """What a cell's weights are, and what it took to make them."""
    remade = _remade(cell, made, store)
    return {
        "plan": made.digest,
        "peak_memory": given.provenance.get("peak_memory", {}),
        "calibration_tokens": given.provenance.get("number_of_tokens", 0),
        "size": asdict(_size(cell, made, store)),
        "seconds": {
            "calibrate": given.provenance.get("seconds", 0.0),
            "barriers": given.provenance.get("seconds_barriers", 0.0),
            "plan": made.provenance["seconds"],
            "recover": remade.get("recovery", {}).get("seconds", 0.0),
        },
        "search": made.provenance.get("search", {}),
        **remade,
    }


def _add_score(facts: dict[str, Any], name: str, store: Store) -> None:
    """The score of these weights, and the seconds it took, to what is known of them. Raises StageError without one."""
    found = store.read_json("scores", name)
    if found is None:
        raise StageError(f"The score {name} was there and is gone.")
    facts["seconds"] |= found.pop("seconds")
    facts |= found | {"score": name}
