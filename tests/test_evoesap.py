"""EvoESAP and the allocations beside it: exact totals, planted optima, and what its fitness means."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.build import build
from harness.decide import decide
from harness.errors import UserError
from harness.search import Kept
from harness.stats import LayerStats, Stats
from methods import ScoreMethod
from methods.allocations import Budget, largest_remainder
from methods.allocations.evoesap import EvoESAP, Feasible, shapes
from methods.allocations.global_score import GlobalScore
from methods.budget_surface import best_options
from methods.m_smoe import MSMoE
from methods.random import Random
from methods.reap import REAP
from tests.test_rco import UNEVEN, ArraySearch, Killed, from_yaml, keeping, search_of, stats_with

SEEDS = st.integers(0, 10_000)


def esap(p: np.ndarray, q: np.ndarray) -> float:
    """The mean over positions of sum_v min(p(v), q(v)); p, q: [positions, V]."""
    return float(np.minimum(p, q).sum(axis=1).mean())


def distributions(seed: int, positions: int = 6, vocabulary: int = 11) -> tuple[np.ndarray, np.ndarray]:
    powers = np.exp(np.random.default_rng(seed).normal(size=(2, positions, vocabulary)) * 2)
    p, q = powers / powers.sum(axis=2, keepdims=True)
    return p, q


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_esap_is_one_minus_total_variation_and_the_mean_chance_of_acceptance(seed: int) -> None:
    p, q = distributions(seed)
    assert esap(p, q) == pytest.approx(1 - np.abs(p - q).sum(axis=1).mean() / 2, abs=1e-14)
    assert esap(p, q) == pytest.approx((q * np.minimum(1, p / q)).sum(axis=1).mean(), abs=1e-14)


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_esap_is_symmetric_and_bounded_below_by_the_divergence(seed: int) -> None:
    p, q = distributions(seed, positions=1)
    value, divergence = esap(p, q), float((p * np.log(p / q)).sum())
    assert 0 <= value <= 1 and value == esap(q, p)
    assert value >= 1 - np.sqrt(divergence / 2), "Pinsker"
    assert value >= np.exp(-divergence) / 2, "Bretagnolle and Huber"
    assert esap(p, p) == pytest.approx(1, abs=1e-15)


def test_a_speculative_decoder_accepts_so_often_and_what_it_emits_is_the_originals() -> None:
    draws = 200_000
    for seed in range(3):
        p, q = (rows[0] for rows in distributions(seed))
        rng = np.random.default_rng(seed)
        drafted = rng.choice(len(q), size=draws, p=q)
        accepted = rng.random(draws) < np.minimum(1, p / q)[drafted]
        rate = esap(p[None], q[None])
        assert abs(accepted.mean() - rate) < 3 * np.sqrt(rate * (1 - rate) / draws)
        rest = np.maximum(p - q, 0)
        emitted = np.where(accepted, drafted, rng.choice(len(p), size=draws, p=rest / rest.sum()))
        share = np.bincount(emitted, minlength=len(p)) / draws
        assert (np.abs(share - p) < 4 * np.sqrt(p * (1 - p) / draws)).all()


# Splitting a total


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_largest_remainders_split_the_total_exactly_within_capacities(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 7))
    capacity = dict(enumerate(data.draw(st.lists(st.integers(0, 9), min_size=layers, max_size=layers))))
    weights = dict(enumerate(data.draw(st.lists(st.floats(0, 1e3), min_size=layers, max_size=layers))))
    total = data.draw(st.integers(0, sum(capacity.values()) + 3))
    if total > sum(capacity.values()):
        with pytest.raises(UserError, match="experts are to go"):
            largest_remainder(weights, capacity, total)
        return
    share = largest_remainder(weights, capacity, total)
    assert sum(share.values()) == total
    assert all(0 <= share[layer] <= capacity[layer] for layer in capacity)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.integers(0, 60))
def test_with_room_for_all_every_share_is_its_quota_rounded_and_the_largest_remainders_round_up(
    weights: list[float], total: int
) -> None:
    size = len(weights)
    share = np.array(list(largest_remainder(dict(enumerate(weights)), dict.fromkeys(range(size), 99), total).values()))
    quota = total * np.array(weights) / sum(weights)
    assert (np.abs(share - quota) < 1 + 1e-6).all()
    up, down = share > quota + 1e-6, share < quota - 1e-6
    if up.any() and down.any():
        assert (quota % 1)[up].min() >= (quota % 1)[down].max() - 1e-6


def test_what_a_full_layer_cannot_take_goes_to_the_others() -> None:
    assert largest_remainder({0: 8.0, 1: 1.0, 2: 1.0}, {0: 3, 1: 9, 2: 9}, 10) == {0: 3, 1: 4, 2: 3}
    assert largest_remainder({0: 0.0, 1: 0.0}, {0: 3, 1: 1}, 4) == {0: 3, 1: 1}


# Plans


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 12))
def test_feasible_plans_are_counted_and_numbered(capacity: list[int], total: int) -> None:
    feasible = Feasible(tuple(capacity), total)
    every = [plan for plan in itertools.product(*(range(most + 1) for most in capacity)) if sum(plan) == total]
    assert feasible.number == len(every)
    assert [feasible.plan(index) for index in range(feasible.number)] == every


def test_random_plans_are_uniform_over_all_feasible_ones_however_many() -> None:
    feasible, rng = Feasible((2, 3, 2), 4), np.random.default_rng(0)
    drawn = Counter(feasible.random(rng) for _ in range(8000))
    assert len(drawn) == feasible.number == 8
    assert all(abs(times - 1000) < 4 * np.sqrt(1000 * 7 / 8) for times in drawn.values())
    large = Feasible((120,) * 48, 3072)
    assert large.number > 2**200
    plan = large.random(rng)
    assert sum(plan) == 3072 and max(plan) <= 120


def test_depth_profiles_are_positive_and_say_what_they_are_called() -> None:
    found = list(shapes(8, np.random.default_rng(0)))
    assert len(found) == 14 and all(len(shape) == 8 and (shape > 0).all() for shape in found)
    uniform, _, up, down, mid, trough, front, back, early, late, first, last, alternating, deep = found
    assert np.ptp(uniform) == 0
    assert (np.diff(up) > 0).all() and (np.diff(down) < 0).all()
    assert np.argmax(mid) in (3, 4) and np.argmin(trough) in (3, 4)
    assert front[1] / front[0] == pytest.approx(0.7) and back[1] / back[0] == pytest.approx(1.3)
    for shape, high in ((early, range(4)), (late, range(4, 8)), (first, range(2)), (last, (6, 7))):
        assert np.flatnonzero(shape == shape.max()).tolist() == list(high)
    assert (alternating[::2] > alternating[1::2]).all()
    assert (np.diff(deep[:5]) > 0).all() and np.ptp(deep[4:]) == 0
    for layers in (1, 2, 3):
        assert all((shape > 0).all() for shape in shapes(layers, np.random.default_rng(0)))


def evoesap(**changes: object) -> EvoESAP:
    return from_yaml("allocation/evoesap", **changes)


def budget_of(search: ArraySearch, keep: Mapping[int, int]) -> Budget:
    return Budget(search.experts, keep, search.top_k)


def test_the_first_population_is_distinct_feasible_and_begins_uniform() -> None:
    search = search_of(0, {layer: 16 for layer in range(6)})
    budget = budget_of(search, keeping(search, 8))
    for population in (4, 14, 40):
        plans = evoesap(population=population).first_population(budget, np.random.default_rng(0))
        assert len(plans) == len(set(plans)) == population
        assert plans[0] == (8,) * 6
        assert all(sum(plan) == 48 and min(plan) >= 0 and max(plan) <= 14 for plan in plans)


def test_a_population_as_large_as_all_plans_is_all_plans() -> None:
    search = search_of(0, {0: 6, 1: 6, 2: 6})
    for population in (19, 30):
        plans = evoesap(population=population).first_population(
            budget_of(search, keeping(search, 4)), np.random.default_rng(0)
        )
        assert len(plans) == len(set(plans)) == 19


def test_twenty_thousand_level_switches_keep_total_and_bounds() -> None:
    method, rng = evoesap(), np.random.default_rng(0)
    capacity, counts = (4, 0, 9, 1, 6), (2, 0, 5, 0, 3)
    seen, changed = set(), []
    for _ in range(20_000):
        child = method.child(counts, capacity, rng)
        assert sum(child) == 10 and all(0 <= count <= most for count, most in zip(child, capacity, strict=True))
        changed.append(np.abs(np.subtract(child, counts)).sum() / 2)
        counts = child
        seen.add(counts)
    assert len(seen) == Feasible(capacity, 10).number, "every plan can be reached"
    assert max(changed) <= method.max_step * method.max_switches


def test_a_child_of_one_small_switch_differs_by_one_expert_of_two_layers() -> None:
    method, rng = evoesap(max_step=1, max_switches=1), np.random.default_rng(0)
    for _ in range(200):
        moved = np.subtract(method.child((3, 3, 3, 3), (6, 6, 6, 6), rng), 3)
        assert sorted(moved) == [-1, 0, 0, 1]
    assert method.child((4, 2), (4, 2), rng) == (4, 2), "there is no other plan"


# The search


@dataclass
class CountSearch(ArraySearch):
    """Acceptance is a known function of how many experts go of each layer; all others are refused."""

    value: Callable[[tuple[int, ...]], float] = lambda counts: 1.0

    def acceptance(self, kept: Kept) -> float:
        self._gone(kept)  # checks top_k
        self.measured.append(tuple(tuple(kept[layer]) for layer in self.experts))
        return self.value(tuple(count - len(kept[layer]) for layer, count in self.experts.items()))


def counting(experts: Mapping[int, int], cost: np.ndarray, **more: Any) -> CountSearch:
    """Layer l loses cost[l] for the square of what goes."""
    return CountSearch(
        experts,
        2,
        np.zeros((0, 0)),
        np.zeros((1, 0)),
        value=lambda counts: float(np.exp(-cost @ np.square(counts))),
        **more,
    )


def best_value(search: CountSearch, cost: np.ndarray, total: int) -> float:
    """The acceptance of the best allocation, by dynamic programming."""
    options = np.arange(max(search.experts.values()) - 1)
    fits = np.stack([np.where(options <= most - 2, options, 10**6) for most in search.experts.values()])
    counts = best_options(-cost[:, None] * options**2.0, fits, total)
    return search.value(tuple(counts.tolist()))


def found_by(method: EvoESAP, search: ArraySearch, keep: Mapping[int, int]) -> dict[int, int]:
    found = method.keep(stats_with(search), REAP(), budget_of(search, keep))
    assert sum(found.values()) == sum(keep.values())
    assert search.notes["counts"] == {str(layer): count for layer, count in found.items()}
    return found


@pytest.mark.parametrize("seed", range(4))
def test_where_all_plans_fit_the_population_the_best_of_all_is_found(seed: int) -> None:
    """On a loss that is no function of counts alone: tried one by one."""
    search = search_of(seed, {0: 6, 1: 6, 2: 6})
    stats = stats_with(search)
    found = found_by(evoesap(population=19, generations=1), search, keeping(search, 4))
    order = {count: decide(REAP(), stats, keeping(search, count)) for count in range(2, 7)}
    every = {
        keep: search.acceptance({layer: order[count][layer].kept_rows for layer, count in enumerate(keep)})
        for keep in itertools.product(range(2, 7), repeat=3)
        if sum(keep) == 12
    }
    assert len(every) == 19
    assert every[tuple(found.values())] == max(every.values()) == search.notes["fitness"]
    assert search.notes["uniform_fitness"] == every[4, 4, 4]


def test_evolution_finds_the_planted_allocation_and_never_measures_a_plan_twice() -> None:
    """6 layers of 16 that bear losses differently: the best of 418,503 plans, from about 500 of them."""
    assert Feasible((14,) * 6, 42).number == 418_503
    for seed in range(5):
        cost = np.random.default_rng(seed).uniform(0.0002, 0.005, 6)
        search = counting({layer: 16 for layer in range(6)}, cost)
        found_by(evoesap(seed=seed, population=16, generations=50), search, keeping(search, 9))
        assert len(search.measured) == len(set(search.measured)) <= 16 + 49 * 12
        notes = search.notes
        assert notes["fitness"] == pytest.approx(best_value(search, cost, 42), rel=1e-12)
        assert notes["uniform_fitness"] == pytest.approx(search.value((7,) * 6))
        assert notes["uniform_fitness"] < 0.9 * notes["fitness"]
        assert len(notes["best_per_generation"]) == 50
        assert (np.diff(notes["best_per_generation"]) >= 0).all()
        assert notes["best_per_generation"][-1] == notes["fitness"]


def test_layers_may_differ_in_size_and_none_falls_below_top_k() -> None:
    cost = np.array([1e-4, 0.05, 0.05])
    search = counting(UNEVEN, cost)
    found = found_by(evoesap(), search, {1: 4, 2: 3, 5: 5})
    assert found[1] == 2, "all that top-2 allows goes where it costs nothing"
    assert search.notes["fitness"] == pytest.approx(best_value(search, cost, 6))
    with pytest.raises(UserError, match="13 experts are to go"):
        found_by(evoesap(), search, {1: 2, 2: 2, 5: 1})


def test_with_nothing_to_drop_the_acceptance_is_one() -> None:
    search = search_of(0, UNEVEN)
    assert found_by(evoesap(), search, UNEVEN) == UNEVEN
    assert len(search.measured) == 1 and search.notes["fitness"] == search.notes["uniform_fitness"] == 1.0


def test_where_no_plan_is_better_the_uniform_one_is_kept() -> None:
    search = counting({0: 8, 1: 8, 2: 8}, np.zeros(3))
    assert found_by(evoesap(), search, keeping(search, 5)) == keeping(search, 5)


def test_what_is_measured_is_the_methods_own_order_or_that_of_another() -> None:
    for order, expected in ((None, REAP()), (REAP(), Random(3))):
        search = search_of(1, UNEVEN)
        stats, method = stats_with(search), REAP() if order is None else Random(3)
        evoesap(generations=3, order=order).keep(stats, method, budget_of(search, {1: 4, 2: 3, 5: 4}))
        used = order or expected
        for kept in search.measured:
            plan = decide(used, stats, dict(zip(UNEVEN, map(len, kept), strict=True)))
            assert kept == tuple(layer.kept_rows for layer in plan.values())


def test_a_method_that_merges_has_no_order() -> None:
    search = search_of(0, UNEVEN)
    layers = {
        layer: LayerStats(count, 1, {"count": np.ones(count), "gate": np.ones(count), "logit_gram": np.eye(count)})
        for layer, count in UNEVEN.items()
    }
    with pytest.raises(UserError, match="merges experts"):
        evoesap().keep(Stats(layers, search=lambda sequences: search), merging(), budget_of(search, UNEVEN))


def merging() -> MSMoE:
    return from_yaml("method/m_smoe")


@pytest.mark.parametrize("patience", [1, 4, 6])
def test_an_interrupted_evolution_ends_where_an_uninterrupted_one_does(patience: int) -> None:
    keep, method = {1: 4, 2: 3, 5: 4}, evoesap(generations=6)
    whole, parted = search_of(3, UNEVEN), search_of(3, UNEVEN, patience=patience)
    expected = found_by(method, whole, keep)
    with pytest.raises(Killed):
        found_by(method, parted, keep)
    again = replace(parted, patience=None, measured=[])
    assert found_by(method, again, keep) == expected
    assert again.notes == whole.notes and again.place == whole.place
    assert [*parted.measured, *again.measured] == whole.measured, "and nothing is measured twice"


def test_one_seed_one_plan_and_another_seed_another_search() -> None:
    searches = [search_of(7, {layer: 12 for layer in range(5)}) for _ in range(3)]
    for search, seed in zip(searches, (3, 3, 4), strict=True):
        found_by(evoesap(seed=seed), search, keeping(search, 7))
    assert searches[0].measured == searches[1].measured != searches[2].measured
    assert searches[0].notes == searches[1].notes


def test_the_order_is_set_in_yaml() -> None:
    method = evoesap(order={"_target_": "methods.reap.REAP"})
    assert method.needs == {"search"} | REAP.needs and evoesap().needs == {"search"}
    with pytest.raises(UserError, match="order"):
        evoesap(order="reap")


@pytest.mark.parametrize("changes", [{"population": 3}, {"elites": 0}, {"max_step": 0}, {"generations": 0}])
def test_options_that_make_no_evolution_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        evoesap(**changes)


# One ranking of all experts: methods/allocations/global_score.py


def ranked(seed: int) -> tuple[Stats, Budget]:
    rng = np.random.default_rng(seed)
    experts = {0: 4, 3: 5, 4: 4}
    layers = {
        layer: LayerStats(count, 9, {"count": np.full(count, 9.0), "gate_norm": rng.uniform(0, 9, count) * (layer + 1)})
        for layer, count in experts.items()
    }
    return Stats(layers), Budget(experts, {0: 2, 3: 3, 4: 3}, 2)


@pytest.mark.parametrize("normalise", ["none", "sum", "max"])
def test_a_global_ranking_drops_the_least_total_score_that_top_k_allows(normalise: str) -> None:
    for seed in range(8):
        stats, budget = ranked(seed)
        keep = GlobalScore(normalise).keep(stats, REAP(), budget)
        divisor = {"none": lambda s: 1.0, "sum": np.sum, "max": np.max}[normalise]
        scores = {layer: REAP().score(here) / divisor(REAP().score(here)) for layer, here in stats.layers.items()}
        lost = {
            counts: sum(np.sort(scores[layer])[:drop].sum() for layer, drop in zip(scores, counts, strict=True))
            for counts in itertools.product(range(3), range(4), range(3))
            if sum(counts) == budget.dropped == 5
        }
        best = min(lost, key=lambda counts: lost[counts])
        assert keep == {layer: budget.experts[layer] - drop for layer, drop in zip(scores, best, strict=True)}


def test_normalised_scores_do_not_see_a_layers_scale_and_plain_ones_do() -> None:
    stats, budget = ranked(0)
    sums = stats.layers[0].sums
    layers = {**stats.layers, 0: LayerStats(4, 9, {**sums, "gate_norm": 1000 * sums["gate_norm"]})}
    for normalise in ("sum", "max"):
        method = GlobalScore(normalise)
        assert method.keep(Stats(layers), REAP(), budget) == method.keep(stats, REAP(), budget)
    assert GlobalScore("none").keep(Stats(layers), REAP(), budget)[0] == 4


def test_equal_scores_fall_to_the_methods_second_score() -> None:
    """As within a layer: frequency's ties are broken by the gates."""
    frequency: ScoreMethod = from_yaml("method/frequency")
    layers = {
        layer: LayerStats(3, 9, {"count": np.full(3, 3.0), "gate": np.array(gate)})
        for layer, gate in {0: [1.0, 2, 9], 1: [5.0, 6, 7]}.items()
    }
    keep = GlobalScore("none").keep(Stats(layers), frequency, Budget({0: 3, 1: 3}, {0: 2, 1: 2}, 1))
    assert keep == {0: 1, 1: 3}


def test_layers_without_any_score_go_first_and_do_not_divide_by_zero() -> None:
    stats, budget = ranked(0)
    layers = {**stats.layers, 4: LayerStats(4, 9, {"count": np.zeros(4), "gate_norm": np.zeros(4)})}
    for normalise in ("none", "sum", "max"):
        assert GlobalScore(normalise).keep(Stats(layers), REAP(), budget)[4] == 2


def test_a_global_ranking_needs_a_score_and_room() -> None:
    stats, budget = ranked(0)
    with pytest.raises(UserError, match="no score of single experts"):
        GlobalScore("sum").keep(stats, Random(0), budget)
    with pytest.raises(UserError, match="8 experts are to go"):
        GlobalScore("sum").keep(stats, REAP(), replace(budget, uniform={0: 1, 3: 2, 4: 2}))
    with pytest.raises(UserError, match="mean is not one of"):
        build("allocation", {"_target_": "methods.allocations.global_score.GlobalScore", "normalise": "mean"})
    assert from_yaml("allocation/global_score") == GlobalScore("sum")
