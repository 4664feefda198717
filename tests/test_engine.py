"""Plans served from the original checkpoint by the real vLLM: equal to exported checkpoints and to transformers."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import torch
from transformers import AutoTokenizer

from harness import checkpoint, serve, slicing, throughput, vllm_limits
from harness import plan as plans
from harness.blocks import compress
from harness.build import build
from harness.errors import StageError, UserError
from harness.models import Model
from harness.nested import Budget
from harness.plan import LayerPlan, Plan, Source
from harness.probe import Expected, probe_tokens
from harness.reference import expected as expected_of
from harness.served import Served, Weights
from tasks import LLM
from tasks.completions import complete
from tests.conftest import conf, vllm
from tests.test_serve import server_processes, wait_until_gone
from tests.tiny_checkpoint import EXPERTS, FAMILIES, write_checkpoint

TEXT = "def add(a, b):\n    return a + b\n\nThe quick brown fox jumps over 13 lazy dogs; 17 + 25 = 42."
CLUSTERS = [[0, 5], [1], [2, 3, 7], [4, 6]]
WEIGHTS = [1.0, 2, 3, 4, 5, 6, 7, 8]
CLOSE = 1e-4  # nats


def some_plans(layers: Mapping[int, int]) -> dict[str, Plan]:
    """A plan of each kind, for MoE layers of 8 experts."""
    last = max(layers)
    pruned, merged = LayerPlan.prune([0, 2, 3, 6, 7], EXPERTS), LayerPlan.merge(CLUSTERS, WEIGHTS)
    both = LayerPlan(
        ((Source(0, 0.25), Source(1, 0.75)), (Source(4),), (Source(6),)), (0, 0, None, None, 1, None, 2, 2)
    )
    other = {layer: LayerPlan.prune([1, 2, 3, 4, 5, 7], EXPERTS) for layer in layers}
    return {
        "identity": Plan({layer: LayerPlan.identity(EXPERTS) for layer in layers}),
        "pruned": Plan(dict.fromkeys(layers, pruned)),
        "uneven": Plan({**other, last: LayerPlan.prune([0, 2, 6], EXPERTS)}),
        "merged": Plan(dict.fromkeys(layers, merged)),
        "even": Plan({**dict.fromkeys(layers, pruned), last: both}),
        "mixed": Plan({**dict.fromkeys(layers, LayerPlan.prune([1, 3, 4], EXPERTS)), last: merged}),
    }


@dataclass(frozen=True)
class Family:
    """A random checkpoint, plans for it in files, and what transformers makes of TEXT under each."""

    name: str
    model: Model
    plans: Mapping[str, Plan]
    folder: Path

    def weights(self, plan: str) -> Weights:
        file = self.folder / f"{plan}.json"
        file.write_text(plans.to_json(self.plans[plan]))
        return Weights(self.model.folder, self.plans[plan], file)

    def expected(self, plan: str) -> torch.Tensor:
        """Log-probabilities of TEXT from transformers in float64, expert by expert, the plan carried out in memory.

        In float32 the first forward pass of a process was now and then 4e-4 nats from all later ones.
        """
        model = self.model.load("float32")
        compress(model, self.plans[plan].layers)
        model.double().set_experts_implementation("eager")
        ids = torch.tensor(AutoTokenizer.from_pretrained(self.model.folder)(TEXT)["input_ids"])
        with torch.no_grad():
            found = model(ids[None]).logits[0].log_softmax(-1)
        return found[:-1].gather(1, ids[1:, None])[:, 0]


ALWAYS = ("qwen3_moe", "gpt_oss")  # experts one by one; biased experts in fused tensors
OTHERS = (pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in ALWAYS)


@pytest.fixture(scope="module", params=[*ALWAYS, *OTHERS])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    folder = tmp_path_factory.mktemp(request.param)
    model = Model(request.param, str(write_checkpoint(folder / "model", family=request.param)))
    yield Family(request.param, model, some_plans(model.experts), folder)
    serve.release()


def engine(how: str) -> serve.VLLM:
    return vllm(how=how, dtype="float32", max_model_len=256)


def log_probs(llm: LLM) -> torch.Tensor:
    request = {"model": llm.model, "prompt": TEXT, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    choice = httpx.post(f"{llm.url}/v1/completions", json=request, timeout=60, trust_env=False).json()["choices"][0]
    return torch.tensor(choice["logprobs"]["token_logprobs"][1:-1])


def difference(served: Served, expected: torch.Tensor) -> float:
    return (log_probs(served.llm) - expected).abs().max().item()


def test_one_engine_turns_to_every_plan_and_back(family: Family) -> None:
    """Swapped plans equal transformers, take less memory, and the first plan comes back to the last digit."""
    first, sizes, processes = None, {}, set()
    for name in ["identity", "pruned", "uneven", "merged", "even", "mixed", "identity"]:
        with engine("swap").serve(family.weights(name), "tiny", family.folder / "log") as served:
            assert difference(served, family.expected(name)) < CLOSE, name
            assert served.how == ("plan" if first is None else "swap")
            first = log_probs(served.llm) if first is None else first
            sizes[name] = served.weight_bytes
            processes.add(served.llm.url)
            last = log_probs(served.llm)
    assert torch.equal(first, last)
    assert len(processes) == 1, "the same server all the time"
    experts = {name: sum(plan.distinct_experts().values()) for name, plan in family.plans.items()}
    for one, other in itertools.combinations(sizes, 2):
        if experts[one] != experts[other]:
            assert (sizes[one] < sizes[other]) == (experts[one] < experts[other]), "slots are stored once"


def test_masked_routers_equal_the_pruned_model(family: Family) -> None:
    for name in ["pruned", "merged", "uneven", "identity"]:
        with engine("mask").serve(family.weights(name), "tiny", family.folder / "log") as served:
            assert difference(served, family.expected(name)) < CLOSE, name
            assert served.how == ("swap" if name == "merged" else "mask")
            assert (served.weight_bytes is None) == (name != "merged"), "no size of a plan that is only masked"


def test_exported_checkpoints_are_the_same_model(family: Family) -> None:
    """Merged slots copied to their rows; uneven layers padded behind a router bias, where there is one."""
    name = "mixed" if family.name in ("glm4_moe", "gpt_oss") else "even"
    out = family.folder / f"exported-{name}"
    out.mkdir()
    checkpoint.export(family.model, family.plans[name], out)
    checkpoint.verify(out, family.model)
    with engine("checkpoint").serve(Weights(out), "tiny", family.folder / "log") as served:
        assert difference(served, family.expected(name)) < CLOSE
        assert served.how == "checkpoint"


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_an_engine_turns_to_a_checkpoint_made_from_its_own_and_back(name: str, tmp_path: Path) -> None:
    """With fewer experts, narrower ones or both; the plan before it comes back to the last digit."""
    model = Model(name, str(write_checkpoint(tmp_path / "model", family=name)))
    family = Family(name, model, some_plans(model.experts), tmp_path)
    width = 32
    with engine("swap").serve(family.weights("pruned"), "tiny", tmp_path / "log") as served:
        first, url = log_probs(served.llm), served.llm.url
    for place, budget in enumerate(
        [Budget("both", 5, width // 2), Budget("narrow", None, width // 2), Budget("few", 3)]
    ):
        folder = tmp_path / f"made{place}"
        folder.mkdir()
        slicing.cut(model, budget, folder)
        assert checkpoint.differs_in_experts_only(folder, model)
        whole = Family(name, Model("made", str(folder)), {"as it is": Plan({})}, tmp_path)
        with engine("swap").serve(Weights(folder, base=model.folder), "tiny", tmp_path / "log") as served:
            assert (served.how, served.llm.url) == ("swap", url)
            assert difference(served, whole.expected("as it is")) < CLOSE, budget
    with engine("swap").serve(family.weights("pruned"), "tiny", tmp_path / "log") as served:
        assert served.llm.url == url and torch.equal(log_probs(served.llm), first)
    serve.release()


def test_transformers_serves_the_same_numbers_by_the_same_contract(tmp_path: Path) -> None:
    """Plans in memory; greedy completions with stop sequences as vLLM's, batched or alone."""
    model = Model("qwen3_moe", str(write_checkpoint(tmp_path / "model")))
    family = Family("qwen3_moe", model, some_plans(model.experts), tmp_path)
    prompts = ["The quick brown fox", "def add(a, b):\n", "17 + 25 = ", "x"]
    settings = {"max_tokens": 24, "stop": [], "timeout_s": 60.0}
    hf = build("serve", {**conf("serve/hf.yaml"), "dtype": "float32", "max_model_len": 256})
    with engine("swap").serve(family.weights("mixed"), "tiny", tmp_path / "log") as served:
        expected = complete(served.llm, prompts, **settings)
    stop = [expected[0].text[5:8]]
    with hf.serve(family.weights("mixed"), "tiny", tmp_path / "hf") as served:
        assert served.how == "transformers" and served.weight_bytes
        assert difference(served, family.expected("mixed")) < CLOSE
        assert complete(served.llm, prompts, **settings) == expected
        before = throughput.counters(throughput.metrics(served.llm.url))
        cut, *_ = complete(served.llm, prompts, **{**settings, "stop": stop})
        assert (cut.text, cut.finish_reason) == (expected[0].text[: expected[0].text.index(stop[0])], "stop")
        between = throughput.counters(throughput.metrics(served.llm.url))
        complete(served.llm, prompts, **settings)
        speed = throughput.between(between, throughput.counters(throughput.metrics(served.llm.url)), 1.0)
        assert speed is not None and speed["generated_tokens"] == 4 * 24
        speed = throughput.between(before, between, 1.0)
        assert speed is not None and speed["generated_tokens"] < 4 * 24, "none is counted after a stop sequence"
        url = served.llm.url
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)
    serve.release()


