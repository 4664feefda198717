"""Where generated programs run: behind namespaces that bubblewrap makes, or ``unshare`` where there is no bubblewrap.

Every run of a program gets its own sandbox: a file system that holds the system's libraries, Python and nothing else,
all read-only, with a scratch space in memory that goes with it; no network; no process but its own, and all of them
gone when it ends; an environment of a few constants; a user that owns nothing, also when the harness runs as root;
limits on memory, threads, file size and time. The verdict is the same in either form. ``tasks.program`` and
``tasks.confinement`` are the inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from tasks import plain_values
from tasks.confinement import CLONE_NEWUSER, DEVICES, TASKS, die_with_parent, libc
from tasks.program import DEFINED, HEADER, RAISED, READY, REQUEST, RETURNED, Limits

FORMS = ("bwrap", "unshare")
NO_SANDBOX = "none"  # the limits, an empty environment and no further processes, but this machine's files and network

USERS = 256  # of programs that run at a time: one each, so that none counts another's threads as its own
HIGHEST_USER = 2_000_000_000
NOBODY = 65534

FOLDER = Path(__file__).resolve().parent
OWN_FILES = ("program.py", "confinement.py", "plain_values.py")
INSIDE = "/harness"  # where they are seen
SYSTEM = (*("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64"), *("/etc/ld.so.cache", "/etc/alternatives"))
NAMESPACES = ("net", "pid", "ipc", "uts")
START_SECONDS = 60
END_SECONDS = 1  # between a program's end and that of all else, when that is why it ended


class SandboxError(Exception):
    """The sandbox did not start, or does not isolate; the message is its own."""


@dataclass(frozen=True)
class Job:
    """What a program is run on.

    inputs: argument lists, each as ``plain_values`` writes it. time_limits: seconds, one per input. as_set: what it
    returns is turned into a set.
    """

    code: str
    entry_point: str
    inputs: list[str]
    time_limits: list[float]
    as_set: bool = False


@dataclass(frozen=True)
class Sandbox:
    """A way to run programs. form: of `FORMS`, or `NO_SANDBOX`. requests: to the process inside that runs them.
    errors: what it and its children had to say.
    """

    form: str
    requests: socket.socket
    errors: IO[bytes]

    @contextlib.contextmanager
    def running(self, job: Job, slot: int) -> Iterator[tuple[int, int]]:
        """A program at work: a descriptor to read its frames from, after READY, and one for replies. Nothing of it is
        left afterwards.

        slot: a number of its own among the programs that run at a time. Raises SandboxError if it does not start.
        """
        job_reader, job_writer = os.pipe()
        frames, frames_writer = os.pipe()
        wanted_reader, wanted = os.pipe()
        theirs = [job_reader, frames_writer, wanted_reader]
        with self._folder() as folder:
            try:
                socket.send_fds(self.requests, [REQUEST.pack(slot % USERS)], theirs)
            except OSError as error:
                raise SandboxError(f"the sandbox ended: {self._words()}") from error
            finally:
                for descriptor in theirs:
                    os.close(descriptor)
            try:
                text = json.dumps({**asdict(job), "folder": folder}).encode()
                with contextlib.suppress(BrokenPipeError), open(job_writer, "wb", closefd=False) as file:
                    file.write(HEADER.pack(READY, len(text)) + text)
                if _read(frames, HEADER.size) != HEADER.pack(READY, 0):
                    self.check()
                    raise SandboxError(f"a program was not started: {self._words()}")
                yield frames, job_writer
            finally:
                os.close(wanted)
                os.close(job_writer)
                while _read(frames, 1 << 20):  # until every process that could write answers is gone
                    pass
                os.close(frames)

    def try_out(self) -> None:
        """Raise SandboxError unless a program runs, and finds itself isolated."""
        with tempfile.NamedTemporaryFile(prefix="planted-") as planted:
            job = Job(TRIAL, "trial", [plain_values.dumps([planted.name]).decode()], [START_SECONDS])
            defined, kind, answer = self._first_answer(job)
        if (defined, kind) != (DEFINED, RETURNED):
            raise SandboxError("a trial program did not come to its end")
        if leaks := plain_values.loads(answer):
            raise SandboxError(f"a trial program is not isolated: {', '.join(leaks)}")

    def _first_answer(self, job: Job) -> tuple[bytes, bytes, bytes]:
        """Kinds of the answer to the definition and to the first input, and what that returned."""
        nothing = HEADER.pack(RAISED, 0)
        with self.running(job, 0) as (frames, _), open(frames, "rb", closefd=False) as file:
            defined, _ = HEADER.unpack(file.read(HEADER.size) or nothing)
            kind, length = HEADER.unpack(file.read(HEADER.size) or nothing)
            return defined, kind, file.read(length)

    def _folder(self) -> contextlib.AbstractContextManager[str]:
        """Where the program may write: without a sandbox a folder of its own, that is not limited in size."""
        if self.form == NO_SANDBOX:
            return tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True)
        return contextlib.nullcontext(scratch())

    def check(self) -> None:
        """Raise SandboxError if it has ended, so that what became of a program says nothing about the program."""
        if select.select([self.requests], [], [], END_SECONDS)[0]:
            raise SandboxError(f"the sandbox ended: {self._words()}")

    def _words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"


def start(form: str, memory: int) -> Sandbox:
    """A sandbox that ends with this process. memory: bytes of address space. Raises SandboxError."""
    first_user = None if form == NO_SANDBOX else _first_user()
    users = None if first_user is None else _user_namespace(first_user)
    requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    errors = os.fdopen(os.memfd_create("errors"), "w+b")
    sandbox = Sandbox(form, requests, errors)
    command = {"bwrap": _bwrap, "unshare": _unshare, NO_SANDBOX: _nothing}[form](users)
    limits = Limits(memory, TASKS, first_user, None if form == NO_SANDBOX else scratch())
    if (
        limits.scratch is not None and first_user is None
    ):  # programs share one user with each other and what surrounds them
        limits = replace(limits, tasks=TASKS + 4 * len(os.sched_getaffinity(0)), first_user=NOBODY)
    try:
        subprocess.Popen(
            [*command, *_python(form, limits)],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment(scratch()),
            pass_fds=[] if users is None else [users],
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    except OSError as error:
        raise SandboxError(str(error)) from error
    theirs.close()
    if not select.select([requests], [], [], START_SECONDS)[0] or requests.recv(1) != READY:
        raise SandboxError(sandbox._words())
    return sandbox


TRIAL = """
import os, socket

