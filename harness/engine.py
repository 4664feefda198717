"""A server that we started: waiting for it, looking after it while it is used, and, of vLLM's, what it holds and how it
turns to another plan while it runs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from harness.errors import StageError, keep_log
from harness.host import Running, ended, failed, tail
from harness.plan import Plan
from tasks import LLM

RESETS = 5  # tries to empty the prefix cache, a second apart
LOOK_S, ASK_S = 0.5, 5.0  # how often a server in use is looked at, and how often it is asked to answer
MESSAGE = 500  # characters of what went wrong because a server did
DYING_S = 15.0  # that a server may take to end, once it is broken: vLLM looks for dead engines every 5 s


class Engine:
    """llm: where it answers. log: its output. plan: digest of the plan its weights are, or the other folder they are
    from; None for its own folder as it is.

    masked: whether routers are barred from experts that are there. is_new: whether nothing was done with it yet.
    changed: settings that it was started with instead of those asked for: [asked, used] by name.
    timeout_s: that a call may take that changes what it holds.
    """

    def __init__(self, llm: LLM, log: Path, running: Running, timeout_s: float) -> None:
        self.llm = llm
        self.log = log
        self.running = running
        self.changed: dict[str, list] = {}
        self.plan: str | None = None
        self.masked = False
        self.is_new = True
        self._timeout_s = timeout_s
        self._reset_s = min(60.0, timeout_s)

    @property
    def is_alive(self) -> bool:
        with contextlib.suppress(StageError):  # the process that it was forked from is gone
            return self.running.exit_status() is None
        return False

    def ask(self, timeout_s: float) -> None:
        """Have every worker answer, as each does between two steps. Raises httpx.HTTPError if one does not."""
        request = {"method": "check_health"}
        url = f"{self.llm.url}/collective_rpc"
        httpx.post(url, json=request, timeout=timeout_s, trust_env=False).raise_for_status()

    def expert_counts(self) -> list[dict[str, Any]]:
        """Of each worker: which experts it holds, by layer (`harness.served_experts`)."""
        return self._call("expert_counts")

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
            raise failed(f"vLLM could not {method.replace('_', ' ')} ({error!r}).", self.log) from error

    def _forget(self) -> None:
        """Empty the prefix cache, which knows nothing of plans. Raises StageError if requests are still being answered,
        for example of a task that ran out of time: they hold on to their part of it.
        """
        for _ in range(RESETS):
            try:
                answer = httpx.post(f"{self.llm.url}/reset_prefix_cache", timeout=self._reset_s, trust_env=False)
                if answer.json()["success"]:
                    return
            except (httpx.HTTPError, ValueError, KeyError) as error:
                raise failed(f"vLLM could not empty its prefix cache ({error!r}).", self.log) from error
            time.sleep(1)
        raise StageError("vLLM still answers requests of an earlier plan, and cannot turn to another.")


class Watch:
    """Looks after a server while it is used: whether it runs, and whether it answers.

    One that is silent for ``silence_s`` is killed, so that whoever waits for it hears at once that it is gone.

    ask: raises httpx.HTTPError if the server does not answer in as many seconds.
    """

    def __init__(self, running: Running, ask: Callable[[float], None], silence_s: float, log: Path) -> None:
        self.log = log
        self._running, self._ask, self._silence_s = running, ask, silence_s
        self._found: StageError | None = None
        self._noting = threading.Lock()
        self._over = threading.Event()

    @contextmanager
    def looking(self) -> Iterator[Watch]:
        thread = threading.Thread(target=self._look, name="watch", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join(2 * LOOK_S)  # it may be waiting for an answer, and then ends with it

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """What goes wrong in here is told with why the server is of no use any more, if it is not, and with its log."""
        try:
            yield
        except Exception as error:
            found = self.problem_behind()
            keep_log(error, tail(self.log))
            if found is None:
                raise
            first = (str(error).strip().splitlines() or [repr(error)])[0]
            told = StageError(f"{str(found).rstrip('.')}. So this came to nothing: {first[:MESSAGE]}")
            keep_log(told, tail(self.log))
            raise told from error

    def problem(self) -> StageError | None:
        """Why the server is of no use any more; None while it runs."""
        with self._noting:
            if self._found is None:
                try:
                    status = self._running.exit_status()
                except StageError as gone:
                    self._found = gone
                else:
                    if status is not None:
                        self._found = failed(f"The server {ended(status)} while it was used.", self.log)
            return self._found

    def problem_behind(self) -> StageError | None:
        """Why the server is of no use any more, asked when something went wrong: one that is broken is given time to
        end. None if it runs and answers, or is merely busy.
        """
        deadline = time.monotonic() + DYING_S
        while (found := self.problem()) is None and time.monotonic() < deadline:
            try:
                self._ask(ASK_S)
                return None
            except httpx.TimeoutException:
                return self.problem()
            except httpx.HTTPError:
                time.sleep(LOOK_S)
        return found

    def _look(self) -> None:
        heard = time.monotonic()
        asked = heard
        while not self._over.wait(LOOK_S) and self.problem() is None:
            if time.monotonic() - asked < min(ASK_S, self._silence_s / 2):
                continue
            asked = time.monotonic()
            try:
                self._ask(max(LOOK_S, heard + self._silence_s - asked))
                heard = time.monotonic()
            except httpx.HTTPError:
                if time.monotonic() - heard >= self._silence_s:
                    self._kill()

    def _kill(self) -> None:
        with self._noting, contextlib.suppress(StageError):
            if self._over.is_set() or self._running.exit_status() is not None:
                return
            self._found = failed(
                f"The server ran on and gave no sign of life for {self._silence_s:g} s (serve.silence_timeout_s). It "
                "was killed.",
                self.log,
            )
            self._running.kill()


def await_health(running: Running, deadline: float, log: Path) -> None:
    """Wait until the server answers. Raises StageError if it ends or the deadline passes."""
    while time.monotonic() < deadline:
        status = running.exit_status()
        if status is not None:
            raise failed(f"The server {ended(status)} while starting.", log)
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{running.url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise failed("The server was not up within serve.startup_timeout_s.", log)
