"""The bill before the run: what a sweep would take, what of it is done, and what cannot run here.

python -m harness.run experiment=reap_table2 dry_run=true

No weights are loaded, nothing is fetched or written. A model that is not here is sized by the outline of its published
config.json (``conf/model/``). Hours are estimates from the sizes below; the assumptions are printed with them.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch

from harness import budget, checkpoint, scoring, stages, stats
from harness import plan as plans
from harness.errors import UserError
from harness.hf import Transformers
from harness.models import Model, Outlined, role
from harness.plan import LayerPlan, Plan
from harness.serve import VLLM, Server
from harness.spec import Cell
from harness.stats import LayerStats, Stats
from harness.store import Store, key
from harness.sweep import Sweep
from harness.tables import NOT_RUN
from methods import Method
from tasks import Task
from tasks.evalplus_code import RELEASES, EvalPlus
from tasks.lm_harness import LmEval
from tasks.lm_task import TaskFile, task_paths

# One H100 SXM (NVIDIA's data sheet: 80 GB, BF16 dense, HBM3), and the shares of it that are reached: assumptions.
GPU_BYTES, PEAK_FLOPS, BANDWIDTH = 80e9, 989e12, 3.35e12
PREFILL, CALIBRATION, DECODE = 0.4, 0.2, 0.6
READING = 2e9  # bytes per second from disk into the GPUs, an assumption
LOADS = 3  # of a compressed model's weights: reconstruction error, reference log-probabilities, serving
RESULT_BYTES = 2.2  # per token sent or generated: samples, scores, records and plans of the embedded model's demo
GB = 1e9


@dataclass(frozen=True)
class Work:
    """What a benchmark asks of a model.

    items; requests per item (choices whose likelihood is asked, 1 where it generates); mean tokens of a request's
    prompt, choice included, and of a reference answer; most: tokens that an answer may have.
    """

    items: int
    requests: float
    prompt: float
    answer: float = 0
    most: int = 0


# Means over the first 400 items (MMLU: 15 of each subject, gsm8k and MATH-500: 500, code: all) of the prompts that our
# suites send, in GPT-2's tokens; answers are the data sets' own solutions. The embedded tasks: in the embedded model's.
WORK: Mapping[str, Work] = {
    "winogrande": Work(1267, 2, 22),
    "arc_challenge": Work(1172, 4, 37),
    "arc_easy": Work(2376, 4, 32),
    "boolq": Work(3270, 2, 140),
    "hellaswag": Work(10042, 4, 44),
    "mmlu": Work(14042, 4, 109),
    "openbookqa": Work(500, 4, 15),
    "rte": Work(277, 2, 76),
    "gsm8k": Work(1319, 1, 853, 98, 256),
    "math500": Work(500, 1, 749, 221, 256),
    "humaneval": Work(164, 1, 170, 85, 768),
    "mbpp": Work(378, 1, 51, 57, 768),
    "tiny_sums": Work(300, 1, 37, 31, 96),
    "tiny_facts": Work(300, 4, 17),
    "tiny_code": Work(164, 1, 38, 35, 128),
}
MMLU_SUBJECTS = 57  # ``limit`` takes so many items of each


@dataclass(frozen=True)
class Load:
    """Tokens that tasks send and generate: as many as the reference answers have, and at most."""

    prompt: float = 0
    generated: float = 0
    most: float = 0
    longest: float = 0  # mean tokens of a sequence of the longest task

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> Load:
        """Of tasks that are not known, nothing."""
        return functools.reduce(cls._plus, [cls._one(task) for task in tasks if task.name in WORK], cls())

    @classmethod
    def _one(cls, task: Task) -> Load:
        work = WORK[task.name]
        limit = getattr(task, "limit", None) or work.items
        items = min(work.items, limit * (MMLU_SUBJECTS if task.name == "mmlu" else 1))
        requests = items * work.requests
        most = getattr(task, "max_tokens", work.most)
        return cls(requests * work.prompt, requests * work.answer, requests * most, work.prompt + work.answer)

    def _plus(self, other: Load) -> Load:
        sums = (self.prompt + other.prompt, self.generated + other.generated, self.most + other.most)
        return Load(*sums, max(self.longest, other.longest))


@functools.cache
def sized(model: Model) -> Model | None:
    """The model itself where its files are here and readable, else by its outline; None if there is none."""
    if not model.is_here:
        return model.outlined()
    try:
        assert model.top_k >= 0 and model.nbytes
        return model
    except UserError:
        return None


@functools.cache
def routed(model: Model) -> tuple[int, int]:
    """Parameters and bytes of the routed experts."""
    found = [tensor for name, tensor in model.tensors.items() if _is_expert(name, tensor.shape, model)]
    return sum(tensor.elements for tensor in found), sum(tensor.nbytes for tensor in found)


def _is_expert(name: str, shape: Sequence[int], model: Model) -> bool:
    return role(name, shape, model.experts).kind in ("expert", "fused")


def active(model: Model) -> float:
    """Parameters that work on a token: all but the routed experts it is not sent to."""
    parameters, _ = routed(model)
    idle = parameters * (1 - model.top_k / model.expert_count) if model.experts else 0
    return model.parameters - idle


def cache_bytes(model: Model) -> float:
    """Key-value cache of one token in 16 bits: keys and values of every layer, or DeepSeek's latent vector."""
    config = model.config
    if "kv_lora_rank" in config:
        width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    else:
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        width = 2 * size * (config.get("num_key_value_heads") or heads)
    return 2.0 * width * config["num_hidden_layers"]


