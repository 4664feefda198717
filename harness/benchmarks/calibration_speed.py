"""What looking costs: our calibration against a plain forward pass, and against running every expert on every token.

python -m harness.benchmarks.calibration_speed --tokens 16384
python -m harness.benchmarks.calibration_speed --layers 8 --hidden 2048 --experts 128 --width 768 --tokens 262144
python -m harness.benchmarks.calibration_speed --llmcompressor <python of an environment with the package llmcompressor>

A random checkpoint is written, then each way is timed in turn, `--rounds` times over, in one process: the median of
each and its ratio to the plain pass. The baseline that runs every expert on every token gathers REAP's and EAN's sums
alone, as the observer does that was published with REAP. llm-compressor's REAP modifier both calibrates and prunes;
it is timed in a process of its own, after the others.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.benchmarks import random_checkpoint
from harness.benchmarks.random_checkpoint import Size
from harness.calibrate import calibrate, calibrate_streamed, packed_batches
from harness.memory import forget_peak, peak
from harness.models import Model
from harness.parking import Parking
from harness.seam import experts_run_through, trunk, use
from harness.store import Store
from harness.streaming import Batch, open_streamed
from harness.unfinished import Unfinished

GB = 1e9
PLAIN = "plain forward, grouped matrix multiplication"


def plain(model: Any, batches: list[Batch], implementation: str) -> None:
    """The model's own forward pass, up to the last hidden states."""
    use(model, implementation)
    forward(model, batches)


@torch.no_grad()
def forward(model: Any, batches: list[Batch]) -> None:
    for ids, mask in batches:
        trunk(model)(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)


def every_expert(model: Any, batches: list[Batch]) -> dict[nn.Module, dict[str, Tensor]]:
    """A forward pass in which each layer also runs all its experts on all tokens, one expert after the other."""
    sums: dict[nn.Module, dict[str, Tensor]] = {}

    def observe(experts: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        zeros = torch.zeros(experts.num_experts, dtype=torch.float64, device=hidden.device)
        here = sums.setdefault(experts, {"ean": zeros.clone(), "reap": zeros.clone()})
        total = torch.zeros_like(hidden)
        for expert in range(experts.num_experts):
            gate, up = nn.functional.linear(hidden, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            output = nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
            given = (weight * (index == expert)).sum(dim=-1)
            norm = torch.linalg.vector_norm(output.float(), dim=-1).double() * (given > 0)
            here["ean"][expert] += norm.sum()
            here["reap"][expert] += (norm * given.double()).sum()
            total += given.unsqueeze(-1).to(output.dtype) * output
        return total

    with experts_run_through(model, observe):
        forward(model, batches)
    return sums


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident(source: Model, dtype: str, batches: list[Batch], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way that has the whole model in memory."""
    model: Any = source.load(dtype)
    router = frozenset({"logit_gram", "coactivation"})
    ways: dict[str, Callable[[], object]] = {
        PLAIN: lambda: plain(model, batches, "grouped_mm"),
        "plain forward, transformers' loop over experts": lambda: plain(model, batches, "eager"),
        "calibration: REAP, EAN, frequency and more": lambda: calibrate(model, batches),
        "calibration: router statistics besides": lambda: calibrate(model, batches, router),
        "every expert on every token": lambda: every_expert(model, batches),
    }
    plain(model, batches[:1], "grouped_mm")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            seconds[name].append(timed(work))
    return seconds


def from_disk(source: Model, dtype: str, batches: list[Batch], rounds: int, folder: Path) -> list[float]:
    """Seconds of calibration with a layer at a time in memory, all hidden states in memory."""
    seconds = []
    for number in range(rounds):
        opened = open_streamed(source, dtype)
        parking = Parking(np.inf, 0, folder)
        unfinished = Unfinished(Store(folder / "store"), str(number))
        work = functools.partial(calibrate_streamed, opened, batches, frozenset(), "actual", parking, unfinished)
        seconds.append(timed(work))
    return seconds


def other(asked: argparse.Namespace, folder: Path, ids: np.ndarray) -> tuple[str, list[float]]:
    """Name and seconds of llm-compressor's REAP modifier on the same checkpoint and tokens."""
    tokens = folder / "tokens.npy"
    np.save(tokens, ids)
    script = Path(__file__).with_name("llmcompressor_reap.py")
    command = [asked.llmcompressor, str(script), str(folder), str(tokens), str(asked.batch_size), asked.dtype]
    runs = []
    for _ in range(asked.other_rounds):
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            raise SystemExit(f"llm-compressor failed:\n{done.stderr[-2000:]}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return f"llm-compressor {runs[0]['llmcompressor']}: REAP, pruning included", [run["seconds"] for run in runs]


def measure(size: Size, asked: argparse.Namespace, folder: Path) -> None:
    """Print the table."""
    written = random_checkpoint.write(folder, size)
    ids = np.random.default_rng(0).integers(0, size.vocabulary, (asked.tokens // asked.length, asked.length))
    batches = list(packed_batches(ids, asked.batch_size))
    source = Model("random", str(folder))
    seconds = resident(source, asked.dtype, batches, asked.rounds)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    forget_peak()
    seconds["calibration, layers read from disk"] = from_disk(source, asked.dtype, batches, asked.rounds, folder)
    if asked.llmcompressor:
        name, found = other(asked, folder, ids)
        seconds[name] = found
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    peaks = ", ".join(f"{what} {nbytes / GB:.2f} GB" for what, nbytes in peak().items())
    print(
        f"{device}, torch {torch.__version__}, transformers {importlib.metadata.version('transformers')}; "
        f"{written / GB:.1f} GB of random weights ({size}) in {asked.dtype}, {ids.size} tokens in batches of "
        f"{asked.batch_size} x {asked.length}, median of {asked.rounds}. Peak of the pass that reads layers: {peaks}."
    )
    reference = statistics.median(seconds[PLAIN])
    print("| pass | seconds | tokens/s | times the plain forward |\n| --- | ---: | ---: | ---: |")
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"| {name} | {median:.2f} | {ids.size / median:,.0f} | {median / reference:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"layers": 4, "hidden": 512, "experts": 64, "width": 256, "top_k": 8}
    for name, default in {**defaults, "tokens": 16_384, "length": 1024, "batch_size": 4, "rounds": 3}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--llmcompressor", help="the Python of an environment that has it")
    parser.add_argument("--other-rounds", type=int, default=1)
    asked = parser.parse_args()
    size = Size(**{name: getattr(asked, name) for name in defaults})
    with tempfile.TemporaryDirectory() as folder:
        measure(size, asked, Path(folder))


if __name__ == "__main__":
    main()
