"""A thought and an answer asked one after the other: what a server of both phases must give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks import LLM
from tasks.completions import Completion, complete


@dataclass(frozen=True)
class Phases:
    """thought: of the small model, up to the end of thinking. answer: of the large one, after it."""

    thought: Completion
    answer: Completion


def think_then_answer(
    small: LLM, large: LLM, prompts: Sequence[str], *, end: str, cap: int, max_tokens: int, stop: Sequence[str]
) -> list[Phases]:
    """Greedy completions in the order of ``prompts``: all thoughts, of at most ``cap`` tokens, then all answers."""
    thoughts = complete(small, prompts, max_tokens=cap, stop=[end], timeout_s=120)
    read = [prompt + thought.text + end for prompt, thought in zip(prompts, thoughts, strict=True)]
    answers = complete(large, read, max_tokens=max_tokens, stop=stop, timeout_s=120)
    return [Phases(thought, answer) for thought, answer in zip(thoughts, answers, strict=True)]
