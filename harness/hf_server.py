"""A small OpenAI-compatible server on transformers, for machines where vLLM cannot be installed.

    python -m harness.hf_server --model <folder> [--plan <plan.json>] --name <name> --port <port>

It answers ``/v1/completions`` as the harness and lm-eval ask (greedy; texts or token ids; stop sequences;
log-probabilities with echo), ``/v1/models``, ``/health`` and ``/metrics``. The plan is carried out on the model in
memory. Requests that wait together are computed together.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from harness import plan as plans
from harness.blocks import compress
from harness.models import Model
from harness.tokenizer import tokenizer_of

LOGITS_BYTES = 2**30  # of prompts that are scored together, padding included, in float32; one prompt may take more


@dataclass
class Request:
    """One prompt and what is asked about it. answered: its result, or the error that the server made of it."""

    ids: list[int]
    max_tokens: int
    stop: tuple[str, ...]
    scored: bool
    answered: asyncio.Future[dict[str, Any]]
    arrived: float = field(default_factory=time.perf_counter)


@dataclass
class Answer:
    """Generated token ids, why they end, and, of the prompt and them, log-probabilities and the likeliest tokens'."""

    ids: list[int]
    finish_reason: str
    log_probs: list[float] = field(default_factory=list)
    best: list[tuple[int, float]] = field(default_factory=list)


class _StopAt(StoppingCriteria):
    """Ends each row on its own, when its new text holds a stop sequence."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.prompt, self.stop = tokenizer, prompt, stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=input_ids.device)


class Completer:
    """A model and its tokenizer, computing batches of requests."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        ends = model.config.get_text_config().eos_token_id
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(self.ends), 0)

    @torch.no_grad()
    def complete(
        self, prompts: Sequence[list[int]], max_tokens: int, stop: Sequence[str], scored: bool
    ) -> list[Answer]:
        """Greedy continuations of the prompts, computed together."""
        if scored and max_tokens <= 1:
            return self._score(prompts, [[] for _ in prompts], max_tokens)
        made = [self._ended(ids, stop) for ids in self._generate(prompts, max_tokens, stop)]
        if not scored:
            return [Answer(*one) for one in made]
        scores = self._score(prompts, [ids for ids, _ in made], 0)
        for answer, (_, reason) in zip(scores, made, strict=True):
            answer.finish_reason = reason
        return scores

    def _generate(self, prompts: Sequence[list[int]], max_tokens: int, stop: Sequence[str]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=max_tokens, pad_token_id=self.pad, eos_token_id=sorted(self.ends) or None
        )
        generate: Any = self.model.generate
        found = generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([_StopAt(self.tokenizer, width, stop)] if stop else []),
        )
        return found[:, width:].tolist()

    def _ended(self, ids: list[int], stop: Sequence[str]) -> tuple[list[int], str]:
        """The new ids up to the end token, or through the first stop sequence, without the padding after it; and why
        they end there.
        """
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        ids = ids[:end]

        def stopped(length: int) -> bool:
            text = self.text(ids[:length])
            return any(sequence in text for sequence in stop)

        if stopped(len(ids)):
            return ids[: bisect_left(range(len(ids)), True, key=stopped)], "stop"
        return ids, "length" if end is None else "stop"

    def _score(self, prompts: Sequence[list[int]], made: Sequence[list[int]], more: int) -> list[Answer]:
        """Log-probabilities of every token but the first, and ``more`` (0 or 1) tokens after the last."""
        answers: list[Answer] = []
        whole = [prompt + new for prompt, new in zip(prompts, made, strict=True)]
        logits_bytes = 4 * self.model.config.get_text_config().vocab_size * max(map(len, whole))
        at_once = max(1, LOGITS_BYTES // logits_bytes)
        for start in range(0, len(whole), at_once):
            part = whole[start : start + at_once]
            width = max(map(len, part))
            ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in part])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
            device = self.model.device
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            answers += [
                self._scores(found[: len(row)].float().log_softmax(-1).cpu(), row, new, more)
                for found, row, new in zip(logits, part, made[start : start + at_once], strict=True)
            ]
        return answers

    def _scores(self, log_probs: torch.Tensor, row: list[int], made: list[int], more: int) -> Answer:
        values, likeliest = log_probs.max(-1)
        new = [*made, *likeliest[-1:].tolist()[:more]]
        given = torch.tensor([*row, *new[len(made) :]])[1:]
        chosen = log_probs[: len(given)].gather(1, given[:, None])[:, 0].tolist()
        best = list(zip(likeliest[: len(given)].tolist(), values[: len(given)].tolist(), strict=True))
        return Answer(new, "length", chosen, best)

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


