"""Small real mixture-of-experts models, built in the test, no network.

What takes seconds to import is imported where it is used: the process that hands tests out to others needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.models import ROOT, Model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from harness.serve import VLLM

SHARED = ROOT.parent / "shared"
EXPERTS, TOP_K, HIDDEN = 8, 2, 32


def vllm(**changes: object) -> VLLM:
    """vLLM as conf/serve/vllm.yaml sets it up, with these changes."""
    from harness.build import build

    return build("serve", {**conf("serve/vllm.yaml"), **changes})


def conf(file: str) -> dict[str, object]:
    """A file of conf/ as it stands."""
    from omegaconf import OmegaConf

    return dict(OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / file)))


def needs_shared(path: str) -> Path:
    """A file or folder beside the project, or a skip that says why."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"shared/{path} is not beside this checkout")
    return found


def family_config(family: str) -> PreTrainedConfig:
    """A tiny architecture of this family: 8 experts, top-2, 3 layers (glm4_moe: the first dense)."""
    from transformers import Glm4MoeConfig, MixtralConfig, Qwen3MoeConfig

    common = {
        "vocab_size": 97,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "num_experts_per_tok": TOP_K,
    }
    if family == "qwen3_moe":
        return Qwen3MoeConfig(
            **common, num_experts=EXPERTS, moe_intermediate_size=16, intermediate_size=48, norm_topk_prob=True
        )
    if family == "mixtral":
        return MixtralConfig(**common, num_local_experts=EXPERTS, intermediate_size=48)
    assert family == "glm4_moe"
    return Glm4MoeConfig(
        **common,
        n_routed_experts=EXPERTS,
        moe_intermediate_size=16,
        intermediate_size=48,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.5,
    )


FAMILIES = ("qwen3_moe", "mixtral", "glm4_moe")


def write_model(family: str, folder: Path, change: Callable[[torch.nn.Module], None] | None = None, **save) -> Model:
    """A random float32 model of the family on disk; ``change`` may plant something in its weights first."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.2)
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(folder, **save)
    return Model(family, str(folder))


@pytest.fixture(scope="session", params=FAMILIES)
def family_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """One random model of each family."""
    return write_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def qwen_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return write_model("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe_plain"))


def token_batches(batches: int = 3, padded: bool = True) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random ids and masks, [2, 24] each; some rows right-padded."""
    import torch

    generator = torch.Generator().manual_seed(1)
    result = []
    for batch in range(batches):
        ids = torch.randint(0, 97, (2, 24), generator=generator)
        mask = torch.ones_like(ids)
        if padded and batch != 1:
            mask[1, 17:] = 0
        result.append((ids, mask))
    return result
