"""Merge barriers of small real models against naive ones, token by token in float64 from the definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, GraniteMoeConfig, LlamaConfig, PreTrainedModel, Qwen3MoeConfig

from harness.barriers import LIKELIEST, UNLIKELY, LogitLens, barriers, low_triangles, tilted_divergence
from harness.blocks import moe_blocks
from harness.errors import StageError, UserError
from harness.models import Model
from harness.stats import BARRIER_SUMS, LayerStats
from tests.conftest import EXPERTS, token_batches, write_model

LOCAL = ("logit_lens", "hidden_softmax", "l2")


@dataclass
class Watched:
    """hidden [T, H], index and gate [T, k], stream [T, H] of one layer's unmasked tokens, float64, and its experts."""

    hidden: np.ndarray
    index: np.ndarray
    gate: np.ndarray
    stream: np.ndarray
    outputs: np.ndarray  # [T, E, H]

    def change(self, group: tuple[int, ...]) -> np.ndarray:
        """[T, H]: the layer's new output minus its old one, both summed expert by expert."""
        counts = np.array([(self.index == expert).sum() for expert in group])
        share = counts / counts.sum() if counts.sum() else np.full(len(group), 1 / len(group))
        result = np.zeros_like(self.stream)
        for token, (experts, gates) in enumerate(zip(self.index, self.gate, strict=True)):
            merged = sum(w * self.outputs[token, e] for w, e in zip(share, group, strict=True))
            old = sum(g * self.outputs[token, e] for e, g in zip(experts, gates, strict=True))
            new = sum(
                g * (merged if e in group else self.outputs[token, e]) for e, g in zip(experts, gates, strict=True)
            )
            result[token] = new - old
        return result


def watch(model: PreTrainedModel, layer: int, batches: list) -> Watched:
    """By hooks on modules of the plain model: no part of the pass that is tested."""
    experts, seen, streams = moe_blocks(model)[layer].experts, [], []
    hooks = [
        experts.register_forward_pre_hook(lambda module, args: seen.append(args)),
        model.model.layers[layer].register_forward_hook(lambda module, args, output: streams.append(output)),
    ]
    with torch.no_grad():
        for ids, mask in batches:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    masks = [mask.bool().flatten() for _, mask in batches]

    def gathered(parts: list[torch.Tensor]) -> np.ndarray:
        return torch.cat([part[mask] for part, mask in zip(parts, masks, strict=True)]).double().numpy()

    hidden, index, gate = (gathered([args[place] for args in seen]) for place in range(3))
    stream = gathered([(s[0] if isinstance(s, tuple) else s).flatten(0, 1) for s in streams])
    return Watched(hidden, index.astype(int), gate, stream, all_outputs(experts, hidden))


def all_outputs(experts: nn.Module, hidden: np.ndarray) -> np.ndarray:
    result = []
    for gate_up, down in zip(experts.gate_up_proj.detach().double(), experts.down_proj.detach().double(), strict=True):
        gate, up = (torch.from_numpy(hidden) @ gate_up.T).chunk(2, dim=-1)
        result.append(((gate * torch.sigmoid(gate) * up) @ down.T).numpy())
    return np.stack(result, axis=1)


