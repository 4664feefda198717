"""First requests to a server: whether it answers, knows the model, and computes what it should."""

from __future__ import annotations

import math

import httpx

from harness.errors import StageError
from tasks import LLM

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


def probe(llm: LLM) -> int:
    """Score and continue a short text; returns its length in the server's tokens.

    Raises StageError unless every log-probability is finite.

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
    logprobs = response.json()["choices"][0].get("logprobs") or {}
    values = logprobs.get("token_logprobs") or []
    if len(values) < 2:
        raise StageError(f"The server at {llm.url} gives no log-probabilities of the prompt (logprobs, echo).")
    if not all(value is not None and math.isfinite(value) for value in values[1:]):
        raise StageError(f"{llm.model} gives log-probabilities that are not finite (NaN or infinite weights?).")
    return int(response.json()["usage"]["prompt_tokens"])


def check_tokenizer(llm: LLM, prompt_tokens: int) -> None:
    """Raise StageError if the server splits the probe into another number of tokens than our tokenizer does."""
    from transformers import AutoTokenizer

    ours = len(AutoTokenizer.from_pretrained(llm.tokenizer)(PROBE)["input_ids"])
    if ours != prompt_tokens:
        raise StageError(
            f"{llm.model} at {llm.url} has another tokenizer than {llm.tokenizer}: a text of {ours} tokens has "
            f"{prompt_tokens} there. Name the model it serves (model.path, model.name) or serve.tokenizer."
        )
