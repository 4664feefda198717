"""What is served and what serves it: weights, and a server that has shown that it holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harness.engine import Watch
from harness.plan import Plan
from harness.probe import Expected, compare
from tasks import LLM

DTYPES = ("auto", "bfloat16", "float16", "float32")
# Mean difference from transformers in float32 that is allowed, in nats per token. Served in float32 it is 0.00001; in
# 16 bits up to 0.09 on the embedded model, whose router then chooses otherwise here and there, and other plans are 1.1
# and more away.
EXACT_NATS, ROUNDED_NATS = 0.001, 0.25
NOISES, MOST_NATS = 2, 1.0  # in 16 bits, so many times what rounding changes in transformers is allowed on top, at most
MAX_STOPS = 64  # stop sequences a request may carry: EvalPlus uses 11, vLLM allows 4 unless told otherwise


@dataclass(frozen=True)
class Weights:
    """What to serve: the checkpoint in ``folder``, under ``plan`` (which ``file`` holds) or, without one, as it is.

    base: the folder that the checkpoint was made from, if nothing but its experts' number and width has changed: an
    engine that was started on it can turn to the checkpoint. expected: what it must say of the probe
    (``harness/reference.py``), where that is known. original: the uncompressed model, where it is served beside them.
    runs_code: whether Python code in the folder may run.
    """

    folder: Path
    plan: Plan | None = None
    file: Path | None = None
    expected: Expected | None = None
    base: Path | None = None
    original: Weights | None = None
    runs_code: bool = False


@dataclass(frozen=True)
class Served:
    """Weights at a URL.

    how: ``checkpoint`` (a folder as it is), ``plan`` (an engine started on a plan), ``swap`` (a running engine turned
    to the plan or checkpoint), ``mask`` (a running engine whose routers are barred from dropped experts), ``external
    server``.
    weight_bytes: memory of the weights; None where it is not the plan's (mask) or not known. difference: of the probe's
    log-probabilities from the expected ones, mean in nats; None where these are not known. changed_settings: those that
    the server was started with instead of those asked for, because memory did not suffice: [asked, used] by name.
    watch: looks after the server while it is used; None where it is not ours.
    """

    llm: LLM
    how: str
    weight_bytes: int | None = None
    difference: float | None = None
    changed_settings: Mapping[str, list] = field(default_factory=dict)
    watch: Watch | None = None


def difference(llm: LLM, found: list[float], weights: Weights, dtype: str) -> float | None:
    """Of the probe's log-probabilities from the expected ones, if these are known. Raises StageError if too large."""
    if weights.expected is None:
        return None
    rounded = min(MOST_NATS, ROUNDED_NATS + NOISES * weights.expected.noise)
    allowed = EXACT_NATS if dtype == "float32" else rounded
    return compare(llm, found, weights.expected.log_probs, allowed)


def in_words(changed: Mapping[str, list]) -> str:
    """Settings that are not those asked for; nothing if there are none."""
    return "".join(f", {name} {used} instead of {asked}" for name, (asked, used) in changed.items())


def longest(folder: Path, default: int) -> int:
    """``max_position_embeddings`` of the checkpoint."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return default  # vLLM will say what is wrong with it
    return config.get("max_position_embeddings") or config.get("text_config", {}).get(
        "max_position_embeddings", default
    )
