"""What lies in a checkpoint folder: whose files they are, whether their bytes are what was written, and all finite.

safetensors has no checksums, and engines load many damaged files without a word. So every checkpoint that is written
here gets ``checksums.json`` beside its weights: the SHA-256 of each file that determines the model, and the CRC-32 of
each tensor, which says which one a wrong byte is in. Files of the Hugging Face hub's cache are called by their own
checksums, and are held to them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.tensors import CHECKSUMS, read_header

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "chat_template*")
DETERMINING = ("config.json", "*.safetensors", *TOKENIZER)  # the files that make a model what it is
BESIDES = ("generation_config.json", "*.safetensors.index.json", "*.py")  # and those that loaders read as well

BLOCK = 1 << 22  # bytes read at once
# The bits that a value which is not finite has all set, by the type's name in safetensors: those of the exponent, or
# (F8_E4M3 and F8_E8M0, which know no infinity) of the one pattern that is no number. Other types are always finite.
NOT_FINITE: dict[str, tuple[str, int]] = {  # as an integer of which size they are read, and the bits
    "F64": ("<u8", 0x7FF0 << 48),
    "F32": ("<u4", 0x7F80 << 16),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
    "F8_E8M0": ("u1", 0xFF),
}


@dataclass(frozen=True)
class Fingerprint:
    """What one reading of a file found. sha256: of the whole. crc32: of each tensor, by name, hexadecimal.
    not_finite: the first tensor that holds NaN or infinity.
    """

    sha256: str
    crc32: Mapping[str, str] = field(default_factory=dict)
    not_finite: str | None = None


def files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Files of the folder that match, each once, by name."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def read(file: Path, each_tensor: bool = False) -> Fingerprint:
    """Read a file once, in small memory: its checksum and, of a safetensors file, whether all its values are finite.

    each_tensor: the tensors' checksums as well. Raises UserError if a safetensors file is cut short or not readable.
    """
    whole = hashlib.sha256()
    if file.suffix != ".safetensors":
        for block in _blocks(file, 0, file.stat().st_size):
            whole.update(block)
        return Fingerprint(whole.hexdigest())
    tensors = read_header(file)  # in the order of their bytes, without gaps
    sums: dict[str, str] = {}
    broken: str | None = None
    for block in _blocks(file, 0, min((tensor.start for tensor in tensors.values()), default=file.stat().st_size)):
        whole.update(block)
    for name, tensor in tensors.items():
        crc, finite = 0, True
        for block in _blocks(file, tensor.start, tensor.end):
            whole.update(block)
            crc = zlib.crc32(block, crc) if each_tensor else 0
            finite = finite and is_finite(block, tensor.dtype)
        sums |= {name: f"{crc:08x}"} if each_tensor else {}
        broken = broken or (None if finite else name)
    return Fingerprint(whole.hexdigest(), sums, broken)


def is_finite(data: bytes, dtype: str) -> bool:
    """Whether raw values of a type of safetensors are all finite. No type is decoded: exponents are compared."""
    if dtype not in NOT_FINITE:
        return True
    kind, number = NOT_FINITE[dtype]
    values = np.frombuffer(data, kind)
    bits = values.dtype.type(number)
    return not bool(((values & bits) == bits).any())


def write_checksums(folder: Path) -> None:
    """Note beside a finished checkpoint what its files are, in one rename. Raises UserError where a value is not
    finite: such a checkpoint is never called finished.
    """
    found = {file.name: read(file, each_tensor=True) for file in files(folder, (*DETERMINING, *BESIDES))}
    for name, fingerprint in found.items():
        check_finite(folder / name, fingerprint)
    document = {
        "sha256": {name: fingerprint.sha256 for name, fingerprint in found.items()},
        "crc32": {name: dict(fingerprint.crc32) for name, fingerprint in found.items() if fingerprint.crc32},
    }
    partial = folder / f".partial-{CHECKSUMS}"
    with partial.open("w") as stream:
        json.dump(document, stream, indent=0)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(folder / CHECKSUMS)


def check_unchanged(folder: Path) -> None:
    """Raise UserError unless every file that determines a checkpoint of ours is there and is what it was when it was
    finished, and there is no other; the message names file and tensor. One that was never finished is refused too.
    """
    if not (folder / CHECKSUMS).exists():
        raise UserError(
            f"{folder} has no {CHECKSUMS}: it was not finished, or not by this version, and cannot be told from a "
            "damaged one. Delete the folder; it is made again."
        )
    check_known(folder, {file.name: read(file) for file in files(folder, (*DETERMINING, *BESIDES))}, whole=True)


def check_known(folder: Path, found: Mapping[str, Fingerprint], whole: bool = False) -> None:
    """Raise UserError if a file is not what ``checksums.json`` beside it or the hub's cache says, or holds values that
    are not finite. whole: ``found`` is every file that the folder's checksums speak of.
    """
    noted = _noted(folder)
    if noted and (lost := sorted(set(noted) - set(found) if whole else _lost(folder, noted))):
        raise UserError(f"{folder / lost[0]} is missing: {CHECKSUMS} beside it promises it.")
    if whole and (more := sorted(set(found) - set(noted))):
        raise UserError(f"{folder / more[0]} is left over: it was not there when {CHECKSUMS} was written.")
    for name, fingerprint in found.items():
        file = folder / name
        if name in noted and fingerprint.sha256 != noted[name]:
            raise UserError(
                f"{file} is damaged or was changed: its SHA-256 is not what {CHECKSUMS} says ({_where(file)}). Fetch "
                f"or make it again; if it was changed on purpose, delete {CHECKSUMS}."
            )
        _check_hub(file, fingerprint)
        check_finite(file, fingerprint)


def check_finite(file: Path, fingerprint: Fingerprint) -> None:
    """Raise UserError for a file that holds NaN or infinity: served, it may look perfect."""
    if fingerprint.not_finite is not None:
        raise UserError(f"{file}: tensor {fingerprint.not_finite} holds values that are not finite (NaN or infinite).")


def _noted(folder: Path) -> dict[str, str]:
    """SHA-256 by file name, as the checksums beside the files have it; none where there are none."""
    if not (folder / CHECKSUMS).exists():
        return {}
    try:
        noted = json.loads((folder / CHECKSUMS).read_text())["sha256"]
        return {str(name): str(value) for name, value in noted.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / CHECKSUMS} is not readable: {error!r}. Make the checkpoint again.") from error


def _lost(folder: Path, noted: Mapping[str, str]) -> set[str]:
    return {name for name in noted if Path(name).name != name or not (folder / name).is_file()}


def _where(file: Path) -> str:
    """Which tensors of a file are not what they were; for a message."""
    try:
        before = json.loads((file.parent / CHECKSUMS).read_text())["crc32"].get(file.name, {})
        now = read(file, each_tensor=True).crc32
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return "it is not known where"
    wrong = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if not before:
        return "it holds no tensors"
    more = f" and {len(wrong) - 3} more" if wrong[3:] else ""
    return f"tensor {', '.join(wrong[:3])}{more}" if wrong else "in its header"


def _check_hub(file: Path, fingerprint: Fingerprint) -> None:
    """Hold a file of the hub's cache to its blob's name: a SHA-256 for large files, git's own hash for small ones."""
    if file.parent.parent.name != "snapshots" or not file.is_symlink():
        return
    name = file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", name):
        is_whole = fingerprint.sha256 == name
    elif re.fullmatch(r"[0-9a-f]{40}", name):
        content = file.read_bytes()
        is_whole = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == name
    else:
        return
    if not is_whole:
        raise UserError(
            f"{file} is damaged: its bytes are not those that the hub gave it its name for. Delete {file.resolve()} "
            "and fetch the model again."
        )


def _blocks(file: Path, start: int, end: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(start)
        while start < end:
            block = stream.read(min(BLOCK, end - start))
            if not block:
                raise UserError(f"{file} became shorter while it was read.")
            start += len(block)
            yield block
