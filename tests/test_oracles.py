"""Numbers computed independently of this project: sums, kept experts, clusters and compressed logits must agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import checkpoint
from harness.budget import uniform
from harness.calibrate import calibrate
from harness.models import Model
from harness.plan import Plan
from harness.stats import Stats
from methods import Method
from methods.ean import EAN
from methods.frequency import Frequency
from methods.reap import REAP
from tests.conftest import needs_shared
from tests.test_methods import make

ORACLES = ("qwen3moe_random", "mixtral", "glm4_moe")
REFERENCE_NAMES = {
    "count": "expert_frequency",
    "norm": "ean_sum",
    "gate": "weighted_expert_frequency_sum",
    "gate_norm": "weighted_ean_sum",
}


REFERENCE_SCORES = {
    "frequency": "expert_frequency",
    "ean": "ean_sum",
    "man": "ean_mean",
    "seer": "weighted_expert_frequency_sum",
    "weighted_ean": "weighted_ean_sum",
    "reap": "reap",
}


def open_oracle(name: str, routing: str = "actual") -> tuple[Model, dict, Stats]:
    folder = needs_shared(f"oracles/{name}")
    oracle = json.loads((folder / "oracle.json").read_text())
    model = Model(name, str(folder / "model"))
    pairs = zip(oracle["batches"], oracle["attention_mask"], strict=True)
    batches = [(torch.tensor(ids), torch.tensor(mask)) for ids, mask in pairs]
    stats = calibrate(model.load("float32"), batches, frozenset({"all_output_sum", "logit_gram"}), routing)
    return model, oracle, stats


@pytest.fixture(scope="module")
def reference() -> tuple[Model, dict, Stats]:
    return open_oracle("qwen3moe_random")


def last_logits(model: Model, plan: Plan, ids: list[list[int]], folder: Path) -> np.ndarray:
    checkpoint.export(model, plan, folder)
    checkpoint.verify(folder, model)
    with torch.no_grad():
        return Model("exported", str(folder)).load("float32")(input_ids=torch.tensor(ids)).logits[0, -1].numpy()


def planned(model: Model, stats: Stats, method: Method, ratio: float) -> Plan:
    return Plan(method.plan(stats.only(method.needs), uniform(model.experts, ratio)))


@pytest.mark.parametrize("name", ORACLES)
def test_sums_agree(name: str) -> None:
    model, oracle, stats = open_oracle(name)
    assert len(oracle["stats"]) == len(stats.layers) == len(model.experts)
    for place, expected in oracle["stats"].items():
        layer = stats.layers[int(place) if place.isdigit() else int(place.split(".")[2])]
        names = REFERENCE_NAMES if place.isdigit() else {n: n for n in expected if n != "tokens"}
        assert layer.tokens == expected.get("total_tokens", expected.get("tokens"))
        for ours, theirs in names.items():
            np.testing.assert_allclose(layer[ours], expected[theirs], rtol=1e-4, atol=1e-6, err_msg=f"{place} {ours}")


@pytest.mark.parametrize("routing", ["actual", "paper"])
def test_scores_agree(routing: str) -> None:
    """The published code on a softmax router that renormalises, where both gate conventions are one."""
    _, oracle, stats = open_oracle("qwen3moe_random", routing)
    for place, expected in oracle["stats"].items():
        for name, theirs in REFERENCE_SCORES.items():
            ours = make(name).score(stats.layers[int(place)])  # type: ignore[attr-defined]
            np.testing.assert_allclose(ours, expected[theirs], rtol=1e-4, atol=1e-6, err_msg=f"{place} {name}")


def test_mean_outputs_of_all_experts_agree(reference: tuple[Model, dict, Stats]) -> None:
    _, oracle, stats = reference
    for place, expected in oracle["characteristic_activation"].items():
        layer = stats.layers[int(place)]
        np.testing.assert_allclose(layer["all_output_sum"] / layer.tokens, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize(("name", "method"), [("reap", REAP()), ("frequency", Frequency()), ("ean_sum", EAN())])
def test_pruning_agrees(
    reference: tuple[Model, dict, Stats], tmp_path: Path, name: str, method: Method, ratio: float
) -> None:
    model, oracle, stats = reference
    expected = oracle["pruned"][f"{name}@{ratio}"]
    plan = planned(model, stats, method, ratio)
    assert {str(index): list(layer.kept_rows) for index, layer in plan.layers.items()} == expected["kept"]
    logits = last_logits(model, plan, oracle["test_ids"], tmp_path)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_hc_smoe_agrees(reference: tuple[Model, dict, Stats], tmp_path: Path, ratio: float) -> None:
    model, oracle, stats = reference
    expected = oracle["hc_smoe"][str(ratio)]
    plan = planned(model, stats, make("hc_smoe"), ratio)
    for place, labels in expected["labels"].items():
        ours = plan.layers[int(place)].routes
        pairs = set(zip(ours, labels, strict=True))
        assert len(pairs) == len(set(ours)) == len(set(labels)), f"layer {place}: clusters differ"
    logits = last_logits(model, plan, oracle["test_ids"], tmp_path)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
