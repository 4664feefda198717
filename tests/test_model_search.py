"""A search asks a real model: masked, not copied; and the model is afterwards what it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from harness.blocks import compress
from harness.masked import pruned, surviving
from harness.model_search import ModelSearch, acceptance, divergence, log_remainder, reference
from harness.plan import LayerPlan
from tests.conftest import EXPERTS, TOP_K, family_config

FAMILIES = ("qwen3_moe", "mixtral", "glm4_moe")


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(family)).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "bias" in name:  # correction biases begin at zero, where they say nothing
            tensor.data += torch.randn_like(tensor) / 10
    return model


def layers_of(model: PreTrainedModel) -> list[int]:
    return list(ModelSearch(model, tokens(1), TOP_K, lambda: None, lambda state: None).experts)


def tokens(number: int, length: int = 12) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 97, (number, length))


def search_of(model: PreTrainedModel, number: int = 6) -> ModelSearch:
    place: dict = {}
    return ModelSearch(model, tokens(number), TOP_K, lambda: place.get("it"), lambda state: place.update(it=state))


def logits(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids), use_cache=False).logits


def uneven(model: PreTrainedModel) -> dict[int, tuple[int, ...]]:
    """Another set in each layer, of 2 to 8 experts."""
    rng = np.random.default_rng(5)
    return {
        layer: tuple(sorted(rng.permutation(EXPERTS)[: 2 + 3 * place].tolist()))
        for place, layer in enumerate(layers_of(model))
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_model_is_the_pruned_one(family: str) -> None:
    model, ids = tiny(family), tokens(3)
    kept = uneven(model)
    sliced = copy.deepcopy(model)
    compress(sliced, {layer: LayerPlan.prune(experts, EXPERTS) for layer, experts in kept.items()})
    with pruned(model, kept):
        masked = logits(model, ids)
    torch.testing.assert_close(masked, logits(sliced, ids), atol=2e-6, rtol=1e-5)
    assert (masked - logits(model, ids)).abs().max() > 1e-3, "the plan changes something"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_afterwards_what_it_was(family: str) -> None:
    model, ids = tiny(family), tokens(3)
    before, names = logits(model, ids), [name for name, _ in model.named_parameters()]
    search = search_of(model)
    search.acceptance(uneven(model))
    search.gradient({layer: np.full(EXPERTS, 0.5) for layer in layers_of(model)}, 0)
    with pytest.raises(RuntimeError, match="in between"), pruned(model, uneven(model)):
        raise RuntimeError("in between")
    assert torch.equal(logits(model, ids), before)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_accept_everything(family: str) -> None:
    search = search_of(tiny(family))
    whole = {layer: range(EXPERTS) for layer in search.experts}
    assert search.acceptance(whole) == pytest.approx(1, abs=1e-6)
    assert search.divergence(whole) == pytest.approx(0, abs=1e-6)


def test_what_is_measured_is_what_the_two_models_say() -> None:
    model = tiny("qwen3_moe")
    search, kept = search_of(model), uneven(model)
    sliced = copy.deepcopy(model)
    compress(sliced, {layer: LayerPlan.prune(experts, EXPERTS) for layer, experts in kept.items()})
    p, q = (logits(which, tokens(6)).double().softmax(-1).numpy() for which in (model, sliced))
    assert search.acceptance(kept) == pytest.approx(np.minimum(p, q).sum(-1).mean(), abs=1e-6)
    assert search.divergence(kept) == pytest.approx((p * np.log(p / q)).sum(-1).mean(), abs=1e-6)


def test_the_gradient_is_that_of_the_loss() -> None:
    search = search_of(tiny("qwen3_moe"))
    rng = np.random.default_rng(1)
    at = {layer: rng.uniform(0.3, 0.9, EXPERTS) for layer in search.experts}
    loss, found = search.gradient(at, 1)
    for layer, expert in ((0, 3), (1, 0), (2, 7)):
        sides = []
        for step in (0.2, -0.2):
            moved = {index: value.copy() for index, value in at.items()}
            moved[layer][expert] += step
            sides.append(search.gradient(moved, 1)[0])
        assert found[layer][expert] == pytest.approx((sides[0] - sides[1]) / 0.4, rel=0.02, abs=1e-5)
    assert loss > 0 and search.spent.gradients == 7


def test_survival_neither_routes_anew_nor_normalises() -> None:
    """An expert that does not survive leaves a hole in its tokens' sums; a pruned one is replaced."""
    model, ids = tiny("qwen3_moe"), tokens(3)
    kept = uneven(model)
    survival = {layer: torch.zeros(EXPERTS) for layer in kept}
    for layer, experts in kept.items():
        survival[layer][list(experts)] = 1
    with surviving(model, survival):
        holes = logits(model, ids)
    with pruned(model, kept):
        assert (logits(model, ids) - holes).abs().max() > 1e-3
    with surviving(model, {layer: torch.ones(EXPERTS) for layer in kept}):
        torch.testing.assert_close(logits(model, ids), tiny_output(ids), atol=2e-6, rtol=1e-5)


def tiny_output(ids: np.ndarray) -> torch.Tensor:
    return logits(tiny("qwen3_moe"), ids)


def test_a_large_vocabulary_is_bounded_by_its_largest_and_a_tail() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(50, 300).double().mul(2).log_softmax(-1) for _ in range(2))
    exact_acceptance, exact_divergence = acceptance(p, q), divergence(p, q)
    for largest in (4, 32, 256):
        known = reference(p, largest=largest, whole=100)
        assert (acceptance(known.joined, known.of(q)) >= exact_acceptance - 1e-9).all()
        assert (divergence(known.joined, known.of(q)) <= exact_divergence + 1e-9).all()
        torch.testing.assert_close(known.joined.exp().sum(1), torch.ones(50).double())
    close = reference(p, largest=256, whole=100)
    assert (acceptance(close.joined, close.of(q)) - exact_acceptance).max() < 0.05
    assert log_remainder(torch.zeros(1, 1)).isfinite().all()


def test_esap_is_one_minus_total_variation_and_keeps_its_bounds() -> None:
    torch.manual_seed(1)
    p, q = (torch.randn(200, 40).double().log_softmax(-1) for _ in range(2))
    found, kl = acceptance(p, q), divergence(p, q)
    torch.testing.assert_close(found, 1 - (p.exp() - q.exp()).abs().sum(1) / 2)
    torch.testing.assert_close(found, (q.exp() * (p - q).exp().clamp_max(1)).sum(1))
    torch.testing.assert_close(found, acceptance(q, p))
    torch.testing.assert_close(acceptance(p, p), torch.ones(200).double())
    assert (found >= 1 - (kl / 2).sqrt()).all() and (found >= (-kl).exp() / 2).all()
    assert ((found >= 0) & (found <= 1)).all()


def test_what_was_spent_survives_an_interruption() -> None:
    place: dict = {}
    model = tiny("qwen3_moe")
    first = ModelSearch(model, tokens(6), TOP_K, lambda: None, lambda state: place.update(it=state))
    assert first.recall() is None
    first.acceptance(uneven(model))
    first.note(fitness=0.5)
    first.remember({"generation": 1})
    second = ModelSearch(model, tokens(6), TOP_K, lambda: place["it"], lambda state: None)
    assert second.recall() == {"generation": 1}
    assert second.notes == first.notes and second.spent.evaluations == 1
    assert second.record()["spent"]["seconds"] > place["it"]["spent"]["seconds"] > 0, "of both runs"
