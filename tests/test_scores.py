"""Scores and searches for pruning against naive loops over tokens, exhaustive search and planted truths."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.calibrate import calibrate
from harness.decide import decide
from harness.models import Model
from harness.stats import LayerStats, Stats
from harness.weights import weight_sums
from methods import highest
from methods.ean import EAN
from methods.frequency import Frequency
from methods.frozen_gate import added_error, exchange_errors, least_error
from methods.hope import pairwise_energy, relaxed
from methods.reap import REAP
from methods.super_experts import ProtectSuperExperts
from tests.conftest import EXPERTS, token_batches, write_model
from tests.test_methods import keep_all, make
from tests.toy import ToyLayer, toy_layer

Term = Callable[[float, float, float], float]  # of one token: gate, norm of the output, how far the layer turns it


def naive_score(layer: ToyLayer, term: Term, mean: bool) -> np.ndarray:
    """Token by token and expert by expert: the sum (or mean) of ``term`` over the tokens that chose the expert."""
    values: list[list[float]] = [[] for _ in range(layer.experts)]
    for token, experts in enumerate(layer.chosen):
        stream = layer.residual[token]
        after = stream + sum(layer.gates[token, e] * layer.outputs[token, e] for e in experts)
        turn = max(0.0, 1 - float(stream @ after / np.linalg.norm(stream) / np.linalg.norm(after)))
        for e in experts:
            values[e].append(term(float(layer.gates[token, e]), float(np.linalg.norm(layer.outputs[token, e])), turn))
    return np.array([(sum(seen) / len(seen) if mean else sum(seen)) if seen else 0.0 for seen in values])


FORMULAS: dict[str, tuple[Term, bool]] = {
    "frequency": (lambda g, n, s: 1, False),
    "seer": (lambda g, n, s: g, False),
    "ean": (lambda g, n, s: n, False),
    "man": (lambda g, n, s: n, True),
    "msan": (lambda g, n, s: n * n, True),
    "weighted_ean": (lambda g, n, s: g * n, False),
    "gated_energy": (lambda g, n, s: g * g * n * n, False),
    "reap": (lambda g, n, s: g * n, True),
    "easy_ep": (lambda g, n, s: g * n * s, False),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_score_is_its_papers_formula(name: str) -> None:
    term, mean = FORMULAS[name]
    for seed in range(3):
        layer = toy_layer(np.random.default_rng(seed))
        layer.logits[:, 4] = -50  # never routed: scores 0
        ours = make(name).score(layer.stats())  # type: ignore[attr-defined]
        np.testing.assert_allclose(ours, naive_score(layer, term, mean), rtol=1e-10)
        assert ours[4] == 0


def test_the_family_differs() -> None:
    """Or a wrong exponent could go unnoticed: no two scores rank the experts alike."""
    layer = toy_layer(np.random.default_rng(1), experts=24).stats()
    orders = {name: tuple(highest(24, make(name).score(layer))) for name in FORMULAS}  # type: ignore[attr-defined]
    assert len(set(orders.values())) == len(FORMULAS)


def test_aimer_is_the_mean_absolute_weight_over_the_root_mean_square(qwen_model: Model) -> None:
    loaded = qwen_model.load("float32")
    sums = weight_sums(qwen_model)
    for index, layer in sums.layers.items():
        experts = loaded.model.layers[index].mlp.experts
        scores = make("aimer").score(layer)  # type: ignore[attr-defined]
        for expert in range(EXPERTS):
            flat = torch.cat([experts.gate_up_proj[expert].flatten(), experts.down_proj[expert].flatten()]).double()
            assert scores[expert] == pytest.approx(
                -float(flat.detach().abs().mean() / flat.detach().square().mean().sqrt()), rel=1e-6
            )


def test_aimer_prunes_the_expert_whose_weights_are_all_alike(tmp_path: Path) -> None:
    def flatten(model: torch.nn.Module) -> None:
        for block in model.model.layers:
            for matrices in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
                matrices[3] = matrices[3].sign() * 0.25

    stats = weight_sums(write_model("qwen3_moe", tmp_path, flatten))
    plans = decide(make("aimer"), stats, keep_all(stats, EXPERTS - 1))
    assert all(plan.routes[3] is None for plan in plans.values())


def test_an_expert_whose_weights_are_zero_goes_first(tmp_path: Path) -> None:
    def erase(model: torch.nn.Module) -> None:
        for block in model.model.layers:
            block.mlp.experts.gate_up_proj[2], block.mlp.experts.down_proj[2] = 0, 0

    stats = weight_sums(write_model("qwen3_moe", tmp_path, erase))
    plans = decide(make("aimer"), stats, keep_all(stats, EXPERTS - 1))
    assert all(plan.routes[2] is None for plan in plans.values())


def sets(experts: int, number: int) -> list[np.ndarray]:
    chosen = [np.zeros(experts, dtype=bool) for _ in itertools.combinations(range(experts), number)]
    for indicator, members in zip(chosen, itertools.combinations(range(experts), number), strict=True):
        indicator[list(members)] = True
    return chosen


def quadratic(matrix: np.ndarray, indicator: np.ndarray) -> float:
    return float(matrix[np.ix_(indicator, indicator)].sum())


def test_the_gram_matrix_gives_the_frozen_gate_error_of_any_set() -> None:
    layer = toy_layer(np.random.default_rng(0))
    gram = layer.stats()["gated_output_gram"]
    rng = np.random.default_rng(1)
    for _ in range(20):
        removed = rng.random(12) < 0.4
        gone = (layer.gates[:, removed, None] * layer.outputs[:, removed]).sum(axis=1)
        np.testing.assert_allclose(quadratic(gram, removed), (gone**2).sum(), rtol=1e-10)


def test_the_frozen_gate_error_is_what_the_model_does_when_gates_are_zeroed(qwen_model: Model) -> None:
    """Through the real pass: p^T C p equals the change of the block's output with the removed experts' gates at 0."""
    model, batches = qwen_model.load("float32"), token_batches(padded=False)
    gram = calibrate(model, batches, frozenset({"gated_output_gram"})).layers[1]["gated_output_gram"]
    block, removed = model.model.layers[1].mlp, np.array([1, 4, 6])
    seen: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    error = 0.0
    with torch.no_grad():
        for ids, mask in batches:
            model(input_ids=ids, attention_mask=mask)
        for hidden in [hidden.flatten(0, 1) for hidden in list(seen)]:
            _, gates, chosen = block.gate(hidden)
            kept = gates * ~torch.isin(chosen, torch.from_numpy(removed))
            full, less = (block.experts(hidden, chosen, weight) for weight in (gates, kept))
            error += float((full - less).square().sum())
    assert error == pytest.approx(float(gram[np.ix_(removed, removed)].sum()), rel=1e-4)


def test_the_frozen_gate_search_finds_the_best_set() -> None:
    for seed in range(15):
        gram = toy_layer(np.random.default_rng(seed), experts=10).stats()["gated_output_gram"]
        for number in (3, 5, 7):
            ours = quadratic(gram, least_error(gram, number))
            assert ours <= 1.02 * min(quadratic(gram, indicator) for indicator in sets(10, number))


def test_frozen_gate_steps_are_the_differences_they_claim() -> None:
    gram = toy_layer(np.random.default_rng(2)).stats()["gated_output_gram"]
    removed = np.arange(12) % 3 == 0
    before = quadratic(gram, removed)
    for expert in np.flatnonzero(~removed):
        more = removed.copy()
        more[expert] = True
        assert added_error(gram, removed)[expert] == pytest.approx(quadratic(gram, more) - before)
        for back in np.flatnonzero(removed):
            exchanged = more.copy()
            exchanged[back] = False
            assert exchange_errors(gram, removed)[back, expert] == pytest.approx(quadratic(gram, exchanged) - before)


def test_frozen_gate_removes_together_what_cancels() -> None:
    """Experts 0 and 1 say the opposite of each other whenever they are chosen together: both can go for nothing."""
    layer = toy_layer(np.random.default_rng(3))
    layer.logits[:, :2] = layer.logits.max(axis=1, keepdims=True)
    layer.outputs[:, 0] = 30 * layer.outputs[:, 0]
    layer.outputs[:, 1] = -layer.outputs[:, 0]
    stats = Stats({0: layer.stats()})
    assert not {0, 1} & set(decide(make("frozen_gate"), stats, {0: 10})[0].kept_rows)
    assert {0, 1} <= set(decide(make("reap"), stats, {0: 10})[0].kept_rows), "each alone is the strongest there is"


def test_hope_energy_is_a_mean_over_the_tokens_that_chose_both() -> None:
    layer = toy_layer(np.random.default_rng(0))
    energy = pairwise_energy(layer.stats())
    strength = layer.gates * np.linalg.norm(layer.outputs, axis=2)
    for i, j in ((0, 0), (2, 5), (7, 3)):
        together = [strength[t, i] * strength[t, j] for t, e in enumerate(layer.chosen) if i in e and j in e]
        assert energy[i, j] == pytest.approx(np.mean(together) if together else 0)
    assert not np.allclose(np.diag(energy), make("reap").score(layer.stats()) ** 2, rtol=0.02)  # type: ignore[attr-defined]


def test_hope_is_near_the_exhaustive_optimum_and_beats_its_own_diagonal() -> None:
    ratios = []
    for seed in range(20):
        energy = pairwise_energy(toy_layer(np.random.default_rng(seed), experts=10).stats())
        for number in (3, 5, 7):
            best = min(quadratic(energy, indicator) for indicator in sets(10, number))
            orders = (-relaxed(energy, number).round(9), np.diag(energy))
            ratios.append([quadratic(energy, ~np.isin(np.arange(10), highest(10 - number, o))) / best for o in orders])
    ours, diagonal = np.mean(ratios, axis=0)
    assert ours < 1.01 < 1.05 < diagonal


def test_hope_over_all_tokens_is_the_other_mean() -> None:
    layer = toy_layer(np.random.default_rng(3))
    stats, strength = layer.stats(), layer.gates * np.linalg.norm(layer.outputs, axis=2)
    expected = highest(7, -relaxed(strength.T @ strength / len(strength), 5).round(9))
    found = make("hope", average="tokens").plan_layer(stats, 7).kept_rows  # type: ignore[attr-defined]
    assert set(found) == set(expected)
    assert found != make("hope").plan_layer(stats, 7).kept_rows  # type: ignore[attr-defined]


def test_hope_with_no_pairs_sorts_the_diagonal() -> None:
    energy = np.diag(np.random.default_rng(0).uniform(1, 9, 12))
    pruned = relaxed(energy, 5)
    np.testing.assert_array_equal(np.sort(highest(5, pruned)), np.sort(np.argsort(np.diag(energy))[:5]))


# Super experts.


def protecting(score: REAP | EAN | Frequency, over: str = "early") -> ProtectSuperExperts:
    return ProtectSuperExperts(score, quantile=0.9, share=0.1, layers=0.75, over=over)


def huge_outputs(where: dict[int, int]) -> Stats:
    """Four layers of 12 equal experts; ``where[layer]`` writes huge activations and is chosen once."""
    layers = {}
    for index in range(4):
        sums = {name: np.full(12, 8.0) for name in ("count", "gate", "gate_norm", "norm")}
        sums["output_max"] = np.linspace(1, 2, 12)
        if index in where:
            sums["output_max"][where[index]] = 500
            for name in ("count", "gate", "gate_norm", "norm"):
                sums[name][where[index]] = 0.1
        layers[index] = LayerStats(12, 50, sums)
    return Stats(layers)


@pytest.mark.parametrize("score", [REAP(), EAN(), Frequency()], ids=lambda score: type(score).__name__)
def test_super_experts_are_kept_whatever_the_score_says(score: REAP | EAN | Frequency) -> None:
    stats = huge_outputs({0: 5, 2: 9, 3: 1})
    stats.layers[0].sums["gate_norm"][5] = 0  # REAP would prune it as well
    stats.layers[2].sums["gate_norm"][9] = 0
    plain = decide(score, stats, keep_all(stats, 6))
    kept = decide(protecting(score), stats, keep_all(stats, 6))
    assert 5 not in plain[0].kept_rows and 9 not in plain[2].kept_rows
    assert 5 in kept[0].kept_rows and 9 in kept[2].kept_rows
    assert kept[1] == plain[1], "where there is none, the score decides alone"
    assert kept[3] == plain[3], "the last quarter of the layers is not looked at"
    assert all(len(plan.slots) == 6 for plan in kept.values())


def test_thresholds_over_all_layers_are_those_of_the_published_code() -> None:
    """A late giant, itself never protected, raises the bar for the early layers where REAP's code looks at all."""
    stats = huge_outputs({0: 5})
    stats.layers[3].sums["output_max"][1] = 50_000
    found = {over: protecting(REAP(), over).super_experts(stats)[0].nonzero()[0].tolist() for over in ("early", "all")}
    assert found == {"early": [5], "all": []}