def log_softmax(values: np.ndarray) -> np.ndarray:
    values = values - values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def kl(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    p, q = log_softmax(before), log_softmax(after)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def naive(model: PreTrainedModel, seen: Watched, group: tuple[int, ...], mode: str) -> float:
    change = seen.change(group)
    if mode == "l2":
        return float((change**2).sum(axis=1).mean())
    if mode == "hidden_softmax":
        return float(kl(seen.stream, seen.stream + change).mean())
    norm, head = model.model.norm, model.lm_head.weight.detach().double().numpy()

    def logits(stream: np.ndarray) -> np.ndarray:
        rms = np.sqrt((stream**2).mean(axis=1, keepdims=True) + norm.variance_epsilon)
        return (stream / rms * norm.weight.detach().double().numpy()) @ head.T

    return float(kl(logits(seen.stream), logits(seen.stream + change)).mean())


@pytest.mark.parametrize("mode", LOCAL)
def test_a_barrier_is_what_merging_does_to_the_layer(family_model: Model, mode: str) -> None:
    """T7: the closed form on affected tokens only equals old and new output of every token, summed naively."""
    model, batches = family_model.load("float32"), token_batches()
    found = barriers(model, batches, mode)
    assert set(found.layers) == set(moe_blocks(model))
    for layer, stats in found.layers.items():
        pair, triangles, triple = (stats[f"{name}.{mode}"] for name in BARRIER_SUMS)
        assert stats.experts == EXPERTS and stats.tokens == sum(int(mask.sum()) for _, mask in batches)
        assert all(array.dtype == np.float64 for array in (pair, triangles, triple))
        assert (pair >= 0).all() and (pair == pair.T).all() and (np.diag(pair) == 0).all()
        seen = watch(model, layer, batches)
        for i, j in itertools.combinations(range(EXPERTS), 2):
            assert pair[i, j] == pytest.approx(naive(model, seen, (i, j), mode), rel=2e-4, abs=1e-9)
        assert len(triangles) == len(triple) > 0
        for group, value in zip(triangles.astype(int).tolist(), triple, strict=True):
            assert value == pytest.approx(naive(model, seen, tuple(group), mode), rel=2e-4, abs=1e-9)


def test_on_the_last_layer_the_logit_lens_is_the_whole_model(family_model: Model) -> None:
    """T12: nothing but the final norm and the head follows it. On the first layer the two are not the same."""
    model, batches = family_model.load("float32"), token_batches(batches=1)
    lens, oracle = (barriers(model, batches, mode).layers for mode in ("logit_lens", "lm"))
    first, *_, last = sorted(lens)
    upper = np.triu_indices(EXPERTS, 1)
    for layer in (first, last):
        near, far = lens[layer]["pair_barrier.logit_lens"][upper], oracle[layer]["pair_barrier.lm"][upper]
        assert np.allclose(near, far, rtol=2e-4, atol=1e-7) == (layer == last)
    assert (lens[last]["triangles.logit_lens"] == oracle[last]["triangles.lm"]).all()
    np.testing.assert_allclose(
        lens[last]["triple_barrier.logit_lens"], oracle[last]["triple_barrier.lm"], rtol=2e-4, atol=1e-7
    )


def _twins(model: nn.Module) -> None:
    for block in moe_blocks(model).values():  # type: ignore[arg-type]
        for weight in (block.experts.gate_up_proj, block.experts.down_proj):
            weight[5] = weight[3]  # type: ignore[index, operator]


@pytest.mark.parametrize("mode", LOCAL)
def test_merging_equal_experts_changes_nothing(tmp_path: Path, mode: str) -> None:
    """T6."""
    model = write_model("qwen3_moe", tmp_path, _twins).load("float32")
    for stats in barriers(model, token_batches(batches=1), mode).layers.values():
        pair = stats[f"pair_barrier.{mode}"]
        assert pair[3, 5] <= 1e-18
        assert np.median(pair[np.triu_indices(EXPERTS, 1)]) > 1e-6


def _never_routed(model: nn.Module) -> None:
    for block in moe_blocks(model).values():  # type: ignore[arg-type]
        block.gate.e_score_correction_bias[[2, 6]] = -1e3  # type: ignore[index, operator, union-attr]


def test_an_expert_that_is_never_routed_to_costs_nothing_to_merge(tmp_path: Path) -> None:
    """Its group goes on answering as the other member does; two of them answer nothing either way."""
    model = write_model("glm4_moe", tmp_path, _never_routed).load("float32")
    used = [expert for expert in range(EXPERTS) if expert not in (2, 6)]
    for stats in barriers(model, token_batches(), "l2").layers.values():
        pair = stats["pair_barrier.l2"]
        assert (pair[[2, 6]] == 0).all()
        assert (pair[np.ix_(used, used)] + np.eye(len(used)) > 0).all()


def test_masked_tokens_and_batches_do_not_matter(qwen_model: Model) -> None:
    model = qwen_model.load("float32")
    ids, mask = token_batches(batches=1)[0]
    shorter = [(ids[:1], mask[:1]), (ids[1:, :17], mask[1:, :17])]
    whole, split = barriers(model, [(ids, mask)]).layers, barriers(model, shorter).layers
    for layer, stats in whole.items():
        assert stats.tokens == split[layer].tokens == 24 + 17
        for name, value in stats.sums.items():
            np.testing.assert_allclose(value, split[layer][name], rtol=1e-3, atol=1e-9, err_msg=name)


def test_the_model_is_left_as_it_was(qwen_model: Model) -> None:
    model = qwen_model.load("float32")
    ids, mask = token_batches(batches=1)[0]
    before, implementation = model(input_ids=ids).logits, model.config._experts_implementation
    barriers(model, [(ids, mask)])
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.config._experts_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_triangles_are_those_whose_edges_are_all_low() -> None:
    rng = np.random.default_rng(0)
    barrier = rng.random((12, 12))
    barrier = np.triu(barrier, 1) + np.triu(barrier, 1).T
    median = np.median(barrier[np.triu_indices(12, 1)])
    expected = [t for t in itertools.combinations(range(12), 3) if barrier[np.ix_(t, t)].max() <= median]
    assert low_triangles(barrier).tolist() == [list(t) for t in expected]
    assert len(low_triangles(np.zeros((9, 9)))) == 84, "no edge is above the median of equal ones"
    assert low_triangles(np.zeros((2, 2))).shape == low_triangles(np.zeros((1, 1))).shape == (0, 3)


def test_of_many_triangles_five_hundred_are_drawn_the_same_way_every_time() -> None:
    chosen = low_triangles(np.zeros((40, 40)))
    assert (chosen == low_triangles(np.zeros((40, 40)))).all()
    assert chosen.shape == (500, 3) == np.unique(chosen, axis=0).shape
    assert (np.diff(chosen, axis=1) > 0).all()
    per_vertex = np.bincount(chosen.flatten(), minlength=40)  # 37.5 expected, standard deviation 6
    assert per_vertex.min() > 12 and per_vertex.max() < 63, "from everywhere in the list"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(-4, 2.5))
