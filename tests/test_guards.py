"""No number that is not true: values that are not finite, answers that are missing, experts that are not the plan's."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
from aiohttp import web
from torch import nn
from transformers import AutoTokenizer

from harness import plan as plans
from harness import serve
from harness.calibrate import calibrate, calibrate_in_sequence
from harness.errors import StageError
from harness.hf_server import Completer, Service
from harness.models import Model
from harness.plan import LayerPlan, Plan
from harness.probe import probe
from harness.reference import expected
from harness.served import Weights
from harness.served_experts import check_experts, count_experts
from harness.stats import EXTRAS
from tasks import FLOOR, LLM, is_log_prob
from tasks.completions import Completion, complete, degenerate
from tasks.lm_harness import LmEval
from tests.conftest import token_batches, vllm
from tests.tiny_checkpoint import EXPERTS, write_checkpoint

NAN = float("nan")

# Calibration: it stops at the layer that broke, and says what broke there.


def attention(model: nn.Module, layer: int) -> torch.Tensor:
    return model.model.layers[layer].self_attn.o_proj.weight


def router(model: nn.Module, layer: int) -> torch.Tensor:
    return model.model.layers[layer].mlp.gate.weight


def experts(model: nn.Module, layer: int) -> torch.Tensor:
    return model.model.layers[layer].mlp.experts.down_proj


def head(model: nn.Module, layer: int) -> torch.Tensor:
    return model.lm_head.weight


BROKEN = {
    attention: "layer {}, the hidden states that come to the experts",
    router: "layer {}, the router's gates",
    experts: "layer {}, the experts' outputs",
    head: "behind the last layer, the weights of the output head",
}


def broken(model: Model, part: Callable[[nn.Module, int], torch.Tensor], layer: int, value: float) -> Any:
    loaded = model.load("float32")
    with torch.no_grad():
        part(loaded, layer).fill_(value)
    return loaded


@pytest.mark.parametrize("part", BROKEN, ids=lambda part: part.__name__)
@pytest.mark.parametrize("layer", [1, 2])
def test_calibration_stops_at_the_layer_that_broke(
    family_model: Model, part: Callable[[nn.Module, int], torch.Tensor], layer: int
) -> None:
    with pytest.raises(StageError, match=BROKEN[part].format(layer)):
        calibrate(broken(family_model, part, layer, NAN), token_batches())


def test_the_first_of_several_broken_layers_is_named(qwen_model: Model) -> None:
    model = broken(qwen_model, experts, 2, NAN)
    with torch.no_grad():
        router(model, 1).fill_(NAN)
    with pytest.raises(StageError, match="layer 1, the router's gates"):
        calibrate(model, token_batches())


def test_overflow_is_found_as_well_as_nan(qwen_model: Model) -> None:
    with pytest.raises(StageError, match="layer 1, the experts' outputs"):
        calibrate(broken(qwen_model, experts, 1, 3e38), token_batches())
    with pytest.raises(StageError, match="layer 1, the experts' gates and norms"):  # outputs finite, their norm is not
        calibrate(broken(qwen_model, experts, 1, 1e30), token_batches())


def test_the_routers_logits_are_looked_at_where_they_are_read(qwen_model: Model) -> None:
    with pytest.raises(StageError, match="layer 1, the router's logits"):
        calibrate(broken(qwen_model, router, 1, NAN), token_batches(), frozenset({"logit_sum"}))


def test_calibration_layer_by_layer_stops_too(qwen_model: Model) -> None:
    def keep_all(layer: int, given: object) -> LayerPlan:
        assert layer < 1, "layer 1 is not decided"
        return LayerPlan.identity(EXPERTS)

    with pytest.raises(StageError, match="layer 1, the experts' outputs"):
        calibrate_in_sequence(broken(qwen_model, experts, 1, NAN), token_batches(), frozenset(), "actual", keep_all)


def test_a_sound_model_passes_all_of_it(family_model: Model) -> None:
    calibrate(family_model.load("float32"), token_batches(), frozenset(EXTRAS))


def test_a_reference_that_is_not_finite_is_none(qwen_model: Model) -> None:
    with pytest.raises(StageError, match="not finite"):
        expected(broken(qwen_model, experts, 1, NAN), Plan({}), range(20))


# Scoring: real lm-eval, and the probe, against a server that answers nonsense.

CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["a cat", "dogs"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""
GENERATE = """
task: generate
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{question}}"
generation_kwargs: {until: ["STOP"], do_sample: false, max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ITEMS = 20

Body = dict[str, Any]
Change = Callable[[Body], object]


def honest(request: Body) -> Body:
    """What a server says that finds every token equally likely and has nothing to add."""
    prompts = request["prompt"] if isinstance(request["prompt"], list) else [list(request["prompt"].encode())]
    choices = []
    for index, prompt in enumerate(prompts):
        ids = [*prompt, 0]
        log_probs = {
            "token_logprobs": [None, *[-1.0] * (len(ids) - 1)],
            "top_logprobs": [None, *[{"x": -1.0}] * len(ids)],
        }
        choices.append({"index": index, "text": "answer", "finish_reason": "stop", "logprobs": log_probs})
    return {"choices": choices, "usage": {"prompt_tokens": len(prompts[0]), "completion_tokens": 1}}


@contextmanager
def answering(answer: Callable[[Body], Body | str]) -> Iterator[str]:
    """The address of a server that answers every completion so (NaN in JSON as Python writes it)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = answer(asked)
            content = (found if isinstance(found, str) else json.dumps(found)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *arguments: None  # a client that has seen enough hangs up
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny real model with a tokenizer of bytes."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def task(request: pytest.FixtureRequest, tmp_path: Path) -> LmEval:
    text = getattr(request, "param", CHOICE)
    rows = "".join(json.dumps({"question": f"Question {number}"}) + "\n" for number in range(ITEMS))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "task.yaml").write_text(text)
    return LmEval("choice" if text == CHOICE else "generate", str(tmp_path / "task.yaml"))


def changed(change: Change) -> Callable[[Body], Body]:
    """Honest answers, but for what ``change`` does to those with several prompts or to a probe's."""

    def answer(request: Body) -> Body:
        found = honest(request)
        change(found)
        return found

    return answer


def first(found: Body) -> Body:
    return found["choices"][0]


def set_last_token(value: object) -> Change:
    def change(found: Body) -> None:
        first(found)["logprobs"]["token_logprobs"][-2] = value

    return change


IMPOSSIBLE = [NAN, math.inf, -math.inf, None, "-1.0", True, FLOOR, -10_000.0]


def test_an_honest_server_is_scored(folder: Path, task: LmEval, tmp_path: Path) -> None:
    with answering(honest) as url:
        score = task.score(LLM(url, "x", str(folder), 256), tmp_path)
        assert (score.metrics["acc"].n, score.whole) == (ITEMS, ITEMS)
        assert probe(LLM(url, "x", str(folder), 256))[:3] == [-1.0, -1.0, -1.0]


@pytest.mark.parametrize("value", IMPOSSIBLE, ids=str)
def test_a_log_probability_that_is_none_is_never_scored(
    folder: Path, task: LmEval, tmp_path: Path, value: object
) -> None:
    assert not is_log_prob(value)
    with answering(changed(set_last_token(value))) as url:
        llm = LLM(url, "x", str(folder), 256)
        with pytest.raises(StageError, match=f"choice: The server gave a token the log-probability {value}"):
            task.score(llm, tmp_path)
        with pytest.raises(StageError, match="not finite"):
            probe(llm)


def drop_a_log_probability(found: Body) -> None:
    first(found)["logprobs"]["token_logprobs"].pop()


def drop_all_log_probabilities(found: Body) -> None:
    first(found)["logprobs"] = None


def drop_a_choice(found: Body) -> None:
    found["choices"].pop()


def double_a_choice(found: Body) -> None:
    found["choices"].append(found["choices"][-1])


def number_wrongly(found: Body) -> None:
    found["choices"][-1]["index"] = 0


@pytest.mark.parametrize(
    "change, words",
    [
        (drop_a_log_probability, "log-probabilities for .* tokens and one more"),
        (drop_all_log_probabilities, "0 log-probabilities"),
        (drop_a_choice, "answered 7 of 8 prompts"),
        (double_a_choice, "numbered its answers"),
        (number_wrongly, "numbered its answers"),
    ],
)
def test_missing_and_doubled_answers_are_never_scored(
    folder: Path, task: LmEval, tmp_path: Path, change: Change, words: str
) -> None:
    with answering(changed(change)) as url, pytest.raises(StageError, match=words):
        task.score(LLM(url, "x", str(folder), 256), tmp_path)


def no_text(found: Body) -> None:
    first(found)["text"] = None


def broken_off(found: Body) -> None:
    first(found)["finish_reason"] = "abort"


@pytest.mark.parametrize("task", [GENERATE], indirect=True)
@pytest.mark.parametrize(
    "change, words",
    [
        (no_text, "the text None"),
        (broken_off, "broke a generation off: finish_reason 'abort'"),
        (drop_a_choice, "answered 7 of 8 prompts"),
        (number_wrongly, "numbered its answers"),
    ],
)
def test_a_generation_that_is_none_is_never_scored(
    folder: Path, task: LmEval, tmp_path: Path, change: Change, words: str
) -> None:
    with answering(changed(change)) as url, pytest.raises(StageError, match=f"generate: .*{words}"):
        task.score(LLM(url, "x", str(folder), 256), tmp_path)


@pytest.mark.parametrize(
    "answer",
    [
        "<html>busy</html>", "{}", "[]", '{"choices": []}', '{"choices": 3}', '{"choices": [{"text": "a"}]}',
        '{"choices": [{"text": null, "finish_reason": "stop"}]}', '{"choices": [{"text": "a", "finish_reason": null}]}',
    ],
)  # fmt: skip
def test_what_is_no_completion_is_not_taken_for_an_empty_one(folder: Path, answer: str) -> None:
    with answering(lambda request: answer) as url:
        llm = LLM(url, "x", str(folder), 256)
        with pytest.raises(StageError):
            complete(llm, ["a"], max_tokens=4, stop=[], timeout_s=60)
        with pytest.raises(StageError):
            probe(llm)


# A real model that computes NaN, behind the harness's own server.


@contextmanager
def served(folder: Path, change: Callable[[nn.Module], None]) -> Iterator[LLM]:
    model = Model("x", str(folder)).load("float32")
    with torch.no_grad():
        change(model)
    service = Service(Completer(model, AutoTokenizer.from_pretrained(folder)), "x", 256, 32)
    loop, up = asyncio.new_event_loop(), threading.Event()
    runner = web.AppRunner(service.app())
    addresses: list[tuple[str, int]] = []

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        addresses.append(runner.addresses[0])
        up.set()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(start()), loop.run_forever()), daemon=True)
    thread.start()
    assert up.wait(60)
    try:
        yield LLM(f"http://127.0.0.1:{addresses[0][1]}", "x", str(folder), 256)
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)


