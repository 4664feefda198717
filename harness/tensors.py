"""Safetensors as bytes: the inventory of a checkpoint folder, and a writer that streams.

Nothing here knows a dtype's meaning or a model: kept tensors of any format (bf16, FP8, packed 4-bit) pass through bit
for bit, in the memory of one tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: ``[start, end)`` are byte offsets in ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        """The tensor's bytes, or those from ``start`` to ``end`` within it."""
        stop = self.nbytes if end is None else end
        with self.file.open("rb") as file:
            file.seek(self.start + start)
            return file.read(stop - start)

    def read_rows(self, rows: Iterable[int]) -> bytes:
        """Bytes of these rows of the first axis, in the order given."""
        size = self.nbytes // self.shape[0]
        return b"".join(self.read(row * size, (row + 1) * size) for row in rows)


def by_file(tensors: Mapping[str, Tensor]) -> dict[Path, dict[str, Tensor]]:
    """The same tensors, grouped by the file that holds them."""
    files: dict[Path, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        files.setdefault(tensor.file, {})[name] = tensor
    return files


def inventory(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder by name, in file order. Reads headers only.

    Raises UserError if there are no safetensors, a file is cut short or its header is not readable, or a name occurs
    twice or is missing from the files the index promises.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder} holds no *.safetensors file. Only safetensors checkpoints are read (no pickles); "
            "convert the model with save_pretrained(safe_serialization=True)."
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise UserError(f"{folder}: tensor {name} is in {tensors[name].file.name} and again in {file.name}.")
            tensors[name] = tensor
    _check_index(folder, tensors)
    return tensors


def read_header(file: Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file, in the order of their bytes."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if length > size:
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        base = 8 + length
        tensors = {
            name: Tensor(file, entry["dtype"], tuple(entry["shape"]), *(base + o for o in entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}.") from error
    end = max((tensor.end for tensor in tensors.values()), default=base)
    if end != size:
        raise UserError(f"{file} is damaged: its tensors end at byte {end}, the file at byte {size}.")
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def _check_index(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    index = folder / INDEX
    if not index.exists():
        return
    try:
        promised = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not a readable index of a checkpoint: {error!r}.") from error
    for name, file in promised.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{folder}: {INDEX} promises tensor {name} in {file}, and it is not there.")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its header, and its bytes made when their turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def write(file: Path, entries: Iterable[Entry], content: Iterator[bytes]) -> None:
    """Write a safetensors file: the header from ``entries``, then each tensor's bytes from ``content``, in order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, sizes = 0, []
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
        sizes.append(entry.nbytes)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for size, data in zip(sizes, content, strict=True):
            assert len(data) == size, (len(data), size)
            stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
