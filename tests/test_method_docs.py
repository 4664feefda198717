"""docs/methods.md is what the docstrings say, and they say what a reader needs."""

from __future__ import annotations

import inspect
import re

import pytest

from harness.method_docs import FILE, names, page
from methods.none import NoCompression
from methods.random import Random
from tests.test_methods import make

PAPERS = [name for name in names() if not isinstance(make(name), NoCompression | Random)]


def test_the_page_is_made_from_the_docstrings() -> None:
    assert FILE.read_text() == page(), "run python -m harness.method_docs"


@pytest.mark.parametrize("name", PAPERS)
def test_a_docstring_has_idea_formula_source_and_differences(name: str) -> None:
    text = inspect.cleandoc(type(make(name)).__doc__ or "")
    idea, *rest = text.split("\n\n")
    assert idea.endswith(".") and len(idea) < 200, "the idea in a sentence"
    assert re.search(r"^    .*( = |->|\* sum)", text, re.MULTILINE), "a formula, indented"
    assert "Source: " in text and re.search(r"arXiv \d{4}\.\d{5}|our own", text)
    assert any(part.startswith("Where we differ: ") for part in rest)
