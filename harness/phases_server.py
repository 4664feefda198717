"""A small model thinks and a large one answers, behind one address: tasks see one OpenAI server.

``/v1/completions`` runs both phases of ``harness/phases.py``, prompt by prompt, as many at once as are asked for. What
asks for likelihoods (echo, logprobs, prompt_logprobs) goes to the large model as it came, and so do ``/v1/models``,
``/health`` and ``/tokenize``. ``/metrics`` are those of both servers, and three counters of thoughts.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import web

from harness.phases import COUNTS, most_thought
from tasks import LLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[int]
OPENAI_MAX_TOKENS = 16  # of an answer where a request does not say


class RefusedError(Exception):
    """A request that gets no answer: the HTTP status, and why."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class PhasesServer:
    """The HTTP side of both phases. end: what closes a thought. cap: its most tokens. tokenizer: the models'."""

    def __init__(self, small: LLM, large: LLM, end: str, cap: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.small, self.large, self.end, self.cap, self.tokenizer = small, large, end, cap, tokenizer
        self.closing = _ids(tokenizer, end)
        self.counts = dict.fromkeys(COUNTS, 0)

    @property
    def max_model_len(self) -> int:
        """Longest prompt and answer, in tokens, that leave room for the longest thought."""
        return self.large.max_model_len - self.cap - len(self.closing)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**28, middlewares=[_with_reasons])
        app.add_routes(
            [
                web.post("/v1/completions", self.completions),
                web.get("/metrics", self.metrics),
                *(web.get(path, self.passed_on) for path in ("/v1/models", "/health")),
                web.post("/tokenize", self.passed_on),
            ]
        )
        app.cleanup_ctx.append(self._client)
        return app

    async def _client(self, app: web.Application) -> AsyncIterator[None]:
        # No limits: the engines queue what they cannot compute yet, and who asks sets the time-out. A connection for
        # each request: one that was kept could be closed by the server just as it is used again.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self.session:
            yield

    async def completions(self, request: web.Request) -> web.Response:
        try:
            asked = json.loads(await request.read())
            prompts = _listed(asked.get("prompt"))
        except (ValueError, AttributeError) as error:
            raise RefusedError(400, f"The request is no JSON object ({error}).") from error
        if asked.get("echo") or any(asked.get(name) is not None for name in ("logprobs", "prompt_logprobs")):
            return await self.passed_on(request)
        self._check(asked, prompts)
        try:
            async with asyncio.TaskGroup() as group:
                jobs = [group.create_task(self._phases(prompt, asked)) for prompt in prompts]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return web.json_response(_together([job.result() for job in jobs]))

    def _check(self, asked: dict[str, Any], prompts: Sequence[Prompt]) -> None:
        """Raise RefusedError for what both phases cannot do, or a thought that the large model cannot read."""
        if asked.get("stream") or asked.get("n", 1) != 1:
            raise RefusedError(400, "Neither streams nor several answers to a prompt (n) are offered in two phases.")
        if not prompts:
            raise RefusedError(400, "prompt must hold a text, or token ids, or several of these.")
        most = most_thought(self.large, int(asked.get("max_tokens") or OPENAI_MAX_TOKENS))
        if self.cap > most:
            raise RefusedError(
                400, f"After a thought of {self.cap} tokens this answer has no room: give a cap up to {most}."
            )

    async def _phases(self, prompt: Prompt, asked: dict[str, Any]) -> dict[str, Any]:
        """The large model's reply after the small one's thought."""
        think = {"model": self.small.model, "prompt": prompt, "max_tokens": self.cap, "stop": [self.end]}
        reply = await self._reply("thinks", self.small, {**asked, **think})
        thought = reply["choices"][0]
        if thought["finish_reason"] not in ("stop", "length"):
            raise RefusedError(500, f"The model that thinks broke off: finish_reason {thought['finish_reason']!r}.")
        self.counts["thoughts"] += 1
        self.counts["thought_tokens"] += reply["usage"]["completion_tokens"]
        self.counts["thoughts_cut"] += thought["finish_reason"] == "length"
        return await self._reply("answers", self.large, {**asked, "prompt": self._read(prompt, thought["text"])})

    def _read(self, prompt: Prompt, thought: str) -> list[int]:
        """What the large model reads, in tokens: the whole text's, as its server would split it.

        Token ids stay as they are where the text would be split otherwise. What a damaged model says may take more
        tokens to read than to say (bytes that are no text): the cap then cuts it once more, and the answer has room.
        """
        if isinstance(prompt, str):
            given = list(self.tokenizer(prompt)["input_ids"])
            whole = list(self.tokenizer(prompt + thought + self.end)["input_ids"])
            goes_on = True
        else:
            given, text = prompt, str(self.tokenizer.decode(prompt, clean_up_tokenization_spaces=False))
            whole = _ids(self.tokenizer, text + thought + self.end)
            goes_on = whole[: len(given)] == given
        if goes_on and len(whole) <= len(given) + self.cap + len(self.closing):
            return whole
        return [*given, *_ids(self.tokenizer, thought)[: self.cap], *self.closing]

    async def _reply(self, does: str, server: LLM, request: dict[str, Any]) -> dict[str, Any]:
        status, body, _ = await self._ask(does, server, "POST", "/v1/completions", json.dumps(request).encode())
        if status != 200:
            raise RefusedError(
                status, f"The model that {does} refused ({status}): {body.decode(errors='replace')[:500]}"
            )
        return dict(json.loads(body))

    async def _ask(
        self, does: str, server: LLM, method: str, path: str, body: bytes | None = None
    ) -> tuple[int, bytes, str]:
        """Status, body and content type of an answer. Raises RefusedError if the server is gone."""
        headers = {"Content-Type": "application/json"}
        try:
            async with self.session.request(method, server.url + path, data=body, headers=headers) as response:
                return response.status, await response.read(), response.headers.get("Content-Type", "")
        except aiohttp.ClientError as error:
            raise RefusedError(500, f"The server of the model that {does} is gone ({error!r}).") from error

    async def passed_on(self, request: web.Request) -> web.Response:
        """The large model's own answer to the request as it came."""
        status, body, kind = await self._ask(
            "answers", self.large, request.method, request.path, await request.read() or None
        )
        return web.Response(status=status, body=body, headers={"Content-Type": kind} if kind else {})

    async def metrics(self, request: web.Request) -> web.Response:
        """Of both servers, so that sums over all engines count both phases, and the thoughts so far."""
        servers = {self.large.url: ("answers", self.large), self.small.url: ("thinks", self.small)}
        found = [await self._ask(does, server, "GET", "/metrics") for does, server in servers.values()]
        own = "".join(f"phases:{name}_total {value}\n" for name, value in self.counts.items())
        return web.Response(text="\n".join([*(body.decode() for _, body, _ in found), own]))