def keeps_rows(method: Method) -> bool:
    """Whether the method's plans keep every router row, as merging does. Methods are pure: it is asked on random sums
    of 8 experts.
    """
    experts, rng = 8, np.random.default_rng(0)
    flat = {name: 1 + rng.random(experts) for name in (*stats.ROUTED, *stats.EXTRAS, *stats.WEIGHTS)}
    gram = {name: (rows := rng.random((experts, experts))) @ rows.T for name in stats.PAIRWISE}
    wide = {name: rng.random((experts, 4)) for name in stats.OF_OUTPUTS}
    layer = LayerStats(experts, 100, {**flat, **gram, **wide})
    with suppress(Exception):
        made = method.plan(Stats({0: layer}, error=lambda layer, plan: 0.0), {0: experts // 2})
        return len(made[0].kept_rows) == experts
    return True  # it cannot be asked: the larger of the two


def expected_plan(cell: Cell) -> Plan:
    """A plan of the size that the cell's will have; which experts it keeps or merges does not matter for that."""
    merges = cell.compresses and keeps_rows(cell.method)
    layers = {}
    for layer, count in cell.model.experts.items():
        keep = cell.keep[layer] if cell.compresses else count
        clusters = [[*range(place, count, keep)] for place in range(keep)]
        layers[layer] = LayerPlan.merge(clusters, [1.0] * count) if merges else LayerPlan.prune(range(keep), count)
    return Plan(layers)


def known_plan(cell: Cell, store: Store) -> Plan | None:
    """The cell's plan, if the store has it."""
    if not _is_known(cell, store):
        return None
    path = stages.plan_file(cell, store)
    return plans.from_json(path.read_text()) if path.exists() else None


def _is_known(cell: Cell, store: Store) -> bool:
    """Whether all that names the cell's results is here; without a store nobody need hash a model."""
    if not (store.root.is_dir() and cell.model.is_here and sized(cell.model)):
        return False
    return not (cell.calibrates or cell.measures_errors) or not cell.calibration.absent


@dataclass(frozen=True)
class Estimate:
    """What one cell takes. ``cell.model`` may be an outline; ``left``: the tasks without a score."""

    cell: Cell
    plan: Plan
    has_plan: bool  # whether it is the cell's own, from the store
    left: tuple[Task, ...]

    @classmethod
    def of(cls, cell: Cell, store: Store) -> Estimate | None:
        """None where nothing is known of the model's size, or the ratio leaves it nothing."""
        model = sized(cell.model)
        if model is None or (cell.compresses and not model.experts):
            return None
        known = known_plan(cell, store)
        done = [task for task in cell.tasks if _is_scored(cell, task, store)]
        left = tuple(task for task in cell.tasks if task not in done)
        here = replace(cell, model=model)
        return cls(here, known or expected_plan(here), known is not None, left)

    @cached_property
    def size(self) -> checkpoint.Size:
        """Bytes of the weights as they are stored."""
        return checkpoint.measure(self.cell.model, self.plan)

    @property
    def served_bytes(self) -> float:
        """Memory of the weights where they are served: transformers and masked routers hold every expert."""
        serve, model = self.cell.serve, self.cell.model
        if isinstance(serve, Server):
            return 0.0
        stored = float(model.nbytes)
        if isinstance(serve, VLLM) and serve.how != "mask":
            stored = float(self.size.distinct_bytes if serve.reads_plans else self.size.bytes)
        return stored * _widened(model, serve.dtype)

    @property
    def cache_bytes(self) -> float:
        """Key-value cache of as many sequences as are computed together, of the longest task's mean length."""
        return cache_bytes(self.cell.model) * self.batch * Load.of(self.cell.tasks).longest

    @property
    def batch(self) -> int:
        serve = self.cell.serve
        if isinstance(serve, Server):
            return 1
        return serve.max_num_seqs if isinstance(serve, VLLM) else serve.batch

    @property
    def gpus(self) -> int:
        """To serve it, a power of two: vLLM divides attention heads among them."""
        share = getattr(self.cell.serve, "gpu_memory_utilization", 0.9)
        return gpus(self.served_bytes + self.cache_bytes, share)

    @cached_property
    def hours(self) -> float:
        """GPU hours that are left: loading, prompts, answers, and the passes of its own that the cell needs."""
        if not self.left or isinstance(self.cell.serve, Server):
            return 0.0
        model, load = self.cell.model, Load.of(self.left)
        loads = LOADS if self.cell.compresses else LOADS - 1
        flops = 2 * active(model) * (load.prompt / PREFILL + self._own_tokens * gpus(model.nbytes) / CALIBRATION)
        seconds = loads * model.nbytes / READING * self.gpus + flops / PEAK_FLOPS
        seconds += load.generated / self.batch * self._step_bytes(load.longest) / (BANDWIDTH * DECODE)
        return seconds / 3600

    @property
    def _own_tokens(self) -> float:
        """Tokens through the model for this cell alone: three times those held out, for the reconstruction error, and
        half a pass for each layer where the method compresses layer after layer.
        """
        text, own = self.cell.calibration, 0.0
        if self.cell.in_sequence and not self.has_plan:
            own = text.sequences * len(self.cell.model.experts) / 2
        return text.length * (own + (3 * text.held_out if self.cell.measures_errors else 0))

    def _step_bytes(self, length: float) -> float:
        """Memory that one step of decoding reads: the experts that some token of the batch is sent to, all the rest,
        and the batch's cache.
        """
        model = self.cell.model
        expert_bytes = routed(model)[1]
        if not expert_bytes:
            return float(model.nbytes + self.batch * length * cache_bytes(model))
        kept = float(np.mean([*self.plan.distinct_experts().values()]))
        touched = 1 - (1 - model.top_k / kept) ** self.batch if kept > model.top_k else 1.0
        read = model.nbytes - expert_bytes * (1 - touched * kept / model.expert_count)
        return read + self.batch * length * cache_bytes(model)


def _widened(model: Model, dtype: str) -> float:
    """How much larger weights are in memory than on disk."""
    return 4 * model.parameters / model.nbytes if dtype == "float32" else 1.0


def gpus(nbytes: float, share: float = 0.9) -> int:
    """80 GB GPUs that hold so many bytes, a power of two."""
    return 1 << math.ceil(math.log2(max(1.0, nbytes / (GPU_BYTES * share))))


def _is_scored(cell: Cell, task: Task, store: Store) -> bool:
    return _is_known(cell, store) and absent_data(task) is None and scoring.has_score(cell, task, store)


@dataclass(frozen=True)
class Pass:
    """One calibration pass: a model over one draw of a text, for all methods and ratios.

    cell: one of those that read it. extras: the statistics that any of them needs besides the routed ones.
    """

    cell: Cell
    extras: frozenset[str]
    is_cached: bool

    @property
    def model(self) -> Model:
        return self.cell.model

    @property
    def tokens(self) -> int:
        return self.cell.calibration.sequences * self.cell.calibration.length

    @property
    def nbytes(self) -> float:
        """Memory: the whole original, and the logits of a batch."""
        text = self.cell.calibration
        logits = 4.0 * text.batch_size * text.length * self.model.config["vocab_size"]
        return self.model.nbytes * _widened(self.model, text.dtype) + logits

    @property
    def hours(self) -> float:
        """GPU hours: one GPU works at a time, layer after layer, and the others wait."""
        every = self.extras & set(stats.OF_OUTPUTS)  # all experts run on every token
        flops = 2.0 * self.tokens * (self.model.parameters if every else active(self.model))
        seconds = flops / (PEAK_FLOPS * CALIBRATION) + self.model.nbytes / READING
        return 0.0 if self.is_cached else seconds * gpus(self.nbytes) / 3600

    @property
    def disk(self) -> int:
        """Bytes of the tokens and of the sums."""
        width = {**dict.fromkeys(stats.PAIRWISE, self.model.expert_count)}
        width |= dict.fromkeys(stats.OF_OUTPUTS, self.model.config["hidden_size"])
        numbers = len(stats.ROUTED) + sum(width.get(name, 1) for name in self.extras)
        return 8 * (self.tokens + numbers * sum(self.model.experts.values()))


def passes(sweep: Sweep, estimates: Sequence[Estimate]) -> list[Pass]:
    """The calibration passes that the cells share."""
    made: dict[tuple, Pass] = {}
    for cell in (estimate.cell for estimate in estimates):
        known = (cell.model, cell.calibration, cell.routing)
        if cell.calibrates and not cell.in_sequence and known not in made:
            extras = frozenset(sweep.extras)
            made[known] = Pass(cell, extras, _has_statistics(cell, extras, sweep.store))
    return [*made.values()]


def _has_statistics(cell: Cell, extras: frozenset[str], store: Store) -> bool:
    if not _is_known(cell, store) or not store.path("tokens", cell.tokens_name).exists():
        return False
    path = store.path("stats", key(**stages.observed(cell, stages.tokens(cell, store))) + ".safetensors")
    return path.exists() and extras <= stats.load(path).names


def absent_data(task: Task) -> str | None:
    """Why the task's rows cannot be read here, without asking the network; None where they are here."""
    return _absent_data(task)  # type: ignore[arg-type] # tasks are frozen dataclasses


@functools.cache
def _absent_data(task: Task) -> str | None:
    try:
        if isinstance(task, EvalPlus) and task.problems is None and task.data_dir is None:
            return _absent_release(task.dataset)
        task.check()
        return _absent_rows(task) if isinstance(task, LmEval) and task.data_dir is None else None
    except UserError as error:
        return str(error)


def _absent_release(dataset: str) -> str | None:
    from evalplus.data import humaneval, mbpp, utils

    versions = {"humaneval": humaneval.HUMANEVAL_PLUS_VERSION, "mbpp": mbpp.MBPP_PLUS_VERSION}
    release = RELEASES[dataset][0].removesuffix(".jsonl.gz")
    if Path(utils.CACHE_DIR, f"{release}-{versions[dataset]}.jsonl").exists():
        return None
    return f"{dataset}: EvalPlus's release is not in its cache (a download of about 1 MB, or set data_dir)"


def _absent_rows(task: LmEval) -> str | None:
    """Data sets of lm-eval's task files that are neither local nor in the caches of the hub and of datasets."""
    from huggingface_hub import constants

    files = [TaskFile(task.name, path) for path in task_paths(task.name, task.task_file)]
    wanted = {file.config["dataset_path"] for file in files if not file.data_files}
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME, "datasets")))
    caches = (prepared / "{0}", Path(constants.HF_HUB_CACHE, "datasets--{1}"))
    absent = [
        name
        for name in sorted(wanted)
        if not any(
            Path(str(cache).format(name.replace("/", "___"), name.replace("/", "--"))).is_dir() for cache in caches
        )
    ]
    return f"{task.name}: rows of {', '.join(absent)} are not in the hub's cache (or set data_dir)" if absent else None


