"""Statistics against a naive triple loop, and the properties that make them sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from harness import stats as stats_file
from harness.calibrate import calibrate
from harness.errors import StageError
from harness.models import Model
from harness.stats import EXTRAS, OF_OUTPUTS, PAIRWISE, ROUTED, LayerStats, Stats
from tests.conftest import EXPERTS, HIDDEN, token_batches, write_model

ALL = frozenset(EXTRAS)


def assert_equal(a: Stats, b: Stats, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    assert a.layers.keys() == b.layers.keys()
    for index, layer in a.layers.items():
        assert layer.tokens == b.layers[index].tokens
        for name in layer.sums:
            here = max(atol, 2e-6 * float(np.abs(layer[name]).max()))  # terms in float32 are rounded at the sums' scale
            np.testing.assert_allclose(layer[name], b.layers[index][name], rtol=rtol, atol=here, err_msg=name)


def expert_output(experts: torch.nn.Module, expert: int, x: Tensor) -> Tensor:
    """f_j(x) straight from the weights of a fused gated module: down(silu(gate(x)) * up(x))."""
    gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
    return experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)


def seen_by_experts(model: torch.nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[int, list[tuple]]:
    """(input, chosen experts, gates, attention mask, residual stream, block) of every batch, by MoE layer."""
    seen: dict[int, list[tuple]] = {}
    for index, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "experts"):
            continue
        received: list[tuple] = []
        ends: dict[str, list[Tensor]] = {"layer": [], "block": []}
        hooks = [
            layer.mlp.experts.register_forward_pre_hook(lambda _, args, received=received: received.append(args)),
            layer.register_forward_hook(lambda *args, ends=ends: ends["layer"].append(args[-1].flatten(0, 1))),
            layer.mlp.register_forward_hook(lambda *args, ends=ends: ends["block"].append(args[-1].flatten(0, 1))),
        ]
        with torch.no_grad():
            for ids, mask in batches:
                model(input_ids=ids, attention_mask=mask)
        for hook in hooks:
            hook.remove()
        streams = [after - added for after, added in zip(ends["layer"], ends["block"], strict=True)]
        seen[index] = [
            (*args, mask.flatten(), stream, layer.mlp)
            for args, (_, mask), stream in zip(received, batches, streams, strict=True)
        ]
    return seen


def naive_layer(batches: list[tuple]) -> LayerStats:
    """Token by token, expert by expert."""
    sums = {name: np.zeros(EXPERTS) for name in ROUTED}
    sums |= {name: np.zeros((EXPERTS, EXPERTS)) for name in PAIRWISE}
    sums |= {name: np.zeros((EXPERTS, HIDDEN)) for name in OF_OUTPUTS}
    sums |= {name: np.zeros(EXPERTS) for name in ("gate_norm_turn", "logit_sum")}
    tokens = 0
    for hidden, chosen, gates, mask, stream, block in batches:
        for t in np.flatnonzero(mask):
            tokens += 1
            logits = (block.gate.weight @ hidden[t]).detach().double().numpy()
            gate_of = {int(expert): float(gate) for expert, gate in zip(chosen[t], gates[t], strict=True)}
            outputs = [expert_output(block.experts, e, hidden[t]).detach().double().numpy() for e in range(EXPERTS)]
            naive_token(sums, logits, gate_of, outputs, stream[t].detach().double().numpy())
    return LayerStats(EXPERTS, tokens, sums)


def naive_token(
    sums: dict[str, np.ndarray], logits: np.ndarray, gate_of: dict[int, float], outputs: list[np.ndarray], u: np.ndarray
) -> None:
    sums["logit_sum"] += logits
    sums["logit_gram"] += np.outer(logits, logits)
    after = u + sum(g * outputs[expert] for expert, g in gate_of.items())
    turn = max(0.0, 1 - float(u @ after / np.linalg.norm(u) / np.linalg.norm(after)))
    for expert, output in enumerate(outputs):
        sums["all_output_sum"][expert] += output
        sums["all_gated_output_sum"][expert] += np.exp(logits[expert]) / np.exp(logits).sum() * output
    for i, g in gate_of.items():
        n = float(np.linalg.norm(outputs[i]))
        values = {
            "count": 1,
            "gate": g,
            "norm": n,
            "norm_sq": n * n,
            "gate_norm": g * n,
            "gate_norm_turn": g * n * turn,
        }
        for name, value in {**values, "gate_sq_norm": g * g * n, "gate_sq_norm_sq": (g * n) ** 2}.items():
            sums[name][i] += value
        sums["output_max"][i] = max(sums["output_max"][i], np.abs(outputs[i]).max())
        for j, other in gate_of.items():
            sums["coactivation"][i, j] += 1
            sums["gated_norm_gram"][i, j] += g * n * other * float(np.linalg.norm(outputs[j]))
            sums["gated_output_gram"][i, j] += g * other * float(outputs[i] @ outputs[j])


def naive(model: torch.nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Stats:
    return Stats({index: naive_layer(seen) for index, seen in seen_by_experts(model, batches).items()})


def test_equal_a_naive_triple_loop(family_model: Model) -> None:
    batches = token_batches()
    model = family_model.load("float32")
    assert_equal(calibrate(model, batches, ALL), naive(model, batches), rtol=2e-4, atol=2e-4)


def test_of_two_parts_add_up(family_model: Model) -> None:
    model, batches = family_model.load("float32"), token_batches()
    whole = calibrate(model, batches, ALL)
    parts = calibrate(model, batches[:1], ALL) + calibrate(model, batches[1:], ALL)
    assert_equal(whole, parts, rtol=1e-12, atol=1e-12)


def test_a_mean_of_batch_means_is_not_the_statistic(qwen_model: Model) -> None:
    """The mistake the sums rule out: it must differ here, or the test above could not notice it."""
    model, batches = qwen_model.load("float32"), token_batches()
    whole = calibrate(model, batches).layers[1]
    each = [calibrate(model, [batch]).layers[1] for batch in batches]
    means = np.mean([part["gate_norm"] / np.maximum(part["count"], 1) for part in each], axis=0)
    assert np.abs(means - whole["gate_norm"] / whole["count"]).max() > 1e-3


def test_padding_changes_nothing(family_model: Model) -> None:
    model = family_model.load("float32")
    ids, mask = token_batches()[1]
    padded_ids = torch.cat([ids, torch.full((2, 9), 5)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(2, 9, dtype=mask.dtype)], dim=1)
    assert_equal(calibrate(model, [(ids, mask)], ALL), calibrate(model, [(padded_ids, padded_mask)], ALL))


def test_batch_split_changes_nothing(family_model: Model) -> None:
    model = family_model.load("float32")
    ids, mask = token_batches()[1]
    rows = [(ids[i : i + 1], mask[i : i + 1]) for i in range(len(ids))]
    assert_equal(calibrate(model, [(ids, mask)], ALL), calibrate(model, rows, ALL))


def test_looking_leaves_the_model_as_it_was(qwen_model: Model) -> None:
    model = qwen_model.load("float32")
    ids, mask = token_batches()[0]
    before = model(input_ids=ids, attention_mask=mask).logits
    calibrate(model, [(ids, mask)], ALL)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, before, rtol=0, atol=0)


def test_values_that_are_not_finite_stop_the_pass_at_their_layer(tmp_path: Path) -> None:
    def break_layer_1(model: torch.nn.Module) -> None:
        model.model.layers[1].mlp.experts.down_proj[3] = float("nan")

    model = write_model("qwen3_moe", tmp_path, break_layer_1).load("float32")
    with pytest.raises(StageError, match="layer 1"):
        calibrate(model, token_batches())


def test_survive_the_disk(tmp_path: Path, qwen_model: Model) -> None:
    made = calibrate(qwen_model.load("float32"), token_batches(), ALL)
    stats_file.save(Stats(made.layers, {"seconds": 1.5}), tmp_path / "stats.safetensors")
    found = stats_file.load(tmp_path / "stats.safetensors")
    assert_equal(made, found, rtol=0, atol=0)
    assert found.provenance == {"seconds": 1.5}
    assert found.names == {*ROUTED, *EXTRAS}


def test_a_method_is_given_only_what_it_declares(qwen_model: Model) -> None:
    made = calibrate(qwen_model.load("float32"), token_batches())
    with pytest.raises(KeyError, match="needs"):
        made.only(frozenset({"count"})).layers[0]["norm"]
