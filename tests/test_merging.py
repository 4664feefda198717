"""Merging methods against scipy, direct distances, brute force and planted twins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

from harness import checkpoint
from harness.blocks import compress_block, moe_blocks
from harness.calibrate import calibrate, calibrate_in_sequence
from harness.decide import decide, decide_in_sequence
from harness.errors import UserError
from harness.models import Model
from harness.plan import LayerPlan, Plan
from harness.reconstruct import Reconstruction
from harness.stats import EXTRAS, LayerStats, Stats
from methods import gram_cosine, highest
from methods.hc_smoe import kmeans_clusters, linkage_clusters
from methods.hybrid import Hybrid
from methods.m_smoe import dominant_experts, second_order
from methods.partial_preserve import PartialPreserve
from methods.ream import REAM, similarity
from methods.reap import REAP
from tests.conftest import EXPERTS, token_batches, write_model
from tests.test_methods import decisions, keep_all, make
from tests.toy import random_stats, stats_of, toy_layer, toy_layers

# HC-SMoE.


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 24),
    how=st.sampled_from(
        [("average", "euclidean"), ("complete", "euclidean"), ("ward", "euclidean"), ("average", "cosine")]
    ),
    data=st.data(),
)
def test_hc_smoe_clusters_as_scipy_cuts(seed: int, n: int, how: tuple[str, str], data: st.DataObject) -> None:
    clusters = data.draw(st.integers(1, n))
    points = np.random.default_rng(seed).normal(size=(n, 6))
    ours = linkage_clusters(points, clusters, *how)
    labels = fcluster(linkage(points, *how), clusters, criterion="maxclust")
    assert {frozenset(c) for c in ours} == {frozenset(np.flatnonzero(labels == k)) for k in set(labels)}


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_hc_smoe_gives_exactly_the_clusters_asked_for_on_ties(distance: str) -> None:
    assert len(linkage_clusters(np.zeros((8, 3)), 5, "average", distance)) == 5


def test_hc_smoe_cosine_ignores_length_and_euclidean_does_not() -> None:
    points = np.array([[1.0, 0], [9, 0.5], [0, 1], [0.5, 9]])
    assert {frozenset(c) for c in linkage_clusters(points, 2, "average", "cosine")} == {
        frozenset({0, 1}),
        frozenset({2, 3}),
    }
    euclidean = {frozenset(c) for c in linkage_clusters(points, 3)}
    assert frozenset({0, 2}) in euclidean


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), clusters=st.integers(1, 10))
def test_kmeans_gives_exactly_the_clusters_asked_for(seed: int, clusters: int) -> None:
    points = np.random.default_rng(seed).integers(0, 2, size=(10, 2)).astype(float)  # many rows are equal
    found = kmeans_clusters(points, clusters, seed)
    assert len(found) == clusters and all(found)
    assert sorted(expert for cluster in found for expert in cluster) == list(range(10))


def test_kmeans_finds_well_separated_groups_whatever_the_seed() -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([centre + rng.normal(size=(4, 3)) * 0.01 for centre in np.eye(3) * 50])
    expected = {frozenset(range(start, start + 4)) for start in (0, 4, 8)}
    assert sum({frozenset(c) for c in kmeans_clusters(points, 3, seed)} == expected for seed in range(10)) >= 8


@pytest.mark.parametrize(
    "changes", [{"linkage": "nearest"}, {"distance": "cosine", "linkage": "ward"}, {"clustering": "x"}]
)
def test_hc_smoe_options_that_do_not_exist_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"method\."):
        make("hc_smoe", **changes)


# M-SMoE.


def test_m_smoe_cosine_is_that_of_the_logit_columns() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 7))
    columns = logits / np.linalg.norm(logits, axis=0)
    np.testing.assert_allclose(gram_cosine(logits.T @ logits), columns.T @ columns, atol=1e-12)


def test_m_smoe_dominants_are_one_per_layer_then_the_globally_most_used() -> None:
    def layer(counts: list[float], gates: Sequence[float] = (1, 1, 1, 1)) -> LayerStats:
        return LayerStats(4, 10, {"count": np.array(counts), "gate": np.array(gates)})

    stats = Stats({0: layer([97, 1, 1, 1]), 1: layer([40, 30, 20, 10])})  # shares .97 .01 .01 .01 | .4 .3 .2 .1
    assert dominant_experts(stats, 2) == {0: [0], 1: [0]}
    assert dominant_experts(stats, 4) == {0: [0], 1: [0, 1, 2]}
    tied = Stats({0: layer([40, 20, 20, 20], [1, 2, 4, 3]), 1: layer([25, 25, 25, 25], [1, 1, 6, 2])})
    assert dominant_experts(tied, 2) == {0: [0], 1: [2]}
    assert dominant_experts(tied, 6) == {0: [0, 2], 1: [0, 1, 2, 3]}


@pytest.mark.parametrize("compat", [False, True])
def test_m_smoe_sends_every_expert_to_its_nearest_dominant_and_averages_by_counts(compat: bool) -> None:
    layers = toy_layers(4)
    stats = stats_of(layers)
    plans = decide(make("m_smoe", reference_compat=compat), stats, keep_all(stats, 5))
    for index, dominants in dominant_experts(stats, 15).items():
        columns = layers[index].logits.T / np.linalg.norm(layers[index].logits.T, axis=1, keepdims=True)
        near = columns @ columns.T
        if compat:
            rows = (1 - near) / np.linalg.norm(1 - near, axis=1, keepdims=True)
            near = rows @ rows.T
        groups: dict[int, set[int]] = {dominant: {dominant} for dominant in dominants}
        for expert in set(range(12)) - set(dominants):
            groups[max(dominants, key=lambda d, expert=expert, near=near: near[expert, d])].add(expert)
        assert {frozenset(s.expert for s in slot) for slot in plans[index].slots} == set(
            map(frozenset, groups.values())
        )
        for slot in plans[index].slots:
            counts = stats.layers[index]["count"][[source.expert for source in slot]]
            np.testing.assert_allclose([source.weight for source in slot], counts / counts.sum())


def test_m_smoe_reference_compat_is_the_distance_between_rows_of_distances() -> None:
    """As REAP's code: the cosine distance of every pair of columns of logits, and of every pair of its rows again."""
    layer = toy_layer(np.random.default_rng(0))
    cosine = torch.nn.functional.cosine_similarity
    columns = torch.from_numpy(layer.logits.T)
    first = 1 - cosine(columns.unsqueeze(1), columns.unsqueeze(0), dim=-1)
    second = 1 - cosine(first.unsqueeze(0), first.unsqueeze(1), dim=-1)
    ours = 1 - second_order(gram_cosine(layer.stats()["logit_gram"]))
    np.testing.assert_allclose(ours, second.numpy(), atol=1e-10)


