"""First requests to a server: whether it answers, knows the model, and computes what it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import numpy as np

from harness.errors import StageError
from harness.tokenizer import tokenizer_of
from tasks import LLM, is_log_prob

# Enough text to send tokens through most experts.
PROBE = (
    "The quick brown fox jumps over 13 lazy dogs.\n\ndef add(a, b):\n    return a + b\n\n"
    "Question: What is 17 + 25?\nAnswer: 17 + 25 = 42. Zürich, 東京, and the sum of x_i^2 over all i < n."
)


def served_length(url: str, model: str) -> int:
    """Longest sequence the server takes. Raises StageError if it does not answer or does not know the model."""
    try:
        response = httpx.get(f"{url}/v1/models", timeout=30, trust_env=False)
        response.raise_for_status()
        cards = {card["id"]: card for card in response.json()["data"]}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise StageError(f"no OpenAI-compatible server answers at {url} ({error!r}).") from error
    if model not in cards:
        raise StageError(f"the server at {url} does not know {model!r}; it serves {', '.join(cards) or 'nothing'}.")
    return int(cards[model].get("max_model_len") or 2048)


def probe(llm: LLM) -> list[float]:
    """Score and continue a short text; returns the log-probability of each of its tokens but the first, in nats.

    Raises StageError unless all are finite.

    A model whose logits are NaN otherwise looks fine: it generates, and lm-eval gives it perfect accuracies.
    """
    request = {"model": llm.model, "prompt": PROBE, "max_tokens": 8, "temperature": 0, "logprobs": 1, "echo": True}
    try:
        response = httpx.post(f"{llm.url}/v1/completions", json=request, timeout=300, trust_env=False)
    except httpx.HTTPError as error:
        raise StageError(f"The server at {llm.url} did not answer a first request: {error!r}.") from error
    if "Out of range float values" in response.text:
        raise StageError(f"{llm.model} gives log-probabilities that are not finite (NaN or infinite weights?).")
    if response.status_code != 200:
        raise StageError(f"The server at {llm.url} refused a first request: {response.text[:500]}")
    try:
        answer = response.json()
        values = (answer["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
        prompt = int(answer["usage"]["prompt_tokens"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise StageError(f"The server at {llm.url} answered a first request with {response.text[:200]!r}.") from error
    if len(values) < max(2, prompt):
        raise StageError(f"The server at {llm.url} gives no log-probabilities of the prompt (logprobs, echo).")
    if not all(map(is_log_prob, values[1:])):
        raise StageError(f"{llm.model} gives log-probabilities that are not finite (NaN or infinite weights?).")
    return values[1:prompt]


@dataclass(frozen=True)
class Expected:
    """What a served model must say of the probe.

    log_probs: of each token but the first, in nats, computed in float32. noise: mean difference from these of the same
    computed in the type of the stored weights; a damaged model, near to two minds everywhere, has much.
    """

    log_probs: tuple[float, ...]
    noise: float


def compare(llm: LLM, found: Sequence[float], expected: Sequence[float], tolerance: float) -> float:
    """Mean difference from the log-probabilities that transformers gives the same text, in nats per token.

    Raises StageError if it is larger than ``tolerance``, or the server splits the text otherwise.
    """
    check_tokenizer(llm, len(expected) + 1, len(found) + 1)
    difference = float(np.abs(np.subtract(found, expected)).mean())
    if difference > tolerance:
        raise StageError(
            f"{llm.model} is not the model it should be: its log-probabilities of a known text are {difference:.4f} "
            f"nats per token from those of transformers, and {tolerance} are allowed. Either this build of the server "
            "computes the architecture otherwise, or other weights are served."
        )
    return difference


def probe_tokens(tokenizer: str, runs_code: bool = False) -> list[int]:
    """The probe in the tokens of this folder's (or hub repository's) tokenizer (`harness.tokenizer`)."""
    return list(tokenizer_of(tokenizer, runs_code)(PROBE)["input_ids"])


def check_tokenizer(llm: LLM, ours: int, theirs: int) -> None:
    """Raise StageError if the server splits the probe into another number of tokens than our tokenizer does."""
    if ours != theirs:
        raise StageError(
            f"{llm.model} at {llm.url} has another tokenizer than {llm.tokenizer}: a text of {ours} tokens has "
            f"{theirs} there. Name the model it serves (model.path, model.name) or serve.tokenizer."
        )
