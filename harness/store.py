"""Where results live: content-addressed files, made once, never half-written.

The name of a file is a hash of everything that determined it, so "have I done this?" is "does the file exist?". That is
what makes a sweep resumable: the same command again finds what is there. Many processes may share a store, on one
machine or on several: each thing is made by one of them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import SoftFileLease, Timeout

from harness.errors import DiskFullError

LEASE_S = 120  # how long a holder of a name may say nothing before another takes over
RESERVE_BYTES = 2**20  # kept free for what is written after a stage: records, tables, locks


def key(**fields: Any) -> str:
    """Hash of JSON values: 16 hexadecimal digits. Put in only what determines the result."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """A folder of stage outputs: ``<root>/<kind>/<name>``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, name: str) -> Path:
        return self.root / kind / name

    def once(self, kind: str, name: str, make: Callable[[Path], None], nbytes: float = 0) -> Path:
        """The file or folder of this name, made if it is missing. Two processes that ask for it do the work once.

        nbytes: of what will be made, where that is known. Raises DiskFullError, before the work if it cannot fit.
        """
        path = self.path(kind, name)
        if not path.exists():
            with self.locked(kind, name):
                if not path.exists():
                    self.put(kind, name, make, nbytes)
        return path

    def put(self, kind: str, name: str, make: Callable[[Path], None], nbytes: float = 0) -> Path:
        """Write or replace: ``make`` fills a temporary path that takes the name's place in one rename.

        nbytes: of what will be made, where that is known. Raises DiskFullError, before the work if it cannot fit.
        """
        path = self.path(kind, name)
        with self._writing(kind, nbytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{_own()}{name}")
            remove(temporary)
            try:
                make(temporary)
                sync(temporary)
                if temporary.is_dir():
                    remove(path)
                temporary.replace(path)
                sync(path.parent)
            finally:
                remove(temporary)
        return path

    @contextmanager
    def _writing(self, kind: str, nbytes: float) -> Iterator[None]:
        """Where something is written that takes so many bytes: a full disk is said with what was needed."""
        if nbytes and self.free() < nbytes + RESERVE_BYTES:
            raise DiskFullError(self._full(kind, nbytes))
        try:
            yield
        except Exception as problem:
            # Libraries turn the error of the system into one of their own that only quotes it.
            if getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(problem):
                raise DiskFullError(self._full(kind, nbytes)) from problem
            raise

    def _full(self, kind: str, nbytes: float) -> str:
        needed = f"{_size(nbytes)} and {_size(RESERVE_BYTES)} of reserve" if nbytes else "more than that"
        return (
            f"The disk is full: {kind} in {self.root} needs {needed}, and {_size(self.free())} are free. Nothing "
            "half-written is kept; free some space and give the same command again."
        )

    def free(self) -> int:
        """Bytes that can still be written."""
        existing = next(folder for folder in (self.root, *self.root.absolute().parents) if folder.exists())
        return shutil.disk_usage(existing).free

    @contextmanager
    def workspace(self, name: str) -> Iterator[Path]:
        """An empty folder to work in, gone afterwards."""
        path = self.path("work", f"{_own()}{name}")
        with self._writing("work", 0):
            remove(path)
            path.mkdir(parents=True)
            try:
                yield path
            finally:
                remove(path)

    @contextmanager
    def locked(self, kind: str, name: str) -> Iterator[None]:
        """Hold this name against other processes, waiting for the one that holds it.

        The holder gives signs of life. One that is gone is replaced: at once if it was killed on this machine, else
        after `LEASE_S`. One that was merely stopped for so long goes on beside its replacement: both make the same
        thing, the later rename stands.
        """
        with self._lease(kind, name):
            yield

    @contextmanager
    def claimed(self, kind: str, name: str) -> Iterator[bool]:
        """Hold this name if nobody else does; whether it is held. That a holder on another machine is gone only waiting
        shows (`locked`).
        """
        try:
            with self._lease(kind, name).acquire(blocking=False):
                yield True
        except Timeout:
            yield False

    def held(self, kind: str) -> int:
        """How many names of this kind are held, by processes that have given signs of life."""
        now = time.time()
        moments = []
        for lock in self.root.glob(f"locks/{kind}-*.lock"):
            with contextlib.suppress(OSError):  # given back meanwhile
                moments.append(lock.stat().st_mtime)
        return sum(now - moment < LEASE_S for moment in moments)

    def _lease(self, kind: str, name: str) -> SoftFileLease:
        folder = self.root / "locks"
        with self._writing("locks", 0):
            folder.mkdir(parents=True, exist_ok=True)
        return SoftFileLease(folder / f"{kind}-{name}.lock", lease_duration=LEASE_S)

    def sweep_out(self) -> None:
        """Remove what processes of this machine that no longer run have left half-written."""
        for path in self.root.glob(f"*/.{_host()}-*"):
            if is_gone(path.name.split("-")[1]):
                remove(path)
        for path in self.root.glob("locks/*.lock.*"):
            if _is_stranded(path):
                remove(path)

    def write_json(self, kind: str, name: str, document: dict[str, Any]) -> Path:
        """Write or replace a JSON document, atomically. Values that are not finite are refused."""
        return self.write_text(kind, name, json.dumps(document, indent=1, allow_nan=False))

    def write_text(self, kind: str, name: str, text: str) -> Path:
        """Write or replace a text file, atomically."""

        def make(path: Path) -> None:
            path.write_text(text)

        return self.put(kind, name, make)

    def read_json(self, kind: str, name: str) -> dict[str, Any] | None:
        """The document, or None if there is none."""
        path = self.path(kind, name)
        return json.loads(path.read_text()) if path.exists() else None


def _own() -> str:
    """How names of temporary things of this process begin; hidden, so that nobody takes them for results."""
    return f".{_host()}-{os.getpid()}-"


def is_gone(pid: str) -> bool:
    """Whether this is the number of a process, and none of that number runs on this machine."""
    return pid.isdigit() and not psutil.pid_exists(int(pid))


def _is_stranded(marker: Path) -> bool:
    """Whether a lock's marker was set aside by a process that was killed while it took the lock over from another that
    was killed: ``<lock>.break.<pid>.<token>``, and both ran here. filelock finds most of these again, not all.
    """
    found = re.search(r"\.lock\.(?:break|restore)\.(\d+)\.", marker.name)
    try:
        noted = dict(line.split("=", 1) for line in marker.read_text().splitlines() if "=" in line)
    except OSError:  # somebody was faster
        return False
    pids = [found[1] if found else "", noted.get("pid", "")]
    here = noted.get("host", "").startswith(socket.gethostname())
    return here and all(map(is_gone, pids))


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there. A folder loses its name first: half of it is never found under it."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_name(f"{_own()}doomed-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def say(stage: str, name: str, what: str) -> None:
    """One progress line per stage, on standard error: standard output is for tables."""
    print(f"{stage:<10} {name:<44} {what}", file=sys.stderr, flush=True)
