"""A random mixture-of-experts checkpoint of any size, written layer by layer: for measuring, not for scoring."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """Of a Qwen3-MoE: H hidden channels, E experts of width I in each layer, k of them per token."""

    layers: int
    hidden: int
    experts: int
    width: int
    top_k: int
    vocabulary: int = 32_000

    @property
    def config(self) -> dict[str, object]:
        """Its config.json."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": max(1, self.hidden // 512),
            "head_dim": 64,
            "max_position_embeddings": 32_768,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.width,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
        }

    def layer(self, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of a layer's tensors."""
        prefix, h = f"model.layers.{index}.", self.hidden
        keys = 64 * max(1, h // 512)
        for name, shape in {
            "q_proj.weight": (h, h), "k_proj.weight": (keys, h), "v_proj.weight": (keys, h), "o_proj.weight": (h, h),
            "q_norm.weight": (64,), "k_norm.weight": (64,),
        }.items():  # fmt: skip
            yield f"{prefix}self_attn.{name}", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", (h,)
        yield f"{prefix}mlp.gate.weight", (self.experts, h)
        for expert in range(self.experts):
            for part, shape in {"gate": (self.width, h), "up": (self.width, h), "down": (h, self.width)}.items():
                yield f"{prefix}mlp.experts.{expert}.{part}_proj.weight", shape

    def rest(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Those outside the layers."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)


def write(folder: Path, size: Size, seed: int = 0) -> int:
    """Write it, a file for each layer; the same seed makes the same bytes. Returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    index: dict[str, str] = {}
    total = 0
    for number in range(-1, size.layers):
        file = f"model-{number + 2:05}-of-{size.layers + 1:05}.safetensors"
        named = size.rest() if number < 0 else size.layer(number)
        tensors = {name: _random(shape, generator) for name, shape in named}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    (folder / "config.json").write_text(json.dumps(size.config))
    return total


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Weights that keep the size of what goes through them; norms near one."""
    drawn = torch.randn(shape, generator=generator)
    return (1 + 0.1 * drawn if len(shape) == 1 else drawn * shape[-1] ** -0.5).bfloat16()


def main() -> None:
    """Write one: the folder and the size as JSON on the command line."""
    write(Path(sys.argv[1]), Size(**json.loads(sys.argv[2])))