def test_a_model_of_one_layer_has_super_experts_too() -> None:
    found = protecting(REAP()).super_experts(Stats({0: huge_outputs({0: 5}).layers[0]}))
    assert np.flatnonzero(found[0]).tolist() == [5]


def test_of_more_super_experts_than_may_be_kept_the_score_decides() -> None:
    stats = huge_outputs({})
    stats.layers[1].sums["output_max"][:3] = 500
    stats.layers[1].sums["gate_norm"][:3] = 3, 9, 6
    assert decide(protecting(REAP()), stats, keep_all(stats, 2))[1].kept_rows == (1, 2)


def test_few_experts_are_super() -> None:
    stats = huge_outputs({0: 5})
    found = protecting(REAP()).super_experts(stats)
    assert {index: np.flatnonzero(mask).tolist() for index, mask in found.items()} == {0: [5], 1: [], 2: [], 3: []}


# Planted truths, through a real model: calibrate, plan.


@pytest.mark.parametrize(
    "name", ["ean", "reap", "man", "msan", "weighted_ean", "gated_energy", "easy_ep", "frozen_gate"]
)
def test_a_silent_expert_is_pruned(name: str, tmp_path: Path) -> None:
    def silence(model: torch.nn.Module) -> None:
        for block in model.model.layers:
            block.mlp.experts.down_proj[3] = 0

    model, method = write_model("qwen3_moe", tmp_path, silence), make(name)
    extras = method.needs & {"gate_norm_turn", "gated_output_gram"}
    stats = calibrate(model.load("float32"), token_batches(), extras)
    assert all(layer["count"][3] > 0 for layer in stats.layers.values()), "it is routed to, and silent"
    plan = decide(method, stats, keep_all(stats, EXPERTS - 1))
    assert all(set(range(EXPERTS)) - set(layer.kept_rows) == {3} for layer in plan.values())