def test_the_divergence_is_the_textbook_one_at_every_size_of_shift(seed: int, size: float) -> None:
    """In float32 as precise as the textbook's difference of logarithms is in float64, from 1e-4 to 300."""
    rng = np.random.default_rng(seed)
    logits, shift = rng.normal(size=(3, 50)) * 3, 10**size * rng.normal(size=(3, 4, 50))
    logp = torch.tensor(log_softmax(logits), dtype=torch.float32)
    shifts = torch.tensor(shift, dtype=torch.float32)
    found = tilted_divergence(logp, shifts.clone(), (shifts * logp.exp()[:, None]).sum(-1), exact=True)
    expected = kl(logits[:, None] + 0 * shift, logits[:, None] + shift)
    np.testing.assert_allclose(found.numpy(), expected, rtol=5e-3, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), sharp=st.floats(0.1, 3), size=st.floats(-2, 1.5))
def test_the_likeliest_tokens_and_a_bucket_give_a_lower_bound(seed: int, sharp: float, size: float) -> None:
    """log E_p exp(s - E_p s), all others with their mean shift: against the whole vocabulary's shifts."""
    generator = torch.Generator().manual_seed(seed)
    weight = sharp * torch.randn(5000, 16, generator=generator, dtype=torch.float64)
    stream = torch.randn(1, 16, generator=generator, dtype=torch.float64)
    change = 10**size * torch.randn(1, 1, 16, generator=generator, dtype=torch.float64)
    norm = nn.RMSNorm(16, eps=1e-6, dtype=torch.float64).requires_grad_(False)
    exact, bound = (float(LogitLens(norm, weight, None, exact)(stream, change)) for exact in (True, False))
    before, after = (LogitLens(norm, weight, None, True).logits(h)[0].numpy() for h in (stream, (stream + change)[0]))
    assert exact == pytest.approx(kl(before, after), rel=1e-6, abs=1e-12)
    p, shift = np.exp(log_softmax(before)), after - before
    shift = shift - p @ shift
    likeliest, others = np.split(np.argsort(-p), [LIKELIEST])
    tail = p[others].sum()
    direct = np.log(p[likeliest] @ np.exp(shift[likeliest]) + tail * np.exp(p[others] @ shift[others] / tail))
    assert 0 <= bound <= exact * (1 + 1e-9)
    assert bound == pytest.approx(direct, rel=1e-6, abs=1e-12) or (tail < UNLIKELY and bound < direct)


