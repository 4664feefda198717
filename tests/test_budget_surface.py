"""The geometry of exact budgets against finite differences, and its discrete choices against brute force."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UserError
from methods.budget_surface import (
    Adam,
    BudgetSurface,
    best_options,
    capped_top,
    project,
    retract,
    softmax,
)

SEEDS = st.integers(0, 10_000)


def surface_and_point(seed: int, groups: int = 7, options: int = 4) -> tuple[BudgetSurface, np.ndarray]:
    """A surface of random costs through a random point."""
    rng = np.random.default_rng(seed)
    alpha, costs = rng.normal(size=(groups, options)), rng.uniform(0, 5, (groups, options))
    return BudgetSurface(costs, float((softmax(alpha) * costs).sum())), alpha


def difference(function, at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of a scalar function of an array."""
    gradient = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        move = np.zeros_like(at)
        move[place] = step
        gradient[place] = (function(at + move) - function(at - move)) / (2 * step)
    return gradient


@pytest.mark.parametrize("seed", range(5))
def test_the_normal_is_the_gradient_of_the_cost(seed: int) -> None:
    surface, alpha = surface_and_point(seed)
    np.testing.assert_allclose(surface.normal(alpha), difference(surface.cost, alpha), atol=2e-9)


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_a_projected_vector_is_tangent_and_projecting_it_again_changes_nothing(seed: int) -> None:
    surface, alpha = surface_and_point(seed)
    vector = np.random.default_rng(seed + 1).normal(size=alpha.shape)
    tangent = surface.project(vector, alpha)
    assert abs((tangent * surface.normal(alpha)).sum()) < 1e-12
    np.testing.assert_allclose(surface.project(tangent, alpha), tangent, atol=1e-13)
    assert np.linalg.norm(tangent) <= np.linalg.norm(vector)


@pytest.mark.parametrize("seed", range(5))
def test_the_cost_grows_along_the_costs_by_their_variance(seed: int) -> None:
    surface, alpha = surface_and_point(seed)
    along = [surface.cost(alpha + t * surface.costs) for t in np.linspace(-3, 3, 61)]
    assert (np.diff(along) > 0).all()
    p = softmax(alpha)
    mean = (p * surface.costs).sum(axis=1, keepdims=True)
    variance = (p * (surface.costs - mean) ** 2).sum()
    slope = (surface.cost(alpha + 1e-5 * surface.costs) - surface.cost(alpha - 1e-5 * surface.costs)) / 2e-5
    assert slope == pytest.approx(variance, rel=1e-8)


@pytest.mark.parametrize("budget", [0.01, 1, 77.5, 150, 299, 299.99])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_a_retraction_meets_even_extreme_budgets(budget: float, spread: float) -> None:
    surface = BudgetSurface(np.tile([0.0, 1.0], (300, 1)), budget)
    alpha = np.random.default_rng(0).normal(size=(300, 2)) * spread
    back = surface.retract(alpha)
    assert abs(surface.cost(back) - budget) <= 1e-9
    moved = back - alpha
    assert np.ptp(moved[:, 1]) < 1e-9 and (moved[:, 0] == 0).all(), "along the costs, so no ranking changes"
    np.testing.assert_array_equal(surface.retract(back), back)


def test_what_no_probabilities_can_meet_is_no_budget() -> None:
    for budget in (0, 5):
        with pytest.raises(AssertionError):
            BudgetSurface(np.tile([0.0, 1.0], (5, 1)), budget)


@pytest.mark.parametrize("seed", range(5))
def test_a_tangent_step_leaves_the_budget_to_second_order_only(seed: int) -> None:
    surface, alpha = surface_and_point(seed)
    vector = np.random.default_rng(seed + 1).normal(size=alpha.shape)
    tangent = surface.project(vector, alpha)
    tangent /= np.linalg.norm(tangent)
    drift = [abs(surface.cost(alpha + t * tangent) - surface.budget) for t in (1e-1, 1e-2, 1e-3)]
    assert drift[0] / drift[1] == pytest.approx(100, rel=0.5)
    assert drift[1] / drift[2] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_adam_stays_on_the_surface_and_carries_its_first_moment_along(seed: int) -> None:
    surface, alpha = surface_and_point(seed)
    blocks = ((slice(None), surface),)
    rng = np.random.default_rng(seed)
    now, second = Adam.at(alpha), np.zeros_like(alpha)
    for _ in range(30):
        gradient = rng.normal(size=alpha.shape)
        second = 0.999 * second + 0.001 * surface.project(gradient, now.alpha) ** 2
        now = now.step(gradient, 0.3, blocks)
        assert abs(surface.cost(now.alpha) - surface.budget) <= 1e-9
        assert abs((now.first * surface.normal(now.alpha)).sum()) < 1e-12
    np.testing.assert_allclose(now.second, second, rtol=1e-12, err_msg="not transported")


