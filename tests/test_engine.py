"""Plans served from the original checkpoint by the real vLLM: equal to exported checkpoints and to transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from harness import checkpoint, serve
from harness import plan as plans
from harness.blocks import compress_block, moe_blocks
from harness.models import Model
from harness.plan import LayerPlan, Plan
from harness.serve import Served, Weights
from tasks import LLM
from tests.conftest import vllm
from tests.tiny_checkpoint import EXPERTS, FAMILIES, write_checkpoint

TEXT = "def add(a, b):\n    return a + b\n\nThe quick brown fox jumps over 13 lazy dogs; 17 + 25 = 42."
CLUSTERS = [[0, 5], [1], [2, 3, 7], [4, 6]]
WEIGHTS = [1.0, 2, 3, 4, 5, 6, 7, 8]
CLOSE = 1e-4  # nats


def some_plans(layers: Mapping[int, int]) -> dict[str, Plan]:
    """A plan of each kind, for MoE layers of 8 experts."""
    last = max(layers)
    pruned, merged = LayerPlan.prune([0, 2, 3, 6, 7], EXPERTS), LayerPlan.merge(CLUSTERS, WEIGHTS)
    other = {layer: LayerPlan.prune([1, 2, 3, 4, 5, 7], EXPERTS) for layer in layers}
    return {
        "identity": Plan({layer: LayerPlan.identity(EXPERTS) for layer in layers}),
        "pruned": Plan(dict.fromkeys(layers, pruned)),
        "uneven": Plan({**other, last: LayerPlan.prune([0, 2, 6], EXPERTS)}),
        "merged": Plan(dict.fromkeys(layers, merged)),
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
        """Log-probabilities of TEXT from transformers, the plan carried out on the model in memory."""
        model = self.model.load("float32")
        for layer, block in moe_blocks(model).items():
            compress_block(block, layer, self.plans[plan].layers[layer])
        ids = torch.tensor(AutoTokenizer.from_pretrained(self.model.folder)(TEXT)["input_ids"])
        with torch.no_grad():
            found = model(ids[None]).logits[0].log_softmax(-1)
        return found[:-1].gather(1, ids[1:, None])[:, 0]


@pytest.fixture(scope="module", params=FAMILIES)
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
    for name in ["identity", "pruned", "uneven", "merged", "mixed", "identity"]:
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
    assert sorted(sizes, key=sizes.__getitem__) == sorted(experts, key=experts.__getitem__), "slots are stored once"


def test_masked_routers_equal_the_pruned_model(family: Family) -> None:
    for name in ["pruned", "merged", "uneven", "identity"]:
        with engine("mask").serve(family.weights(name), "tiny", family.folder / "log") as served:
            assert difference(served, family.expected(name)) < CLOSE, name
            assert served.how == ("swap" if name == "merged" else "mask")
            assert (served.weight_bytes is None) == (name != "merged"), "no size of a plan that is only masked"


def test_exported_checkpoints_are_the_same_model(family: Family) -> None:
    """Merged slots copied to their rows; uneven layers padded behind a router bias, where there is one."""
    biased = family.name in ("glm4_moe", "gpt_oss")
    for name in ("uneven", "merged") if biased else ("pruned", "merged"):
        out = family.folder / f"exported-{name}"
        out.mkdir()
        checkpoint.export(family.model, family.plans[name], out)
        checkpoint.verify(out, family.model)
        with engine("checkpoint").serve(Weights(out), "tiny", family.folder / "log") as served:
            assert difference(served, family.expected(name)) < CLOSE, name
            assert served.how == "checkpoint"
