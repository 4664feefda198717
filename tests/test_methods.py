"""Every method in conf/method/, found by listing the folder, keeps the promises that make a comparison fair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy.cluster.hierarchy import fcluster, linkage

from harness import checkpoint
from harness.build import build
from harness.calibrate import calibrate
from harness.models import ROOT
from harness.plan import LayerPlan, Plan
from harness.stats import EXTRAS, ROUTED, LayerStats, Stats
from methods import Method
from methods.ean import EAN
from methods.frequency import Frequency
from methods.hc_smoe import HCSMoE, average_linkage_clusters
from methods.m_smoe import MSMoE, dominant_experts, gram_cosine
from methods.none import NoCompression
from methods.random import Random
from methods.reap import REAP
from tests.conftest import EXPERTS, permuted, random_stats, token_batches, write_model

NAMES = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
KEEPS = (4, 7, 9, 12)


def make(name: str, folder: Path = ROOT / "conf" / "method") -> Method:
    """The method as its YAML describes it."""
    config = OmegaConf.merge({"seed": 0}, {"method": OmegaConf.load(folder / f"{name}.yaml")})
    fields = OmegaConf.to_container(config, resolve=True)["method"]
    assert fields.pop("label"), f"{name}.yaml has no label for tables"
    return build("method", fields)


def keep_all(stats: Stats, keep: int) -> dict[int, int]:
    return dict.fromkeys(stats.layers, keep)


def decisions(layer: LayerPlan) -> set[tuple[frozenset, frozenset]]:
    """A layer plan without the order of its slots: (sources with rounded weights, experts routed there)."""
    return {
        (
            frozenset((source.expert, round(source.weight, 9)) for source in slot),
            frozenset(expert for expert, route in enumerate(layer.routes) if route == index),
        )
        for index, slot in enumerate(layer.slots)
    }


def renamed(layer: LayerPlan, order: np.ndarray) -> set[tuple[frozenset, frozenset]]:
    """The same for a model whose expert ``order[j]`` is now called j."""
    new = {int(old): j for j, old in enumerate(order)}
    return {
        (frozenset((new[e], w) for e, w in sources), frozenset(new[e] for e in routed))
        for sources, routed in decisions(layer)
    }


def conforms(method: Method) -> None:
    """What every method promises. Called for each YAML, and for the method that the README adds."""
    assert method.needs <= {*ROUTED, *EXTRAS}
    given_stats = random_stats(0)
    before = {i: {k: v.copy() for k, v in layer.sums.items()} for i, layer in given_stats.layers.items()}
    stats = given_stats.only(method.needs)  # reading anything else raises
    for keep in KEEPS:
        plan = Plan(method.plan(stats, keep_all(stats, keep)))
        plan.validate({index: 12 for index in stats.layers}, top_k=1)
        assert plan.layers == method.plan(stats, keep_all(stats, keep)), "the same input gives the same plan"
        if not isinstance(method, NoCompression):
            assert sum(plan.distinct_experts().values()) == keep * len(stats.layers), "exactly what was asked for"
        assert len(set(plan.written_experts().values())) == 1, "a stock checkpoint has one expert count"
    assert Plan(method.plan(stats, keep_all(stats, 12))).is_identity, "keeping all is the identity"
    for index, sums in before.items():
        for name, value in sums.items():
            np.testing.assert_array_equal(given_stats.layers[index][name], value, err_msg="statistics are read only")


@pytest.mark.parametrize("name", NAMES)
def test_conforms(name: str) -> None:
    conforms(make(name))


@pytest.mark.parametrize("name", NAMES)
def test_has_one_name_everywhere(name: str) -> None:
    assert type(make(name)).__module__ == f"methods.{name}"
    assert (ROOT / "methods" / f"{name}.py").exists()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("none", "random")])  # these do not look at experts
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.integers(3, 11))
@example(seed=194, keep=3)  # a layer with two experts of equal counts, of which one is dominant
def test_renaming_the_experts_renames_the_plan(name: str, seed: int, keep: int) -> None:
    method, stats = make(name), random_stats(seed)
    order = np.random.default_rng(seed).permutation(12)
    plain = method.plan(stats.only(method.needs), keep_all(stats, keep))
    moved = method.plan(permuted(stats, order).only(method.needs), keep_all(stats, keep))
    for index, layer in plain.items():
        assert decisions(moved[index]) == renamed(layer, order)


@pytest.mark.parametrize("name", NAMES)
def test_experts_never_routed_to_do_no_harm(name: str) -> None:
    method, stats = make(name), random_stats(3)
    for layer in stats.layers.values():
        for sum_name in ROUTED:
            layer.sums[sum_name][[2, 5]] = 0
    plan = method.plan(stats.only(method.needs), keep_all(stats, 6))
    weights = [source.weight for layer in plan.values() for slot in layer.slots for source in slot]
    assert np.isfinite(weights).all()
    if isinstance(method, Frequency | EAN | REAP):
        assert all(not {2, 5} & set(layer.kept_rows) for layer in plan.values()), "they are pruned first"


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_at_all_gives_a_plan(name: str) -> None:
    shapes = {"logit_gram": (12, 12), "all_output_sum": (12, 20)}
    zeros = {sum_name: np.zeros(shapes.get(sum_name, (12,))) for sum_name in (*ROUTED, *EXTRAS)}
    method = make(name)
    layers = method.plan(Stats({0: LayerStats(12, 0, zeros)}).only(method.needs), {0: 5})
    assert np.isfinite([s.weight for slot in layers[0].slots for s in slot]).all()


@pytest.mark.parametrize("name", ["frequency", "ean", "reap", "random"])
def test_pruning_is_nested_and_scale_free(name: str) -> None:
    method, stats = make(name), random_stats(5)
    kept = [set(method.plan(stats.only(method.needs), keep_all(stats, k))[1].kept_rows) for k in (3, 6, 9)]
    assert kept[0] < kept[1] < kept[2]
    scaled = Stats({i: LayerStats(12, 64, {k: 3 * v for k, v in s.sums.items()}) for i, s in stats.layers.items()})
    assert set(method.plan(scaled.only(method.needs), keep_all(stats, 6))[1].kept_rows) == kept[1]


def test_of_equal_experts_the_lowest_index_stays() -> None:
    ones = {name: np.ones(6) for name in ROUTED}
    for method in (Frequency(), EAN(), REAP()):
        assert method.plan_layer(LayerStats(6, 9, ones), 2).kept_rows == (0, 1)


def test_equal_counts_are_decided_by_the_gates() -> None:
    layer = LayerStats(3, 9, {"count": np.array([4.0, 4, 4]), "gate": np.array([1.0, 3, 2])})
    assert Frequency().plan_layer(layer, 2).kept_rows == (1, 2)


def test_scores_are_the_papers_formulas() -> None:
    layer = random_stats(7).layers[0]
    np.testing.assert_allclose(REAP().score(layer), layer["gate_norm"] / layer["count"])
    np.testing.assert_array_equal(EAN().score(layer), layer["norm"])
    np.testing.assert_array_equal(Frequency().score(layer), layer["count"])


def test_random_differs_by_seed_and_layer() -> None:
    stats = random_stats(0).only(frozenset())
    plans = [Random(seed).plan(stats, keep_all(stats, 6)) for seed in (0, 1)]
    assert plans[0] != plans[1]
    assert plans[0][0].kept_rows != plans[0][1].kept_rows


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 24), data=st.data())
def test_hc_smoe_clusters_as_scipy_cuts(seed: int, n: int, data: st.DataObject) -> None:
    clusters = data.draw(st.integers(1, n))
    points = np.random.default_rng(seed).normal(size=(n, 6))
    ours = average_linkage_clusters(points, clusters)
    labels = fcluster(linkage(points, "average"), clusters, criterion="maxclust")
    assert {frozenset(c) for c in ours} == {frozenset(np.flatnonzero(labels == k)) for k in set(labels)}


def test_hc_smoe_gives_exactly_the_clusters_asked_for_on_ties() -> None:
    assert len(average_linkage_clusters(np.zeros((8, 3)), 5)) == 5


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


# Planted truths, through a real model: calibrate, plan, export, load.


def logits_of(model_folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from harness.models import Model

    with torch.no_grad():
        return Model("planted", str(model_folder)).load("float32")(input_ids=ids).logits


@pytest.mark.parametrize("method", [EAN(), REAP()], ids=lambda method: type(method).__name__)
def test_a_silent_expert_is_pruned_and_nothing_changes_but_the_renormalisation(method: Method, tmp_path: Path) -> None:
    def silence(model: torch.nn.Module) -> None:
        for block in model.model.layers:
            block.mlp.experts.down_proj[3] = 0

    model = write_model("qwen3_moe", tmp_path, silence)
    stats = calibrate(model.load("float32"), token_batches())
    assert all(layer["count"][3] > 0 for layer in stats.layers.values()), "it is routed to, and silent"
    plan = method.plan(stats.only(method.needs), keep_all(stats, EXPERTS - 1))
    assert all(set(range(EXPERTS)) - set(layer.kept_rows) == {3} for layer in plan.values())


def test_an_expert_without_tokens_is_what_frequency_prunes(tmp_path: Path) -> None:
    model = write_model("qwen3_moe", tmp_path)
    loaded = model.load("float32")
    for block in loaded.model.layers:
        block.mlp.gate.register_forward_hook(lambda _, __, out: _avoid_expert(out, 5))
    stats = calibrate(loaded, token_batches())
    assert all(layer["count"][5] == 0 for layer in stats.layers.values())
    plan = Frequency().plan(stats.only(Frequency.needs), keep_all(stats, EXPERTS - 1))
    assert all(set(range(EXPERTS)) - set(layer.kept_rows) == {5} for layer in plan.values())


def _avoid_expert(output: tuple[torch.Tensor, ...], expert: int) -> tuple[torch.Tensor, ...]:
    """Route as if the expert's logit were -inf."""
    logits, scores, _ = output
    masked = logits.clone()
    masked[:, expert] = float("-inf")
    values, chosen = torch.topk(masked.softmax(-1), scores.shape[-1], dim=-1)
    return logits, values / values.sum(-1, keepdim=True), chosen


