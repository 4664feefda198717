"""The report of a sweep as one HTML file that needs no network: tables, figures, problems side by side, provenance.

Everything in it is read from the store; no model is loaded.
"""

from __future__ import annotations

import base64
import functools
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from harness import analyse, analysis_figures, claims, figures, tables
from harness.analyses import Analysis
from harness.claims import main_metric
from harness.cost_tables import stage_times
from harness.figures import Figure
from harness.footer import agreement, footer, made_by
from harness.items import Items, Values, values
from harness.plot import plot
from harness.rows import CELL
from harness.spec import Row
from harness.store import Store
from harness.sweep import Sweep
from tasks import Item

TEMPLATE = Path(__file__).with_name("page.html.j2")
AGAINST, SEEDS = "difference from the uncompressed model", "intervals over seeds"  # tables of tests, by what they show
ANSWERS = 40  # rows of which answers are shown: a page of hundreds would take minutes to open


@dataclass(frozen=True)
class Section:
    """A part of the page: words, then tables (each cell Markdown with bold alone), then figures."""

    id: str
    title: str
    words: Sequence[str] = ()
    tables: Sequence[dict[str, Any]] = ()
    figures: Sequence[dict[str, str]] = ()
    wraps: bool = False


@dataclass
class _Texts:
    """Texts by their number, each kept once: most answers of two models are the same."""

    numbers: dict[str, int] = field(default_factory=dict)

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def page(
    sweep: Sweep,
    tidy: pd.DataFrame,
    read: Items,
    made: Mapping[str, pd.DataFrame],
    tests: Mapping[str, pd.DataFrame],
    analyses: Mapping[Row, Analysis],
    arguments: Sequence[str],
) -> str:
    """The whole file. tidy: of `harness.report.frame`. read: of `harness.items.read`. made, tests: of
    `harness.report.summary`. analyses: of `harness.analyse.load`, none if nothing was analysed. arguments: the
    command's.
    """
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True)
    done = tidy[tidy["status"] == "done"]
    command = shlex.join(arguments)
    return environment.get_template(TEMPLATE.name).render(
        title=f"MoE compression bench: {sweep.name}",
        summary=_summary(tidy),
        sections=list(_sections(sweep, tidy, values(read), made, tests, analyses)),
        problems=problems(read),
        command=f"./bench run {command}",
        page_command=f"./bench table {command}",
        provenance=f"{stage_times(tidy)}\n{made_by(done)}",
    )


def _summary(tidy: pd.DataFrame) -> str:
    rows = tidy.drop_duplicates([*CELL, "task"])
    states = {state: int((rows["status"] == state).sum()) for state in ("done", "failed", "not run")}
    counts = ", ".join(f"{number} {state}" for state, number in states.items() if number)
    return f"{tidy['label'].nunique()} methods, {tidy['task'].nunique()} tasks, {len(rows)} scores: {counts}."


def _sections(
    sweep: Sweep,
    tidy: pd.DataFrame,
    known: Values,
    made: Mapping[str, pd.DataFrame],
    tests: Mapping[str, pd.DataFrame],
    analyses: Mapping[Row, Analysis],
) -> Iterator[Section]:
    of_scores = {title: table for title, table in made.items() if title not in ("costs", "serving", "errors")}
    lines = footer(tidy).splitlines()
    failed = tables.failures(tidy)
    yield Section(
        "scores",
        "Scores",
        [*lines[:3], *(line for line in [agreement(tidy)] if line), *failed],
        [_table(table) for table in of_scores.values()],
        list(_drawn([_scores_figure(tidy)] if (tidy["status"] == "done").any() else [], sweep.store)),
    )
    if len(tests[AGAINST]):
        words = (
            "The same problems under both models. Pass or fail with one seed: McNemar's exact test, and an interval "
            "after Agresti and Min; otherwise Student's t over items and seeds. p is corrected over the rows of a task "
            "(Holm). “No difference found” is not “no difference”: the interval says what could not be ruled out."
        )
        yield Section("tests", "Against the uncompressed model", [words], [_table(tests[AGAINST], index=False)])
    if len(tests[SEEDS]):
        words = (
            "A seed draws the calibration text (and what a method chooses at random); the interval is Student's over "
            "the seeds' scores and says nothing about the choice of problems."
        )
        yield Section("seeds", "Over seeds", [words], [_table(tests[SEEDS], index=False)])
    kinds = {task.name: task.kind for cell in sweep.cells for task in cell.tasks}
    if found := claims.findings(tidy, known, kinds, {row: one.distortions for row, one in analyses.items()}):
        words = (
            "What the paper says of large models, put to the test on the rows of this sweep. A verdict holds for these "
            "rows alone; p is corrected over the places where a claim was tested (Holm)."
        )
        judged = _table(claims.table(found), index=False)
        yield Section("claims", "The paper's claims here", [words], [judged], wraps=True)
    if drawn := list(_drawn(figures.of_sweep(sweep, tidy), sweep.store)):
        yield Section("figures", "Figures", [], [], drawn)
    if analyses:
        table = analyse.table(analyse.frame(analyses, (cell.row for cell in sweep.cells)))
        pictures = list(_drawn(analysis_figures.all_figures(sweep, analyses), sweep.store))
        yield Section("analyses", "The paper's analyses here", [], [_table(table)], pictures)
    rest = [made[name] for name in ("costs", "serving", "errors") if name in made]
    if rest:
        yield Section("cost", "Size, cost, serving, errors by layer", lines[3:4], [_table(table) for table in rest])