def test_other_weights_than_asked_for_are_noticed(tmp_path: Path) -> None:
    """A swap that leaves the wrong weights behind is refused, and the next plan gets a new engine."""
    model = Model("qwen3_moe", str(write_checkpoint(tmp_path / "model")))
    family = Family("qwen3_moe", model, some_plans(model.experts), tmp_path)
    right = replace(family.weights("pruned"), expected=reference_of(family, "pruned"))
    wrong = replace(family.weights("merged"), expected=reference_of(family, "pruned"))
    with engine("swap").serve(right, "tiny", tmp_path / "log") as served:
        first = served.llm.url
        assert served.difference is not None and served.difference < 1e-5
    refused = pytest.raises(StageError, match="not the model it should be")
    with refused, engine("swap").serve(wrong, "tiny", tmp_path / "log"):
        pass
    with engine("swap").serve(right, "tiny", tmp_path / "log") as served:
        assert served.llm.url != first and served.how == "plan"
    serve.release()


def test_an_engine_that_still_answers_is_not_turned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that ran out of time leaves requests behind; the next plan gets an engine of its own."""
    monkeypatch.setattr("harness.engine.RESETS", 1)  # of several tries, one could meet a moment without requests
    model = Model("qwen3_moe", str(write_checkpoint(tmp_path / "model")))
    family = Family("qwen3_moe", model, some_plans(model.experts), tmp_path)
    with engine("swap").serve(family.weights("pruned"), "tiny", tmp_path / "log") as served:
        url = served.llm.url
    # Many at once: more than fit into a batch wait in the server, so that it has work while we ask for more.
    busy = {"model": served.llm.model, "prompt": ["x" * 20] * 4, "temperature": 0, "ignore_eos": True}
    over = threading.Event()

    def keep_busy(tokens: int) -> None:
        with contextlib.suppress(httpx.HTTPError):
            while not over.is_set():
                asked = {**busy, "max_tokens": tokens}
                httpx.post(f"{url}/v1/completions", json=asked, timeout=60, trust_env=False)

    # Of different lengths, or all would end in the same step, and the server would be idle for a moment.
    threads = [threading.Thread(target=keep_busy, args=[tokens]) for tokens in (200, 171, 143, 119, 97, 83)]
    for thread in threads:
        thread.start()
    try:
        wait_until_it_computes(url)
        with engine("swap").serve(family.weights("merged"), "tiny", tmp_path / "log") as served:
            assert served.how == "plan" and served.llm.url != url
            assert difference(served, family.expected("merged")) < CLOSE
    finally:
        over.set()
        for thread in threads:
            thread.join()
    serve.release()


def wait_until_it_computes(url: str) -> None:
    """Until the server says that requests are in its batch."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        counts = httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text
        if re.search(r"^vllm:num_requests_running\{[^}]*\} [1-9]", counts, re.MULTILINE):
            return
    raise AssertionError("it never had a request")


