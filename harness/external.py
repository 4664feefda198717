"""A server that somebody else runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import StageError, UserError
from harness.models import Model
from harness.plan import Plan
from harness.probe import check_tokenizer, probe, probe_tokens, served_length
from harness.served import Served, Weights, difference
from tasks import LLM


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server that already runs, for example vLLM on a cluster.

    It serves the one model it serves: use it to score a model as it is, not for a sweep over compressed ones. If it is
    vLLM, start it with --generation-config vllm, as ``VLLM`` does.

    url: its address without ``/v1``. model: the name it knows the model by. tokenizer: folder or hub name of the
    tokenizer; the model folder's if None.
    """

    url: str
    model: str
    tokenizer: str | None = None

    def check(self, weight_bytes: int = 0, servers: int = 1) -> None:
        """Raise UserError if it does not answer or does not know the model."""
        try:
            served_length(self.url.rstrip("/"), self.model)
        except StageError as error:
            raise UserError(f"serve.url={self.url}, serve.model={self.model}: {error}") from error

    reads_plans = False

    def check_model(self, model: Model) -> None:
        """It serves what it serves; its log-probabilities are compared."""

    def check_plan(self, model: Model, plan: Plan) -> None:
        """Nothing to check: the cell was (``Cell.check``)."""

    def identity(self) -> dict[str, Any]:
        """All we know of it: that it is somebody else's, and which."""
        return {
            "engine": "external server",
            "url": self.url.rstrip("/"),
            "model": self.model,
            "tokenizer": self.tokenizer,
        }

    @contextmanager
    def serve(self, weights: Weights, name: str, log: Path) -> Iterator[Served]:
        """The running server; ``name`` and ``log`` are not used. Raises StageError like ``VLLM.serve``."""
        url = self.url.rstrip("/")
        tokenizer = self.tokenizer or str(weights.folder)
        llm = LLM(url, self.model, tokenizer, served_length(url, self.model), runs_code=weights.runs_code)
        found = probe(llm)
        check_tokenizer(llm, len(probe_tokens(tokenizer, weights.runs_code)), len(found) + 1)
        yield Served(llm, "external server", difference=difference(llm, found, weights, "unknown"))
