"""A small model thinks and a large one answers, over HTTP, each from the real server's code."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from aiohttp import web
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from harness import plan as plans
from harness import scoring, serve, thinking, throughput
from harness.build import build
from harness.engine_memory import GIB, OVERHEAD_GIB
from harness.errors import StageError, UserError, log_tail_of
from harness.hf_server import Completer, Service
from harness.models import ROOT, Model
from harness.phases import counts
from harness.phases_server import PhasesServer, running
from harness.plan import LayerPlan, Plan
from harness.probe import Expected, probe, probe_tokens, served_length
from harness.serve import VLLM
from harness.served import Weights
from harness.sweep import expand
from harness.thinking import ThinkThenAnswer
from tasks import LLM
from tasks.completions import Completion, complete
from tests.conftest import conf, vllm
from tests.runs import bench, servers, temporary_files
from tests.tiny_checkpoint import EXPERTS, write_checkpoint
from tests.two_phases import think_then_answer

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
    """Both behind their own port."""
    with ExitStack() as both:
        found = {}
        for name, completer in completers.items():
            service = Service(completer, name, LENGTH, 8)
            app = service.app()

            async def end(app: web.Application, service: Service = service) -> None:
                service.worker.cancel()

            app.on_cleanup.append(end)
            found[name] = LLM(both.enter_context(running(app)), name, "", LENGTH)
        yield found


@pytest.fixture(scope="module")
def tokenizer(completers: dict[str, Completer]) -> PreTrainedTokenizerBase:
    return completers["large"].tokenizer


@contextmanager
def in_phases(
    small: LLM, large: LLM, tokenizer: PreTrainedTokenizerBase, end: str = "</think>", cap: int = 12
) -> Iterator[LLM]:
    """Both behind one address, as tasks see them."""
    server = PhasesServer(small, large, end, cap, tokenizer)
    with running(server.app()) as url:
        yield replace(large, url=url, max_model_len=server.max_model_len)


def said(completer: Completer, prompt: str, tokens: int) -> str:
    """The model's own greedy words, no server between."""
    (answer,) = completer.complete([completer.tokenizer(prompt)["input_ids"]], tokens, [], False)
    return completer.text(answer.ids)


def post(llm: LLM, **asked: Any) -> httpx.Response:
    request = {"model": llm.model, "max_tokens": 9, "temperature": 0, **asked}
    return httpx.post(f"{llm.url}/v1/completions", json=request, timeout=60, trust_env=False)


# ---- both phases from two addresses


def test_the_large_model_goes_on_from_what_the_small_one_thought(
    completers: dict[str, Completer], served: dict[str, LLM]
) -> None:
    ends = {prompt: said(completers["small"], prompt, 12)[5:7] for prompt in PROMPTS}
    for prompt, end in ends.items():
        (found,) = think_then_answer(served["small"], served["large"], [prompt], end=end, cap=12, max_tokens=9, stop=[])
        thought = said(completers["small"], prompt, 12).split(end)[0]
        assert found.thought.text == thought and found.thought.finish_reason == "stop"
        assert found.answer.text == said(completers["large"], prompt + thought + end, 9)
        assert found.answer.text != said(completers["small"], prompt + thought + end, 9)


def test_a_thought_that_does_not_end_is_closed_at_the_cap(
    completers: dict[str, Completer], served: dict[str, LLM]
) -> None:
    found = think_then_answer(served["small"], served["large"], PROMPTS, end="</think>", cap=7, max_tokens=9, stop=[])
    for prompt, phases in zip(PROMPTS, found, strict=True):
        assert phases.thought.text == said(completers["small"], prompt, 7)
        assert phases.thought.finish_reason == "length"
        assert phases.answer.text == said(completers["large"], prompt + phases.thought.text + "</think>", 9)


# ---- both phases behind one address


