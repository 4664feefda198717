"""A model that is read from disk layer by layer gives the sums of the same model in memory, to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.calibrate import calibrate, calibrate_streamed
from harness.models import Model
from harness.parking import Parking
from harness.stats import EXTRAS, Stats
from harness.store import Store
from harness.streaming import Batch, open_streamed
from harness.unfinished import Unfinished
from tests.conftest import token_batches


def same(one: Stats, other: Stats) -> bool:
    """Equal to the last bit."""
    assert one.layers.keys() == other.layers.keys() and one.names == other.names
    return all(
        layer.tokens == other.layers[index].tokens
        and all(
            value.tobytes() == np.asarray(other.layers[index][name]).tobytes() for name, value in layer.sums.items()
        )
        for index, layer in one.layers.items()
    )


def streamed(
    model: Model,
    folder: Path,
    extras: frozenset[str],
    device_bytes: float = np.inf,
    name: str = "x",
    batches: Sequence[Batch] = (),
) -> Stats:
    """Of `token_batches`, where no others are given."""
    parking = Parking(device_bytes, 0, folder)
    unfinished = Unfinished(Store(folder / "store"), name)
    given = batches or token_batches()
    return calibrate_streamed(open_streamed(model, "auto"), given, extras, "actual", parking, unfinished)


@pytest.mark.parametrize("device_bytes", [np.inf, 2 * 24 * 32 * 4, 0], ids=["all stay", "one stays", "all on disk"])
def test_streamed_sums_are_those_of_the_model_in_memory(
    family_model: Model, tmp_path: Path, device_bytes: float
) -> None:
    extras = frozenset(EXTRAS)
    whole = calibrate(family_model.load("auto"), token_batches(), extras)
    assert same(whole, streamed(family_model, tmp_path, extras, device_bytes))
    assert not list(tmp_path.glob("*.bin")), "what waited on disk is gone"


@pytest.mark.parametrize(("spare", "on_disk"), [(0.0, 0), (np.inf, 1)])
def test_states_go_to_disk_where_other_processes_have_taken_the_memory(
    tmp_path: Path, spare: float, on_disk: int
) -> None:
    parking = Parking(np.inf, 0, tmp_path, spare)
    hidden = torch.arange(24.0).view(2, 3, 4)
    parking.put(0, hidden)
    assert len(list(tmp_path.iterdir())) == on_disk == int(hidden.isnan().all())
    parking.fetch(0)
    assert hidden.flatten().tolist() == list(range(24)) and not list(tmp_path.iterdir())
