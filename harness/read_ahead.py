"""The weights that are needed next are read from disk while the processor is busy with others."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

from harness.tensors import Tensor

PIECE = 8 * 2**20  # bytes read at a time


@contextmanager
def reading_ahead(tensors: Sequence[Tensor]) -> Iterator[None]:
    """In here a thread brings the bytes of these tensors into the system's file cache, as far as it comes.

    Nothing is kept: whoever reads them afterwards finds them there, or on disk. Where memory is short, which would
    push the bytes out again before they are used, it does nothing.
    """
    if 2 * sum(tensor.nbytes for tensor in tensors) > psutil.virtual_memory().available:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_read, args=(tensors, ended), name="read-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _read(tensors: Sequence[Tensor], ended: threading.Event) -> None:
    buffer = memoryview(bytearray(PIECE))
    for tensor in tensors:
        try:
            with tensor.file.open("rb", buffering=0) as file:
                for start in range(tensor.start, tensor.end, PIECE):
                    if ended.is_set():
                        return
                    os.preadv(file.fileno(), [buffer[: min(PIECE, tensor.end - start)]], start)
        except OSError:  # whoever needs the tensor meets it too, and says so
            return