@pytest.mark.parametrize("cap", [3, 12])
def test_one_address_answers_what_two_do_and_counts_thoughts(
    served: dict[str, LLM], tokenizer: PreTrainedTokenizerBase, completers: dict[str, Completer], cap: int
) -> None:
    """Texts one by one and token ids in one request; the end is one that some thoughts reach and some do not."""
    end = said(completers["small"], PROMPTS[0], 12)[5:7]
    stop = [said(completers["large"], PROMPTS[1] + said(completers["small"], PROMPTS[1], cap) + end, 9)[4]]
    two = think_then_answer(served["small"], served["large"], PROMPTS, end=end, cap=cap, max_tokens=9, stop=stop)
    answers = [phases.answer for phases in two]
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    with in_phases(served["small"], served["large"], tokenizer, end, cap) as llm:
        assert complete(llm, PROMPTS, max_tokens=9, stop=stop, timeout_s=60) == answers
        once = counts(throughput.metrics(llm.url))
        reply = post(llm, prompt=[tokenizer(prompt)["input_ids"] for prompt in PROMPTS], stop=stop).json()
        assert [Completion(choice["text"], choice["finish_reason"]) for choice in reply["choices"]] == answers
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
        both = counts(throughput.metrics(llm.url))
    thoughts = [phases.thought for phases in two]
    # Every token is a byte here: a thought has its text's, and those of the end where it reached that.
    spent = sum(len(thought.text) + len(end) * (thought.finish_reason == "stop") for thought in thoughts)
    cut = sum(thought.finish_reason == "length" for thought in thoughts)
    assert once == {"thoughts": 3, "thought_tokens": spent, "thoughts_cut": cut}
    assert both == {name: 2 * number for name, number in once.items()}
    assert cut if cap == 3 else cut < 3


def test_usage_is_the_answers(served: dict[str, LLM], tokenizer: PreTrainedTokenizerBase) -> None:
    with in_phases(served["small"], served["large"], tokenizer, cap=7) as llm:
        usage = post(llm, prompt=PROMPTS[:2]).json()["usage"]
    read = sum(len(prompt) + 7 + len("</think>") for prompt in PROMPTS[:2])
    assert usage == {"prompt_tokens": read, "completion_tokens": 18}


