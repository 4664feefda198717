"""Checkpoints with multi-token-prediction heads, as DeepSeek-V3 and GLM-4.5 are released: calibrated and pruned as if
they had none, which is said.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import checkpoint
from harness.calibrate import calibrate
from harness.models import Model
from harness.plan import LayerPlan, Plan
from tests.conftest import EXPERTS, token_batches, write_model
from tests.test_streaming import same, streamed


def with_head(plain: Model, folder: Path, prefix: str) -> Model:
    """A copy of a model with another layer behind the last, as heads are stored: all of a layer, and more."""
    folder.mkdir()
    config = json.loads((plain.folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = load_file(plain.folder / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if name.startswith("model.layers.2."):
            tensors[prefix + name.removeprefix("model.layers.2.")] = tensor.flip(0).contiguous()
    tensors[f"{prefix}eh_proj.weight"] = torch.ones(32, 64)
    save_file(tensors, folder / "model.safetensors")
    return Model("with head", str(folder))


@pytest.mark.parametrize("prefix", ["model.layers.3.", "mtp.layers.0."])
def test_a_head_changes_nothing_and_is_left_out(prefix: str, tmp_path: Path, capsys) -> None:
    plain = write_model("glm4_moe", tmp_path / "plain")
    model = with_head(plain, tmp_path / "model", prefix)
    assert model.experts == plain.experts == {1: EXPERTS, 2: EXPERTS}
    assert model.tensors.keys() == plain.tensors.keys() and model.parameters == plain.parameters
    assert len(model.extra_heads) > EXPERTS and model.digest != plain.digest
    found = calibrate(model.load("auto"), token_batches())
    assert same(found, calibrate(plain.load("auto"), token_batches()))
    assert same(found, streamed(model, tmp_path, frozenset()))
    plan = Plan({layer: LayerPlan.prune([0, 2, 5, 7], EXPERTS) for layer in model.experts})
    out = []
    for each in (plain, model):
        folder = tmp_path / f"pruned {each.name}"
        folder.mkdir()
        checkpoint.export(each, plan, folder)
        checkpoint.verify(folder, each)
        out.append(folder)
    assert "without the multi-token-prediction heads" in capsys.readouterr().err
    config = json.loads((out[1] / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0 and config["n_routed_experts"] == 4
    without, headless = (load_file(folder / "model.safetensors") for folder in out)
    assert without.keys() == headless.keys()
    assert all(torch.equal(without[name], headless[name]) for name in without)


def test_layers_of_another_part_are_no_head(tmp_path: Path) -> None:
    """A vision tower may have more layers than the decoder."""
    plain = write_model("glm4_moe", tmp_path / "plain")
    tensors = load_file(plain.folder / "model.safetensors")
    tensors["visual.encoder.layers.7.mlp.weight"] = torch.ones(4, 4)
    save_file(tensors, plain.folder / "model.safetensors")
    assert Model("seeing", str(plain.folder)).extra_heads == frozenset()
