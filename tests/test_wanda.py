"""Wanda: as many zeros in each row as asked for, the rest bit for bit, chosen by norms that a naive loop finds too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional

from harness import checkpoint, wanda
from harness.blocks import compress, moe_blocks
from harness.build import build, option
from harness.data import Calibration
from harness.errors import UserError
from harness.models import Model
from harness.plan import LayerPlan, Plan
from harness.reconstruct import block_inputs
from harness.remake import Remaking
from harness.rewrite import decoded
from harness.stats import Stats
from harness.store import Store
from harness.wanda import FEW, InputNorms, Wanda, input_norms, largest
from methods.reap import REAP
from tests.tiny_checkpoint import EXPERTS, TOP_K, write_checkpoint

KEPT = [0, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Stored in bfloat16. Plain fused experts, and transposed ones with biases; one that few tokens go to."""

    def change(loaded: torch.nn.Module) -> None:
        for block in moe_blocks(loaded).values():  # type: ignore[arg-type]
            router = block.gate if hasattr(block, "gate") else block.router
            router.weight[3] = 0.97 * router.weight[4] + 0.01 * router.weight[3]
            router.weight[6] = router.weight[2] * 0.03
        loaded.to(torch.bfloat16)

    folder = write_checkpoint(tmp_path_factory.mktemp("model"), change, request.param)
    return Model(request.param, str(folder))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(["ab", "bcd", "a", "dd", "cab"], 400)
    file.write_text("\n\n".join(" ".join(words[start : start + 10]) for start in range(0, 400, 10)))
    return Calibration("words", (str(file),), sequences=10, length=32, seed=0, held_out=0, batch_size=4)


def pruned(model: Model, kept: list[int] = KEPT) -> Plan:
    return Plan({layer: LayerPlan.prune(kept, count) for layer, count in model.experts.items()})


