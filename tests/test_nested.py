"""Sorting leaves the model what it is; a slice is a prefix, and a mask of the whole model computes what it does."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    PreTrainedModel,
)

from harness.blocks import moe_blocks
from harness.distill import divergence, soft_cross_entropy
from harness.elastic import Nested
from harness.errors import UserError
from harness.importance import importance
from harness.nested import (
    AXES,
    Budget,
    NestedOrder,
    descending,
    dims,
    expert_order,
    manifest,
    parameters,
    sizes,
    skeleton,
    slice_model,
    sliced_config,
    sort_model,
    views,
)
from harness.nested_masks import Masks, hidden_norms, masked, masking
from methods.allocations import orders
from methods.reap import REAP
from tests.conftest import family_config, token_batches
from tests.exact import build, compute_exactly
from tests.toy import random_stats

MODELS = ("qwen3_moe tied", "mixtral", "qwen2_moe")
CUTS = {
    "experts": Budget("experts", experts=5),
    "width": Budget("width", width=7),
    "hidden": Budget("hidden", hidden=20),
    "heads": Budget("heads", heads=2),
    "jointly": Budget("jointly", experts=3, width=9, hidden=12, heads=1),
}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_exactly(monkeypatch)


def logits(model: PreTrainedModel) -> Tensor:
    """[tokens, V] of a padded batch, its padding left out."""
    ids, mask = token_batches(1)[0]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def shuffled(model: PreTrainedModel, axes: tuple[str, ...], seed: int = 0) -> NestedOrder:
    """A random order of these axes; the others stay as they are."""
    rng, order = np.random.default_rng(seed), NestedOrder.identity(model)
    drawn = {
        "experts": {layer: rng.permutation(old) for layer, old in order.experts.items()},
        "units": {layer: rng.permuted(old, axis=1) for layer, old in order.units.items()},
        "hidden": rng.permutation(order.hidden),
        "heads": {layer: rng.permutation(old) for layer, old in order.heads.items()},
    }
    return replace(order, **{name: drawn[name] for name in ("units" if axis == "width" else axis for axis in axes)})


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


@pytest.mark.parametrize("axes", [*[(axis,) for axis in AXES], AXES], ids=[*AXES, "jointly"])
def test_sorting_leaves_the_output_as_it_was(model: PreTrainedModel, axes: tuple[str, ...]) -> None:
    before, weights = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sort_model(model, shuffled(model, axes))
    assert any(not torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(model), before, atol=1e-10, rtol=0)


def test_every_component_lies_where_the_order_says(model: PreTrainedModel) -> None:
    order = shuffled(model, AXES)
    old = {layer: block.experts.down_proj.detach().clone() for layer, block in moe_blocks(model).items()}
    sort_model(model, order)
    for layer, block in moe_blocks(model).items():
        for new, expert in enumerate(order.experts[layer]):
            for place, unit in ((0, order.units[layer][expert, 0]), (15, order.units[layer][expert, 15])):
                column = old[layer][expert][order.hidden, unit]
                torch.testing.assert_close(block.experts.down_proj[new, :, place], column, atol=0, rtol=0)


@pytest.mark.parametrize("cut", CUTS)
def test_a_masked_model_computes_what_its_slice_computes(model: PreTrainedModel, cut: str) -> None:
    sort_model(model, shuffled(model, AXES))
    whole, small = logits(model), logits(slice_model(model, CUTS[cut]))
    with masked(model, CUTS[cut]):
        torch.testing.assert_close(logits(model), small, atol=1e-12, rtol=1e-12)
    assert (small - whole).abs().max() > 0.01
    torch.testing.assert_close(logits(model), whole, atol=0, rtol=0)  # and the mask is gone


def test_statistics_over_all_channels_would_be_another_model(model: PreTrainedModel) -> None:
    """The naive mask: channels set to zero, the norm's mean still over all of them."""
    budget = CUTS["hidden"]
    first = (torch.arange(32) < budget.hidden).double()

    def naive(norm: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden = args[0] * first
        return norm.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    with ExitStack() as stack:
        for norm in hidden_norms(model).values():
            stack.callback(norm.register_forward_hook(naive).remove)
        found = logits(model)
    assert (found - logits(slice_model(model, budget))).abs().max() > 0.5


def test_a_slice_of_a_slice_is_the_slice(model: PreTrainedModel) -> None:
    small = Budget("small", experts=3, width=5, hidden=12, heads=1)
    medium = Budget("medium", experts=6, width=10, hidden=20, heads=2)
    once, twice = slice_model(model, small), slice_model(slice_model(model, medium), small)
    for (name, one), (_, other) in zip(once.state_dict().items(), twice.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    torch.testing.assert_close(logits(once), logits(twice), atol=0, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.tuples(st.integers(2, 8), st.integers(1, 16), st.integers(1, 32), st.integers(1, 3)), st.data())
def test_masks_of_smaller_budgets_lie_within_those_of_larger_ones(large: tuple[int, ...], data: st.DataObject) -> None:
    model = QWEN
    least = (2, 1, 1, 1)
    small = [data.draw(st.integers(low, high)) for low, high in zip(least, large, strict=True)]
    inner, outer = (Masks.of(model, Budget("", *counts)) for counts in (small, large))
    assert (inner.hidden <= outer.hidden).all() and inner.hidden.sum() == small[2]
    for axis, count in (("experts", small[0]), ("width", small[1]), ("heads", small[3])):
        for layer, mask in getattr(inner, axis).items():
            assert (mask <= getattr(outer, axis)[layer]).all() and mask.sum() == count


def test_a_masked_expert_is_never_chosen_and_top_k_experts_are_left(model: PreTrainedModel) -> None:
    chosen: list[Tensor] = []
    budget = Budget("", experts=2)
    with masked(model, budget), ExitStack() as stack:
        for block in moe_blocks(model).values():
            hook = block.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
            stack.callback(hook.remove)
        logits(model)
    assert all(set(index.unique().tolist()) == {0, 1} for index in chosen)
    with pytest.raises(UserError, match="keeps 1 experts of 8. Possible are 2 to 8"):
        slice_model(model, Budget("tiny", experts=1))
    with pytest.raises(UserError, match="keeps 33 hidden of 32"):
        slice_model(model, Budget("large", hidden=33))


def test_the_largest_budget_is_the_parent(model: PreTrainedModel) -> None:
    torch.testing.assert_close(logits(slice_model(model, Budget("all"))), logits(model), atol=0, rtol=0)


@pytest.mark.parametrize("cut", CUTS)
def test_config_weights_and_manifest_count_the_same_parameters(model: PreTrainedModel, cut: str) -> None:
    budget = CUTS[cut]
    held = sum(parameter.numel() for parameter in slice_model(model, budget).parameters())
    with torch.device("meta"):
        promised = sum(p.numel() for p in type(model)(sliced_config(model, budget)).parameters())
    total, active = parameters(model, budget)
    assert held == promised == total
    kept = budget.kept(sizes(model))
    of_one_expert = 3 * kept["hidden"] * kept["width"]
    assert total - active == len(moe_blocks(model)) * (kept["experts"] - 2) * of_one_expert


def test_the_manifest_names_orders_budgets_and_parent() -> None:
    model = build("qwen3_moe")
    order = shuffled(model, AXES)
    made = manifest(model, order, [Budget("full"), CUTS["width"]], "parent's hash")
    assert made["nested"] is True and made["norm_mode"] == "active" and made["parent"] == "parent's hash"
    assert [entry["name"] for entry in made["budgets"]] == ["full", "width"]
    assert made["budgets"][0]["parameters"] == model.num_parameters()
    other = manifest(model, shuffled(model, ("width",)), [], "")["orders"]
    assert made["orders"]["hidden"] != other["hidden"]
    assert manifest(model, shuffled(model, AXES), [], "")["orders"] == made["orders"]


@pytest.mark.parametrize("cut", ["experts", "width", "jointly"])
def test_gradients_through_a_slice_are_those_through_the_mask(model: PreTrainedModel, cut: str) -> None:
    ids, mask = token_batches(1)[0]
    shared = dict(model.named_parameters())

    def gradients(run: Any) -> dict[str, Tensor]:
        for parameter in shared.values():
            parameter.grad = None
        (run().logits.log_softmax(-1)[..., 5] * mask).sum().backward()
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in shared.items()}

    def sliced() -> Any:
        asked = {"input_ids": ids, "attention_mask": mask}
        return functional_call(skeleton(model, CUTS[cut]), views(model, CUTS[cut]), kwargs=asked)

    through_views = gradients(sliced)
    with masked(model, CUTS[cut]):
        through_masks = gradients(lambda: model(input_ids=ids, attention_mask=mask))
    assert any(found.abs().max() > 0.01 for found in through_views.values())
    for name, found in through_views.items():
        torch.testing.assert_close(found, through_masks[name], atol=1e-10, rtol=1e-9, msg=name)


def test_a_student_draws_a_slice_at_each_call(model: PreTrainedModel) -> None:
    student = Nested(model, [Budget("full"), CUTS["experts"], CUTS["jointly"]])
    student.draws = iter([2, 0, 1])
    for budget in (CUTS["jointly"], Budget("full"), CUTS["experts"]):
        torch.testing.assert_close(logits(student), logits(slice_model(model, budget)), atol=0, rtol=0)
    assert {id(weight) for weight in student.parameters()} == {id(weight) for weight in model.parameters()}


def test_a_model_that_learns_from_itself_has_nothing_to_learn(model: PreTrainedModel) -> None:
    ids = token_batches(1)[0][0]
    wanted = model(input_ids=ids).logits.detach()
    student = Nested(model, [Budget("full"), CUTS["width"]])
    said = student(input_ids=ids).logits
    assert divergence(said, wanted).abs().max() < 1e-12
    soft_cross_entropy(said, wanted).backward()
    assert max(float(weight.grad.abs().max()) for weight in model.parameters() if weight.grad is not None) < 1e-12
    student.draws = iter([1])
    soft_cross_entropy(student(input_ids=ids).logits, wanted).backward()
    assert max(float(weight.grad.abs().max()) for weight in model.parameters() if weight.grad is not None) > 1e-3


def test_soft_masks_carry_gradients_that_finite_differences_confirm() -> None:
    model = build("qwen3_moe")
    moe = list(moe_blocks(model))
    ids = token_batches(1)[0][0][:1, :5]

    def loss(width: Tensor, hidden: Tensor, heads: Tensor) -> Tensor:
        soft = replace(
            Masks.full(model), width=dict.fromkeys(moe, width), hidden=hidden, heads=dict.fromkeys(range(3), heads)
        )
        with masking(model, soft):
            return model(input_ids=ids).logits.log_softmax(-1)[..., 5].mean()

    inputs = [torch.rand(count, dtype=torch.float64).requires_grad_() for count in (16, 32, 3)]
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-6, rtol=1e-4, fast_mode=True)


