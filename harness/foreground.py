"""Serve one plan, or a checkpoint as it is, in the foreground, to talk to it. Ctrl-C ends it.

python -m harness.foreground method=reap ratio=0.5
python -m harness.foreground plan=<file> model=tiny
python -m harness.foreground method=none model.path=<folder> model.name=mine
"""

from __future__ import annotations

import sys
import threading

from harness import scoring, stages
from harness.commandline import refuse_politely
from harness.errors import UserError
from harness.one_plan import one_plan, split
from harness.served import Weights
from harness.spec import Cell


def _check(cell: Cell) -> None:
    cell.serve.check(cell.model.nbytes)


def _check_file(cell: Cell) -> None:
    if not cell.serve.reads_plans:
        raise UserError("A plan in a file is served by serve=vllm, serve=plan or serve=hf.")
    _check(cell)


@refuse_politely
def main() -> int:
    options, rest = split(sys.argv[1:], ("plan",))
    file = options.get("plan")
    asked = one_plan(rest, file, _check_file if file is not None else _check)
    cell = asked.cell
    if asked.is_cells:
        with scoring.serving(cell, asked.plan, asked.store) as serving:
            _wait(serving.served.llm.url, serving.served.llm.model)
        return 0
    expected = stages.reference(cell, asked.plan, asked.store)
    weights = Weights(cell.model.folder, asked.plan, asked.file, expected, runs_code=cell.model.runs_code)
    log = asked.store.path("logs", "foreground.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with cell.serve.serve(weights, cell.model.name, log) as served:
        _wait(served.llm.url, served.llm.model)
    return 0


def _wait(url: str, model: str) -> None:
    request = f'{{"model": "{model}", "prompt": "def add(a, b):", "max_tokens": 32, "temperature": 0}}'
    print(f"{model} is served at {url}/v1 (OpenAI's API). Ctrl-C ends it. For example:\n")
    print(f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{request}'", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    sys.exit(main())
