"""The bill before the run: what a sweep would take, what of it is done, and what cannot run here.

python -m harness.run experiment=reap_table2 dry_run=true

No weights are loaded, nothing is fetched or written. A model that is not here is sized by the outline of its published
config.json (``conf/model/``). Hours are estimates from the sizes below; the assumptions are printed with them.
"""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil

from harness import budget
from harness.absent import absent_data
from harness.data import Calibration
from harness.errors import UserError
from harness.estimate import (
    BANDWIDTH,
    CALIBRATION,
    DECODE,
    GB,
    GPU_BYTES,
    LOADS,
    PEAK_FLOPS,
    PREFILL,
    READING,
    RESULT_BYTES,
    WORK,
    Estimate,
    Load,
    Pass,
    active,
    keeps_rows,
    passes,
    routed,
)
from harness.external import Server
from harness.hf import Transformers
from harness.loading import model_bytes
from harness.models import Model, Outlined
from harness.room import need
from harness.rows import NOT_RUN
from harness.serve import VLLM
from harness.spec import Cell
from harness.sweep import Sweep


def refusals(cell: Cell, estimate: Estimate | None) -> Iterator[str]:
    """Why a cell cannot run on this machine as it is."""
    yield from _refused_model(cell, estimate)
    if (cell.calibrates or cell.measures_errors) and (absent := _absent_text(cell.calibration)):
        yield f"calibration {cell.calibration.name}: {absent}"
    if cell.recovery is not None and (absent := _absent_text(cell.recovery.text)):
        yield f"recovery text {cell.recovery.text.name}: {absent}"
    for task in cell.tasks:
        if (reason := absent_data(task)) is not None:
            yield reason
    if not isinstance(cell.serve, Server):
        yield from _too_large(cell, estimate)


def _absent_text(text: Calibration) -> str:
    try:
        if absent := text.absent:
            return f"{', '.join(absent)} not on this machine nor in the hub's cache"
        text.check()
    except UserError as error:
        return str(error)
    return ""


def _refused_model(cell: Cell, estimate: Estimate | None) -> Iterator[str]:
    name = f"model {cell.model.name}"
    try:
        if cell.model.is_here:
            asked = cell if not (cell.recovery and cell.recovery.text.absent) else replace(cell, recovery=None)
            asked.check()
            return
        if estimate is None:
            made = f" Make it with: {cell.model.build}" if cell.model.build else ""
            yield f"{name}: {cell.model.path} is not here, and no outline says how large it is.{made}"
            return
        yield f"{name}: {_download(cell.model, estimate.cell.model)}"
        yield from (f"{name}: {reason}" for reason in _refused_outline(estimate.cell))
    except UserError as error:
        yield str(error)


def _download(model: Model, outline: Model) -> str:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free / GB
    return (
        f"{model.path} is not on this machine nor whole in the hub's cache; a download of about "
        f"{outline.nbytes / GB:.1f} GB, and the disk of the cache has {free:.0f} GB free"
    )


def _refused_outline(cell: Cell) -> Iterator[str]:
    """What is known to be refused before the files are here."""
    model, outline = cell.model, cell.model.outline or {}
    if not cell.compresses:
        return
    if isinstance(model, Outlined) and not model.is_observable and (cell.calibrates or cell.measures_errors):
        yield "its experts do not go through transformers' experts interface and cannot be calibrated yet"
    if outline["bytes"]["routed"] < 2 and keeps_rows(cell.method):
        yield f"its experts are quantised and cannot be averaged, as {cell.label} does"
    budget.check_keep(cell.keep, model.experts, cell.ratio, model.config, model.top_k)


def _too_large(cell: Cell, estimate: Estimate | None) -> Iterator[str]:
    if estimate is None:
        return
    model = estimate.cell.model
    if (reason := _unserved(cell.serve, model.nbytes)) is not None:
        yield f"model {model.name}: {reason}"
    text, memory = cell.calibration, _memory()
    needed = model_bytes(model, text.dtype)
    if cell.loads_the_model and needed > sum(memory):
        yield (
            f"model {model.name}: {cell.label} needs the whole model in memory, {needed / GB:.1f} GB, and this machine "
            f"has {sum(memory) / GB:.1f} GB"
        )
    elif cell.calibrates and (least := need(model, text.dtype, text.batch_tokens).one_layer) > memory[0]:
        yield (
            f"model {model.name}: calibration layer by layer takes {least / GB:.1f} GB, and this machine has "
            f"{memory[0] / GB:.1f} GB"
        )


@functools.cache
def _unserved(serve: VLLM | Transformers, nbytes: int) -> str | None:
    try:
        return serve.check(nbytes)
    except UserError as error:
        return str(error)


