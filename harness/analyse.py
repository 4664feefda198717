"""The paper's analyses of a sweep that has run: what needs the model is measured once and kept, the rest is drawn.

python -m harness.analyse sweep=demo            figures and a table, for every plan in the store
python -m harness.analyse sweep=demo n=20       cross-perplexity of the first 20 texts of each task, instead of 100

For each plan: mean outputs of its experts, distances of what it merges, divergence of its predictions, all on held-out
calibration tokens; for each model that has been scored: what the original thinks of the texts it wrote.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from harness import analysis_figures, bill, gather, scoring, stages, tables
from harness.analyses import NGRAMS, Analysis, Texts, singleton_share
from harness.commandline import refuse_politely
from harness.errors import StageError, UserError
from harness.models import Model
from harness.one_plan import split
from harness.plan import Plan, read
from harness.provenance import provenance
from harness.rows import NOT_RUN, by_row, plan_names
from harness.spec import Cell, Row
from harness.store import Store, key, say
from harness.sweep import Sweep, expand
from harness.tokenizer import tokenizer_of
from tasks import Item, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA = 1  # raise it when harness/examine.py finds something else: what was found before is then found anew
TEXTS = 100  # of each task, as in the paper


# What is kept, and under which names.


def plan_of(cell: Cell, store: Store) -> Plan | None:
    """The cell's plan, if it is in the store. Raises UserError if it is another model's or damaged."""
    path = stages.plan_file(cell, store)
    if not path.exists():
        return None
    try:
        made = read(path)
        made.validate(cell.model.experts, cell.model.top_k)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return made


def _found_how(cell: Cell) -> dict[str, Any]:
    """What determines whatever the model says, besides what it is asked."""
    return {
        "model": cell.model.digest,
        "dtype": cell.calibration.dtype,
        "transformers": importlib.metadata.version("transformers"),
        "schema": SCHEMA,
    }


def _originals_name(cell: Cell) -> str:
    return key(held_out=cell.tokens_name, **_found_how(cell)) + ".safetensors"


def _plan_name(cell: Cell, made: Plan) -> str:
    return key(plan=made.digest, held_out=cell.tokens_name, **_found_how(cell)) + ".safetensors"


def _nll_name(cell: Cell, score: str, texts: int) -> str:
    return key(score=score, texts=texts, **_found_how(cell)) + ".json"


def _written(cell: Cell, task: Task, store: Store, texts: int) -> tuple[str, list[Item]] | None:
    """The name of the cell's score on a task and the first texts behind it; None if there is no score, or its samples
    are gone, or the model writes nothing but chooses among answers.
    """
    if task.kind == "multiple choice":
        return None
    try:
        rows = scoring.samples(cell, task, store)
    except (StageError, OSError):
        return None
    found = store.read_json("records", cell.record_name(task)) or {}
    return found["score"], task.items(rows)[:texts]


def load(sweep: Sweep, texts: int = TEXTS) -> dict[Row, Analysis]:
    """What is on disk about every row of the sweep, in its order; no model is loaded. Left out is a compressed row
    without a plan; where something was not measured yet, its field is empty.
    """
    found: dict[Row, Analysis] = {}
    for cell in sweep.cells:
        made = plan_of(cell, sweep.store) if cell.compresses else None
        if made is None and cell.compresses:
            continue
        texts_here = _load_all_texts(cell, sweep.store, texts)
        known = found.get(cell.row) or _load(cell, made, sweep.store)
        found[cell.row] = replace(known, texts={**known.texts, **texts_here})  # of a row, cells may differ in tasks
    return found


def _load(cell: Cell, made: Plan | None, store: Store) -> Analysis:
    if made is None or not cell.measures_errors:
        return Analysis(cell.row, made)
    tensors = _tensors(store.path("analyses", _plan_name(cell, made)))
    originals = _layers(_tensors(store.path("analyses", _originals_name(cell))), "mean")
    return Analysis(
        cell.row,
        made,
        originals=originals,
        slots=_layers(tensors, "mean") if originals else {},  # of no use without what they are compared with
        divergence=tensors.get("divergence"),
        distances=_layers(tensors, "distance"),
    )


def _load_all_texts(cell: Cell, store: Store, texts: int) -> dict[str, Texts]:
    written = {task.name: _load_texts(cell, task, store, texts) for task in cell.tasks}
    return {name: one for name, one in written.items() if one is not None}


def _tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path) if path.exists() else {}


def _layers(tensors: Mapping[str, np.ndarray], kind: str) -> dict[int, np.ndarray]:
    names = {int(name.rpartition(".")[2]): name for name in tensors if name.startswith(f"{kind}.")}
    return {layer: tensors[name] for layer, name in sorted(names.items())}


def _load_texts(cell: Cell, task: Task, store: Store, texts: int) -> Texts | None:
    written = _written(cell, task, store, texts)
    if written is None:
        return None
    score, items = written
    known = store.read_json("analyses", _nll_name(cell, score, texts))
    nll = None if known is None else np.array(known["nll"], dtype=float)  # None becomes NaN
    return Texts(tuple(item.answer for item in items), nll)


# What needs the model.


@functools.lru_cache(maxsize=1)
def _loaded(model: Model, dtype: str) -> PreTrainedModel:
    """Loaded once for all plans and texts, when the first of them is missing."""
    return model.load(dtype)


class _HeldOut:
    """Held-out tokens of one calibration set, and what they bring to the experts of its model: computed when the first
    plan asks for it, for all plans.
    """

    def __init__(self, cell: Cell, store: Store) -> None:
        self.cell, self.store = cell, store

    @functools.cached_property
    def ids(self) -> np.ndarray:
        return gather.held_out_tokens(self.cell, self.store)

    @functools.cached_property
    def inputs(self) -> Any:
        from harness.calibrate import packed_batches
        from harness.examine import expert_inputs

        return expert_inputs(self.model, packed_batches(self.ids, self.cell.calibration.batch_size))

    @property
    def model(self) -> PreTrainedModel:
        return _loaded(self.cell.model, self.cell.calibration.dtype)

    def originals(self) -> dict[str, np.ndarray]:
        from harness.examine import expert_means

        return {f"mean.{layer}": means for layer, means in expert_means(self.model, self.inputs).items()}

    def plan(self, made: Plan) -> dict[str, np.ndarray]:
        from harness.examine import divergences, slot_means

        means = slot_means(self.model, self.inputs, made.layers)
        return {
            **{f"mean.{layer}": value for layer, value in means.items()},
            **{f"distance.{layer}": value for layer, value in self._distances(made).items()},
            "divergence": divergences(self.model, made.layers, self.ids),
        }

    def _distances(self, made: Plan) -> dict[int, np.ndarray]:
        from harness.examine import weight_distances

        try:
            return weight_distances(self.model, made.layers)
        except UserError as problem:  # all else of the plan can still be measured
            say("skipped", "distances in weights", str(problem))
            return {}


def measure(sweep: Sweep, texts: int = TEXTS) -> bool:
    """Measure what is missing, and keep it; whether nothing failed. A failure is said, and tried again the next time.

    Raises UserError if there is nothing to measure.
    """
    plans = _plans(sweep)
    groups: dict[tuple[Any, ...], list[tuple[Cell, Plan]]] = {}  # by what is held in memory together
    for cell, made in plans:
        groups.setdefault((cell.model.digest, cell.calibration.dtype, cell.tokens_name), []).append((cell, made))
    done = [_measure_plans(group, sweep.store) for group in groups.values()]
    tasks = {(cell.row, task.name): (cell, task) for cell in sweep.cells for task in cell.tasks}
    done += [_measure_texts(cell, task, sweep.store, texts) for cell, task in tasks.values()]
    _loaded.cache_clear()
    return all(done)


def _plans(sweep: Sweep) -> list[tuple[Cell, Plan]]:
    """A cell of every compressed row, and its plan, if that is in the store."""
    cells = list(
        {cell.row: cell for cell in reversed(sweep.cells) if cell.compresses and cell.recovery is None}.values()
    )[::-1]
    if not cells:
        raise UserError("This sweep compresses nothing, so there is nothing to analyse. Name a method, as method=reap.")
    if any(cell.calibration.held_out < 1 for cell in cells):
        raise UserError(
            "calibration.held_out=0 leaves no tokens to examine plans on. Set it to some sequences, for the run too."
        )
    found = [(cell, made) for cell in cells if (made := plan_of(cell, sweep.store)) is not None]
    if not found:
        raise UserError(
            f"None of the {len(cells)} plans of this sweep is in {sweep.store.root}/plans. Run it first, with the same "
            "settings: ./bench run ..."
        )
    for cell in cells:
        if not stages.plan_file(cell, sweep.store).exists():
            say("skipped", cell.slug, "it has no plan yet")
    return found


def _measure_plans(group: list[tuple[Cell, Plan]], store: Store) -> bool:
    """All plans of one model on the same held-out tokens."""
    first = group[0][0]
    held_out = _HeldOut(first, store)
    whole = f"{first.model.name} {first.calibration.name}"
    done = [_once("originals", whole, _originals_name(first), store, _saving(held_out.originals))]
    for cell, made in group:
        make = _saving(functools.partial(held_out.plan, made))
        done.append(_once("examine", cell.slug, _plan_name(cell, made), store, make))
    return all(done)


def _saving(measured: Callable[[], dict[str, np.ndarray]]) -> Callable[[Path], None]:
    from safetensors.numpy import save_file

    return lambda path: save_file({name: np.ascontiguousarray(value) for name, value in measured().items()}, path)


def _once(stage: str, what: str, name: str, store: Store, make: Callable[[Path], None]) -> bool:
    """Make a file of ``analyses/`` unless it is there, and say so. Whether it is there now."""
    cached, start = store.path("analyses", name).exists(), time.perf_counter()
    try:
        store.once("analyses", name, make)
    except Exception as problem:  # too little memory, an output that is not finite: others can still be measured
        say("failed", f"{stage} {what}", f"{type(problem).__name__}: {problem}")
        return False
    say(stage, what, "cached" if cached else f"{time.perf_counter() - start:.1f} s")
    return True


def _measure_texts(cell: Cell, task: Task, store: Store, texts: int) -> bool:
    written = _written(cell, task, store, texts)
    if written is None:
        return True
    score, items = written

    def make(path: Path) -> None:
        found = {"nll": _nll(cell, items), "task": task.name, "score": score, "provenance": provenance()}
        path.write_text(json.dumps(found, indent=1, allow_nan=False))

    return _once("texts", f"{cell.slug} {task.name}", _nll_name(cell, score, texts), store, make)


def _nll(cell: Cell, items: list[Item]) -> list[float | None]:
    """Nats per token of each answer under the original model; None for one that is empty."""
    from harness.examine import continuation, mean_nll

    tokenizer = tokenizer_of(cell.model.folder, cell.model.runs_code)
    places = [place for place, item in enumerate(items) if item.answer.strip()]
    texts = [continuation(tokenizer, items[place].prompt, items[place].answer) for place in places]
    known = dict(zip(places, mean_nll(_loaded(cell.model, cell.calibration.dtype), texts), strict=True))
    values = [known.get(place, np.nan) for place in range(len(items))]
    return [float(value) if np.isfinite(value) else None for value in values]


# What is shown.


def frame(loaded: Mapping[Row, Analysis], rows: Iterable[Row] = ()) -> pd.DataFrame:
    """Tidy: one line for each row of the sweep, one column for each number; NaN where it is not known.

    rows: of the sweep, those that have no plan yet among them.
    """
    every = dict.fromkeys([*rows, *loaded])
    return pd.DataFrame([{**row._asdict(), **(_numbers(loaded[row]) if row in loaded else {})} for row in every])


def _numbers(analysis: Analysis) -> dict[str, float]:
    found: dict[str, float] = {}
    if distortions := list(analysis.distortions.values()):
        found |= {"distortion": float(np.mean(distortions)), "first": distortions[0], "last": distortions[-1]}
    if analysis.divergence is not None:
        found["divergence"] = float(analysis.divergence.mean())
    if analysis.merges and analysis.plan is not None:
        found["singletons"] = float(np.mean(list(singleton_share(analysis.plan).values())))
    for name, texts in analysis.texts.items():
        if len(texts.perplexities):
            found[f"perplexity {name}"] = float(np.median(texts.perplexities))
        found |= {f"diversity {n} {name}": float(np.mean(known)) for n in NGRAMS if len(known := texts.diversities(n))}
    return found


def table(tidy: pd.DataFrame) -> pd.DataFrame:
    """One line per method and ratio, of seeds the mean; "—" unless every seed has the number."""
    names = plan_names(tidy)
    rows = {name: _line(group) for name, group in by_row(tidy, names)}
    made = pd.DataFrame.from_dict(rows, orient="index")
    made.index = pd.MultiIndex.from_tuples(rows, names=names)
    return made


def _line(group: pd.DataFrame) -> dict[str, str]:
    tasks = [str(column).partition(" ")[2] for column in group if str(column).startswith("perplexity ")]
    written = [str(column).partition(" ")[2][2:] for column in group if str(column).startswith("diversity 2 ")]
    return {
        "manifold distortion": _mean(group, "distortion"),
        "first layer": _mean(group, "first"),
        "last layer": _mean(group, "last"),
        "divergence, bits": _mean(group, "divergence"),
        "singleton clusters": _mean(group, "singletons"),
        **{f"cross-perplexity, median: {task}": _mean(group, f"perplexity {task}") for task in tasks},
        **{
            f"{', '.join(map(str, NGRAMS))}-gram diversity: {task}": " ".join(
                _mean(group, f"diversity {n} {task}") for n in NGRAMS
            )
            for task in written
        },
    }


def _mean(group: pd.DataFrame, column: str) -> str:
    if column not in group or group[column].isna().any():
        return NOT_RUN
    value = float(group[column].mean())
    return f"{value:.3f}" if value < 100 else f"{value:.3g}"


def draw(sweep: Sweep, loaded: Mapping[Row, Analysis]) -> Iterator[Path]:
    """Every figure there is data for, as PNG and PDF in ``figures/``."""
    for title, _, figure in analysis_figures.all_figures(sweep, loaded):
        name = re.sub(r"[^a-z0-9]+", "-", f"analyses-{sweep.name}-{title}".lower()).strip("-")
        for suffix in ("png", "pdf"):
            yield sweep.store.put("figures", f"{name}.{suffix}", functools.partial(figure, suffix))


@refuse_politely
def main() -> int:
    """Measure what is missing, print a table, draw the figures. Exit status 1 if something could not be measured."""
    options, arguments = split(sys.argv[1:], ("n",))
    texts = _number_of_texts(options.get("n", str(TEXTS)))
    sweep = expand(arguments)
    if sweep.dry_run:
        return bill.show(sweep)
    complete = measure(sweep, texts)
    loaded = load(sweep, texts)
    print(tables.markdown(table(frame(loaded, (cell.row for cell in sweep.cells)))), end="\n\n")
    for path in draw(sweep, loaded):
        print(path)
    return 0 if complete else 1


def _number_of_texts(given: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", given) or int(given) < 1:
        raise UserError(f"n={given} is no number of texts. Give a whole number from 1 up, such as n={TEXTS}.")
    return int(given)


if __name__ == "__main__":
    sys.exit(main())
