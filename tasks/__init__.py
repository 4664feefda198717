"""Benchmarks: each task turns a language model at a URL into scores.

A task is a frozen dataclass named by ``_target_`` in ``conf/suite/*.yaml``. It sees a URL and nothing else of the
model: the same task runs on our own vLLM, on a cluster's, or on any OpenAI-compatible server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class LLM:
    """A served language model.

    url: base address without ``/v1``, e.g. ``http://127.0.0.1:8123``.
    model: the name the server knows it by.
    tokenizer: folder (or hub name) of its tokenizer, for tasks that count tokens.
    max_model_len: prompt plus completion, in tokens.
    max_stops: stop sequences that a request may carry.
    concurrency: sequences it computes together: with as many in flight, no place in its batch is empty.
    runs_code: whether Python code that comes with the tokenizer may run.
    """

    url: str
    model: str
    tokenizer: str
    max_model_len: int
    max_stops: int = 4  # OpenAI's own API allows 4
    concurrency: int = 32
    runs_code: bool = False


# What vLLM writes for a log-probability of minus infinity (or less than this), so that JSON can carry it.
FLOOR = -9999.0


def is_log_prob(value: object) -> bool:
    """Whether a server's answer is a log-probability at all: a finite number, and not the floor that stands for minus
    infinity, which a model with infinite logits gives everything but one token, so that all choices seem equal.
    """
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value) and value > FLOOR


@dataclass(frozen=True)
class Metric:
    """A mean over ``n`` items in [0, 1] (or the metric's own unit) with its standard error."""

    value: float
    stderr: float
    n: int
    higher_is_better: bool = True


@dataclass(frozen=True)
class Score:
    """What one task found: its metrics, one row per item (JSON values only) and counts of degenerate outputs.

    answering_s: wall time from the first request to the last answer, in seconds. whole: items that the benchmark has;
    more than were scored if ``limit`` took the first ones only; 0 where that is not known.
    """

    metrics: Mapping[str, Metric]
    samples: Sequence[Mapping[str, Any]]
    counts: Mapping[str, int] = field(default_factory=dict)
    answering_s: float = 0.0
    whole: int = 0


@dataclass(frozen=True)
class Item:
    """One problem and what a model made of it, for comparing models problem by problem.

    id: unique in its benchmark. prompt, answer, expected: texts; expected is None where no single answer is right.
    values: what the answer is worth, by the metric's name in `Score.metrics`.
    """

    id: str
    prompt: str
    answer: str
    expected: str | None
    values: Mapping[str, float]


class Task(Protocol):
    """A benchmark. ``identity`` is everything that determines its numbers except the model; it is hashed into keys."""

    name: str

    @property
    def kind(self) -> str:
        """What the model is asked for: ``code``, ``generation`` (of text) or ``multiple choice``."""

    def check(self) -> None:
        """Raise UserError, before any work, if the task cannot run on this machine (a file is missing, ...)."""

    def identity(self) -> Mapping[str, Any]:
        """JSON values: tool version, digest of the task file and of the data, generation settings, limit."""

    def score(self, llm: LLM, workdir: Path) -> Score:
        """Score the model. Raises StageError for any failed, partial or non-finite result, never a smaller n."""

    def items(self, samples: Sequence[Mapping[str, Any]]) -> list[Item]:
        """The problems behind a score, from the rows of `Score.samples`, in their order."""
