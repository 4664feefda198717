"""Losses, schedules, adapters and the training loop of recovery, against naive loops and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness import distill, lora
from harness.distill import MTP, Recipe
from harness.errors import StageError, UserError
from harness.models import Model
from harness.recovery import make_trainable
from tests.conftest import EXPERTS, TOP_K, token_batches, write_model
from tests.tiny_checkpoint import write_checkpoint

RECIPE = Recipe(
    objective="kd",
    epochs=1,
    batch_size=4,
    learning_rate=1e-3,
    final_learning_rate=1e-4,
    warmup=0,
    kd_start=1.0,
    kd_end=0.75,
    balance=0.0,
    teacher_tokens=None,
    seed=0,
)


def loaded(model: Model) -> PreTrainedModel:
    student = model.load("float32")
    student.set_experts_implementation("grouped_mm")
    return student


def rows(seed: int, *shape: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batches_of_ids(number: int = 2) -> list[Tensor]:
    return [ids for ids, _ in token_batches(number, padded=False)]


# Schedules (Q4).


@pytest.mark.parametrize("steps", [2, 7, 1000])
def test_the_teachers_weight_goes_from_1_to_three_quarters_linearly(steps: int) -> None:
    weights = [RECIPE.kd_weight(step, steps) for step in range(steps)]
    assert (weights[0], weights[-1]) == (1.0, 0.75)
    np.testing.assert_allclose(weights, np.linspace(1, 0.75, steps), atol=1e-12)
    assert {replace(RECIPE, objective="lm").kd_weight(step, steps) for step in range(steps)} == {0.0}


@pytest.mark.parametrize("steps", [2, 7, 1000])
def test_the_multi_token_weight_goes_from_03_to_01_by_half_a_cosine(steps: int) -> None:
    weights = [distill.cosine(step, steps, *MTP) for step in range(steps)]
    assert (weights[0], weights[-1]) == pytest.approx((0.3, 0.1))
    angles = np.arccos((np.array(weights) - 0.2) / 0.1)
    np.testing.assert_allclose(angles, np.linspace(0, np.pi, steps), atol=1e-6)


@given(st.integers(1, 200), st.integers(0, 50))
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end(steps: int, warmup: int) -> None:
    recipe = replace(RECIPE, warmup=warmup)
    rates = [recipe.rate(step, warmup + steps) for step in range(warmup + steps)]
    assert max(rates) == pytest.approx(recipe.learning_rate)
    assert rates[warmup] == pytest.approx(recipe.learning_rate)
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert steps == 1 or rates[-1] == pytest.approx(recipe.final_learning_rate)


def test_every_epoch_sees_every_sequence_once_in_an_order_that_the_seed_draws() -> None:
    ids = np.arange(10)[:, None] * np.ones((1, 3), dtype=np.int64)
    recipe = replace(RECIPE, epochs=3, batch_size=4)
    seen = torch.cat(recipe.batches(ids))[:, 0].tolist()
    epochs = [seen[start : start + 10] for start in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [len(batch) for batch in recipe.batches(ids)] == [4] * 7 + [2]
    assert seen == torch.cat(recipe.batches(ids))[:, 0].tolist()
    assert seen != torch.cat(replace(recipe, seed=1).batches(ids))[:, 0].tolist()


# Losses (Q5, Q6).


def test_soft_cross_entropy_is_the_divergence_and_the_teachers_entropy() -> None:
    logits, wanted = rows(0, 5, 7, 50), rows(1, 5, 7, 50)
    q = wanted.softmax(-1)
    entropy = -(q * q.log()).sum(-1)
    gap = distill.soft_cross_entropy(logits, wanted) - (distill.divergence(logits, wanted) + entropy).mean()
    assert abs(float(gap)) < 1e-14
    naive = [
        sum(float(q[b, t, v]) * math.log(float(q[b, t, v] / logits.softmax(-1)[b, t, v])) for v in range(50))
        for b, t in ((0, 0), (4, 6))
    ]
    both = distill.divergence(logits, wanted)
    assert [float(both[0, 0]), float(both[4, 6])] == pytest.approx(naive, abs=1e-12)


@pytest.mark.parametrize("kd", [0.0, 0.3, 1.0])
def test_the_gradient_of_the_mix_is_p_minus_the_mix_of_labels_and_teacher(kd: float) -> None:
    """By the formula, and by finite differences of the loss."""
    logits, wanted, labels = rows(2, 3, 11).requires_grad_(), rows(3, 3, 11), torch.tensor([4, 0, 10])

    def loss(at: Tensor) -> Tensor:
        return (1 - kd) * distill.cross_entropy(at, labels) + kd * distill.soft_cross_entropy(at, wanted)

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    onehot = nn.functional.one_hot(labels, 11).double()
    formula = (logits.softmax(-1) - ((1 - kd) * onehot + kd * wanted.softmax(-1))) / 3
    torch.testing.assert_close(gradient, formula, rtol=0, atol=1e-14)
    for row, column in ((0, 4), (1, 7), (2, 10)):
        step = torch.zeros_like(logits)
        step[row, column] = 1e-5
        difference = float((loss(logits + step) - loss(logits - step)).detach()) / 2e-5
        assert difference == pytest.approx(float(gradient[row, column]), abs=1e-8)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 29))
def test_with_the_teachers_top_tokens_and_a_tail_the_divergence_is_a_lower_bound_and_proper(
    seed: int, tokens: int
) -> None:
    logits, wanted = rows(seed, 4, 30), rows(seed + 1, 4, 30)

    def kl(p: Tensor, q: Tensor, top: int | None) -> float:
        return float(distill.soft_cross_entropy(p, q, top) - distill.soft_cross_entropy(q, q, top))

    assert -1e-12 <= kl(logits, wanted, tokens) <= kl(logits, wanted, None) + 1e-12
    assert abs(kl(wanted, wanted, tokens)) < 1e-12
    assert kl(logits, wanted, 30) == kl(logits, wanted, 0) == kl(logits, wanted, None)
    total = 0.0  # by hand: the top tokens of q, and the rest of each
    for row in range(4):
        p, q = logits[row].softmax(-1), wanted[row].softmax(-1)
        top = sorted(range(30), key=lambda v: -float(q[v]))[:tokens]
        rest = [v for v in range(30) if v not in top]
        pairs = [(float(q[v]), float(p[v])) for v in top] + [(float(q[rest].sum()), float(p[rest].sum()))]
        total += sum(of_q * math.log(of_q / of_p) for of_q, of_p in pairs) / 4
    assert kl(logits, wanted, tokens) == pytest.approx(total, abs=1e-10)


def test_balance_is_1_for_even_use_and_what_a_naive_loop_finds() -> None:
    even = torch.eye(6, dtype=torch.float64).repeat(5, 1)
    assert float(distill.balance_loss([even, even], 1)) == pytest.approx(1)
    layers, top_k = [rows(4, 40, 6), rows(5, 40, 9)], 2
    expected = []
    for logits in layers:
        experts = logits.shape[1]
        share, mean = [0.0] * experts, logits.softmax(-1).mean(0)
        for token in logits:
            for expert in token.argsort(descending=True)[:top_k].tolist():
                share[expert] += 1 / (40 * top_k)
        expected.append(experts * sum(share[e] * float(mean[e]) for e in range(experts)))
    assert float(distill.balance_loss(layers, top_k)) == pytest.approx(sum(expected) / 2, abs=1e-12)


def test_descending_the_balance_loss_evens_out_a_routers_use() -> None:
    weight = nn.Parameter(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)))
    tokens = torch.randn(200, 5, generator=torch.Generator().manual_seed(1)) + 1  # a common direction: uneven use
    first = distill.balance_loss([tokens @ weight.T], 2).item()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(distill.balance_loss([tokens @ weight.T], 2), weight)
        weight.data -= 0.5 * gradient
    last = distill.balance_loss([tokens @ weight.T], 2).item()
    assert first > 1.1 and last < first - 0.5 * (first - 1)


# A teacher as its own student (Q7).


def test_a_teacher_as_its_own_student_has_no_divergence_and_no_gradient(qwen_model: Model) -> None:
    teacher, student = loaded(qwen_model), loaded(qwen_model)
    ids = batches_of_ids()[0]
    assert distill.held_out(student, teacher, ids.numpy(), 1)["kl"] == 0
    wanted = teacher(input_ids=ids).logits.detach()

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])

    logits = student(input_ids=ids).logits
    of_kd = gradient(distill.soft_cross_entropy(logits, wanted))
    of_lm = gradient(distill.cross_entropy(student(input_ids=ids).logits[:, :-1], ids[:, 1:]))
    assert float(of_kd.norm()) < 1e-6 * float(of_lm.norm())  # float32 sums of q are 1 to about 1e-7


# Multi-token heads (Q8).


class TwoAhead(nn.Module):
    """A model with one multi-token head: what it says from h_t and the embedding of token t + 1 about token t + 2."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.mix = nn.Embedding(13, 4).double(), nn.Linear(8, 4).double()

    def mtp_logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        inner = self.mix(torch.cat([hidden[:, :-2], self.embedding(ids[:, 1:-1])], dim=-1))
        return inner @ self.embedding.weight.T


