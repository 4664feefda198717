"""The budget router: noise, masks, cost and gradients are what the formulas say, and it finds a planted shape."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from harness.blocks import moe_blocks
from harness.distill import soft_cross_entropy
from harness.elastic_router import (
    KAPPA,
    TAU,
    BudgetRouter,
    Choice,
    anneal,
    cost,
    cost_loss,
    expected_sizes,
    gumbel,
    learn,
    probabilities,
    soft_mask,
    soft_masks,
)
from harness.errors import UserError
from harness.nested import Budget, parameters, sizes, slice_model, terms
from harness.nested_masks import Masks, masking
from tests.conftest import token_batches
from tests.exact import build, compute_exactly

CHOICES = (
    Choice("experts", (8, 5, 2), 8),
    Choice("width", (16, 9), 16, layers=(0, 2)),
    Choice("hidden", (32, 20), 32),
    Choice("heads", (3, 2, 1), 3),
)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_exactly(monkeypatch)


@pytest.fixture
def model() -> PreTrainedModel:
    """Layers 0 and 2 have experts, layer 1 has none."""
    return build("qwen3_moe").requires_grad_(False)


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return gumbel(shape, torch.Generator().manual_seed(seed))


def one_hot(choice: Choice, places: tuple[int, ...]) -> Tensor:
    return torch.eye(len(choice.sizes), dtype=torch.float64)[list(places)]


def test_chances_add_up_and_turn_into_a_choice_as_it_gets_colder() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for tau in (1.0, 0.3, 0.05, 1e-4):
        chances = probabilities(logits, noise((5, 4)), 3.0, tau)
        torch.testing.assert_close(chances.sum(-1), torch.ones(5, dtype=torch.float64), atol=1e-12, rtol=0)
    best = (3.0 * logits.log_softmax(-1) + noise((5, 4))).argmax(-1)
    torch.testing.assert_close(chances, torch.eye(4, dtype=torch.float64)[best], atol=1e-9, rtol=0)


def test_gumbel_noise_draws_each_size_as_often_as_its_probability_says() -> None:
    logits = torch.tensor([[0.5, -1.0, 1.5]], dtype=torch.float64)
    draws = 20_000
    drawn = probabilities(logits, noise((draws, 3)), 1.0, 1.0).argmax(-1).bincount(minlength=3) / draws
    expected = logits.softmax(-1)[0]
    assert ((drawn - expected).abs() < 4 * (expected * (1 - expected) / draws).sqrt()).all()


def test_a_certain_choice_masks_what_its_budget_masks(model: PreTrainedModel) -> None:
    whole = Masks.full(model)
    for places in itertools.product(range(3), range(2), range(2), range(3)):
        chances = {c.axis: one_hot(c, (p,) * max(1, len(c.layers))) for c, p in zip(CHOICES, places, strict=True)}
        kept = {choice.axis: choice.sizes[place] for choice, place in zip(CHOICES, places, strict=True)}
        hard, soft = Masks.of(model, Budget("", **kept)), soft_masks(whole, CHOICES, chances)
        assert torch.equal(hard.hidden, soft.hidden)
        for axis in ("experts", "width", "heads"):
            for layer, mask in getattr(hard, axis).items():
                assert torch.equal(mask, getattr(soft, axis)[layer])


def test_a_soft_mask_is_the_chance_that_a_component_stays() -> None:
    chances = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    expected = [1.0] * 2 + [0.8] * 3 + [0.5] * 3
    np.testing.assert_allclose(soft_mask(chances, CHOICES[0])[0], expected, atol=1e-15)


def test_layers_may_choose_for_themselves(model: PreTrainedModel) -> None:
    chances = {c.axis: one_hot(c, (0, 1) if c.layers else (0,)) for c in CHOICES}
    found = soft_masks(Masks.full(model), CHOICES, chances)
    assert [int(found.width[layer].sum()) for layer in (0, 2)] == [16, 9]
    whole, saved = parameters(model, Budget(""))[0], 3 * 8 * 32 * (16 - 9)
    assert float(cost(terms(model), expected_sizes(CHOICES, chances, sizes(model)))) == whole - saved


@pytest.mark.parametrize("places", [(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, 2), (0, 1, 0, 2)])
def test_the_cost_of_a_certain_choice_is_the_parameters_of_its_slice(
    model: PreTrainedModel, places: tuple[int, ...]
) -> None:
    chances = {c.axis: one_hot(c, (p,) * max(1, len(c.layers))) for c, p in zip(CHOICES, places, strict=True)}
    kept = Budget("", **{choice.axis: choice.sizes[place] for choice, place in zip(CHOICES, places, strict=True)})
    size = expected_sizes(CHOICES, chances, sizes(model))
    held = sum(parameter.numel() for parameter in slice_model(model, kept).parameters())
    assert float(cost(terms(model), size)) == held == parameters(model, kept)[0]
    assert float(cost(terms(model), size, top_k=2)) == parameters(model, kept)[1]


def test_the_gradient_of_the_loss_by_the_logits_is_its_finite_difference(model: PreTrainedModel) -> None:
    ids = token_batches(1)[0][0][:1, :6]
    wanted, whole, full, polynomial = model(input_ids=ids).logits, Masks.full(model), sizes(model), terms(model)

    def loss(*logits: Tensor) -> Tensor:
        chances = {
            choice.axis: probabilities(pi, noise(tuple(pi.shape), seed), 2.0, 0.8)
            for seed, (choice, pi) in enumerate(zip(CHOICES, logits, strict=True))
        }
        with masking(model, soft_masks(whole, CHOICES, chances)):
            said = model(input_ids=ids).logits
        found = cost(polynomial, expected_sizes(CHOICES, chances, full))
        return soft_cross_entropy(said, wanted) + cost_loss(found, 0.5 * model.num_parameters())

    generator = torch.Generator().manual_seed(2)
    shapes = [(max(1, len(choice.layers)), len(choice.sizes)) for choice in CHOICES]
    logits = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(loss, logits, eps=1e-6, atol=1e-7, rtol=1e-5)
    gradients = torch.autograd.grad(loss(*logits), logits)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)


def test_schedules_go_from_their_first_to_their_last_value_in_a_line() -> None:
    assert [anneal(step, 5, TAU) for step in (0, 4)] == pytest.approx([1.0, 0.05])
    assert [anneal(step, 5, KAPPA) for step in (0, 2, 4)] == pytest.approx([1.0, 5.5, 10.0])
    assert anneal(0, 1, TAU) == 1.0


def test_a_router_learns_to_cut_where_nothing_is_lost() -> None:
    """Half of every expert's units are dead and all experts are needed: at half the experts' weight, width goes. The
    same with the roles changed: half of the experts are never chosen.
    """
    for axis in ("width", "experts"):
        model = build("qwen3_moe")
        with torch.no_grad():
            for block in moe_blocks(model).values():
                if axis == "width":
                    block.experts.gate_up_proj.view(8, 2, 16, 32)[:, :, 8:] = 0
                else:
                    block.gate.weight[4:] = 0
                    block.gate.weight[:4].mul_(30)
        choices = (Choice("experts", (8, 4), 8), Choice("width", (16, 8), 16))
        half = {"experts": 8, "width": 16, axis: 8 if axis == "width" else 4}
        targets = [parameters(model, Budget(""))[0], parameters(model, Budget("", **half))[0]]
        torch.manual_seed(0)
        router = BudgetRouter(choices, len(targets)).double()
        batches = [ids[:1, :12] for ids, _ in token_batches()]
        learn(router, model, batches, targets, steps=50, learning_rate=1e-2, seed=0)
        assert router.chosen(0) == {"experts": (8,), "width": (16,)}
        assert router.chosen(1) == {name: (count,) for name, count in half.items()}


def test_sizes_that_a_model_cannot_have_are_refused(model: PreTrainedModel) -> None:
    router = BudgetRouter([Choice("experts", (8, 1), 8)], 1).double()
    with pytest.raises(UserError, match="keeps 1 experts of 8"):
        learn(router, model, [], [1.0], steps=1, learning_rate=1e-2, seed=0)