@web.middleware
async def _with_reasons(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Say why a request is refused in OpenAI's form, and in the status line, which is all that some clients report."""
    try:
        return await handler(request)
    except RefusedError as refused:
        error = {"message": str(refused), "code": refused.status}
        reason = " ".join(str(refused).split())[:300]
        return web.json_response({"error": error}, status=refused.status, reason=reason)


def _listed(given: Any) -> list[Prompt]:
    """The prompts of a request: one text or the token ids of one, or several of these."""
    if isinstance(given, str) or (isinstance(given, list) and given and all(isinstance(part, int) for part in given)):
        return [given]
    return list(given or [])


def _together(replies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The replies to one prompt each as the reply to all."""
    choices = [{**reply["choices"][0], "index": index} for index, reply in enumerate(replies)]
    counted = [name for name, value in replies[0]["usage"].items() if isinstance(value, int)]
    usage = {name: sum(reply["usage"][name] for reply in replies) for name in counted}
    return {**replies[0], "choices": choices, "usage": usage}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@contextmanager
def running(app: web.Application) -> Iterator[str]:
    """The app on a free port of 127.0.0.1, in a thread of its own; gives its address, without ``/v1``."""
    loop = asyncio.new_event_loop()
    # Where who asked gives up, the engines must not go on with what nobody reads.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    thread = threading.Thread(target=loop.run_forever, name="phases", daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(start(), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