def test_multi_token_terms_vanish_without_a_head_and_without_weight() -> None:
    ids, hidden = torch.randint(0, 13, (2, 9)), (rows(6, 2, 9, 4), rows(7, 2, 9, 4))
    assert distill.mtp_terms(nn.Linear(1, 1), nn.Linear(1, 1), hidden, ids, 0.5, 0.3) == 0
    assert distill.mtp_terms(TwoAhead(0), TwoAhead(1), hidden, ids, 0.5, 0.0) == 0


def test_multi_token_terms_are_the_papers_sum_and_teach_the_student_only() -> None:
    ids = torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(0))
    student, teacher, hidden = TwoAhead(0), TwoAhead(1), (rows(6, 2, 9, 4), rows(7, 2, 9, 4))
    loss = distill.mtp_terms(student, teacher, hidden, ids, 0.6, 0.2)
    p, q = (model.mtp_logits(h, ids).detach().softmax(-1) for model, h in zip((student, teacher), hidden, strict=True))
    lm = kd = 0.0
    for row in range(2):
        for t in range(7):
            lm -= math.log(float(p[row, t, ids[row, t + 2]])) / 14
            kd -= sum(float(q[row, t, v]) * math.log(float(p[row, t, v])) for v in range(13)) / 14
    assert loss.item() == pytest.approx(0.2 * (0.4 * lm + 0.6 * kd), abs=1e-12)
    loss.backward()
    assert student.mix.weight.grad.abs().sum() > 0 and teacher.mix.weight.grad is None


