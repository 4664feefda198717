"""One sorted, trained parent for all ratios: what is cut from it, what training does to it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from harness import checkpoint
from harness.build import build, option
from harness.calibrate import calibrate
from harness.elastic import MANIFEST, ORDER, WEIGHTS, Elastic
from harness.errors import UserError
from harness.models import Model
from harness.nested import Budget, slice_model
from harness.plan import LayerPlan, Plan
from harness.remake import Remaking
from harness.stats import Stats
from harness.store import Store
from harness.tensors import inventory
from methods import Method
from methods.reap import REAP
from tests.conftest import conf, write_model
from tests.tiny_checkpoint import write_checkpoint

EXPERTS = 8
FILES = {"experts": "elastic_experts", "width": "elastic_width", "untrained": "elastic_slice"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model("tiny", str(write_checkpoint(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    words = np.random.default_rng(0).choice(["one", "two", "three", "and", "is", "not", "more"], size=(120, 30))
    file.write_text("\n\n".join(" ".join(row) for row in words))
    return str(file)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def elastic(kind: str, text: str, **changes: Any) -> Elastic:
    """As conf/recovery/ has it, on a little text."""
    usual = {"seed": 0, "multiple": 4, "batch_size": 4, "warmup": 2}
    fields: dict[str, Any] = {**option("recovery", FILES[kind]), **usual, **changes}
    small = {"files": [text], "sequences": 48, "length": 24, "held_out": 8, "seed": 0}
    del fields["label"]
    return build("recovery", {**fields, "text": {**fields["text"], **small}})


def asked(model: Model, store: Store, ratio: float, method: Method | None = None) -> Remaking:
    """What the flow gives: REAP's plan and statistics where there is a method, else nothing but the identity."""
    if method is None:
        plan = Plan.identity(model.experts)
        return Remaking(model, plan, Stats({}), ratio, REAP(), store)
    ids = torch.randint(1, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    stats = calibrate(model.load("float32"), [(ids, torch.ones_like(ids))])
    keep = dict.fromkeys(model.experts, EXPERTS - int(EXPERTS * ratio))
    plan = Plan(method.plan(stats.only(method.needs), keep))
    return Remaking(model, plan, stats, ratio, method, store)


def remade(options: Elastic, given: Remaking, folder: Path) -> tuple[Model, dict[str, Any]]:
    folder.mkdir()
    report = options.remake(given, folder)
    json.dumps(report, allow_nan=False)
    return Model(folder.name, str(folder)), report


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(1))
    loaded = model.load("float32") if isinstance(model, Model) else model
    return loaded(input_ids=ids).logits


def weights(model: Model) -> dict[str, bytes]:
    return {name: tensor.read() for name, tensor in model.tensors.items()}


def parent_of(store: Store) -> Path:
    (folder,) = (store.root / "elastic").iterdir()
    return folder


def test_a_width_slice_is_a_prefix_of_a_parent_that_says_what_the_original_says(
    model: Model, text: str, store: Store, tmp_path: Path
) -> None:
    options = elastic("untrained", text)
    options.check(model, REAP())
    small, report = remade(options, asked(model, store, 0.5), tmp_path / "half")
    parent = Model("parent", str(parent_of(store) / WEIGHTS))
    assert weights(parent) != weights(model)
    torch.testing.assert_close(logits(parent), logits(model), atol=1e-5, rtol=1e-5)
    expected = slice_model(parent.load("float32"), Budget("", width=16))
    torch.testing.assert_close(logits(small), logits(expected), atol=0, rtol=0)
    assert (logits(small) - logits(model)).abs().max() > 0.01
    assert small.config == {**model.config, "moe_intermediate_size": 16}
    assert report["tokens"] == 0 and report["trained"] is False
    assert report["kl_before"] == report["kl_after"] > 1e-4
    assert abs(report["budgets"][0]["kl_after"]) < 1e-6


def test_an_expert_slice_says_what_the_methods_own_plan_says(
    model: Model, text: str, store: Store, tmp_path: Path
) -> None:
    options = elastic("experts", text, epochs=0)
    options.check(model, REAP())
    given = asked(model, store, 0.5, REAP())
    small, _ = remade(options, given, tmp_path / "half")
    (tmp_path / "plan").mkdir()
    checkpoint.export(model, given.plan, tmp_path / "plan")
    torch.testing.assert_close(logits(small), logits(Model("", str(tmp_path / "plan"))), atol=1e-5, rtol=1e-5)
    assert small.expert_count == 4
    order = load_file(parent_of(store) / ORDER)
    assert any(list(order[f"experts.{layer}"][:4]) != sorted(order[f"experts.{layer}"][:4]) for layer in model.experts)


@pytest.mark.parametrize("axis", ["experts", "width"])
def test_every_weight_is_stored_once_and_all_say_how_many_there_are(
    model: Model, text: str, store: Store, tmp_path: Path, axis: str
) -> None:
    options = elastic(axis, text, epochs=0)
    method = REAP() if axis == "experts" else None
    cuts = {
        ratio: remade(options, asked(model, store, ratio, method), tmp_path / str(ratio))[0] for ratio in (0.25, 0.5)
    }
    parent = inventory(parent_of(store) / WEIGHTS)
    assert {n: t.shape for n, t in parent.items()} == {n: t.shape for n, t in model.tensors.items()}
    manifest = json.loads((parent_of(store) / MANIFEST).read_text())
    assert manifest["nested"] is True and manifest["parent"] == model.digest
    assert [entry["name"] for entry in manifest["budgets"]] == ["full", "0.25", "0.5"]
    assert manifest["budgets"][0]["parameters"] == model.parameters
    for entry, small in zip(manifest["budgets"][1:], cuts.values(), strict=True):
        config = AutoConfig.from_pretrained(small.folder)
        with torch.device("meta"):
            promised = AutoModelForCausalLM.from_config(config).num_parameters()
        assert small.parameters == promised == entry["parameters"]
        for name, tensor in small.tensors.items():
            first = tensor_values(parent[name])[tuple(slice(0, count) for count in tensor.shape)]
            assert np.array_equal(tensor_values(tensor), first), name


