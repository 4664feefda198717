"""harness.run with a new vLLM process for each checkpoint, for ``harness/benchmarks/one_engine.py`` alone."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import serve


class ColdHost:
    """What ``harness.host.Host`` is for, without a process that has imported vLLM already."""

    is_alive = True

    def __init__(self, environment: dict[str, str], log: Path, deadline: float) -> None:
        self._environment = environment

    @contextmanager
    def running(self, arguments: list[str], log: Path) -> Iterator[Callable[[], int | None]]:
        """vLLM's own command, in a process group of its own that is ended on leaving."""
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, env=self._environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            yield process.poll
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    serve.Host = ColdHost  # type: ignore[assignment, misc]
    runpy.run_module("harness.run", run_name="__main__", alter_sys=True)  # as a script, or Hydra looks elsewhere
