"""Recovery: training on after compression, with the original model as the teacher."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from harness import depth, distill, lora
from harness.blocks import compress, expert_counts
from harness.data import Calibration
from harness.distill import Recipe, trainable
from harness.errors import UserError
from harness.models import Model
from harness.packing import packed
from harness.plan import Plan
from harness.remake import Remaking, check_even, check_no_copies, check_plain, save
from harness.roles import EXPERT_COUNT, role

if TYPE_CHECKING:
    from methods import Method

FIRST_STAGE = 0.1  # share of the steps that progressive training spends on half of the depth cut
INFLUENCE_SEQUENCES = 64  # of the text, that blocks are ranked on


@dataclass(frozen=True)
class Recovery(Recipe):
    """The compressed model learns, from text and from what the original says about it, to speak like the original.

        L = (1 - l) L_LM + l L_KD + balance * L_balance

    with L_LM the cross-entropy of the next token, L_KD the soft cross-entropy against the original's distribution, l
    linear in the steps from ``kd_start`` to ``kd_end`` (1 to 0.75 in the paper), and L_balance the load-balance loss
    over the experts that are left. AdamW, learning rate by warm-up and cosine, everything in float32.

    Options: ``parameters`` router (router rows only), lora (those and low-rank adapters of ``rank`` on every expert's
    matrices, merged at the end) or all. ``objective`` kd, or lm: the control that sees the same tokens without a
    teacher. ``initial`` plan, or random: the control that shares nothing but the compressed model's shape.
    ``drop_layers`` decoder blocks go besides experts: the ``drop`` last ones (the paper's choice) or those of least
    influence (ShortGPT, for models of one kind of attention). ``progressive``: the first tenth of the steps with half
    of those blocks gone and all experts, then the rest of the cut and the plan; one learning rate schedule. ``text``:
    what is trained on, and, held out, what KL and cross-entropy are measured on before and after. The rest is
    `harness.distill.Recipe`'s.

    Source: SlimQwen, arXiv 2605.08738; adapters: LoRA, arXiv 2106.09685; influence: ShortGPT, arXiv 2403.03853.

    Where we differ: the paper trains on 120 to 400 billion tokens, we on what is at hand: this carries the recipe, not
    its results. The teacher runs beside the student instead of being cached. Load balance is per batch and layer, not
    global. Each stage starts AdamW anew. Multi-token heads are not trained, since transformers drops their weights.
    """

    parameters: str
    initial: str
    rank: int
    drop_layers: int
    drop: str
    progressive: bool
    text: Calibration
    ignores_plan: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _one_of("objective", self.objective, ("kd", "lm"))
        _one_of("parameters", self.parameters, ("router", "lora", "all"))
        _one_of("initial", self.initial, ("plan", "random"))
        _one_of("drop", self.drop, ("last", "influence"))
        for name, least in (("epochs", 1), ("batch_size", 1), ("warmup", 0), ("balance", 0), ("drop_layers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"recovery.{name}={getattr(self, name)} is below {least}.")
        for name in ("kd_start", "kd_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"recovery.{name}={getattr(self, name)} is not between 0 and 1.")
        if not 0 <= self.final_learning_rate <= self.learning_rate or self.learning_rate == 0:
            raise UserError("recovery.learning_rate must be above 0, and recovery.final_learning_rate at most that.")
        self._check_together()

    def _check_together(self) -> None:
        if self.parameters == "lora" and self.rank < 1:
            raise UserError(f"recovery.rank={self.rank}: adapters have a rank of 1 or more.")
        if self.initial == "random" and (self.parameters != "all" or self.progressive):
            raise UserError(
                "recovery.initial=random starts from nothing: all parameters must be trained "
                "(recovery.parameters=all), in one stage (recovery.progressive=false)."
            )
        if self.progressive and self.drop_layers < 2:
            raise UserError(
                f"recovery.progressive trains first with half of the depth cut, and recovery.drop_layers="
                f"{self.drop_layers} has no half. (There is no plan in between that would drop half of the experts.) "
                "Set recovery.drop_layers to 2 or more, or recovery.progressive=false."
            )
        if self.progressive and self.epochs * self.text.sequences <= self.batch_size:
            raise UserError(
                "recovery.progressive has two stages, and the text makes one step. Lower recovery.batch_size."
            )
        if self.text.held_out < 1:
            raise UserError(
                "recovery.text.held_out=0: recovery is measured on sequences held out. Set it to 1 or more."
            )

    @property
    def forward_tokens(self) -> int:
        """The student forwards and back, the teacher beside it, and what is held out."""
        passes = 4 if self.objective == "kd" else 3
        return self.text.length * (passes * self.epochs * self.text.sequences + 5 * self.text.held_out)

    def check(self, model: Model, method: Method) -> None:
        from methods.none import NoCompression

        model.check_compressible()
        check_plain(model)
        self.text.check()
        if isinstance(method, NoCompression) and self.initial == "plan" and not self.drop_layers:
            raise UserError("method=none compresses nothing, so there is nothing to recover. Leave recovery out.")
        if self.drop_layers:
            self._check_depth(model)

    def _check_depth(self, model: Model) -> None:
        total = depth.blocks_of(model)
        if self.drop_layers >= total:
            raise UserError(f"recovery.drop_layers={self.drop_layers}: the model has {total} blocks. Drop fewer.")
        if self.drop == "last":
            depth.check_cut(model, range(total - self.drop_layers))
        elif len(mixed := depth.kinds(model)) > 1:
            raise UserError(
                f"model {model.name!r} mixes kinds of blocks ({', '.join(sorted(mixed))}), and a cut by influence "
                "would break their pattern. Set recovery.drop=last."
            )

    def check_plan(self, plan: Plan) -> None:
        """Raise UserError for plans whose checkpoint could not be trained as what it is."""
        check_even(plan)
        if self.parameters != "router":
            check_no_copies(plan, f"recovery.parameters={self.parameters}")

    def remake(self, given: Remaking, folder: Path) -> dict[str, Any]:
        """Report: steps, training tokens and seconds; for each stage what was trained, on how much, and the losses at
        its end; KL to the original and cross-entropy on held-out tokens, before and after (of the weights as stored).
        """
        start = time.perf_counter()
        self.check_plan(given.plan)
        ids, held = packed(self.text, given.model, given.store)
        with given.store.workspace(f"recovery-{folder.name}") as work:
            teacher = trainable(given.model).requires_grad_(False)
            report = _Trainer(self, given.model, given.plan, teacher, work).run(ids, held, folder)
        return {**report, "seconds": time.perf_counter() - start}


@dataclass(frozen=True)
class _Trainer:
    """One recovery. work: an empty folder for models cut in depth."""

    options: Recovery
    original: Model
    plan: Plan
    teacher: PreTrainedModel
    work: Path

    def run(self, ids: np.ndarray, held: np.ndarray, folder: Path) -> dict[str, Any]:
        batches = self.options.batches(ids)
        removed = self._removed(ids)
        source, blocks = self._cut(removed)
        plan = depth.plan_of(self.plan, blocks)
        student = self._student(source, plan)
        before = self._measure(student, held)
        stages, first = [], 0
        if self.options.progressive:
            first = min(max(1, round(FIRST_STAGE * len(batches))), len(batches) - 1)
            shallower, kept = self._cut(removed[: len(removed) // 2])
            student = trainable(shallower)
            stages.append(self._train(student, batches, range(first)))
            state = depth.weights_of(student.state_dict(), [kept.index(block) for block in blocks])
            student = self._student(source, plan, state)
        stages.append(self._train(student, batches, range(first, len(batches))))
        save(student, source, plan, folder)
        after = self._measure(trainable(source.elsewhere(folder)), held)  # of what was stored
        return {
            "steps": len(batches),
            "tokens": sum(stage["tokens"] for stage in stages),
            "flops": sum(stage["flops"] for stage in stages),
            "flops_formula": distill.FLOPS,
            "parameters_trained": stages[-1]["parameters_trained"],
            "losses": stages[-1]["losses"],
            "stages": stages,
            "blocks": blocks,
            "held_out_tokens": int(held.size),
            **{f"{name}_before": value for name, value in before.items()},
            **{f"{name}_after": value for name, value in after.items()},
            "ce_teacher": self._measure(self.teacher, held)["ce"],
        }

    def _removed(self, ids: np.ndarray) -> list[int]:
        """Decoder blocks to remove, the first to go first."""
        number, total = self.options.drop_layers, depth.blocks_of(self.original)
        if not number or self.options.drop == "last":
            return [total - 1 - place for place in range(number)]
        return depth.by_influence(self.teacher, ids[:INFLUENCE_SEQUENCES], self.options.batch_size)[:number]

    def _cut(self, removed: Sequence[int]) -> tuple[Model, list[int]]:
        """The original without these blocks, and the blocks that stay."""
        blocks = [block for block in range(depth.blocks_of(self.original)) if block not in removed]
        if not removed:
            return self.original, blocks
        return depth.cut(self.original, blocks, self.work / str(len(blocks))), blocks

    def _student(self, source: Model, plan: Plan, weights: Mapping[str, torch.Tensor] | None = None) -> PreTrainedModel:
        """The source, with other weights if they are given, compressed by the plan."""
        student = trainable(source)
        if weights is not None:
            student.load_state_dict(weights)
        compress(student, plan.layers)
        if self.options.initial == "random":
            student.load_state_dict(_random_weights(student, self.options.seed))
        return student

    def _train(self, student: PreTrainedModel, batches: Sequence[torch.Tensor], steps: range) -> dict[str, Any]:
        """Train on the batches of these steps, with adapters if there are to be any, and without them afterwards."""
        top_k, taught = self.original.top_k, self.options.objective == "kd"
        with torch.random.fork_rng():
            torch.manual_seed(self.options.seed)
            make_trainable(student, self.options.parameters, self.options.rank)
        trained = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
        own = [batches[step] for step in steps]
        losses = distill.train(student, self.teacher, own, self.options, top_k, steps.start, len(batches))
        lora.merge(student)
        tokens = sum(batch.numel() for batch in own)
        active = {
            "student": distill.active_parameters(student, top_k),
            "teacher": distill.active_parameters(self.teacher, top_k) if taught else 0,
        }
        return {
            "steps": len(own),
            "tokens": tokens,
            "losses": losses,
            "parameters_trained": trained,
            "active_parameters": active,
            "flops": distill.flops(active["student"], active["teacher"], tokens),
        }

    def _measure(self, student: PreTrainedModel, held: np.ndarray) -> dict[str, float]:
        return distill.held_out(student, self.teacher, held, self.options.batch_size)


def make_trainable(model: PreTrainedModel, parameters: str, rank: int) -> None:
    """Let a gradient reach the router rows; for ``lora`` new adapters too; for ``all`` everything."""
    experts = expert_counts(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(parameters == "all" or role(name, weight.shape, experts).kind == "router")
    if parameters == "lora":
        lora.attach(model, rank)


def _random_weights(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """The weights of a new model of this one's shape, as its architecture draws them."""
    config = copy.deepcopy(model.config)
    left = set(expert_counts(model).values())
    assert len(left) == 1, left
    for name in EXPERT_COUNT:
        if hasattr(config.get_text_config(), name):
            setattr(config.get_text_config(), name, *left)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()


def _one_of(name: str, value: object, possible: tuple[str, ...]) -> None:
    if value not in possible:
        raise UserError(f"recovery.{name}={value} is not one of {', '.join(possible)}.")
