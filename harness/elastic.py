"""Star Elastic: one set of weights from which models of several sizes are cut (arXiv 2605.07182)."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from harness import budget, distill
from harness.calibrate import packed_batches
from harness.data import Calibration
from harness.distill import trainable
from harness.errors import UserError
from harness.importance import importance
from harness.models import Model
from harness.nested import (
    Budget,
    NestedOrder,
    dims,
    expert_order,
    manifest,
    sizes,
    skeleton,
    sort_model,
    views,
)
from harness.packing import packed
from harness.plan import Plan
from harness.remake import Remaking, check_plain, identity, save
from harness.slicing import check_cuttable, cut
from harness.stats import MEASURES
from harness.store import Store, key, say
from methods import Method, SequentialMethod
from methods.allocations import orders

MANIFEST, ORDER, REPORT, WEIGHTS = (
    "manifest.json",
    "order.safetensors",
    "report.json",
    "model",
)  # of a sorted parent's folder


@dataclass(frozen=True)
class Elastic:
    """The model is sorted by importance once, trained at several sizes together, and every size is a prefix of it.

        L = KL(original || the first b components of the sorted model), b drawn anew at every step

    The weights of a smaller size are part of every larger one's. One sorted parent is made for all ratios, with a
    manifest; what a ratio serves is cut from it, as an ordinary checkpoint.

    Options: ``axis`` experts, in the order of the cell's method (one whose plans nest: REAP in the paper), or width,
    the hidden units of every expert, by sum |act(gate) * up| over the tokens routed to it (`harness.importance`; the
    cell's method is not asked). ``budgets``: ratios that are trained, besides the whole model. ``shares``: how often
    the whole model and then each budget is drawn. ``multiple``: a width is rounded up to a multiple of this, which
    engines' kernels want. ``text``: what importance is measured and the model is trained on, and, held out, what KL is
    measured on. ``epochs``: 0 sorts and cuts without training, the control. AdamW, every weight trained, the learning
    rate by warm-up and cosine, in float32.

    Source: Star Elastic, arXiv 2605.07182.

    Where we differ: the paper prunes channels of the residual stream and hidden units in one model with a learned
    router for its shape; we take one axis and given sizes (our budget router, `harness.elastic_router`, is not used
    here). Our text is at most what is at hand, not 160 billion tokens, and training has one stage of one length. A
    layer's router is not balanced anew. Nested quantisation is not offered.
    """

    axis: str
    budgets: tuple[float, ...]
    shares: tuple[float, ...]
    multiple: int
    text: Calibration
    epochs: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float
    warmup: int
    seed: int

    def __post_init__(self) -> None:
        if self.axis not in ("experts", "width"):
            raise UserError(f"recovery.axis={self.axis} is not one of experts, width.")
        if not all(0 < ratio < 1 for ratio in self.budgets) or len(set(self.budgets)) < len(self.budgets):
            raise UserError(f"recovery.budgets={list(self.budgets)}: give different shares to remove, between 0 and 1.")
        if len(self.shares) != len(self.budgets) + 1 or min(self.shares) < 0 or not math.isclose(sum(self.shares), 1):
            raise UserError(
                f"recovery.shares={list(self.shares)} must be one number for the whole model and one for each of the "
                f"{len(self.budgets)} budgets, none negative, and 1 in all."
            )
        for name, least in (("multiple", 1), ("epochs", 0), ("batch_size", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UserError(f"recovery.{name}={getattr(self, name)} is below {least}.")
        if not 0 <= self.final_learning_rate <= self.learning_rate or self.learning_rate == 0:
            raise UserError("recovery.learning_rate must be above 0, and recovery.final_learning_rate at most that.")
        if self.text.held_out < 1:
            raise UserError("recovery.text.held_out=0: each size is measured on sequences held out. Set 1 or more.")

    @property
    def ignores_plan(self) -> bool:
        return self.axis == "width"

    @property
    def forward_tokens(self) -> int:
        """Importance, the student forwards and back with the teacher beside it, and what is held out at every size."""
        sizes_measured = 2 * (len(self.budgets) + 1)
        return self.text.length * ((1 + 4 * self.epochs) * self.text.sequences + sizes_measured * self.text.held_out)

    def check(self, model: Model, method: Method) -> None:
        model.check_compressible()
        check_plain(model)
        self.text.check()
        size = _layout(str(model.folder))
        if self.axis == "experts":
            self._check_method(method)
        else:
            check_cuttable(model)
        for ratio in self.budgets:
            self.budget(ratio, model, size)

    def _check_method(self, method: Method) -> None:
        unknown = method.needs & set(MEASURES)
        if not method.nested or isinstance(method, SequentialMethod) or unknown:
            raise UserError(
                f"{type(method).__name__} gives no one order of the experts from statistics alone, so its plans are no "
                "prefixes of each other. Choose a method that prunes by a score, such as reap, or recovery.axis=width."
            )

    def budget(self, ratio: float, model: Model, size: Mapping[str, int]) -> Budget:
        """What a ratio leaves of the axis. Raises UserError if the model cannot be cut there."""
        name, whole = f"{ratio:g}", size[self.axis]
        keep = budget.keep_count(whole, ratio)
        if self.axis == "experts":
            budget.check_keep(dict.fromkeys(model.experts, keep), model.experts, ratio, model.config, model.top_k)
            return Budget(name, experts=keep)
        width = -(-keep // self.multiple) * self.multiple
        if width >= whole > keep:
            raise UserError(
                f"ratio={name} keeps {keep} of {whole} hidden units, and that is rounded up to a multiple of "
                f"{self.multiple}, which leaves nothing to remove. Take a larger ratio or a smaller recovery.multiple."
            )
        return Budget(name, width=min(width, whole))

    def remake(self, given: Remaking, folder: Path) -> dict[str, Any]:
        """Report: training tokens and seconds (of the parent that all ratios share), KL to the original on held-out
        text before and after training, of each budget, and of this ratio.
        """
        size = _layout(str(given.model.folder))
        here = self.budget(given.ratio, given.model, size)
        self._check_plan(given, here)
        parent = self.parent(given)
        cut(given.model.elsewhere(parent / WEIGHTS), here, folder)
        made = json.loads((parent / REPORT).read_text())
        entry = next((entry for entry in made["budgets"] if entry["name"] == here.name), None)
        measured = {name: entry[name] for name in ("kl_before", "kl_after")} if entry else {}
        return {**made, "trained": entry is not None and self.epochs > 0, **measured}

    def _check_plan(self, given: Remaking, here: Budget) -> None:
        """The cell's plan is the prefix that is cut, or the order would not be its method's."""
        counts = set(given.plan.distinct_experts().values())
        if self.axis == "experts" and (counts != {here.experts} or not given.plan.only_prunes):
            raise UserError(
                f"The plan leaves {sorted(counts)} distinct experts per layer, and an elastic model {here.experts} in "
                "each. Use allocation=uniform and a method that prunes."
            )

    def parent(self, given: Remaking) -> Path:
        """The folder of the sorted, trained parent, its manifest, order and report; made once for all ratios."""
        experts = self._expert_order(given)
        order = {} if experts is None else {str(layer): kept.tolist() for layer, kept in experts.items()}
        name = key(model=given.model.digest, remake=identity(self), order=order)
        known = given.store.path("elastic", name).exists()
        maker = _Parent(self, given.model, given.store)
        found = given.store.once("elastic", name, lambda path: maker.make(path, experts), given.model.nbytes)
        say("sort", name, "cached" if known else "made")
        return found

    def _expert_order(self, given: Remaking) -> dict[int, np.ndarray] | None:
        """The order of the cell's method, [E] for each layer; None where it is not asked."""
        if self.axis != "experts":
            return None
        kept = orders(given.stats, given.method, given.model.experts, given.model.top_k)
        found = {layer: expert_order(counts) for layer, counts in kept.items()}
        for layer, plan in given.plan.layers.items():
            rows = plan.kept_rows
            assert sorted(found[layer][: len(rows)]) == list(rows), "the plan is a prefix of its method's order"
        return found

    def recipe(self) -> distill.Recipe:
        """Pure distillation, as `harness.distill` trains."""
        return distill.Recipe(
            objective="kd",
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            final_learning_rate=self.final_learning_rate,
            warmup=self.warmup,
            kd_start=1.0,
            kd_end=1.0,
            balance=0.0,
            teacher_tokens=None,
            seed=self.seed,
        )


@functools.cache
def _layout(folder: str) -> dict[str, int]:
    """Sizes of the axes of the model in this folder, without its weights. Raises UserError for unknown layouts."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        )
    dims(empty)
    return sizes(empty)


@dataclass(frozen=True)
class _Parent:
    """The making of one sorted parent."""

    options: Elastic
    original: Model
    store: Store

    def make(self, path: Path, experts: dict[int, np.ndarray] | None) -> None:
        start = time.perf_counter()
        ids, held = packed(self.options.text, self.original, self.store)
        teacher, model = (trainable(self.original) for _ in range(2))
        teacher.requires_grad_(False)
        order = self._order(model, ids, experts)
        sort_model(model, order)
        cuts = [Budget("full"), *(self.options.budget(r, self.original, sizes(model)) for r in self.options.budgets)]
        student = Nested(model, cuts)
        before = [self._measure(student, place, teacher, held) for place in range(len(cuts))]
        trained = self._train(student, teacher, ids) if self.options.epochs else {"tokens": 0, "steps": 0}
        weights = path / WEIGHTS
        weights.mkdir(parents=True)
        identity_plan = Plan.identity(self.original.experts)
        save(model, self.original, identity_plan, weights)
        stored = Nested(trainable(self.original.elsewhere(weights)), cuts)
        after = [self._measure(stored, place, teacher, held) for place in range(len(cuts))]
        about = manifest(model, order, cuts, self.original.digest)
        entries = [
            {**entry, "kl_before": first, "kl_after": last}
            for entry, first, last in zip(about["budgets"], before, after, strict=True)
        ]
        report = {**trained, "budgets": entries, "seconds": time.perf_counter() - start}
        (path / MANIFEST).write_text(json.dumps(about, indent=1))
        (path / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False))
        save_file(dict(_flat(order)), path / ORDER)

    def _order(self, model: PreTrainedModel, ids: np.ndarray, experts: dict[int, np.ndarray] | None) -> NestedOrder:
        """The axis in question by importance; the others as they lie."""
        same = NestedOrder.identity(model)
        if experts is not None:
            return dataclasses.replace(same, experts=experts)
        found = importance(model, packed_batches(ids, self.options.text.batch_size))
        return dataclasses.replace(same, units=found.order(dict(same.experts)).units)

    def _train(self, student: Nested, teacher: PreTrainedModel, ids: np.ndarray) -> dict[str, Any]:
        recipe = self.options.recipe()
        batches = recipe.batches(ids)
        shares = np.array(self.options.shares) / sum(self.options.shares)
        draws = np.random.default_rng(self.options.seed).choice(len(shares), size=len(batches), p=shares)
        student.draws = iter(draws.tolist())
        losses = distill.train(student, teacher, batches, recipe, self.original.top_k, 0, len(batches))
        return {
            "tokens": sum(batch.numel() for batch in batches),
            "steps": len(batches),
            "drawn": np.bincount(draws, minlength=len(shares)).tolist(),
            "losses": losses,
        }

    def _measure(self, student: Nested, place: int, teacher: PreTrainedModel, held: np.ndarray) -> float:
        """KL(original || size) in nats per token of the held-out text."""
        student.draws = itertools.repeat(place)
        return distill.held_out(student, teacher, held, self.options.batch_size)["kl"]


def _flat(order: NestedOrder) -> Iterator[tuple[str, np.ndarray]]:
    for axis, layers in (("experts", order.experts), ("units", order.units), ("heads", order.heads)):
        yield from ((f"{axis}.{layer}", np.ascontiguousarray(rows)) for layer, rows in layers.items())
    yield "hidden", order.hidden


class Nested(nn.Module):
    """A sorted model that computes, at each call, what its slice at the next of ``draws`` computes. Gradients reach the
    shared weights through the slice.
    """

    def __init__(self, model: PreTrainedModel, budgets: Sequence[Budget]) -> None:
        super().__init__()
        self.model, self.budgets = model, tuple(budgets)
        self.skeletons = [skeleton(model, one) for one in budgets]  # a plain list: they hold no parameters of their own
        self.draws: Iterator[int] = itertools.repeat(0)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, **asked: Any) -> Any:
        place = next(self.draws)
        return functional_call(self.skeletons[place], views(self.model, self.budgets[place]), kwargs=asked)