def test_adam_finds_the_lowest_point_of_a_surface() -> None:
    """A linear loss of the probabilities: in the end the cheapest way to spend the budget, here unique and integral."""
    rng = np.random.default_rng(0)
    costs, value = np.tile([0.0, 1.0], (12, 1)), rng.uniform(0, 1, 12)
    blocks = ((slice(0, 12), BudgetSurface(costs, 5)),)
    now = Adam.at(retract(np.zeros((12, 2)), blocks))
    for _ in range(300):
        p = softmax(now.alpha)
        slope = np.stack([np.zeros(12), value], axis=1)
        now = now.step(p * (slope - (p * slope).sum(axis=1, keepdims=True)), 0.3, blocks)
    chosen = softmax(now.alpha)[:, 1]
    assert set(np.argsort(-chosen)[:5]) == set(np.argsort(value)[:5])
    assert value @ chosen == pytest.approx(np.sort(value)[:5].sum(), abs=0.02)


def test_every_block_keeps_its_own_budget() -> None:
    costs = np.tile([0.0, 1.0], (6, 1))
    first, second = BudgetSurface(costs, 2), BudgetSurface(costs[:4], 3)
    blocks = ((slice(0, 6), first), (slice(6, 10), second))
    rng = np.random.default_rng(0)
    alpha = retract(rng.normal(size=(10, 2)), blocks)
    assert first.cost(alpha[:6]) == pytest.approx(2, abs=1e-9)
    assert second.cost(alpha[6:]) == pytest.approx(3, abs=1e-9)
    tangent = project(rng.normal(size=(10, 2)), alpha, blocks)
    assert abs((tangent[:6] * first.normal(alpha[:6])).sum()) < 1e-12
    assert abs((tangent[6:] * second.normal(alpha[6:])).sum()) < 1e-12


def test_adam_survives_its_file_to_the_last_bit() -> None:
    surface, alpha = surface_and_point(0)
    now = Adam.at(alpha).step(np.random.default_rng(0).normal(size=alpha.shape), 0.1, ((slice(None), surface),))
    again = Adam.from_json(json.loads(json.dumps(now.to_json())))
    for name in ("alpha", "first", "second"):
        np.testing.assert_array_equal(getattr(now, name), getattr(again, name))
    assert again.steps == 1


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(1, 4))
def test_dynamic_programming_finds_what_trying_everything_finds(seed: int, groups: int, options: int) -> None:
    rng = np.random.default_rng(seed)
    values, costs = rng.normal(size=(groups, options)), rng.integers(0, 6, (groups, options))
    budget = int(rng.integers(0, 15))
    rows = np.arange(groups)
    fitting = [
        choice
        for choice in itertools.product(range(options), repeat=groups)
        if costs[rows, list(choice)].sum() == budget
    ]
    if not fitting:
        with pytest.raises(UserError, match=f"costs exactly {budget}"):
            best_options(values, costs, budget)
        return
    choice = best_options(values, costs, budget)
    assert costs[rows, choice].sum() == budget
    assert values[rows, choice].sum() == pytest.approx(max(values[rows, list(other)].sum() for other in fitting))


def test_a_budget_is_met_exactly_or_not_at_all() -> None:
    """Even where less could be spent: costs of 2 and 4 never make 5."""
    with pytest.raises(UserError, match="costs exactly 5"):
        best_options(np.zeros((3, 3)), np.array([[0, 2, 4]] * 3), 5)


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_the_top_of_two_options_is_the_dynamic_programme(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, budget = rng.normal(size=(12, 2)), int(rng.integers(0, 13))
    taken = capped_top(budget, np.zeros(12, dtype=int), {0: 12}, values[:, 1] - values[:, 0])
    np.testing.assert_array_equal(taken, best_options(values, np.array([[0, 1]] * 12), budget))


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_taking_the_best_under_capacities_is_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    group, score = rng.integers(0, 3, 9), rng.normal(size=9)
    capacity = {key: int(rng.integers(0, 4)) for key in range(3)}
    room = sum(min(capacity[key], int((group == key).sum())) for key in range(3))
    number = int(rng.integers(0, room + 1))
    taken = capped_top(number, group, capacity, score)
    assert taken.sum() == number and all((taken & (group == key)).sum() <= capacity[key] for key in range(3))
    best = max(
        score[list(members)].sum()
        for members in itertools.combinations(range(9), number)
        if all((group[list(members)] == key).sum() <= capacity[key] for key in range(3))
    )
    assert score[taken].sum() == pytest.approx(best)


def test_of_equal_scores_the_next_decides_and_then_the_highest_index_goes() -> None:
    score, second = np.array([1.0, 1, 1, 0, 1]), np.array([0.0, 2, 0, 9, 0])
    taken = [
        np.flatnonzero(capped_top(number, np.zeros(5, dtype=int), {0: 5}, score, second)).tolist()
        for number in range(1, 6)
    ]
    assert taken == [[1], [1, 4], [1, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]
