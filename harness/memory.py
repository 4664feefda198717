"""The most memory that a stage held at a time."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch


def forget_peak() -> None:
    """Start to watch anew. The kernel keeps one peak for the whole process."""
    with contextlib.suppress(OSError):  # no Linux, or a container that forbids it: then the peak so far stays in
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


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
