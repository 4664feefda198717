"""Every architecture of docs/architectures.md goes the way that its row says."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import seam
from harness.calibrate import calibrate
from harness.checkpoint import check_structure
from harness.errors import UserError
from harness.models import ROOT
from tests.architectures import FAMILIES, REFUSED, batches, row, table, write_model

LOGITS = frozenset({"logit_gram"})
ROWS = table((ROOT / "docs" / "architectures.md").read_text())


def test_the_page_has_every_architecture_and_no_other() -> None:
    assert list(ROWS) == list(FAMILIES) and len(ROWS) >= 25


@pytest.mark.parametrize("kind", FAMILIES)
def test_calibrated_planned_exported_and_read_again(kind: str) -> None:
    found = row(kind, with_engine=False)
    assert found == {name: ROWS[kind][name] for name in found} and set(found.values()) & {"yes"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_served_by_vllm_as_the_page_says(kind: str) -> None:
    assert row(kind, with_engine=True)["vLLM CPU"] == ROWS[kind]["vLLM CPU"]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_router_without_a_row_per_expert_is_refused_before_any_work(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=REFUSED[kind][1]):
        check_structure(write_model(kind, tmp_path / "model"))


def test_probabilities_are_not_taken_for_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4's routers record what softmax makes of their logits; the linear layer inside gives the logits."""
    model = write_model("gemma4_text", tmp_path / "model").load("auto")
    assert calibrate(model, batches(), LOGITS).layers[0]["logit_gram"].min() < 0
    monkeypatch.setattr(seam, "_scorer", lambda router: router)
    with pytest.raises(UserError, match="layer 0: what transformers records as the router's logits are probabilities"):
        calibrate(model, batches(), LOGITS)
