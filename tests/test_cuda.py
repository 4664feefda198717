"""The same on a GPU, where there is one: sums, streaming, blocks and training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from harness import distill
from harness.calibrate import calibrate, calibrate_streamed
from harness.models import Model
from harness.parking import Parking
from harness.reconstruct import Reconstruction
from harness.stats import EXTRAS, Stats
from harness.store import Store
from harness.streaming import open_streamed
from harness.unfinished import Unfinished
from tests.conftest import TOP_K, token_batches
from tests.test_blocks import PLANS
from tests.test_distill import RECIPE, loaded
from tests.test_streaming import same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ALL = frozenset(EXTRAS)


def test_sums_are_those_of_the_cpu(family_model: Model) -> None:
    there = calibrate(family_model.load("float32"), token_batches(), ALL)
    here = calibrate(family_model.load("float32").cpu(), token_batches(), ALL)
    for layer, sums in here.layers.items():
        for name, value in sums.sums.items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(there.layers[layer][name], value, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("device, host", [(np.inf, 0), (0, np.inf), (0, 0), (2 * 24 * 32 * 4, 2 * 24 * 32 * 4)])
def test_streamed_sums_are_those_of_the_model_on_the_gpu(
    family_model: Model, tmp_path: Path, device: float, host: float
) -> None:
    def streamed() -> Stats:
        parking = Parking(device, host, tmp_path)
        unfinished = Unfinished(Store(tmp_path / "store"), "x")
        opened = open_streamed(family_model, "auto")
        return calibrate_streamed(opened, token_batches(), ALL, "actual", parking, unfinished)

    assert same(calibrate(family_model.load("auto"), token_batches(), ALL), streamed())


def test_reconstruction_errors_are_those_of_the_cpu(family_model: Model) -> None:
    plan = dict.fromkeys(family_model.experts, PLANS["merged"])
    there = Reconstruction(family_model.load("float32"), token_batches()).errors(plan)
    here = Reconstruction(family_model.load("float32").cpu(), token_batches()).errors(plan)
    assert there == pytest.approx(here, rel=1e-3)


def test_training_on_a_gpu_is_training_on_the_cpu(qwen_model: Model) -> None:
    batches = [ids for ids, _ in token_batches(4, padded=False)]
    found = {}
    for device in ("cpu", "cuda"):
        student, teacher = loaded(qwen_model).to(device), loaded(qwen_model).to(device)
        with torch.no_grad():
            student.lm_head.weight.mul_(0.9)
        found[device] = distill.train(student, teacher, batches, RECIPE, TOP_K, 0, len(batches))
    assert found["cuda"]["total"] == pytest.approx(found["cpu"]["total"], rel=1e-2)
