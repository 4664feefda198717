"""Random checkpoints of several architectures, with a byte-level tokenizer, that transformers and vLLM's CPU kernels
both take (head size 32, widths that are multiples of 32).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

END = "<|endoftext|>"
EXPERTS, TOP_K = 8, 2


def _configs() -> dict[str, Callable[..., PreTrainedConfig]]:
    """A tiny model of each architecture that vLLM's CPU build computes as transformers does."""
    experts = {"num_experts": EXPERTS, "moe_intermediate_size": 32}
    local = {"num_local_experts": EXPERTS, "intermediate_size": 32}
    return {
        "qwen3_moe": lambda **common: Qwen3MoeConfig(**common, **experts, norm_topk_prob=True),
        "qwen2_moe": lambda **common: Qwen2MoeConfig(
            **common, **experts, shared_expert_intermediate_size=64, norm_topk_prob=False, decoder_sparse_step=1
        ),
        "mixtral": lambda **common: MixtralConfig(**{**common, **local}),
        "olmoe": lambda **common: OlmoeConfig(**{**common, "num_experts": EXPERTS, "intermediate_size": 32}),
        "glm4_moe": lambda **common: Glm4MoeConfig(
            **common,
            n_routed_experts=EXPERTS,
            moe_intermediate_size=32,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.5,
            norm_topk_prob=True,
        ),
        "granitemoe": lambda **common: GraniteMoeConfig(**{**common, **local}),
        "gpt_oss": lambda **common: GptOssConfig(**{**common, **local}, sliding_window=64),
        "ernie4_5_moe": lambda **common: Ernie4_5_MoeConfig(
            **common,
            moe_num_experts=EXPERTS,
            moe_k=TOP_K,
            moe_intermediate_size=32,
            moe_num_shared_experts=1,
            moe_layer_start_index=0,
        ),
    }


FAMILIES = tuple(family for family in _configs() if family != "ernie4_5_moe")  # served as transformers computes them


def write_tokenizer(folder: Path) -> dict[str, int]:
    """One whose tokens are bytes; returns their numbers."""
    vocabulary = {symbol: index for index, symbol in enumerate([END, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)
    return vocabulary


def write_checkpoint(
    folder: Path, change: Callable[[torch.nn.Module], None] | None = None, family: str = "qwen3_moe"
) -> Path:
    """Write the float32 checkpoint; ``change`` may plant something in its weights first. Every byte is a token."""
    vocabulary = write_tokenizer(folder)
    torch.manual_seed(0)
    config = _configs()[family](
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Greedy output is printable ASCII, so that it decodes and encodes to the same tokens: all else has the logit 0.
    printable = [vocabulary[chr(code)] for code in range(33, 127)]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.2)
        rows = torch.zeros(320, 1)
        rows[printable] = 1
        model.lm_head.weight.mul_(rows)
        if change is not None:
            change(model)
    model.save_pretrained(folder)
    return folder
