"""A small model thinks and a large one answers, over HTTP, each from the real server's code."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web
from transformers import AutoTokenizer

from harness.errors import UserError
from harness.hf_server import Completer, Service
from harness.models import Model
from harness.phases import think_then_answer
from tasks import LLM
from tests.tiny_checkpoint import write_checkpoint

PROMPTS = ["def add(a, b):", "Once upon", "7 + 5 ="]
LENGTH = 200


def other_weights(model) -> None:
    model.lm_head.weight.copy_(model.lm_head.weight.flip(1))


@pytest.fixture(scope="module")
def completers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Completer]:
    folder = tmp_path_factory.mktemp("models")
    folders = {
        "small": write_checkpoint(folder / "small", other_weights),
        "large": write_checkpoint(folder / "large"),
    }
    return {
        name: Completer(Model(name, str(at)).load("auto"), AutoTokenizer.from_pretrained(at))
        for name, at in folders.items()
    }


@pytest.fixture(scope="module")
def served(completers: dict[str, Completer]) -> Iterator[dict[str, LLM]]:
    """Both behind their own port, in one thread."""
    loop, ports, runners = asyncio.new_event_loop(), {}, []

    async def start() -> None:
        for name, completer in completers.items():
            runner = web.AppRunner((service := Service(completer, name, LENGTH, 8)).app())
            await runner.setup()
            runners.append((runner, service))
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            ports[name] = runner.addresses[0][1]

    async def end() -> None:
        for runner, service in runners:
            service.worker.cancel()
            await runner.cleanup()

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    yield {name: LLM(f"http://127.0.0.1:{port}", name, "", LENGTH) for name, port in ports.items()}
    asyncio.run_coroutine_threadsafe(end(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def said(completer: Completer, prompt: str, tokens: int) -> str:
    """The model's own greedy words, no server between."""
    (answer,) = completer.complete([completer.tokenizer(prompt)["input_ids"]], tokens, [], False)
    return completer.text(answer.ids)


def test_the_large_model_goes_on_from_what_the_small_one_thought(
    completers: dict[str, Completer], served: dict[str, LLM]
) -> None:
    ends = {prompt: said(completers["small"], prompt, 12)[5:7] for prompt in PROMPTS}
    for prompt, end in ends.items():
        (found,) = think_then_answer(
            served["small"], served["large"], [prompt], end=end, cap=12, max_tokens=9, stop=[], timeout_s=60
        )
        thought = said(completers["small"], prompt, 12).split(end)[0]
        assert found.thought.text == thought and found.thought.finish_reason == "stop"
        assert found.answer.text == said(completers["large"], prompt + thought + end, 9)
        assert found.answer.text != said(completers["small"], prompt + thought + end, 9)


def test_a_thought_that_does_not_end_is_closed_at_the_cap(
    completers: dict[str, Completer], served: dict[str, LLM]
) -> None:
    found = think_then_answer(
        served["small"], served["large"], PROMPTS, end="</think>", cap=7, max_tokens=9, stop=[], timeout_s=60
    )
    for prompt, phases in zip(PROMPTS, found, strict=True):
        assert phases.thought.text == said(completers["small"], prompt, 7)
        assert phases.thought.finish_reason == "length"
        assert phases.answer.text == said(completers["large"], prompt + phases.thought.text + "</think>", 9)


def test_a_thought_that_the_large_model_cannot_read_is_refused(served: dict[str, LLM]) -> None:
    with pytest.raises(UserError, match="between 1 and 99"):
        think_then_answer(
            served["small"], served["large"], PROMPTS, end="</think>", cap=150, max_tokens=100, stop=[], timeout_s=60
        )
