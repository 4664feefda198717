"""Train the tiny Qwen3-MoE language model on the tiny world, on a CPU, in two stages.

    python -m tasks.tiny.train --seed 0 --out stage1
    python -m tasks.tiny.train --seed 1 --start stage1 --expert-dropout 0.5 --steps 700 --warmup 30 --decay 600 \\
        --rate 1.5e-3 --out model

The first learns the world; the second goes on while random experts are hidden, which gives the model the redundancy
that large ones have.

Warm-up, constant rate, then a linear decay to zero. Every batch depends only on the seed and its step number.
A file out/decay-now starts the decay early. Score a checkpoint while training goes on:

    python -m tasks.tiny.evaluate --model model/checkpoint --limit 48

The weights are those of a plain run with as many steps as were really made.
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from tasks.tiny.experts import register
from tasks.tiny.tokenizer import VOCAB_SIZE, train_tokenizer
from tasks.tiny.world import training_document

AUX_LOSS = 0.01
LOG_EVERY = 25


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights. Lengths in tokens, steps in optimizer updates."""

    seed: int = 0
    steps: int = 3400
    warmup: int = 100
    decay: int = 1500
    rate: float = 2e-3
    weight_decay: float = 0.05
    rows: int = 16
    length: int = 256
    expert_dropout: float = 0.0

    def rate_at(self, step: int) -> float:
        """The learning rate of update `step` (0-based)."""
        return self.rate * min(1.0, (step + 1) / self.warmup, (self.steps - step) / self.decay)


def model_config() -> Qwen3MoeConfig:
    """4 layers of 32 experts, 4 per token; 6.6M parameters, 13 MB in bfloat16."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # type: ignore[call-arg]
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        router_aux_loss_coef=AUX_LOSS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def batch(recipe: Recipe, step: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids [rows, length + 1]: every row starts with a document; documents end in the end token."""
    rng = Random(f"train/{recipe.seed}/{step}")
    rows = []
    for _ in range(recipe.rows):
        row: list[int] = []
        while len(row) <= recipe.length:
            row += [*tokenizer(training_document(rng))["input_ids"], tokenizer.eos_token_id]
        rows.append(row[: recipe.length + 1])
    return torch.tensor(rows)


def balance_loss(router_logits: Sequence[Tensor], experts_per_token: int) -> Tensor:
    """Mean over layers of E sum_e (share of choices of e)(mean probability of e), 1 when balanced (Switch, eq. 4).

    Computed per layer: transformers' own pools the layers, so one layer's imbalance could hide another's.
    """
    losses = []
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        chosen = probs.topk(experts_per_token, dim=-1).indices
        share = functional.one_hot(chosen, probs.shape[-1]).float().mean((0, 1))
        losses.append(probs.shape[-1] * (share * probs.mean(0)).sum())
    return torch.stack(losses).mean()


def drop_experts(model: Qwen3MoeForCausalLM, recipe: Recipe, step: int, process: int) -> list[RemovableHandle]:
    """Hide a random eighth or quarter of each layer's experts from its router, in `expert_dropout` of all updates.

    What a hidden expert did, others must learn to do too. Large models have such redundancy; one this small has none
    unless it is trained in, and would break at the first expert removed. Returns the hooks to take off again.
    """
    rng = Random(f"experts/{recipe.seed}/{step}/{process}")
    if rng.random() >= recipe.expert_dropout:
        return []
    handles = []
    for layer in model.model.layers:
        experts = model.config.num_experts
        hidden = rng.sample(range(experts), experts * rng.randint(1, 2) // 8)
        handles.append(layer.mlp.gate.register_forward_hook(partial(route_around, hidden)))
    return handles


def route_around(
    hidden: list[int], router: nn.Module, _: object, output: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """A router's (logits, gates, chosen experts) with the hidden experts left out of the softmax."""
    logits = output[0]
    masked = logits.float().index_fill(-1, torch.tensor(hidden), float("-inf"))
    gates, chosen = masked.softmax(-1).topk(output[2].shape[-1], dim=-1)
    return logits, (gates / gates.sum(-1, keepdim=True)).to(logits.dtype), chosen


def optimizer_of(model: Qwen3MoeForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95), fused=True)


def average_gradients(model: Qwen3MoeForCausalLM) -> None:
    """Replace every gradient by its mean over the processes."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def update(model: Qwen3MoeForCausalLM, optimizer: torch.optim.AdamW, ids: Tensor, rate: float) -> tuple[float, float]:
    """One optimizer step on ids [rows, length + 1]; returns this process's (cross-entropy in nats, balance loss)."""
    out = model(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False)
    loss = functional.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
    balance = balance_loss(out.router_logits, model.config.num_experts_per_tok)
    (loss + AUX_LOSS * balance).backward()
    average_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), balance.item()


