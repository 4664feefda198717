"""Tests of significance against textbook values, independent formulas and planted truths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.significance import difference, holm, interval


def rights(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Two models' verdicts, so many items right for both, the first alone, the second alone, none."""
    a = np.array([1] * both + [1] * first + [0] * second + [0] * neither, float)
    b = np.array([1] * both + [0] * first + [1] * second + [0] * neither, float)
    return a[None], b[None]


def test_mcnemar_is_the_exact_binomial_test_of_what_one_alone_got_right() -> None:
    found = difference(*rights(50, 3, 12, 35))
    assert (found.won, found.lost, found.n, found.test) == (3, 12, 100, "McNemar")
    by_hand = 2 * sum(stats.binom.pmf(k, 15, 0.5) for k in range(4))
    assert found.p == pytest.approx(by_hand)
    assert found.mean == pytest.approx(-0.09)
    assert found.low < -0.09 < found.high < 0


def test_models_that_agree_on_every_item_are_not_separated_but_the_interval_has_a_width() -> None:
    found = difference(*rights(80, 0, 0, 20))
    assert found.p == 1 and found.mean == 0
    assert found.low == pytest.approx(-found.high) and 0.005 < found.high < 0.05


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(0, 40)] * 4).filter(lambda cells: sum(cells) > 0))
def test_swapping_the_models_turns_everything_round(cells: tuple[int, int, int, int]) -> None:
    a, b = rights(*cells)
    forth, back = difference(a, b), difference(b, a)
    assert forth.mean == pytest.approx(-back.mean) and forth.p == pytest.approx(back.p)
    assert forth.low == pytest.approx(-back.high) and (forth.won, forth.lost) == (back.lost, back.won)
    assert -1 <= forth.low <= forth.mean <= forth.high <= 1


def test_graded_items_of_one_seed_are_the_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 1, 40))
    found, expected = difference(a, b), stats.ttest_rel(a[0], b[0])
    assert found.test == "paired t" and found.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_seeds_and_items_both_count() -> None:
    """Many items cannot make up for seeds that disagree, nor many seeds for few items."""
    seeds = np.array([[0.9], [0.5], [0.1]]) * np.ones((1, 1000))
    assert not difference(seeds, np.full((1, 1000), 0.3)).is_separated
    items = np.ones((1000, 1)) * np.array([[0.9, 0.5, 0.1]])
    assert not difference(items, np.full((1, 3), 0.3)).is_separated


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_models_are_seldom_separated_and_intervals_cover(seeds: int) -> None:
    """Simulated: at most about 5 % false alarms of two equal models, and a true difference is found."""
    rng = np.random.default_rng(0)
    alarms, covered, found = 0, 0, 0
    for _ in range(400):
        shared = rng.random(120)
        a, b, worse = ((rng.random((seeds, 120)) < shared - loss).astype(float) for loss in (0, 0, 0.25))
        null = difference(a, b)
        alarms += null.is_separated
        covered += null.low <= 0 <= null.high
        found += difference(worse, b).is_separated
    assert alarms <= 0.07 * 400 and covered >= 0.93 * 400 and found > 0.9 * 400


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="3 and 4 items"):
        difference(np.ones((1, 3)), np.ones((1, 4)))
    with pytest.raises(ValueError, match="2 and 3 seeds"):
        difference(np.ones((2, 3)), np.ones((3, 3)))


def test_a_few_items_that_all_differ_alike_are_no_proof() -> None:
    assert difference(np.ones((2, 2)), np.zeros((2, 2))).p == pytest.approx(0.5)
    assert difference(np.ones((2, 12)), np.zeros((2, 12))).is_separated


def test_one_item_says_nothing() -> None:
    found = difference(np.array([[0.7]]), np.array([[0.2]]))
    assert found.p == 1 and found.low == -np.inf and found.high == np.inf


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.2]) == [0.2]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_interval_over_seeds_is_students() -> None:
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / np.sqrt(3), 2 + 4.3027 / np.sqrt(3)), abs=1e-4)
    assert interval([1.0]) == (-np.inf, np.inf)
