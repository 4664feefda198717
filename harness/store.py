"""Where results live: content-addressed files, made once, never half-written.

The name of a file is a hash of everything that determined it, so "have I done this?" is "does the file exist?". That is
what makes a sweep resumable: the same command again finds what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock


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

    def once(self, kind: str, name: str, make: Callable[[Path], None]) -> Path:
        """The file or folder of this name, made if it is missing. Two processes that ask for it do the work once."""
        path = self.path(kind, name)
        if not path.exists():
            with self.locked(kind, name):
                if not path.exists():
                    self._put(path, path.with_name(f".partial-{name}"), make)  # a kill's leavings go with the next try
        return path

    def put(self, kind: str, name: str, make: Callable[[Path], None]) -> Path:
        """Write or replace: ``make`` fills a temporary path that takes the name's place in one rename."""
        path = self.path(kind, name)
        return self._put(path, path.with_name(f".{os.getpid()}-{name}"), make)

    def _put(self, path: Path, temporary: Path, make: Callable[[Path], None]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        try:
            make(temporary)
            _sync(temporary)
            if temporary.is_dir():
                remove(path)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            remove(temporary)
        return path

    @contextmanager
    def workspace(self, name: str) -> Iterator[Path]:
        """An empty folder to work in, gone afterwards; what a kill leaves goes with the next try."""
        path = self.path("work", name)
        remove(path)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            remove(path)

    @contextmanager
    def locked(self, kind: str, name: str) -> Iterator[None]:
        """Hold this name against other processes; the lock goes with the process that holds it."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{kind}-{name}.lock"):
            yield

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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there. A folder loses its name first: half of it is never found under it."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_name(f".{os.getpid()}-doomed-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def say(stage: str, name: str, what: str) -> None:
    """One progress line per stage, on standard error: standard output is for tables."""
    print(f"{stage:<10} {name:<44} {what}", file=sys.stderr, flush=True)