@pytest.mark.parametrize("method", [HCSMoE(), MSMoE()], ids=lambda method: type(method).__name__)
def test_twin_experts_are_merged_and_the_output_stays(method: Method, tmp_path: Path) -> None:
    def plant_twins(model: torch.nn.Module) -> None:
        for block in model.model.layers:
            experts, gate = block.mlp.experts, block.mlp.gate
            for a, b in ((0, 6), (1, 4)):
                experts.gate_up_proj[b] = experts.gate_up_proj[a]
                experts.down_proj[b] = experts.down_proj[a]
                gate.weight[b] = gate.weight[a] * (1 + 1e-3)

    model = write_model("qwen3_moe", tmp_path / "model", plant_twins)
    stats = calibrate(model.load("float32"), token_batches(), frozenset(EXTRAS))
    for layer in stats.layers.values():  # M-SMoE's centres are the most used experts: make one of each pair a centre
        layer.sums["count"] = np.array([9.0, 9, 9, 9, 1, 9, 1, 9]) * 10
    plan = Plan(method.plan(stats.only(method.needs), keep_all(stats, EXPERTS - 2)))
    for layer in plan.layers.values():
        assert layer.routes[0] == layer.routes[6] and layer.routes[1] == layer.routes[4]
        assert len(layer.slots) == EXPERTS - 2
    (tmp_path / "merged").mkdir()
    checkpoint.export(model, plan, tmp_path / "merged")
    ids = token_batches()[0][0]
    torch.testing.assert_close(logits_of(tmp_path / "merged", ids), logits_of(model.folder, ids), atol=1e-4, rtol=1e-4)
