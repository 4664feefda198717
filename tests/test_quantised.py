"""Quantised checkpoints: pruned byte for byte, calibrated in 16 bits, a layer at a time where that is needed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from harness import checkpoint
from harness.blocks import compress
from harness.calibrate import calibrate
from harness.compressed import Compression, parts_of
from harness.errors import UserError
from harness.layer_files import Files
from harness.models import Model
from harness.plan import LayerPlan, Plan
from harness.room import need
from harness.streaming import open_streamed
from tests.architectures import batches, write_model
from tests.quantised import (
    FP4,
    UNEVEN,
    to_fp8,
    to_fp8_blocks,
    to_fp8_rows,
    to_int8_rows,
    to_mxfp4,
    to_nvfp4,
    to_packed_mxfp4,
    to_w4a16,
)
from tests.test_streaming import same, streamed
from tests.tiny_checkpoint import write_checkpoint

KEPT = [0, 3, 4, 7]
KINDS = [
    ("qwen3_moe", to_fp8),
    ("glm4_moe", to_fp8),
    ("gpt_oss", to_mxfp4),
    ("glm4_moe", to_w4a16),
    ("qwen3_moe", to_fp8_rows),
    ("qwen3_moe", to_int8_rows),
    ("qwen3_moe", to_fp8_blocks),
    ("glm4_moe", to_nvfp4),
    ("glm4_moe", to_packed_mxfp4),
]


@pytest.fixture(scope="module", params=KINDS, ids=[f"{family} {to.__name__}" for family, to in KINDS])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """A model in full precision, and quantised."""
    family, quantised = request.param
    folder = tmp_path_factory.mktemp(quantised.__name__)
    plain = write_checkpoint(folder / "plain", family=family)
    return Model("plain", str(plain)), Model("quantised", str(quantised(plain, folder / "quantised")))


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
    single = [name for name in model.tensors if re.search(r"\.experts\.\d+\.", name)]
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
    assert types & {"F8_E4M3", "U8", "I32", "I8"}, "nothing was dequantised"
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
    weights = (p for name, p in loaded.named_parameters() if not name.endswith("_shape"))  # a library leaves that there
    assert {p.dtype for p in weights} <= {torch.bfloat16, torch.float32}
    extras = frozenset({"logit_gram", "all_output_sum"})
    found = calibrate(loaded, batches(), extras)
    original = calibrate(plain.load("float32"), batches(), extras)
    for index, layer in found.layers.items():
        close = np.corrcoef(layer["gate_norm"], original.layers[index]["gate_norm"])[0, 1]
        assert close > 0.9, "quantising changes a little"
    assert same(found, streamed(model, tmp_path, extras, 0, batches=batches()))


def test_memory_is_counted_as_it_is_computed_with(both: tuple[Model, Model]) -> None:
    model = both[1]
    loaded = sum(parameter.nbytes for parameter in model.load("auto").parameters())
    assert need(model, "auto", 1).weights == pytest.approx(loaded, rel=0.05)
    assert model.nbytes < 0.8 * loaded


def test_experts_that_are_quantised_are_not_averaged(both: tuple[Model, Model], tmp_path: Path) -> None:
    model = both[1]
    merged = LayerPlan.merge([[0, 1], [2], [3], [4], [5], [6], [7]], [1.0] * 8)
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match="Experts stored as (F8_E4M3|U8|I64|I8) cannot be averaged"):
        checkpoint.export(model, Plan(dict.fromkeys(model.experts, merged)), tmp_path / "merged")


def test_another_quantisation_is_refused_with_what_can_be_done(tmp_path: Path) -> None:
    folder = to_fp8(write_checkpoint(tmp_path / "plain"), tmp_path / "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised .gptq., and only fp8, mxfp4, compressed-tensors .* plan=<file>"):
        Model("gptq", str(folder)).load("auto")


def test_the_scales_stand_beside_their_experts(tmp_path: Path) -> None:
    """The fixture is as released checkpoints are."""
    with safe_open(to_fp8(write_checkpoint(tmp_path / "a"), tmp_path / "b") / "model.safetensors", "pt") as file:
        names = set(file.keys())
        weight = file.get_tensor("model.layers.0.mlp.experts.3.up_proj.weight")
    assert weight.dtype == torch.float8_e4m3fn
    assert "model.layers.0.mlp.experts.3.up_proj.weight_scale_inv" in names
    assert "model.layers.0.mlp.gate.weight_scale_inv" not in names


@pytest.mark.parametrize("to", [to_fp8, to_w4a16, to_fp8_rows])
def test_of_a_model_that_also_sees_the_part_that_reads_is_as_quantised(
    to: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    """Its quantisation stands in the config of the whole."""
    plain = write_model("qwen3_5_moe", tmp_path / "plain")
    model = Model("seeing", str(to(plain.folder, tmp_path / "quantised")))
    original, loaded = (dict(one.load("bfloat16").named_parameters()) for one in (plain, model))
    assert original.keys() == loaded.keys()
    for name, value in loaded.items():
        error = (value.float() - original[name].float()).norm() / original[name].float().norm().clamp_min(1e-9)
        assert error < 0.15, name
    found = calibrate(model.load("auto"), batches())
    assert same(found, streamed(model, tmp_path, frozenset(), 0, batches=batches()))


def test_what_is_unpacked_is_what_transformers_unpacks(tmp_path: Path) -> None:
    """By another way: its own quantiser, for 4 bits."""
    folder = to_w4a16(write_checkpoint(tmp_path / "plain"), tmp_path / "packed")
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    theirs = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="auto").state_dict()
    ours = Model("packed", str(folder)).load("auto").state_dict()
    assert ours.keys() <= theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("to", [to_nvfp4, to_packed_mxfp4, to_fp8_blocks])
def test_what_is_unpacked_is_what_the_format_says(to: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    """By another way: each number by its code, times its scales."""
    folder = to(write_checkpoint(tmp_path / "plain"), tmp_path / "packed")
    model = Model("packed", str(folder))
    files = Files(model.tensors, model.compression)
    stored = load_file(folder / "model.safetensors")
    weight = "model.layers.0.mlp.experts.3.up_proj.weight"
    scale = stored[f"{weight}_scale"]
    if to is to_fp8_blocks:
        rows, columns = stored[weight].shape
        assert rows % UNEVEN, "a block at the border is smaller"
        scales = scale.repeat_interleave(UNEVEN, 0)[:rows].repeat_interleave(UNEVEN, 1)[:, :columns]
        expected = stored[weight].float() * scales.float()
    else:
        packed = stored[f"{weight}_packed"].long()
        numbers = FP4[torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)]
        if to is to_nvfp4:
            scales = scale.float().repeat_interleave(16, 1) / stored[f"{weight}_global_scale"]
        else:
            scales = torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
        expected = numbers * scales
    with files.reading([weight]) as read:
        assert torch.equal(read(weight).float(), expected)


@pytest.mark.parametrize("changes", [{"strategy": "group", "group_size": 32}, {"num_bits": 4, "strategy": "tensor"}])
def test_what_would_not_be_unpacked_as_it_was_packed_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = to_fp8_rows(write_checkpoint(tmp_path / "plain"), tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    for refuse in (lambda model: model.load("auto"), lambda model: open_streamed(model, "auto")):
        with pytest.raises(
            UserError, match="cannot be computed with here: of compressed-tensors, integers with scales"
        ):
            refuse(Model("blocks", str(folder)))


def test_kimi_k2_is_a_deepseek_v3_in_four_bits_whatever_code_it_brings(tmp_path: Path) -> None:
    """Its config.json has a model type that transformers does not know, and names code of its own."""
    folder = to_w4a16(write_model("deepseek_v3", tmp_path / "plain").folder, tmp_path / "kimi")
    twin = Model("deepseek", str(shutil.copytree(folder, tmp_path / "twin")))
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModelForCausalLM": "modeling_deepseek.Own"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "kimi_k2", "auto_map": code}))
    (folder / "configuration_deepseek.py").write_text("raise AssertionError('it is not run')")
    with pytest.raises(UserError, match="names Python code"):
        Model("kimi", str(folder)).load("auto")
    for allowed in (False, True):
        model = Model("kimi", str(folder), trust_remote_code=allowed)
        assert type(model.load("auto")).__name__ == "DeepseekV3ForCausalLM"
    found = streamed(model, tmp_path / "a", frozenset())
    assert same(found, streamed(twin, tmp_path / "b", frozenset()))
    made = pruned(model, tmp_path / "pruned")
    assert json.loads((made.folder / "config.json").read_text())["model_type"] == "kimi_k2"


def test_what_names_a_weight_comes_before_what_is_for_all_linear_layers() -> None:
    """Whatever their order: experts in 4 bits, the rest in FP8."""
    four = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    eight = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": eight},
        "group_1": {"targets": [r"re:.*mlp\.experts\..*", "model.layers.0.mlp.up_proj"], "weights": four},
    }
    packing = Compression({"config_groups": groups, "format": "mixed-precision"})
    prefix = "model.layers.0."
    for name in ("mlp.experts.3.up_proj.weight", "mlp.up_proj.weight"):
        assert packing.bits(prefix + name) == 4
    assert packing.scheme(prefix + "self_attn.q_proj.weight").weights.num_bits == 8
    alone = Compression({"config_groups": {"group_1": groups["group_1"]}, "format": "pack-quantized"})
    with pytest.raises(UserError, match=r"does not say how model.layers.0.self_attn.q_proj.weight is packed"):
        alone.scheme(prefix + "self_attn.q_proj.weight")


def test_parts_of_one_weight_are_found_by_their_names() -> None:
    names = ["a.weight_packed", "a.weight_scale", "a.weight_shape", "b.weight", "b.weight_scale", "c.weight", "d.bias"]
    assert parts_of(names) == {
        "a.weight": {"_packed": "a.weight_packed", "_scale": "a.weight_scale", "_shape": "a.weight_shape"},
        "b.weight": {"": "b.weight", "_scale": "b.weight_scale"},
        "c.weight": {"": "c.weight"},
        "d.bias": {"": "d.bias"},
    }