def trial(planted):
    leaks = []
    if 0 in os.getresuid():
        leaks.append("it is root")
    if len(socket.if_nameindex()) > 1:
        leaks.append("it has a network")
    if sum(name.isdigit() for name in os.listdir("/proc")) > 3:
        leaks.append("it sees other processes")
    if os.path.exists(planted):
        leaks.append("it sees other files")
    return leaks
"""


def environment(folder: str) -> dict[str, str]:
    """All that programs and the judge see of ours. One thread each, so that address space means memory."""
    return {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "HOME": folder,
        "TMPDIR": folder,
        "XDG_CACHE_HOME": folder,
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


@cache
def visible() -> list[str]:
    """Files and folders of this machine that programs may read."""
    folders = [*SYSTEM, str(Path(sys.base_prefix).resolve()), *_packages()]
    found: list[str] = []
    for folder in filter(os.path.lexists, folders):
        if not any(Path(folder).is_relative_to(other) for other in found if not Path(other).is_symlink()):
            found.append(folder)
    return found


@cache
def scratch() -> str:
    """Where programs may write: what is mounted there must not hide Python."""
    return "/scratch" if any(Path(folder).is_relative_to("/tmp") for folder in visible()) else "/tmp"


def _own_files() -> list[tuple[str, str]]:
    """The parts of the harness that run inside, and where they are seen."""
    return [(str(FOLDER / name), f"{INSIDE}/tasks/{name}") for name in OWN_FILES]


def _packages() -> list[str]:
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))


def _nothing(users: int | None) -> list[str]:
    return []


def _bwrap(users: int | None) -> list[str]:
    own = ("--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY))
    command = ["bwrap", *(own if users is None else ("--userns", str(users))), "--cap-drop", "ALL"]
    for capability in ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID", "CAP_KILL"):  # to confine each program further
        command += ["--cap-add", capability]
    command += [f"--unshare-{namespace}" for namespace in NAMESPACES]
    command += ["--die-with-parent", "--new-session", "--proc", "/proc", "--tmpfs", "/dev"]
    files = [*((folder, folder) for folder in visible()), *_own_files()]
    parents = {str(parent) for _, target in files for parent in Path(target).parents if parent != Path("/")}
    for parent in sorted(parents.difference(visible())):
        command += ["--dir", parent]  # which bubblewrap would make for its own user alone
    for source, target in files:
        link = Path(source).is_symlink()
        command += ["--symlink", str(Path(source).readlink()), target] if link else ["--ro-bind", source, target]
    for device in DEVICES:
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    command += ["--symlink", scratch(), "/dev/shm", "--remount-ro", "/dev", "--dir", scratch(), "--remount-ro", "/"]
    return [*command, "--"]


def _unshare(users: int | None) -> list[str]:
    own = ("unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}", "--keep-caps")
    others = ("nsenter", f"--user=/proc/self/fd/{users}", "--preserve-credentials", "--", "unshare")
    command = [*(own if users is None else others), *(f"--{namespace}" for namespace in NAMESPACES)]
    return [*command, "--mount", "--fork", "--kill-child", "--"]


def _python(form: str, limits: Limits) -> list[str]:
    """The interpreter itself, not the environment's: nothing runs at its start that a package may have put there."""
    evalplus = find_spec("evalplus")
    assert evalplus is not None and evalplus.origin is not None
    guards = str(Path(evalplus.origin).parent / "eval" / "utils.py")
    arguments = json.dumps([guards, visible() if form == "unshare" else None, asdict(limits)])
    root = INSIDE if form == "bwrap" else str(FOLDER.parent)
    start = (
        f"import json, sys; sys.path.insert(0, {root!r}); sys.path += {_packages()!r}; "
        "from tasks.program import main; main(*json.loads(sys.argv[1]))"
    )
    return [str(Path(sys.executable).resolve()), "-S", "-s", "-P", "-c", start, arguments]


def _read(descriptor: int, size: int) -> bytes:
    """What comes within `START_SECONDS`; nothing at the end."""
    return os.read(descriptor, size) if select.select([descriptor], [], [], START_SECONDS)[0] else b""


def _first_user() -> int | None:
    """The first of `USERS` users that exist and (unless someone chose such numbers) own nothing; None if not root."""
    if os.geteuid() != 0:
        return None
    ranges = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    ends = [start + count - 1 for start, _, count in ranges if count > 2 * USERS]
    return min(max(ends) - USERS, HIGHEST_USER) if ends else None


def _user_namespace(first: int) -> int:
    """A user namespace in which root is root, and nobody else exists but `USERS` users from ``first`` on. Raises
    SandboxError.
    """
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(told, bytes([libc.unshare(CLONE_NEWUSER) and ctypes.get_errno()]))
        signal.pause()
    try:
        if number := os.read(ready, 1)[0]:
            raise OSError(number, os.strerror(number))
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child}/{name}").write_text(f"0 0 1\n{first} {first} {USERS}\n")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    except OSError as error:
        raise SandboxError(f"no user namespace: {error}") from error
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(told)
