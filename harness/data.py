"""Calibration text: documents, sampled by a seed, packed into token sequences without holes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.models import ROOT, Model


@dataclass(frozen=True)
class Calibration:
    """What the statistics are gathered on.

    files: local ``*.jsonl`` (a ``text`` field per line) or ``*.txt`` (documents separated by blank lines), absolute or
    relative to the project. sequences x length: tokens are packed into this many sequences of this length.
    seed: which documents are drawn, without replacement. dtype: in which the model runs the pass. held_out: sequences
    of further documents that no statistic sees, for the reconstruction error of plans; 0 leaves that out.
    """

    name: str
    files: tuple[str, ...]
    sequences: int
    length: int
    seed: int
    held_out: int
    dtype: str = "auto"
    batch_size: int = 8

    def check(self) -> None:
        """Raise UserError, before any work, if a file is missing or a number is not usable."""
        if self.held_out < 0:
            raise UserError(f"calibration.held_out={self.held_out}: sequences held out are 0 or more.")
        if self.sequences < 1 or self.length < 2 or self.batch_size < 1:
            raise UserError(
                f"calibration {self.name!r} asks for {self.sequences} sequences of {self.length} tokens in batches of "
                f"{self.batch_size}: there must be at least 1 sequence, 2 tokens and 1 per batch."
            )
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"calibration dtype {self.dtype!r} is not one of auto, float32, bfloat16.")
        if not self.paths:
            raise UserError(f"calibration {self.name!r} names no files. Give at least one .jsonl or .txt file.")

    @cached_property
    def paths(self) -> list[Path]:
        return [_find(file, self.name) for file in self.files]

    def identity(self) -> Mapping[str, Any]:
        """What determines the tokens, for the cache key: contents, not paths. batch_size changes no sum."""
        return {
            "documents": [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.paths],
            "sequences": self.sequences,
            "length": self.length,
            "seed": self.seed,
        }

    def tokens(self, model: Model) -> np.ndarray:
        """Packed token ids, int64, shape [sequences + held_out, length], documents separated by the end-of-text token.

        The last ``held_out`` sequences begin with a document of which the others hold nothing. Raises UserError if the
        documents hold fewer tokens than asked for.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model.folder, local_files_only=True)
        wanted = (self.sequences * self.length, self.held_out * self.length)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        documents: list[list[int]] = []
        missing = sum(wanted)
        for text in self._shuffled():
            documents.append(tokenizer(text, add_special_tokens=False)["input_ids"] + end)
            missing -= len(documents[-1])
            if missing <= 0 and (parts := _parts(documents, *wanted)):
                return np.array(parts[0] + parts[1], dtype=np.int64).reshape(-1, self.length)
        held = sum(map(len, documents))
        usable = range(held // self.length, 0, -1)
        most = next((n for n in usable if _parts(documents, n * self.length, wanted[1])), 0)
        raise UserError(
            f"calibration {self.name!r} asks for {self.sequences} + {self.held_out} sequences of {self.length} tokens, "
            f"{sum(wanted)} in all, but its files hold {held}. Largest usable number of sequences, with "
            f"{self.held_out} held out: {most}."
        )

    def _shuffled(self) -> list[str]:
        documents = [text for path in self.paths for text in _documents(path)]
        order = np.random.default_rng(self.seed).permutation(len(documents))
        return [documents[index] for index in order]


def _parts(documents: list[list[int]], first: int, second: int) -> tuple[list[int], list[int]] | None:
    """So many tokens of the first documents, and so many of those after them; None if there are too few."""
    lengths = np.cumsum([len(document) for document in documents])
    border = int(np.searchsorted(lengths, first)) + 1  # documents that it takes
    if border > len(documents) or lengths[-1] - lengths[border - 1] < second:
        return None
    split = [token for document in documents[:border] for token in document]
    rest = [token for document in documents[border:] for token in document]
    return split[:first], rest[:second]


def _find(file: str, calibration: str) -> Path:
    for candidate in (Path(file), ROOT / file):
        if candidate.is_file():
            return candidate.resolve()
    raise UserError(
        f"calibration {calibration!r}: there is no file {file!r}. "
        "Name a .jsonl file with a text field per line, or a .txt file."
    )


def _documents(path: Path) -> Iterator[str]:
    if path.suffix == ".txt":
        yield from (part for part in path.read_text().split("\n\n") if part.strip())
        return
    for number, line in enumerate(path.read_text().split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a JSON object with a text field.") from error