@functools.cache
def _memory() -> list[float]:
    """Bytes of each of this machine's GPUs, or of its memory where it has none."""
    import torch

    found = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return list(map(float, found)) or [float(psutil.virtual_memory().total)]


def show(sweep: Sweep) -> int:
    """Print the bill of a sweep; the exit status is 0, whatever cannot run."""
    print(text(sweep))
    return 0


def text(sweep: Sweep) -> str:
    """The bill in Markdown: models, calibration passes, cells (seeds together), what cannot run, and totals."""
    cells = [*{(cell.row, cell.tasks): cell for cell in sweep.cells}.values()]
    estimates = {cell: Estimate.of(cell, sweep.store) for cell in cells}
    known = [estimate for estimate in estimates.values() if estimate is not None]
    shared = passes(sweep, known)
    parts = [
        _models(estimates),
        _passes(shared),
        _cells(estimates),
        _refused(estimates, sweep.absent),
        _totals(sweep, known, shared),
        ASSUMPTIONS,
    ]
    return "\n\n".join(part for part in parts if part)


ASSUMPTIONS = (
    f"Estimates. One H100 (SXM): {GPU_BYTES / GB:.0f} GB, {PEAK_FLOPS / 1e12:.0f} TFLOP/s in BF16, "
    f"{BANDWIDTH / 1e12:.2f} TB/s. Reached of these: {PREFILL:.0%} of the FLOP/s on prompts, {CALIBRATION:.0%} in "
    f"calibration, layer by layer where one GPU does not hold the model, {DECODE:.0%} of the bandwidth in generation, "
    "whose every step reads the experts that the batch is sent to, all other weights and the batch's cache. Weights "
    f"are read at {READING / 1e9:.0f} GB/s, {LOADS} times for each cell that compresses. Answers are as long as the "
    "reference answers (at most: as long as allowed, which broken models reach); prompts in GPT-2's tokens. Memory: "
    "weights and the cache of a batch (serve.max_num_seqs); 80 GB GPUs in powers of two, each filled as far as "
    "serve.gpu_memory_utilization says. Training is counted in tokens only: its memory (original, compressed model and "
    "AdamW in float32), the disk of trained checkpoints and their other size are left out, as are merge barriers, "
    "judging of programs (CPU), failures and retries."
)


def _models(estimates: Mapping[Cell, Estimate | None]) -> str:
    """One line for each model, sizes as stored."""
    found = {cell.model: estimate for cell, estimate in estimates.items()}
    rows = []
    for model, estimate in found.items():
        here = "yes" if model.is_here else "no"
        if estimate is None:
            rows.append({"model": model.name, "here": here})
            continue
        sizes = estimate.cell.model
        rows.append(
            {
                "model": model.name,
                "here": here,
                "parameters (10^9)": f"{sizes.parameters / 1e9:.4g}",
                "active": f"{active(sizes) / 1e9:.4g}",
                "in routed experts": f"{routed(sizes)[0] / sizes.parameters:.1%}",
                "GB": _gb(sizes.nbytes),
                "experts per layer": f"{sizes.expert_count if sizes.experts else 0}",
                "top-k": f"{sizes.top_k}",
            }
        )
    return _markdown(rows)


def _passes(shared: Sequence[Pass]) -> str:
    """One line for each model and calibration text; its seeds together."""
    groups: dict[tuple[str, str], list[Pass]] = {}
    for one in shared:
        groups.setdefault((one.model.name, one.cell.calibration.name), []).append(one)
    return _markdown(
        [
            {
                "model": model,
                "calibration": name,
                "passes": f"{len(group)}",
                "done": f"{sum(one.is_cached for one in group)}",
                "tokens of a pass": _count(group[0].tokens),
                "GB in memory": _gb(group[0].memory.whole),
                "GB, one layer at a time": _gb(group[0].memory.one_layer),
                "GPUs": f"{group[0].gpus}",
                "GPU h left": f"{sum(one.hours for one in group):.2f}",
            }
            for (model, name), group in groups.items()
        ]
    )


def _cells(estimates: Mapping[Cell, Estimate | None]) -> str:
    """One line for each model, method, ratio and suite; seeds together."""
    groups: dict[tuple, list[tuple[Cell, Estimate | None]]] = {}
    for cell, estimate in estimates.items():
        groups.setdefault((cell.row._replace(seed=None), cell.tasks), []).append((cell, estimate))
    return _markdown([_line(group) for group in groups.values()])


