"""Ctrl-C: the first ends a run in order, the second at once."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import psutil

GRACE_S = 9  # that ending in order may take; servers are given 5 s to end by themselves
STATUS = 130  # of a command that was interrupted


@contextmanager
def interruptible() -> Iterator[None]:
    """In here the first Ctrl-C (or SIGTERM) is a KeyboardInterrupt, so that everything ends what it has started; after
    `GRACE_S`, or at the second, all processes that we started are killed and this one ends with status 130.

    What comes after leaving, up to the end of the process, belongs to the grace.
    """
    seen: list[int] = []

    def interrupted(number: int, frame: FrameType | None) -> None:
        if seen:
            end_at_once()
        seen.append(number)
        last = threading.Timer(GRACE_S, end_at_once)
        last.daemon = True
        last.start()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if not seen:
            for number, handler in before.items():
                signal.signal(number, handler)


def leave(status: int) -> NoReturn:
    """End the process with this status. After Ctrl-C what is registered for the end is still done, but the interpreter
    is not taken apart, which takes seconds with the libraries that are loaded.
    """
    if status == STATUS:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def end_at_once() -> NoReturn:
    """Kill every process that we started, and end."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"ended at once. What is finished is kept.\n")
    os._exit(STATUS)
