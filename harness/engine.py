"""A vLLM server that we started: what it holds, and how it turns to another plan while it runs."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from harness.errors import StageError
from harness.host import failure
from harness.plan import Plan
from tasks import LLM

RESETS = 5  # tries to empty the prefix cache, a second apart


class Engine:
    """llm: where it answers. log: its output. plan: digest of the plan its weights are, or the other folder they are
    from; None for its own folder as it is.

    masked: whether routers are barred from experts that are there. is_new: whether nothing was done with it yet.
    """

    def __init__(self, llm: LLM, log: Path, exit_status: Callable[[], int | None], timeout_s: float) -> None:
        self.llm = llm
        self.log = log
        self.plan: str | None = None
        self.masked = False
        self.is_new = True
        self._exit_status = exit_status
        self._timeout_s = timeout_s

    @property
    def is_alive(self) -> bool:
        with contextlib.suppress(StageError):  # the process that it was forked from is gone
            return self._exit_status() is None
        return False

    def weight_bytes(self) -> int:
        """Memory of all weights, over all workers."""
        return sum(int(found) for found in self._call("weight_bytes"))

    def swap(self, plan: Plan, file: Path) -> None:
        """Make the weights those of the plan, which ``file`` holds. Raises StageError; the engine is then of no use."""
        self._forget()
        self._call("swap_plan", str(file))
        self.plan, self.masked = plan.digest, False

    def swap_folder(self, folder: Path) -> None:
        """Make the weights those of a checkpoint made from the engine's own. Raises StageError as `swap`."""
        self._forget()
        self._call("swap_plan", "", str(folder))
        self.plan, self.masked = str(folder), False

    def unswap(self) -> None:
        """Make the weights those of the folder again, all experts open."""
        self._forget()
        self._call("swap_plan", "")
        self.plan, self.masked = None, False

    def mask(self, file: Path) -> None:
        """Bar the routers from what the plan in ``file`` drops; the weights must be the folder's own."""
        assert self.plan is None, "the mask numbers experts as the folder does"
        self._forget()
        self._call("mask_plan", str(file))
        self.masked = True

    def _call(self, method: str, *arguments: str) -> list[Any]:
        """What each worker answers."""
        request = {"method": method, "args": list(arguments), "timeout": self._timeout_s}
        try:
            answer = httpx.post(
                f"{self.llm.url}/collective_rpc", json=request, timeout=self._timeout_s, trust_env=False
            )
            answer.raise_for_status()
            return list(answer.json()["results"])
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise StageError(f"vLLM could not {method.replace('_', ' ')} ({error!r}). {failure(self.log)}") from error

    def _forget(self) -> None:
        """Empty the prefix cache, which knows nothing of plans. Raises StageError if requests are still being answered,
        for example of a task that ran out of time: they hold on to their part of it.
        """
        for _ in range(RESETS):
            try:
                answer = httpx.post(f"{self.llm.url}/reset_prefix_cache", timeout=60, trust_env=False)
                if answer.json()["success"]:
                    return
            except (httpx.HTTPError, ValueError, KeyError) as error:
                raise StageError(f"vLLM could not empty its prefix cache ({error!r}). {failure(self.log)}") from error
            time.sleep(1)
        raise StageError("vLLM still answers requests of an earlier plan, and cannot turn to another.")


def await_health(url: str, exit_status: Callable[[], int | None], deadline: float, log: Path) -> None:
    """Wait until the server answers. Raises StageError if it ends or the deadline passes."""
    while time.monotonic() < deadline:
        status = exit_status()
        if status is not None:
            raise StageError(f"The server ended with status {status} while starting. {failure(log)}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise StageError(f"The server was not up within serve.startup_timeout_s. {failure(log)}")


def free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return probe_socket.getsockname()[1]
