"""DeepSeek-V4's first layers send tokens to experts by a table of token ids: what can be done there, and what not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness import checkpoint
from harness.blocks import compress
from harness.calibrate import calibrate
from harness.errors import UserError
from harness.models import Model
from harness.plan import LayerPlan, Plan, Source
from tests.architectures import EXPERTS, batches, write_model
from tests.test_config import refused

LAYERS = ["hash_moe", "moe", "moe"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return write_model("deepseek_v4", tmp_path_factory.mktemp("v4") / "model", mlp_layer_types=LAYERS)


def test_its_experts_are_observed_and_counted_by_the_table(model: Model) -> None:
    loaded = model.load("auto")
    found = calibrate(loaded, batches())
    table = loaded.model.layers[0].mlp.gate.tid2eid
    ids = torch.cat([ids.flatten() for ids, _ in batches()])
    assert found.layers.keys() == {0, 1, 2}
    assert (found.layers[0]["count"] == torch.bincount(table[ids].flatten(), minlength=EXPERTS).numpy()).all()


def test_logits_that_no_router_gives_are_refused(model: Model) -> None:
    with pytest.raises(UserError, match="layer 0: its router has no logits that are known"):
        calibrate(model.load("auto"), batches(), frozenset({"logit_gram"}))


def test_experts_of_a_table_are_not_dropped(model: Model, tmp_path: Path) -> None:
    plan = Plan(dict.fromkeys(range(3), LayerPlan.prune(range(4), EXPERTS)))
    with pytest.raises(UserError, match="sends each token to its experts by a table of token ids"):
        checkpoint.export(model, plan, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_method_that_drops_is_refused_before_any_work(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"model.path={model.folder}", "model.name=v4", "method=reap", "ratio=0.5"]
    refused(arguments, ["table of token ids", "m_smoe"], tmp_path, monkeypatch, capsys)


def test_merged_behind_their_rows_the_table_stays_true(model: Model, tmp_path: Path) -> None:
    pairs = tuple((Source(2 * slot, 0.5), Source(2 * slot + 1, 0.5)) for slot in range(EXPERTS // 2))
    plan = Plan(dict.fromkeys(range(3), LayerPlan(pairs, tuple(row // 2 for row in range(EXPERTS)))))
    checkpoint.export(model, plan, tmp_path)
    checkpoint.verify(tmp_path, model)
    original, written = model.load("auto"), Model("merged", str(tmp_path)).load("auto")
    compress(original, plan.layers)
    with torch.no_grad():
        ids = batches()[0][0]
        assert torch.equal(original(input_ids=ids).logits, written(input_ids=ids).logits)
