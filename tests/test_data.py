"""Calibration text: what is held out is further text, and changes nothing of what is calibrated on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from harness.data import Calibration
from harness.errors import UserError
from harness.sweep import expand

MODEL = expand(["model=tiny"]).cells[0].model


def calibration(file: Path, **changes: int) -> Calibration:
    return Calibration("text", (str(file),), **{"sequences": 4, "length": 16, "seed": 3, "held_out": 2, **changes})


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents, each of one number said over and over."""
    path = tmp_path_factory.mktemp("text") / "numbers.jsonl"
    path.write_text("".join(json.dumps({"text": f" {number}" * 9}) + "\n" for number in range(100, 160)))
    return path


def test_held_out_sequences_come_after_and_change_nothing_before(file: Path) -> None:
    plain = calibration(file, held_out=0).tokens(MODEL)
    more = calibration(file).tokens(MODEL)
    assert plain.shape == (4, 16) and more.shape == (6, 16)
    np.testing.assert_array_equal(more[:4], plain)


def test_no_document_is_on_both_sides(file: Path) -> None:
    from transformers import AutoTokenizer

    tokens = calibration(file, sequences=9, held_out=9).tokens(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL.folder)
    seen, held = (set(tokenizer.decode(part.flatten()).replace("<", " <").split()) for part in (tokens[:9], tokens[9:]))
    numbers = {str(number) for number in range(100, 160)}
    assert len(seen & numbers) >= 2 and len(held & numbers) >= 2
    assert not seen & held & numbers


def test_too_little_text_for_what_is_held_out_is_refused(file: Path) -> None:
    with pytest.raises(UserError, match=r"4 \+ 900 sequences of 16"):
        calibration(file, held_out=900).tokens(MODEL)


def test_the_identity_of_the_text_does_not_depend_on_what_is_held_out(file: Path) -> None:
    assert calibration(file).identity() == calibration(file, held_out=9).identity()
