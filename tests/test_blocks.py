"""Plans carried out in memory equal the exported checkpoint; errors and routings measured there mean what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from harness import checkpoint
from harness.align import unit_order
from harness.blocks import compress_block, moe_blocks
from harness.calibrate import calibrate
from harness.errors import UserError
from harness.models import Model
from harness.plan import LayerPlan, Plan
from harness.reconstruct import Reconstruction, block_inputs
from methods.frequency import Frequency
from methods.reap import REAP
from tests.conftest import EXPERTS, TOP_K, token_batches, write_model

CLUSTERS = [[0, 3], [1], [2, 5, 7], [4, 6]]
WEIGHTS = [1.0, 2, 3, 1, 0, 1, 0, 4]
PLANS = {
    "pruned": LayerPlan.prune([1, 2, 5, 6], EXPERTS),
    "merged": LayerPlan.merge(CLUSTERS, WEIGHTS),
    "aligned": LayerPlan.merge(CLUSTERS, WEIGHTS, align=True),
    "absorbed": LayerPlan.absorb({1: [1], 2: [0, 2], 5: [5], 7: [3, 4, 6, 7]}, WEIGHTS),
}


def exported(model: Model, plan: LayerPlan, folder: Path) -> torch.nn.Module:
    folder.mkdir()
    checkpoint.export(model, Plan(dict.fromkeys(model.experts, plan)), folder)
    checkpoint.verify(folder, model)
    return Model("exported", str(folder)).load("float32")


@pytest.mark.parametrize("kind", PLANS)
def test_in_memory_a_plan_is_what_export_writes(family_model: Model, kind: str, tmp_path: Path) -> None:
    plan = PLANS[kind]
    loaded = family_model.load("float32")
    for layer, block in moe_blocks(loaded).items():
        compress_block(block, layer, plan)
    ids, mask = token_batches()[0]
    with torch.no_grad():
        ours = loaded(input_ids=ids, attention_mask=mask).logits
        theirs = exported(family_model, plan, tmp_path / kind)(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_alignment_matters_in_memory_and_on_disk(qwen_model: Model) -> None:
    layers = {}
    for kind in ("merged", "aligned"):
        block = moe_blocks(qwen_model.load("float32"))[1]
        compress_block(block, 1, PLANS[kind])
        layers[kind] = block.experts.down_proj.detach().clone()
    assert not torch.allclose(layers["merged"], layers["aligned"], atol=1e-3)


def test_unit_order_undoes_a_permutation_and_beats_any_other() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = [torch.randn(6, 9, generator=generator) for _ in range(3)]
    shuffle = torch.randperm(6, generator=generator)
    order = unit_order(reference, [matrix[shuffle] for matrix in reference])
    torch.testing.assert_close(shuffle[order], torch.arange(6))
    member = [torch.randn(6, 9, generator=generator) for _ in range(3)]

    def apart(order: torch.Tensor) -> float:
        return sum(float((a - b[order]).square().sum()) for a, b in zip(reference, member, strict=True))

    best = apart(unit_order(reference, member))
    assert all(best <= apart(torch.randperm(6, generator=generator)) + 1e-4 for _ in range(300))


def test_experts_that_are_no_plain_matrices_are_not_aligned_but_refused(qwen_model: Model) -> None:
    block = moe_blocks(qwen_model.load("float32"))[0]
    block.experts.is_transposed = True
    with pytest.raises(UserError, match="Merge without alignment"):
        compress_block(block, 0, PLANS["aligned"])


# Reconstruction error.


@pytest.mark.parametrize("kind", PLANS)
def test_the_error_is_that_of_the_exported_block_on_the_original_inputs(
    family_model: Model, kind: str, tmp_path: Path
) -> None:
    """Independent of the in-memory path: blocks of the original and the exported model, hooked inputs, plain norms."""
    plan, batches = PLANS[kind], token_batches()
    original = family_model.load("float32")
    compressed = exported(family_model, plan, tmp_path / kind)
    measured = Reconstruction(family_model.load("float32"), batches)
    masks = [mask.bool().flatten() for _, mask in batches]
    for layer, block in moe_blocks(original).items():
        inputs: list[torch.Tensor] = []
        hook = block.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            for ids, mask in batches:
                original(input_ids=ids, attention_mask=mask)
        hook.remove()
        above = below = 0.0
        with torch.no_grad():
            for hidden, mask in zip(inputs, masks, strict=True):
                before = block(hidden).flatten(0, 1)[mask]
                after = moe_blocks(compressed)[layer](hidden).flatten(0, 1)[mask]
                above += float((after - before).square().sum())
                below += float(before.square().sum())
        assert measured.error(layer, plan) == pytest.approx(above / below, rel=1e-4)
        assert 0.001 < above / below < 10


def test_the_error_of_nothing_is_nothing_and_grows_with_what_is_removed(qwen_model: Model) -> None:
    measured = Reconstruction(qwen_model.load("float32"), token_batches())
    stats = calibrate(qwen_model.load("float32"), token_batches())
    for layer in stats.layers:
        errors = [measured.error(layer, REAP().plan_layer(stats.layers[layer], keep)) for keep in (8, 6, 4, 2)]
        assert errors[0] == 0
        assert errors == sorted(errors)


def test_the_error_counts_rerouting(qwen_model: Model) -> None:
    """A token whose experts are removed is routed to others: with the gates frozen the error would be another."""
    model, batches = qwen_model.load("float32"), token_batches()
    gram = calibrate(model, batches, frozenset({"gated_output_gram"})).layers[1]["gated_output_gram"]
    plan = PLANS["pruned"]
    gone = [expert for expert in range(EXPERTS) if plan.routes[expert] is None]
    block = moe_blocks(model)[1]
    tokens = block_inputs(model, {1: block}, batches)[1]
    size = float(block(tokens.unsqueeze(0)).detach().square().sum())
    frozen = float(gram[np.ix_(gone, gone)].sum()) / size
    assert abs(Reconstruction(model, batches).error(1, plan) / frozen - 1) > 0.05


def test_measuring_leaves_the_model_as_it_was(qwen_model: Model) -> None:
    model, (ids, mask) = qwen_model.load("float32"), token_batches()[0]
    before = model(input_ids=ids, attention_mask=mask).logits
    measured = Reconstruction(model, token_batches())
    for plan in PLANS.values():
        measured.error(1, plan)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, before, rtol=0, atol=0)


# Gate conventions.


def test_routing_as_published_agrees_on_softmax_routers_that_renormalise(qwen_model: Model) -> None:
    batches = token_batches()
    actual, paper = (calibrate(qwen_model.load("float32"), batches, routing=how) for how in ("actual", "paper"))
    for index, layer in actual.layers.items():
        for name in layer.sums:
            np.testing.assert_allclose(layer[name], paper.layers[index][name], rtol=1e-5)


def test_routing_as_published_does_not_renormalise_mixtral(tmp_path: Path) -> None:
    """Its config has no norm_topk_prob: the published code takes the plain softmax, though the model renormalises."""
    model, batches = write_model("mixtral", tmp_path), token_batches()
    actual, paper = (calibrate(model.load("float32"), batches, routing=how) for how in ("actual", "paper"))
    for index, layer in actual.layers.items():
        np.testing.assert_array_equal(layer["count"], paper.layers[index]["count"])
        assert layer["gate"].sum() == pytest.approx(layer.tokens), "gates of a token sum to 1"
        assert paper.layers[index]["gate"].sum() < 0.99 * layer.tokens


def test_routing_as_published_ignores_the_bias_and_the_sigmoid_of_glm(tmp_path: Path) -> None:
    """Top-k of raw logits and their softmax, by hand, against the pass; and the model's own choice is another."""
    model, batches = write_model("glm4_moe", tmp_path), token_batches(padded=False)
    paper = calibrate(model.load("float32"), batches, routing="paper")
    actual = calibrate(model.load("float32"), batches)
    loaded = model.load("float32")
    for layer, block in moe_blocks(loaded).items():
        tokens = block_inputs(loaded, {layer: block}, batches)[layer]
        softmax = (tokens.float() @ block.gate.weight.detach().float().T).softmax(-1)
        values, chosen = softmax.topk(TOP_K, dim=-1)
        gates = values / values.sum(-1, keepdim=True)  # GLM's config says norm_topk_prob
        expected = np.zeros(EXPERTS)
        np.add.at(expected, chosen.numpy(), gates.numpy())
        np.testing.assert_allclose(paper.layers[layer]["gate"], expected, rtol=1e-5)
        np.testing.assert_array_equal(paper.layers[layer]["count"], np.bincount(chosen.flatten(), minlength=EXPERTS))
        assert (paper.layers[layer]["count"] != actual.layers[layer]["count"]).any()
    keep = dict.fromkeys(paper.layers, 4)
    assert Frequency().plan(paper, keep) != Frequency().plan(actual, keep)
