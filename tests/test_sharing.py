"""Passes that wait side by side hold what is equal in all of them once."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.errors import StageError
from harness.parking import Parking
from harness.streaming import Passes, open_streamed
from tests.architectures import write_model

LENGTH = 256
MASK = LENGTH * LENGTH  # numbers


def masks() -> int:
    """How many masks of a whole sequence are in memory, each counted once."""
    found = set()
    for each in gc.get_objects():
        if type(each) is torch.Tensor and each.numel() == MASK and each.shape[-1] == LENGTH:
            found.add(each.untyped_storage().data_ptr())
    return len(found)


def held(kind: str, folder: Path, count: int) -> int:
    """Masks that so many passes hold in front of the second layer."""
    streamed = open_streamed(write_model(kind, folder / f"{count}", max_position_embeddings=LENGTH), "float32")
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 257, (1, LENGTH), generator=generator) for _ in range(count)]
    passes = Passes(streamed, [(one, torch.ones_like(one)) for one in ids], Parking(0, 0, folder))
    going = passes.layers(lambda batch: None)
    before = masks()
    next(going)
    gc.collect()
    found = masks() - before
    going.close()
    return found


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral", "gemma4_text"])
def test_more_passes_hold_no_more_masks(kind: str, tmp_path: Path) -> None:
    assert held(kind, tmp_path, 6) == held(kind, tmp_path, 2) > 0


@pytest.mark.parametrize("changed", [0, 1])
def test_a_pass_that_changes_what_is_shared_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: int
) -> None:
    """Whether it is its own or another's."""
    streamed = open_streamed(write_model("gpt_oss", tmp_path / "model"), "float32")
    layer = streamed.layers[1]
    forward, passing = layer.forward, itertools.count()

    def changing(hidden: torch.Tensor, attention_mask: torch.Tensor, **given: Any) -> Any:
        if next(passing) == changed:
            attention_mask.mul_(1)
        return forward(hidden, attention_mask=attention_mask, **given)

    monkeypatch.setattr(layer, "forward", changing)
    ids = torch.arange(1, 193).view(2, 96)  # longer than the window, so that the layers' masks differ
    passes = Passes(streamed, [(one[None], torch.ones_like(one[None])) for one in ids], Parking(0, 0, tmp_path))
    with pytest.raises(StageError, match="changes in place"):
        list(passes.layers(lambda batch: None))
