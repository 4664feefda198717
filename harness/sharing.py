"""Forward passes that wait side by side: what all of them hold, such as masks and rotary tables, is in memory once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from harness.errors import StageError

SMALL = 1024  # bytes of a tensor that is not worth looking at


class Sharing:
    """Tensors of one waiting pass, whose equals in others take the same memory."""

    def __init__(self) -> None:
        self._known: dict[Any, list[Tensor]] = {}
        self._shared: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by id; and how often each was written to

    def look(self, frame: FrameType | None, hidden: Tensor, is_first: bool) -> None:
        """Take what a pass that waits in this frame holds, but for its hidden states: of the first pass, to be shared;
        of another, to share it.
        """
        held = (tensor for tensor in _held(frame) if tensor is not hidden)
        found = [tensor for tensor in held if tensor.untyped_storage().nbytes() >= SMALL]  # not what was released
        if is_first:
            self._known = {}
            for tensor in found:
                self._known.setdefault(_kind(tensor), []).append(tensor)
            return
        for tensor in found:
            self._share(tensor)

    def _share(self, tensor: Tensor) -> None:
        alike = self._known.get(_kind(tensor), [])
        if any(known.data_ptr() == tensor.data_ptr() for known in alike):
            return
        for known in alike:
            if torch.equal(known, tensor):
                tensor.data = known.data
                self._watch(known, tensor)
                return

    def _watch(self, *shared: Tensor) -> None:
        for one in shared:
            seen = self._shared.get(id(one))
            if seen is None or seen[0]() is not one:
                self._shared[id(one)] = (weakref.ref(one), one._version)

    def check(self, model: str) -> None:
        """Raise StageError if a pass has written to what others share with it: it would be wrong in theirs."""
        self._shared = {number: seen for number, seen in self._shared.items() if seen[0]() is not None}
        if any((tensor := one()) is not None and tensor._version != version for one, version in self._shared.values()):
            raise StageError(
                f"{model} changes in place what it hands from layer to layer. Such a model cannot be calibrated layer "
                "by layer, only whole."
            )


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _held(frame: FrameType | None) -> Iterator[Tensor]:
    """The tensors in the local variables of a frame and of those that called it."""
    while frame is not None:
        yield from _tensors(frame.f_locals.values())
        frame = frame.f_back


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
            if value._base is not None:  # a view keeps what it was made of
                yield value._base
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