def test_likelihoods_and_the_model_card_are_the_large_models_own(
    served: dict[str, LLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    with in_phases(served["small"], served["large"], tokenizer) as llm:
        asked = {"prompt": tokenizer(PROMPTS[0])["input_ids"], "max_tokens": 1, "logprobs": 1, "echo": True}
        assert post(llm, **asked).content == post(served["large"], **asked).content
        assert probe(llm) == probe(served["large"]) != probe(served["small"])
        assert served_length(llm.url, "large") == LENGTH
        assert httpx.get(f"{llm.url}/health", trust_env=False).status_code == 200
        assert counts(throughput.metrics(llm.url))["thoughts"] == 0


def test_throughput_counts_both_phases(served: dict[str, LLM], tokenizer: PreTrainedTokenizerBase) -> None:
    with in_phases(served["small"], served["large"], tokenizer) as llm:
        before = throughput.counters(throughput.metrics(llm.url))
        complete(llm, PROMPTS, max_tokens=9, stop=[], timeout_s=60)
        found = throughput.between(before, throughput.counters(throughput.metrics(llm.url)), 1.0)
        thoughts = counts(throughput.metrics(llm.url))
    assert found and found["generated_tokens"] == thoughts["thought_tokens"] + 9 * 3


# ---- what two servers of our own choosing see

Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


@contextmanager
def answering(name: str, answer: Answer) -> Iterator[LLM]:
    """A server that answers completions so."""

    async def completions(request: web.Request) -> web.Response:
        return web.json_response(await answer(await request.json()))

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    with running(app) as url:
        yield LLM(url, name, "", LENGTH)


def reply(text: str, tokens: int, finish_reason: str = "length") -> dict[str, Any]:
    choices = [{"text": text, "finish_reason": finish_reason, "index": 0}]
    return {"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": tokens}}


def test_requests_reach_each_model_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    """No answer comes before all twelve are asked for: one at a time would wait for ever."""
    together = {"small": asyncio.Barrier(12), "large": asyncio.Barrier(12)}

    async def meet(asked: dict[str, Any]) -> dict[str, Any]:
        await together[asked["model"]].wait()
        return reply("so", 2)

    with (
        answering("small", meet) as small,
        answering("large", meet) as large,
        in_phases(small, large, tokenizer) as llm,
    ):
        found = complete(llm, PROMPTS * 4, max_tokens=9, stop=[], timeout_s=60)
    assert found == [Completion("so", "length")] * 12


def test_an_answer_has_room_however_many_tokens_a_thought_takes_to_read(tokenizer: PreTrainedTokenizerBase) -> None:
    """Broken bytes are one token each to say, and three to read. The prompt fills what the cap leaves of the length."""
    read: list[list[int]] = []

    async def think(asked: dict[str, Any]) -> dict[str, Any]:
        return reply("\ufffd" * asked["max_tokens"], asked["max_tokens"])

    async def answer(asked: dict[str, Any]) -> dict[str, Any]:
        read.append(asked["prompt"])
        return reply("so", 2)

    with (
        answering("small", think) as small,
        answering("large", answer) as large,
        in_phases(small, large, tokenizer, cap=12) as llm,
    ):
        prompt = "x" * (llm.max_model_len - 9)
        complete(llm, [prompt], max_tokens=9, stop=[], timeout_s=60)
    assert len(read[0]) == LENGTH - 9
    text = tokenizer.decode(read[0])
    assert text.startswith(prompt) and text.endswith("</think>")


def test_token_ids_stay_as_they_came() -> None:
    """Also where their text would be split otherwise, as after a prompt that was cut."""
    tiny = AutoTokenizer.from_pretrained(ROOT / "tasks" / "tiny" / "model")
    usual = tiny("7 + 5 = ####")["input_ids"]
    unusual = [token for sign in "7 + 5 = ####" for token in tiny(sign)["input_ids"]]
    assert usual != unusual and tiny.decode(usual) == tiny.decode(unusual)
    read: list[list[int]] = []

    async def both(asked: dict[str, Any]) -> dict[str, Any]:
        if asked["model"] == "large":
            read.append(asked["prompt"])
        return reply(" 12", 2, "stop")

    with answering("small", both) as small, answering("large", both) as large, in_phases(small, large, tiny) as llm:
        for prompt in (usual, unusual):
            assert post(llm, prompt=prompt).status_code == 200
    after = tiny(" 12</think>", add_special_tokens=False)["input_ids"]
    assert read == [usual + after, unusual + after]


def test_when_who_asked_gives_up_the_engine_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    reached, cancelled = threading.Event(), threading.Event()

    async def think(asked: dict[str, Any]) -> dict[str, Any]:
        reached.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return reply("so", 2)

    with (
        answering("small", think) as small,
        answering("large", think) as large,
        in_phases(small, large, tokenizer) as llm,
    ):
        asking = http.client.HTTPConnection("127.0.0.1", int(llm.url.rpartition(":")[2]))
        asking.request("POST", "/v1/completions", json.dumps({"model": "large", "prompt": "a", "max_tokens": 9}))
        assert reached.wait(60)
        asking.close()
        assert cancelled.wait(60)


# ---- what gets no answer


def test_a_dead_model_is_a_reason_and_never_an_answer(
    served: dict[str, LLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    gone = LLM("http://127.0.0.1:9", "gone", "", LENGTH)
    for small, large, does in ((gone, served["large"], "thinks"), (served["small"], gone, "answers")):
        with in_phases(small, large, tokenizer) as llm:
            found = post(llm, prompt=PROMPTS)
            assert found.status_code == 500 and "choices" not in found.json()
            assert f"The server of the model that {does} is gone" in found.json()["error"]["message"]
            assert f"The server of the model that {does} is gone" in found.reason_phrase, "lm-eval shows only this"
            with pytest.raises(StageError, match=f"model that {does} is gone"):
                complete(llm, PROMPTS, max_tokens=9, stop=[], timeout_s=60)


def test_a_thought_that_was_broken_off_is_no_thought(
    served: dict[str, LLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    async def abort(asked: dict[str, Any]) -> dict[str, Any]:
        return reply("I th", 2, "abort")

    with answering("small", abort) as small, in_phases(small, served["large"], tokenizer) as llm:
        found = post(llm, prompt=PROMPTS[0])
        counted = counts(throughput.metrics(llm.url))
        assert (found.status_code, counted) == (500, dict.fromkeys(counted, 0))
        assert "broke off: finish_reason 'abort'" in found.json()["error"]["message"]


REFUSED: dict[str, dict[str, Any]] = {
    "a stream": {"prompt": "a", "stream": True},
    "two answers": {"prompt": "a", "n": 2},
    "no prompt": {"prompt": []},
    "an answer that has no room after a thought": {"prompt": "a", "max_tokens": LENGTH - 12},
    "a prompt that has no room": {"prompt": "a" * LENGTH},
    "another temperature, which the small model refuses here": {"prompt": "a", "temperature": 1},
}


@pytest.mark.parametrize("asked", REFUSED.values(), ids=REFUSED)
def test_it_is_refused(served: dict[str, LLM], tokenizer: PreTrainedTokenizerBase, asked: dict[str, Any]) -> None:
    with in_phases(served["small"], served["large"], tokenizer) as llm:
        found = post(llm, **asked)
    assert found.status_code == 400 and found.json()["error"]["message"]


def test_nothing_else_of_the_large_server_is_reached(
    served: dict[str, LLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The engine would load other weights for whoever asks it to; and only this machine reaches the address."""
    with in_phases(served["small"], served["large"], tokenizer) as llm:
        assert httpx.post(f"{llm.url}/collective_rpc", json={}, trust_env=False).status_code == 404
        assert httpx.post(f"{llm.url}/v1/completions", content=b"{", trust_env=False).status_code == 400
        port = int(llm.url.rpartition(":")[2])
        with socket.socket() as other:
            assert other.connect_ex(("127.0.0.2", port)) != 0
    with socket.socket() as ended:
        assert ended.connect_ex(("127.0.0.1", port)) != 0


# ---- as a way of serving


def phases(**changes: object) -> ThinkThenAnswer:
    """As conf/serve/phases.yaml sets it up, with these changes."""
    fields = {**conf("serve/vllm.yaml"), **conf("serve/phases.yaml"), **changes}
    fields.pop("defaults")
    return build("serve", fields)


def test_a_score_is_keyed_by_end_and_cap_and_all_that_decides_an_engines_numbers() -> None:
    (cell,) = expand(["method=none", "suite=tiny_sums", "serve=phases"]).cells

    def name(served: VLLM) -> str:
        return scoring.score_name(replace(cell, serve=served), Plan({}), cell.tasks[0])

    plain = vllm(how="plan", max_model_len=4096)
    others = [plain, phases(cap=100), phases(end="."), phases(dtype="float32"), phases(max_model_len=512)]
    assert len({name(served) for served in [phases(), *others]}) == 6
    assert name(cell.serve) == name(phases()) == name(phases(max_num_seqs=2))
    added = {"thinks": "the plan", "answers": "the original", "end": "</think>", "cap": 256}
    assert phases().identity() == {**plain.identity(), "phases": added}


UNFIT: dict[str, tuple[dict[str, object], str]] = {
    "an engine that turns": ({"how": "swap"}, "serve.how=swap.*serve.how=plan"),
    "nothing that closes": ({"end": ""}, "closes it"),
    "no thought": ({"cap": 0}, "serve.cap=0"),
    "no such type": ({"dtype": "float3"}, "serve.dtype=float3"),
}


@pytest.mark.parametrize(("changes", "words"), UNFIT.values(), ids=UNFIT)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        phases(**changes).check()


def test_a_cap_that_leaves_no_room_is_refused_before_any_work() -> None:
    tiny = Model("tiny", str(ROOT / "tasks" / "tiny" / "model"))
    phases(cap=1014).check_model(tiny)
    with pytest.raises(UserError, match="takes 1024 tokens .* At most 1014"):
        phases(cap=1015).check_model(tiny)
    with pytest.raises(UserError, match="takes 300 tokens .* At most 290"):
        phases(cap=291, max_model_len=300).check_model(tiny)


def test_two_engines_must_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one and a half; each takes its weights, its cache and what vLLM needs itself."""
    room = int(1.5 * (2 + 1 + OVERHEAD_GIB) * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": room}))
    vllm(kv_cache_gib=1).check(2 * GIB)
    with pytest.raises(UserError, match=r"about 12\.0 GiB of memory \(each of 2 engines at once: 2\.0 weights"):
        phases(kv_cache_gib=1).check(2 * GIB)
    with pytest.raises(UserError, match=r"each of 2 engines at once.* At most 0\.5 GiB of weights fit"):
        vllm(kv_cache_gib=1).check(2 * GIB, servers=2)


def test_each_of_two_engines_takes_at_most_half_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="each of two engines"):
        phases(gpu_memory_utilization=0.6).check()


def test_the_original_is_the_one_that_is_named_or_the_plans_folder(tmp_path: Path) -> None:
    folder, remade = tmp_path / "original", tmp_path / "remade"
    assert thinking.original(Weights(folder, Plan({}), tmp_path / "plan.json")) == Weights(folder)
    expected = Weights(folder, expected=Expected((-1.0,), 0.0))
    assert thinking.original(Weights(remade, original=expected)) is expected


@pytest.mark.slow
def test_an_original_that_is_computed_wrongly_never_answers(tmp_path: Path) -> None:
    model = Model("tiny", str(write_checkpoint(tmp_path / "model")))
    pruned = Plan({layer: LayerPlan.prune([0, 2, 3, 6, 7], EXPERTS) for layer in model.experts})
    (tmp_path / "plan.json").write_text(plans.to_json(pruned))
    wrong = Weights(model.folder, expected=Expected((-1.0,) * (len(probe_tokens(str(model.folder))) - 1), 0.0))
    weights = Weights(model.folder, pruned, tmp_path / "plan.json", original=wrong)
    engine = phases(dtype="float32", max_model_len=256, cap=12)
    with pytest.raises(StageError, match="is not the model it should be"), engine.serve(weights, "two", tmp_path / "l"):
        pass


# ---- through the real vLLM


@pytest.mark.slow
def test_vllm_behind_one_address_answers_what_two_do(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = Model("tiny", str(write_checkpoint(tmp_path / "model")))
    pruned = Plan({layer: LayerPlan.prune([0, 2, 3, 6, 7], EXPERTS) for layer in model.experts})
    (tmp_path / "plan.json").write_text(plans.to_json(pruned))
    engine = vllm(how="plan", dtype="float32", max_model_len=256)
    with (
        engine.serve(Weights(model.folder, pruned, tmp_path / "plan.json"), "small", tmp_path / "small.log") as small,
        engine.serve(Weights(model.folder), "large", tmp_path / "large.log") as large,
    ):
        two = think_then_answer(small.llm, large.llm, PROMPTS, end="a", cap=12, max_tokens=9, stop=["b"])
        answers = [phases.answer for phases in two]
        with in_phases(small.llm, large.llm, tokenizer, "a", 12) as llm:
            assert complete(llm, PROMPTS, max_tokens=9, stop=["b"], timeout_s=120) == answers
            found = post(llm, prompt=[tokenizer(prompt)["input_ids"] for prompt in PROMPTS], stop=["b"]).json()
            assert [Completion(one["text"], one["finish_reason"]) for one in found["choices"]] == answers
            asked = {"model": "large", "prompt": PROMPTS[0]}
            told = httpx.post(f"{llm.url}/tokenize", json=asked, timeout=60, trust_env=False).json()
            assert told["tokens"] == tokenizer(PROMPTS[0])["input_ids"]
            assert probe(llm) == pytest.approx(probe(large.llm), abs=1e-6)
            assert probe(llm) != pytest.approx(probe(small.llm), abs=1e-2)
            alone = complete(large.llm, PROMPTS, max_tokens=9, stop=["b"], timeout_s=120)
    assert answers != alone
    serve.release()


@pytest.mark.slow
def test_an_engine_that_dies_is_named_with_its_log(tmp_path: Path) -> None:
    model = Model("tiny", str(write_checkpoint(tmp_path / "model")))
    pruned = Plan({layer: LayerPlan.prune([0, 2, 3, 6, 7], EXPERTS) for layer in model.experts})
    (tmp_path / "plan.json").write_text(plans.to_json(pruned))
    weights = Weights(model.folder, pruned, tmp_path / "plan.json")
    for place, own in enumerate(("both.log", "both.original.log")):
        with phases(dtype="float32", max_model_len=256, cap=12).serve(weights, "both", tmp_path / "both.log") as served:
            assert len(complete(served.llm, PROMPTS, max_tokens=9, stop=[], timeout_s=120)) == 3
            assert isinstance(served.watch, thinking._Watches)
            with pytest.raises(StageError, match="while it was used") as told, served.watch.blamed():
                served.watch.each[place]._running.kill()
                complete(served.llm, PROMPTS, max_tokens=9, stop=[], timeout_s=120)
            assert served.watch.log == tmp_path / own and log_tail_of(told.value)


@pytest.mark.slow
def test_a_run_in_two_phases_ends_in_records(tmp_path: Path) -> None:
    """The original alone takes one engine for both phases, the plan takes two."""
    store = tmp_path / "store"
    two = ["serve=phases", "serve.end='.'", "serve.cap=16", "suite=tiny_sums"]
    done = bench(store, "method=none,reap", *two)
    assert done.returncode == 0, done.stderr
    records = {found["label"]: found for found in map(json.loads, (p.read_text() for p in store.glob("records/*")))}
    assert set(records) == {"uncompressed", "REAP"}
    for record in records.values():
        assert record["status"] == "done" and record["served"]["how"] == "phases"
        assert record["served_by"]["phases"]["cap"] == 16 and record["served_by"]["how"] == "plan"
        assert record["metrics"]["exact_match"]["n"] == 6
        assert record["counts"]["thoughts"] == 6 <= record["counts"]["thought_tokens"] <= 6 * 16
        assert record["counts"]["thoughts_cut"] <= 6
    one, both = (records[label]["served"] for label in ("uncompressed", "REAP"))
    assert one["weight_bytes"] < both["weight_bytes"] < 2 * one["weight_bytes"]
    assert [log.name.split("-")[1] for log in store.glob("logs/*.original.log")] == ["reap"]
    assert servers(store) == [] and temporary_files(store) == []
