"""The process our vLLM servers are forked from (``harness/vllm_host.py``), from the harness's side; what every server
that we start is given, and what its log says.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import StageError, keep_log

LONGEST_FOLDER = 50  # for temporary files: a socket's whole path has at most 107 characters, of which vLLM takes 37
ANSWER_S = 60  # of the process, to an order: it ends a server in 5 s
TAIL_LINES, TAIL_WIDTH = 40, 500  # of a log in a record
LONGEST_LOG = 4 * 2**20  # bytes of a log that are looked at
# What vLLM puts before a line: process, level, time and file.
PREFIX = re.compile(r"^(\([^)]*pid=\d+\) )?((ERROR|INFO|WARNING) \S+ \S+ \[[^]]*\] )?")
NAMES_AN_ERROR = re.compile(
    r"^(?!(\([^)]*pid=\d+\) )?(INFO|WARNING) ).*\b\w*(Error|Exception): |(died|exited) unexpectedly"
)
VAGUE = re.compile("Engine core initialization failed|EngineCore encountered an issue")
SECRETS = re.compile(
    r"(^|_)(TOKEN|(API)?KEY|SECRET|PASS|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|PAT|AUTH)S?(_|$)", re.IGNORECASE
)
PASSWORD_IN_URL = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
SHORTEST_SECRET = 6  # characters: shorter values are ordinary words


@dataclass(frozen=True)
class Running:
    """A server that runs. port: on 127.0.0.1. exit_status: None while it runs. kill: all its processes, at once."""

    port: int
    exit_status: Callable[[], int | None]
    kill: Callable[[], None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Host:
    """The process our servers are forked from (see ``harness/vllm_host.py``), from this side."""

    def __init__(self, environment: Mapping[str, str], log: Path, deadline: float) -> None:
        short = len(tempfile.gettempdir()) <= LONGEST_FOLDER
        self._temporary = tempfile.mkdtemp(prefix="serve-", dir=None if short else "/tmp")
        self._speaking = threading.RLock()  # a server is looked after in a thread of its own
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
    def running(self, arguments: list[str], log: Path) -> Iterator[Running]:
        """A server with these arguments, on a port that the process has taken for it."""
        started = self._order({"do": "start", "arguments": arguments, "log": str(log)}, log)
        pid = started["pid"]
        status: int | None = None

        def exit_status() -> int | None:
            nonlocal status
            with self._speaking:  # the process forgets a server whose end it has told
                if status is None:
                    status = self._order({"do": "poll", "pid": pid}, log)["status"]
                return status

        def kill() -> None:
            with self._speaking:
                if status is None:
                    self._order({"do": "kill", "pid": pid}, log)

        try:
            yield Running(started["port"], exit_status, kill)
        finally:
            with self._speaking:
                if status is None and self.is_alive:
                    status = self._order({"do": "stop", "pid": pid}, log)["status"]

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
        with self._speaking:
            try:
                if not self.is_alive:
                    raise BrokenPipeError("it has ended")
                assert self._process.stdin
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
            except BrokenPipeError as error:
                raise failed("The process that runs vLLM is gone.", log) from error
            return self._answer(log, time.monotonic() + ANSWER_S)

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
        raise failed(f"The process that runs vLLM {what}.", log)


def child_environment() -> dict[str, str]:
    """Ours without secrets, and offline."""
    kept = {name: value for name, value in os.environ.items() if not _is_secret(name, value)}
    return {**kept, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def without_secrets(text: str) -> str:
    """The text with the names of secret variables in place of their values."""
    secret = {name: value for name, value in os.environ.items() if _is_secret(name, value)}
    for name, value in sorted(secret.items(), key=lambda pair: -len(pair[1])):  # one may hold another
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, f"<{name}>")
    return text


def _is_secret(name: str, value: str) -> bool:
    return bool(SECRETS.search(name) or PASSWORD_IN_URL.search(value))


def failed(what: str, log: Path) -> StageError:
    """What happened to a server and the decisive line of its log, in one line; the log's last lines beside it."""
    problem = StageError(f"{what} {cause(log)}".strip())
    keep_log(problem, tail(log))
    return problem


def ended(status: int) -> str:
    """An exit status in words."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def read(log: Path) -> str:
    """The end of a log: a server that dies with many requests in flight writes very much."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LONGEST_LOG))
        return file.read().decode(errors="replace")


def tail(log: Path) -> str:
    """The last lines of a log, without secrets."""
    last = [PREFIX.sub("", line) for line in read(log).splitlines()[-TAIL_LINES:]]
    return "\n".join(line[:TAIL_WIDTH] for line in without_secrets("\n".join(last)).splitlines())


def cause(log: Path) -> str:
    """The decisive line of a server's log; where no line names an error, the last one, if that may say why."""
    lines = [*read(log).splitlines(), ""]
    named = [
        f"{line.strip()} {PREFIX.sub('', after).strip() if line.endswith(('for ModelConfig', ':')) else ''}".strip()
        for line, after in zip(lines, lines[1:], strict=False)
        if NAMES_AN_ERROR.search(line)
    ]
    decisive = [line for line in named if not VAGUE.search(line)] or named
    if decisive:
        return _shown(f"Cause: {PREFIX.sub('', decisive[-1])}")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    says_why = last and not re.match(r"(\([^)]*pid=\d+\) )?INFO", last)
    return _shown(f"The last line of its log: {PREFIX.sub('', last)}") if says_why else ""


def _shown(text: str) -> str:
    return without_secrets(text)[: 2 * TAIL_WIDTH]