def tensor_values(tensor: Any) -> np.ndarray:
    assert tensor.dtype == "F32"
    return np.frombuffer(tensor.read(), np.float32).reshape(tensor.shape)


def test_one_parent_serves_every_ratio_also_those_it_was_not_trained_at(
    model: Model, text: str, store: Store, tmp_path: Path
) -> None:
    options = elastic("width", text)
    made = [remade(options, asked(model, store, ratio), tmp_path / str(ratio)) for ratio in (0.25, 0.5, 0.75)]
    parent_of(store)  # one, or it fails
    assert [small.config["moe_intermediate_size"] for small, _ in made] == [24, 16, 8]
    assert [report["trained"] for _, report in made] == [True, True, False]
    assert "kl_after" not in made[2][1]


@pytest.mark.parametrize("axis", ["experts", "width"])
def test_training_brings_every_slice_closer_to_the_original(
    model: Model, text: str, store: Store, tmp_path: Path, axis: str
) -> None:
    options = elastic(axis, text, epochs=4, budgets=[0.5, 0.75], learning_rate=3e-4)
    given = asked(model, store, 0.5, REAP() if axis == "experts" else None)
    _, report = remade(options, given, tmp_path / "half")
    full, half, quarter = report["budgets"]
    assert half["kl_after"] < 0.95 * half["kl_before"] and quarter["kl_after"] < 0.9 * quarter["kl_before"]
    assert 0 < full["kl_after"] < 0.5 * half["kl_before"]
    assert report["tokens"] == 4 * 48 * 24 and report["steps"] == 48 == sum(report["drawn"])
    assert report["trained"] is True and report["kl_after"] == half["kl_after"]


def test_training_again_gives_the_same_weights(model: Model, text: str, tmp_path: Path) -> None:
    options, found = elastic("width", text), []
    for run in ("one", "two"):
        small, _ = remade(options, asked(model, Store(tmp_path / run), 0.5), tmp_path / f"half-{run}")
        found.append(weights(small))
    assert found[0] == found[1]


def test_a_sharded_checkpoint_keeps_its_index_true(text: str, store: Store, tmp_path: Path) -> None:
    whole = Model("whole", str(write_checkpoint(tmp_path / "whole")))
    whole.load("auto").save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    for file in whole.folder.glob("tokenizer*"):
        (tmp_path / "shards" / file.name).write_bytes(file.read_bytes())
    shards = Model("shards", str(tmp_path / "shards"))
    small, _ = remade(elastic("untrained", text), asked(shards, store, 0.5), tmp_path / "half")
    index = json.loads((small.folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in small.tensors.values())
    assert small.config["moe_intermediate_size"] == 16


def without_label(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "label"}


def test_what_cannot_nest_is_refused_with_the_reason(model: Model, text: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MSMoE gives no one order"):
        elastic("experts", text).check(model, build("method", without_label(conf("method/m_smoe.yaml"))))
    clusters = LayerPlan.merge([[0, 1], [2, 3], [4, 5], [6, 7]], [1.0] * EXPERTS)
    for layers in ({0: clusters, 1: clusters}, {0: LayerPlan.prune(range(3), 8), 1: LayerPlan.prune(range(5), 8)}):
        with pytest.raises(UserError, match="Use allocation=uniform and a method that prunes"):
            elastic("experts", text).remake(Remaking(model, Plan(layers), Stats({}), 0.5, REAP(), store), tmp_path)
    with pytest.raises(UserError, match="ratio=0.9 keeps 1 of 8 experts"):
        elastic("experts", text, budgets=[0.5, 0.9]).check(model, REAP())
    with pytest.raises(UserError, match=r"ratio=0.25 keeps 24 of 32 hidden units.*multiple of 16"):
        elastic("width", text, multiple=16).check(model, REAP())
    with pytest.raises(UserError, match="Glm4MoeForCausalLM cannot be sorted and sliced"):
        elastic("width", text).check(write_model("glm4_moe", tmp_path / "glm"), REAP())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axis": "depth"}, "is not one of experts, width"),
        ({"budgets": [0.5, 1.0]}, "between 0 and 1"),
        ({"shares": [0.5, 0.5]}, "one for each of the 2 budgets"),
        ({"shares": [0.5, 0.25, 0.5]}, "1 in all"),
        ({"epochs": -1}, "epochs=-1 is below 0"),
        ({"learning_rate": 0.0}, "must be above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(text: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        elastic("width", text, **changes)


def test_the_files_in_conf_differ_in_what_they_say_they_do(text: str) -> None:
    files = {kind: option("recovery", name) for kind, name in FILES.items()}
    assert len({str(fields["label"]) for fields in files.values()}) == 3
    assert {**files["width"], "label": "", "epochs": 0} == {**files["untrained"], "label": ""}
    assert {**files["experts"], "label": "", "axis": "width"} == {**files["width"], "label": ""}
    assert elastic("width", text).ignores_plan and not elastic("experts", text).ignores_plan
