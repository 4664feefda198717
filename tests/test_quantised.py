"""Quantised checkpoints: pruned byte for byte, calibrated in 16 bits, a layer at a time where that is needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from harness import checkpoint
from harness.blocks import compress
from harness.calibrate import calibrate
from harness.errors import UserError
from harness.models import Model
from harness.plan import LayerPlan, Plan
from harness.room import need
from tests.architectures import batches
from tests.quantised import to_fp8, to_mxfp4
from tests.test_streaming import same, streamed
from tests.tiny_checkpoint import write_checkpoint

KEPT = [0, 3, 4, 7]
KINDS = {"qwen3_moe": to_fp8, "glm4_moe": to_fp8, "gpt_oss": to_mxfp4}


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """A model in full precision, and quantised."""
    folder = tmp_path_factory.mktemp(request.param)
    plain = write_checkpoint(folder / "plain", family=request.param)
    return Model("plain", str(plain)), Model("quantised", str(KINDS[request.param](plain, folder / "quantised")))


def pruned(model: Model, folder: Path) -> Model:
    folder.mkdir()
    plan = Plan({layer: LayerPlan.prune(KEPT, count) for layer, count in model.experts.items()})
    checkpoint.export(model, plan, folder)
    checkpoint.verify(folder, model)
    return Model("pruned", str(folder))


def raw(model: Model, name: str) -> bytes:
    return model.tensors[name].read()


def test_kept_experts_and_scales_are_copied_bit_for_bit(both: tuple[Model, Model], tmp_path: Path) -> None:
    model = both[1]
    made = pruned(model, tmp_path / "pruned")
    single = [name for name in model.tensors if ".experts." in name and ".weight" in name and "shared" not in name]
    stacked = [name for name in model.tensors if ".experts." in name and name not in single]
    assert single or stacked
    for name in single:
        before, _, after = name.partition(".experts.")
        expert, _, part = after.partition(".")
        new = f"{before}.experts.{KEPT.index(int(expert))}.{part}" if int(expert) in KEPT else None
        if new is not None:
            assert raw(made, new) == raw(model, name) and made.tensors[new].dtype == model.tensors[name].dtype
    for name in stacked:
        old, new = model.tensors[name], made.tensors[name]
        size = old.nbytes // 8
        assert new.dtype == old.dtype and new.shape == (len(KEPT), *old.shape[1:])
        assert new.read() == b"".join(old.read()[size * row : size * (row + 1)] for row in KEPT)
    types = {tensor.dtype for name, tensor in made.tensors.items() if ".experts." in name}
    assert types & {"F8_E4M3", "U8"}, "nothing was dequantised"
    config = json.loads((made.folder / "config.json").read_text())
    assert (
        config["quantization_config"] == json.loads((model.folder / "config.json").read_text())["quantization_config"]
    )


def test_the_pruned_checkpoint_computes_what_the_plan_in_memory_does(both: tuple[Model, Model], tmp_path: Path) -> None:
    model = both[1]
    made = pruned(model, tmp_path / "pruned").load("auto")
    here = model.load("auto")
    compress(here, {layer: LayerPlan.prune(KEPT, count) for layer, count in model.experts.items()})
    ids = batches()[0][0]
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, here(input_ids=ids).logits)


def test_it_is_calibrated_in_plain_numbers_whole_or_layer_by_layer(both: tuple[Model, Model], tmp_path: Path) -> None:
    """Near to the statistics of the original, and the same both ways."""
    plain, model = both
    loaded = model.load("auto")
    assert {p.dtype for p in loaded.parameters()} <= {torch.bfloat16, torch.float32}
    extras = frozenset({"logit_gram", "all_output_sum"})
    found = calibrate(loaded, batches(), extras)
    original = calibrate(plain.load("float32"), batches(), extras)
    for index, layer in found.layers.items():
        close = np.corrcoef(layer["gate_norm"], original.layers[index]["gate_norm"])[0, 1]
        assert close > 0.9, "quantising changes a little"
    from tests import test_streaming

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(test_streaming, "token_batches", batches)
        assert same(found, streamed(model, tmp_path, extras, 0))


def test_memory_is_counted_as_it_is_computed_with(both: tuple[Model, Model]) -> None:
    model = both[1]
    loaded = sum(parameter.nbytes for parameter in model.load("auto").parameters())
    assert need(model, "auto", 1).weights == pytest.approx(loaded, rel=0.05)
    assert model.nbytes < 0.8 * loaded


def test_experts_that_are_quantised_are_not_averaged(both: tuple[Model, Model], tmp_path: Path) -> None:
    model = both[1]
    merged = LayerPlan.merge([[0, 1], [2], [3], [4], [5], [6], [7]], [1.0] * 8)
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match="Experts stored as (F8_E4M3|U8) cannot be averaged"):
        checkpoint.export(model, Plan(dict.fromkeys(model.experts, merged)), tmp_path / "merged")


def test_another_quantisation_is_refused_with_what_can_be_done(tmp_path: Path) -> None:
    folder = to_fp8(write_checkpoint(tmp_path / "plain"), tmp_path / "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised .gptq., and only fp8 and mxfp4 .* plan=<file>"):
        Model("gptq", str(folder)).load("auto")


def test_the_scales_stand_beside_their_experts(tmp_path: Path) -> None:
    """The fixture is as released checkpoints are."""
    with safe_open(to_fp8(write_checkpoint(tmp_path / "a"), tmp_path / "b") / "model.safetensors", "pt") as file:
        names = set(file.keys())
        weight = file.get_tensor("model.layers.0.mlp.experts.3.up_proj.weight")
    assert weight.dtype == torch.float8_e4m3fn
    assert "model.layers.0.mlp.experts.3.up_proj.weight_scale_inv" in names
    assert "model.layers.0.mlp.gate.weight_scale_inv" not in names
