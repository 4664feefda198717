"""Random mixture-of-experts models that compute in float64 from end to end, for what must hold to the last digits."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig


class Exact(ModuleType):
    """torch, whose single precision is double: model code computes norms and gates in float32 whatever it is given."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def compute_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the models of these families compute everything in float64."""
    for family in ("qwen3_moe", "mixtral", "qwen2_moe"):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        monkeypatch.setattr(module, "torch", Exact("torch"))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def build(kind: str) -> PreTrainedModel:
    """A random float64 model of 8 experts with 16 hidden units, 32 channels and 3 key-value heads of 2 query heads."""
    common = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 128,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": "tied" in kind,
    }
    routed = {"num_experts": 8, "moe_intermediate_size": 16, "intermediate_size": 24}
    config = {
        "qwen3_moe": lambda: Qwen3MoeConfig(**common, **routed, head_dim=8, norm_topk_prob=True, mlp_only_layers=[1]),
        "mixtral": lambda: MixtralConfig(**common, head_dim=8, num_local_experts=8, intermediate_size=16),
        "qwen2_moe": lambda: Qwen2MoeConfig(**common, **routed, head_dim=8, shared_expert_intermediate_size=20),
    }[kind.split()[0]]()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.25)
    return model