def _scores_figure(tidy: pd.DataFrame) -> Figure:
    caption = "Score against the share of experts removed; bars are standard errors, or deviations over seeds."
    return Figure("Scores", caption, functools.partial(plot, tidy))


def _drawn(found: Iterable[Figure], store: Store) -> Iterator[dict[str, str]]:
    """Figures as PNG in base64. Killed meanwhile, the folder is swept out of the store by the next run."""
    with store.workspace("page") as folder:
        for figure in found:
            path = folder / "figure.png"
            figure.draw("png", path)
            png = base64.b64encode(path.read_bytes()).decode()
            yield {"title": figure.title, "caption": figure.caption, "png": png}


def _table(table: pd.DataFrame, index: bool = True) -> dict[str, Any]:
    """Columns, and rows of cells: text, and whether it is bold."""
    whole = table.reset_index() if index else table
    rows = [[_cell(str(value)) for value in row] for row in whole.itertuples(index=False, name=None)]
    return {"columns": [str(column) for column in whole], "rows": rows}


def _cell(text: str) -> dict[str, Any]:
    return {"text": text.replace("**", ""), "bold": "**" in text}


def problems(read: Items) -> dict[str, Any] | None:
    """Every problem with what each row (its first seed) answered, as JSON for the page; None without any score.

    models: names of rows. tasks: name; items: [id, prompt, expected]; answers: for each row [right, answer] per item,
    or null. texts: what the numbers stand for. An answer is right where the task's main metric is 1.
    """
    texts = _Texts()
    seeds: dict[str, int | None] = {}
    for row, _ in read:
        seeds.setdefault(_name(row), row.seed)
    shown = list(seeds)[:ANSWERS]
    tasks: dict[str, dict[str, Any]] = {}
    for (row, task), items in read.items():
        name = _name(row)
        if name not in shown or row.seed != seeds[name]:
            continue
        asked = [[item.id, texts(item.prompt), item.expected and texts(item.expected)] for item in items]
        metric = main_metric(task, items[0].values) if items else ""
        entry = tasks.setdefault(task, {"name": task, "metric": metric, "items": asked, "answers": [None] * len(shown)})
        if asked == entry["items"]:
            entry["answers"][shown.index(name)] = [[int(_is_right(task, item)), texts(item.answer)] for item in items]
    if not tasks:
        return None
    found = {"models": shown, "tasks": list(tasks.values()), "texts": list(texts.numbers), "start": 1}
    words = ""
    if len(seeds) > ANSWERS:
        words = f"The first {ANSWERS} rows; the answers of {len(seeds) - ANSWERS} more are in the store (samples/)."
    # "</script>" in an answer must not end the script
    return {"json": Markup(json.dumps(found, ensure_ascii=False).replace("<", "\\u003c")), "left_out": words}


def _is_right(task: str, item: Item) -> bool:
    return item.values[main_metric(task, item.values)] == 1


def _name(row: Row) -> str:
    on = "" if row.calibration == "none" else f" on {row.calibration}"
    on += "" if row.routing in ("none", "actual") else f", routing={row.routing}"
    return f"{row.model} {row.label}" + (f" {100 * row.ratio:.4g} %{on}" if row.ratio else "")
