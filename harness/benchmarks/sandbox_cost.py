"""What isolation costs per generated program: one run, one machine.

python -m harness.benchmarks.sandbox_cost [number of programs]

Runs the reference solution of the embedded programming task as a model's program would run, one after the other: sent
into the sandbox, its answers read to the end. Without isolation it is still a process of its own, with limits. Forms
take turns, so that what else the machine does falls on all of them. Prints seconds per run (a program is run twice, on
its base and on its plus tests) and how long the sandbox itself takes to start, which happens once per judge.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator

import pandas as pd

from harness.models import ROOT
from harness.provenance import provenance
from tasks import plain_values, sandbox
from tasks.judging import why_not
from tasks.sandbox import FORMS, NO_SANDBOX, Job, Sandbox

PROBLEMS = ROOT / "tasks" / "tiny" / "data" / "tiny_code.jsonl"
MEMORY = 4 * 2**30


def jobs(number: int) -> Iterator[Job]:
    for line in PROBLEMS.read_text().splitlines()[:number]:
        problem = json.loads(line)
        inputs = [plain_values.dumps(arguments).decode() for arguments in problem["base_input"]]
        code = problem["prompt"] + problem["canonical_solution"]
        yield Job(code, problem["entry_point"], inputs, [1.0] * len(inputs))


def seconds(box: Sandbox, job: Job) -> float:
    """Until the program has answered and nothing of it is left."""
    start = time.perf_counter()
    with box.running(job, 0) as (frames, _):
        while os.read(frames, 1 << 16):
            pass
    return time.perf_counter() - start


def main() -> int:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    forms = [NO_SANDBOX, *(form for form in FORMS if why_not(form) is None)]
    boxes, starts = {}, {}
    for form in forms:
        start = time.perf_counter()
        boxes[form] = sandbox.start(form, MEMORY)
        starts[form] = time.perf_counter() - start
    took: dict[str, list[float]] = {form: [] for form in forms}
    for job in jobs(number):
        for form, box in boxes.items():
            took[form].append(seconds(box, job))
    medians = {form: statistics.median(values) for form, values in took.items()}
    rows = [
        {
            "isolation": form,
            "median s per run": f"{medians[form]:.4f}",
            "times none": f"{medians[form] / medians[NO_SANDBOX]:.2f}",
            "more s per program": f"{2 * (medians[form] - medians[NO_SANDBOX]):.4f}",
            "s to start, once": f"{starts[form]:.2f}",
            "n": len(took[form]),
        }
        for form in forms
    ]
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))
    print(json.dumps(provenance()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