def naive_importance(model: PreTrainedModel) -> tuple[dict[int, np.ndarray], np.ndarray, dict[int, np.ndarray]]:
    """Token by token, from what enters each module."""
    seen: dict[str, list[Tensor]] = {}
    asked = ("mlp", "o_proj", "norm", "layernorm")
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, []).append((args, out)))
        for name, module in model.named_modules()
        if name.endswith(asked) and "q_norm" not in name and "k_norm" not in name
    ]
    units = {layer: np.zeros((8, 16)) for layer in moe_blocks(model)}
    hidden, heads = np.zeros(32), {layer: np.zeros(3) for layer in range(3)}
    for ids, mask in token_batches(2):
        seen.clear()
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
        for row, place in mask.nonzero().tolist():
            for [(_, out)] in (calls for name, calls in seen.items() if "norm" in name):
                hidden += out[row, place].abs().numpy()
            for layer in heads:
                said = seen[f"model.layers.{layer}.self_attn.o_proj"][0][0][0][row, place].view(3, 2, 8)
                heads[layer] += np.array([sum(float(q.norm()) for q in group) for group in said])
            for layer, block in moe_blocks(model).items():
                x = seen[f"model.layers.{layer}.mlp"][0][0][0][row, place]
                for expert in (block.gate.weight @ x).topk(2).indices.tolist():
                    gate, up = (block.experts.gate_up_proj[expert] @ x).split(16)
                    units[layer][expert] += (torch.nn.functional.silu(gate) * up).abs().detach().numpy()
    for hook in hooks:
        hook.remove()
    return units, hidden, heads


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_importance_is_what_a_loop_over_tokens_finds(kind: str) -> None:
    model = build(kind)
    before = logits(model)
    found = importance(model, token_batches(2))
    units, hidden, heads = naive_importance(model)
    np.testing.assert_allclose(found.hidden, hidden, rtol=1e-9)
    for layer in heads:
        np.testing.assert_allclose(found.heads[layer], heads[layer], rtol=1e-9)
    for layer in units:
        np.testing.assert_allclose(found.units[layer], units[layer], rtol=1e-9)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)