@pytest.mark.parametrize("name", ["frequency", "seer", "reap", "ean", "hope"])
def test_an_expert_without_tokens_is_pruned_first(name: str, tmp_path: Path) -> None:
    model, method = write_model("qwen3_moe", tmp_path), make(name)
    loaded = model.load("float32")
    for block in loaded.model.layers:
        block.mlp.gate.register_forward_hook(lambda _, __, out: _avoid_expert(out, 5))
    stats = calibrate(loaded, token_batches(), method.needs & {"coactivation", "gated_norm_gram"})
    assert all(layer["count"][5] == 0 for layer in stats.layers.values())
    plan = decide(method, stats, keep_all(stats, EXPERTS - 1))
    assert all(set(range(EXPERTS)) - set(layer.kept_rows) == {5} for layer in plan.values())


def _avoid_expert(output: tuple[torch.Tensor, ...], expert: int) -> tuple[torch.Tensor, ...]:
    """Route as if the expert's logit were -inf."""
    logits, scores, _ = output
    masked = logits.clone()
    masked[:, expert] = float("-inf")
    values, chosen = torch.topk(masked.softmax(-1), scores.shape[-1], dim=-1)
    return logits, values / values.sum(-1, keepdim=True), chosen


def test_a_mean_of_batch_means_ranks_other_experts_last() -> None:
    """What sums are for: tokens in two unequal batches, and the expert that REAP prunes is not the one that the mean of
    the batches' own REAP scores would prune.
    """
    long = LayerStats(2, 90, {"count": np.array([80.0, 80]), "gate_norm": np.array([80.0, 120])})  # means 1, 1.5
    short = LayerStats(2, 10, {"count": np.array([2.0, 2]), "gate_norm": np.array([8.0, 1])})  # means 4, 0.5
    score = REAP().score
    assert np.argmin(score(long + short)) == 0
    assert np.argmin((score(long) + score(short)) / 2) == 1
