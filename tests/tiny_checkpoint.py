"""A random Qwen3-MoE checkpoint with a byte-level tokenizer that transformers and vLLM's CPU kernels both take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

END = "<|endoftext|>"


def write_checkpoint(folder: Path, change: Callable[[torch.nn.Module], None] | None = None) -> Path:
    """Write the checkpoint; ``change`` may plant something in its weights first. Every byte is a token."""
    vocabulary = {symbol: index for index, symbol in enumerate([END, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            max_position_embeddings=512,
            eos_token_id=0,
            bos_token_id=None,
            pad_token_id=0,
            tie_word_embeddings=False,
            initializer_range=0.15,
        )
    )
    # Greedy output is printable ASCII, so that it decodes and encodes to the same tokens: all else has the logit 0.
    printable = [vocabulary[chr(code)] for code in range(33, 127)]
    with torch.no_grad():
        rows = torch.zeros(320, 1)
        rows[printable] = 1
        model.lm_head.weight.mul_(rows)
        if change is not None:
            change(model)
    model.save_pretrained(folder)
    return folder