def test_a_real_model_of_nan_gets_neither_a_perfect_score_nor_a_chance_one(
    folder: Path, task: LmEval, tmp_path: Path
) -> None:
    with served(folder, lambda model: None) as llm:
        assert task.score(llm, tmp_path).metrics["acc"].n == ITEMS
    with served(folder, lambda model: router(model, 1).fill_(NAN)) as llm:
        with pytest.raises(StageError, match="the log-probability nan"):
            task.score(llm, tmp_path)
        with pytest.raises(StageError, match="not finite"):
            probe(llm)


def test_a_real_model_with_an_infinite_logit_is_not_scored(folder: Path, task: LmEval, tmp_path: Path) -> None:
    """log softmax is NaN for the infinite one and minus infinity for all others, which vLLM writes as a number."""

    def blow_up(model: nn.Module) -> None:
        model.lm_head.weight[5].fill_(3e38)

    with served(folder, blow_up) as llm, pytest.raises(StageError, match="which is none"):
        task.score(llm, tmp_path)


# Parts of a benchmark.


def test_a_limit_is_told_from_the_whole(folder: Path, task: LmEval, tmp_path: Path) -> None:
    part = LmEval("choice", task.task_file, limit=7)
    with answering(honest) as url:
        score = part.score(LLM(url, "x", str(folder), 256), tmp_path)
    assert (score.metrics["acc"].n, len(score.samples), score.whole) == (7, 7, ITEMS)
    assert part.identity() != task.identity(), "and the two are never taken for each other"


