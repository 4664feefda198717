"""What a cell takes before it has run: sizes under its plan, tokens, memory and GPU hours. No weights are loaded.

A model that is not here is sized by the outline of its published config.json (``conf/model/``). Hours follow from the
assumptions below.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from harness import checkpoint, gather, scoring, stages, stats
from harness import plan as plans
from harness.absent import absent_data
from harness.errors import UserError
from harness.external import Server
from harness.models import Model
from harness.plan import LayerPlan, Plan
from harness.roles import role
from harness.room import Need, need
from harness.serve import VLLM
from harness.spec import Cell
from harness.store import Store
from harness.sweep import Sweep
from harness.thinking import ThinkThenAnswer
from harness.trial import trial_plan
from methods import Method
from tasks import Task

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
    """Whether the method's plans keep every router row, as merging does; the larger of the two where it cannot be
    asked. What is searched over are experts to prune.
    """
    made = trial_plan(method)
    return "search" not in method.needs if made is None else len(made.kept_rows) == len(made.routes)


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
    texts = [cell.calibration] if cell.calibrates or cell.measures_errors else []
    texts += [cell.recovery.text] if cell.recovery else []
    return not any(text.absent for text in texts)


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
        if isinstance(serve, ThinkThenAnswer) and not self.plan.is_identity:
            stored += model.nbytes  # the original answers, in an engine of its own
        is_plain = model.bytes_of_a_number >= 2  # else quantised, and computed with as it is
        return stored * 4 / model.bytes_of_a_number if is_plain and serve.dtype == "float32" else stored

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
        loads += isinstance(self.cell.serve, ThinkThenAnswer) and not self.plan.is_identity
        flops = 2 * active(model) * (load.prompt / PREFILL + self._own_tokens * gpus(model.nbytes) / CALIBRATION)
        seconds = loads * model.nbytes / READING * self.gpus + flops / PEAK_FLOPS
        seconds += load.generated / self.batch * self._step_bytes(load.longest) / (BANDWIDTH * DECODE)
        return seconds / 3600

    @property
    def _own_tokens(self) -> float:
        """Tokens through the model for this cell alone: three times those held out, for the reconstruction error, half
        a pass for each layer where the method compresses layer after layer, those of a search and of a recovery.
        """
        text, own = self.cell.calibration, 0.0
        if not self.has_plan and not self.cell.keeps_experts:
            own = sum(getattr(part, "searched_sequences", 0) for part in (self.cell.method, self.cell.allocation))
            own += text.sequences * len(self.cell.model.experts) / 2 if self.cell.in_sequence else 0
        trained = self.cell.recovery.forward_tokens if self.cell.recovery else 0
        return trained + text.length * (own + (3 * text.held_out if self.cell.measures_errors else 0))

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

    @cached_property
    def memory(self) -> Need:
        """Bytes that it takes."""
        text = self.cell.calibration
        return need(self.model, text.dtype, text.batch_tokens)

    @property
    def gpus(self) -> int:
        """One, unless it does not even hold a layer."""
        return gpus(min(self.memory.whole, self.memory.one_layer))

    @property
    def hours(self) -> float:
        """GPU hours."""
        flops = 2.0 * self.tokens * active(self.model)
        if self.extras & set(stats.OF_OUTPUTS):  # all experts run, but for their down projections
            every = min(self.tokens, self.cell.calibration.all_expert_tokens)
            flops += 2.0 * every * routed(self.model)[0] * 2 / 3
        seconds = flops / (PEAK_FLOPS * CALIBRATION) + self.model.nbytes / READING
        return 0.0 if self.is_cached else seconds * self.gpus / 3600

    @property
    def disk(self) -> int:
        """Bytes of the tokens and of the sums."""
        return 8 * self.tokens + stats.nbytes(self.extras, self.model.experts, self.model.config["hidden_size"])


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
    return _is_known(cell, store) and gather.is_made(replace(cell, collect=extras), store)
