"""How fast a server answered: its own counters, read before and after a task (Prometheus text at ``/metrics``)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import httpx

COUNTERS = {
    "prompt_tokens": "prompt_tokens_total",
    "generated_tokens": "generation_tokens_total",
    "first_tokens": "time_to_first_token_seconds_count",
    "first_token_seconds": "time_to_first_token_seconds_sum",
}


def metrics(url: str) -> str:
    """What the server says it has counted so far; nothing if it does not answer."""
    try:
        return httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text
    except httpx.HTTPError:
        return ""


def counters(text: str) -> dict[str, float] | None:
    """`COUNTERS` in a server's metrics; None if they are not all there (no vLLM, or a proxy before it)."""
    found = {name: _total(text, metric) for name, metric in COUNTERS.items()}
    known = {name: value for name, value in found.items() if value is not None}
    return known if len(known) == len(COUNTERS) else None


def _total(text: str, metric: str) -> float | None:
    """The sum over all engines behind the server."""
    values = re.findall(rf"^\w+:{re.escape(metric)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, values)) if values else None


def between(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None, seconds: float
) -> dict[str, float] | None:
    """Tokens of prompts and answers, of both per second, and the mean time to a first token in seconds.

    seconds: wall time in which the requests between the two readings were answered, as many at once as fill the batch;
    so the time to first token includes waiting for a place in it.
    """
    if before is None or after is None or seconds <= 0:
        return None
    grown = {name: after[name] - before[name] for name in COUNTERS}
    return {
        "prompt_tokens": grown["prompt_tokens"],
        "generated_tokens": grown["generated_tokens"],
        "seconds": seconds,
        "tokens_per_s": (grown["prompt_tokens"] + grown["generated_tokens"]) / seconds,
        "first_token_s": grown["first_token_seconds"] / max(1.0, grown["first_tokens"]),
    }
