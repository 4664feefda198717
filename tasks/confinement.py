"""The inside of the sandbox: from a process in new namespaces to one that can only compute.

Runs in the processes that run generated programs (``tasks.program``), before they do. What is given up is given up for
good: files (`enter_root`, where bubblewrap has not done it), other processes (`leave_namespaces`, `mount_own`),
privileges (`become`), memory and threads beyond a limit (`limit_resources`) and the system calls that start, inspect or
outlive processes (`forbid_calls`).
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRATCH_BYTES = 256 * 2**20
FILE_BYTES = SCRATCH_BYTES
TASKS = 64  # threads of a program: it cannot start processes
DEVICES = ("null", "zero", "full", "random", "urandom")

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x8000000, 0x10000000, 0x20000000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 22, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL, SECCOMP_MODE_FILTER = 4, 2
CAPABILITY_VERSION_3 = 0x20080522
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
MNT_DETACH = 2

# Numbers on x86_64 and aarch64 of calls that fail with EPERM. Without them no process is left behind, memory is what
# one process may map, and no new user namespace gives privileges. clone may start threads, and nothing else.
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
NONE = -1
CLONE, CLONE3 = (56, 220), (435, 435)
FORBIDDEN = {
    **{"fork": (57, NONE), "vfork": (58, NONE), "execve": (59, 221), "execveat": (322, 281)},
    **{"unshare": (272, 97), "setns": (308, 268), "ptrace": (101, 117)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438)},
    **{"shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186)},
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425)},
}
CLONE_THREAD = 0x10000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of classic BPF
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM, ENOSYS = 1, 38

libc = ctypes.CDLL(None, use_errno=True)


def enter_root(visible: Sequence[str], scratch: str) -> None:
    """Leave the file system for one that holds these files and folders, and an empty one for scratch, all read-only;
    for ``unshare``, which gives new namespaces and nothing else. Needs Linux 5.12.
    """
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = "/dev/shm"  # any folder that holds none of the files: what is mounted here is seen from this namespace alone
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for source in map(Path, [*visible, *(f"/dev/{device}" for device in DEVICES)]):
        place = Path(f"{root}{source}")
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            place.symlink_to(source.readlink())
            continue
        place.mkdir() if source.is_dir() else place.touch()
        _mount(str(source), str(place), None, MS_BIND | MS_REC)
    for folder in ("/proc", "/old", scratch):
        Path(root + folder).mkdir()
    Path(root, "dev/shm").symlink_to(scratch)
    _mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV)
    _call(libc.pivot_root, root.encode(), f"{root}/old".encode())
    os.chdir("/")
    _call(libc.umount2, b"/old", MNT_DETACH)
    Path("/old").rmdir()
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    _call(libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes))


def leave_namespaces() -> None:
    """The next child is the first process of a new process namespace, and mounts are this process's own."""
    _call(libc.unshare, CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC)


def mount_own(scratch: str) -> None:
    """An empty, limited scratch space, and the processes of this namespace in /proc."""
    _mount("tmpfs", scratch, "tmpfs", MS_NOSUID | MS_NODEV, f"size={SCRATCH_BYTES},mode=1777")
    _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV)


def become(uid: int) -> None:
    """Give up every privilege, for good; where it is root that asks, be this user, who owns nothing."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _call(libc.prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _call(libc.capset, struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))


def limit_resources(memory: int, tasks: int) -> None:
    """memory: bytes of address space (EvalPlus's guard sets the same limit again). tasks: threads of the user."""
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NPROC, tasks),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def forbid_calls() -> None:
    """Install a seccomp filter against `FORBIDDEN`. Needs no privileges. Raises OSError where the kernel has none."""
    if platform.machine() not in ARCHITECTURES:
        raise OSError(f"no list of system calls for {platform.machine()}")
    _call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in _filter(platform.machine()))
    code = ctypes.create_string_buffer(program, len(program))
    pointer = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    _call(libc.prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, pointer, 0, 0)


def _filter(machine: str) -> list[tuple[int, int, int, int]]:
    """Instructions as (code, jump if true, jump if false, value), on ``struct seccomp_data``: nr at byte 0, arch at 4,
    the low half of the first argument at 16.
    """
    number, column = ARCHITECTURES[machine]
    listing = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, number), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if machine == "x86_64":  # the x32 calls, whose numbers have this bit
        listing += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, ERRNO | EPERM)]
    for numbers in FORBIDDEN.values():
        if numbers[column] != NONE:
            listing += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ERRNO | EPERM)]
    listing += [
        (EQUAL, 0, 1, CLONE3[column]),
        (RETURN, 0, 0, ERRNO | ENOSYS),
    ]  # then clone is tried, whose flags we see
    listing += [(EQUAL, 0, 3, CLONE[column]), (LOAD, 0, 0, 16)]
    listing += [(ANY_BIT, 1, 0, CLONE_THREAD), (RETURN, 0, 0, ERRNO | EPERM)]
    return [*listing, (RETURN, 0, 0, ALLOW)]


def die_with_parent() -> None:
    _call(libc.prctl, PR_SET_PDEATHSIG, 9, 0, 0, 0)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _call(libc.mount, *texts[:3], flags, texts[3])


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")
