"""A thinking budget with two models: a small one thinks, a large one answers.

Source: elastic budget control of Star Elastic, arXiv 2605.07182.

The thought is most of what is generated, so the small model does most of the work. The large model reads prompt and
thought as a prefix and computes its own cache of them: the paper finds caches of nested models nearly interchangeable,
but no serving framework hands them over.
"""

from __future__ import annotations

import re

from tasks import LLM

COUNTS = ("thoughts", "thought_tokens", "thoughts_cut")  # how many, their tokens, and how many the cap cut


def most_thought(large: LLM, max_tokens: int) -> int:
    """Tokens of the longest thought that leaves the large model a token of prompt and an answer of ``max_tokens``."""
    return large.max_model_len - max_tokens - 1


def counts(text: str) -> dict[str, int]:
    """`COUNTS` in the metrics of a server of both phases (``harness/phases_server.py``); empty for any other."""
    return {name: int(value) for name, value in re.findall(r"^phases:(\w+)_total (\d+)$", text, re.MULTILINE)}
