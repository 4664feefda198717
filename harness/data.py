"""Calibration text: documents, sampled by a seed, packed into token sequences without holes."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.documents import Document, documents_of
from harness.errors import UserError
from harness.models import ROOT, Model
from harness.store import key
from harness.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = "hub:"  # such files lie in a data set's repository on the Hugging Face hub
TEXT = ("text",)
TODAY = datetime.date(2026, 1, 1)  # for templates that write the date: the same text has the same tokens on every day


@dataclass(frozen=True)
class Calibration:
    """What the statistics are gathered on.

    files: ``*.jsonl``, ``*.json`` (a row per line, or one array), both also ``*.gz``, ``*.parquet``, or ``*.txt``
    (documents separated by blank lines): local, absolute or relative to the project, or ``hub:owner/name/path`` in a
    data set on the Hugging Face hub. columns: how a row is read, the first of these that it has: a column that holds a
    text or the messages of a chat, or two, ``prompt+response``. A chat becomes text by the tokenizer's chat template,
    or, where it has none, as its messages on lines of their own.
    sequences x length: tokens are packed into this many sequences of this length.
    seed: which documents are drawn, without replacement. dtype: in which the model runs the pass. held_out: sequences
    of further documents that no statistic sees, for the reconstruction error of plans; 0 leaves that out.
    weights: how many documents of each file are drawn in turn, until all are; None: all files are one pile.
    tools: a JSON file of the tools that could be called, for chats that call some and whose rows do not say which.
    all_expert_tokens: where a method asks what every expert makes of a token, routed to it or not, only the first so
    many tokens are asked. shards: parts of the sequences that are gathered on their own, by as many processes as come.
    """

    name: str
    files: tuple[str, ...]
    sequences: int
    length: int
    seed: int
    held_out: int
    dtype: str = "auto"
    batch_size: int = 8
    columns: tuple[str, ...] = TEXT
    all_expert_tokens: int = 65_536
    shards: int = 1
    weights: tuple[int, ...] | None = None
    tools: str | None = None

    def check(self) -> None:
        """Raise UserError, before any work, if a file is missing or a number is not usable."""
        self._check_numbers()
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"calibration dtype {self.dtype!r} is not one of auto, float32, bfloat16.")
        if unread := [column for column in self.columns if column.count("+") > 1 or not all(column.split("+"))]:
            raise UserError(f"calibration.columns={unread}: name a column, or two as prompt+response.")
        if not self.columns:
            raise UserError(f"calibration {self.name!r}: calibration.columns=[] names no column to read.")
        if not self.paths:
            raise UserError(f"calibration {self.name!r} names no files. Give at least one .jsonl or .txt file.")
        self._tools  # noqa: B018 - read, so that what cannot be is said

    def _check_numbers(self) -> None:
        if self.held_out < 0:
            raise UserError(f"calibration.held_out={self.held_out}: sequences held out are 0 or more.")
        if self.sequences < 1 or self.length < 2 or self.batch_size < 1:
            raise UserError(
                f"calibration {self.name!r} asks for {self.sequences} sequences of {self.length} tokens in batches of "
                f"{self.batch_size}: there must be at least 1 sequence, 2 tokens and 1 per batch."
            )
        if self.weights is not None and (len(self.weights) != len(self.files) or min(self.weights) < 1):
            raise UserError(
                f"calibration.weights={list(self.weights)}: give one number of at least 1 for each of the "
                f"{len(self.files)} files."
            )
        if self.all_expert_tokens < 1:
            raise UserError(f"calibration.all_expert_tokens={self.all_expert_tokens}: there must be at least 1.")
        batches = -(-self.sequences // self.batch_size)
        if not 1 <= self.shards <= batches:
            raise UserError(
                f"calibration.shards={self.shards}: {self.sequences} sequences in batches of {self.batch_size} make 1 "
                f"to {batches} shards."
            )

    @property
    def batch_tokens(self) -> int:
        """Of each batch."""
        return self.batch_size * self.length

    @property
    def tokens_in_all(self) -> int:
        """That statistics are gathered on."""
        return self.sequences * self.length

    @cached_property
    def paths(self) -> list[Path]:
        return [_find(file, self.name) for file in self.files]

    @cached_property
    def _tools(self) -> list[Any] | None:
        if self.tools is None:
            return None
        try:
            found = json.loads(_find(self.tools, self.name).read_text())
            if not isinstance(found, list):
                raise ValueError("it is no list")
        except (OSError, ValueError) as error:
            raise UserError(f"calibration.tools={self.tools} cannot be read as JSON: {error}.") from error
        return found

    @property
    def absent(self) -> list[str]:
        """Files that are not on this machine, nor in the hub's cache. Asks no network."""
        return [file for file in self.files if _local(file) is None]

    def identity(self) -> Mapping[str, Any]:
        """What determines the tokens, for the cache key: contents, not paths. batch_size changes no sum."""
        return {
            "documents": [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.paths],
            "sequences": self.sequences,
            "length": self.length,
            "seed": self.seed,
            **({} if self.columns == TEXT else {"columns": self.columns}),
            **({} if self.weights is None else {"weights": self.weights}),
            **({} if self._tools is None else {"tools_called": self._tools}),
        }

    def tokens_name(self, model: Model) -> str:
        """File name of this text in the model's tokens, those held out included."""
        documents = {**self.identity(), "held_out": self.held_out}
        return key(documents=documents, tokenizer=model.tokenizer_digest, today=str(TODAY)) + ".safetensors"

    def tokens(self, model: Model) -> np.ndarray:
        """Packed token ids, int64, shape [sequences + held_out, length], documents separated by the end-of-text token.

        The last ``held_out`` sequences begin with a document of which the others hold nothing. Raises UserError if the
        documents hold fewer tokens than asked for.
        """
        tokenizer = tokenizer_of(model.folder, model.runs_code)
        wanted = (self.sequences * self.length, self.held_out * self.length)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        documents: list[list[int]] = []
        missing = sum(wanted)
        for document in self._shuffled():
            text = self._text(document, tokenizer)
            documents.append(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end)
            missing -= len(documents[-1])
            if missing <= 0 and (parts := _parts(documents, *wanted)):
                found = np.array(parts[0] + parts[1], dtype=np.int64).reshape(-1, self.length)
                self._check_known(found, model)
                return found
        held = sum(map(len, documents))
        usable = range(held // self.length, 0, -1)
        most = next((n for n in usable if _parts(documents, n * self.length, wanted[1])), 0)
        apart = "; what is held out begins with a document of its own" if self.held_out else ""
        raise UserError(
            f"calibration {self.name!r} asks for {self.sequences} + {self.held_out} sequences of {self.length} tokens, "
            f"{sum(wanted)} in all, but its files hold {held} in {len(documents)} documents (in a .txt, empty lines "
            f"part them){apart}. Largest usable number of sequences, with {self.held_out} held out: {most}."
        )

    def _check_known(self, ids: np.ndarray, model: Model) -> None:
        size = model.config.get("vocab_size")
        if isinstance(size, int) and ids.max() >= size:
            raise UserError(
                f"calibration {self.name!r}: the tokenizer of model {model.name!r} gives token {ids.max()}, and the "
                f"model has embeddings of {size}. Its folder holds the tokenizer of another model."
            )

    def _text(self, document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
        if isinstance(document, str):
            return document
        if tokenizer.chat_template is None:
            return "\n".join(str(message.get("content", "")) for message in document.messages)
        tools = document.tools or (self._tools if document.calls_tools else None)
        dated = {"strftime_now": TODAY.strftime} if "strftime_now" in str(tokenizer.chat_template) else {}
        try:
            return str(
                tokenizer.apply_chat_template(
                    document.messages, tools=tools, tokenize=False, add_generation_prompt=False, **dated
                )
            )
        except Exception as error:  # a template may refuse a chat, in words of its own
            raise UserError(
                f"calibration {self.name!r}: the tokenizer's chat template cannot render a chat of the roles "
                f"{[message.get('role') for message in document.messages]}: {error}"
            ) from error

    def _shuffled(self) -> list[Document]:
        files = [list(documents_of(path, self.columns)) for path in self.paths]
        rng = np.random.default_rng(self.seed)
        if self.weights is None:
            documents = [document for file in files for document in file]
            return [documents[index] for index in rng.permutation(len(documents))]
        drawn = [iter([file[index] for index in rng.permutation(len(file))]) for file in files]
        rounds = range(max(-(-len(file) // weight) for file, weight in zip(files, self.weights, strict=True)))
        turns = ((file, weight) for _ in rounds for file, weight in zip(drawn, self.weights, strict=True))
        return [document for file, weight in turns for document in itertools.islice(file, weight)]


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
    """Where the file lies, fetched from the hub if need be. Raises UserError."""
    if (found := _local(file)) is not None:
        return found
    if file.startswith(HUB):
        return _fetched(file, calibration)
    raise UserError(
        f"calibration {calibration!r}: there is no file {file!r}. "
        "Name a .jsonl file with a text field per line, or a .txt file."
    )


def _local(file: str) -> Path | None:
    """The file on this machine or in the hub's cache; None if it is not there."""
    if file.startswith(HUB):
        from huggingface_hub import try_to_load_from_cache

        repository, path = _in_repository(file)
        found = try_to_load_from_cache(repository, path, repo_type="dataset")
        return Path(found) if isinstance(found, str) else None
    return next((path.resolve() for path in (Path(file), ROOT / file) if path.is_file()), None)


def _fetched(file: str, calibration: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    repository, path = _in_repository(file)
    try:
        return Path(hf_hub_download(repository, path, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(
            f"calibration {calibration!r}: {path} of the data set {repository} is not in the hub's cache and the hub "
            f"did not give it ({type(error).__name__}). Check the network, that the data set has this file and that "
            f"you may read it (hf auth login), or fetch it elsewhere and set calibration.files=[<file>]."
        ) from error


def _in_repository(file: str) -> tuple[str, str]:
    """``hub:owner/name/path`` as repository and path. Raises UserError."""
    parts = file.removeprefix(HUB).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise UserError(f"{file} names no file on the hub. Write hub:owner/name/path/in/repository.")
    return "/".join(parts[:2]), parts[2]
