"""Fingerprints of a model's files. Large ones are read once on a machine, and again when the system says that they have
changed: to read a terabyte takes an hour, and every command and every process of a sweep asks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from harness.inventory import Fingerprint, read
from harness.store import say

LARGE = 2**26  # bytes of a file that is worth remembering
SETTLED_NS = 2 * 10**9  # since a file's last change: within a clock's tick another change would not be seen
SAY_S = 60.0
SCHEMA = 1  # raise it when `harness.inventory.read` finds something else


def of_files(files: Iterable[Path], of: str) -> dict[str, Fingerprint]:
    """What is known of each file, or found by reading it, by its name. of: whose they are, for a line where reading
    takes long. Raises UserError for a safetensors file that is cut short or not readable.
    """
    files = list(files)
    found = {file: known for file in files if (known := _remembered(file)) is not None}
    new = [file for file in files if file not in found]
    left = sum(file.stat().st_size for file in new)
    if left > 2**30:
        say("read", of, f"{left / 2**30:,.1f} GiB are read once, to know them again")
    said = time.monotonic()
    readers = ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1)))
    try:
        reading = {readers.submit(_read, file): file for file in new}
        for done in as_completed(reading):
            found[reading[done]] = done.result()
            left -= reading[done].stat().st_size
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                say("read", of, f"{left / 2**30:,.1f} GiB left")
    finally:  # after Ctrl-C, or a file that is refused, nobody waits for the others
        readers.shutdown(wait=False, cancel_futures=True)
    return {file.name: found[file] for file in files}


def _read(file: Path) -> Fingerprint:
    before, now = file.stat(), time.time_ns()
    found = read(file)
    if before.st_size >= LARGE and now - before.st_ctime_ns > SETTLED_NS and _state(before) == _state(file.stat()):
        _remember(before, found)
    return found


def _state(about: os.stat_result) -> str:
    """By which a file is known to be what it was. No program can set the time of change (ctime) back."""
    state = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    return hashlib.sha256(json.dumps([SCHEMA, *state]).encode()).hexdigest()


def _place(about: os.stat_result) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "moe-compression-bench" / "fingerprints" / f"{_state(about)}.json"


def _remember(about: os.stat_result, found: Fingerprint) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # it is only quicker; a user without a home has no place for it
        place = _place(about)
        partial = place.with_suffix(f".{os.getpid()}")
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(asdict(found)))
        partial.replace(place)


def _remembered(file: Path) -> Fingerprint | None:
    with contextlib.suppress(OSError, RuntimeError, ValueError, TypeError):
        about = file.stat()
        return Fingerprint(**json.loads(_place(about).read_text())) if about.st_size >= LARGE else None
    return None
