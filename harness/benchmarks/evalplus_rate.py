"""Problems per minute of our generation and of EvalPlus's own ``openai`` backend, against one server: one run.

python -m harness.benchmarks.evalplus_rate [overrides, such as serve.dtype=float32]

EvalPlus asks for one chat completion after the other. The embedded model has no chat template, so the server gets one
that joins the messages; we send the text that it makes of EvalPlus's messages, all at once. Greedy outputs are
compared.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from evalplus.gen.util import openai_request
from evalplus.provider.openai import OpenAIChatDecoder

from harness.provenance import provenance
from harness.serve import VLLM
from harness.served import Weights
from harness.sweep import expand
from tasks.completions import complete
from tasks.evalplus_code import EvalPlus

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
PREFIX = "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
MAX_TOKENS = 160
TIMES = 10  # what is asked of us


def timed(make: Callable[[], list[str]]) -> tuple[list[str], float]:
    start = time.perf_counter()
    outputs = make()
    return outputs, time.perf_counter() - start


def main() -> int:
    cell = expand(["method=none", "serve=plan", *sys.argv[1:]]).cells[0]
    assert isinstance(cell.serve, VLLM)
    vllm = replace(cell.serve, extra_args=("--chat-template", TEMPLATE))
    task = next(task for task in cell.tasks if isinstance(task, EvalPlus))
    prompts = [problem["prompt"] for problem in task._problems()]
    weights = Weights(cell.model.folder)
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
        vllm.serve(weights, "tiny", Path(folder) / "log") as served,
    ):
        url = f"{served.llm.url}/v1"
        decoder = OpenAIChatDecoder(
            "tiny", base_url=url, temperature=0.0, max_new_tokens=MAX_TOKENS, instruction_prefix=PREFIX
        )
        asked = _messages(decoder, prompts)
        one = decoder.codegen(prompts[0], do_sample=False, num_samples=1)  # both have met the server before
        theirs, seconds = timed(lambda: [decoder.codegen(p, do_sample=False, num_samples=1)[0] for p in prompts])
        ours, our_seconds = timed(
            lambda: [c.text for c in complete(served.llm, asked, max_tokens=MAX_TOKENS, stop=[], timeout_s=600)]
        )
    assert one[0] == theirs[0]
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    rates = [60 * len(prompts) / value for value in (seconds, our_seconds)]
    print(f"EvalPlus {rates[0]:.0f} problems per minute, ours {rates[1]:.0f}: {rates[1] / rates[0]:.1f} times as many")
    print(f"{same} of {len(prompts)} greedy outputs are the same ({MAX_TOKENS} tokens at most)")
    print(json.dumps(provenance()))
    return 0 if same == len(prompts) and rates[1] >= TIMES * rates[0] else 1


def _messages(decoder: OpenAIChatDecoder, prompts: list[str]) -> list[str]:
    """The text that the server's template makes of what EvalPlus sends for each prompt, noted instead of sent."""
    noted: list[list[dict[str, str]]] = []
    create = SimpleNamespace(create=lambda **request: noted.append(request["messages"]))
    client = SimpleNamespace(chat=SimpleNamespace(completions=create))
    for prompt in prompts:
        message = f"{decoder.instruction_prefix}\n```python\n{prompt.strip()}\n```"
        openai_request.make_request(client, message=message, model="tiny")
    return ["".join(f"{message['content']}\n" for message in messages) for messages in noted]


if __name__ == "__main__":
    sys.exit(main())