def lose_items(rows: list[Body]) -> list[Body]:
    return rows[:13]


def double_an_item(rows: list[Body]) -> list[Body]:
    return [*rows, rows[3]]


def swap_an_item(rows: list[Body]) -> list[Body]:
    """One is lost and another counts twice: the number is right."""
    return [*rows[:-1], rows[3]]


def lose_all(rows: list[Body]) -> list[Body]:
    return []


@pytest.mark.parametrize(
    "change, words",
    [
        (lose_items, "13 of 20 items of choice were scored"),
        (double_an_item, "item 3 of choice was scored 2 times"),
        (swap_an_item, "item 3 of choice was scored 2 times"),
        (lose_all, "0 of 20 items of choice were scored"),
    ],
)
def test_part_of_a_benchmark_is_no_score(
    folder: Path,
    task: LmEval,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[Body]], list[Body]],
    words: str,
) -> None:
    real = lm_eval.simple_evaluate

    def lossy(**arguments: Any) -> Any:
        found = real(**arguments)
        found["samples"]["choice"] = change(found["samples"]["choice"])
        return found

    monkeypatch.setattr(lm_eval, "simple_evaluate", lossy)
    with answering(honest) as url, pytest.raises(StageError, match=words):
        task.score(LLM(url, "x", str(folder), 256), tmp_path)


