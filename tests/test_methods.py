"""Every method in conf/method/, found by listing the folder, keeps the promises that make a comparison fair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from harness.build import build
from harness.decide import decide
from harness.errors import StageError
from harness.models import ROOT
from harness.plan import LayerPlan, Plan, from_json, to_json
from harness.stats import BARRIERS, EXTRAS, MEASURES, OF_OUTPUTS, PAIRWISE, ROUTED, WEIGHTS, LayerStats, Stats
from methods import Method, ScoreMethod
from methods.none import NoCompression
from methods.random import Random
from tests.toy import ToyLayer, ToySearch, random_stats, stats_of, toy_layer, toy_layers

NAMES = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
PROTECTED = [f"{name} protected" for name in ("frequency", "reap", "aimer")]  # with super experts kept
LOOKING = [name for name in [*NAMES, *PROTECTED] if name not in ("none", "random")]  # the others look at no expert
CALIBRATED = [name for name in LOOKING if "aimer" not in name]
QUICK = {"rco": {"steps": 12}}  # its promises do not hang on how long it searches
DRAWN = ("rco",)  # searches that draw by a seed: which experts they take is not settled by statistics alone
KEEPS = (4, 7, 9, 12)


def make(name: str, folder: Path = ROOT / "conf" / "method", **changes: object) -> Method:
    """The method as its YAML describes it, with these changes; protected, if its name says so."""
    if name.endswith(" protected"):
        rule = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "protect" / "super_experts.yaml"))
        score = {"_target_": OmegaConf.load(folder / f"{name.split()[0]}.yaml")._target_}
        return build("protect", {**rule, "method": score})
    config = OmegaConf.merge({"seed": 0}, {"method": OmegaConf.load(folder / f"{name}.yaml")})
    fields = OmegaConf.to_container(config, resolve=True)["method"]
    assert fields.pop("label"), f"{name}.yaml has no label for tables"
    return build("method", {**fields, **QUICK.get(name, {}), **changes})


def keep_all(stats: Stats, keep: int) -> dict[int, int]:
    return dict.fromkeys(stats.layers, keep)


def decisions(layer: LayerPlan) -> set[tuple[frozenset, frozenset]]:
    """A layer plan without the order of its slots: (sources with rounded weights, experts routed there)."""
    return {
        (
            frozenset((source.expert, round(source.weight, 6)) for source in slot),
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
    assert method.needs <= {*ROUTED, *EXTRAS, *WEIGHTS, *BARRIERS, *MEASURES}
    stats = random_stats(0)
    before = {i: {k: v.copy() for k, v in layer.sums.items()} for i, layer in stats.layers.items()}
    for keep in KEEPS:
        plan = Plan(decide(method, stats, keep_all(stats, keep)))  # reading what it does not declare raises
        plan.validate({index: 12 for index in stats.layers}, top_k=1)
        assert plan.layers == decide(method, stats, keep_all(stats, keep)), "the same input gives the same plan"
        assert from_json(to_json(plan)).layers == plan.layers, "a plan survives its file"
        if not isinstance(method, NoCompression):
            assert sum(plan.distinct_experts().values()) == keep * len(stats.layers), "exactly what was asked for"
        if getattr(method, "counts", "layer") == "layer":
            assert len(set(plan.written_experts().values())) == 1, "a stock checkpoint has one expert count"
    assert Plan(decide(method, stats, keep_all(stats, 12))).is_identity, "keeping all is the identity"
    for index, sums in before.items():
        for name, value in sums.items():
            np.testing.assert_array_equal(stats.layers[index][name], value, err_msg="statistics are read only")


@pytest.mark.parametrize("name", [*NAMES, *PROTECTED])
def test_conforms(name: str) -> None:
    conforms(make(name))


@pytest.mark.parametrize("name", NAMES)
def test_has_one_name_everywhere(name: str) -> None:
    assert type(make(name)).__module__ == f"methods.{name}"
    assert (ROOT / "methods" / f"{name}.py").exists()


@pytest.mark.parametrize("name", [name for name in LOOKING if name not in DRAWN])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.integers(3, 11))
@example(seed=194, keep=3)
def test_renaming_the_experts_renames_the_plan(name: str, seed: int, keep: int) -> None:
    method, layers = make(name), toy_layers(seed)
    order = np.random.default_rng(seed).permutation(12)
    stats, moved = stats_of(layers), stats_of({index: layer.renamed(order) for index, layer in layers.items()})
    plain = decide(method, stats, keep_all(stats, keep))
    for index, layer in decide(method, moved, keep_all(moved, keep)).items():
        assert decisions(layer) == renamed(plain[index], order)


def test_ties_are_broken_without_looking_at_how_experts_are_numbered() -> None:
    """Equal counts, which are common, fall to the gates; nothing but exact twins is left to the index."""
    layer = LayerStats(3, 9, {"count": np.array([4.0, 4, 4]), "gate": np.array([1.0, 3, 2])})
    assert make("frequency").plan_layer(layer, 2).kept_rows == (1, 2)


@pytest.mark.parametrize("name", CALIBRATED)
def test_experts_never_routed_to_do_no_harm(name: str) -> None:
    method, layer = make(name), toy_layer(np.random.default_rng(3))
    layer.logits[:, [2, 5]] = -50
    stats = stats_of({0: layer})
    assert (stats.layers[0]["count"][[2, 5]] == 0).all()
    plan = decide(method, stats, {0: 6})[0]
    assert np.isfinite([source.weight for slot in plan.slots for source in slot]).all()
    if isinstance(method, ScoreMethod) or name in ("hope", "frozen_gate", "partial_preserve", "ream"):
        assert not {2, 5} & set(plan.kept_rows), "they are pruned or absorbed first"


@pytest.mark.parametrize("name", [name for name in LOOKING if name not in DRAWN])
def test_of_twin_experts_the_lower_index_is_not_worse_off(name: str) -> None:
    """Duplicates: any method gives a plan, and if just one of two twins keeps its router row it is the first."""
    layer = toy_layer(np.random.default_rng(4))
    for a, b in ((1, 7), (3, 10)):
        layer.outputs[:, b], layer.weights[b] = layer.outputs[:, a], layer.weights[a]
    sums = dict(layer.stats().sums)
    for sum_name, value in sums.items():  # twins in every statistic, also where routing told them apart
        index = np.arange(12)
        index[[7, 10]] = 1, 3
        if sum_name.startswith("tri"):
            sums[sum_name] = value[:0]  # in no triangle: their third corners would tell the twins apart
        else:
            sums[sum_name] = value[np.ix_(index, index)] if is_pairwise(sum_name) else value[index]
    stats = Stats({0: LayerStats(12, 160, sums)}, error=lambda index, plan: layer.error(plan))
    for keep in (4, 6, 8, 11):
        plan = decide(make(name), stats, {0: keep})[0]
        assert len(plan.slots) == keep
        for a, b in ((1, 7), (3, 10)):
            assert not (b in plan.kept_rows and a not in plan.kept_rows)


def is_pairwise(sum_name: str) -> bool:
    return sum_name in PAIRWISE or sum_name.startswith("pair_barrier")


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_at_all_gives_a_plan(name: str) -> None:
    shapes = {**dict.fromkeys(PAIRWISE, (12, 12)), **dict.fromkeys(OF_OUTPUTS, (12, 20))}
    shapes |= {name: (12, 12) for name in BARRIERS if is_pairwise(name)}
    shapes |= {name: (0, 3) if name.startswith("triangles") else (0,) for name in BARRIERS if not is_pairwise(name)}
    zeros = {sum_name: np.zeros(shapes.get(sum_name, (12,))) for sum_name in (*ROUTED, *EXTRAS, *WEIGHTS, *BARRIERS)}
    search = ToySearch({0: toy_layer(np.random.default_rng(7))})
    stats = Stats({0: LayerStats(12, 0, zeros)}, error=lambda index, plan: 0.0, search=lambda sequences: search)
    layers = decide(make(name), stats, {0: 5})
    assert np.isfinite([s.weight for slot in layers[0].slots for s in slot]).all()


@pytest.mark.parametrize("name", LOOKING)
def test_a_sum_that_is_not_finite_is_refused(name: str) -> None:
    method = make(name)
    for sum_name in sorted(method.needs - set(MEASURES)):
        stats = random_stats(1)
        stats.layers[2].sums[sum_name].flat[3] = np.nan
        with pytest.raises(StageError, match=f"{sum_name} of layer 2 is not finite"):
            decide(method, stats, keep_all(stats, 6))


@pytest.mark.parametrize("name", [name for name in [*NAMES, *PROTECTED] if make(name).nested])
def test_more_is_left_at_a_lower_ratio_of_the_same(name: str) -> None:
    """Pruned: the experts kept are a subset. Merged: the clusters are unions of those of the lower ratio."""
    method, stats = make(name), random_stats(5)
    plans = [decide(method, stats, keep_all(stats, keep)) for keep in (3, 5, 8, 11)]
    for fewer, more in zip(plans, plans[1:], strict=False):
        for index, plan in fewer.items():
            assert set(plan.kept_rows) <= set(more[index].kept_rows)
            for slot in more[index].slots:
                routes = {plan.routes[source.expert] for source in slot if len(slot) > 1}
                assert len(routes) <= 1, "what is together stays together"


@pytest.mark.parametrize("name", LOOKING)
def test_the_scale_of_outputs_and_weights_says_nothing(name: str) -> None:
    """Outputs, residual stream and weights eight times as large: every score scales, and no plan changes."""
    layers = toy_layers(5)
    scaled = {
        index: ToyLayer(layer.logits, 8 * layer.outputs, 8 * layer.residual, 8 * layer.weights)
        for index, layer in layers.items()
    }
    stats, larger = stats_of(layers), stats_of(scaled)
    for keep in (4, 7):
        plain, other = (decide(make(name), which, keep_all(stats, keep)) for which in (stats, larger))
        assert {i: decisions(p) for i, p in plain.items()} == {i: decisions(p) for i, p in other.items()}


def test_more_text_of_the_same_kind_changes_no_plan() -> None:
    """Every sum times three, as if each token had come three times."""
    for name in LOOKING:
        method, stats = make(name), random_stats(6)
        layers = {
            index: LayerStats(
                12,
                3 * layer.tokens,
                {k: v if k in (*WEIGHTS, *BARRIERS, "output_max") else 3 * v for k, v in layer.sums.items()},
            )
            for index, layer in stats.layers.items()
        }
        more = Stats(layers, error=stats.error, search=stats.search)
        plain, tripled = (decide(method, which, keep_all(stats, 7)) for which in (stats, more))
        assert {i: decisions(p) for i, p in plain.items()} == {i: decisions(p) for i, p in tripled.items()}, name


def test_random_differs_by_seed_and_layer() -> None:
    stats = random_stats(0).only(frozenset())
    plans = [Random(seed).plan(stats, keep_all(stats, 6)) for seed in (0, 1)]
    assert plans[0] != plans[1]
    assert plans[0][0].kept_rows != plans[0][1].kept_rows
