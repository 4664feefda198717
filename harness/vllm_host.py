"""The process that vLLM servers are forked from: it imports vLLM once, then a server is up in seconds.

Most of a server's start-up is imports, in three processes. Here they happen once for a whole sweep. ``harness.serve``
runs this file, with a folder for temporary files, and speaks JSON lines with it: an order on standard input, an answer
on standard output.

    {"do": "start", "arguments": [...], "log": path}  ->  {"pid": p, "port": where it listens}
    {"do": "poll", "pid": p}                          ->  {"status": null, or the exit status of a server that ended}
    {"do": "kill", "pid": p}                          ->  {}, and its end is told by a later order
    {"do": "stop", "pid": p}                          ->  {"status": exit status}

The port is taken here, before the server is forked, and handed over: nothing can come between choosing and taking it.

However the harness ends, also by SIGKILL, standard input closes, every server is killed and the folder removed: killed
servers leave sockets in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

GRACE_SECONDS = 5  # between SIGTERM and SIGKILL
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> None:
    parent = os.getppid()
    os.environ["TMPDIR"] = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever an import prints must not end up among the answers
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # so that a dead server's children can be waited for
    os.register_at_fork(after_in_child=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    servers: set[int] = set()
    try:
        import_vllm()
        print(json.dumps({"ready": True}), file=answers)  # fails if the harness was killed meanwhile
        for order in _orders(parent):
            print(json.dumps(obey(order, servers, answers.fileno())), file=answers)
    finally:
        for pid in servers:
            _end(pid, grace=0)
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def import_vllm() -> None:
    """Import what a server and its engine import. On a CPU the engine is forked too, and is its own worker."""
    import vllm.entrypoints.launchers.api_server.entry
    import vllm.entrypoints.launchers.cli_args
    import vllm.v1.engine.async_llm
    import vllm.v1.engine.core
    import vllm.v1.engine.utils
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        import vllm.v1.worker.cpu_worker

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker runs inside the engine's process
        # vLLM asks for "spawn" on CPUs, that is, for importing everything again.
        vllm.v1.engine.utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    gc.freeze()


def _orders(parent: int) -> Iterator[dict[str, Any]]:
    """Orders as they come, until the harness closes its end or is gone."""
    pending = b""
    while os.getppid() == parent:
        if not select.select([0], [], [], 1.0)[0]:
            continue
        received = os.read(0, 1 << 16)
        if not received:
            return
        *lines, pending = (pending + received).split(b"\n")
        yield from map(json.loads, lines)


def obey(order: dict[str, Any], servers: set[int], answers: int) -> dict[str, Any]:
    if order["do"] == "start":
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            _serve([*order["arguments"], "--port", str(port)], order["log"], listening)
        _lead_a_group(pid)
        listening.close()
        servers.add(pid)
        return {"pid": pid, "port": port}
    pid = order["pid"]
    if order["do"] == "kill":
        _signal(pid, signal.SIGKILL)
        return {}
    if order["do"] == "poll" and not _has_exited(pid):
        return {"status": None}
    servers.discard(pid)
    return {"status": _end(pid, GRACE_SECONDS)}


def _serve(arguments: list[str], log: str, listening: socket.socket) -> NoReturn:
    """Become vLLM's OpenAI server at this socket, in a process group of its own and writing to the log."""
    status = 1
    try:
        _lead_a_group(os.getpid())
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["vllm", *arguments]
        from vllm.entrypoints.launchers import launcher
        from vllm.entrypoints.launchers.api_server.entry import main as serve

        launcher.create_server_socket = lambda *_, **__: listening  # vLLM would bind one of its own
        serve()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _lead_a_group(pid: int) -> None:
    """Done by the server and by its parent: whichever comes first, a signal to the group then reaches the server, and
    what the server forks is in the group.
    """
    with contextlib.suppress(ProcessLookupError):
        os.setpgid(pid, pid)


def _has_exited(pid: int) -> bool:
    """Without collecting its status, so that its process group's number stays taken."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(pid: int, grace: float) -> int:
    """End the server's whole process group, wait until all of it is gone and return the server's exit status."""
    deadline = time.monotonic() + grace
    if grace and not _has_exited(pid):
        _signal(pid, signal.SIGTERM)
        while not _has_exited(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
    _signal(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-pid, 0)
    return os.waitstatus_to_exitcode(status)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    main()
    os._exit(0)  # nothing is left to do, and libraries complain while the interpreter is taken apart
