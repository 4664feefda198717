"""How much memory is free, and the most that a stage held at a time."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

import psutil
import torch


def forget_peak() -> None:
    """Start to watch anew. The kernel keeps one peak for the whole process."""
    with contextlib.suppress(OSError):  # no Linux, or a container that forbids it: then the peak so far stays in
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def free() -> int:
    """Bytes that weights may still take, on all GPUs and beside them."""
    found = psutil.virtual_memory().available
    if torch.cuda.is_available():
        found += sum(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))
    return int(found)


def give_back() -> None:
    """Return memory that was freed to the system. The C library keeps what came in many small pieces, as the experts of
    a file do, and takes more where the pieces do not fit together.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc: others do so by themselves
        ctypes.CDLL(None).malloc_trim(0)


def peak() -> dict[str, int]:
    """Bytes since `forget_peak`: ``ram``, this process's resident memory (where the system says), and ``gpu``, what
    torch held on all GPUs (where there are any).
    """
    found: dict[str, int] = {}
    status = Path("/proc/self/status")
    if status.exists() and (kilobytes := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        found["ram"] = 1024 * int(kilobytes[1])
    if torch.cuda.is_available():
        found["gpu"] = sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    return found
