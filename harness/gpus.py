"""The GPUs that this process may use, as the driver tells them: PyTorch would take memory on each to know."""

from __future__ import annotations

import os
import shutil
import subprocess


def visible() -> list[str]:
    """Their names, as CUDA_VISIBLE_DEVICES has them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    return [index for (index,) in _asked("index")]


def memory() -> list[tuple[int, int]]:
    """Bytes of each that are free, and in all."""
    names = visible()
    found = _asked("memory.free,memory.total", "--id=" + ",".join(names)) if names else []
    return [(int(free) * 2**20, int(total) * 2**20) for free, total in found]


def _asked(fields: str, *which: str) -> list[list[str]]:
    """The driver's answer, a row for each GPU; none where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", *which]
    found = subprocess.run(command, capture_output=True, text=True)
    return [line.split(", ") for line in found.stdout.splitlines()] if found.returncode == 0 else []
