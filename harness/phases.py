"""A thinking budget with two models: a small one thinks, a large one answers.

Source: elastic budget control of Star Elastic, arXiv 2605.07182.

The thought is most of what is generated, so the small model does most of the work. The large model reads prompt and
thought as a prefix and computes its own cache of them: the paper finds caches of nested models nearly interchangeable,
but no serving framework hands them over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import UserError
from tasks import LLM
from tasks.completions import Completion, complete

COUNTS = ("thoughts", "thought_tokens", "thoughts_cut")  # how many, their tokens, and how many the cap cut


@dataclass(frozen=True)
class Phases:
    """thought: what the small model said up to the end of thinking, which is not in its text; its finish_reason is
    ``length`` where the cap cut it. answer: what the large model said after it.
    """

    thought: Completion
    answer: Completion


def think_then_answer(
    small: LLM,
    large: LLM,
    prompts: Sequence[str],
    *,
    end: str,
    cap: int,
    max_tokens: int,
    stop: Sequence[str],
    timeout_s: float,
) -> list[Phases]:
    """Greedy completions in the order of ``prompts``, in two phases: all thoughts, then all answers.

    end: what closes a thought, ``</think>`` for most models that think. A thought that reaches ``cap`` tokens is closed
    where it is. max_tokens, stop: of the answer. Raises StageError as `tasks.completions.complete` does, UserError for
    a cap that leaves no thought or a large model that cannot read it.
    """
    most = most_thought(large, max_tokens)
    if not 1 <= cap <= most:
        raise UserError(
            f"A thought of at most {cap} tokens and an answer of {max_tokens} do not go together: give a cap between 1 "
            f"and {most}, so that {large.model} can read the thought."
        )
    thoughts = complete(small, prompts, max_tokens=cap, stop=[end], timeout_s=timeout_s)
    read = [prompt + thought.text + end for prompt, thought in zip(prompts, thoughts, strict=True)]
    answers = complete(large, read, max_tokens=max_tokens, stop=stop, timeout_s=timeout_s)
    return [Phases(thought, answer) for thought, answer in zip(thoughts, answers, strict=True)]


def most_thought(large: LLM, max_tokens: int) -> int:
    """Tokens of the longest thought that leaves the large model a token of prompt and an answer of ``max_tokens``."""
    return large.max_model_len - max_tokens - 1


def counts(text: str) -> dict[str, int]:
    """`COUNTS` in the metrics of a server of both phases (``harness/phases_server.py``); empty for any other."""
    return {name: int(value) for name, value in re.findall(r"^phases:(\w+)_total (\d+)$", text, re.MULTILINE)}