def test_units_that_never_speak_are_the_last_to_stay() -> None:
    model = build("qwen3_moe")
    dead = {expert: [(3 * expert + place) % 16 for place in range(4)] for expert in range(8)}
    with torch.no_grad():
        for block in moe_blocks(model).values():
            for expert, silent in dead.items():
                block.experts.gate_up_proj[expert, silent] = 0
    found = importance(model, token_batches())
    order = found.order({layer: descending(rows.sum(1)) for layer, rows in found.units.items()})
    for layer, rows in order.units.items():
        for expert, silent in dead.items():
            if found.units[layer][expert].any():
                assert set(rows[expert, 12:]) == set(silent)
    before = logits(model)
    sort_model(model, order)
    torch.testing.assert_close(logits(slice_model(model, Budget("", width=12))), before, atol=1e-10, rtol=0)


def test_a_nested_methods_plans_become_an_order_of_experts() -> None:
    stats = random_stats(0)
    for layer, kept in orders(stats, REAP(), stats.layers, 1).items():
        score = REAP().score(stats.layers[layer])
        assert list(expert_order(kept)) == list(np.lexsort([np.arange(len(score)), -score]))


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(9)), st.integers(1, 9))
def test_any_order_is_found_again_from_its_prefixes(order: list[int], least: int) -> None:
    found = expert_order({count: sorted(order[:count]) for count in range(least, 10)})
    assert list(found[least:]) == order[least:] and sorted(found[:least]) == sorted(order[:least])


def test_sets_that_do_not_nest_are_no_order() -> None:
    with pytest.raises(UserError, match="kept at 2"):
        expert_order({1: (0,), 2: (1, 2), 3: (0, 1, 2)})


def test_layouts_that_are_not_known_are_refused_with_the_reason() -> None:
    glm = AutoModelForCausalLM.from_config(family_config("glm4_moe"))
    with pytest.raises(UserError, match=r"Glm4MoeForCausalLM cannot be sorted and sliced: its parameter .*shared_exp"):
        dims(glm)
    olmoe = AutoModelForCausalLM.from_config(
        OlmoeConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=8,
            num_experts_per_tok=2,
        )
    )
    with pytest.raises(UserError, match="normalises all heads together"):
        dims(olmoe)


QWEN = build("qwen3_moe")
