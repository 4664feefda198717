"""Many greedy completions from an OpenAI-compatible server at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
from tqdm import tqdm

from harness.errors import StageError
from tasks import LLM

ATTEMPTS = 3
LOOP_TIMES, LOOP_CHARACTERS = 4, 40  # an end that is one piece this many times over, and at least so long


@dataclass(frozen=True)
class Completion:
    """finish_reason: ``stop`` (a stop sequence or the end token) or ``length`` (cut at ``max_tokens``)."""

    text: str
    finish_reason: str


def complete(
    llm: LLM, prompts: Sequence[str], *, max_tokens: int, stop: Sequence[str], timeout_s: float
) -> list[Completion]:
    """Greedy completions in the order of ``prompts``, without the stop sequence that ended them.

    A broken connection is tried again, ``ATTEMPTS`` times in all. Raises StageError for an HTTP error, with the
    server's words, for a time-out, for an answer that is none, and if the server is gone.
    """
    request = {"model": llm.model, "max_tokens": max_tokens, "temperature": 0, "seed": 0}
    request["stop"] = list(stop) if len(stop) <= llm.max_stops else _likeliest(stop, llm.max_stops)
    try:
        found = asyncio.run(_all(f"{llm.url}/v1/completions", request, prompts, llm.concurrency, timeout_s))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [_cut(completion, stop) for completion in found]


def degenerate(completions: Sequence[Completion]) -> dict[str, int]:
    """How many are empty, were cut at their limit, and end in a loop."""
    capped = sum(completion.finish_reason == "length" for completion in completions)
    return degenerate_texts([completion.text for completion in completions], capped)


def degenerate_texts(texts: Sequence[str], capped: int) -> dict[str, int]:
    """The same of bare texts, of which ``capped`` were cut at their limit: what every task that generates counts."""
    return {
        "empty": sum(not text.strip() for text in texts),
        "length_capped": capped,
        "looping": sum(map(is_looping, texts)),
    }


def is_looping(text: str) -> bool:
    """Whether the text ends in one piece again and again: at least ``LOOP_TIMES`` times, in ``LOOP_CHARACTERS`` or
    more. The piece may be of any length, and the last one may be cut, since every end of a loop is one.
    """
    for size in range(1, len(text) // LOOP_TIMES + 1):
        times = max(LOOP_TIMES, -(-LOOP_CHARACTERS // size))
        if len(text) >= size * times and text.endswith(text[-size:] * times):
            return True
    return False


def _likeliest(stop: Sequence[str], count: int) -> list[str]:
    """Short beginnings of a line end most completions; the other sequences are found in the text afterwards."""
    return sorted(stop, key=lambda text: (not text.startswith("\n"), len(text)))[:count]


def _cut(completion: Completion, stop: Sequence[str]) -> Completion:
    """What the server would have returned, had it known every stop sequence."""
    ends = [end for end in map(completion.text.find, stop) if end >= 0]
    return Completion(completion.text[: min(ends)], "stop") if ends else completion


async def _all(url: str, request: dict, prompts: Sequence[str], concurrency: int, timeout_s: float) -> list[Completion]:
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    timeout = httpx.Timeout(timeout_s, pool=None)
    gate = asyncio.Semaphore(concurrency)
    with tqdm(total=len(prompts), desc="generate", leave=False) as progress:
        async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as client:

            async def one(prompt: str) -> Completion:
                async with gate:
                    done = await _one(client, url, {**request, "prompt": prompt})
                progress.update()
                return done

            async with asyncio.TaskGroup() as group:
                jobs = [group.create_task(one(prompt)) for prompt in prompts]
    return [job.result() for job in jobs]


async def _one(client: httpx.AsyncClient, url: str, request: dict) -> Completion:
    for attempt in range(ATTEMPTS):
        try:
            response = await client.post(url, json=request)
            break
        except httpx.TimeoutException as error:
            raise StageError(f"The server at {url} did not answer a request in time ({error!r}).") from error
        except httpx.TransportError as error:
            if attempt == ATTEMPTS - 1:
                raise StageError(f"The server at {url} is gone ({error!r}, {ATTEMPTS} attempts).") from error
            await asyncio.sleep(2**attempt)
    if response.status_code != 200:
        raise StageError(f"The server at {url} refused a request ({response.status_code}): {response.text[:500]}")
    return _completion(url, response)


def _completion(url: str, response: httpx.Response) -> Completion:
    """The one completion in an answer. Raises StageError if there is none: it must not be taken for an empty one."""
    try:
        (choice,) = response.json()["choices"]
        text, reason = choice["text"], choice["finish_reason"]
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"The server at {url} answered without a completion: {response.text[:200]!r}.") from error
    if not isinstance(text, str):
        raise StageError(f"The server at {url} answered with the text {text!r}.")
    if reason not in ("stop", "length"):
        raise StageError(f"The server at {url} broke a completion off: finish_reason {reason!r}.")
    return Completion(text, reason)
