"""What the README shows is true: the two files it adds a method with are found and conform, with no edit elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import readme
from harness.errors import UserError
from harness.models import ROOT
from harness.sweep import expand

README = (ROOT / "README.md").read_text()


def shown_files() -> dict[str, str]:
    """Path and content of every file that the README shows in full."""
    return dict(re.findall(r"^`([\w/.]+)`\n\n```\w+\n(.*?)```$", README, re.MULTILINE | re.DOTALL))


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


def test_it_shows_the_finished_table_of_the_demo() -> None:
    _, table, _ = readme.between_markers(README, ["README.md", "sweep=demo"])
    for cell in expand(["sweep=demo"]).cells:
        assert re.search(rf"\| {cell.label} +\| {cell.ratio:.4g} +\| \d", table), cell.slug
    assert "✗" not in table.split("\n\n")[0] and "—" not in table.split("\n\n")[0]


def test_the_model_card_shows_the_finished_table_of_calibration_domains() -> None:
    arguments = ["tasks/tiny/model/README.md", "sweep=domains"]
    _, table, _ = readme.between_markers((ROOT / arguments[0]).read_text(), arguments)
    for cell in expand([*arguments[1:], "seed=0"]).cells:
        calibration = cell.calibration.name if cell.calibrates else "none"
        assert re.search(rf"\| {cell.label} +\| {calibration} +\| {cell.ratio:.4g} +\| \d", table), cell.slug
    assert "✗" not in table.split("\n\n")[0] and "—" not in table.split("\n\n")[0]


@pytest.mark.slow
def test_the_zoo_shows_every_method_at_every_ratio() -> None:
    arguments = ["docs/zoo.md", "sweep=zoo"]
    _, table, _ = readme.between_markers((ROOT / arguments[0]).read_text(), arguments)
    *shown, footer = table.strip().split("\n\n")
    assert footer.startswith("Scores in points")
    cells = [cell for cell in expand([*arguments[1:], "seed=0"]).cells if cell.compresses]
    titles, rows = shown[::2], shown[1::2]
    assert len(titles) == 6, "five metrics and the reconstruction error"
    for made in rows:
        header, _, *lines = made.splitlines()
        assert re.findall(r"0\.\d+", header) == [f"{ratio:.4g}" for ratio in dict.fromkeys(c.ratio for c in cells)]
        found = [[entry.strip() for entry in line.split("|")[2:-1]] for line in lines]
        assert [label for label, *_ in found] == list(dict.fromkeys(cell.label for cell in cells))
        assert all(re.match(r"\d", value) for _, *values in found for value in values)


def test_the_systems_are_all_shown_at_both_ratios() -> None:
    arguments = ["docs/systems.md", "sweep=systems"]
    _, table, _ = readme.between_markers((ROOT / arguments[0]).read_text(), arguments)
    scores, *_ = table.strip().split("\n\n")
    shown = {tuple(part.strip() for part in line.split("|")[2:4]) for line in scores.splitlines()[2:]}
    cells = expand([arguments[1], "seed=0"]).cells
    assert shown == {(cell.label, f"{cell.ratio:g}") for cell in cells} and len(shown) == 33


def test_a_table_needs_its_markers() -> None:
    with pytest.raises(UserError, match="no place for this table"):
        readme.between_markers("text", ["README.md", "sweep=demo"])


def test_every_file_it_links_to_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the two files added, and nothing else changed."""
    copy = tmp_path_factory.mktemp("checkout") / "project"
    for folder in ("harness", "methods", "conf", "tasks", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, copy)
    files = shown_files()
    assert sorted(files) == ["conf/method/mean_gate.yaml", "methods/mean_gate.py"]
    for path, content in files.items():
        assert not (copy / path).exists()
        (copy / path).write_text(content)
    return copy


def test_the_conformance_tests_find_the_new_method(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_methods.py", "-k", "mean_gate", "-p", "no:cacheprovider"],
        cwd=checkout, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 4


def test_the_new_method_composes_into_a_cell(checkout: Path) -> None:
    code = (
        "from harness.sweep import expand; import numpy as np\n"
        "from harness.stats import LayerStats\n"
        "sweep = expand(['method=mean_gate', 'ratio=0.25']); sweep.check(); cell, = sweep.cells\n"
        "layer = LayerStats(3, 9, {'gate': np.array([1.0, 6, 4]), 'count': np.array([1.0, 2, 8])})\n"
        "print(cell.label, cell.method.plan_layer(layer, 2).kept_rows)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "mean gate (0, 1)", done.stderr