# Adapters.


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def some_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Plain fused experts, and transposed ones with biases."""
    return Model(request.param, str(write_checkpoint(tmp_path_factory.mktemp("model"), family=request.param)))


def test_new_adapters_change_nothing_and_merged_ones_say_what_they_said(some_model: Model) -> None:
    model, ids = loaded(some_model), batches_of_ids()[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = model(input_ids=ids).logits
    make_trainable(model, "lora", 3)
    torch.testing.assert_close(model(input_ids=ids).logits, first, rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        if ".parametrizations." in name and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    adapted = model(input_ids=ids).logits
    assert (adapted - first).abs().max() > 0.01
    lora.merge(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    torch.testing.assert_close(model(input_ids=ids).logits, adapted, rtol=0, atol=0)
    for name, value in after.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            assert torch.linalg.matrix_rank(value - before[name], atol=1e-4).tolist() == [3] * EXPERTS
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("parameters", ["router", "lora", "all"])
def test_a_step_moves_what_is_to_be_trained_and_nothing_else(some_model: Model, parameters: str) -> None:
    student, teacher = loaded(some_model), loaded(some_model)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    torch.manual_seed(0)
    make_trainable(student, parameters, 2)
    distill.train(student, teacher, batches_of_ids(), replace(RECIPE, objective="lm"), TOP_K, 0, 2)
    lora.merge(student)
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    routers = {name for name in before if ".gate." in name or ".router." in name}
    experts = {name for name in before if name.endswith(("gate_up_proj", "down_proj"))}
    expected = {"router": routers, "lora": routers | experts, "all": moved | routers | experts}[parameters]
    assert moved == expected
    assert parameters != "all" or any("self_attn" in name for name in moved)


# The loop.


def test_training_starts_no_teacher_where_none_is_asked_for(qwen_model: Model) -> None:
    class Never:
        def __call__(self, **_: object) -> SimpleNamespace:
            raise AssertionError("the control without a teacher asked the teacher")

    student = loaded(qwen_model)
    make_trainable(student, "router", 0)
    losses = distill.train(student, Never(), batches_of_ids(), replace(RECIPE, objective="lm"), TOP_K, 0, 2)
    assert set(losses) == {"lm", "total"} and losses["lm"] == losses["total"]


def test_a_stage_that_starts_later_goes_on_in_the_same_schedule(qwen_model: Model) -> None:
    """Each of four steps as a stage of its own: the teacher's weight is that of its step among all four."""
    batches = batches_of_ids(4)
    recipe = replace(RECIPE, kd_start=1.0, kd_end=0.0, learning_rate=1e-30, final_learning_rate=0.0)
    student, teacher = loaded(qwen_model), loaded(qwen_model)
    make_trainable(student, "router", 0)
    losses = [distill.train(student, teacher, batches[t : t + 1], recipe, TOP_K, t, 4) for t in range(4)]
    for step, terms in enumerate(losses):
        kd = 1 - step / 3
        assert terms["total"] == pytest.approx((1 - kd) * terms["lm"] + kd * terms["kd"], rel=1e-6)
    assert losses[0]["kd"] != pytest.approx(losses[0]["lm"], rel=1e-3)


