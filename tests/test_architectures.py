"""Every architecture of docs/architectures.md goes the way that its row says."""

from __future__ import annotations

import pytest

from harness.models import ROOT
from tests.architectures import FAMILIES, row, table

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
