"""Expert usage by calibration set: planted divergences, and the command on a real tiny model."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from harness import usage

LAYERS, EXPERTS = 2, 8


def planted(experts: list[int], parts: int = 6, seed: int = 0) -> np.ndarray:
    """Choices of these experts only, 100 a part in each layer."""
    counted = np.zeros((parts, LAYERS, EXPERTS), np.int64)
    rng = np.random.default_rng(seed)
    for part in range(parts):
        for layer in range(LAYERS):
            counted[part, layer, experts] = rng.multinomial(100, [1 / len(experts)] * len(experts))
    return counted


def test_sets_without_an_expert_in_common_are_one_bit_apart_and_equal_ones_none() -> None:
    first, second = planted([0, 1, 2]), planted([3, 4, 5, 6])
    assert usage.mean_divergence([first, second]) == pytest.approx(1)
    assert usage.mean_divergence([first, first]) == 0
    table = usage.table({"a": first, "b": second})
    assert table.loc["a"].tolist() == ["0.000", "1.000"]


def test_divergence_is_that_of_the_definition() -> None:
    p, q = np.array([[0.5, 0.5, 0.0]]), np.array([[0.25, 0.25, 0.5]])
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.nansum(x * np.log2(x / m)) / 2 for x in (p, q)]
    assert usage.divergence(p, q) == pytest.approx(sum(terms))


def test_the_control_forgets_which_set_a_sequence_came_from() -> None:
    sets = {"a": planted([0, 1, 2], 8), "b": planted([3, 4, 5], 4), "c": planted([5, 6, 7], 4)}
    dealt = usage.shuffled(list(sets.values()), np.random.default_rng(0))
    assert [len(part) for part in dealt] == [8, 4, 4]
    assert np.array_equal(sum(part.sum(0) for part in dealt), sum(part.sum(0) for part in sets.values()))
    assert usage.mean_divergence(dealt) < usage.mean_divergence(list(sets.values())) / 2
    assert usage.conclusion(sets).endswith("p = 0.005.")


def test_sets_that_are_alike_are_not_found_to_differ() -> None:
    alike = {name: planted(list(range(EXPERTS)), seed=seed) for seed, name in enumerate("abc")}
    assert float(usage.conclusion(alike).rpartition("= ")[2].rstrip(".")) > 0.05


def test_the_command_counts_every_choice_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["calibration=tiny_code,tiny_sums", "calibration.sequences=4", f"store={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["usage", *arguments])
    assert usage.main() == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| tiny_code +\| 0\.000 +\| 0\.\d{3}", printed) and "Mean over pairs" in printed
    for suffix in ("png", "pdf"):
        assert (tmp_path / "figures" / f"usage-tiny.{suffix}").stat().st_size > 1_000
    (first, second) = (np.load(path) for path in sorted((tmp_path / "usage").glob("*.npy")))
    assert first.shape == second.shape == (4, 4, 32)
    assert (first.sum(-1) == 256 * 4).all(), "256 tokens a sequence, 4 experts a token"
    assert usage.main() == 0 and "cached" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["calibration=tiny_code"], ["calibration=tiny,tiny_code", "model.path=missing"]])
def test_bad_input_is_one_message(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["usage", *arguments, f"store={tmp_path / 'results'}"])
    assert usage.main() == 2
    assert capsys.readouterr().err.count("error: ") == 1
    assert not (tmp_path / "results").exists()