# Degenerate outputs: one count for every task that generates.

ANSWERS = ["", "  \n", "fine", "x = 1\n" * 20, "start " + "ab" * 30, "1 + 1 = 2, so 1 + 1 = 2, so", "a long one"]
CAPPED = {3, 4, 6}


@pytest.mark.parametrize("task", [GENERATE], indirect=True)
def test_degenerate_answers_are_counted_alike_in_every_task_that_generates(
    folder: Path, task: LmEval, tmp_path: Path
) -> None:
    def answer(request: Body) -> Body:
        found = honest(request)
        for choice, prompt in zip(found["choices"], request["prompt"], strict=False):
            asked = tokenizer.decode(prompt) if isinstance(prompt, list) else request["prompt"]
            which = int(asked.split()[-1]) % len(ANSWERS)
            choice |= {"text": ANSWERS[which], "finish_reason": "length" if which in CAPPED else "stop"}
        return found

    tokenizer = AutoTokenizer.from_pretrained(folder)
    numbers = [number % len(ANSWERS) for number in range(ITEMS)]
    truth = {
        "empty": sum(number < 2 for number in numbers),
        "length_capped": sum(number in CAPPED for number in numbers),
        "looping": sum(number in (3, 4) for number in numbers),
    }
    with answering(answer) as url:
        llm = LLM(url, "x", str(folder), 256)
        score = task.score(llm, tmp_path)
        found = complete(llm, [f"Question {i}" for i in range(ITEMS)], max_tokens=8, stop=[], timeout_s=60)
    assert [completion.text for completion in found] == [ANSWERS[number] for number in numbers]
    assert score.counts == degenerate(found) == truth


def test_a_loop_is_one_wherever_it_is_cut() -> None:
    loop = "for i in range(3):\n    print(i)\n" * 6
    for cut in range(20):
        assert degenerate([Completion(loop[: len(loop) - cut], "length")])["looping"] == 1
    assert degenerate([Completion(loop[:70], "length")])["looping"] == 0, "twice is not a loop"


# The experts that an engine holds.


class Runner(nn.Module):
    """Of vLLM's MoE module what is looked at."""

    def __init__(self, stored: int, sharded: bool = False) -> None:
        super().__init__()
        self.routed_experts = nn.Module()
        self.routed_experts.w13_weight = nn.Parameter(torch.zeros(stored, 6, 4))
        self.routed_experts.w2_weight = nn.Parameter(torch.zeros(stored, 4, 3))
        self.routed_experts.scale = nn.Parameter(torch.zeros(1))
        self.routed_experts.use_ep = sharded
        self.router = SimpleNamespace()


def engine_model(rows: list[int], stored: list[int], **more: Any) -> tuple[nn.Module, dict[int, Runner]]:
    """A model as vLLM names its parts: ``model.layers.<i>.mlp.gate`` and ``.experts``, with a dense layer in front."""
    layers = nn.ModuleList([nn.Module()])
    layers[0].mlp = nn.Linear(4, 4)
    for count, experts_here in zip(rows, stored, strict=True):
        layer = nn.Module()
        layer.mlp = nn.Module()
        layer.mlp.gate = nn.Linear(4, count, bias=False)
        layer.mlp.gate.e_score_correction_bias = nn.Parameter(torch.zeros(count))
        layer.mlp.experts = Runner(experts_here, **more)
        layer.mlp.shared_expert_gate = nn.Linear(4, 1)
        layers.append(layer)
    root = nn.Module()
    root.model = nn.Module()
    root.model.layers = layers
    return root, {index: layers[index].mlp.experts for index in range(1, len(layers))}


def counted(model: nn.Module, runners: dict[int, Runner]) -> dict[str, Any]:
    """As it comes back through JSON."""
    return json.loads(json.dumps({layer: count_experts(model, layer, runner) for layer, runner in runners.items()}))


PRUNED = Plan({1: LayerPlan.prune([0, 2, 3], 4), 2: LayerPlan.prune([1, 3], 4)})
MERGED = Plan({1: LayerPlan.merge([[0, 1], [2], [3]], [1.0] * 4), 2: LayerPlan.merge([[0, 1], [2, 3]], [1.0] * 4)})
WHOLE = Plan({1: LayerPlan.identity(4), 2: LayerPlan.identity(4)})


