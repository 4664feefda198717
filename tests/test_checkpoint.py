"""Export: the written model is the masked one, to the bit where nothing is merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness import checkpoint, rewrite
from harness.blocks import compress_block, moe_blocks
from harness.errors import UserError
from harness.models import Model
from harness.plan import LayerPlan, Plan, Source
from tests.conftest import EXPERTS, token_batches, write_model

KEPT = {0: [0, 2, 3, 6, 7], 1: [1, 2, 4, 5, 7], 2: [0, 1, 3, 4, 6]}


def prune_plan(model: Model) -> Plan:
    return Plan({layer: LayerPlan.prune(KEPT[layer], EXPERTS) for layer in model.experts})


def merge_plan(model: Model) -> Plan:
    weights = [1.0, 2, 3, 4, 5, 6, 7, 8]
    return Plan({layer: LayerPlan.merge([[0, 5], [1], [2, 3, 7], [4, 6]], weights) for layer in model.experts})


def exported(model: Model, plan: Plan, folder: Path) -> Model:
    folder.mkdir(exist_ok=True)
    checkpoint.export(model, plan, folder)
    checkpoint.verify(folder, model)
    return Model("exported", str(folder))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_batches()[1][0]).logits


def mask_router(router: torch.nn.Module, dropped: list[int]) -> None:
    """Make a router give the dropped experts no chance, by its own rule: -inf before the softmax or as the bias."""
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias[dropped] = float("-inf")
        return
    normalise = getattr(router, "norm_topk_prob", True)

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T
        scores[:, dropped] = float("-inf")
        values, chosen = torch.topk(scores.softmax(-1), router.top_k, dim=-1)
        return scores, values / values.sum(-1, keepdim=True) if normalise else values, chosen

    router.forward = forward


def test_pruned_logits_equal_the_masked_routers(family_model: Model, tmp_path: Path) -> None:
    pruned = exported(family_model, prune_plan(family_model), tmp_path / "pruned").load("float32")
    masked = family_model.load("float32")
    full = logits(masked)
    for layer in family_model.experts:
        mask_router(masked.model.layers[layer].mlp.gate, sorted(set(range(EXPERTS)) - set(KEPT[layer])))
    torch.testing.assert_close(logits(pruned), logits(masked), atol=1e-5, rtol=1e-5)
    assert (logits(pruned) - full).abs().max() > 1e-2, "pruning did something"


def test_none_exports_every_byte(family_model: Model, tmp_path: Path) -> None:
    plan = Plan.identity(family_model.experts)
    out = exported(family_model, plan, tmp_path / "same")
    assert out.tensors.keys() == family_model.tensors.keys()
    for name, tensor in family_model.tensors.items():
        assert out.tensors[name].read() == tensor.read()
        assert (out.tensors[name].dtype, out.tensors[name].shape) == (tensor.dtype, tensor.shape)
    assert (out.folder / "config.json").read_bytes() == (family_model.folder / "config.json").read_bytes()


def test_kept_experts_are_copied_bit_for_bit(family_model: Model, tmp_path: Path) -> None:
    out = exported(family_model, prune_plan(family_model), tmp_path / "pruned")
    old, new = (load_file(m.folder / "model.safetensors") for m in (family_model, out))
    for name, tensor in new.items():
        if ".experts." not in name:
            continue
        layer = int(name.split("layers.")[1].split(".")[0])
        head, expert, part = name.partition("experts.")[0], *name.partition("experts.")[2].split(".", 1)
        assert torch.equal(tensor, old[f"{head}experts.{KEPT[layer][int(expert)]}.{part}"])


def test_merged_experts_are_the_weighted_means_behind_an_untouched_router(family_model: Model, tmp_path: Path) -> None:
    plan = merge_plan(family_model)
    out = exported(family_model, plan, tmp_path / "merged").load("float32")
    by_hand = family_model.load("float32")
    with torch.no_grad():
        for index, layer in plan.layers.items():
            experts = by_hand.model.layers[index].mlp.experts
            for parameter in (experts.gate_up_proj, experts.down_proj):
                old = parameter.clone()
                for expert, slot in enumerate(layer.routes):
                    parameter[expert] = sum(source.weight * old[source.expert] for source in layer.slots[slot])
    torch.testing.assert_close(logits(out), logits(by_hand), atol=1e-4, rtol=1e-4)


def test_pruning_and_merging_at_once(family_model: Model, tmp_path: Path) -> None:
    """Experts 6 and 7 are dropped, 0 and 1 merged, the rest copied."""
    slots = ((Source(0, 0.5), Source(1, 0.5)), (Source(2),), (Source(3),), (Source(4),), (Source(5),))
    routes = (0, 0, 1, 2, 3, 4, None, None)
    out = exported(family_model, Plan(dict.fromkeys(family_model.experts, LayerPlan(slots, routes))), tmp_path / "mix")
    assert set(out.experts.values()) == {6}
    experts = out.load("float32").model.layers[max(out.experts)].mlp.experts
    assert torch.equal(experts.down_proj[0], experts.down_proj[1])


@pytest.mark.parametrize("plan_of", [prune_plan, merge_plan])
def test_sizes_are_those_of_the_written_files(
    family_model: Model, tmp_path: Path, plan_of: Callable[[Model], Plan]
) -> None:
    plan = plan_of(family_model)
    size = checkpoint.measure(family_model, plan)
    out = exported(family_model, plan, tmp_path / "out")
    assert (size.bytes, size.parameters) == (out.nbytes, out.parameters)
    assert {size.experts} == {float(count) for count in out.experts.values()}
    assert size.distinct == sum(plan.distinct_experts().values()) / len(plan.layers)
    assert size.distinct_bytes <= size.bytes


def test_a_checkpoint_of_many_files_keeps_its_index_true(tmp_path: Path) -> None:
    model = write_model("qwen3_moe", tmp_path / "model", max_shard_size="40KB")
    assert len(list(model.folder.glob("*.safetensors"))) > 3
    whole = write_model("qwen3_moe", tmp_path / "whole")
    for name, plan_of in (("pruned", prune_plan), ("merged", merge_plan)):
        out = exported(model, plan_of(model), tmp_path / name)
        index = json.loads((out.folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == out.nbytes
        assert {n: t.file.name for n, t in out.tensors.items()} == index["weight_map"]
        expected = exported(whole, plan_of(whole), tmp_path / f"{name}-whole")
        torch.testing.assert_close(logits(out.load("float32")), logits(expected.load("float32")), atol=0, rtol=0)


def test_bf16_is_averaged_in_float32(tmp_path: Path) -> None:
    values = [torch.randn(64).bfloat16() for _ in range(3)]
    parts = [(v.view(torch.uint8).numpy().tobytes(), w) for v, w in zip(values, (0.2, 0.3, 0.5), strict=True)]
    merged = torch.frombuffer(bytearray(rewrite.weighted_mean(parts, "BF16")), dtype=torch.bfloat16)
    exact = 0.2 * values[0].double() + 0.3 * values[1].double() + 0.5 * values[2].double()
    assert torch.equal(merged, exact.float().bfloat16())


def test_a_closed_row_is_finite_in_every_type() -> None:
    for dtype in ("F16", "BF16", "F32"):
        bias = rewrite.decoded(rewrite._closed(dtype), dtype)
        assert bias.isfinite().all() and (bias < -60000).all()


def test_quantised_experts_are_not_averaged() -> None:
    with pytest.raises(UserError, match="F8_E4M3"):
        rewrite.weighted_mean([(b"1234", 0.5), (b"1234", 0.5)], "F8_E4M3")


def test_layers_of_different_counts_are_refused_for_a_stock_checkpoint(qwen_model: Model, tmp_path: Path) -> None:
    layers = {layer: LayerPlan.prune(range(4 + layer), EXPERTS) for layer in qwen_model.experts}
    with pytest.raises(UserError, match="one expert count"):
        checkpoint.export(qwen_model, Plan(layers), tmp_path)


def test_layers_of_different_counts_are_padded_behind_a_router_bias(tmp_path: Path) -> None:
    model = write_model("glm4_moe", tmp_path / "model")
    layers = {
        1: LayerPlan.prune([1, 4, 6], EXPERTS),
        2: LayerPlan.merge([[0, 5], [1], [2], [3], [4], [6, 7]], [1.0] * EXPERTS),
    }
    out = exported(model, Plan(layers), tmp_path / "out")
    assert set(out.experts.values()) == {EXPERTS}
    compressed = model.load("float32")
    for layer, block in moe_blocks(compressed).items():
        compress_block(block, layer, layers[layer])
    torch.testing.assert_close(logits(out.load("float32")), logits(compressed), atol=1e-5, rtol=1e-5)
    bias = load_file(out.folder / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert (bias[3:] == rewrite.CLOSED).all() and (bias[:3] > -10).all()


def test_config_is_patched_and_nothing_else_in_it(family_model: Model, tmp_path: Path) -> None:
    out = exported(family_model, prune_plan(family_model), tmp_path / "out")
    old, new = (json.loads((m.folder / "config.json").read_text()) for m in (family_model, out))
    changed = {name for name in old if old[name] != new[name]}
    assert old.keys() == new.keys() and len(changed) == 1
    assert new[changed.pop()] == 5
