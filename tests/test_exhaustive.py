"""A model so small that every plan can be tried: what the searches find, against the best there is.

3 layers of 6 experts, top-2, 64 tokens, random weights. A third of the experts goes and every layer keeps 2 at least:
18,345 ways, 19 of them ways to share out the counts when each layer's order is REAP's. It checks the machinery and is
no evidence on quality.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from harness.calibrate import calibrate, packed_batches
from harness.model_search import ModelSearch
from harness.search import Kept
from harness.stats import Stats
from methods.allocations import Budget, orders
from methods.allocations.evoesap import EvoESAP
from methods.allocations.global_score import GlobalScore
from methods.allocations.rco_counts import RCOCounts
from methods.rco import RCO
from methods.reap import REAP

LAYERS, EXPERTS, TOP_K, DROP = 3, 6, 2, 6
COUNTS = [c for c in itertools.product(range(EXPERTS - TOP_K + 1), repeat=LAYERS) if sum(c) == DROP]
BUDGET = Budget(dict.fromkeys(range(LAYERS), EXPERTS), dict.fromkeys(range(LAYERS), EXPERTS - DROP // LAYERS), TOP_K)


@cache
def small_model(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=48,
        hidden_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=12,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@cache
def text(seed: int) -> np.ndarray:
    return np.random.default_rng([7, seed]).integers(0, 48, (4, 16))


def search_on(seed: int) -> ModelSearch:
    return ModelSearch(small_model(seed), text(seed), TOP_K, lambda: None, lambda state: None)


@cache
def statistics(seed: int) -> Stats:
    made = calibrate(small_model(seed), packed_batches(text(seed), 4))
    return Stats(made.layers, search=lambda sequences: search_on(seed))


@cache
def allocations(seed: int) -> dict[tuple[int, ...], Kept]:
    """Every way to share out the counts, experts of a layer going in REAP's order."""
    order = orders(statistics(seed), REAP(), range(LAYERS), TOP_K)
    return {counts: {layer: order[layer][EXPERTS - c] for layer, c in enumerate(counts)} for counts in COUNTS}


def masks() -> Iterator[dict[int, tuple[int, ...]]]:
    """What may be kept, every way."""
    for counts in COUNTS:
        sets = [itertools.combinations(range(EXPERTS), EXPERTS - count) for count in counts]
        yield from (dict(enumerate(kept)) for kept in itertools.product(*sets))


def rco(seed: int, **changes: object) -> RCO:
    return RCO(
        **{**dict(seed=seed, sequences=4, steps=60, lr=0.1, tau_start=1.0, tau_end=0.05, samples=4), **changes},  # type: ignore[arg-type]
        spread=5.0,
        check_every=5,
        per_layer=False,
    )


def kept_by(method: RCO, seed: int) -> dict[int, tuple[int, ...]]:
    plans = method.plan(statistics(seed).only(method.needs), BUDGET.uniform)
    return {layer: plan.kept_rows for layer, plan in plans.items()}


def test_there_are_as_many_plans_as_counted() -> None:
    assert len(COUNTS) == 19
    assert sum(1 for _ in masks()) == 18_345


@pytest.mark.parametrize("seed", range(4))
def test_evolution_finds_the_best_way_to_share_out_the_counts(seed: int) -> None:
    search = search_on(seed)
    fitness = {counts: search.acceptance(kept) for counts, kept in allocations(seed).items()}
    method = EvoESAP(seed, None, 4, population=8, elites=4, generations=8, max_step=4, max_switches=3, attempts=32)
    keep = method.keep(statistics(seed), REAP(), BUDGET)
    found = tuple(EXPERTS - keep[layer] for layer in range(LAYERS))
    assert fitness[found] == max(fitness.values())
    assert fitness[found] >= fitness[(2, 2, 2)], "the uniform plan is one of them"


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_rco_is_among_the_best_of_all_plans(seed: int) -> None:
    """Against 200 plans drawn at random: at most 5 in 100 are better. Against every one: the slow test below."""
    search = search_on(seed)
    every = list(masks())
    drawn = np.random.default_rng(seed).choice(len(every), 200, replace=False)
    others = np.array([search.divergence(every[index]) for index in drawn])
    assert (others < search.divergence(kept_by(rco(seed), seed))).mean() <= 0.05


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_rco_over_counts_alone_is_near_the_best_of_its_plans(seed: int) -> None:
    search = search_on(seed)
    known = {counts: search.divergence(kept) for counts, kept in allocations(seed).items()}
    method = RCOCounts(seed=seed, sequences=4, steps=40, lr=0.1, tau_start=1.0, tau_end=0.05, samples=4, check_every=5)
    keep = method.keep(statistics(seed), REAP(), BUDGET)
    found = tuple(EXPERTS - keep[layer] for layer in range(LAYERS))
    assert sorted(known.values()).index(known[found]) <= 3, "of 19"


def test_scores_compared_across_layers_can_be_far_worse_than_uniform_counts() -> None:
    worse = []
    for seed in range(4):  # one of them suffices
        keep = GlobalScore(normalise="none").keep(statistics(seed), REAP(), BUDGET)
        by_counts = allocations(seed)
        search = search_on(seed)
        both = [search.divergence(by_counts[c]) for c in (tuple(EXPERTS - keep[i] for i in range(LAYERS)), (2, 2, 2))]
        worse.append(both[0] / both[1])
    assert max(worse) > 1.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_rco_is_among_the_best_twentieth_of_every_plan_there_is(seed: int) -> None:
    search = search_on(seed)
    every = np.array([search.divergence(kept) for kept in masks()])
    found = search.divergence(kept_by(rco(seed), seed))
    uniform = search.divergence(allocations(seed)[(2, 2, 2)])
    print(
        f"seed {seed}: best {every.min():.3f}; RCO {found:.3f}, {100 * (every < found).mean():.2f} % are better; "
        f"uniform REAP {uniform:.3f}, {100 * (every < uniform).mean():.2f} % are better"
    )
    assert every.min() <= found + 1e-9 and (every < found).mean() <= 0.05
