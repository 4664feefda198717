"""docs/faults.md names a test for every fault, and the tests exist."""

from __future__ import annotations

import ast
import re

from harness.models import ROOT

PAGE = (ROOT / "docs" / "faults.md").read_text()
ROWS = [line for line in PAGE.splitlines() if re.match(r"\| \d+ \|", line)]


def test_all_twenty_faults_are_there_and_each_names_a_test() -> None:
    assert [int(row.split("|")[1]) for row in ROWS] == list(range(1, 21))
    assert all("`test_" in row.split("|")[4] for row in ROWS)


def test_the_tests_it_names_exist_and_are_slow_where_it_says_so() -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`( \(slow\))?", "\n".join(ROWS))
    assert len(named) >= 20
    for file, test, slow in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        whole = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == (test or node.name)]
        assert found, f"{file}::{test}"
        marks = [*map(ast.unparse, found[0].decorator_list), *whole]
        assert not test or ({"pytest.mark.slow", "pytestmark = pytest.mark.slow"} & set(marks) != set()) == bool(
            slow
        ), f"{file}::{test}"
