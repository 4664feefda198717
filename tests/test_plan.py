"""Plans: what they may say, that they survive the disk, and what they cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import budget
from harness import plan as plans
from harness.errors import UserError
from harness.plan import LayerPlan, Plan, Source


@st.composite
def layer_plans(draw: st.DrawFn, experts: int = 8) -> LayerPlan:
    """Any mixture of pruning and merging."""
    labels = draw(st.lists(st.integers(-1, 3), min_size=experts, max_size=experts).filter(lambda x: max(x) >= 0))
    used = sorted({label for label in labels if label >= 0})
    weights = draw(st.lists(st.floats(0, 5), min_size=experts, max_size=experts))
    slots = tuple(plans._weighted([e for e, x in enumerate(labels) if x == label], weights) for label in used)
    return LayerPlan(slots, tuple(used.index(label) if label >= 0 else None for label in labels))


@given(st.dictionaries(st.integers(0, 90), layer_plans(), min_size=1, max_size=4))
def test_survive_json(layers: dict[int, LayerPlan]) -> None:
    plan = Plan(layers, {"label": "x", "seconds": 0.5})
    found = plans.from_json(plans.to_json(plan))
    assert found == plan
    assert found.digest == plan.digest


@given(layer_plans(), layer_plans())
def test_digest_tells_plans_apart_and_ignores_how_they_were_found(a: LayerPlan, b: LayerPlan) -> None:
    assert (Plan({0: a}).digest == Plan({0: b}).digest) == (a == b)
    assert Plan({0: a}, {"label": "one"}).digest == Plan({0: a}, {"label": "two"}).digest


def test_pruning_keeps_the_old_order() -> None:
    layer = LayerPlan.prune([6, 1, 3], 8)
    assert layer.kept_rows == (1, 3, 6)
    assert layer.slots == ((Source(1),), (Source(3),), (Source(6),))
    assert layer.routes == (None, 0, None, 1, None, None, 2, None)


def test_merging_weighs_by_use_and_never_writes_an_empty_expert() -> None:
    layer = LayerPlan.merge([[2, 0], [1, 3]], [3.0, 0.0, 1.0, 0.0])
    assert layer.routes == (0, 1, 0, 1)
    assert layer.slots == ((Source(0, 0.75), Source(2, 0.25)), (Source(1, 0.5), Source(3, 0.5)))
    assert layer.kept_rows == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("slots", "routes"),
    [
        (((),), (0,)),
        (((Source(4),),), (0, None)),
        (((Source(0, 0.5),),), (0, None)),
        (((Source(0),), (Source(1),)), (0, 0)),
        (((Source(0),),), (1, 0)),
    ],
    ids=["empty slot", "unknown expert", "weights", "slot without row", "route without slot"],
)
def test_nonsense_is_refused(slots: tuple, routes: tuple) -> None:
    with pytest.raises(AssertionError):
        LayerPlan(slots, routes)


def test_a_plan_for_another_model_is_refused() -> None:
    plan = Plan({0: LayerPlan.prune([0, 1], 8)})
    plan.validate({0: 8}, top_k=2)
    with pytest.raises(UserError, match="another model"):
        plan.validate({1: 8}, top_k=2)
    with pytest.raises(UserError, match="another model"):
        plan.validate({0: 16}, top_k=2)
    with pytest.raises(UserError, match="top_k"):
        plan.validate({0: 8}, top_k=3)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 99, "layers": {}, "provenance": {}}'])
def test_a_damaged_plan_is_one_clear_message(text: str) -> None:
    with pytest.raises(UserError):
        plans.from_json(text)


@pytest.mark.parametrize(
    ("experts", "ratio", "keep"),
    [(128, 0.25, 96), (128, 0.5, 64), (60, 0.33, 41), (64, 0.3, 45), (10, 0.3, 7), (8, 0, 8)],
)
def test_rounding_drops_the_floor(experts: int, ratio: float, keep: int) -> None:
    assert budget.keep_count(experts, ratio) == keep


@given(st.integers(1, 512), st.floats(0, 0.999))
def test_rounding_never_keeps_less_than_the_ratio_says(experts: int, ratio: float) -> None:
    keep = budget.keep_count(experts, ratio)
    assert experts * (1 - ratio) - 1e-6 <= keep < experts * (1 - ratio) + 1


def test_too_high_a_ratio_names_the_largest_usable_one() -> None:
    experts = {0: 128, 1: 128}
    with pytest.raises(UserError, match=r"ratio=0.95 keeps 7 of 128 .* 8 each token .* ratio for this model: 0.9375"):
        budget.check_keep(budget.uniform(experts, 0.95), experts, 0.95, {}, top_k=8)
    budget.check_keep(budget.uniform(experts, 0.9375), experts, 0.9375, {}, top_k=8)


def test_routing_groups_must_divide_what_is_kept() -> None:
    experts, config = {3: 64}, {"n_group": 8, "topk_group": 4}
    with pytest.raises(UserError, match="groups"):
        budget.check_keep(budget.uniform(experts, 0.3), experts, 0.3, config, top_k=8)
    budget.check_keep(budget.uniform(experts, 0.5), experts, 0.5, config, top_k=8)
