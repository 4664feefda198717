"""Train the tiny Qwen3-MoE language model on the tiny world, on a CPU.

    python -m tasks.tiny.train --out model

Two things make its experts worth choosing among. A loss on the router lets each domain use only some of the experts,
so that experts specialise; and in training every token does without one of its experts now and then, so that the next
best learns to stand in. Without the second, a model this small breaks at the first expert removed.

Warm-up, constant rate, then a linear decay to zero. Every batch depends only on the seed and its step number.
Score a checkpoint while training goes on:

    python -m tasks.tiny.evaluate --model model/checkpoint --limit 48
"""

import argparse
import csv
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from tasks.tiny.experts import register
from tasks.tiny.tokenizer import VOCAB_SIZE, train_tokenizer
from tasks.tiny.world import DOMAINS, training_document

BALANCE_LOSS = 0.03
SPREAD_LOSS = 0.1
LOG_EVERY = 25


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights. Lengths in tokens, steps in optimizer updates.

    domain_experts: to how many experts of a layer the router is drawn to send a domain. skip: probability with which a
    token does without an expert it chose.
    """

    seed: int = 0
    steps: int = 6000
    warmup: int = 100
    decay: int = 2500
    rate: float = 2e-3
    weight_decay: float = 0.05
    rows: int = 16
    length: int = 256
    domain_experts: int = 12
    skip: float = 0.06

    def rate_at(self, step: int) -> float:
        """The learning rate of update `step` (0-based)."""
        return self.rate * min(1.0, (step + 1) / self.warmup, (self.steps - step) / self.decay)


def model_config() -> Qwen3MoeConfig:
    """4 layers of 32 experts, 4 per token; 6.7M parameters, 13 MB in bfloat16."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE_LOSS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def batch(recipe: Recipe, step: int, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Token ids and the domain of each, both [rows, length + 1]. Rows start with a document; the end token ends one."""
    rng = Random(f"train/{recipe.seed}/{step}")
    names = list(DOMAINS)
    rows, origins = [], []
    for _ in range(recipe.rows):
        row: list[int] = []
        origin: list[int] = []
        while len(row) <= recipe.length:
            domain, text = training_document(rng)
            row += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            origin += [names.index(domain)] * (len(row) - len(origin))
        rows.append(row[: recipe.length + 1])
        origins.append(origin[: recipe.length + 1])
    return torch.tensor(rows), torch.tensor(origins)


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


def spread_loss(router_logits: Sequence[Tensor], domains: Tensor, domain_experts: int) -> Tensor:
    """Mean over layers and domains of max(0, H(expert | domain) - ln domain_experts), in nats.

    With the balance loss, which raises H(expert), this is the mutual information of experts and domains that Mod-Squad
    (arXiv 2212.08066) maximises, but bounded: once a domain is gathered on few experts nothing pulls any more.
    router_logits: [tokens, experts] per layer. domains: [tokens], the domain of each token.
    """
    members = functional.one_hot(domains, len(DOMAINS)).float()
    members = members / members.sum(0).clamp_min(1)
    losses = []
    for logits in router_logits:
        usage = members.T @ logits.float().softmax(-1)
        entropy = -(usage * usage.clamp_min(1e-9).log()).sum(-1)
        losses.append((entropy - math.log(domain_experts)).clamp_min(0).mean())
    return torch.stack(losses).mean()


