"""A checkpoint that is larger than the memory it may take: calibrated, pruned and written again.

python -m harness.benchmarks.bigger_than_memory
python -m harness.benchmarks.bigger_than_memory --layers 30 --ram 2.5

A random checkpoint of a Qwen3-MoE is written, with the embedded model's tokenizer. Its statistics are gathered layer by
layer in a process that may take `--ram` GiB, and in one that has the whole model in memory; then half of its experts
are pruned, and the files that came of it copied as they are. Each step is a process of its own; the peak is what the
kernel saw of its resident memory, from its start to its end. Copies are timed beside the export, in turn, with the
files in the page cache or not, as the machine has it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import stats
from harness.benchmarks.random_checkpoint import Size
from harness.models import ROOT, Model
from harness.stats import Stats

GB = 1e9
TEXT = ["calibration.dtype=auto", "calibration.held_out=0", "calibration.length=512", "calibration.batch_size=2"]
EXTRAS = "collect=[logit_gram,coactivation]"
WRITE = "from harness.benchmarks.random_checkpoint import main; main()"
EXPORT = "from harness.benchmarks.bigger_than_memory import export; import sys; export(*sys.argv[1:])"


@dataclass(frozen=True)
class Ran:
    """A step: how long it took, the most resident memory that its process had, and what it printed."""

    seconds: float
    peak: int
    said: str


def run(*arguments: str) -> Ran:
    """Raises CalledProcessError if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(status, arguments)
    return Ran(time.perf_counter() - start, usage.ru_maxrss * 1024, said)


def calibrate(model: Path, store: Path, sequences: int, *more: str) -> tuple[Ran, Stats]:
    """By the command that users give."""
    asked = [f"model.path={model}", "model.name=random", f"calibration.sequences={sequences}", *TEXT, EXTRAS]
    ran = run("-m", "harness.only_calibrate", "method=reap", f"store={store}", *asked, *more)
    (found,) = (store / "stats").glob("*.safetensors")
    return ran, stats.load(found)


def same(one: Stats, other: Stats) -> bool:
    """Equal to the last bit."""
    return one.layers.keys() == other.layers.keys() and all(
        layer.sums[name].tobytes() == other.layers[index].sums[name].tobytes()
        for index, layer in one.layers.items()
        for name in layer.sums
    )


def export(model: str, statistics_file: str, folder: str) -> None:
    """Prune half of the experts of every layer; print the seconds of the writing alone."""
    from harness import checkpoint
    from harness.decide import decide
    from harness.plan import Plan
    from methods.reap import REAP

    source, target = Model("random", model), Path(folder)
    keep = {layer: count // 2 for layer, count in source.experts.items()}
    made = Plan(decide(REAP(), stats.load(Path(statistics_file)), keep))
    target.mkdir()
    start = time.perf_counter()
    checkpoint.export(source, made, target)
    os.sync()
    print(json.dumps({"seconds": time.perf_counter() - start}))


def timed(work: Callable[[], object]) -> float:
    """Seconds, until it is on the disk."""
    os.sync()
    start = time.perf_counter()
    work()
    os.sync()
    return time.perf_counter() - start


def written(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def compare_export(model: Path, store: Path, folder: Path, rounds: int) -> tuple[int, list[float], list[float], int]:
    """Peak bytes of the export's process; seconds of each export, and of copying what it wrote; bytes written."""
    (statistics_file,) = (store / "stats").glob("*.safetensors")
    peak, exports, copies, size = 0, [], [], 0
    for number in range(rounds):
        target, again = folder / f"export-{number}", folder / f"copy-{number}"
        os.sync()
        ran = run("-c", EXPORT, str(model), str(statistics_file), str(target))
        peak = max(peak, ran.peak)
        exports.append(json.loads(ran.said)["seconds"])
        copies.append(timed(lambda source=target, to=again: shutil.copytree(source, to)))  # type: ignore[misc]
        size = sum(file.stat().st_size for file in written(target))
        shutil.rmtree(target)
        shutil.rmtree(again)
    return peak, exports, copies, size


def measure(size: Size, asked: argparse.Namespace, folder: Path) -> None:
    """Print what was found."""
    model = folder / "model"
    # A process of its own: the peak of one that is started from here would begin with what is resident here.
    run("-c", WRITE, str(model), json.dumps(dataclasses.asdict(size)))
    total = sum(file.stat().st_size for file in written(model))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tasks" / "tiny" / "model" / file, model / file)
    largest = max(file.stat().st_size for file in written(model))
    print(f"{total / GB:.2f} GB of random weights ({size}), the largest file {largest / GB:.2f} GB\n", flush=True)
    limited, layers = calibrate(model, folder / "a", asked.sequences, f"max_memory.ram={asked.ram}")
    free, whole = calibrate(model, folder / "b", asked.sequences)
    peak, exports, copies, out = compare_export(model, folder / "a", folder, asked.rounds)
    print("| step | seconds | peak resident GB |\n| --- | ---: | ---: |")
    print(f"| statistics, layers {layers.provenance['layers']} | {limited.seconds:.1f} | {limited.peak / GB:.2f} |")
    print(f"| statistics, layers {whole.provenance['layers']} | {free.seconds:.1f} | {free.peak / GB:.2f} |")
    print(f"| export of half the experts, {out / GB:.2f} GB | {statistics.median(exports):.1f} | {peak / GB:.2f} |")
    print(f"| plain copy of what was exported | {statistics.median(copies):.1f} | |")
    ratio = statistics.median(copy / made for made, copy in zip(exports, copies, strict=True))
    print(
        f"\nSums equal to the last bit: {same(layers, whole)}, over {layers.provenance['number_of_tokens']} tokens. "
        f"The export ran at {ratio:.2f} of the copy's speed (median of {asked.rounds} rounds); its peak is "
        f"{(peak - largest) / 1e6:+.0f} MB from the largest file."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 15, "hidden": 1024, "experts": 64, "width": 1024, "top_k": 8}
    for name, default in {**shape, "sequences": 8, "rounds": 3}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--ram", type=float, default=1.8)
    parser.add_argument("--folder", type=Path, help="where about four times the checkpoint may be written")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        measure(Size(**{name: getattr(asked, name) for name in shape}), asked, Path(folder))


if __name__ == "__main__":
    main()
