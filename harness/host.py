"""The process our vLLM servers are forked from (``harness/vllm_host.py``), from the harness's side."""

from __future__ import annotations

import atexit
import contextlib
import json
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import StageError

LONGEST_FOLDER = 50  # for temporary files: a socket's whole path has at most 107 characters, of which vLLM takes 37


class Host:
    """The process our servers are forked from (see ``harness/vllm_host.py``), from this side."""

    def __init__(self, environment: Mapping[str, str], log: Path, deadline: float) -> None:
        short = len(tempfile.gettempdir()) <= LONGEST_FOLDER
        self._temporary = tempfile.mkdtemp(prefix="serve-", dir=None if short else "/tmp")
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("vllm_host.py")), self._temporary],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches only the harness, which ends the servers in order
            )
        atexit.register(self.close)
        self._answer(log, deadline)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @contextmanager
    def running(self, arguments: list[str], log: Path) -> Iterator[Callable[[], int | None]]:
        """A server with these arguments; gives a function that returns its exit status, None while it runs."""
        pid = self._order({"do": "start", "arguments": arguments, "log": str(log)}, log)["pid"]
        status: int | None = None

        def exit_status() -> int | None:
            nonlocal status
            if status is None:
                status = self._order({"do": "poll", "pid": pid}, log)["status"]
            return status

        try:
            yield exit_status
        finally:
            if status is None and self.is_alive:
                self._order({"do": "stop", "pid": pid}, log)

    def close(self) -> None:
        """End the process and every server of it."""
        atexit.unregister(self.close)
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:  # for example while it imports
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        shutil.rmtree(self._temporary, ignore_errors=True)  # if the process was killed, it could not

    def _order(self, order: dict[str, Any], log: Path) -> dict[str, Any]:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise StageError(f"The process that runs vLLM is gone. {failure(log)}") from error
        return self._answer(log, time.monotonic() + 60)

    def _answer(self, log: Path, deadline: float) -> dict[str, Any]:
        output = self._process.stdout
        assert output
        try:
            readable, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            if line := output.readline() if readable else b"":
                return json.loads(line)
        except BaseException:  # Ctrl-C: the next answer would be the one to this order
            self.close()
            raise
        self.close()
        what = "ended" if readable else "did not answer in time (serve.startup_timeout_s while it starts)"
        raise StageError(f"The process that runs vLLM {what}. {failure(log)}")


def failure(log: Path, lines: int = 15) -> str:
    """The decisive line of a server's log, then its last lines."""
    prefix = re.compile(r"^(\([^)]*pid=\d+\) )?((ERROR|INFO|WARNING) \S+ \S+ \[[^]]*\] )?")
    text = [prefix.sub("", line) for line in log.read_text(errors="replace").splitlines()]
    following = [*text[1:], ""]
    named = [
        f"{line.strip()} {after.strip() if line.endswith(('for ModelConfig', ':')) else ''}".strip()
        for line, after in zip(text, following, strict=True)
        if re.search(r"\b\w*(Error|Exception): ", line)
    ]
    vague = re.compile("Engine core initialization failed|EngineCore encountered an issue")
    decisive = [line for line in named if not vague.search(line)] or named
    head = f"Cause: {decisive[-1]}\n" if decisive else ""
    return f"{head}Last lines of {log}:\n" + "\n".join(text[-lines:])
