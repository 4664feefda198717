"""Does our path give what lm-eval gives? The same rows through our vLLM server and through lm-eval's own hf backend.

    python -m tasks.smol.parity limit=200 data_dir=<folder>          # model=smol_dense suite=smol, both in float32

Prints a table, item by item what differs, and ends with status 1 if that is more than 1 % of a benchmark's items.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness import scoring
from harness.commandline import checked, refuse_politely
from harness.errors import StageError
from harness.run import run
from harness.tables import markdown
from tasks.lm_harness import LmEval

SETTING = ("model=smol_dense", "suite=smol", "method=none", "serve.dtype=float32")
ALLOWED = 0.01

Samples = Sequence[Mapping[str, Any]]


def theirs(folder: Path, tasks: Sequence[LmEval]) -> list[Samples]:
    """The items of every task through lm-eval's hf backend: transformers, float32, on the CPU."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8)
    with tempfile.TemporaryDirectory() as work:
        return [task.evaluate(model, Path(work)).samples for task in tasks]


def compare(name: str, served: Samples, plain: Samples) -> dict[str, Any]:
    """One row: both scores by each metric, the items whose verdict differs, and the largest gap of a log-likelihood."""
    if [row["prompt_hash"] for row in served] != [row["prompt_hash"] for row in plain]:
        raise StageError(f"{name}: the two backends were not asked the same items.")
    pairs = list(zip(served, plain, strict=True))
    gaps = [
        abs(float(a[0][0]) - float(b[0][0]))
        for mine, other in pairs
        for a, b in zip(mine["responses"], other["responses"], strict=True)
    ]
    row: dict[str, Any] = {"benchmark": name, "n": len(pairs)}
    for metric in ("acc", "acc_norm"):
        row[f"{metric}, vLLM"] = f"{sum(mine[metric] for mine in served) / len(pairs):.3f}"
        row[f"{metric}, hf"] = f"{sum(other[metric] for other in plain) / len(pairs):.3f}"
    row["items that differ"] = sum(
        any(mine[metric] != other[metric] for metric in ("acc", "acc_norm")) for mine, other in pairs
    )
    row["largest gap, nats"] = f"{max(gaps):.1e}"
    return row


@refuse_politely
def main() -> int:
    """Run both and print the table."""
    sweep = checked([*SETTING, *sys.argv[1:]])
    (cell,) = sweep.cells
    run(cell, sweep.store)
    tasks = [task for task in cell.tasks if isinstance(task, LmEval)]
    plain = theirs(cell.model.folder, tasks)
    rows = [
        compare(task.name, scoring.samples(cell, task, sweep.store), other)
        for task, other in zip(tasks, plain, strict=True)
    ]
    print(markdown(pd.DataFrame(rows).set_index("benchmark")))
    return int(any(row["items that differ"] > ALLOWED * row["n"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