class SkipExperts:
    """A hook on routers: each chosen expert is skipped with probability ``skip``, and the token's next best serves.

    What one expert does, the next must learn to do too. Large models have such redundancy; one this small has none
    unless it is trained in.
    """

    def __init__(self, skip: float):
        self.skip = skip

    def __call__(self, router: nn.Module, _: object, output: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """A router's (logits, gates, chosen experts) [tokens, k], with gates that sum to one."""
        logits, k = output[0], output[2].shape[-1]
        best = logits.float().softmax(-1).topk(2 * k, dim=-1)
        skipped = torch.rand_like(best.values) < self.skip
        gates, place = best.values.masked_fill(skipped, 0).topk(k, dim=-1)
        gates = gates / gates.sum(-1, keepdim=True).clamp_min(1e-9)
        return logits, gates.to(logits.dtype), best.indices.gather(-1, place)


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


Losses = tuple[float, float, float]


def update(
    model: Qwen3MoeForCausalLM, optimizer: torch.optim.AdamW, ids: Tensor, domains: Tensor, recipe: Recipe, rate: float
) -> Losses:
    """One optimizer step on ids [rows, length + 1]; returns this process's cross-entropy in nats, balance, spread."""
    out = model(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False)
    loss = functional.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
    balance = balance_loss(out.router_logits, model.config.num_experts_per_tok)
    spread = spread_loss(out.router_logits, domains[:, :-1].flatten(), recipe.domain_experts)
    (loss + BALANCE_LOSS * balance + SPREAD_LOSS * spread).backward()
    average_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), balance.item(), spread.item()


def export(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the model in bfloat16 and the tokenizer as a normal checkpoint; the model itself stays float32."""
    copy = Qwen3MoeForCausalLM(model.config).bfloat16()
    copy.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    copy.generation_config.do_sample = False
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)


class Log:
    """training_log.csv and one line on the screen, every LOG_EVERY steps."""

    def __init__(self, path: Path, recipe: Recipe):
        self.file = path.open("w", newline="")
        self.rows = csv.writer(self.file)
        self.rows.writerow(["step", "tokens", "loss", "balance", "spread", "rate"])
        self.batch_tokens = recipe.rows * recipe.length
        self.started = time.monotonic()
        self.losses: list[Losses] = []

    def add(self, step: int, losses: Losses, rate: float) -> None:
        """Note one update; `step` counts finished updates."""
        self.losses.append(losses)
        if step % LOG_EVERY:
            return
        loss, balance, spread = (sum(column) / len(self.losses) for column in zip(*self.losses, strict=True))
        self.losses.clear()
        tokens = step * self.batch_tokens
        self.rows.writerow([step, tokens, f"{loss:.4f}", f"{balance:.3f}", f"{spread:.3f}", f"{rate:.2e}"])
        self.file.flush()
        pace = tokens / (time.monotonic() - self.started)
        print(f"step {step} loss {loss:.4f} balance {balance:.3f} spread {spread:.3f} {pace:.0f} tokens/s", flush=True)


def train(process: int, recipe: Recipe, out: Path, checkpoint_every: int, processes: int, meeting_point: str) -> None:
    """Train as one of `processes` processes, each on its share of every batch; process 0 writes all files."""
    dist.init_process_group("gloo", f"file://{meeting_point}", rank=process, world_size=processes)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(recipe.seed)
    model = Qwen3MoeForCausalLM(model_config())
    model.set_experts_implementation(register())
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(SkipExperts(recipe.skip))
    optimizer = optimizer_of(model, recipe)
    log = Log(out / "training_log.csv", recipe) if process == 0 else None
    for step in range(recipe.steps):
        torch.manual_seed(hash((recipe.seed, step, process)))  # of the experts skipped
        ids, domains = (rows[process::processes] for rows in batch(recipe, step, tokenizer))
        rate = recipe.rate_at(step)
        losses = update(model, optimizer, ids, domains, recipe, rate)
        if log:
            log.add(step + 1, losses, rate)
            if (step + 1) % checkpoint_every == 0:
                export(model, tokenizer, out / "checkpoint")
    if process == 0:
        export(model, tokenizer, out)
    dist.destroy_process_group()


def main() -> None:
    """Read the recipe from the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2, help="one thread each; rows must divide by it")
    parser.add_argument("--checkpoint-every", type=int, default=250)
    options = vars(parser.parse_args())
    out, checkpoint_every, processes = (options.pop(name) for name in ("out", "checkpoint_every", "processes"))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Recipe(**options), out, checkpoint_every, processes, f"{folder}/meet")
        torch.multiprocessing.spawn(train, arguments, nprocs=processes)


if __name__ == "__main__":
    main()
