"""Hidden states that wait in front of a layer: where they were computed as far as there is room, the others in the
machine's memory, then on disk.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor

from harness.store import sync


@dataclass
class Parking:
    """The hidden states of so many batches, [B, T, H] each, of one size.

    device_bytes: how much may stay on the device. host_bytes: how much more in memory, if the device is another.
    folder: for the rest. spare: bytes of the machine's memory that are left to other processes, whatever they take
    meanwhile: where less is free, states go to disk.
    """

    device_bytes: float
    host_bytes: float
    folder: Path
    spare: float = 0.0
    parked: dict[int, Tensor] = field(default_factory=dict)
    away: dict[int, Tensor | Path] = field(default_factory=dict)

    def put(self, number: int, hidden: Tensor) -> None:
        """Take a batch's states. The tensor stays the one that its forward pass knows; its contents may go elsewhere
        until they are fetched.
        """
        self.parked[number] = hidden
        room = self.device_bytes - hidden.nbytes * (number + 1)
        is_elsewhere = hidden.device.type != "cpu"
        if room >= 0 and (is_elsewhere or self._is_free(0)):
            return
        if is_elsewhere and room + self.host_bytes >= 0 and self._is_free(hidden.nbytes):
            self.away[number] = hidden.cpu()
        else:
            file = self.folder / f"{number}.bin"
            write(hidden, file)
            self.away[number] = file
        release(hidden)

    def _is_free(self, nbytes: int) -> bool:
        return psutil.virtual_memory().available - nbytes >= self.spare

    def fetch(self, number: int) -> None:
        """Bring the contents of a batch's states back where they were. Nothing to do for those that stayed."""
        elsewhere = self.away.pop(number, None)
        if elsewhere is None:
            return
        hidden = self.parked[number]
        if isinstance(elsewhere, Tensor):
            hidden.data = elsewhere.to(hidden.device)
        else:
            hidden.data = read(elsewhere, hidden)
            elsewhere.unlink()

    def clear(self) -> None:
        """Forget all of them."""
        for elsewhere in self.away.values():
            if isinstance(elsewhere, Path):
                elsewhere.unlink(missing_ok=True)
        self.away.clear()
        self.parked.clear()


def release(tensor: Tensor) -> None:
    """Give the memory of a tensor's contents back; whoever reads it nevertheless finds NaN everywhere."""
    tensor.data = torch.full((1,), torch.nan, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def write(tensor: Tensor, file: Path) -> None:
    """The bytes of a tensor, whatever its type."""
    with file.open("wb") as opened:
        opened.write(_bytes(tensor))


def write_lasting(tensor: Tensor, file: Path) -> int:
    """The same, on the disk when this returns; their checksum."""
    write(tensor, file)
    sync(file)
    return zlib.crc32(_bytes(tensor))


def checksum(file: Path) -> int:
    """Of a file's bytes."""
    found = 0
    with file.open("rb") as opened:
        while part := opened.read(2**24):
            found = zlib.crc32(part, found)
    return found


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().data


def read(file: Path, like: Tensor) -> Tensor:
    """What `write` wrote of a tensor of the same shape, type and device."""
    found = torch.empty(like.shape, dtype=like.dtype)
    with file.open("rb") as opened:  # not unbuffered: that reads at most 2 GiB at once
        got = opened.readinto(found.view(torch.uint8).numpy().data)
    assert got == found.nbytes, f"{file} holds {got} bytes of {found.nbytes}"
    return found.to(like.device)