def test_the_lower_bound_counts_what_the_bucket_gains() -> None:
    """One likely token loses to all the others: were they left out, no divergence would be seen."""
    weight = torch.zeros(5000, 2, dtype=torch.float64)
    weight[:LIKELIEST, 0], weight[LIKELIEST:, 0] = 9.0, 1.0
    lens = [LogitLens(nn.Identity(), weight, None, exact) for exact in (True, False)]
    stream, change = torch.tensor([[1.0, 0]]).double(), torch.tensor([[[-0.5, 0]]]).double()
    exact, bound = (float(one(stream, change)) for one in lens)
    assert exact > 0.1 and bound == pytest.approx(exact, rel=1e-9)


def _small(kind: Callable[..., object], **fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    common = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(kind(**common, **heads, **fields), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def test_what_cannot_be_measured_is_refused_with_what_can() -> None:
    batches = token_batches(batches=1)
    granite = {"num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(UserError, match="not one of logit_lens, hidden_softmax, l2, lm"):
        barriers(_small(LlamaConfig), batches, "kl")
    with pytest.raises(UserError, match="experts interface"):
        barriers(_small(LlamaConfig), batches)
    with pytest.raises(UserError, match="layer 0 scales or normalises its experts' output"):
        barriers(_small(GraniteMoeConfig, residual_multiplier=0.5, **granite), batches, "l2")
    scaled = _small(GraniteMoeConfig, logits_scaling=4.0, **granite)
    with pytest.raises(UserError, match="mode=hidden_softmax or mode=l2"):
        barriers(scaled, batches)
    assert isinstance(barriers(scaled, batches, "l2").layers[0], LayerStats)
    many = _small(Qwen3MoeConfig, num_experts=72, num_experts_per_tok=2, moe_intermediate_size=4, head_dim=8)
    with pytest.raises(UserError, match="5112 pairs of experts, and at most 5000"):
        barriers(many, batches, "lm")


def _not_finite(model: nn.Module) -> None:
    moe_blocks(model)[1].experts.down_proj[:] = float("nan")  # type: ignore[arg-type, index, operator]


def test_outputs_that_are_not_finite_are_a_failure(tmp_path: Path) -> None:
    model = write_model("mixtral", tmp_path, _not_finite).load("float32")
    with pytest.raises(StageError, match="layer 1 is not finite"):
        barriers(model, token_batches(batches=1), "l2")


def test_bfloat16_models_are_measured_in_float32(qwen_model: Model) -> None:
    """Barriers of the rounded model stay near those of the exact one, though one is a thousandth of a logit's size."""
    batches = token_batches()
    exact, rounded = (barriers(qwen_model.load(dtype), batches).layers[2] for dtype in ("float32", "bfloat16"))
    upper = np.triu_indices(EXPERTS, 1)
    first, second = (one["pair_barrier.logit_lens"][upper] for one in (exact, rounded))
    assert np.corrcoef(np.log(first), np.log(second))[0, 1] > 0.9
