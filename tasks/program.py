"""Run generated programs, inside the sandbox, and say what they returned.

One process is started in the sandbox and stays (`serve`); it loads what EvalPlus has loaded, and for every program it
forks. The child gets process and mount namespaces and a user of its own, gives up everything else, and runs the program
on the inputs of a test suite. So Python starts once, and no program meets what another left.

The child is the program's: nothing in it is worth reading or forging. It knows no expected output and gives no verdict;
it sends one answer per input, and whatever else it sends is judged as an answer. Time limits, guards and silenced
streams are EvalPlus's own (``evalplus.eval.utils``), in the order in which its ``unsafe_execute`` applies them.

Requests come over a socket, each with three descriptors: a pipe that brings the job, one for the answers, and one that
is closed when the program is to end. Job and answers are frames: a kind (one byte), the length of what follows (8
bytes), and JSON of the fields of ``tasks.sandbox.Job``, or a value (``tasks.plain_values``). After the digest of a long
value comes a reply (one byte): whether that is what was expected. If not, the value follows.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import multiprocessing.sharedctypes
import multiprocessing.synchronize  # noqa: F401
import os
import platform
import select
import shutil  # noqa: F401
import signal
import socket
import struct
import subprocess  # noqa: F401
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from tasks import confinement, plain_values

READY, DEFINED, RETURNED, RAISED, DIGEST = b"R", b"D", b"=", b"!", b"#"
EXPECTED, OTHER = b"+", b"-"  # replies to a digest
HEADER = struct.Struct("<cQ")
REQUEST = struct.Struct("<I")  # the slot


@dataclass(frozen=True)
class Limits:
    """memory: bytes of address space. tasks: threads of the program's user. first_user: of programs, plus the slot;
    None where the user is not ours to set. scratch: where each program gets space of its own, in namespaces of its own;
    None where it does not.
    """

    memory: int
    tasks: int
    first_user: int | None
    scratch: str | None


def main(guards: str, visible: list[str] | None, limits: dict[str, Any]) -> None:
    """Serve requests on standard input. guards: EvalPlus's file of them. visible: files for `confinement.enter_root`,
    None where they are not ours to set. limits: the fields of `Limits`.
    """
    requests = socket.socket(fileno=os.dup(0))
    if visible is not None:
        confinement.enter_root(visible, limits["scratch"])
    utils = _load(guards)
    with contextlib.suppress(ImportError):
        import numpy  # noqa: F401  (EvalPlus has it loaded when the clock starts)
    platform.uname()  # which, like the modules that are imported and not used here, EvalPlus's guard asks for
    gc.freeze()
    serve(requests, Limits(**limits), utils)


def serve(requests: socket.socket, limits: Limits, utils: ModuleType) -> None:
    """Fork for every request, until nobody is left to make one."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    requests.send(READY)
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, REQUEST.size, 3)
        if not request:
            return
        if os.fork() == 0:
            requests.close()
            _supervise(REQUEST.unpack(request)[0], descriptors, limits, utils)
        for descriptor in descriptors:
            os.close(descriptor)


def _supervise(slot: int, descriptors: list[int], limits: Limits, utils: ModuleType) -> NoReturn:
    """Kill the program, and with its first process all of its namespace, as soon as nobody wants it any more."""
    try:
        job, frames, wanted = descriptors
        confinement.die_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if limits.scratch is not None:
            confinement.leave_namespaces()
        program = os.fork()
        if program == 0:
            _become_program(slot, job, frames, limits, utils)
        os.close(job)
        os.close(frames)
        select.select([wanted, os.pidfd_open(program)], [], [])
        os.kill(program, signal.SIGKILL)
        os.waitpid(program, 0)
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def _become_program(slot: int, job: int, frames: int, limits: Limits, utils: ModuleType) -> NoReturn:
    try:
        if limits.scratch is not None:
            confinement.mount_own(limits.scratch)
        if limits.first_user is not None:
            confinement.become(limits.first_user + slot)
        confinement.die_with_parent()
        if limits.scratch is not None:
            _leave_process_1()
        confinement.limit_resources(limits.memory, limits.tasks)
        confinement.forbid_calls()
        with open(job, "rb", closefd=False) as file:
            _, length = HEADER.unpack(file.read(HEADER.size))
            found = json.loads(file.read(length))
        inputs = [plain_values.loads(text.encode()) for text in found["inputs"]]
        os.chdir(found["folder"])
        tempfile.tempdir = found["folder"]  # EvalPlus has asked for it when its guard makes that impossible
        _keep_only(job, frames)
        _send(frames, READY)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    with contextlib.suppress(BaseException):
        utils.reliability_guard(maximum_memory_bytes=limits.memory)
        _run(found, inputs, utils, job, frames)
    os._exit(0)


def _run(job: dict[str, Any], inputs: list[Any], utils: ModuleType, replies: int, frames: int) -> None:
    """An answer to the definition, and one to each input."""
    send, answer, as_set = _send, _answer, job["as_set"]
    names: dict[str, Any] = {}
    try:
        with utils.swallow_io():
            exec(job["code"], names)
            function = names[job["entry_point"]]
    except BaseException:
        return send(frames, RAISED)
    send(frames, DEFINED)
    for arguments, limit in zip(inputs, job["time_limits"], strict=True):
        try:
            with utils.time_limit(limit), utils.swallow_io():
                found = function(*arguments)
            answer(replies, frames, set(found) if as_set else found)
        except BaseException:
            send(frames, RAISED)


def _answer(replies: int, frames: int, value: Any) -> None:
    digest = plain_values.digest(value)
    if digest is not None:
        _send(frames, DIGEST, digest)
        if os.read(replies, 1) == EXPECTED:
            return
    _send(frames, RETURNED, plain_values.dumps(value))


def _leave_process_1() -> None:
    """Go on in a child: the kernel spares the first process of a namespace what a program may do to itself."""
    child = os.fork()
    if child:
        os.closerange(0, os.sysconf("SC_OPEN_MAX"))
        os.waitpid(child, 0)
        os._exit(0)


def _keep_only(*descriptors: int) -> None:
    for standard in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), standard)
    ends = sorted(descriptors)
    for before, after in zip([2, *ends], [*ends, os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(before + 1, after)


def _load(path: str) -> ModuleType:
    """A module from its file, without the packages around it, which import much more."""
    found = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _send(frames: int, kind: bytes, value: bytes = b"", write: Any = os.write) -> None:
    left = memoryview(HEADER.pack(kind, len(value)) + value)
    while left:
        left = left[write(frames, left) :]