def export(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the model in bfloat16 and the tokenizer as a normal checkpoint; the model itself stays float32."""
    copy = Qwen3MoeForCausalLM(model.config).bfloat16()
    copy.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    copy.generation_config.do_sample = False
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)


@dataclass(frozen=True)
class Schedule:
    """Where files go, every how many steps a checkpoint is written, and the checkpoint to go on from, if any."""

    out: Path
    checkpoint_every: int
    start: Path | None = None


class Log:
    """training_log.csv and one line on the screen, every LOG_EVERY steps."""

    def __init__(self, path: Path, recipe: Recipe):
        self.file = path.open("w", newline="")
        self.rows = csv.writer(self.file)
        self.rows.writerow(["step", "tokens", "loss", "balance", "rate"])
        self.batch_tokens = recipe.rows * recipe.length
        self.started = time.monotonic()
        self.losses: list[tuple[float, float]] = []

    def add(self, step: int, losses: tuple[float, float], rate: float) -> None:
        """Note one update; `step` counts finished updates."""
        self.losses.append(losses)
        if step % LOG_EVERY:
            return
        loss, balance = (sum(column) / len(self.losses) for column in zip(*self.losses, strict=True))
        self.losses.clear()
        tokens = step * self.batch_tokens
        self.rows.writerow([step, tokens, f"{loss:.4f}", f"{balance:.3f}", f"{rate:.2e}"])
        self.file.flush()
        pace = tokens / (time.monotonic() - self.started)
        print(f"step {step} tokens {tokens} loss {loss:.4f} balance {balance:.3f} {pace:.0f} tok/s", flush=True)


def decay_wanted(out: Path) -> bool:
    """Whether the file out/decay-now exists, as process 0 sees it."""
    flag = torch.tensor(int((out / "decay-now").exists()))
    dist.broadcast(flag, 0)
    return bool(flag)


def train(process: int, recipe: Recipe, schedule: Schedule, processes: int, meeting_point: str) -> None:
    """Train as one of `processes` processes, each on its share of every batch; process 0 writes all files."""
    dist.init_process_group("gloo", f"file://{meeting_point}", rank=process, world_size=processes)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    torch.manual_seed(recipe.seed)
    if schedule.start:
        tokenizer = AutoTokenizer.from_pretrained(schedule.start)
        model = Qwen3MoeForCausalLM.from_pretrained(schedule.start, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(recipe.seed)
        model = Qwen3MoeForCausalLM(model_config())
    model.set_experts_implementation(register())
    optimizer = optimizer_of(model, recipe)
    log = Log(schedule.out / "training_log.csv", recipe) if process == 0 else None
    step = 0
    while step < recipe.steps:
        if step % LOG_EVERY == 0 and recipe.steps - step > recipe.decay and decay_wanted(schedule.out):
            recipe = replace(recipe, steps=step + recipe.decay)
            print(f"decay starts now: {recipe}", flush=True)
        rate = recipe.rate_at(step)
        handles = drop_experts(model, recipe, step, process)
        losses = update(model, optimizer, batch(recipe, step, tokenizer)[process::processes], rate)
        for handle in handles:
            handle.remove()
        step += 1
        if log:
            log.add(step, losses, rate)
            if step % schedule.checkpoint_every == 0:
                export(model, tokenizer, schedule.out / "checkpoint")
    if process == 0:
        export(model, tokenizer, schedule.out)
    dist.destroy_process_group()


def main() -> None:
    """Read the recipe from the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from this checkpoint, with a new optimizer and schedule")
    parser.add_argument("--processes", type=int, default=2, help="one thread each; rows must divide by it")
    parser.add_argument("--checkpoint-every", type=int, default=250)
    options = vars(parser.parse_args())
    processes = options.pop("processes")
    schedule = Schedule(**{name: options.pop(name) for name in ("out", "checkpoint_every", "start")})
    schedule.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (Recipe(**options), schedule, processes, f"{folder}/meet"), nprocs=processes)


if __name__ == "__main__":
    main()