class Service:
    """The HTTP side: requests wait here until the model is free, then those that fit together are computed."""

    def __init__(self, completer: Completer, name: str, max_model_len: int, batch: int) -> None:
        self.completer, self.name, self.max_model_len, self.batch = completer, name, max_model_len, batch
        self.waiting: list[Request] = []
        self.came = asyncio.Event()
        self.counts = dict.fromkeys(("prompt_tokens_total", "generation_tokens_total"), 0.0)
        self.counts |= dict.fromkeys(("time_to_first_token_seconds_count", "time_to_first_token_seconds_sum"), 0.0)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**28)
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/metrics", self.metrics),
                web.get("/v1/models", self.models),
                web.post("/v1/completions", self.completions),
            ]
        )
        app.on_startup.append(self._start)
        return app

    async def _start(self, app: web.Application) -> None:
        self.worker = asyncio.create_task(self._work())

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(text="".join(f"hf:{name} {value}\n" for name, value in self.counts.items()))

    async def models(self, request: web.Request) -> web.Response:
        card = {"id": self.name, "object": "model", "max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [card]})

    async def completions(self, request: web.Request) -> web.Response:
        asked = await request.json()
        prompts = _prompts(asked.get("prompt"), self.completer.tokenizer)
        max_tokens = int(asked.get("max_tokens", 16))
        if problem := self._problem(asked, prompts, max_tokens):
            return web.json_response({"error": {"message": problem, "code": 400}}, status=400)
        stop = asked.get("stop") or []
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        scored = bool(asked.get("echo")) and asked.get("logprobs") is not None
        loop = asyncio.get_running_loop()
        requests = [Request(ids, max_tokens, stop, scored, loop.create_future()) for ids in prompts]
        self.waiting += requests
        self.came.set()
        choices = [await one.answered for one in requests]
        usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": sum(c.pop("made") for c in choices)}
        return web.json_response(
            {
                "object": "text_completion",
                "model": self.name,
                "choices": [{**choice, "index": index} for index, choice in enumerate(choices)],
                "usage": usage,
            }
        )

    def _problem(self, asked: dict[str, Any], prompts: list[list[int]], max_tokens: int) -> str | None:
        if asked.get("model") != self.name:
            return f"There is no model {asked.get('model')!r} here, only {self.name!r}."
        if asked.get("temperature", 1.0) != 0:
            return "Only temperature=0 is offered."
        if not prompts or not all(prompts):
            return "prompt must hold at least one token."
        longest = max(map(len, prompts))
        if longest + max_tokens > self.max_model_len:
            return f"{longest} tokens of prompt and {max_tokens} of answer are more than {self.max_model_len}."
        return None

    async def _work(self) -> None:
        while True:
            await self.came.wait()
            together = self._take()
            try:
                answers = await asyncio.to_thread(self._compute, together)
                now = time.perf_counter()
                for one, answer in zip(together, answers, strict=True):
                    one.answered.set_result(self._choice(one, answer))
                    self._count(one, answer, now)
            except Exception as problem:  # the server stays up; who asked is told
                words = f"{type(problem).__name__}: {problem}"
                for one in together:
                    if not one.answered.done():
                        one.answered.set_exception(web.HTTPInternalServerError(text=words))

    def _take(self) -> list[Request]:
        """The first that waits, and those after it that can be computed with it."""
        first = self.waiting[0]
        kind = (first.max_tokens, first.stop, first.scored)
        alike = [one for one in self.waiting if (one.max_tokens, one.stop, one.scored) == kind][: self.batch]
        chosen = set(map(id, alike))
        self.waiting = [one for one in self.waiting if id(one) not in chosen]
        if not self.waiting:
            self.came.clear()
        return alike

    def _compute(self, together: list[Request]) -> list[Answer]:
        first = together[0]
        return self.completer.complete([one.ids for one in together], first.max_tokens, first.stop, first.scored)

    def _choice(self, one: Request, answer: Answer) -> dict[str, Any]:
        text = self.completer.text(answer.ids)
        ends = [end for end in map(text.find, one.stop) if end >= 0]
        text = text[: min(ends)] if ends else text
        choice: dict[str, Any] = {"text": text, "finish_reason": answer.finish_reason, "logprobs": None}
        if one.scored:
            tokens = self.completer.tokenizer.convert_ids_to_tokens([*one.ids, *answer.ids])
            best = [{self.completer.tokenizer.convert_ids_to_tokens(t): value} for t, value in answer.best]
            choice["text"] = self.completer.text(one.ids) + text
            choice["logprobs"] = {
                "tokens": tokens,
                "token_logprobs": [None, *answer.log_probs],
                "top_logprobs": [None, *best],
            }
        return {**choice, "made": len(answer.ids)}

    def _count(self, one: Request, answer: Answer, now: float) -> None:
        """A batch answers all at once, so its first tokens come with its last."""
        self.counts["prompt_tokens_total"] += len(one.ids)
        self.counts["generation_tokens_total"] += len(answer.ids)
        self.counts["time_to_first_token_seconds_count"] += 1
        self.counts["time_to_first_token_seconds_sum"] += now - one.arrived


def _prompts(given: Any, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of a text, texts, token ids, or several of these."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list) and given and all(isinstance(part, int) for part in given):
        given = [given]
    return [tokenizer(part)["input_ids"] if isinstance(part, str) else list(part) for part in given or []]


def load(folder: Path, plan: Path | None, dtype: str, runs_code: bool) -> PreTrainedModel:
    """The model under the plan, in memory."""
    model = Model("served", str(folder), trust_remote_code=runs_code).load("auto")
    if plan is not None:
        compress(model, plans.from_json(plan.read_text()).layers)
    if dtype != "auto":
        nn.Module.to(model, getattr(torch, dtype))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--name", required=True)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int, help="of 127.0.0.1")
    where.add_argument("--fd", type=int, help="of a socket that is bound already, inherited")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--trust-remote-code", action="store_true")
    asked = parser.parse_args()
    model = load(asked.model, asked.plan, asked.dtype, asked.trust_remote_code)
    weights = sum(tensor.nbytes for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    print(f"weights: {weights} bytes", flush=True)
    completer = Completer(model, tokenizer_of(asked.model, asked.trust_remote_code))
    service = Service(completer, asked.name, asked.max_model_len, asked.batch)
    listening = (
        socket.socket(fileno=asked.fd) if asked.fd is not None else socket.create_server(("127.0.0.1", asked.port))
    )
    web.run_app(service.app(), sock=listening, print=None, access_log=None)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
