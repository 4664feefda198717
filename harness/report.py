"""From the records of a sweep to its tables and plot. Nothing is computed here that a record does not say.

python -m harness.report sweep=demo                              print and write the tables of a sweep, run or not
python -m harness.report experiment=reap_table2 --vs reference   ours beside the published numbers
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness import analyse, bill, figures, items, published, separation, tables
from harness.commandline import refuse_politely
from harness.errors import UserError
from harness.footer import footer
from harness.page import AGAINST, SEEDS, page
from harness.plot import plot
from harness.rows import CELL
from harness.served import in_words
from harness.store import Store
from harness.sweep import Sweep, expand

RECOVERY = ("tokens", "seconds", "kl_before", "kl_after")  # of a recovery's report, what tables show


def frame(sweep: Sweep) -> pd.DataFrame:
    """Tidy: one row per cell, task and metric; one row without metric where there is no score."""
    rows: list[dict[str, Any]] = []
    for cell in sweep.cells:
        errors = _errors(sweep.store.read_json("errors", cell.errors_name) if cell.measures_errors else None)
        for task in cell.tasks:
            found = sweep.store.read_json("records", cell.record_name(task))
            rows += _rows({**cell.row._asdict(), "task": task.name, **errors}, found)
    return pd.DataFrame(rows).drop_duplicates([*CELL, "task", "metric"]).reset_index(drop=True)


def _rows(asked: Mapping[str, Any], found: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if found is None:
        return [{**asked, "status": "not run", "metric": None}]
    size, original = found.get("size", {}), found["original"]
    about = {
        **asked,
        "status": found["status"],
        "error": found["error"],
        "whole": found.get("whole"),
        **{f"size_{name}": value for name, value in size.items()},
        **{f"original_{name}": value for name, value in original.items()},
        **{f"peak_{name}": value for name, value in found.get("peak_memory", {}).items()},
        **{f"seconds_{name}": value for name, value in found.get("seconds", {}).items()},
        **{f"search_{name}": value for name, value in found.get("search", {}).get("spent", {}).items()},
        **{f"recovery_{name}": found["recovery"].get(name) for name in RECOVERY if "recovery" in found},
        **_served(found.get("served", {})),
        **{f"count_{name}": value for name, value in found.get("counts", {}).items()},
        **_made_by(found.get("provenance", {})),
    }
    metrics = found.get("metrics") or {None: {}}
    return [{**about, "metric": name, **metric} for name, metric in metrics.items()]


def _served(served: Mapping[str, Any]) -> dict[str, Any]:
    """How the plan was served and how fast; nothing of what its record leaves open."""
    speed = served.get("throughput") or {}
    how = served["how"] + in_words(served.get("changed_settings") or {}) if "how" in served else None
    flat = {"how": how, **{name: served.get(name) for name in ("weight_bytes", "difference")}, **speed}
    return {f"served_{name}": value for name, value in flat.items()}


def _errors(found: Mapping[str, Any] | None) -> dict[str, float]:
    """Reconstruction error of each layer, and their mean."""
    if found is None:
        return {}
    layers = {f"reconstruction_layer_{layer}": value for layer, value in found["layers"].items()}
    seconds = {"seconds_reconstruct": found["seconds"]}
    return {"reconstruction": sum(layers.values()) / len(layers), **layers, **seconds}


def _made_by(provenance: Mapping[str, Any]) -> dict[str, str]:
    if not provenance:
        return {}
    changed = " with uncommitted changes" if provenance["changed"] else ""
    return {
        "commit": f"commit {provenance['commit']}{changed}",
        "machine": f"{provenance['processor']}, {provenance['cores']} cores",
        "versions": ", ".join(f"{package} {version}" for package, version in provenance["versions"].items()),
    }


def show(sweep: Sweep, arguments: Sequence[str]) -> int:
    """Print the sweep's tables, write them, the plot and the page, and return the exit status: 1 if a cell failed.

    arguments: the command line that asked for the sweep.
    """
    tidy, read = frame(sweep), items.read(sweep)
    made, tests = summary(tidy, items.values(read))
    print(tables.text(made), end="\n\n")
    print(footer(tidy))
    for line in tables.failures(tidy):
        print(line)
    for path in write(sweep.store, sweep.name, tidy, made, tests):
        print(path)
    analyses = analyse.load(sweep) if sweep.store.path("analyses", "").exists() else {}
    print(_file(sweep.store, "pages", f"{sweep.name}.html", page(sweep, tidy, read, made, tests, analyses, arguments)))
    return 1 if (tidy["status"] == "failed").any() else 0


def summary(tidy: pd.DataFrame, known: items.Values) -> tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]:
    """The tables of a sweep, and those of its tests of significance, by what they show."""
    tests = {
        AGAINST: separation.against_uncompressed(tidy, known),
        SEEDS: separation.over_seeds(tidy),
    }
    return tables.all_of(tidy, separation.best(tidy, known)), tests


def write(
    store: Store, name: str, tidy: pd.DataFrame, made: Mapping[str, pd.DataFrame], tests: Mapping[str, pd.DataFrame]
) -> Iterable[Path]:
    """Markdown, LaTeX (with the tests of significance) and tidy CSV in ``tables/``, the plot in ``figures/``."""
    yield _file(store, "tables", f"{name}.md", f"{tables.text(made)}\n\n{footer(tidy)}\n")
    written = [tables.latex(table.reset_index(), title) for title, table in made.items()]
    written += [tables.latex(table, title) for title, table in tests.items() if len(table)]
    yield _file(store, "tables", f"{name}.tex", "\n".join(written))
    yield _file(store, "tables", f"{name}.csv", tidy.to_csv(index=False))
    if (tidy["status"] == "done").any():
        for suffix in ("png", "pdf"):
            draw = functools.partial(plot, tidy, suffix)
            yield store.put("figures", f"{name}.{suffix}", draw)


def write_figures(sweep: Sweep) -> Iterable[Path]:
    """Every other figure of the page as PNG and PDF, for a paper."""
    for figure in figures.of_sweep(sweep, frame(sweep)):
        for suffix in ("png", "pdf"):
            name = f"{sweep.name}-{re.sub('[^a-z]+', '-', figure.title.lower())}.{suffix}"
            yield sweep.store.put("figures", name, functools.partial(figure.draw, suffix))


def _file(store: Store, kind: str, name: str, text: str) -> Path:
    return store.write_text(kind, name, text)


@refuse_politely
def main() -> int:
    arguments = sys.argv[1:]
    place = arguments.index("--vs") if "--vs" in arguments else len(arguments)
    if arguments[place + 1 : place + 2] != ["reference"] and place < len(arguments):
        raise UserError("--vs takes one word: --vs reference, the numbers in results/reference/.")
    asked = [*arguments[:place], *arguments[place + 2 :]]
    sweep = expand(asked)
    if sweep.dry_run:
        return bill.show(sweep)
    if place < len(arguments):
        return compare(sweep)
    status = show(sweep, asked)
    for path in write_figures(sweep):
        print(path)
    return status


def compare(sweep: Sweep) -> int:
    """Print our numbers beside the published ones, and write them."""
    text = published.text(frame(sweep))
    print(text, _file(sweep.store, "tables", f"{sweep.name}-vs-reference.md", text + "\n"), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