def refusals(cell: Cell, estimate: Estimate | None) -> Iterator[str]:
    """Why a cell cannot run on this machine as it is."""
    yield from _refused_model(cell, estimate)
    if (cell.calibrates or cell.measures_errors) and (absent := _absent_text(cell)):
        yield f"calibration {cell.calibration.name}: {absent}"
    for task in cell.tasks:
        if (reason := absent_data(task)) is not None:
            yield reason
    if not isinstance(cell.serve, Server):
        yield from _too_large(cell, estimate)


def _absent_text(cell: Cell) -> str:
    try:
        if absent := cell.calibration.absent:
            return f"{', '.join(absent)} not on this machine nor in the hub's cache"
        cell.calibration.check()
    except UserError as error:
        return str(error)
    return ""


def _refused_model(cell: Cell, estimate: Estimate | None) -> Iterator[str]:
    name = f"model {cell.model.name}"
    try:
        if cell.model.is_here:
            return cell.check()
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
    if outline.get("num_nextn_predict_layers"):
        yield "its files hold a multi-token-prediction head, which is not supported yet"
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
    needed, memory = model.nbytes * _widened(model, cell.calibration.dtype), _memory()
    if cell.compresses and needed > memory:
        yield (
            f"model {model.name}: the whole model must be in memory to calibrate, {needed / GB:.1f} GB, and this "
            f"machine has {memory / GB:.1f} GB"
        )