def test_the_experts_that_are_there_must_be_the_plans() -> None:
    check_experts([counted(*engine_model([4, 4], [4, 4]))], WHOLE, masked=False)
    check_experts([counted(*engine_model([3, 2], [3, 2]))], PRUNED, masked=False)
    check_experts([counted(*engine_model([4, 4], [3, 2]))], MERGED, masked=False)
    for rows, stored, words in (
        ([4, 4], [4, 4], r"layer 1 has router rows 4 there, and by the plan 3"),
        ([3, 2], [4, 2], r"layer 1 has experts 4 there, and by the plan 3"),
        ([3, 2], [3, 3], r"layer 2 has experts 3 there, and by the plan 2"),
        ([3, 3], [3, 2], r"layer 2 has router rows 3 there, and by the plan 2"),
    ):
        with pytest.raises(StageError, match=words):
            check_experts([counted(*engine_model(rows, stored))], PRUNED, masked=False)
    with pytest.raises(StageError, match=r"layers \[1\], and the plan's are \[1, 2\]"):
        check_experts([counted(*engine_model([3], [3]))], PRUNED, masked=False)


def test_rows_of_a_router_that_is_packed_away_are_still_known() -> None:
    model, runners = engine_model([3, 2], [3, 2])
    for layer in (1, 2):
        gate = model.model.layers[layer].mlp.gate
        gate.output_size, gate.weight = gate.weight.shape[0], nn.Parameter(torch.zeros(0))
    check_experts([counted(model, runners)], PRUNED, masked=False)


def test_a_mask_must_bar_what_the_plan_drops_and_nothing_else() -> None:
    def masked(barred: dict[int, list[int]]) -> list[dict[str, Any]]:
        model, runners = engine_model([4, 4], [4, 4])
        for layer, runner in runners.items():
            runner.router.closed = torch.zeros(4)
            runner.router.closed[barred[layer]] = -torch.inf
        return [counted(model, runners)]

    check_experts(masked({1: [1], 2: [0, 2]}), PRUNED, masked=True)
    check_experts(masked({1: [], 2: []}), WHOLE, masked=True)
    for barred, words in (
        ({1: [0], 2: [0, 2]}, r"layer 1 has barred from \[0\] there, and by the plan \[1\]"),
        ({1: [1], 2: []}, r"layer 2 has barred from \[\] there, and by the plan \[0, 2\]"),
    ):
        with pytest.raises(StageError, match=words):
            check_experts(masked(barred), PRUNED, masked=True)
    with pytest.raises(StageError, match="barred from"):
        check_experts(masked({1: [1], 2: [0, 2]}), WHOLE, masked=False)


def test_experts_that_workers_share_add_up_and_copies_do_not() -> None:
    one, two = (counted(*engine_model([3, 2], stored, sharded=True)) for stored in ([2, 1], [1, 1]))
    check_experts([one, two], PRUNED, masked=False)
    with pytest.raises(StageError, match="layer 1 has experts 2 there, and by the plan 3"):
        check_experts([one], PRUNED, masked=False)
    copy = counted(*engine_model([3, 2], [3, 2]))
    check_experts([copy, copy], PRUNED, masked=False)
    later = {"2": copy.pop("2")}
    check_experts([copy, later], PRUNED, masked=False)  # a worker for each part of the layers


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "gpt_oss"])
def test_the_real_vllm_says_which_experts_it_holds(tmp_path: Path, family: str) -> None:
    model = Model(family, str(write_checkpoint(tmp_path / "model", family=family)))
    layers = {
        "pruned": LayerPlan.prune([0, 2, 3, 6], EXPERTS),
        "merged": LayerPlan.merge([[0, 5], [1], [2, 3, 7], [4, 6]], [1.0] * EXPERTS),
        "whole": LayerPlan.identity(EXPERTS),
    }
    made = {name: Plan(dict.fromkeys(model.experts, layer)) for name, layer in layers.items()}
    for how, order in (("swap", ("whole", "pruned", "merged", "whole")), ("mask", ("pruned", "whole"))):
        settings = vllm(how=how, dtype="float32", max_model_len=256)
        for name in order:
            file = tmp_path / f"{name}.json"
            file.write_text(plans.to_json(made[name]))
            with settings.serve(Weights(model.folder, made[name], file), "tiny", tmp_path / "log"):
                assert serve._kept is not None
                found = serve._kept.engine._call("expert_counts")
            check_experts(found, made[name], masked=how == "mask")
            for other in set(order) - {name}:
                with pytest.raises(StageError, match="not the plan"):
                    check_experts(found, made[other], masked=how == "mask")
    serve.release()
