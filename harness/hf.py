"""Serving by transformers instead of vLLM (``serve=hf``): slower, anywhere, and the same URL contract."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from harness.engine import Watch, await_health
from harness.engine_memory import check_ram
from harness.errors import UserError
from harness.host import Running, child_environment
from harness.models import Model
from harness.plan import Plan
from harness.probe import probe, served_length
from harness.served import DTYPES, MAX_STOPS, Served, Weights, difference, longest
from tasks import LLM

OVERHEAD_GIB = 4  # torch, and the logits of a batch of prompts (``hf_server.LOGITS_BYTES``, twice over)


@dataclass(frozen=True)
class Transformers:
    """``harness/hf_server.py`` as a child process, one for each plan, which it carries out on the model in memory.

    dtype: of weights and activations; ``auto`` keeps the checkpoint's. max_model_len: longest prompt plus completion in
    tokens; the model's own limit if that is smaller. batch: requests computed together. startup_timeout_s: that a start
    may take. silence_timeout_s: that a server in use may give no sign of life.
    """

    dtype: str
    max_model_len: int
    batch: int
    startup_timeout_s: float
    silence_timeout_s: float

    reads_plans = True

    def check(self, weight_bytes: int = 0, servers: int = 1) -> None:
        """Raise UserError if a setting makes no sense or ``weight_bytes`` of weights do not fit so many times."""
        if self.dtype not in DTYPES:
            raise UserError(f"serve.dtype={self.dtype} is none of {', '.join(DTYPES)}.")
        check_ram(servers, weight_bytes, self.dtype, overhead_gib=OVERHEAD_GIB)

    def check_model(self, model: Model) -> None:
        """Raise UserError for quantised weights, which only a server computes as they are meant to be."""
        if model.config.get("quantization_config"):
            raise UserError(
                f"model {model.name!r} is quantised, and serve=hf would compute it in other numbers than a server "
                "does. Use serve=vllm, or a server elsewhere (serve=server)."
            )

    def check_plan(self, model: Model, plan: Plan) -> None:
        """Every plan can be carried out in memory."""

    def identity(self) -> dict[str, Any]:
        """What determines numbers."""
        import torch

        return {
            "engine": "transformers",
            "version": importlib.metadata.version("transformers"),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
        }

    @contextmanager
    def serve(self, weights: Weights, name: str, log: Path) -> Iterator[Served]:
        """Serve the weights as ``name`` on 127.0.0.1; the server's output goes to ``log``. On leaving, it has ended.

        Raises StageError, with the log's decisive line, if it dies or does not come up in time.
        """
        deadline = time.monotonic() + self.startup_timeout_s
        with _running(self._arguments(weights, name), log) as running:
            await_health(running, deadline, log)
            length = served_length(running.url, name)
            llm = LLM(running.url, name, str(weights.folder), length, MAX_STOPS, self.batch, weights.runs_code)
            with Watch(running, functools.partial(_ask, running.url), self.silence_timeout_s, log).looking() as watch:
                with watch.blamed():
                    found = difference(llm, probe(llm), weights, self.dtype)
                yield Served(llm, "transformers", _weight_bytes(log), found, watch=watch)

    def _arguments(self, weights: Weights, name: str) -> list[str]:
        length = min(self.max_model_len, longest(weights.folder, self.max_model_len))
        return [
            *("--model", str(weights.folder), "--name", name, "--dtype", self.dtype),
            *("--max-model-len", str(length), "--batch", str(self.batch)),
            *(("--plan", str(weights.file)) if weights.file else ()),
            *(("--trust-remote-code",) if weights.runs_code else ()),
        ]


@contextmanager
def _running(arguments: list[str], log: Path) -> Iterator[Running]:
    """The server as a child process; on leaving, none of its processes is left."""
    with socket.socket() as listening, log.open("wb") as output:
        listening.bind(("127.0.0.1", 0))  # handed over: nothing can come between choosing a port and taking it
        port, descriptor = listening.getsockname()[1], listening.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "harness.ends_with_input", "harness.hf_server", *arguments, "--fd", str(descriptor)],
            stdin=subprocess.PIPE,  # the server ends when our end closes, however we end
            stdout=output,
            stderr=output,
            env=child_environment(),
            pass_fds=[descriptor],
            start_new_session=True,  # Ctrl-C reaches only the harness, which ends the server
        )

    def kill() -> None:
        if process.poll() is None:  # else its number may be another's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    try:
        yield Running(port, process.poll, kill)
    finally:
        kill()
        process.wait()
        if process.stdin:
            process.stdin.close()


def _ask(url: str, timeout_s: float) -> None:
    """Have the server answer. Raises httpx.HTTPError if it does not."""
    httpx.get(f"{url}/health", timeout=timeout_s, trust_env=False).raise_for_status()


def _weight_bytes(log: Path) -> int | None:
    found = re.search(r"^weights: (\d+) bytes$", log.read_text(errors="replace"), re.MULTILINE)
    return int(found[1]) if found else None