def test_an_engine_that_dies_between_plans_is_replaced(tmp_path: Path) -> None:
    model = Model("qwen3_moe", str(write_checkpoint(tmp_path / "model")))
    family = Family("qwen3_moe", model, some_plans(model.experts), tmp_path)
    with engine("swap").serve(family.weights("pruned"), "tiny", tmp_path / "log") as served:
        port = urlsplit(served.llm.url).port
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in process.net_connections()):
                process.kill()
    with engine("swap").serve(family.weights("merged"), "tiny", tmp_path / "log") as served:
        assert difference(served, family.expected("merged")) < CLOSE
    serve.release()
    assert not wait_until_gone(server_processes(), 5)


def reference_of(family: Family, plan: str) -> Expected:
    ids = probe_tokens(str(family.model.folder))
    return expected_of(family.model.load("auto"), family.plans[plan], ids)


def test_what_this_build_gets_wrong_is_refused_and_would_be_noticed(tmp_path: Path) -> None:
    """ERNIE with a router bias: vLLM's CPU build leaves the bias out."""
    if not serve._is_cpu_build():
        pytest.skip("this is about vLLM's CPU build")
    for name, std in (("biased", 1.0), ("plain", 0.0)):
        folder = write_checkpoint(tmp_path / name, lambda model, std=std: bias_routers(model, std), "ernie4_5_moe")
        model = Model(name, str(folder))
        plan = Plan({layer: LayerPlan.identity(EXPERTS) for layer in model.experts})
        family = Family(name, model, {"identity": plan}, tmp_path)
        weights = replace(family.weights("identity"), expected=reference_of(family, "identity"))
        if std:
            with pytest.raises(UserError, match="leaves out the correction bias"):
                engine("swap").check_model(model)
            noticed = pytest.raises(StageError, match="not the model it should be")
            with noticed, engine("plan").serve(weights, "tiny", tmp_path / "log"):
                pass
        else:
            engine("swap").check_model(model)
            with engine("plan").serve(weights, "tiny", tmp_path / "log") as served:
                assert served.difference is not None and served.difference < 1e-5


def bias_routers(model: torch.nn.Module, std: float) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(tensor, std=std)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"model_type": "minimax_m2"}, "AssertionError"),
        ({"model_type": "deepseek_v3"}, "1.7 nats"),
        ({"head_dim": 48}, "size 48"),
        ({"hidden_size": 72}, "multiples of 32"),
        ({"quantization_config": {"quant_method": "fp8"}}, "AMX"),
    ],
)
def test_models_the_cpu_build_cannot_compute_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict, words: str
) -> None:
    folder = write_checkpoint(tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    monkeypatch.setattr(vllm_limits, "_cpu_flags", lambda: "avx512f")
    with pytest.raises(UserError, match=words):
        vllm_limits.check_cpu(Model("tiny", str(folder)))