def _line(group: Sequence[tuple[Cell, Estimate | None]]) -> dict[str, str]:
    """What the cells of one line have in common, and the sums over their seeds of what is left."""
    (cell, _), known = group[0], [estimate for _, estimate in group if estimate is not None]
    names = [task.name for task in cell.tasks]
    line = {
        "model": cell.model.name,
        "method": cell.label,
        "ratio": f"{cell.ratio:.4g}",
        "calibration": cell.row.calibration,
        "benchmarks": ", ".join(names) if len(names) < 4 else f"{', '.join(names[:2])} and {len(names) - 2} more",
        "seeds": f"{len(group)}",
    }
    if not known:
        return line
    load = [Load.of(estimate.left) for estimate in known]
    return line | {
        "plans": f"{sum(estimate.has_plan for estimate in known)}",
        "scored": f"{sum(len(cell.tasks) - len(estimate.left) for estimate in known)} of {len(names) * len(group)}",
        "GB weights": _gb(max(estimate.served_bytes for estimate in known)),
        "GB cache": _gb(max(estimate.cache_bytes for estimate in known)),
        "GPUs": f"{max(estimate.gpus for estimate in known)}",
        "prompts": _count(sum(one.prompt for one in load)),
        "answers (at most)": f"{_count(sum(x.generated for x in load))} ({_count(sum(x.most for x in load))})",
        "GPU h left": f"{sum(estimate.hours for estimate in known):.2f}",
    }


def _refused(estimates: Mapping[Cell, Estimate | None], absent: Mapping[str, str]) -> str:
    """What cannot run, each reason once, with the number of cells it stops."""
    stopped = Counter(reason for cell, one in estimates.items() for reason in dict.fromkeys(refusals(cell, one)))
    lines = [f"* {reason} ({number} of {len(estimates)} cells)" for reason, number in stopped.items()]
    lines += [f"* {benchmark} is not offered: {reason}" for benchmark, reason in absent.items()]
    unknown = sorted({task.name for cell in estimates for task in cell.tasks if task.name not in WORK})
    lines += [f"* {name}: how many tokens it takes is not known; left out of the sums" for name in unknown]
    return "Cannot run here:\n" + "\n".join(lines) if lines else ""


def _totals(sweep: Sweep, known: Sequence[Estimate], shared: Sequence[Pass]) -> str:
    loads = [Load.of(estimate.left) for estimate in known]
    hours = sum(estimate.hours for estimate in known) + sum(one.hours for one in shared)
    fetched = {estimate.cell.model: estimate.cell.model.nbytes for estimate in known}
    download = sum(nbytes for model, nbytes in fetched.items() if not model.is_here)
    most = max([1, *(estimate.gpus for estimate in known), *(one.gpus for one in shared)])
    left = sum(len(estimate.left) for estimate in known)
    asked = sum(len(estimate.cell.tasks) for estimate in known)
    return (
        f"In all: {hours:.2f} GPU hours, at most {most} GPU(s) at once; {left} of {asked} scores to make; calibration "
        f"{_count(sum(one.tokens for one in shared if not one.is_cached))} tokens, prompts "
        f"{_count(sum(one.prompt for one in loads))}, answers {_count(sum(one.generated for one in loads))} (at most "
        f"{_count(sum(one.most for one in loads))}). Disk: download of models {_gb(download)} GB, results "
        f"{_gb(_results(loads, shared))} GB, checkpoints {_gb(_checkpoints(sweep, known))} GB."
    )


def _results(loads: Sequence[Load], shared: Sequence[Pass]) -> float:
    """Bytes of scores and samples, calibration tokens and sums that are still to be written."""
    scores = sum(RESULT_BYTES * (load.prompt + load.generated) for load in loads)
    return scores + sum(one.disk for one in shared if not one.is_cached)


def _checkpoints(sweep: Sweep, known: Sequence[Estimate]) -> float:
    """Bytes of those that are written: all if they are kept, else one at a time."""
    written = [
        float(estimate.size.bytes)
        for estimate in known
        if isinstance(estimate.cell.serve, VLLM) and not estimate.cell.serve.reads_plans and estimate.cell.compresses
    ]
    keep = any(cell.keep_checkpoints for cell in sweep.cells)
    return sum(written) if keep else max(written, default=0.0)


def _gb(nbytes: float) -> str:
    return f"{nbytes / GB:.3g}" if nbytes < 100 * GB else f"{nbytes / GB:.0f}"


def _count(tokens: float) -> str:
    """Three digits and a unit."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{name}"
    return f"{tokens:.0f}"


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    return str(pd.DataFrame(rows).fillna(NOT_RUN).to_markdown(index=False, disable_numparse=True))
