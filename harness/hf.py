"""Serving by transformers instead of vLLM (``serve=hf``): slower, anywhere, and the same URL contract."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from harness.engine import await_health, free_port
from harness.errors import StageError, UserError
from harness.host import failure
from harness.models import Model
from harness.plan import Plan
from harness.probe import probe, served_length
from harness.serve import DTYPES, GIB, MAX_STOPS, Served, Weights, child_environment, difference, longest
from tasks import LLM

OVERHEAD_GIB = 4  # torch, and the logits of a batch of prompts (``hf_server.LOGITS_BYTES``, twice over)


@dataclass(frozen=True)
class Transformers:
    """``harness/hf_server.py`` as a child process, one for each plan, which it carries out on the model in memory.

    dtype: of weights and activations; ``auto`` keeps the checkpoint's. max_model_len: longest prompt plus completion in
    tokens; the model's own limit if that is smaller. batch: requests computed together.
    """

    dtype: str
    max_model_len: int
    batch: int
    startup_timeout_s: float

    reads_plans = True

    def check(self, weight_bytes: int = 0) -> None:
        """Raise UserError if a setting makes no sense or ``weight_bytes`` of weights do not fit."""
        if self.dtype not in DTYPES:
            raise UserError(f"serve.dtype={self.dtype} is none of {', '.join(DTYPES)}.")
        needed = weight_bytes * (2 if self.dtype == "float32" else 1) / GIB + OVERHEAD_GIB
        free = psutil.virtual_memory().available / GIB
        if needed > free:
            raise UserError(
                f"Serving needs about {needed:.1f} GiB of memory and {free:.1f} GiB are free. Free memory, take a "
                "smaller model, or use a server elsewhere (serve=server)."
            )

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
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + self.startup_timeout_s
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "harness.hf_server", *self._arguments(weights, name), "--port", str(port)],
                stdin=subprocess.PIPE,  # the server ends when our end closes, however we end
                stdout=output,
                stderr=output,
                env=child_environment(),
                start_new_session=True,  # Ctrl-C reaches only the harness, which ends the server
            )
        try:
            await_health(url, process.poll, deadline, log)
            llm = LLM(url, name, str(weights.folder), served_length(url, name), MAX_STOPS, self.batch)
            yield Served(llm, "transformers", _weight_bytes(log), self._difference(llm, weights, log))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin:
                process.stdin.close()

    def _arguments(self, weights: Weights, name: str) -> list[str]:
        length = min(self.max_model_len, longest(weights.folder, self.max_model_len))
        return [
            *("--model", str(weights.folder), "--name", name, "--dtype", self.dtype),
            *("--max-model-len", str(length), "--batch", str(self.batch)),
            *(("--plan", str(weights.file)) if weights.file else ()),
        ]

    def _difference(self, llm: LLM, weights: Weights, log: Path) -> float | None:
        try:
            return difference(llm, probe(llm), weights, self.dtype)
        except StageError as error:
            raise StageError(f"{error}\n{failure(log)}") from error


def _weight_bytes(log: Path) -> int | None:
    found = re.search(r"^weights: (\d+) bytes$", log.read_text(errors="replace"), re.MULTILINE)
    return int(found[1]) if found else None
