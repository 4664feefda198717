"""Whether a model is calibrated as a whole or layer by layer: what fits into the memory that may be taken."""

from __future__ import annotations

import contextlib
import fcntl
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from harness.errors import StageError, UserError
from harness.loading import tensor_bytes
from harness.models import Model
from harness.roles import layer_index, width_field

if TYPE_CHECKING:
    from harness.parking import Parking

GIB = 2**30
PROCESS = 0.7 * GIB  # resident memory of a process that has PyTorch and transformers loaded, and computes nothing
KEPT = 0.4 * GIB  # what allocators and caches of kernels keep in the course of a pass; measured on a CPU
SHARE = 0.9  # of what is free, to be planned with


@dataclass(frozen=True)
class MaxMemory:
    """How much calibration may take, in GiB; None: what is free when it begins.

    ram: resident memory of the process. gpu: memory of each GPU that it sees.
    """

    ram: float | None = None
    gpu: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("ram", self.ram), ("gpu", self.gpu)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
                raise UserError(f"max_memory.{name}={value} is no number of GiB above 0. null takes what is free.")

    def ram_left(self) -> float:
        """Bytes that this process may still take."""
        free = SHARE * psutil.virtual_memory().available
        return free if self.ram is None else min(free, self.ram * GIB - psutil.Process().memory_info().rss)

    def gpus_left(self) -> list[float]:
        """The same of each GPU."""
        import torch

        if not torch.cuda.is_available():
            return []
        free = [SHARE * torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
        return free if self.gpu is None else [min(each, self.gpu * GIB) for each in free]


@dataclass(frozen=True)
class Need:
    """Bytes that a calibration pass takes.

    weights: of all parameters. layer: of the largest decoder layer. rest: of what is outside the layers. batch: of what
    is computed of a batch in a layer. hidden: of a batch's hidden states.
    """

    weights: float
    layer: float
    rest: float
    batch: float
    hidden: float

    @property
    def whole(self) -> float:
        """With all of the model in memory."""
        return self.weights + self.batch + 2 * self.hidden

    @property
    def one_layer(self) -> float:
        """With one layer at a time."""
        return self.rest + self.layer + self.batch + 2 * self.hidden + KEPT

    def on_each_of(self, gpus: int) -> float:
        """On each of so many GPUs, with all of the model on them. transformers shares it out evenly, does not split a
        layer, and places one only where there is room for the largest besides; and each computes.
        """
        return self.weights / gpus + max(self.layer, self.rest) + self.batch + 2 * self.hidden


def need(model: Model, dtype: str, tokens: int) -> Need:
    """Of a pass with so many tokens in a batch."""
    layers: dict[int, float] = {}
    for name in model.tensors:
        index = layer_index(name)
        layers[index] = layers.get(index, 0.0) + tensor_bytes(model, name, dtype)
    rest = layers.pop(-1, 0.0)
    channels = model.config["hidden_size"]
    width = model.config[width_field(model.config) or "hidden_size"]
    number = 4 if dtype == "float32" else max(2, model.bytes_of_a_number)
    # Of each token and each of its experts: the input, gate and up, their product, the output, and the output weighted.
    routed = tokens * max(1, model.top_k) * (4 * channels + 4 * width) * number
    return Need(
        sum(layers.values()) + rest, max(layers.values(), default=0.0), rest, routed, tokens * channels * number
    )


@dataclass(frozen=True)
class Parked:
    """Bytes of hidden states that may wait on the device, and in memory beside it."""

    device: float
    host: float

    def parking(self, folder: Path) -> Parking:
        from harness.parking import Parking

        return Parking(self.device, self.host, folder, (1 - SHARE) * psutil.virtual_memory().total)


@contextmanager
def taking_memory() -> Iterator[None]:
    """In here the processes of this machine look one after the other at what is free and take it: two that looked at
    once would both take the same.

    Whoever dies gives its turn back. Where files cannot be locked, as on some network disks, nobody waits.
    """
    with Path(__file__).open("rb") as here:  # any file that all of them have; it is not changed
        with contextlib.suppress(OSError):
            fcntl.flock(here, fcntl.LOCK_EX)
        yield


def parked(model: Model, dtype: str, tokens: int, allowed: MaxMemory) -> Parked | None:
    """None if the whole model fits; else the room for hidden states in a pass that goes layer by layer.

    Raises StageError if not even one layer fits.
    """
    needed, gpus, ram = need(model, dtype, tokens), allowed.gpus_left(), allowed.ram_left()
    several = gpus[:1] if model.compression is not None else gpus  # what is unpacked here is put on one
    if needed.on_each_of(len(several)) <= min(several) if gpus else needed.whole <= ram:
        return None
    left = (gpus[0] if gpus else ram) - needed.one_layer
    if left < 0:
        raise StageError(_too_little(model, needed, tokens, allowed, bool(gpus)))
    return Parked(left / 2, max(0.0, ram) / 2 if gpus else 0.0)  # the other half: what allocators keep


def _too_little(model: Model, needed: Need, tokens: int, allowed: MaxMemory, on_gpu: bool) -> str:
    where, given = ("gpu", allowed.gpu) if on_gpu else ("ram", allowed.ram)
    least = math.ceil((needed.one_layer + (0 if on_gpu else PROCESS)) / GIB * 10) / 10
    asked = f"max_memory.{where}={given}" if given is not None else f"The {'GPU memory' if on_gpu else 'memory'} free"
    return (
        f"{asked} does not hold one layer of {model.name}: calibration layer by layer takes about {least} GiB "
        f"({needed.rest / GIB:.1f} outside the layers, {needed.layer / GIB:.1f} the largest layer, "
        f"{needed.batch / GIB:.1f} for a batch of {tokens} tokens). Allow that much, or set a smaller "
        "calibration.batch_size."
    )