def remade(recovery: Wanda, model: Model, plan: Plan, work: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that are written, by name, and the report."""
    (work / "remade").mkdir(parents=True)
    given = Remaking(model, plan, Stats({}), 0.125, REAP(), Store(work / "store"))
    report = recovery.remake(given, work / "remade")
    checkpoint.verify(work / "remade", model)
    return values(Model("remade", str(work / "remade"))), report


def exported(model: Model, plan: Plan, folder: Path) -> dict[str, Tensor]:
    folder.mkdir(parents=True)
    checkpoint.export(model, plan, folder)
    return values(Model("exported", str(folder)))


def values(model: Model) -> dict[str, Tensor]:
    return {name: decoded(t.read(), t.dtype).reshape(t.shape) for name, t in model.tensors.items()}


def is_matrix(name: str, value: Tensor) -> bool:
    return "experts" in name and name.split(".")[-1] in ("weight", "gate_up_proj", "down_proj") and value.dim() > 1


def as_rows(model: Model, value: Tensor) -> Tensor:
    """A stored expert matrix with its inputs last."""
    return value.transpose(-1, -2) if model.name == "gpt_oss" else value


# Zeros (T14).


@pytest.mark.parametrize("share", [0.1625, 0.5, 0.575])
def test_every_row_has_the_same_number_of_zeros_and_all_else_is_as_it_was(
    share: float, model: Model, text: Calibration, tmp_path: Path
) -> None:
    after, report = remade(Wanda(share, None, text), model, pruned(model), tmp_path)
    before = exported(model, pruned(model), tmp_path / "export")
    assert after.keys() == before.keys()
    zeros = total = 0
    for name, value in after.items():
        assert value.dtype == before[name].dtype
        if not is_matrix(name, value):
            assert torch.equal(value, before[name]), name
            continue
        rows = as_rows(model, value)
        width = rows.shape[-1]
        gone = rows == 0
        assert (gone.sum(-1) == width - round((1 - share) * width)).all(), name
        assert torch.equal(rows[~gone], as_rows(model, before[name])[~gone])
        zeros, total = zeros + int(gone.sum()), total + rows.numel()
    assert report["sparsity"] == pytest.approx(zeros / total)
    assert report["sparsity"] == pytest.approx(share, abs=0.02)  # rows are 32 or 64 wide
    assert report["dropped"] == 1 - len(KEPT) / EXPERTS and report["tokens"] == 320
    assert not any("bytes" in name for name in report)


@given(st.integers(0, 1000), st.floats(0, 0.99), st.integers(1, 40))
def test_the_largest_of_each_row_stay_and_of_equal_ones_the_first(seed: int, share: float, width: int) -> None:
    importance = torch.from_numpy(np.random.default_rng(seed).integers(0, 5, (3, width)).astype(float))
    mask = largest(importance, share)
    for row, kept in zip(importance.tolist(), mask.tolist(), strict=True):
        order = sorted(range(width), key=lambda j: (-row[j], j))[: round((1 - share) * width)]
        assert [j for j in range(width) if kept[j]] == sorted(order)


def test_the_weights_that_become_zero_are_those_of_least_weight_times_norm(
    model: Model, text: Calibration, tmp_path: Path
) -> None:
    """Against norms of a naive loop, on the second expert's last matrix of the first layer."""
    after, _ = remade(Wanda(0.5, None, text), model, pruned(model), tmp_path)
    before = exported(model, pruned(model), tmp_path / "export")
    loaded, ids = model.load("float32"), torch.from_numpy(text.tokens(model))
    compress(loaded, pruned(model).layers)
    inputs, units, tokens = naive_norms(loaded, 0, ids)
    assert tokens[1] >= FEW
    name = next(
        n
        for n in before
        if "layers.0" in n
        and "down_proj" in n
        and is_matrix(n, before[n])
        and ("experts.1." in n or model.name == "gpt_oss")
    )
    matrix, left = (
        as_rows(model, values[name][1] if model.name == "gpt_oss" else values[name]) for values in (before, after)
    )
    importance = matrix.float().abs() * units[1].sqrt()
    for row, kept in zip(importance, left != 0, strict=True):
        assert float(row[kept].min()) >= float(row[~kept].max()) * (1 - 1e-5)


def naive_norms(loaded: Any, layer: int, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of squares [E, H] and [E, I] and tokens [E] of one layer, token by token and expert by expert."""
    block = moe_blocks(loaded)[layer]
    hidden = block_inputs(loaded, {layer: block}, [(ids, torch.ones_like(ids))])[layer]
    experts, router = block.experts, block.gate if hasattr(block, "gate") else block.router
    logits = hidden @ router.weight.detach().T + (
        router.bias.detach() if getattr(router, "bias", None) is not None else 0
    )
    count, width = len(router.weight), experts.down_proj.shape[1 if experts.is_transposed else 2]
    inputs, units, tokens = torch.zeros(count, hidden.shape[1]), torch.zeros(count, width), torch.zeros(count)
    for x, chosen in zip(hidden, logits.topk(TOP_K).indices, strict=True):
        for expert in chosen.tolist():
            up = experts.gate_up_proj[expert].detach()
            product = x @ up + experts.gate_up_proj_bias[expert].detach() if experts.is_transposed else up @ x
            if experts.is_transposed:  # gpt-oss: interleaved, clamped
                gate, linear = product[0::2].clamp(max=7.0), product[1::2].clamp(-7.0, 7.0)
                unit = (linear + 1) * gate * torch.sigmoid(1.702 * gate)
            else:
                unit = functional.silu(product[:width]) * product[width:]
            inputs[expert] += x**2
            units[expert] += unit**2
            tokens[expert] += 1
    return inputs, units, tokens


# Norms (A4).


def test_norms_are_over_the_tokens_routed_to_an_expert(model: Model, text: Calibration) -> None:
    loaded, ids = model.load("float32"), torch.from_numpy(text.tokens(model))
    before = loaded.config._experts_implementation
    batches = [(part, torch.ones_like(part)) for part in ids.split(3)]
    found = input_norms(loaded, batches)
    assert loaded.config._experts_implementation == before
    for layer, norms in found.items():
        inputs, units, tokens = naive_norms(loaded, layer, ids)
        assert torch.equal(norms.tokens.float(), tokens)
        torch.testing.assert_close(norms.inputs.float(), inputs, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(norms.units.float(), units, rtol=1e-3, atol=1e-6)
        assert int(norms.tokens.sum()) == ids.numel() * TOP_K


def test_looking_at_the_inputs_changes_no_output(model: Model, text: Calibration) -> None:
    loaded, ids = model.load("float32"), torch.from_numpy(text.tokens(model))
    outputs = []
    watch = loaded.register_forward_hook(lambda *seen: outputs.append(seen[2].logits))
    input_norms(loaded, [(ids, torch.ones_like(ids))])
    watch.remove()
    with torch.no_grad():
        torch.testing.assert_close(outputs[0], loaded(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_an_expert_with_few_tokens_takes_its_layers_norms() -> None:
    squares = torch.arange(12.0).reshape(3, 4).double()
    norms = InputNorms(torch.tensor([FEW, FEW - 1, 100]), squares, 2 * squares)
    assert norms.few == [1]
    expected = torch.stack([squares[0], squares.sum(0), squares[2]]).sqrt()
    torch.testing.assert_close(norms.of("gate_up_proj"), expected)
    torch.testing.assert_close(norms.of("down_proj"), expected * 2**0.5)


def test_experts_with_few_tokens_are_reported(model: Model, text: Calibration, tmp_path: Path) -> None:
    _, report = remade(Wanda(0.5, None, text), model, pruned(model), tmp_path)
    loaded, ids = model.load("float32"), torch.from_numpy(text.tokens(model))
    compress(loaded, pruned(model).layers)
    expected = {layer: torch.nonzero(naive_norms(loaded, layer, ids)[2] < FEW).flatten().tolist() for layer in (0, 1)}
    assert report["few_tokens"] == {layer: few for layer, few in expected.items() if few} != {}


# How much (section 1.2).


@pytest.mark.parametrize(("total", "share"), [(0.33, 0.1625), (0.66, 0.575), (0.20, 0.0), (0.1, 0.0)])
def test_the_share_follows_from_the_total_and_what_the_plan_drops(
    total: float, share: float, text: Calibration
) -> None:
    plan = Plan({layer: LayerPlan.prune(range(8), 10) for layer in range(3)})
    assert wanda.dropped_share(plan) == pytest.approx(0.2)
    recovery = Wanda(None, total, text)
    assert recovery.share_after(plan) == pytest.approx(share, abs=1e-12)
    assert total < 0.2 or 0.2 + 0.8 * recovery.share_after(plan) == pytest.approx(total)
    assert Wanda(0.4, None, text).share_after(plan) == 0.4


def test_where_the_plan_drops_enough_already_nothing_more_becomes_zero(
    model: Model, text: Calibration, tmp_path: Path
) -> None:
    plan = pruned(model, [0, 2, 3, 4])
    after, report = remade(Wanda(None, 0.33, text), model, plan, tmp_path)
    before = exported(model, plan, tmp_path / "export")
    assert report["share"] == report["sparsity"] == 0 and report["dropped"] == 0.5
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_same_text_makes_the_same_weights(model: Model, text: Calibration, tmp_path: Path) -> None:
    first, second = (remade(Wanda(0.5, None, text), model, pruned(model), tmp_path / name)[0] for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


# Refusals and options.


@pytest.mark.parametrize(
    ("share", "total", "match"), [(None, None, "set one"), (0.5, 0.6, "set one"), (1.0, None, "1.0 is no share")]
)
def test_one_share_is_to_be_given(share: float | None, total: float | None, match: str, text: Calibration) -> None:
    with pytest.raises(UserError, match=match):
        Wanda(share, total, text)


def test_merged_experts_behind_several_rows_are_refused(model: Model, text: Calibration, tmp_path: Path) -> None:
    clusters = [[0, 5], [1], [2, 3, 7], [4, 6]]
    plan = Plan({layer: LayerPlan.merge(clusters, [1.0] * EXPERTS) for layer in model.experts})
    with pytest.raises(UserError, match="more router rows than distinct experts.*Wanda"):
        remade(Wanda(0.5, None, text), model, plan, tmp_path)


def test_the_file_of_options_fits_the_embedded_model() -> None:
    config = OmegaConf.create({"seed": 0, "recovery": option("recovery", "wanda")})
    fields = dict(OmegaConf.to_container(config.recovery, resolve=True))  # type: ignore[arg-type]
    assert fields.pop("label") == "Wanda"
    build("recovery", fields).check(Model("tiny", "tasks/tiny/model"), REAP())
