"""RCO on losses known in closed form: planted optima, exact budgets, and an interrupted search that changes nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from harness.build import build
from harness.decide import decide
from harness.errors import UserError
from harness.models import ROOT
from harness.plan import LayerPlan, Plan
from harness.search import Kept
from harness.stats import LayerStats, Stats
from methods.allocations import Budget
from methods.allocations.rco_counts import Counts, RCOCounts
from methods.budget_surface import softmax
from methods.random import Random
from methods.rco import RCO, Pruning, antithetic_gumbel, straight_through
from methods.reap import REAP


class Killed(Exception):  # noqa: N818 - not an error
    """What interrupts a search."""


@dataclass
class ArraySearch:
    """A search whose loss is z^T pairs z + <single, z>, z = 1 - survival of all experts, layers one after another.

    pairs: [N, N]. single: [batches, N], of which the mean counts when deployed. Everything it is asked must respect
    top_k. It is killed when it has remembered ``patience`` states, or before its ``nerve``-th gradient.
    """

    experts: Mapping[int, int]
    top_k: int
    pairs: np.ndarray
    single: np.ndarray
    patience: int | None = None
    nerve: int | None = None
    place: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    masks: list[np.ndarray] = field(default_factory=list)
    measured: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)

    @property
    def batches(self) -> int:
        return len(self.single)

    def loss(self, gone: np.ndarray, single: np.ndarray) -> float:
        return float(gone @ self.pairs @ gone + single @ gone)

    def _gone(self, kept: Kept) -> np.ndarray:
        assert list(kept) == list(self.experts)
        assert all(len(kept[layer]) >= min(self.top_k, count) for layer, count in self.experts.items())
        return np.concatenate([~np.isin(np.arange(count), kept[layer]) for layer, count in self.experts.items()]) * 1.0

    def divergence(self, kept: Kept) -> float:
        self.measured.append(tuple(tuple(int(expert) for expert in kept[layer]) for layer in self.experts))
        return self.loss(self._gone(kept), self.single.mean(axis=0))

    def acceptance(self, kept: Kept) -> float:
        return float(np.exp(-self.divergence(kept)))

    def gradient(self, survival: Mapping[int, np.ndarray], batch: int) -> tuple[float, dict[int, np.ndarray]]:
        if self.nerve is not None:
            self.nerve -= 1
            if self.nerve < 0:
                raise Killed
        gone = 1 - np.concatenate([survival[layer] for layer in self.experts])
        self.masks.append(gone)
        by_survival = -(2 * self.pairs @ gone + self.single[batch])
        parts = np.split(by_survival, np.cumsum(list(self.experts.values()))[:-1])
        return self.loss(gone, self.single[batch]), dict(zip(self.experts, parts, strict=True))

    def recall(self) -> dict[str, Any] | None:
        return json.loads(self.place[-1]) if self.place else None

    def remember(self, state: Mapping[str, Any]) -> None:
        self.place.append(json.dumps(state, allow_nan=False))
        if self.patience is not None and len(self.place) >= self.patience:
            raise Killed

    def note(self, **facts: Any) -> None:
        self.notes = json.loads(json.dumps(facts))


def search_of(seed: int, experts: Mapping[int, int], top_k: int = 2, rough: float = 1.0, **more: Any) -> ArraySearch:
    """Random costs of single experts, and of pairs as strong as ``rough``; three batches that differ."""
    rng, size = np.random.default_rng(seed), sum(experts.values())
    factor = rng.normal(size=(size, size)) * np.sqrt(rough / size)
    noise = rng.normal(size=(3, size)) / 5
    return ArraySearch(experts, top_k, factor @ factor.T, rng.uniform(0, 2, size) + noise - noise.mean(axis=0), **more)


def stats_with(search: ArraySearch, seed: int = 0) -> Stats:
    """Statistics from which REAP learns nothing about the loss."""
    rng = np.random.default_rng(seed)
    sums = {
        layer: {"count": np.ones(count), "gate_norm": rng.uniform(1, 2, count)}
        for layer, count in search.experts.items()
    }
    layers = {layer: LayerStats(len(here["count"]), 1, here) for layer, here in sums.items()}
    return Stats(layers, search=lambda sequences: search)


def from_yaml(file: str, **changes: object) -> Any:
    """The method or allocation of a file of conf/ with these changes."""
    group, _, _ = file.partition("/")
    config = OmegaConf.create({"seed": 0, "it": OmegaConf.load(ROOT / "conf" / f"{file}.yaml")})
    fields = dict(OmegaConf.to_container(config, resolve=True)["it"])
    assert fields.pop("label")
    return build(group, {**fields, **changes})


def rco(**changes: object) -> RCO:
    return from_yaml("method/rco", **changes)


def gone_of(plan: Mapping[int, LayerPlan]) -> np.ndarray:
    return np.concatenate([[route is None for route in layer.routes] for layer in plan.values()]) * 1.0


def subsets(size: int, number: int) -> np.ndarray:
    """Every indicator [C, size] of so many."""
    rows = list(itertools.combinations(range(size), number))
    found = np.zeros((len(rows), size))
    for row, members in zip(found, rows, strict=True):
        row[list(members)] = 1
    return found


def keeping(search: ArraySearch, keep: int) -> dict[int, int]:
    return dict.fromkeys(search.experts, keep)


UNEVEN = {1: 6, 2: 5, 5: 7}  # layers need be neither alike nor in a row


def exactly(search: ArraySearch, gone: np.ndarray, number: int) -> bool:
    """Whether a mask drops so many and leaves every layer its top_k."""
    parts = np.split(gone, np.cumsum(list(search.experts.values()))[:-1])
    return gone.sum() == number and all(len(part) - part.sum() >= search.top_k for part in parts)


@pytest.mark.parametrize("number", [1, 6, 11, 12])  # 12 is all that top-2 leaves
def test_every_mask_of_the_search_and_the_plan_drop_exactly_the_budget(number: int) -> None:
    search = search_of(0, UNEVEN)
    keep = dict(UNEVEN)
    keep[5] -= min(number, 5)
    keep[1] -= min(max(number - 5, 0), 4)
    keep[2] -= max(number - 9, 0)
    plan = decide(rco(steps=20), stats_with(search), keep)
    assert len(search.masks) == 20 * 4 + search.batches, "four samples a step, and the search's KL of the choice"
    assert all(exactly(search, gone, number) for gone in [*search.masks, gone_of(plan)])
    Plan(plan).validate(UNEVEN, top_k=2)
    assert search.notes["budget"] == number
    assert search.notes["counts"] == {str(layer): len(here.kept_rows) for layer, here in plan.items()}


def test_per_layer_every_mask_drops_each_layers_own_number() -> None:
    search = search_of(0, UNEVEN)
    plan = decide(rco(steps=20, per_layer=True), stats_with(search), {1: 3, 2: 5, 5: 2})
    for gone in [*search.masks, gone_of(plan)]:
        assert [part.sum() for part in np.split(gone, [6, 11])] == [3, 0, 5]


def test_one_budget_for_all_layers_moves_experts_between_them() -> None:
    """Experts of one layer are worth nothing, and the ratio would drop two of each."""
    search = search_of(0, {0: 6, 1: 6}, rough=0)
    search.single[:, :6] = 0
    plan = decide(rco(spread=0.0, steps=60), stats_with(search), keeping(search, 4))
    assert [len(layer.kept_rows) for layer in plan.values()] == [2, 6]
    assert RCO.counts == "total"


@pytest.mark.parametrize("seed", range(6))
def test_an_additive_loss_ends_at_the_sorted_optimum(seed: int) -> None:
    """6 of 16 experts: 8,008 plans, of which the search measures 7."""
    search = search_of(seed, {0: 8, 1: 8}, top_k=1, rough=0)
    search.single = search.single.mean(axis=0, keepdims=True)
    plan = decide(rco(seed=seed, spread=0.0, steps=60), stats_with(search), keeping(search, 5))
    assert set(np.flatnonzero(gone_of(plan))) == set(np.argsort(search.single[0])[:6])


def greedy(search: ArraySearch, number: int) -> np.ndarray:
    """One expert after another, each time the one that costs least beside those that are gone."""
    gone, single = np.zeros(len(search.pairs)), search.single.mean(axis=0)
    for _ in range(number):
        left = np.flatnonzero(gone == 0)
        trials = [np.where(np.arange(len(gone)) == expert, 1, gone) for expert in left]
        gone = min(trials, key=lambda trial: search.loss(trial, single))
    return gone


def test_where_experts_interact_the_descent_beats_greedy_removal() -> None:
    """10 experts, 4 to go, 210 plans: how far from the best of them, over 20 losses."""
    gaps = []
    for seed in range(20):
        search = search_of(seed, {0: 10})
        single = search.single.mean(axis=0)
        best = min(search.loss(gone, single) for gone in subsets(10, 4))
        plan = decide(rco(seed=seed, spread=0.0, steps=80), stats_with(search), {0: 6})
        gaps.append([search.loss(gone, single) / best - 1 for gone in (gone_of(plan), greedy(search, 4))])
    ours, other = np.array(gaps).T
    assert ours.min() > -1e-12 and other.min() > -1e-12, "the best is the best"
    assert ours.mean() < 0.025 < other.mean()
    assert (ours < 1e-9).sum() >= (other < 1e-9).sum() > 10


def test_of_two_experts_that_stand_in_for_each_other_one_stays() -> None:
    """No score of single experts can know: either may go for nothing, both must not."""
    search = search_of(0, {0: 8}, rough=0)
    search.single[:] = [0.1, 0.1, 1, 1, 1, 0.6, 1, 1]
    search.pairs[0, 1] = search.pairs[1, 0] = 5
    plan = decide(rco(spread=0.0, steps=60), stats_with(search), {0: 6})
    assert 5 in np.flatnonzero(gone_of(plan))
    assert gone_of(plan)[:2].sum() == 1


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_the_straight_through_gradient_is_that_of_the_loss_at_the_mask_times_the_soft_masks(tau: float) -> None:
    """Both factors by finite differences."""
    search = search_of(3, UNEVEN)
    scores = {layer: np.linspace(0, 1, count) for layer, count in UNEVEN.items()}
    capacity = {layer: count - 2 for layer, count in UNEVEN.items()}
    choices = Pruning(UNEVEN, capacity, scores, (((1, 2, 5), 7),), spread=2.0)
    noise, _ = antithetic_gumbel(np.random.default_rng(0), choices.start.shape)

    def soft(alpha: np.ndarray) -> np.ndarray:
        return softmax((alpha + noise) / tau)[:, 0]

    perturbed = (choices.start + noise) / tau
    survival = choices.survival(choices.best(perturbed))
    found = straight_through(choices.slopes(search.gradient(survival, 1)[1]), perturbed, tau)
    check_pull_back(found, soft, choices.start, 1 - np.concatenate(list(survival.values())), search)


def check_pull_back(found: np.ndarray, soft: Any, alpha: np.ndarray, gone: np.ndarray, search: ArraySearch) -> None:
    steps = np.eye(len(gone)) * 1e-5
    slope = -np.array(
        [search.loss(gone + h, search.single[1]) - search.loss(gone - h, search.single[1]) for h in steps]
    )
    for place in np.ndindex(alpha.shape):
        move = np.zeros_like(alpha)
        move[place] = 1e-5
        turn = soft(alpha + move) - soft(alpha - move)
        assert found[place] == pytest.approx(slope @ turn / (2e-5) ** 2, abs=1e-6)


def test_noise_comes_in_opposite_pairs_on_one_batch() -> None:
    """From equal logits with half of the experts to go, opposite noise drops the other half."""
    search = search_of(0, {0: 8}, top_k=0)
    asked: list[int] = []
    plain = search.gradient
    search.gradient = lambda survival, batch: (asked.append(batch), plain(survival, batch))[1]
    decide(rco(spread=0.0, steps=1), stats_with(search), {0: 4})
    np.testing.assert_array_equal(search.masks[0] + search.masks[1], 1)
    np.testing.assert_array_equal(search.masks[2] + search.masks[3], 1)
    assert asked[0] == asked[1] and asked[2] == asked[3]


def test_noise_of_more_options_is_gumbel_and_its_other_half_too() -> None:
    first, second = antithetic_gumbel(np.random.default_rng(0), (40_000, 3))
    for noise in (first, second):
        assert noise.mean() == pytest.approx(0.5772, abs=0.02) and noise.var() == pytest.approx(np.pi**2 / 6, rel=0.02)
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] < -0.5


def test_the_plan_is_the_best_deployed_of_those_measured_and_the_notes_say_so() -> None:
    search = search_of(5, UNEVEN)
    keep = {1: 4, 2: 3, 5: 4}
    stats = stats_with(search)
    plan = decide(rco(steps=35), stats, keep)
    uniform = decide(REAP(), stats, keep)
    single = search.single.mean(axis=0)
    *checked, last = search.measured
    assert last == tuple(layer.kept_rows for layer in uniform.values())
    losses = [search.divergence(dict(zip(UNEVEN, kept, strict=True))) for kept in checked]
    assert all(before != after for before, after in itertools.pairwise(checked)), "equal plans are not measured again"
    notes = search.notes
    assert notes["deployed_kl"] == min(losses) == pytest.approx(search.loss(gone_of(plan), single))
    assert notes["uniform_deployed_kl"] == pytest.approx(search.loss(gone_of(uniform), single))
    assert (notes["start_deployed_kl"], notes["last_deployed_kl"]) == (losses[0], losses[-1])
    assert notes["search_kl"] == pytest.approx(notes["deployed_kl"]), "here masking is all there is to deploying"
    assert notes["chosen_step"] in (0, 10, 20, 30, 35)


def test_the_start_is_reaps_ranking_and_with_no_spread_none() -> None:
    search = search_of(0, {0: 6, 1: 6})
    stats = stats_with(search)
    decide(rco(steps=1, per_layer=True), stats, keeping(search, 3))
    reap = decide(REAP(), stats, keeping(search, 3))
    assert search.measured[0] == tuple(layer.kept_rows for layer in reap.values())
    capacity, scores = {0: 4, 1: 4}, {0: np.linspace(0, 1, 6), 1: np.zeros(6)}
    for spread in (0.0, 5.0):
        choices = Pruning({0: 6, 1: 6}, capacity, scores, (((0, 1), 4),), spread)
        assert choices.blocks[0][1].cost(choices.start) == pytest.approx(4, abs=1e-9)
        lead = choices.start[:6, 1] - choices.start[0, 1]
        np.testing.assert_allclose(lead, -spread * np.linspace(0, 1, 6), atol=1e-12)


def test_the_temperature_falls_exponentially() -> None:
    method = rco(steps=101)
    assert [method.temperature(step) for step in (0, 50, 100)] == pytest.approx([1.0, np.sqrt(0.05), 0.05])
    assert rco(steps=1).temperature(0) == 1.0


def test_one_seed_one_plan_and_another_seed_another_search() -> None:
    searches = [search_of(7, {0: 8, 1: 8}) for _ in range(3)]
    for search, seed in zip(searches, (3, 3, 4), strict=True):
        decide(rco(seed=seed, steps=10), stats_with(search), keeping(search, 5))
    first, again, other = (np.array(search.masks) for search in searches)
    np.testing.assert_array_equal(first, again)
    assert searches[0].notes == searches[1].notes and (first != other).any()


INTERRUPTED = [{"patience": 1}, {"patience": 11}, {"patience": 15}, {"nerve": 0}, {"nerve": 30}, {"nerve": 61}]


def resumes(ask: Any, interruption: Mapping[str, int]) -> None:
    """Whether a search that is killed and asked again gives the plan and the notes of one that was not."""
    whole, parted = search_of(9, UNEVEN), search_of(9, UNEVEN, **interruption)
    expected = ask(whole)
    with pytest.raises(Killed):
        ask(parted)
    assert not parted.notes
    again = replace(parted, patience=None, nerve=None, masks=[])
    assert ask(again) == expected
    assert again.notes == whole.notes and again.place == whole.place
    done = len(parted.place[: parted.patience])
    assert len(again.masks) == len(whole.masks) - 4 * done or "nerve" in interruption, "no step is done twice"


@pytest.mark.parametrize("interruption", INTERRUPTED)
def test_an_interrupted_search_ends_where_an_uninterrupted_one_does(interruption: dict[str, int]) -> None:
    resumes(lambda search: decide(rco(steps=15), stats_with(search), {1: 4, 2: 3, 5: 4}), interruption)


def test_nothing_to_drop_needs_no_search() -> None:
    stats = replace(stats_with(search_of(0, UNEVEN)), search=lambda sequences: pytest.fail("asked"))
    assert Plan(decide(rco(), stats, UNEVEN)).is_identity


def test_more_than_top_k_allows_is_refused() -> None:
    search = search_of(0, UNEVEN)
    with pytest.raises(UserError, match="13 experts are to go .* only 12 can"):
        decide(rco(), stats_with(search), {1: 2, 2: 2, 5: 1})
    with pytest.raises(UserError, match="6 experts are to go .* only 5 can"):
        decide(rco(per_layer=True), stats_with(search), {1: 5, 2: 5, 5: 1})


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"samples": 0}, {"lr": 0.0}, {"tau_end": 0.0}, {"tau_start": 0.01}, {"spread": -1.0}]
)
def test_options_that_make_no_search_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        rco(**changes)


# How many go of each layer, the order given: methods/allocations/rco_counts.py


def budget_of(search: ArraySearch, keep: Mapping[int, int]) -> Budget:
    return Budget(search.experts, keep, search.top_k)


def rco_counts(**changes: object) -> RCOCounts:
    return from_yaml("allocation/rco_counts", **changes)


def counted(search: ArraySearch, keep: Mapping[int, int], method: Any = None, **changes: object) -> dict[int, int]:
    found = rco_counts(**changes).keep(stats_with(search), method or REAP(), budget_of(search, keep))
    assert sum(found.values()) == sum(keep.values())
    return found


def test_counts_come_near_the_best_allocation_of_all() -> None:
    """3 layers of 6, 6 of 18 to go, at least 2 kept: 19 plans. Their ranks by deployed KL, over six losses."""
    ranks, uniform = [], []
    for seed in range(6):
        search = search_of(seed, {0: 6, 1: 6, 2: 6})
        order = {count: decide(REAP(), stats_with(search), keeping(search, count)) for count in range(2, 7)}
        plans = [keep for keep in itertools.product(range(2, 7), repeat=3) if sum(keep) == 12]
        assert len(plans) == 19
        loss = {
            keep: search.divergence({layer: order[count][layer].kept_rows for layer, count in enumerate(keep)})
            for keep in plans
        }
        found = tuple(counted(search, keeping(search, 4), seed=seed, steps=60).values())
        assert search.notes["deployed_kl"] == pytest.approx(loss[found])
        assert search.notes["uniform_deployed_kl"] == pytest.approx(loss[4, 4, 4])
        ranks.append(sum(other < loss[found] - 1e-9 for other in loss.values()))
        uniform.append(sum(other < loss[4, 4, 4] - 1e-9 for other in loss.values()))
    assert max(ranks) <= 2 and ranks.count(0) >= 3 and np.mean(ranks) < 1 < 9 < np.mean(uniform), (ranks, uniform)


def test_counts_drop_the_methods_experts_and_always_the_whole_budget() -> None:
    search = search_of(1, UNEVEN)
    keep = {1: 4, 2: 3, 5: 4}
    counted(search, keep, steps=15)
    stats = stats_with(search)
    order = {
        count: decide(REAP(), stats, {layer: min(count, most) for layer, most in UNEVEN.items()})
        for count in range(2, 8)
    }
    for gone in search.masks:
        assert exactly(search, gone, 7)
        for layer, part in zip(UNEVEN, np.split(gone, [6, 11]), strict=True):
            kept = tuple(np.flatnonzero(part == 0))
            assert kept == order[len(kept)][layer].kept_rows
    assert search.measured[0] == tuple(order[count][layer].kept_rows for layer, count in keep.items()), "from uniform"


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_the_gradient_of_counts_is_that_of_the_loss_times_the_soft_survival_of_ranks(tau: float) -> None:
    """Expert of rank i survives with the probability that at most i go; padding of smaller layers gets no gradient."""
    search, rng = search_of(3, UNEVEN), np.random.default_rng(0)
    rank = {layer: rng.permutation(count) for layer, count in UNEVEN.items()}  # 0 goes first
    stays = {
        layer: np.stack([(rank[layer] >= r).astype(float) for r in range(count - 1)]) for layer, count in UNEVEN.items()
    }
    choices = Counts(stays, {1: 2, 2: 2, 5: 3})
    noise, _ = antithetic_gumbel(rng, choices.start.shape)

    def soft(alpha: np.ndarray) -> np.ndarray:
        p = softmax((alpha + noise) / tau)
        return np.concatenate([[p[row, : i + 1].sum() for i in rank[layer]] for row, layer in enumerate(UNEVEN)])

    perturbed = (choices.start + noise) / tau
    survival = choices.survival(choices.best(perturbed))
    found = straight_through(choices.slopes(search.gradient(survival, 1)[1]), perturbed, tau)
    assert found.shape == (3, 6) and (found[1, 4:] == 0).all()
    check_pull_back(found, soft, choices.start, 1 - np.concatenate(list(survival.values())), search)


def test_counts_follow_a_method_whose_sets_are_not_nested() -> None:
    class Turning(Random):
        """Another random set at every count."""

        def _keep(self, index: int, experts: int, keep: int) -> LayerPlan:
            return LayerPlan.prune(np.random.default_rng([index, keep]).permutation(experts)[:keep], experts)

    search = search_of(2, UNEVEN)
    counted(search, {1: 4, 2: 3, 5: 4}, Turning(0), steps=10)
    for gone in search.masks:
        for layer, part in zip(UNEVEN, np.split(gone, [6, 11]), strict=True):
            kept = np.flatnonzero(part == 0)
            assert tuple(kept) == Turning(0)._keep(layer, len(part), len(kept)).kept_rows


@pytest.mark.parametrize("interruption", [{"patience": 11}, {"nerve": 30}])
def test_an_interrupted_search_of_counts_goes_on(interruption: dict[str, int]) -> None:
    resumes(lambda search: counted(search, {1: 4, 2: 3, 5: 4}, steps=15), interruption)


def test_one_feasible_plan_of_counts_needs_no_search_and_none_is_refused() -> None:
    search = search_of(0, UNEVEN)
    assert counted(search, UNEVEN) == UNEVEN
    assert counted(search, {1: 2, 2: 2, 5: 2}) == {1: 2, 2: 2, 5: 2}
    assert not search.masks
    with pytest.raises(UserError, match="13 experts are to go"):
        counted(search, {1: 2, 2: 2, 5: 1})