def test_the_balance_term_is_that_of_the_models_own_routers(qwen_model: Model) -> None:
    student, teacher, ids = loaded(qwen_model), loaded(qwen_model), batches_of_ids(1)
    own = student(input_ids=ids[0], output_router_logits=True).router_logits
    expected = float(distill.balance_loss([logits.detach() for logits in own], TOP_K))
    make_trainable(student, "router", 0)
    hooks = sum(len(module._forward_hooks) for module in student.modules())  # transformers' own stay
    terms = distill.train(student, teacher, ids, replace(RECIPE, balance=0.5), TOP_K, 0, 1)
    assert terms["balance"] == pytest.approx(expected, rel=1e-6)
    assert terms["total"] == pytest.approx(terms["kd"] + 0.5 * terms["balance"], rel=1e-6)
    assert sum(len(module._forward_hooks) for module in student.modules()) == hooks


def test_a_loss_that_is_not_finite_ends_training(qwen_model: Model) -> None:
    student = loaded(qwen_model)
    make_trainable(student, "router", 0)
    student.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(StageError, match="step 0 is not finite"):
        distill.train(student, loaded(qwen_model), batches_of_ids(1), RECIPE, TOP_K, 0, 1)


def test_a_model_that_hides_its_routers_needs_balance_0(qwen_model: Model, monkeypatch) -> None:
    student = loaded(qwen_model)
    for part in (student, student.model):
        monkeypatch.setattr(part, "_can_record_outputs", {}, raising=False)
    with pytest.raises(UserError, match="recovery.balance=0"), distill.router_logits(student):
        pass


def test_held_out_is_what_a_loop_over_tokens_finds(qwen_model: Model, tmp_path) -> None:
    teacher = loaded(qwen_model)
    student = loaded(write_model("qwen3_moe", tmp_path, lambda model: model.lm_head.weight.mul_(0.7)))
    ids = torch.cat(batches_of_ids(3)[:3])[:5]
    kl = ce = 0.0
    for row in ids:
        p, q = (model(input_ids=row[None]).logits[0].detach().double().log_softmax(-1) for model in (student, teacher))
        for t in range(len(row) - 1):
            kl += float((q[t].exp() * (q[t] - p[t])).sum())
            ce -= float(p[t, row[t + 1]])
    found = distill.held_out(student, teacher, ids.numpy(), 2)
    predictions = ids[:, 1:].numel()
    assert found == pytest.approx({"kl": kl / predictions, "ce": ce / predictions}, rel=1e-4)


def test_active_parameters_are_those_a_token_meets(qwen_model: Model) -> None:
    model = qwen_model.load("float32")
    head, hidden = 97 * 32, 32  # the embedding is looked up, and not tied to the head
    attention = hidden * (4 * 8) * 2 + hidden * (2 * 8) * 2 + 8 + 8  # q, o, k, v, and norms of q and k
    block = attention + 2 * hidden + EXPERTS * hidden + TOP_K * 3 * 16 * hidden
    assert distill.active_parameters(model, TOP_K) == head + hidden + 3 * block
    assert distill.flops(10, 0, 7) == 420 and distill.flops(10, 100, 7) == 420 + 1400