@functools.cache
def _unserved(serve: VLLM | Transformers, nbytes: int) -> str | None:
    try:
        return serve.check(nbytes)
    except UserError as error:
        return str(error)


@functools.cache
def _memory() -> float:
    """Bytes of this machine's GPUs, or of its memory where it has none."""
    if torch.cuda.is_available():
        return float(sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())))
    return float(psutil.virtual_memory().total)


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
    f"calibration, where one GPU works at a time and the others wait, {DECODE:.0%} of the bandwidth in generation, "
    "whose every step reads the experts that the batch is sent to, all other weights and the batch's cache. Weights "
    f"are read at {READING / 1e9:.0f} GB/s, {LOADS} times for each cell that compresses. Answers are as long as the "
    "reference answers (at most: as long as allowed, which broken models reach); prompts in GPT-2's tokens. Memory: "
    "weights and the cache of a batch (serve.max_num_seqs); 80 GB GPUs in powers of two, each filled as far as "
    "serve.gpu_memory_utilization says. Left out: judging of programs (CPU), failures and retries."
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
                "GB in memory": _gb(group[0].nbytes),
                "GPUs": f"{gpus(group[0].nbytes)}",
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
    most = max([1, *(estimate.gpus for estimate in known), *(gpus(one.nbytes) for one in shared)])
    left = sum(len(estimate.left) for estimate in known)
    asked = sum(len(estimate.cell.tasks) for estimate in known)
    return (
        f"In all: {hours:.2f} GPU hours, at most {most} GPU(s) at once; {left} of {asked} scores to make; calibration "
        f"{_count(sum(one.tokens for one in shared if not one.is_cached))} tokens, prompts "
        f"{_count(sum(one.prompt for one in loads))}, answers {_count(sum(one.generated for one in loads))} (at most "
        f"{_count(sum(one.most for one in loads))}). Disk: download {_gb(download)} GB, results "
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
