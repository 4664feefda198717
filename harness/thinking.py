"""A thinking budget as a way of serving (``serve=phases``): the plan's model thinks, the original answers.

Source: elastic budget control of Star Elastic, arXiv 2605.07182.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from harness import gpus
from harness.engine import Watch
from harness.errors import StageError, UserError
from harness.models import Model
from harness.serve import VLLM
from harness.served import Served, Weights
from harness.tokenizer import tokenizer_of


@dataclass(frozen=True)
class ThinkThenAnswer(VLLM):
    """Two vLLM engines with the same settings, and ``harness/phases_server.py`` before them.

    Likelihoods are the original's alone. Where the plan drops nothing, one engine does both.

    end: what closes a thought, as text; a token that the server leaves out of texts would never be found.
    cap: longest thought, in tokens.
    """

    end: str
    cap: int

    engines: ClassVar[int] = 2

    def check(self, weight_bytes: int = 0, servers: int = 1) -> None:
        """Raise UserError as `VLLM.check` does; ``weight_bytes`` are the original's, and the plan's at most."""
        if self.how != "plan":
            raise UserError(
                f"serve.how={self.how}: an engine that turns from plan to plan, or a checkpoint made of each, is not "
                "offered beside a second engine. serve=phases goes with serve.how=plan."
            )
        if not self.end or self.cap < 1:
            raise UserError(
                f"serve.end={self.end!r}, serve.cap={self.cap}: a thought needs a text that closes it and at least one "
                "token."
            )
        if self.gpu_memory_utilization > 0.5 and gpus.visible():
            raise UserError(
                f"serve.gpu_memory_utilization={self.gpu_memory_utilization} is what each of two engines takes of a "
                "GPU. At most 0.5 goes."
            )
        super().check(weight_bytes, servers)

    def check_model(self, model: Model) -> None:
        """Raise UserError as `VLLM.check_model` does, and for a cap that leaves no prompt and no answer."""
        super().check_model(model)
        length = min(self.max_model_len, model.config.get("max_position_embeddings") or self.max_model_len)
        most = length - 2 - len(self.end.encode())  # one token of prompt and of answer; a token has at least one byte
        if self.cap > most:
            raise UserError(
                f"serve.cap={self.cap}: {model.name} takes {length} tokens (serve.max_model_len, or its own limit), "
                f"and prompt and answer need room beside a thought. At most {most} leave any."
            )

    def identity(self) -> dict[str, Any]:
        """As `VLLM.identity`, and both phases. The key of a score names original and plan by content beside it."""
        return {
            **super().identity(),
            "phases": {"thinks": "the plan", "answers": "the original", "end": self.end, "cap": self.cap},
        }

    @contextmanager
    def serve(self, weights: Weights, name: str, log: Path) -> Iterator[Served]:
        """The original as ``name``, thinking with the weights first; logs: ``log`` and, the original's, one beside it.

        difference: of the weights that think. Raises StageError as `VLLM.serve`.
        """
        thinks_alone = weights.plan is None or not weights.plan.is_identity
        with ExitStack() as engines:
            small = engines.enter_context(super().serve(weights, f"{name}-thinks" if thinks_alone else name, log))
            both = [small]
            if thinks_alone:
                beside = log.with_suffix(f".original{log.suffix}")
                both.append(engines.enter_context(super().serve(original(weights), name, beside)))
            yield engines.enter_context(self._phases(both[0], both[-1]))

    @contextmanager
    def _phases(self, small: Served, large: Served) -> Iterator[Served]:
        from harness.phases_server import PhasesServer, running

        tokenizer = tokenizer_of(large.llm.tokenizer, large.llm.runs_code)
        server = PhasesServer(small.llm, large.llm, self.end, self.cap, tokenizer)
        sizes = {served.llm.url: served.weight_bytes or 0 for served in (small, large)}
        changed = {
            f"{does}: {name}": pair
            for does, served in (("thinks", small), ("answers", large))
            for name, pair in served.changed_settings.items()
        }
        watch = _Watches([served.watch for served in (small, large) if served.watch])
        with running(server.app()) as url:
            llm = replace(large.llm, url=url, max_model_len=server.max_model_len)
            yield Served(llm, "phases", sum(sizes.values()), small.difference, changed, watch)


class _Watches(Watch):
    """Of several servers that are looked after already: what goes wrong is told with whichever broke."""

    def __init__(self, each: Sequence[Watch]) -> None:
        self.each = each
        self.log = each[-1].log

    def problem(self) -> StageError | None:
        return next(filter(None, (watch.problem() for watch in self.each)), None)

    def problem_behind(self) -> StageError | None:
        for watch in self.each:
            if found := watch.problem_behind():
                self.log = watch.log
                return found
        return None


def original(weights: Weights) -> Weights:
    """What these weights were made from."""
    assert weights.original or weights.plan, "new weights come with their original"
    return weights.original or Weights(weights.folder)
