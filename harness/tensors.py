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
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # never read, never copied
CHECKSUMS = "checksums.json"  # beside the weights (harness/inventory.py)
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
BITS = {  # of a value, by the type's name; types that are not here are taken at their word
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


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

    Raises UserError if there are no safetensors, a file is cut short or its header is not readable, a name occurs
    twice, files and index differ, or a file is a link that leads elsewhere.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
        raise UserError(
            f"{folder} holds no *.safetensors file{f', only {others[0]}' if others else ''}. Only safetensors "
            "checkpoints are read (no pickles); convert the model with save_pretrained(safe_serialization=True)."
        )
    check_links(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise UserError(f"{folder}: tensor {name} is in {tensors[name].file.name} and again in {file.name}.")
            tensors[name] = tensor
    _check_index(folder, tensors)
    return tensors


def check_links(folder: Path) -> None:
    """Raise UserError for a file of the folder that is a link to somewhere else: reading a checkpoint, and copying what
    lies beside its weights, must not reach other files of this machine. The hub's cache links to its own blobs.
    """
    inside = [folder.resolve()]
    if folder.parent.name == "snapshots":
        inside.append((folder.parent.parent / "blobs").resolve())
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not any(file.resolve().is_relative_to(place) for place in inside):
            raise UserError(f"{file} is a link that leads out of the checkpoint's folder. Copy the file there.")


def read_header(file: Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file, in the order of their bytes, which they fill without gaps. Raises UserError."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if length > min(size, LONGEST_HEADER):
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        base = 8 + length
        tensors = {
            name: Tensor(file, str(entry["dtype"]), tuple(entry["shape"]), *(base + o for o in entry["data_offsets"]))
            for name, entry in header.items()
        }
        ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
        end = _check_layout(ordered, base)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}.") from error
    if end != size:
        last = next(reversed(ordered), "none")
        raise UserError(f"{file} is damaged: its last tensor, {last}, ends at byte {end}, the file at byte {size}.")
    return ordered


def _check_layout(tensors: Mapping[str, Tensor], base: int) -> int:
    """Where the tensors end. Raises ValueError unless each follows the one before and is as long as its type and shape
    say.
    """
    end = base
    for name, tensor in tensors.items():
        if not all(type(number) is int and number >= 0 for number in (*tensor.shape, tensor.start, tensor.end)):
            raise ValueError(f"tensor {name} has a shape or a place that is no whole number")
        if tensor.start != end or tensor.end < end:
            raise ValueError(f"tensor {name} lies at bytes {tensor.start} to {tensor.end}, and should start at {end}")
        if tensor.dtype in BITS and tensor.nbytes * 8 != tensor.elements * BITS[tensor.dtype]:
            raise ValueError(f"tensor {name}: {tensor.dtype} {list(tensor.shape)} is not {tensor.nbytes} bytes")
        end = tensor.end
    return end


def _check_index(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    index = folder / INDEX
    if not index.exists():
        return
    try:
        promised = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is not a readable index of a checkpoint: {error!r}.") from error
    for name, file in promised.items():
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != ".safetensors":
            raise UserError(
                f"{index} promises tensor {name} in {file!r}, which is no safetensors file of its own folder."
            )
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{folder}: {INDEX} promises tensor {name} in {file}, and it is not there.")
    if more := sorted(set(tensors) - set(promised)):
        file = tensors[more[0]].file
        raise UserError(
            f"{file} holds tensor {more[0]}, which {INDEX} does not know. Remove what does not belong here."
        )


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