def test_m_smoe_reference_compat_sends_experts_elsewhere() -> None:
    """On routers without structure it moves many experts: the spec's check found about half of 32 non-dominants."""
    shares = []
    for seed in range(5):
        stats = random_stats(seed, experts=64, layers=1)
        dominants = dominant_experts(stats, 32)[0]
        joined = []
        for compat in (False, True):
            plan = decide(make("m_smoe", reference_compat=compat), stats, {0: 32})[0]
            joined.append([next(d for d in dominants if plan.routes[d] == plan.routes[e]) for e in range(64)])
        shares.append(sum(a != b for a, b in zip(*joined, strict=True)) / 32)
    assert 0.2 < np.mean(shares) < 0.7, shares


# Partial preservation and REAM.


def test_partial_preserve_keeps_the_best_half_bit_for_bit_and_groups_the_rest() -> None:
    for seed in range(5):
        stats = random_stats(seed)
        for keep in (3, 6, 9):
            plans = decide(make("partial_preserve"), stats, keep_all(stats, keep))
            for index, plan in plans.items():
                layer = stats.layers[index]
                order = highest(12, REAP().score(layer))
                assert set(plan.kept_rows) == set(order[:keep])
                slot_of = {row: plan.slots[plan.routes[row]] for row in plan.kept_rows}  # type: ignore[index]
                for best in order[: keep // 2]:
                    assert [(s.expert, s.weight) for s in slot_of[best]] == [(best, 1.0)]
                assert sorted(s.expert for slot in plan.slots for s in slot) == list(range(12)), "a partition"
                bases = sorted(order[keep // 2 : keep])
                outputs = layer["all_output_sum"]
                for dropped in order[keep:]:
                    cosines = [
                        outputs[dropped] @ outputs[b] / np.linalg.norm(outputs[dropped]) / np.linalg.norm(outputs[b])
                        for b in bases
                    ]
                    assert dropped in [s.expert for s in slot_of[bases[int(np.argmax(cosines))]]]
                for base in bases:
                    members = [s.expert for s in slot_of[base]]
                    weights = REAP().score(layer)[members]
                    np.testing.assert_allclose([s.weight for s in slot_of[base]], weights / weights.sum())


def test_partial_preserve_of_everything_is_pruning() -> None:
    stats = random_stats(2)
    whole = PartialPreserve(REAP(), "outputs", 1.0)
    assert decide(whole, stats, keep_all(stats, 7)) == decide(REAP(), stats, keep_all(stats, 7))


def test_partial_preserve_with_another_importance_and_similarity() -> None:
    stats = random_stats(2)
    method = make("partial_preserve", importance={"_target_": "methods.aimer.AIMER"}, similarity="logits")
    assert method.needs == {"weight_count", "weight_abs", "weight_sq", "logit_gram", "logit_sum"}
    for plan in decide(method, stats, keep_all(stats, 6)).values():
        for slot in plan.slots:
            np.testing.assert_allclose([s.weight for s in slot], 1 / len(slot), err_msg="AIMER's scores are negative")


def test_partial_preserve_centres_the_logits() -> None:
    """SlimQwen's similarity of logits is the cosine of centred columns."""
    layer = toy_layer(np.random.default_rng(7))
    method = make("partial_preserve", similarity="logits")
    centred = layer.logits - layer.logits.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=0)
    np.testing.assert_allclose(method._cosine(layer.stats()), centred.T @ centred, atol=1e-9)  # type: ignore[attr-defined]


def test_ream_centres_absorb_the_most_similar_in_order_of_salience() -> None:
    stats = random_stats(3)
    for size in (3, 16):
        for index, plan in decide(REAM("reap", size), stats, keep_all(stats, 5)).items():
            layer = stats.layers[index]
            score, likeness = REAP().score(layer), similarity(layer)
            order = [int(e) for e in highest(12, score)]
            free, expected = set(order[5:]), {}
            for centre in order[:5]:
                taken = sorted(free, key=lambda e, centre=centre: -likeness[centre, e])[: size - 1]
                expected[centre] = {centre, *taken}
                free -= set(taken)
            found = {row: {s.expert for s in plan.slots[plan.routes[row]]} for row in plan.kept_rows}  # type: ignore[index]
            assert found == expected
            assert plan.align
            for slot in plan.slots:
                members = [source.expert for source in slot]
                np.testing.assert_allclose([s.weight for s in slot], score[members] / score[members].sum())


def test_ream_with_the_released_saliency_squares_the_gate() -> None:
    layer = toy_layer(np.random.default_rng(6))
    strength = layer.gates**2 * np.linalg.norm(layer.outputs, axis=2)
    saliency = strength.sum(axis=0) / (layer.gates > 0).sum(axis=0)
    kept = REAM("gate_squared", 16).plan_layer(layer.stats(), 5).kept_rows
    assert set(kept) == set(np.argsort(-saliency)[:5])


def test_ream_similarity_is_the_mean_of_both_terms() -> None:
    layer = toy_layer(np.random.default_rng(5))
    softmax = np.exp(layer.logits) / np.exp(layer.logits).sum(axis=1, keepdims=True)
    said = (softmax[:, :, None] * layer.outputs).sum(axis=0)
    said /= np.linalg.norm(said, axis=1, keepdims=True)
    rows = layer.logits.T / np.linalg.norm(layer.logits.T, axis=1, keepdims=True)
    apart = np.linalg.norm(rows[:, None] - rows[None, :], axis=2)
    expected = ((said @ said.T + 1) / 2 + 1 - apart / apart.max()) / 2
    np.testing.assert_allclose(similarity(layer.stats()), expected, atol=1e-7)


def test_ream_sees_each_layer_behind_the_compressed_ones(qwen_model: Model) -> None:
    """The first layer's plan is the one-shot plan; the next follow from the model compressed so far."""
    batches, keep = token_batches(), dict.fromkeys(qwen_model.experts, 4)
    one_shot = decide(REAM("reap", 16), calibrate(qwen_model.load("float32"), batches, frozenset(EXTRAS)), keep)
    loaded = qwen_model.load("float32")
    extras = REAM.needs & set(EXTRAS)
    plans = decide_in_sequence(REAM("reap", 16), loaded, batches, extras, "actual", keep)
    first, *later = sorted(plans)
    assert decisions(plans[first]) == decisions(one_shot[first])
    assert any(decisions(plans[index]) != decisions(one_shot[index]) for index in later)


def test_in_sequence_a_layer_is_observed_behind_the_compressed_prefix(qwen_model: Model) -> None:
    """Against a model whose first layers were compressed by hand and which then was calibrated in an ordinary pass."""
    batches, seen = token_batches(), {}

    def halve(layer: int, stats: LayerStats) -> LayerPlan:
        seen[layer] = stats
        return REAP().plan_layer(stats, 4)

    plans = calibrate_in_sequence(qwen_model.load("float32"), batches, frozenset({"logit_gram"}), "actual", halve)
    by_hand = qwen_model.load("float32")
    for layer, block in moe_blocks(by_hand).items():
        expected = calibrate(by_hand, batches, frozenset({"logit_gram"})).layers[layer]
        assert seen[layer].tokens == expected.tokens
        for name, value in seen[layer].sums.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5, err_msg=f"{layer} {name}")
        compress_block(block, layer, plans[layer])


# Hybrid.


def test_hybrid_takes_the_better_of_both_in_every_layer() -> None:
    took = set()
    for seed in range(6):
        layers = toy_layers(seed)
        for layer in layers.values():  # half of the layers have experts that say nearly the same: merging is safe there
            if layer is not layers[0]:
                layer.outputs[:, :, :] += 6 * np.random.default_rng(seed).normal(size=20)
        stats = stats_of(layers)
        for keep in (4, 8):
            hybrid, pruned, merged = (
                decide(make(name), stats, keep_all(stats, keep)) for name in ("hybrid", "reap", "partial_preserve")
            )
            for index, layer in layers.items():
                errors = [layer.error(plan[index]) for plan in (hybrid, pruned, merged)]
                assert errors[0] == min(errors[1:])
                took.add(np.argmin(errors[1:]))
    assert took == {0, 1}, "both are taken somewhere"


def test_hybrid_merges_the_layer_whose_experts_are_twins_and_prunes_the_others(tmp_path: Path) -> None:
    """Through a real model and the measured error. Merged as HC-SMoE does, twins lose nothing; pruned, they do."""

    def twins_in_layer_1(model: torch.nn.Module) -> None:
        experts, gate = model.model.layers[1].mlp.experts, model.model.layers[1].mlp.gate
        for a, b in ((0, 6), (1, 4), (2, 3), (5, 7)):
            experts.gate_up_proj[b], experts.down_proj[b] = experts.gate_up_proj[a], experts.down_proj[a]
            gate.weight[b] = gate.weight[a] + 0.1 * torch.randn_like(gate.weight[a])

    model = write_model("qwen3_moe", tmp_path, twins_in_layer_1)
    made = calibrate(model.load("float32"), token_batches(), frozenset(EXTRAS))
    measured = Reconstruction(model.load("float32"), token_batches())
    stats = Stats(made.layers, error=measured.error)
    hybrid = Hybrid(REAP(), make("hc_smoe"))
    plans = decide(hybrid, stats, keep_all(stats, 4))
    assert [len(plans[index].kept_rows) for index in (0, 1, 2)] == [4, EXPERTS, 4]
    assert measured.error(1, plans[1]) < 1e-10
    for part in (hybrid.prune, hybrid.merge):
        alone = decide(part, stats, keep_all(stats, 4))
        assert all(measured.error(index, plans[index]) <= measured.error(index, alone[index]) for index in plans)


# Planted truths, through a real model: calibrate, plan, export, load.


def logits_of(model_folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return Model("planted", str(model_folder)).load("float32")(input_ids=ids).logits


def exported_logits(model: Model, plan: Plan, folder: Path) -> torch.Tensor:
    folder.mkdir()
    checkpoint.export(model, plan, folder)
    checkpoint.verify(folder, model)
    return logits_of(folder, token_batches()[0][0])


def twins(shuffled: bool = False) -> object:
    """Experts 6 and 4 made copies of 0 and 1, on request with their hidden units in another order."""

    def plant(model: torch.nn.Module) -> None:
        for block in model.model.layers:
            experts, gate = block.mlp.experts, block.mlp.gate
            width = experts.down_proj.shape[2]
            order = torch.randperm(width) if shuffled else torch.arange(width)
            for a, b in ((0, 6), (1, 4)):
                experts.gate_up_proj[b] = experts.gate_up_proj[a][torch.cat([order, order + width])]
                experts.down_proj[b] = experts.down_proj[a][:, order]
                gate.weight[b] = gate.weight[a] * (1 + 1e-3)

    return plant


@pytest.mark.parametrize("name", ["hc_smoe", "m_smoe"])
def test_twin_experts_are_merged_and_the_output_stays(name: str, tmp_path: Path) -> None:
    model = write_model("qwen3_moe", tmp_path / "model", twins())  # type: ignore[arg-type]
    plan = twin_plan(model, name)
    for layer in plan.layers.values():
        assert layer.routes[0] == layer.routes[6] and layer.routes[1] == layer.routes[4]
        assert len(layer.slots) == EXPERTS - 2
    after = exported_logits(model, plan, tmp_path / "merged")
    torch.testing.assert_close(after, logits_of(model.folder, token_batches()[0][0]), atol=1e-4, rtol=1e-4)


def twin_plan(model: Model, name: str, **changes: object) -> Plan:
    stats = calibrate(model.load("float32"), token_batches(), frozenset(EXTRAS))
    for layer in stats.layers.values():  # M-SMoE's centres are the most used experts: make one of each pair a centre
        layer.sums["count"] = np.array([9.0, 9, 9, 9, 1, 9, 1, 9]) * 10
    return Plan(decide(make(name, **changes), stats, keep_all(stats, EXPERTS - 2)))


def test_twins_whose_hidden_units_are_shuffled_merge_exactly_only_when_aligned(tmp_path: Path) -> None:
    """SYSTEMS.md's Q2, through export: a mean of misaligned twins is another expert, of aligned ones the same."""
    model = write_model("qwen3_moe", tmp_path / "model", twins(shuffled=True))  # type: ignore[arg-type]
    before = logits_of(model.folder, token_batches()[0][0])
    plain, aligned = (
        exported_logits(model, twin_plan(model, "m_smoe", align=align), tmp_path / str(align))
        for align in (None, "weights")
    )
    torch.testing.assert_close(aligned, before, atol=1e-4, rtol=1e-4)
    assert (plain - before).abs().max() > 0.05
